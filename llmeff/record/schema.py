"""Types of the rows and files that a run writes, with the units of their fields."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from llmeff.core.config import with_new_names
from llmeff.core.metric import Direction

SCHEMA_VERSION: Final = 1
"""Schema version of all files of a run folder. Readers refuse other versions."""

CONFIG, ENVIRONMENT, METRICS = "config.json", "env.json", "metrics.jsonl"
EVALUATIONS, EVALS, RESULT = "evaluations.jsonl", "evals.parquet", "result.json"
MODEL, CHECKPOINTS = "model", "checkpoints"
LOSS_CURVE, SAMPLES = "loss.png", "samples.png"
"""Names in a run folder. `config.json` exists once a run has begun, `result.json` once it has ended."""
RECORDED = (CHECKPOINTS, MODEL, LOSS_CURVE, SAMPLES, EVALS, EVALUATIONS, METRICS)
"""Names that a restart moves aside, in this order. Rows come last, so that an interrupted move still leaves rows."""

LAST_STEPS: Final = 50
"""Number of steps at the end of a run over which its final training loss is averaged."""

Q = TypeVar("Q", bound=str)


class Record(BaseModel):
    """Base of all rows and files: frozen, without unknown fields. JSON has NaN and infinities as strings ("NaN")."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Maps old names of fields, which are still accepted, to the new names."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if isinstance(data, Mapping) else data


class StepRow(Record):
    """One line of `metrics.jsonl`: one optimizer step.

    The loss is a mean over items, such as tokens or pixels; `Result.item` names the item.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this line's format."""
    step: int
    """Number of this optimizer step, from 1."""
    loss: float
    """Mean loss over all items of the step on all ranks, in nats."""
    grad_norm: float
    """Global norm of all gradients, before clipping."""
    learning_rate: float
    """Learning rate of the step, in the first parameter group."""
    items: int
    """Number of items in the step, on all ranks."""
    items_seen: int
    """Number of items from the start of the run up to and including this step."""
    step_s: float
    """Wall seconds from the fetch of the batch to the end of the update."""
    data_s: float
    """Seconds within `step_s` that the host spent on making the batch."""
    items_per_s: float
    """Items per second, `items / step_s`."""
    peak_allocated_bytes: int | None = None
    """Peak bytes allocated by CUDA's allocator in the main process; null on a CPU."""
    forward_s: float | None = None
    """Seconds of the forward passes in a step that is timed part by part; null in other steps."""
    backward_s: float | None = None
    """Seconds of the backward passes in a step that is timed part by part; null in other steps."""
    optimizer_s: float | None = None
    """Seconds of clipping and update in a step that is timed part by part; null in other steps."""
    loss_scale: float | None = None
    """The loss scale of fp16; null if losses are not scaled."""
    is_warmup: bool
    """Whether medians exclude this step's times. True for the first steps of a process, which compile and allocate."""


class EvalRow(Record):
    """One row of `evals.parquet`: one held-out unit (a document, an image) at one step.

    In the file, each entry of `metrics` is a column of its own.
    """

    step: int
    """Number of optimizer steps done before the evaluation."""
    split: str
    """Name of the split (`validation`, `test`, ...)."""
    unit: str
    """Identifier of the unit."""
    loss_sum: float
    """Sum of the loss over the unit, in nats."""
    count: int
    """Number of items that `loss_sum` is over."""
    metrics: dict[str, float] = {}
    """Other sums over the unit, by name, such as `bytes`."""


class Evaluation(Record):
    """One line of `evaluations.jsonl`: the metrics of one evaluation, over all its units."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this line's format."""
    step: int
    """Number of optimizer steps done before the evaluation."""
    split: str
    """Name of the split (`validation`, `test`, ...)."""
    metrics: dict[str, float]
    """Metrics by name, each in its own unit. `loss` is in nats per item."""


class Environment(Record):
    """`env.json`: versions and hardware of a run. Holds no environment variables, paths or host names."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this file's format."""
    llmeff: str
    """Version of llmeff."""
    commit: str | None
    """Git commit of the checkout that llmeff was imported from; null if it was not imported from a checkout."""
    diff_sha256: str | None
    """SHA-256 of the package's uncommitted changes and new files; null if there are no changes or no checkout."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Versions of the installed packages that results depend on, by name."""
    system: str
    """Operating system and machine type (`Linux x86_64`)."""
    cpu: str
    """Model name of the CPU."""
    instruction_set: str | None = None
    """CPU instruction set that oneDNN uses, in oneDNN's naming (`AVX2`); null if unknown, and in older runs."""
    cores: int
    """Number of cores that this process may use."""
    threads: int
    """Number of torch threads in this process."""
    memory_bytes: int
    """Memory of the machine, in bytes."""
    device: str
    """Name of the GPU that computes, or `cpu`."""
    device_memory_bytes: int | None = None
    """Memory of the GPU, in bytes; null on a CPU."""
    cuda: str | None = None
    """The CUDA version that torch was built with; null on a CPU."""
    driver: str | None = None
    """Version of the GPU driver; null if unknown, and on a CPU."""
    earlier: tuple["Environment", ...] = ()
    """Different environments of earlier processes of this run, oldest first."""


class Timings(Record):
    """Wall seconds of a run by activity, including earlier processes from which it was resumed."""

    startup_s: float = 0.0
    """Seconds between the imports and the first step: building, loading, resuming."""
    train_s: float = 0.0
    """Seconds of training steps, without making their batches."""
    data_s: float = 0.0
    """Seconds spent on making batches within steps."""
    eval_s: float = 0.0
    """Seconds of evaluation: held-out loss, metrics and samples."""
    checkpoint_s: float = 0.0
    """Seconds spent on saving checkpoints and the final model."""
    record_s: float = 0.0
    """Host seconds for writing rows, drawing the display and metering. A GPU may compute in the meantime."""


class Quartiles(Record):
    """Quartiles over the steps of one run."""

    lower: float
    """Lower quartile."""
    median: float
    """Median."""
    upper: float
    """Upper quartile."""


class Result(Record):
    """`result.json`. It is written last: if it exists, the run has ended.

    `predicted`, `measured` and `error` are keyed by quantity. The name of a quantity ends with its unit. Examples:

    - `parameters`
    - `executed_flops`: FLOPs of one step, counted in an uncompiled step, which has the same contractions.
    - `peak_bytes`: peak memory. On a GPU the allocator's peak, on a CPU the peak of live tensors.
    - `saved_bytes`: memory kept for backward. For a compiled run, it is predicted for uncompiled code and not measured.
    """

    renamed: ClassVar[Mapping[str, str]] = {"goals": "metric_directions"}

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this file's format."""
    status: Literal["finished", "diverged"]
    """`diverged` means that a loss or gradient norm was not finite; the run stopped before that update."""
    diagnosis: str | None = None
    """Description of the divergence; null if the run did not diverge."""
    steps: int
    """Number of optimizer steps done."""
    item: str
    """Name of an item, which the loss is a mean over, in the singular (`token`, `pixel`)."""
    items_seen: int
    """Number of items trained on."""
    parameters: int
    """Number of parameters, trained and frozen. Shared parameters count once."""
    train_loss: float
    """Mean training loss over the last 50 steps, or over all if there are fewer, in nats per item."""
    metrics: dict[str, dict[str, float]]
    """Metrics of the last evaluation, by split and name (`{"validation": {"loss": ..., "bits_per_byte": ...}}`)."""
    metric_directions: dict[str, Direction] = {}
    """For each metric that comparisons report, whether lower or higher is better. Empty in runs of older versions."""
    references: dict[str, float] = {}
    """Reference values for the metrics, computed without a model (`gzip_bits_per_byte`)."""
    timings: Timings
    """Wall seconds by clock."""
    items_per_s: Quartiles | None
    """Items per second over the steps after warm-up; null if there were no such steps."""
    model_flops_per_s: float | None = None
    """FLOP/s of one rank at the median speed after warm-up, without recomputation; null if unknown."""
    mfu: float | None = None
    """`model_flops_per_s` / the device's peak at this precision, 0 to 1; null if the peak is unknown or exceeded."""
    energy_j: float | None = None
    """Joules that the GPUs of all ranks consumed from the first step to the end; null if one has no energy counter."""
    prediction: Literal["law", "traced"] = "law"
    """`law`: predicted from the config. `traced`: predicted by running a step on tensors without values."""
    predicted: dict[str, float]
    """Predicted values by quantity."""
    measured: dict[str, float]
    """Measured values by quantity."""
    error: dict[str, float]
    """Relative errors by quantity, predicted / measured - 1. Only quantities that are both predicted and measured."""
    sample: str | None = None
    """Text that the trained model generated; null if it generated none."""
    data: dict[str, Any] = {}
    """Description of the data that the run read: names, sizes, SHA-256."""
    kernels: tuple[str, ...] = ()
    """Kernels that ran in the step whose FLOPs were counted, for operations that have several kernels.

    If the FLOPs of one of these kernels cannot be counted, `executed_flops` is not measured.
    """


def relative_errors(predicted: Mapping[Q, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Returns predicted / measured - 1 for each quantity in both mappings. Infinite if only the measured value is 0."""
    return {
        quantity: _relative_error(value, measured[quantity])
        for quantity, value in predicted.items()
        if quantity in measured
    }


def _relative_error(predicted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if predicted == 0 else float("inf")
    return predicted / measured - 1
