"""Renders a comparison as text: for the terminal, or as Markdown, CSV or JSON."""

import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from llmeff.compare.alike import show_cell
from llmeff.compare.effects import Effect, Effects
from llmeff.compare.group import Group
from llmeff.compare.intervals import Estimate
from llmeff.compare.quantities import Quantity
from llmeff.compare.row import Cell
from llmeff.compare.text_table import TextTable, as_csv, render_tables
from llmeff.compare.tuning import Tuning
from llmeff.compare.verdict import Comparison
from llmeff.core.units import show_bytes, show_count, show_seconds

FOOTNOTE = (
    "Means are over seeds, with 95 % intervals (Student's t). Ratios are of an arm's geometric mean to the "
    "baseline's. Arms with the baseline's tuning are paired with it by seed. Memory is paired by seed too, and step "
    "times by generation of the timing run. The intervals of paired comparisons hold for each comparison alone, and "
    "their p values are adjusted by Holm's procedure. Arms that were tuned separately are independent: their "
    "intervals and p values hold for all arms at once, by Dunnett's procedure with a pooled spread, or with an arm's "
    "own spread if it stands out. An A/A arm is the baseline with other seeds, and is judged alone. Better or worse: "
    "the adjusted p value is below 0.05. Smallest visible: a true ratio of "
    "this size in one arm would have been detected in four of five such studies. All results are conditional on this "
    "tuning."
)


def show_value(quantity: Quantity, value: float) -> str:
    """Formats a value of a quantity, with its unit."""
    if quantity.show == "memory":
        return show_bytes(value)
    if quantity.show == "duration":
        return show_seconds(value)
    if quantity.show == "energy":
        return show_count(value, "J")
    return show_count(value) if quantity.show == "count" else f"{value:.4f}"


def show_mean(quantity: Quantity, cell: Cell) -> str:
    """Formats the mean of an arm with its interval.

    If there are too few seeds for an interval, shows the value of each seed. If some run has no value, shows only the
    number of runs that have a value.
    """
    if not cell.num_seeds:
        return "no trial finished"
    if cell.mean is None:
        return f"{len(cell.values)} of {cell.num_seeds} runs"
    mean = cell.mean
    if math.isnan(mean.lower) and len(cell.values) > 1:
        return f"{', '.join(show_value(quantity, value) for value in cell.values.values())} (by seed)"
    shown = show_value(quantity, mean.value)
    if math.isnan(mean.lower) or mean.lower == mean.upper:
        return shown
    return f"{shown} ({show_value(quantity, mean.lower)} to {show_value(quantity, mean.upper)})"


def show_ratio(cell: Cell) -> str:
    """Formats the ratio to the baseline with its interval and the result in words. Empty if there is no ratio."""
    if cell.difference is None:
        return ""
    return f"{show_interval(cell.difference.ratio)} {cell.call}".rstrip()


def show_interval(ratio: Estimate) -> str:
    """Formats a ratio, with its interval if it has one."""
    text = f"x {ratio.value:.4g}"
    if math.isnan(ratio.lower) or ratio.lower == ratio.upper:
        return text
    return f"{text} ({ratio.lower:.4g} to {ratio.upper:.4g})"


def show_effect(effect: Effect) -> str:
    """Formats an effect as a ratio with its interval.

    Shows `none` for an effect within rounding error, and the ratio of each seed if there are too few seeds for an
    interval.
    """
    if effect.is_none:
        return "none"
    if math.isnan(effect.ratio.lower) and effect.by_seed:
        return f"x {', '.join(f'{ratio:.5g}' for ratio in effect.by_seed.values())} (by seed)"
    return show_interval(effect.ratio)


def _in_cell(group: Group) -> str:
    """Returns the values of the axes as the end of a table's title. Empty if the study has no axes."""
    return f", {show_cell(group.cell)}" if group.cell else ""


def group_tables(group: Group) -> list[TextTable]:
    """Returns the tables of one cell of the study: quantities by arm, noise, tuning, and effects."""
    found = [_quantities_table(group)]
    if group.noise:
        found.append(_noise_table(group))
    if group.tuning:
        found.append(_tuning_table(group))
    return found + effects_tables(group)


def _quantities_table(group: Group) -> TextTable:
    seeds = {name: len(runs) for name, runs in group.arms.items()}
    counts = ", ".join(f"{name} {n}" for name, n in seeds.items()) if len(set(seeds.values())) > 1 else None
    return TextTable(
        title=f"Against {group.baseline}{_in_cell(group)}; seeds: {counts or next(iter(seeds.values()))}",
        headers=["", *group.arms],
        rows=[row for quantity in group.quantities for row in _quantity_rows(group, quantity)],
    )


def _quantity_rows(group: Group, quantity: Quantity) -> Iterator[list[str]]:
    """Yields a quantity's rows: means and, if any arm has them, ratios, smallest visible ratios and methods."""
    cells = [group.table[quantity.key][name] for name in group.arms]
    yield [quantity.label, *(show_mean(quantity, cell) for cell in cells)]
    ratios = [show_ratio(cell) for cell in cells]
    if any(ratios):
        yield ["  ratio to the baseline", *ratios]
    differences = [cell.difference for cell in cells]
    visible = ["" if difference is None else _visible(difference.smallest_visible) for difference in differences]
    if any(visible):
        yield ["  smallest visible", *visible]
        yield ["  judged by", *("" if difference is None else difference.method for difference in differences)]


def effects_tables(group: Group) -> list[TextTable]:
    """Returns a table of the effects of all factors for each quantity.

    Empty if the arms are not combinations of factors.
    """
    return [
        TextTable(
            title=_effects_title(group, quantity, group.effects[quantity.key]),
            headers=["factor", "levels", "ratio", "predicted", "p (Holm)", "smallest visible"],
            rows=[_effect_row(effect) for effect in group.effects[quantity.key].effects],
        )
        for quantity in group.quantities
        if quantity.key in group.effects
    ]


def _effects_title(group: Group, quantity: Quantity, found: Effects) -> str:
    by = f" over {len(found.seeds)} seeds" if found.seeds else ""
    lacking = [f"seeds {', '.join(map(str, found.dropped_seeds))}"] if found.dropped_seeds else []
    if found.dropped_combinations:
        lacking.append(f"combinations {'; '.join(f'({show_cell(levels)})' for levels in found.dropped_combinations)}")
    left_out = f"; left out because runs are missing: {' and '.join(lacking)}" if lacking else ""
    aliased = f"; left out because aliased with these effects: {', '.join(found.aliased)}" if found.aliased else ""
    return f"Effects on {quantity.label}{_in_cell(group)}, {found.num_runs} runs{by}{left_out}{aliased}"


def _effect_row(effect: Effect) -> list[str]:
    p = "-" if math.isnan(effect.p_adjusted) or effect.is_none else f"{effect.p_adjusted:.2g}"
    predicted = "-" if effect.predicted is None else f"x {effect.predicted:.4g}"
    visible = "" if effect.is_none else _visible(effect.smallest_visible)
    return [" x ".join(effect.factors), effect.levels, show_effect(effect), predicted, p, visible or "-"]


def _visible(smallest: float) -> str:
    if math.isnan(smallest) or smallest == 1:
        return ""
    return f"{smallest - 1:.2%}" if smallest < _MANIFOLD else f"x {smallest:.3g}"


_MANIFOLD = 3.0
"""Ratios from this value on are shown as a factor instead of a percentage."""


def _noise_table(group: Group) -> TextTable:
    """Returns a table of how much runs of the baseline differ if only their seed differs."""
    has_ratio = any(noise.ratio is not None for noise in group.noise.values())
    rows = []
    for quantity in group.quantities:
        noise = group.noise.get(quantity.key)
        if noise is not None:
            ratio = [] if not has_ratio else ["-" if noise.ratio is None else show_interval(noise.ratio)]
            rows.append([quantity.label, *ratio, f"{noise.sd:.2%}", str(noise.num_runs)])
    headers = ["", *(["A/A ratio"] if has_ratio else []), "sd of the log ratio of two runs", "runs"]
    title = f"Noise floor: {group.baseline} against itself{_in_cell(group)}"
    return TextTable(title=title, headers=headers, rows=rows)


def _tuning_table(group: Group) -> TextTable:
    return TextTable(
        title=f"Tuning{_in_cell(group)}",
        headers=["arm", "trials", "chosen", "within 1 % of the best", "expected best after 1, 2, ... trials"],
        rows=[_tuning_row(name, tuning) for name, tuning in group.tuning.items()],
    )


def _tuning_row(name: str, tuning: Tuning) -> list[str]:
    best = "none"
    if tuning.best is not None:
        best = ", ".join(f"{field} = {_short(value)}" for field, value in tuning.best.items())
    near = ", ".join(f"{field} x {factor:.3g}" for field, factor in tuning.near_factor.items())
    reached = [f"{value:.4f}" if math.isfinite(value) else "-" for value in tuning.expected_best]
    return [name, str(len(tuning.trials)), best, near or "-", " ".join(reached)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def calibration_table(comparison: Comparison) -> TextTable:
    """Returns a table of prediction errors, over all runs."""
    rows = [
        [name.replace("_", " "), str(found.n), f"{found.median:.3%}", f"{found.worst:+.3%}", found.worst_run]
        for name, found in comparison.calibration.items()
    ]
    headers = ["quantity", "runs", "median error", "worst", "in"]
    return TextTable(title="Predicted / measured - 1, over all runs", headers=headers, rows=rows)


def tables(comparison: Comparison) -> list[TextTable]:
    """Returns all tables of a comparison."""
    found = [table for group in comparison.groups for table in group_tables(group)]
    return [*found, calibration_table(comparison)] if comparison.calibration else found


def render_comparison(comparison: Comparison, kind: str, width: int | None = None) -> str:
    """Renders a comparison as text.

    Args:
        comparison: the comparison, from `judge`.
        kind: `terminal`, `markdown`, `csv` or `json`.
        width: the width of the terminal, in characters. None to detect it.
    """
    if kind == "json":
        return json.dumps(as_dict(comparison), indent=1) + "\n"
    if kind == "csv":
        return as_csv(flat(comparison))
    if kind == "markdown":
        return _markdown(comparison)
    return terminal(tables(comparison), width, "\n".join(_closing(comparison)))


def _closing(comparison: Comparison) -> list[str]:
    command = [f"Command to reproduce this: {comparison.command}"] if comparison.command else []
    return [*(f"Note: {note}." for note in comparison.notes), FOOTNOTE, *command]


def terminal(shown_tables: Sequence[TextTable], width: int | None = None, closing: str = "") -> str:
    """Renders tables for the terminal. A table that is too wide is split into parts.

    Args:
        shown_tables: the tables.
        width: the width of the terminal, in characters. None to detect it.
        closing: text to print below the tables.
    """
    buffer = io.StringIO()
    console = Console(file=buffer, width=width or Console().width)
    for shown in shown_tables:
        for part in _beside(shown, console.width):
            columns = [
                Column(Text(header), justify="left" if n == 0 else "right") for n, header in enumerate(part.headers)
            ]
            table = Table(*columns, title=Text(part.title, style="bold"), title_justify="left")
            for row in part.rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
    if closing:
        console.print(Text(closing))
    return buffer.getvalue()


_FRAME = 3
"""The width that borders and padding add to a column, in characters."""


def _beside(table: TextTable, width: int) -> Iterator[TextTable]:
    """Yields the table in parts that fit into the width. Each part begins with the first column."""
    widths = [max(len(row[n]) for row in [table.headers, *table.rows]) + _FRAME for n in range(len(table.headers))]
    first = 1
    while first < len(widths) or first == 1:
        last = first + 1
        while last < len(widths) and 1 + widths[0] + sum(widths[first : last + 1]) <= width:
            last += 1
        columns = [0, *range(first, min(last, len(widths)))]
        rows = [[row[n] for n in columns] for row in table.rows if any(row[n] for n in columns[1:])]
        yield TextTable(title=table.title, headers=[table.headers[n] for n in columns], rows=rows)
        first = last


def _markdown(comparison: Comparison) -> str:
    return "\n".join([render_tables(tables(comparison)), *(f"{line}\n" for line in _closing(comparison))])


def flat(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns one flat row of plain numbers for each cell, quantity and arm. Missing values are None."""
    return [
        {
            "cell": show_cell(group.cell),
            "quantity": quantity.key,
            "arm": name,
            "baseline": group.baseline,
            **_flat_cell(cell),
        }
        for group in comparison.groups
        for quantity in group.quantities
        for name, cell in group.table[quantity.key].items()
    ]


def _flat_cell(cell: Cell) -> dict[str, Any]:
    difference = cell.difference
    return {
        "num_seeds": cell.num_seeds,
        "num_with_value": len(cell.values),
        **_numbers("mean", cell.mean),
        **_numbers("ratio", None if difference is None else difference.ratio),
        "p": None if difference is None else _plain(difference.p),
        "p_adjusted": _plain(cell.p_adjusted),
        "method": None if difference is None else difference.method,
        "smallest_visible_ratio": None if difference is None else _plain(difference.smallest_visible),
        "call": cell.call or None,
    }


def _numbers(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_lower": None, f"{name}_upper": None}
    return {
        name: _plain(estimate.value), f"{name}_lower": _plain(estimate.lower), f"{name}_upper": _plain(estimate.upper)
    }  # fmt: skip


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Returns the whole comparison as a dict for JSON. None replaces NaN and infinity."""
    groups = comparison.groups
    return {
        "metric": comparison.metrics[0].name,
        "metric_directions": {metric.name: metric.better for metric in comparison.metrics},
        "table": flat(comparison),
        "targets": {show_cell(group.cell): group.target for group in groups},
        "budgets": {show_cell(group.cell): group.budgets for group in groups},
        "tuning": [row for group in groups for row in _flat_tuning(group)],
        "effects": [row for group in groups for row in _flat_effects(group)],
        "noise": [row for group in groups for row in _flat_noise(group)],
        "calibration": {
            name: dataclasses.asdict(found) | {"median": _plain(found.median), "worst": _plain(found.worst)}
            for name, found in comparison.calibration.items()
        },
        "notes": comparison.notes,
        "footnote": FOOTNOTE,
        "command": comparison.command,
    }


def _flat_tuning(group: Group) -> Iterator[dict[str, Any]]:
    for name, tuning in group.tuning.items():
        yield {
            "cell": show_cell(group.cell),
            "arm": name,
            "trials": [{"settings": trial, group.metric.name: _plain(value)} for trial, value in tuning.trials],
            "best": tuning.best,
            "expected_best": [_plain(value) for value in tuning.expected_best],
            "at_edge": tuning.at_edge,
            "near_factor": {field: _plain(factor) for field, factor in tuning.near_factor.items()},
        }


def _flat_effects(group: Group) -> Iterator[dict[str, Any]]:
    for key, found in group.effects.items():
        for effect in found.effects:
            yield {
                "cell": show_cell(group.cell),
                "quantity": key,
                "factors": list(effect.factors),
                "levels": effect.levels,
                **_numbers("ratio", effect.ratio),
                "p_holm": _plain(effect.p_adjusted),
                "smallest_visible_ratio": _plain(effect.smallest_visible),
                "is_none": effect.is_none,
                "ratio_by_seed": {str(seed): ratio for seed, ratio in effect.by_seed.items()},
                "dropped_seeds": list(found.dropped_seeds),
                "dropped_combinations": list(found.dropped_combinations),
                "predicted_ratio": effect.predicted,
            }


def _flat_noise(group: Group) -> Iterator[dict[str, Any]]:
    for key, noise in group.noise.items():
        yield {
            "cell": show_cell(group.cell),
            "quantity": key,
            **_numbers("aa_ratio", noise.ratio),
            "sd_log_ratio": noise.sd,
            "num_runs": noise.num_runs,
        }
