"""What a run writes down: the rows and files of a run folder, typed, with their units."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from llmeff.core.config import with_new_names
from llmeff.core.metric import Direction

SCHEMA_VERSION: Final = 1
"""Of every file below; a reader refuses any other."""

CONFIG, ENVIRONMENT, METRICS = "config.json", "env.json", "metrics.jsonl"
EVALUATIONS, EVALS, RESULT = "evaluations.jsonl", "evals.parquet", "result.json"
MODEL, CHECKPOINTS = "model", "checkpoints"
LOSS_CURVE, SAMPLES = "loss.png", "samples.png"
"""Where each part lies in a run folder. `config.json` says that a run was begun, `result.json` that it ended."""
RECORDED = (CHECKPOINTS, MODEL, LOSS_CURVE, SAMPLES, EVALS, EVALUATIONS, METRICS)
"""What a run has made by its steps. Rows come last: while they are there, checkpoints are known to be missing."""

LAST_STEPS: Final = 50
"""Steps at the end of a run that its final training loss is a mean over."""

Q = TypeVar("Q", bound=str)


class Record(BaseModel):
    """Base of what is written: frozen, without unknown fields; NaN and infinities are JSON strings ("NaN")."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields by the names that they had before, which are still read."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if isinstance(data, Mapping) else data


class StepRow(Record):
    """One line of `metrics.jsonl`: one optimizer step.

    An item is what the loss is a mean over, a token or a pixel; `Result.item` names it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this line."""
    step: int
    """Optimizer steps done, from 1."""
    loss: float
    """Mean over all items of the step, on all ranks, nats."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    learning_rate: float
    """That the step was made with."""
    items: int
    """In the step, on all ranks."""
    items_seen: int
    """From the run's beginning through this step."""
    step_s: float
    """Wall time from the fetching of the batch to the end of the update."""
    data_s: float
    """The part of `step_s` that the host spent on making the batch."""
    items_per_s: float
    """items / step_s."""
    peak_allocated_bytes: int | None = None
    """Most that CUDA's allocator has held at once, in the main process; null on a CPU."""
    forward_s: float | None = None
    """Of a synchronised step; null on all others."""
    backward_s: float | None = None
    """Of a synchronised step; null on all others."""
    optimizer_s: float | None = None
    """Of a synchronised step, clipping included; null on all others."""
    loss_scale: float | None = None
    """Of fp16; null where losses are not scaled."""
    is_warmup: bool
    """Whether the step's times are kept out of medians: the first of a process, with its compiling and first touches."""


class EvalRow(Record):
    """One row of `evals.parquet`: one held-out unit (a document, an image) at one step.

    Each entry of `metrics` is a column there.
    """

    step: int
    """Optimizer steps done before the evaluation."""
    split: str
    """`validation`, `test`, ..."""
    unit: str
    """The unit's id."""
    loss_sum: float
    """Over the unit, nats."""
    count: int
    """Items that the sum is over."""
    metrics: dict[str, float] = {}
    """More sums over the unit, by name (`bytes`)."""


class Evaluation(Record):
    """One line of `evaluations.jsonl`: what all units of one evaluation come to."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this line."""
    step: int
    """Optimizer steps done before the evaluation."""
    split: str
    """`validation`, `test`, ..."""
    metrics: dict[str, float]
    """By name, each in its own unit (`loss` in nats an item)."""


class Environment(Record):
    """`env.json`: where a run ran. An allow-list: no environment variables, no paths, no host name."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this file."""
    llmeff: str
    """Version."""
    commit: str | None
    """Of the checkout that llmeff was imported from; null where it is none."""
    diff_sha256: str | None
    """Over the package's uncommitted changes and new files; null where there are none, or no checkout."""
    python: str
    """Version."""
    packages: dict[str, str]
    """Versions of the packages that results hang on, as far as they are installed."""
    system: str
    """Operating system and machine type (`Linux x86_64`)."""
    cpu: str
    """Model name."""
    instruction_set: str | None = None
    """That oneDNN takes of it, by its name (`AVX2`); null where that is not known, and of older runs."""
    cores: int
    """That this process may use."""
    threads: int
    """Of torch, in this process."""
    memory_bytes: int
    """Of the machine."""
    device: str
    """What computes: the GPU's name, or `cpu`."""
    device_memory_bytes: int | None = None
    """Of the GPU."""
    cuda: str | None = None
    """The version that torch was built with; null where the run does not use it."""
    driver: str | None = None
    """Version of the GPU's driver."""
    earlier: tuple["Environment", ...] = ()
    """Other environments that this run was begun in and resumed from, oldest first."""


class Timings(Record):
    """Wall seconds by what they were spent on, over all processes that one run took."""

    startup_s: float = 0.0
    """Before the first step, after the imports: building, loading, resuming."""
    train_s: float = 0.0
    """Steps, without their data."""
    data_s: float = 0.0
    """Making batches inside steps."""
    eval_s: float = 0.0
    """Held-out loss, metrics and samples."""
    checkpoint_s: float = 0.0
    """Saving states, and the final model."""
    record_s: float = 0.0
    """Of the host: writing rows, drawing the display, metering. On a GPU it may pass while the device computes."""


class Quartiles(Record):
    """A spread, over the steps of one run."""

    lower: float
    """A quarter lies below."""
    median: float
    """Half lies below."""
    upper: float
    """A quarter lies above."""


class Result(Record):
    """`result.json`, written last: its presence means that the run has ended.

    `predicted`, `measured` and `error` are keyed by quantity; a quantity's name ends with its unit: `parameters`,
    `executed_flops` (of one step; counted as it runs uncompiled, which has the same contractions), `peak_bytes` (live at
    once: the allocator's peak on a GPU, live tensors on a CPU), `saved_bytes` (kept for backward; not measured where the
    run is compiled, and then predicted for it uncompiled), ...
    """

    renamed: ClassVar[Mapping[str, str]] = {"goals": "metric_directions"}

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this file."""
    status: Literal["finished", "diverged"]
    """`diverged`: a loss or norm was not finite, and the run stopped before that update."""
    diagnosis: str | None = None
    """What was seen when it diverged."""
    steps: int
    """Optimizer steps done."""
    item: str
    """What the loss is a mean over, in the singular (`token`, `pixel`)."""
    items_seen: int
    """In training."""
    parameters: int
    """Trained and frozen, shared ones once."""
    train_loss: float
    """Mean over the last 50 steps, or all where there are fewer, nats an item."""
    metrics: dict[str, dict[str, float]]
    """By split, then name: the last evaluation (`{"validation": {"loss": ..., "bits_per_byte": ...}}`)."""
    metric_directions: dict[str, Direction] = {}
    """The metrics that comparisons speak of, and which way each is better; of an older run, none."""
    references: dict[str, float] = {}
    """What metrics are set beside, made without a model (`gzip_bits_per_byte`)."""
    timings: Timings
    """By clock."""
    items_per_s: Quartiles | None
    """Over steps after warm-up; null where there were none."""
    model_flops_per_s: float | None = None
    """Of one rank, of steps after warm-up, at the median step: contractions of the model only, without recomputation."""
    mfu: float | None = None
    """`model_flops_per_s` over the device's peak at this precision, 0 to 1; null where the peak is unknown, or would be
    exceeded, which cannot be."""
    energy_j: float | None = None
    """That the GPUs of all ranks drew from the first step to the end; null where one has no counter."""
    prediction: Literal["law", "traced"] = "law"
    """Whether the predicted were computed from the config, or counted in a step of the module without numbers."""
    predicted: dict[str, float]
    """By quantity."""
    measured: dict[str, float]
    """By quantity."""
    error: dict[str, float]
    """predicted / measured - 1, by quantity, where both are known."""
    sample: str | None = None
    """Something that the trained model made."""
    data: dict[str, Any] = {}
    """What was read: names, sizes, SHA-256."""
    kernels: tuple[str, ...] = ()
    """Which computed what has more than one, in the step whose FLOPs were counted; that count is not made where one of them
    cannot be counted."""


def relative_errors(predicted: Mapping[Q, float], measured: Mapping[str, float]) -> dict[str, float]:
    """For each quantity that both hold, predicted / measured - 1; infinite where only the measured is 0."""
    return {
        quantity: _relative_error(value, measured[quantity])
        for quantity, value in predicted.items()
        if quantity in measured
    }


def _relative_error(predicted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if predicted == 0 else float("inf")
    return predicted / measured - 1
