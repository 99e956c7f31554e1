"""Loss curves of runs and of arms, as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmeff.compare.ledger import Entry, held_out_loss
from llmeff.compare.verdict import Group, show_cell
from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.record.reader import Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Told apart by colour-blind people too (Okabe and Ito 2008)."""


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
    """Held-out loss over items by arm, as a PNG: the mean over seeds, and a band from the lowest to the highest.

    None where no arm was evaluated twice.
    """
    curves = {name: _band(runs) for name, runs in group.arms.items()}
    if all(curve is None for curve in curves.values()):
        return None
    figure, axes = _figure()
    low, high = [], []
    for number, (name, curve) in enumerate(curves.items()):
        if curve is None:
            axes.plot([], [], color=_COLOURS[number % len(_COLOURS)], label=_shown(f"{name}: no curve"))
            continue
        items, losses = curve
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        mean = losses.mean(axis=0)
        axes.plot(
            items, mean, color=colour, linestyle=style, linewidth=1.6, label=_shown(f"{name} (n = {len(losses)})")
        )
        axes.fill_between(items, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        low.append(losses.min())
        high.append(mean[len(mean) // 4])
    # The beginning, which all have in common, would press the ends together.
    axes.set_ylim(min(low) - 0.05 * (max(high) - min(low)), max(high) + 0.05 * (max(high) - min(low)) + 1e-6)
    if group.target is not None:
        axes.axhline(group.target, color="#888888", linewidth=0.8, linestyle=":", label=f"target {group.target:.4f}")
    item = next((run.item for runs in group.arms.values() for run in runs if run.item), "item")
    where = f", {show_cell(group.cell)}" if group.cell else ""
    _label(axes, f"{item}s trained on", f"held-out loss (nats per {item})", f"Mean and range over seeds{where}")
    axes.set_xlim(left=0)
    return _png(figure)


def tuning_curves(group: Group) -> bytes | None:
    """The loss of every trial over the one number that was searched, by arm, as a PNG; None where there is no such."""
    figure, axes = _figure()
    names: set[str] = set()
    finite: list[float] = []
    for number, arm in enumerate(group.arms):
        tuning = group.tuning.get(arm)
        if tuning is None or not tuning.near_factor:
            continue
        (name,) = tuning.near_factor
        points = sorted((trial[name], loss) for trial, loss in tuning.trials if np.isfinite(loss))
        if not points:
            continue
        names.add(name)
        finite += [loss for _, loss in points]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=4.5, linewidth=1.4, label=_shown(arm)
        )
    if not finite:
        return None
    axes.set_xscale("log")
    best, top = min(finite), min(max(finite), _FAR * min(finite))
    axes.set_ylim(best - 0.05 * (top - best) - 1e-3, top + 0.05 * (top - best) + 1e-3)
    where = f", {show_cell(group.cell)}" if group.cell else ""
    above = f"; trials of more than {_FAR} times the best loss lie above" if max(finite) > top else ""
    _label(axes, ", ".join(sorted(names)), "loss of the trial (nats)", f"Sensitivity{where}{above}")
    return _png(figure)


def trials_curves(group: Group) -> bytes | None:
    """The loss to expect of the best of 1, 2, ... trials by arm, as a PNG; None where no arm was tuned by several.

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
    _label(axes, "trials", "expected loss of the best (nats)", f"Loss against tuning budget{where}")
    return _png(figure)


_FAR = 1.5
_STYLES = ("-", "--", ":")


def _band(runs: Sequence[Entry]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Items, and (runs, evaluations) losses, of the runs that were evaluated alike and at least twice."""
    known = [run for run in runs if len(run.curve_steps) > 1 and run.items_per_step and run.is_done]
    known = [run for run in known if run.curve_steps == known[0].curve_steps]
    if not known:
        return None
    each = known[0].items_per_step
    assert each is not None
    return np.array(known[0].curve_steps) * each, np.array([run.curve_losses for run in known])


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing of the caller's backend or open figures is touched.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
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
    for marker, (split, (at, means)) in zip("osD^", held_out_loss(run).items(), strict=False):
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
