"""Plots as PNGs: training curves of arms, tuning curves, panels of measurements, and bars by class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmeff.compare.alike import show_cell
from llmeff.compare.group import Group
from llmeff.compare.ledger import LOSS, Entry, Metric
from llmeff.record.figure import COLOURS, as_png, dress_axes, legend_name, new_figure

_FEW = 6
"""The most names that fit into the plot. With more names, the legend is placed beside it."""


def arm_curves(group: Group) -> bytes | None:
    """Plots the held-out metric of each arm over items trained on, as a PNG: mean and range over seeds.

    Returns None if no arm has a finished run that was evaluated at least twice.
    """
    metric = group.metric
    curves = {name: _band(runs, metric) for name, runs in group.arms.items()}
    if all(curve is None for curve in curves.values()):
        return None
    figure, axes = new_figure()
    best, early = [], []
    for number, (name, curve) in enumerate(curves.items()):
        if curve is None:
            axes.plot([], [], color=COLOURS[number % len(COLOURS)], label=legend_name(f"{name}: no curve"))
            continue
        items, values = curve
        colour, style = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % len(_STYLES)]
        mean = values.mean(axis=0)
        axes.plot(
            items, mean, color=colour, linestyle=style, linewidth=1.6, label=legend_name(f"{name} (n = {len(values)})")
        )
        axes.fill_between(items, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        best.append((metric.sign * values).min())
        early.append(metric.sign * mean[len(mean) // 4])
    # All arms start alike. Showing the start in full would leave little height for the differences at the end.
    _limit(axes, metric, min(best), max(early), room=1e-6)
    if group.target is not None:
        axes.axhline(group.target, color="#888888", linewidth=0.8, linestyle=":", label=f"target {group.target:.4f}")
    item = next((run.item for runs in group.arms.values() for run in runs if run.item), "item")
    where = f", {show_cell(group.cell)}" if group.cell else ""
    y = f"held-out {_named(metric, f'nats per {item}')}"
    dress_axes(axes, f"{item}s trained on", y, f"Mean and range over seeds{where}")
    axes.set_xlim(left=0)
    if len(curves) > _FEW:
        axes.get_legend().set(loc="upper left", bbox_to_anchor=(1, 1))
    return as_png(figure)


def tuning_curves(group: Group) -> bytes | None:
    """Plots the metric of every trial over the value of the searched field, by arm, as a PNG.

    Returns None if no arm has a finished trial in a search over exactly one number.
    """
    figure, axes = new_figure()
    metric = group.metric
    names: set[str] = set()
    finite: list[float] = []
    for number, arm in enumerate(group.arms):
        tuning = group.tuning.get(arm)
        if tuning is None or not tuning.near_factor:
            continue
        (name,) = tuning.near_factor
        points = sorted((trial[name], value) for trial, value in tuning.trials if np.isfinite(value))
        if not points:
            continue
        names.add(name)
        finite += [metric.sign * value for _, value in points]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=4.5, linewidth=1.4, label=legend_name(arm)
        )
    if not finite:
        return None
    axes.set_xscale("log")
    far = _FAR**metric.sign * min(finite)
    _limit(axes, metric, min(finite), min(max(finite), far), room=1e-3)
    where = f", {show_cell(group.cell)}" if group.cell else ""
    more, above = ("more", "above") if metric.better == "lower" else ("less", "below")
    beyond = f"; trials with {more} than {_FAR**metric.sign:.2g} times the best {metric.label} lie {above} the plot"
    y = _named(metric, "nats", " of the trial")
    dress_axes(axes, ", ".join(sorted(names)), y, f"Sensitivity{where}{beyond if max(finite) > far else ''}")
    return as_png(figure)


def trials_curves(group: Group) -> bytes | None:
    """Plots the expected best value of 1, 2, ... trials by arm, as a PNG.

    The point at k trials is the result of a tuning budget of k trials: the mean, over all choices of k of the arm's
    trials, of the best value among them. Returns None if no arm has at least two trials, one of them finished.
    """
    tuned = {arm: tuning for arm, tuning in group.tuning.items() if len(tuning.expected_best) > 1}
    if not any(np.isfinite(tuning.expected_best).any() for tuning in tuned.values()):
        return None
    figure, axes = new_figure()
    for number, arm in enumerate(group.arms):
        if arm not in tuned:
            continue
        expected = np.array(tuned[arm].expected_best)
        counts = np.arange(1, len(expected) + 1)
        known = np.isfinite(expected)
        axes.plot(
            counts[known], expected[known], color=COLOURS[number % len(COLOURS)], marker="o", markersize=4.5,
            linewidth=1.4, label=legend_name(arm),
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    where = f", {show_cell(group.cell)}" if group.cell else ""
    label = group.metric.label
    y = f"expected {_named(group.metric, 'nats', ' of the best')}"
    dress_axes(axes, "trials", y, f"{label[0].upper()}{label[1:]} against tuning budget{where}")
    return as_png(figure)


def class_bars(values: Mapping[str, Sequence[float]], classes: Sequence[str], label: str, title: str) -> bytes:
    """Plots one horizontal bar per class and run, as a PNG.

    Args:
        values: for each run, one value between 0 and 1 per class. NaN if the class is absent.
        classes: the names of the classes.
        label: the label of the value axis.
        title: the title of the plot.
    """
    thick = 0.8 / len(values)
    figure, axes = new_figure(height=1.5 + len(classes) * (0.14 + 0.16 * len(values)))
    for number, (name, of_run) in enumerate(values.items()):
        shares = np.array(of_run)
        places = np.arange(len(classes)) + (number - (len(values) - 1) / 2) * thick
        colour = COLOURS[number % len(COLOURS)]
        known = np.isfinite(shares)
        mean = f"{name} (mean {shares[known].mean():.3f})" if known.any() else name
        axes.barh(places, np.where(known, shares, 0), height=0.9 * thick, color=colour, label=legend_name(mean))
        for place, share in zip(places, shares, strict=True):
            text = f"{share:.3f}" if np.isfinite(share) else "class absent"
            axes.text(np.nan_to_num(share) + 0.006, place, text, va="center", fontsize=7, color="#444444")
    dress_axes(axes, label, "", title)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.get_legend().remove()
    legend = figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=min(3, len(values)))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return as_png(figure)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One panel of the plot that `curves` makes."""

    label: str
    """The label of the value axis."""
    values: Mapping[str, Sequence[float]]
    """For each curve, by name, its values. They must be positive on a logarithmic axis."""


def curves(
    places: Sequence[float], panels: Sequence[Curves], label: str, title: str, *, until: float | None = None
) -> bytes:
    """Plots panels of curves side by side, as a PNG. Both axes are linear if `until` is given, otherwise logarithmic.

    Args:
        places: the x values, common to all curves.
        panels: the panels. Their curves have the same names.
        label: the label of the x axis.
        title: the title of the plot.
        until: an x value to mark with a vertical line, such as the training length. None for no line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    width = 5 * len(panels) if until is None else 8
    figure = Figure(figsize=(width, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        axes: Any = figure.add_subplot(1, len(panels), place)
        for number, (name, values) in enumerate(panel.values.items()):
            colour, style = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % len(_STYLES)]
            axes.plot(
                places, values, color=colour, linestyle=style, marker="o", markersize=3.5, label=legend_name(name)
            )
        if until is None:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(list(places)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params("x", labelrotation=45)
        else:
            axes.axvline(until, color="#888888", linewidth=0.8, linestyle=":")
            axes.set_xlim(left=0)
        dress_axes(axes, label, panel.label, "")
        if place < len(panels):
            axes.get_legend().remove()
        else:
            axes.get_legend().set(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    return as_png(figure)


_FAR = 1.5
"""Trials that are worse than the best by more than this factor may lie outside the plot."""
_STYLES = ("-", "--", ":")


def _named(metric: Metric, unit: str, of: str = "") -> str:
    """Returns an axis label. Only the loss has a unit.

    Args:
        metric: the metric.
        unit: the unit of the loss.
        of: words that follow the metric's name.
    """
    return f"{metric.label}{of} ({unit})" if metric == LOSS else f"{metric.label}{of}"


def _limit(axes: Any, metric: Metric, best: float, worst: float, room: float) -> None:
    """Limits the value axis to the range from `best` to `worst`, extended on both sides by 5 % and by `room`."""
    more = 0.05 * (worst - best)
    axes.set_ylim(sorted((metric.sign * (best - more - room), metric.sign * (worst + more + room))))


def _band(runs: Sequence[Entry], metric: Metric) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Returns the number of items trained on at each evaluation, and the values of the metric, (runs, evaluations).

    Uses the finished runs with at least two evaluations. Of these, leaves out runs that were not evaluated at the same
    steps as the first. Returns None if there is no such run.
    """
    known = [run for run in runs if run.is_done and run.items_per_step and _is_curve(run.curve(metric.name))]
    known = [run for run in known if run.curve_steps == known[0].curve_steps]
    if not known:
        return None
    items_per_step = known[0].items_per_step
    assert items_per_step is not None
    return np.array(known[0].curve_steps) * items_per_step, np.array([run.curve(metric.name) for run in known])


def _is_curve(values: Sequence[float]) -> bool:
    return len(values) > 1 and bool(np.isfinite(values).all())
