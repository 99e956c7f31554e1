"""The ledger: one entry per run, read from run folders, from a sweep's folder, or from the Parquet file of a study."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmeff.core import files
from llmeff.core.config import ConfigError, with_new_names
from llmeff.core.metric import Direction
from llmeff.core.registry import nearest
from llmeff.record import schema
from llmeff.record.loss_curve import held_out_curves
from llmeff.record.reader import Run, progress, read_run

LEDGER_VERSION = 1
"""The format version of the Parquet file."""
SWEEP, RUNS, LEDGER = "sweep.json", "runs", "ledger.parquet"
"""Names in a sweep's folder: the sweep's config, the folder of its runs, and its ledger."""
JOB_FILE = ".place.json"
"""Suffix of the file next to the folder of each run of a sweep. The file gives the run's arm, cell, phase and trial."""


@dataclass(frozen=True)
class Metric:
    """A metric that evaluations measure and that runs can be compared by."""

    name: str
    """The key of the metric in the records."""
    better: Direction
    """Whether a lower or a higher value is better."""

    @property
    def sign(self) -> int:
        """1 if lower values are better, -1 if higher values are better.

        After a value is multiplied by `sign`, lower is always better.
        """
        return 1 if self.better == "lower" else -1

    def cost(self, value: float | None) -> float:
        """Returns a value times `sign`, so that lower is better. Infinite if the value is None, NaN or infinite."""
        return math.inf if value is None or not math.isfinite(value) else self.sign * value

    @property
    def label(self) -> str:
        """The display name."""
        return spelled(self.name)


def spelled(name: str) -> str:
    """Returns the display name of a metric: `mean IoU` for `mean_iou`."""
    return " ".join(_SPELLED.get(word, word) for word in name.split("_"))


_SPELLED = {"iou": "IoU", "f1": "F1"}
"""Words of metric names whose display form is not in lower case."""

LOSS = Metric("loss", "lower")
"""The metric that every run has."""


def known_metrics(metric_directions: Iterable[Mapping[str, Direction]]) -> dict[str, Metric]:
    """Returns the metrics that runs can be compared by: the loss, and all metrics that the runs' tasks declare.

    If no run declares a metric, as in older records, adds `bits_per_byte`, which older runs on text have.

    Args:
        metric_directions: the declared metrics of each run.
    """
    named = {name: better for of_run in metric_directions for name, better in of_run.items()}
    others = named or {"bits_per_byte": "lower"}
    return {LOSS.name: LOSS} | {name: Metric(name, better) for name, better in others.items()}


def find_metric(name: str, known: Mapping[str, Metric]) -> Metric:
    """Returns the metric with this name.

    Raises:
        ConfigError: the runs do not have this metric.
    """
    if name not in known:
        raise ConfigError(f"metric {name!r}: these runs do not have this metric.{nearest(name, known)}")
    return known[name]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run. A field is None if the run did not get far enough to have a value, or if the value is unknown."""

    name: str
    """The name of the run's folder. For a run of a sweep, its path in the sweep."""
    arm: str
    """The arm. Final runs of one arm and cell differ only in their seed."""
    cell: dict[str, Any] = field(default_factory=dict)
    """The value of each axis of the sweep. Arms are compared within a cell."""
    factors: dict[str, str] = field(default_factory=dict)
    """The level of each factor, if arms are combinations of factors."""
    phase: str = "final"
    """`tuning` for a trial that tunes an arm, `final` for a run that is compared."""
    trial: dict[str, Any] = field(default_factory=dict)
    """The settings that tuning tried (trials) or chose (final runs), by config field."""
    tuned_as: str | None = None
    """The arm whose trials chose the settings. None if it is this arm."""
    repeats: str | None = None
    """For a run of an A/A arm, the arm whose settings it repeats with another seed. None for other runs."""
    status: str
    """`finished`, `diverged`, `failed`, or `unfinished`."""
    diagnosis: str | None = None
    """Why the run diverged or failed."""
    seed: int
    """The seed of the initialization and the data order."""
    steps: int
    """Completed optimizer steps."""
    items: int
    """Items trained on."""
    item: str | None = None
    """The unit of the item counts, such as `token`."""
    parameters: int | None = None
    """The number of parameters."""
    data_sha256: str | None = None
    """A hash of all data that the run reads. For text, it includes the tokenizer."""
    split: str | None = None
    """The split on which the loss and the curves were measured."""
    train_loss: float | None = None
    """The mean training loss of the last steps, in nats per item."""
    loss: float | None = None
    """The held-out loss at the end, in nats per item."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of the last evaluation, by name."""
    curve_steps: tuple[int, ...] = ()
    """The steps at which the run was evaluated."""
    curve_losses: tuple[float, ...] = ()
    """The held-out loss at each of `curve_steps`, in nats per item."""
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The other metrics at each of `curve_steps`, by name: the metrics in `metric_directions`. For a run without a
    result, all metrics that every evaluation has."""
    metric_directions: dict[str, Direction] = field(default_factory=dict)
    """For each metric that the task declares, whether lower or higher is better. Empty for older runs, and for runs
    without a result."""
    items_per_s: float | None = None
    """The median throughput over steps after warm-up. The run may have shared the machine with other runs."""
    train_s: float | None = None
    """The wall time of all training steps, including the time to make their batches, in seconds."""
    energy_j: float | None = None
    """The energy that the GPUs of all ranks used, in joules."""
    peak_bytes: float | None = None
    """The peak memory of the main rank, in bytes."""
    predicted: dict[str, float] = field(default_factory=dict)
    """Predicted values, by quantity."""
    measured: dict[str, float] = field(default_factory=dict)
    """Measured values, by quantity."""
    device: str
    """The name of the GPU, or the model name of the CPU if the run used no GPU. `none` if the run did not start."""
    commit: str | None = None
    """The commit of the code."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole config of the run."""

    @property
    def is_done(self) -> bool:
        """Whether the run finished and has a held-out loss."""
        return self.status == "finished" and self.loss is not None

    def final(self, metric: str) -> float | None:
        """Returns the value of a metric at the end of the run. None if the run has no such value."""
        return self.loss if metric == LOSS.name else self.metrics.get(metric)

    def curve(self, metric: str) -> tuple[float, ...]:
        """Returns the values of a metric at `curve_steps`. Empty if some evaluation lacks the metric."""
        return self.curve_losses if metric == LOSS.name else self.curves.get(metric, ())

    @property
    def step_flops(self) -> float | None:
        """FLOPs that all ranks execute in one optimizer step. None if unknown.

        This is the number of ranks times the FLOPs of the main rank, which are measured or else predicted.
        """
        on_one = self.measured.get("executed_flops", self.predicted.get("executed_flops"))
        return None if on_one is None else on_one * self.config.get("parallel", {}).get("ranks", 1)

    @property
    def items_per_step(self) -> float | None:
        """Mean number of items per optimizer step. None if no step is completed."""
        return self.items / self.steps if self.steps else None


def flat_config(entry: Entry) -> dict[str, Any]:
    """Returns the run's config as a flat dict with dotted field names, without the run's name and seed."""
    return _flat({name: value for name, value in entry.config.items() if name not in ("name", "seed")})


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


# -- run folders


def entry_of(run: Run, **place: Any) -> Entry:
    """Returns the ledger entry of a run folder.

    Args:
        run: the run.
        place: fields that the folder does not contain, because the sweep assigns them: `name`, `arm`, `cell`,
            `factors`, `phase`, `trial`, `tuned_as`, `repeats`.
    """
    done, result = progress(run), run.result
    split = run.config.get("evaluation", {}).get("split", "validation")
    steps, values = held_out_curves(run).get(split, ([], {}))
    losses = values.pop(LOSS.name, ())
    known = {"name": run.name, "arm": run.config.get("name", run.name)} | place
    return Entry(
        **known,
        **({"status": "unfinished"} if result is None else _of_result(result, split)),
        seed=run.config.get("seed", 0),
        steps=done.steps,
        items=done.items,
        split=split,
        train_loss=done.train_loss,
        curve_steps=tuple(steps),
        curve_losses=tuple(losses),
        curves={
            name: tuple(curve) for name, curve in values.items() if result is None or name in result.metric_directions
        },
        items_per_s=done.items_per_s,
        device=run.environment.device if run.environment.device != "cpu" else run.environment.cpu,
        commit=run.environment.commit,
        config=run.config,
    )


def _of_result(result: schema.Result, split: str) -> dict[str, Any]:
    """Returns the fields of an entry that come from the result of a run."""
    held_out = result.metrics.get(split, {})
    return {
        "status": result.status,
        "diagnosis": result.diagnosis,
        "item": result.item,
        "parameters": result.parameters,
        "data_sha256": result.data.get("sha256"),
        "loss": held_out.get("loss"),
        "metrics": held_out,
        "metric_directions": result.metric_directions,
        "train_s": result.timings.train_s + result.timings.data_s,
        "energy_j": result.energy_j,
        "peak_bytes": result.measured.get("peak_bytes"),
        "predicted": result.predicted,
        "measured": result.measured,
    }


def read_entries(paths: Iterable[Path]) -> list[Entry]:
    """Reads the entries of run folders, sweep folders and ledger files, in the given order.

    Raises:
        ConfigError: a path is not a run folder, a sweep folder or a ledger file, or contains no run. The error lists
            all such paths.
    """
    entries: list[Entry] = []
    plain: list[int] = []
    problems: list[str] = []
    for path in paths:
        try:
            if path.is_file():
                entries += read_ledger(path)
            elif (path / SWEEP).is_file():
                entries += read_sweep(path)
            else:
                entries.append(entry_of(read_run(path)))
                plain.append(len(entries) - 1)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    for place, entry in zip(plain, label_arms([entries[place] for place in plain]), strict=True):
        entries[place] = entry
    return entries


def label_arms(entries: Sequence[Entry]) -> list[Entry]:
    """Groups runs that belong to no sweep into arms.

    Runs whose configs differ only in the seed and the name are one arm.

    The label of an arm is the name of its runs (without a seed suffix such as `-s3`), if all its runs have that name
    and no other arm does. Otherwise the label lists the config fields in which the arm differs from other arms.
    """
    configs: dict[str, dict[str, Any]] = {}
    names: dict[str, set[str]] = {}
    keys = []
    for entry in entries:
        config = flat_config(entry)
        key = json.dumps(config, sort_keys=True)
        configs[key] = config
        names.setdefault(key, set()).add(re.sub(r"-s\d+$", "", entry.arm))
        keys.append(key)
    num_arms = Counter(name for names_of_arm in names.values() for name in names_of_arm)
    labels = {}
    for key, config in configs.items():
        name = next(iter(names[key])) if len(names[key]) == 1 else None
        if name is not None and num_arms[name] == 1:
            labels[key] = name
        else:
            labels[key] = _differing_fields(config, configs.values()) or name or "run"
    return [replace(entry, arm=labels[key]) for entry, key in zip(entries, keys, strict=True)]


def _differing_fields(config: Mapping[str, Any], configs: Iterable[Mapping[str, Any]]) -> str:
    """Returns, as text, the values of the fields in which a config differs from at least one other config."""
    others = list(configs)
    differing = {name: value for name, value in config.items() if any(other.get(name) != value for other in others)}
    return ", ".join(f"{name}={_short(value)}" for name, value in sorted(differing.items()))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_sweep(folder: Path) -> list[Entry]:
    """Returns the entries of all runs that a sweep has started, in the order of the sweep.

    Raises:
        ConfigError: the sweep has started no run, or a file cannot be read.
    """
    places = sorted(folder.glob(f"{RUNS}/**/*{JOB_FILE}"))
    if not places:
        raise ConfigError(f"{folder}: this sweep has no runs yet. Start it with `llmeff sweep`")
    found = [_read_job(path) for path in places]
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _read_job(path: Path) -> tuple[Any, Entry]:
    """Returns the position of a run in its sweep, and the run's entry.

    Args:
        path: the file next to the run's folder (see `JOB_FILE`).
    """
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
        order, failure, seed = place.pop("order"), place.pop("failure", None), place.pop("seed", 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: cannot be read; remove it and start the sweep again, which rewrites it") from None
    folder = path.with_name(path.name.removesuffix(JOB_FILE))
    if not ((folder / schema.CONFIG).is_file() and (folder / schema.ENVIRONMENT).is_file()):
        status = "unfinished" if failure is None else "failed"
        return order, Entry(**place, status=status, diagnosis=failure, seed=seed, steps=0, items=0, device="none")
    entry = entry_of(read_run(folder), **place)
    if failure is not None and entry.status == "unfinished":
        entry = replace(entry, status="failed", diagnosis=failure)
    return order, entry


# -- ledger files

_JSON = ("cell", "factors", "trial", "metrics", "curves", "metric_directions", "predicted", "measured", "config")
_RENAMED = {"goals": "metric_directions"}
"""Maps the column names of older files to the current names."""
_KINDS: dict[str, Any] = {
    "seed": pa.int64(),
    "steps": pa.int64(),
    "items": pa.int64(),
    "parameters": pa.int64(),
    "curve_steps": pa.list_(pa.int64()),
    "curve_losses": pa.list_(pa.float64()),
} | dict.fromkeys(("train_loss", "loss", "items_per_s", "train_s", "energy_j", "peak_bytes"), pa.float64())


def write_ledger(path: Path, entries: Sequence[Entry], facts: dict[str, Any] | None = None) -> None:
    """Writes a study to one compact Parquet file.

    Args:
        path: the Parquet file.
        entries: the runs.
        facts: facts about the study as a whole: the sweep's config (`sweep`), the command that reproduces the study
            (`command`), and the step times (`timing`).

    Raises:
        ConfigError: the file cannot be written.
    """
    columns = {}
    for column in fields(Entry):
        values = [getattr(entry, column.name) for entry in entries]
        if column.name in _JSON:
            values = [json.dumps(value) for value in values]  # keeps the order of axes and of factors
        columns[column.name] = pa.array(values, _KINDS.get(column.name, pa.string()))
    metadata = {"ledger_version": str(LEDGER_VERSION), "facts": json.dumps(facts or {})}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, compression="zstd")
    with files.reported(path):
        files.write_bytes(path, buffer.getvalue())


def read_ledger(path: Path) -> list[Entry]:
    """Returns the entries of a ledger file. A field that the file lacks gets its default.

    Raises:
        ConfigError: the file is not a ledger, or has an unsupported version.
    """
    table = _open(path)
    rows = [with_new_names(row, _RENAMED) for row in table.to_pylist()]
    for row in rows:
        row.update({name: json.loads(row[name]) for name in _JSON if name in row})
        row.update({name: tuple(row[name]) for name in ("curve_steps", "curve_losses")})
        row["curves"] = {name: tuple(values) for name, values in row.get("curves", {}).items()}
    return [Entry(**row) for row in rows]


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the facts about the study as a whole that a ledger file contains (see `write_ledger`).

    Raises:
        ConfigError: the file is not a ledger, or has an unsupported version.
    """
    return dict(json.loads(_open(path).schema.metadata[b"facts"]))


def _open(path: Path) -> Any:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: is neither a ledger file nor a run folder ({error})") from None
    version = (table.schema.metadata or {}).get(b"ledger_version", b"none").decode()
    if version != str(LEDGER_VERSION):
        raise ConfigError(
            f"{path}: the file has ledger_version {version}, but this version of llmeff reads only {LEDGER_VERSION}"
        )
    return table
