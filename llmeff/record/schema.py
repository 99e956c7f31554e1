"""What a run writes: the rows and files of a run folder, with their types and units."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from llmeff.core.config import with_new_names
from llmeff.core.metric import Direction

SCHEMA_VERSION: Final = 1
"""Version of every file below. A reader refuses any other."""

CONFIG, ENVIRONMENT, METRICS = "config.json", "env.json", "metrics.jsonl"
EVALUATIONS, EVALS, RESULT = "evaluations.jsonl", "evals.parquet", "result.json"
MODEL, CHECKPOINTS = "model", "checkpoints"
LOSS_CURVE, SAMPLES = "loss.png", "samples.png"
"""Where each part is in a run folder. `config.json` shows that a run was begun, `result.json` that it ended."""
RECORDED = (CHECKPOINTS, MODEL, LOSS_CURVE, SAMPLES, EVALS, EVALUATIONS, METRICS)
"""What a run's steps made. Rows come last: as long as they are there, missing checkpoints are noticed."""

LAST_STEPS: Final = 50
"""How many steps at the end of a run its final training loss is a mean over."""

Q = TypeVar("Q", bound=str)


class Record(BaseModel):
    """Base of what is written: frozen, no unknown fields; NaN and infinities are JSON strings ("NaN")."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of fields, which are still read, with their new names."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if isinstance(data, Mapping) else data


class StepRow(Record):
    """One line of `metrics.jsonl`: one optimizer step.

    An item is what the loss is a mean over, such as a token or a pixel; `Result.item` names it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this line's format."""
    step: int
    """Optimizer steps done, from 1."""
    loss: float
    """Mean over all items of the step on all ranks, in nats."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    learning_rate: float
    """The rate that the step was made with (the first parameter group's)."""
    items: int
    """Items in the step, on all ranks."""
    items_seen: int
    """Items from the run's beginning through this step."""
    step_s: float
    """Wall seconds from fetching the batch to the end of the update."""
    data_s: float
    """Seconds of `step_s` that the host spent making the batch."""
    items_per_s: float
    """Items per second: items / step_s."""
    peak_allocated_bytes: int | None = None
    """The most bytes that CUDA's allocator held at once in the main process; null on a CPU."""
    forward_s: float | None = None
    """Seconds of the forward passes in a synchronised step; null in all others."""
    backward_s: float | None = None
    """Seconds of the backward passes in a synchronised step; null in all others."""
    optimizer_s: float | None = None
    """Seconds of clipping and update in a synchronised step; null in all others."""
    loss_scale: float | None = None
    """The loss scale of fp16; null if losses are not scaled."""
    is_warmup: bool
    """Whether medians leave out the step's times, as for a process's first steps, with their compiling and first touches."""


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
    """Sum of the loss over the unit, in nats."""
    count: int
    """How many items the sum is over."""
    metrics: dict[str, float] = {}
    """Other sums over the unit, by name (`bytes`)."""


class Evaluation(Record):
    """One line of `evaluations.jsonl`: the metrics of one evaluation, over all its units."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this line's format."""
    step: int
    """Optimizer steps done before the evaluation."""
    split: str
    """`validation`, `test`, ..."""
    metrics: dict[str, float]
    """By name, each in its own unit (`loss` in nats per item)."""


class Environment(Record):
    """`env.json`: where a run ran. An allow-list: no environment variables, paths or host names."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this file's format."""
    llmeff: str
    """llmeff's version."""
    commit: str | None
    """Commit of the checkout that llmeff was imported from; null if there is no checkout."""
    diff_sha256: str | None
    """SHA-256 of the package's uncommitted changes and new files; null if there are none, or no checkout."""
    python: str
    """Python's version."""
    packages: dict[str, str]
    """Versions of the packages that results depend on, for those that are installed."""
    system: str
    """Operating system and machine type (`Linux x86_64`)."""
    cpu: str
    """The CPU's model name."""
    instruction_set: str | None = None
    """The CPU's instruction set that oneDNN uses, by oneDNN's name (`AVX2`); null if unknown, and in older runs."""
    cores: int
    """Cores that this process may use."""
    threads: int
    """torch's threads in this process."""
    memory_bytes: int
    """Memory of the machine, in bytes."""
    device: str
    """The device that computes: the GPU's name, or `cpu`."""
    device_memory_bytes: int | None = None
    """Memory of the GPU, in bytes; null on a CPU."""
    cuda: str | None = None
    """The CUDA version that torch was built with; null on a CPU."""
    driver: str | None = None
    """Version of the GPU's driver; null if unknown, and on a CPU."""
    earlier: tuple["Environment", ...] = ()
    """Other environments in which this run was begun or resumed, oldest first."""


class Timings(Record):
    """Wall seconds by what they were spent on, over all processes of one run."""

    startup_s: float = 0.0
    """Before the first step, after the imports: building, loading, resuming."""
    train_s: float = 0.0
    """Steps, without their data."""
    data_s: float = 0.0
    """Making batches inside steps."""
    eval_s: float = 0.0
    """Held-out loss, metrics and samples."""
    checkpoint_s: float = 0.0
    """Saving states and the final model."""
    record_s: float = 0.0
    """The host's time for writing rows, drawing the display and metering. On a GPU the device may compute meanwhile."""


class Quartiles(Record):
    """Quartiles over the steps of one run."""

    lower: float
    """A quarter of the values lies below."""
    median: float
    """Half of the values lies below."""
    upper: float
    """A quarter of the values lies above."""


class Result(Record):
    """`result.json`, written last: if it exists, the run has ended.

    `predicted`, `measured` and `error` are keyed by quantity. A quantity's name ends with its unit: `parameters`,
    `executed_flops` (of one step; counted in an uncompiled one, which has the same contractions), `peak_bytes` (live at
    once: the allocator's peak on a GPU, live tensors on a CPU), `saved_bytes` (kept for backward; of a compiled run it is
    predicted as if uncompiled, and not measured), ...
    """

    renamed: ClassVar[Mapping[str, str]] = {"goals": "metric_directions"}

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this file."""
    status: Literal["finished", "diverged"]
    """`diverged`: a loss or norm was not finite, and the run stopped before that update."""
    diagnosis: str | None = None
    """What was seen when the run diverged; null if it did not."""
    steps: int
    """Optimizer steps done."""
    item: str
    """What the loss is a mean over, in the singular (`token`, `pixel`)."""
    items_seen: int
    """Items trained on."""
    parameters: int
    """How many parameters there are, trained and frozen; shared ones count once."""
    train_loss: float
    """Mean over the last 50 steps, or all if there are fewer, in nats per item."""
    metrics: dict[str, dict[str, float]]
    """By split, then by name: the last evaluation (`{"validation": {"loss": ..., "bits_per_byte": ...}}`)."""
    metric_directions: dict[str, Direction] = {}
    """The metrics that comparisons report, and which way each is better; empty in older runs."""
    references: dict[str, float] = {}
    """Figures to compare metrics with, made without a model (`gzip_bits_per_byte`)."""
    timings: Timings
    """Wall seconds by clock."""
    items_per_s: Quartiles | None
    """Items per second over steps after warm-up; null if there were none."""
    model_flops_per_s: float | None = None
    """FLOP/s of one rank at the median step after warm-up: the model's contractions, not recomputed ones; null if unknown."""
    mfu: float | None = None
    """`model_flops_per_s` over the device's peak at this precision, 0 to 1; null if the peak is unknown or exceeded."""
    energy_j: float | None = None
    """Joules that the GPUs of all ranks drew from the first step to the end; null if one has no counter."""
    prediction: Literal["law", "traced"] = "law"
    """`law`: predictions are computed from the config. `traced`: counted in a step of the module without numbers."""
    predicted: dict[str, float]
    """Predicted values by quantity."""
    measured: dict[str, float]
    """Measured values by quantity."""
    error: dict[str, float]
    """predicted / measured - 1 by quantity, for those where both are known."""
    sample: str | None = None
    """Text that the trained model made; null if there is none."""
    data: dict[str, Any] = {}
    """The data that were read: names, sizes, SHA-256."""
    kernels: tuple[str, ...] = ()
    """Kernels that ran in the step whose FLOPs were counted, for operations with several. If the FLOPs of one of them cannot be
    counted, `executed_flops` is not measured."""


def relative_errors(predicted: Mapping[Q, float], measured: Mapping[str, float]) -> dict[str, float]:
    """By quantity that both hold: predicted / measured - 1; infinite if only the measured value is 0."""
    return {
        quantity: _relative_error(value, measured[quantity])
        for quantity, value in predicted.items()
        if quantity in measured
    }


def _relative_error(predicted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if predicted == 0 else float("inf")
    return predicted / measured - 1
