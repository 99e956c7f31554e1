"""The ledger: one entry a run, from run folders, from a sweep's folder, or from one Parquet file that holds a study."""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
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
"""Of the Parquet file."""
SWEEP, RUNS, LEDGER = "sweep.json", "runs", "ledger.parquet"
"""Where a sweep's description, its runs and its ledger lie in its folder."""
JOB_FILE = ".place.json"
"""Ends the name of the file beside a run's folder that says which arm, cell, phase and trial of the sweep it is."""


@dataclass(frozen=True)
class Metric:
    """What evaluations measure, and runs can be judged by."""

    name: str
    """Its key."""
    better: Direction
    """Which way."""

    @property
    def sign(self) -> int:
        """What a value is multiplied by to be a number of which less is better."""
        return 1 if self.better == "lower" else -1

    def cost(self, value: float | None) -> float:
        """A value as a number of which less is better; infinite where there is none."""
        return math.inf if value is None or not math.isfinite(value) else self.sign * value

    @property
    def label(self) -> str:
        """For people."""
        return spelled(self.name)


def spelled(name: str) -> str:
    """A metric's name for people: `mean IoU` of `mean_iou`."""
    return " ".join(_SPELLED.get(word, word) for word in name.split("_"))


_SPELLED = {"iou": "IoU", "f1": "F1"}
"""Words of metrics' names that are not written in small letters."""

LOSS = Metric("loss", "lower")
"""What every run can be judged by."""


def known_metrics(metric_directions: Iterable[Mapping[str, Direction]]) -> dict[str, Metric]:
    """The metrics that runs can be judged by, by name: the loss, and what their tasks name.

    Where no run says, as none did at first, the others are those that runs of text had.
    """
    said = {name: better for own in metric_directions for name, better in own.items()} or {"bits_per_byte": "lower"}
    return {LOSS.name: LOSS} | {name: Metric(name, better) for name, better in said.items()}


def find_metric(name: str, known: Mapping[str, Metric]) -> Metric:
    """A metric by its name.

    Raises:
        ConfigError: runs are not judged by it.
    """
    if name not in known:
        raise ConfigError(f"metric {name!r}: these runs are not judged by it.{nearest(name, known)}")
    return known[name]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run. What it has not come to, or cannot know, is None."""

    name: str
    """The folder's, or its path in the sweep."""
    arm: str
    """What is compared: runs of one arm and cell differ by their seed alone."""
    cell: dict[str, Any] = field(default_factory=dict)
    """The values of the sweep's axes; arms are compared within a cell."""
    factors: dict[str, str] = field(default_factory=dict)
    """The levels that make the arm, where arms are combinations of factors."""
    phase: str = "final"
    """`tuning`: one of the trials that chose the arm's settings; `final`: what is compared."""
    trial: dict[str, Any] = field(default_factory=dict)
    """The settings that tuning tried, or chose, by field."""
    tuned_as: str | None = None
    """The arm whose trials chose them; None: its own."""
    repeats: str | None = None
    """The arm whose settings these are once more, with seeds of their own (A/A); None of all other runs."""
    status: str
    """`finished`, `diverged`, `failed`, or `unfinished`."""
    diagnosis: str | None = None
    """Why it diverged or failed."""
    seed: int
    """Of initialization and data order."""
    steps: int
    """Optimizer steps done."""
    items: int
    """Trained on."""
    item: str | None = None
    """What an item is (`token`)."""
    parameters: int | None = None
    """All."""
    data_sha256: str | None = None
    """Of all that was read: texts, their splits, the tokenizer."""
    split: str | None = None
    """On which loss and curve were measured."""
    train_loss: float | None = None
    """Mean of the last steps, nats an item."""
    loss: float | None = None
    """At the end, nats an item."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All of the last evaluation."""
    curve_steps: tuple[int, ...] = ()
    """Of the evaluations."""
    curve_losses: tuple[float, ...] = ()
    """At each, nats an item."""
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """At each, the metric_directions' metrics other than the loss, by name; of a run without a result all that every evaluation has."""
    metric_directions: dict[str, Direction] = field(default_factory=dict)
    """The metrics that its task names, and which way each is better; none of an older run, or one without a result."""
    items_per_s: float | None = None
    """Median step after warm-up, of a run that may have had the machine for itself or not."""
    train_s: float | None = None
    """Wall time in steps."""
    energy_j: float | None = None
    """Of the GPUs of all ranks."""
    peak_bytes: float | None = None
    """Live at once, on the main rank."""
    predicted: dict[str, float] = field(default_factory=dict)
    """By quantity."""
    measured: dict[str, float] = field(default_factory=dict)
    """By quantity."""
    device: str
    """What computed."""
    commit: str | None = None
    """Of the code."""
    config: dict[str, Any] = field(default_factory=dict)
    """What was run, whole."""

    @property
    def is_done(self) -> bool:
        """Whether it has all that was asked of it."""
        return self.status == "finished" and self.loss is not None

    def final(self, metric: str) -> float | None:
        """A metric at the end."""
        return self.loss if metric == LOSS.name else self.metrics.get(metric)

    def curve(self, metric: str) -> tuple[float, ...]:
        """A metric at `curve_steps`; empty where not every evaluation has it."""
        return self.curve_losses if metric == LOSS.name else self.curves.get(metric, ())

    @property
    def step_flops(self) -> float | None:
        """Executed in one optimizer step, on all ranks: each does as much as the main one, whose are counted."""
        on_one = self.measured.get("executed_flops", self.predicted.get("executed_flops"))
        return None if on_one is None else on_one * self.config.get("parallel", {}).get("ranks", 1)

    @property
    def items_per_step(self) -> float | None:
        """Items of one optimizer step."""
        return self.items / self.steps if self.steps else None


def entry_of(run: Run, **place: Any) -> Entry:
    """A run folder's entry.

    Args:
        run: the run.
        place: fields that the folder does not tell: `name`, `arm`, `cell`, `factors`, `phase`, `trial`.
    """
    result, done = run.result, progress(run)
    split = run.config.get("evaluation", {}).get("split", "validation")
    held_out = {} if result is None else result.metrics.get(split, {})
    metric_directions = {} if result is None else result.metric_directions
    steps, values = held_out_curves(run).get(split, ([], {}))
    known = {"name": run.name, "arm": run.config.get("name", run.name)} | place
    return Entry(
        **known,
        status="unfinished" if result is None else result.status,
        diagnosis=None if result is None else result.diagnosis,
        seed=run.config.get("seed", 0),
        steps=done.steps,
        items=done.items,
        item=None if result is None else result.item,
        parameters=None if result is None else result.parameters,
        data_sha256=None if result is None else result.data.get("sha256"),
        split=split,
        train_loss=done.train_loss,
        loss=held_out.get("loss"),
        metrics=held_out,
        curve_steps=tuple(steps),
        curve_losses=tuple(values.pop(LOSS.name, ())),
        curves={name: tuple(own) for name, own in values.items() if result is None or name in metric_directions},
        metric_directions=metric_directions,
        items_per_s=done.items_per_s,
        train_s=None if result is None else result.timings.train_s + result.timings.data_s,
        energy_j=None if result is None else result.energy_j,
        peak_bytes=None if result is None else result.measured.get("peak_bytes"),
        predicted={} if result is None else result.predicted,
        measured={} if result is None else result.measured,
        device=run.environment.device if run.environment.device != "cpu" else run.environment.cpu,
        commit=run.environment.commit,
        config=run.config,
    )


def read_entries(paths: Iterable[Path]) -> list[Entry]:
    """The entries of run folders, of sweeps' folders and of ledgers, in the order given.

    Raises:
        ConfigError: some are none of these, or hold no run; it names them all.
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
    """Tells the arms of plain runs apart, where no sweep did: runs whose configs differ by more than seed and name are of other arms.

    An arm's label is its runs' name where that is its own, and else what sets its config apart.
    """
    kinds: dict[str, dict[str, Any]] = {}
    kind_of = []
    for entry in entries:
        own = flat_config(entry)
        kind_of.append(json.dumps(own, sort_keys=True))
        kinds[kind_of[-1]] = own
    names = {kind: {re.sub(r"-s\d+$", "", entry.arm) for entry, own in zip(entries, kind_of, strict=True) if own == kind}
             for kind in kinds}  # fmt: skip
    all_names = [name for own in names.values() for name in own]
    labels = {}
    for kind, own in kinds.items():
        single = next(iter(names[kind])) if len(names[kind]) == 1 else None
        if single is not None and all_names.count(single) == 1:
            labels[kind] = single
        else:
            apart = {
                name: value for name, value in own.items() if any(other.get(name) != value for other in kinds.values())
            }
            labels[kind] = (
                ", ".join(f"{name}={_short(value)}" for name, value in sorted(apart.items())) or single or "run"
            )
    return [replace(entry, arm=labels[kind]) for entry, kind in zip(entries, kind_of, strict=True)]


def flat_config(entry: Entry) -> dict[str, Any]:
    """What was run, by dotted field, without the run's name and seed."""
    return _flat({name: value for name, value in entry.config.items() if name not in ("name", "seed")})


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def read_sweep(folder: Path) -> list[Entry]:
    """The entries of all runs that a sweep has begun, in the sweep's own order."""
    places = sorted(folder.glob(f"{RUNS}/**/*{JOB_FILE}"))
    if not places:
        raise ConfigError(f"{folder}: this sweep has begun no run yet")
    found = []
    for path in places:
        try:
            place = json.loads(path.read_text(encoding="utf-8"))
            order, failure, seed = place.pop("order"), place.pop("failure", None), place.pop("seed", 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path}: cannot be read; remove it, and start the sweep again to write it anew"
            ) from None
        own = path.with_name(path.name.removesuffix(JOB_FILE))
        if (own / schema.CONFIG).is_file() and (own / schema.ENVIRONMENT).is_file():
            entry = entry_of(read_run(own), **place)
            if failure is not None and entry.status == "unfinished":
                entry = replace(entry, status="failed", diagnosis=failure)
        else:
            status = "unfinished" if failure is None else "failed"
            entry = Entry(**place, status=status, diagnosis=failure, seed=seed, steps=0, items=0, device="none")
        found.append((order, entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


# -- one file

_JSON = ("cell", "factors", "trial", "metrics", "curves", "metric_directions", "predicted", "measured", "config")
_RENAMED = {"goals": "metric_directions"}
"""Columns by the names that they had before."""
_KINDS: dict[str, Any] = {
    "seed": pa.int64(),
    "steps": pa.int64(),
    "items": pa.int64(),
    "parameters": pa.int64(),
    "curve_steps": pa.list_(pa.int64()),
    "curve_losses": pa.list_(pa.float64()),
} | dict.fromkeys(("train_loss", "loss", "items_per_s", "train_s", "energy_j", "peak_bytes"), pa.float64())


def write_ledger(path: Path, entries: Sequence[Entry], facts: dict[str, Any] | None = None) -> None:
    """Puts a study into one compact file.

    Args:
        path: of the Parquet file.
        entries: the runs.
        facts: of the study: the command that makes it again, the sweep's description, the environment.

    Raises:
        ConfigError: it cannot be written.
    """
    columns = {}
    for own in fields(Entry):
        values = [getattr(entry, own.name) for entry in entries]
        if own.name in _JSON:
            values = [json.dumps(value) for value in values]  # in order: of axes and of factors
        columns[own.name] = pa.array(values, _KINDS.get(own.name, pa.string()))
    metadata = {"ledger_version": str(LEDGER_VERSION), "facts": json.dumps(facts or {})}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, compression="zstd")
    with files.reported(path):
        files.write_bytes(path, buffer.getvalue())


def read_ledger(path: Path) -> list[Entry]:
    """The entries of a ledger file; what it was written without is as it is by default.

    Raises:
        ConfigError: it is none, or of another version.
    """
    table = _open(path)
    rows = [with_new_names(row, _RENAMED) for row in table.to_pylist()]
    for row in rows:
        row.update({name: json.loads(row[name]) for name in _JSON if name in row})
        row.update({name: tuple(row[name]) for name in ("curve_steps", "curve_losses")})
        row["curves"] = {name: tuple(values) for name, values in row.get("curves", {}).items()}
    return [Entry(**row) for row in rows]


def read_facts(path: Path) -> dict[str, Any]:
    """What a ledger file says of its study.

    Raises:
        ConfigError: it is none, or of another version.
    """
    return dict(json.loads(_open(path).schema.metadata[b"facts"]))


def _open(path: Path) -> Any:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: is no ledger, and no run folder either ({error})") from None
    version = (table.schema.metadata or {}).get(b"ledger_version", b"none").decode()
    if version != str(LEDGER_VERSION):
        raise ConfigError(f"{path}: its ledger_version is {version}, this llmeff reads {LEDGER_VERSION}")
    return table


def value_at(entry: Entry, steps: float, metric: Metric = LOSS) -> float | None:
    """A metric after so many steps, between two evaluations by a straight line; None outside of them."""
    values = entry.curve(metric.name)
    if not values:
        return None
    steps = (
        min(steps, entry.curve_steps[-1]) if steps <= entry.curve_steps[-1] * (1 + 1e-9) else steps
    )  # but for rounding
    if not entry.curve_steps[0] <= steps <= entry.curve_steps[-1]:
        return None
    return float(np.interp(steps, entry.curve_steps, values))


def steps_to(entry: Entry, target: float, metric: Metric = LOSS) -> float | None:
    """After how many steps a metric first is as good as the target, by a straight line; None where it never is."""
    before: tuple[float, float] | None = None
    values = entry.curve(metric.name)
    for step, value in zip(entry.curve_steps if values else (), values, strict=True):
        if metric.sign * value <= metric.sign * target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        if math.isfinite(value):
            before = float(step), value
    return None
