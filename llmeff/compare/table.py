"""Run folders side by side, as a table for the terminal, Markdown, CSV or JSON."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from llmeff.compare.intervals import FEW_UNITS, Estimate, resampled_ratio
from llmeff.compare.ledger import spelled
from llmeff.compare.text_table import TextTable, as_csv, markdown
from llmeff.core.config import ConfigError
from llmeff.core.registry import nearest
from llmeff.core.units import show_bytes, show_count
from llmeff.record.loss_curve import loss_curve
from llmeff.record.reader import Run, progress, read_run
from llmeff.record.schema import LAST_STEPS

Format = Literal["terminal", "markdown", "csv", "json"]
"""How a table is written. CSV and JSON hold plain numbers, the others numbers with units."""

CAVEAT = "One run each: a difference here has no interval over seeds, and may be chance."
FOOTNOTE = (
    f"Training loss: mean of the last {LAST_STEPS} steps, nats. Speed: median step after warm-up. "
    "Error: predicted / measured - 1. Loss over the first run's: 95 % interval over which units are held out, not over seeds."
)

_CELL = 26
"""Characters that a run takes in a table at the terminal: `unfinished at step 12345` and its frame."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One row: what a run cost and reached; None where it has not come to that, or cannot be known."""

    name: str
    """The folder's."""
    status: str
    """`finished`, `diverged`, or `unfinished at step N`."""
    device: str
    """What computed."""
    steps: int
    """Optimizer steps done."""
    items: int
    """That were trained on: tokens, or what `item` says."""
    item: str | None
    """What an item is; None while unfinished."""
    parameters: int | None
    """All."""
    train_loss: float | None
    """Nats an item."""
    validation_loss: float | None
    """Nats an item, at the last evaluation of an ended run."""
    bits_per_byte: float | None
    """On the validation split, at the end."""
    metrics: dict[str, float]
    """Of the same evaluation, what else the task's metric_directions name."""
    items_per_s: float | None
    """Median over steps after warm-up."""
    peak_bytes: float | None
    """Live at once."""
    errors: dict[str, float]
    """predicted / measured - 1, by quantity."""
    loss_ratio: Estimate | None = None
    """Held-out loss at the end over the first run's, with an interval over which units are held out (`resampled_ratio`);
    None where there are few units, or others."""


_OWN = ("loss", "bits_per_byte")
"""Metrics with a field of their own."""


def summarise(run: Run) -> RunSummary:
    """A run's row."""
    result, done = run.result, progress(run)
    held_out = {} if result is None else result.metrics.get("validation", {})
    metric_directions = {} if result is None else result.metric_directions
    return RunSummary(
        name=run.name,
        status=f"unfinished at step {done.steps}" if result is None else result.status,
        device=run.environment.device,
        steps=done.steps,
        items=done.items,
        item=None if result is None else result.item,
        parameters=None if result is None else result.parameters,
        train_loss=done.train_loss,
        validation_loss=held_out.get("loss"),
        bits_per_byte=held_out.get("bits_per_byte"),
        metrics={name: held_out[name] for name in metric_directions if name in held_out and name not in _OWN},
        items_per_s=done.items_per_s,
        peak_bytes=None if result is None else result.measured.get("peak_bytes"),
        errors={} if result is None else result.error,
    )


def compare(folders: Iterable[Path]) -> list[RunSummary]:
    """A row for each run folder, in the order given.

    Raises:
        ConfigError: some are no run folders; it names them all.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    first = _units(runs[0]) if runs else None
    return [replace(summarise(run), loss_ratio=_ratio(run, first) if n else None) for n, run in enumerate(runs)]


def _units(run: Run) -> tuple[tuple[str, str], pa.Table] | None:
    """What an ended run was evaluated on at the end: data and split, and a row for each unit."""
    if run.result is None or run.evals is None or run.result.status != "finished":
        return None
    rows = run.evals.filter(pc.field("step") == run.result.steps)
    splits = rows["split"].unique().to_pylist()
    return ((str(run.result.data.get("sha256")), splits[0]), rows) if len(splits) == 1 else None


def _ratio(run: Run, first: tuple[tuple[str, str], pa.Table] | None) -> Estimate | None:
    own = _units(run)
    if own is None or first is None or own[0] != first[0] or own[1]["unit"] != first[1]["unit"]:
        return None
    if own[1].num_rows < FEW_UNITS:
        return None
    ours, theirs = ((rows["loss_sum"].to_numpy(), rows["count"].to_numpy()) for _, rows in (own, first))
    return resampled_ratio(ours, theirs)


def draw(folders: Iterable[Path], path: Path) -> None:
    """Draws the losses of runs over their steps into a PNG.

    Raises:
        ConfigError: a folder is no run's, there is nothing to draw, or the file cannot be written.
    """
    loss_curve([read_run(folder) for folder in folders], path)


def render(rows: Sequence[RunSummary], kind: str, width: int | None = None, notes: Sequence[str] = ()) -> str:
    """The table as text.

    Args:
        rows: of `compare`.
        kind: a `Format`.
        width: of the terminal, in characters; asked of it where it is left out.
        notes: what a reader must know; CSV has no place for them.

    Raises:
        ConfigError: there is no such format.
    """
    closing = "\n".join([*(f"Note: {note}." for note in notes), CAVEAT, FOOTNOTE])
    if kind == "terminal":
        return _terminal(rows, width, closing)
    if kind == "markdown":
        return f"{_markdown(rows)}\n{closing}\n"
    if kind == "csv":
        return as_csv(_plain(rows))
    if kind == "json":
        return _json(rows, notes)
    raise ConfigError(f"unknown table format {kind!r}.{nearest(kind, get_args(Format))}")


def _shown(rows: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells for people; a column that no run has a value for is left out."""
    items = {row.item for row in rows if row.item is not None}
    item = items.pop() if len(items) == 1 else "item"
    columns: list[tuple[str, list[str | None]]] = [
        ("run", [row.name for row in rows]),
        ("status", [row.status for row in rows]),
        ("steps", [f"{row.steps:,}" for row in rows]),
        (f"{item}s", [show_count(row.items) for row in rows]),
        ("parameters", [_show(row.parameters, show_count) for row in rows]),
        ("training loss", [_show(row.train_loss, "{:.4f}".format) for row in rows]),
        ("validation loss", [_show(row.validation_loss, "{:.4f}".format) for row in rows]),
        ("loss / first run's", [_show_ratio(row.loss_ratio) for row in rows]),
        ("bits per byte", [_show(row.bits_per_byte, "{:.4f}".format) for row in rows]),
        *((spelled(name), [_show(row.metrics.get(name), "{:.4f}".format) for row in rows]) for name in _metrics(rows)),
        (f"{item}s/s", [_show(row.items_per_s, show_count) for row in rows]),
        ("peak memory", [_show(row.peak_bytes, show_bytes) for row in rows]),
        ("device", [row.device for row in rows]),
    ]
    for quantity in _quantities(rows):
        errors = [_show(row.errors.get(quantity), "{:+.2%}".format) for row in rows]
        columns.append((f"error of {quantity.replace('_', ' ')}", errors))
    kept = [(header, cells) for header, cells in columns if any(cell is not None for cell in cells)]
    headers = [header for header, _ in kept]
    return headers, [[cells[row] or "-" for _, cells in kept] for row in range(len(rows))]


def _show(value: float | None, show: Callable[[float], str]) -> str | None:
    return None if value is None else show(value)


def _show_ratio(ratio: Estimate | None) -> str | None:
    return None if ratio is None else f"{ratio.value:.4f} ({ratio.lower:.4f} to {ratio.upper:.4f})"


def _metrics(rows: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _quantities(rows: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(quantity for row in rows for quantity in row.errors))


def _terminal(rows: Sequence[RunSummary], width: int | None, closing: str) -> str:
    """Runs side by side, quantities below one another; runs that do not fit go into a further table."""
    headers, cells = _shown(rows)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width or Console().width)
    beside = max(1, (console.width - max(map(len, headers), default=0) - 4) // _CELL)
    for first in range(0, len(cells), beside):
        runs = cells[first : first + beside]
        table = Table(headers[0], *(Column(Text(run[0]), justify="right") for run in runs))
        for n, header in enumerate(headers[1:], start=1):
            table.add_row(header, *(Text(run[n]) for run in runs))
        console.print(table)
    console.print(Text(closing))
    return buffer.getvalue()


def _markdown(rows: Sequence[RunSummary]) -> str:
    headers, cells = _shown(rows)
    return markdown(TextTable(title="", headers=headers, rows=cells), num_left=2)


_ESTIMATED = {"": "value", "_lower": "lower", "_upper": "upper"}


def _plain(rows: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """One flat table a run, with plain numbers."""
    flat = []
    for row in rows:
        values = dataclasses.asdict(row)
        del values["errors"], values["metrics"]
        ratio = values.pop("loss_ratio") or {}
        values |= {f"loss_ratio{end}": ratio.get(key) for end, key in _ESTIMATED.items()}
        values |= {name: row.metrics.get(name) for name in _metrics(rows)}
        errors = {f"error_of_{quantity}": row.errors.get(quantity) for quantity in _quantities(rows)}
        flat.append(values | errors)
    return flat


def _json(rows: Sequence[RunSummary], notes: Sequence[str]) -> str:
    runs = [{name: _finite(value) for name, value in row.items()} for row in _plain(rows)]
    return json.dumps({"caveat": CAVEAT, "footnote": FOOTNOTE, "notes": list(notes), "runs": runs}, indent=1) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN, and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
