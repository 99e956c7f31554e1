"""Lists run folders side by side, as a table for the terminal, in Markdown, CSV or JSON."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from llmeff.record.schema import LAST_STEPS, Result

Format = Literal["terminal", "markdown", "csv", "json"]
"""The output format of a table. CSV and JSON contain plain numbers, the other formats numbers with units."""

CAVEAT = "These are single runs: a difference between them has no interval over seeds, and may be chance."
FOOTNOTE = (
    f"Training loss: mean of the last {LAST_STEPS} steps, in nats per item. Speed: median over steps after warm-up. "
    "Error: predicted / measured - 1. "
    "Loss / first run's: the 95 % interval covers the choice of held-out units, not of seeds."
)

_CELL = 26
"""The width of a run's column at the terminal, in characters: `unfinished at step 12345` and its frame."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The cost and the results of one run.

    A field is None if the run did not get far enough, or if the value is unknown.
    """

    name: str
    """The name of the run's folder."""
    status: str
    """`finished`, `diverged`, or `unfinished at step N`."""
    device: str
    """The GPU's name, or `cpu`."""
    steps: int
    """Completed optimizer steps."""
    items: int
    """Items trained on; `item` names their unit."""
    item: str | None
    """The unit of the item counts, such as `token`. None for an unfinished run."""
    parameters: int | None
    """The number of parameters."""
    train_loss: float | None
    """The mean training loss of the last steps, in nats per item."""
    validation_loss: float | None
    """The validation loss at the last evaluation, in nats per item. None for an unfinished run."""
    bits_per_byte: float | None
    """Bits per byte on the validation split, at the last evaluation."""
    metrics: dict[str, float]
    """The other metrics that the task declares in `metric_directions`, from the same evaluation."""
    items_per_s: float | None
    """The median throughput over steps after warm-up."""
    peak_bytes: float | None
    """The measured peak memory, in bytes."""
    errors: dict[str, float]
    """The prediction error, predicted / measured - 1, by quantity."""
    loss_ratio: Estimate | None = None
    """The final held-out loss over the first run's, with an interval over the choice of held-out units
    (`resampled_ratio`). None if there are too few units, or if the two runs were evaluated on different units."""


_WITH_FIELD = ("loss", "bits_per_byte")
"""Metrics that have their own field in `RunSummary`."""


def summarise(run: Run) -> RunSummary:
    """Returns the summary of a run, without `loss_ratio`."""
    done = progress(run)
    held_out = {} if run.result is None else run.result.metrics.get("validation", {})
    return RunSummary(
        name=run.name,
        status=f"unfinished at step {done.steps}" if run.result is None else run.result.status,
        device=run.environment.device,
        steps=done.steps,
        items=done.items,
        item=None if run.result is None else run.result.item,
        parameters=None if run.result is None else run.result.parameters,
        train_loss=done.train_loss,
        validation_loss=held_out.get("loss"),
        bits_per_byte=held_out.get("bits_per_byte"),
        metrics={} if run.result is None else _other_metrics(run.result, held_out),
        items_per_s=done.items_per_s,
        peak_bytes=None if run.result is None else run.result.measured.get("peak_bytes"),
        errors={} if run.result is None else run.result.error,
    )


def _other_metrics(result: Result, held_out: Mapping[str, float]) -> dict[str, float]:
    return {name: held_out[name] for name in result.metric_directions if name in held_out and name not in _WITH_FIELD}


def compare(folders: Iterable[Path]) -> list[RunSummary]:
    """Returns a summary of each run folder, in the given order.

    Raises:
        ConfigError: some paths are not run folders. The error lists all of them.
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


@dataclass(frozen=True, kw_only=True)
class _Units:
    """The units (documents or images) on which a finished run was evaluated at the end."""

    data: str
    """The hash of all data that the run read."""
    split: str
    """The split that contains the units."""
    rows: pa.Table
    """One row per unit, with its losses."""


def _units(run: Run) -> _Units | None:
    """Returns the units of a run. None if the run did not finish, or was not evaluated on exactly one split."""
    if run.result is None or run.evals is None or run.result.status != "finished":
        return None
    rows = run.evals.filter(pc.field("step") == run.result.steps)
    splits = rows["split"].unique().to_pylist()
    if len(splits) != 1:
        return None
    return _Units(data=str(run.result.data.get("sha256")), split=splits[0], rows=rows)


def _ratio(run: Run, first: _Units | None) -> Estimate | None:
    """Returns the ratio of a run's held-out loss to the first run's.

    Returns None if the two runs were not evaluated on the same units, or on fewer than `FEW_UNITS` units.
    """
    units = _units(run)
    if units is None or first is None or (units.data, units.split) != (first.data, first.split):
        return None
    if units.rows["unit"] != first.rows["unit"] or units.rows.num_rows < FEW_UNITS:
        return None
    losses, first_losses = (
        (rows["loss_sum"].to_numpy(), rows["count"].to_numpy()) for rows in (units.rows, first.rows)
    )
    return resampled_ratio(losses, first_losses)


def draw(folders: Iterable[Path], path: Path) -> None:
    """Plots the losses of runs over their steps as a PNG.

    Args:
        folders: the run folders.
        path: the file to write.

    Raises:
        ConfigError: a path is not a run folder, there is nothing to plot, or the file cannot be written.
    """
    loss_curve([read_run(folder) for folder in folders], path)


def render(rows: Sequence[RunSummary], kind: str, width: int | None = None, notes: Sequence[str] = ()) -> str:
    """Renders summaries of runs as a table.

    Args:
        rows: the summaries, from `compare`.
        kind: the output format, a `Format`.
        width: the width of the terminal, in characters. None to detect it.
        notes: notes to print below the table. CSV leaves them out.

    Raises:
        ConfigError: the format is unknown.
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


_Column = tuple[str, Callable[[RunSummary], Any], Callable[[Any], str]]
"""A header, a function that returns the value of a run, and a function that formats a value."""


def _columns(rows: Sequence[RunSummary]) -> list[_Column]:
    """Returns all columns of the terminal and Markdown tables."""
    items = {row.item for row in rows if row.item is not None}
    item = items.pop() if len(items) == 1 else "item"
    loss = "{:.4f}".format
    return [
        ("run", lambda row: row.name, str),
        ("status", lambda row: row.status, str),
        ("steps", lambda row: row.steps, "{:,}".format),
        (f"{item}s", lambda row: row.items, show_count),
        ("parameters", lambda row: row.parameters, show_count),
        ("training loss", lambda row: row.train_loss, loss),
        ("validation loss", lambda row: row.validation_loss, loss),
        ("loss / first run's", lambda row: row.loss_ratio, _show_ratio),
        ("bits per byte", lambda row: row.bits_per_byte, loss),
        *((spelled(name), _metric(name), loss) for name in _metrics(rows)),
        (f"{item}s/s", lambda row: row.items_per_s, show_count),
        ("peak memory", lambda row: row.peak_bytes, show_bytes),
        ("device", lambda row: row.device, str),
        *(
            (f"error of {quantity.replace('_', ' ')}", _error(quantity), "{:+.2%}".format)
            for quantity in _quantities(rows)
        ),
    ]


def _metric(name: str) -> Callable[[RunSummary], float | None]:
    return lambda row: row.metrics.get(name)


def _error(quantity: str) -> Callable[[RunSummary], float | None]:
    return lambda row: row.errors.get(quantity)


def _show_ratio(ratio: Estimate) -> str:
    return f"{ratio.value:.4f} ({ratio.lower:.4f} to {ratio.upper:.4f})"


def _shown(rows: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Returns the headers and, for each run, the formatted cells. Leaves out columns in which no run has a value."""
    headers: list[str] = []
    columns: list[list[str]] = []
    for header, value_of, show in _columns(rows):
        values = [value_of(row) for row in rows]
        if any(value is not None for value in values):
            headers.append(header)
            columns.append(["-" if value is None else show(value) for value in values])
    return headers, [list(cells) for cells in zip(*columns, strict=True)]


def _metrics(rows: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _quantities(rows: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(quantity for row in rows for quantity in row.errors))


def _terminal(rows: Sequence[RunSummary], width: int | None, closing: str) -> str:
    """Renders a table with one column per run and one row per quantity. Runs that do not fit go into further tables."""
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
"""Maps the suffix of a column name to the field of the `Estimate` that the column contains."""


def _plain(rows: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Returns a flat dict of plain numbers for each run."""
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
    """Returns the value, or None if it is NaN or infinite, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
