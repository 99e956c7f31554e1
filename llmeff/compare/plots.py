"""Loss curves of runs and of arms, and how well they know each class, as pictures."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmeff.compare.ledger import LOSS, Entry, Metric, held_out_curves
from llmeff.compare.verdict import Group, show_cell
from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.record.reader import Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Told apart by colour-blind people too (Okabe and Ito 2008)."""
_FEW = 6
"""So many names fit into a picture, more stand beside it."""


def loss_curve(runs: Sequence[Run], path: Path) -> None:
    """Draws training loss, raw and smoothed, and held-out loss over steps into a PNG.

    Raises:
        ConfigError: no run has a step to draw, or the file cannot be written.
    """
    drawn = [run for run in runs if len(run.steps["step"])]
    if not drawn:
        raise ConfigError(f"{path}: there is nothing to draw, no step is done")
    figure, axes = _figure()
    window = max(1, min(int(np.isfinite(run.steps["loss"]).sum()) for run in drawn) // 50)
    for number, run in enumerate(drawn):
        name = f"{run.name}: " if len(drawn) > 1 else ""
        _draw(axes, run, window, _COLOURS[number % len(_COLOURS)], name)
    _dress(axes, drawn, window)
    with files.reported(path):
        files.write_bytes(path, _png(figure))


def arm_curves(group: Group) -> bytes | None:
    """The held-out metric over items by arm, as a PNG: the mean over seeds, and a band from the lowest to the highest.

    None where no arm was evaluated twice.
    """
    metric = group.metric
    curves = {name: _band(runs, metric) for name, runs in group.arms.items()}
    if all(curve is None for curve in curves.values()):
        return None
    figure, axes = _figure()
    best, early = [], []
    for number, (name, curve) in enumerate(curves.items()):
        if curve is None:
            axes.plot([], [], color=_COLOURS[number % len(_COLOURS)], label=_shown(f"{name}: no curve"))
            continue
        items, values = curve
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        mean = values.mean(axis=0)
        axes.plot(
            items, mean, color=colour, linestyle=style, linewidth=1.6, label=_shown(f"{name} (n = {len(values)})")
        )
        axes.fill_between(items, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        best.append((metric.sign * values).min())
        early.append(metric.sign * mean[len(mean) // 4])
    # The beginning, which all have in common, would press the ends together.
    _limit(axes, metric, min(best), max(early), room=1e-6)
    if group.target is not None:
        axes.axhline(group.target, color="#888888", linewidth=0.8, linestyle=":", label=f"target {group.target:.4f}")
    item = next((run.item for runs in group.arms.values() for run in runs if run.item), "item")
    where = f", {show_cell(group.cell)}" if group.cell else ""
    y = f"held-out {_named(metric, f'nats per {item}')}"
    _label(axes, f"{item}s trained on", y, f"Mean and range over seeds{where}")
    axes.set_xlim(left=0)
    if len(curves) > _FEW:
        axes.get_legend().set(loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def tuning_curves(group: Group) -> bytes | None:
    """What every trial reached over the one number that was searched, by arm, as a PNG; None where there is no such."""
    figure, axes = _figure()
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
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=4.5, linewidth=1.4, label=_shown(arm)
        )
    if not finite:
        return None
    axes.set_xscale("log")
    far = _FAR**metric.sign * min(finite)
    _limit(axes, metric, min(finite), min(max(finite), far), room=1e-3)
    where = f", {show_cell(group.cell)}" if group.cell else ""
    more, above = ("more", "above") if metric.better == "lower" else ("less", "below")
    beyond = f"; trials of {more} than {_FAR**metric.sign:.2g} times the best {metric.label} lie {above}"
    y = _named(metric, "nats", " of the trial")
    _label(axes, ", ".join(sorted(names)), y, f"Sensitivity{where}{beyond if max(finite) > far else ''}")
    return _png(figure)


def trials_curves(group: Group) -> bytes | None:
    """What to expect of the best of 1, 2, ... trials by arm, as a PNG; None where no arm was tuned by several.

    The trials are taken in random order: what a smaller budget would have found, on average.
    """
    tuned = {arm: tuning for arm, tuning in group.tuning.items() if len(tuning.expected_best) > 1}
    if not any(np.isfinite(tuning.expected_best).any() for tuning in tuned.values()):
        return None
    figure, axes = _figure()
    for number, arm in enumerate(group.arms):
        if arm not in tuned:
            continue
        expected = np.array(tuned[arm].expected_best)
        counts = np.arange(1, len(expected) + 1)
        known = np.isfinite(expected)
        axes.plot(
            counts[known], expected[known], color=_COLOURS[number % len(_COLOURS)], marker="o", markersize=4.5,
            linewidth=1.4, label=_shown(arm),
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    where = f", {show_cell(group.cell)}" if group.cell else ""
    label = group.metric.label
    y = f"expected {_named(group.metric, 'nats', ' of the best')}"
    _label(axes, "trials", y, f"{label[0].upper()}{label[1:]} against tuning budget{where}")
    return _png(figure)


def class_bars(values: Mapping[str, Sequence[float]], classes: Sequence[str], label: str, title: str) -> bytes:
    """A bar for each class and run, below one another, as a PNG.

    Args:
        values: by run, its classes' shares in their order; NaN where a class is not there.
        classes: their names.
        label: of the axis of the values.
        title: of the picture.
    """
    thick = 0.8 / len(values)
    figure, axes = _figure(height=1.5 + len(classes) * (0.14 + 0.16 * len(values)))
    for number, (name, own) in enumerate(values.items()):
        shares = np.array(own)
        places = np.arange(len(classes)) + (number - (len(values) - 1) / 2) * thick
        colour = _COLOURS[number % len(_COLOURS)]
        known = np.isfinite(shares)
        mean = f"{name} (mean {shares[known].mean():.3f})" if known.any() else name
        axes.barh(places, np.where(known, shares, 0), height=0.9 * thick, color=colour, label=_shown(mean))
        for place, share in zip(places, shares, strict=True):
            text = f"{share:.3f}" if np.isfinite(share) else "not there"
            axes.text(np.nan_to_num(share) + 0.006, place, text, va="center", fontsize=7, color="#444444")
    _label(axes, label, "", title)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.get_legend().remove()
    legend = figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=min(3, len(values)))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _png(figure)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A panel of `curves`."""

    label: str
    """Of its axis."""
    values: Mapping[str, Sequence[float]]
    """By name, above 0."""


def curves(
    places: Sequence[float], panels: Sequence[Curves], label: str, title: str, *, until: float | None = None
) -> bytes:
    """Panels side by side, as a PNG; both axes logarithmic, but where `until` is given.

    Args:
        places: of the values of every curve.
        panels: with curves of the same names.
        label: of the places.
        title: of the picture.
        until: the place at which a line is drawn, between what was known before and what was not.
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
            colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
            axes.plot(places, values, color=colour, linestyle=style, marker="o", markersize=3.5, label=_shown(name))
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
        _label(axes, label, panel.label, "")
        if place < len(panels):
            axes.get_legend().remove()
        else:
            axes.get_legend().set(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    return _png(figure)


_FAR = 1.5
_STYLES = ("-", "--", ":")


def _named(metric: Metric, unit: str, of: str = "") -> str:
    """A metric on an axis; the loss has a unit."""
    return f"{metric.label}{of} ({unit})" if metric == LOSS else f"{metric.label}{of}"


def _limit(axes: Any, metric: Metric, best: float, worst: float, room: float) -> None:
    """Shows what lies between two costs, and a twentieth more."""
    more = 0.05 * (worst - best)
    axes.set_ylim(sorted((metric.sign * (best - more - room), metric.sign * (worst + more + room))))


def _band(runs: Sequence[Entry], metric: Metric) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Items, and (runs, evaluations) values, of the runs that were evaluated alike and at least twice."""
    known = [run for run in runs if len(run.curve(metric.name)) > 1 and run.items_per_step and run.is_done]
    known = [run for run in known if np.isfinite(run.curve(metric.name)).all()]
    known = [run for run in known if run.curve_steps == known[0].curve_steps]
    if not known:
        return None
    each = known[0].items_per_step
    assert each is not None
    return np.array(known[0].curve_steps) * each, np.array([run.curve(metric.name) for run in known])


def _figure(height: float = 4.5) -> tuple[Any, Any]:
    """In inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing of the caller's backend or open figures is touched.
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _label(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)


def _shown(name: str) -> str:
    """A name as a legend shows it: what begins with an underscore would be left out."""
    return f" {name}" if name.startswith("_") else name


def _draw(axes: Any, run: Run, window: int, colour: str, name: str) -> None:
    """One run: raw losses thin, their running mean over `window` steps, and its evaluations with the last value."""
    is_finite = np.isfinite(run.steps["loss"])
    steps, losses = run.steps["step"][is_finite], run.steps["loss"][is_finite]
    if len(losses) < window:
        axes.plot([], [], color=colour, label=_shown(f"{name}no finite loss"))
        return
    if window > 1:
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.6)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = steps[window // 2 :][: len(smooth)]
    axes.plot(middle, smooth, color=colour, linewidth=1.6, label=_shown(f"{name}training"))
    held_out = {split: (at, own[LOSS.name]) for split, (at, own) in held_out_curves(run).items() if LOSS.name in own}
    for marker, (split, (at, means)) in zip("osD^", held_out.items(), strict=False):
        axes.plot(
            at, means, color=colour, linestyle=":", linewidth=1, marker=marker, markersize=4.5,
            markerfacecolor="white", markeredgewidth=1.3, zorder=3, label=_shown(f"{name}{split}, last {means[-1]:.4f}"),
        )  # fmt: skip


def _dress(axes: Any, runs: Sequence[Run], window: int) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    if all((run.steps["loss"] > 0).all() for run in runs):
        # The beginning is several times the end, where runs part by hundredths.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    items = {run.result.item for run in runs if run.result is not None}
    item = items.pop() if len(items) == 1 else "item"
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    mean = f" (thick: mean of {window} steps, thin: each step)" if window > 1 else ""
    _label(axes, "optimizer step", f"loss (nats per {item})", f"{title}{mean}")
    axes.set_xlim(left=0)
