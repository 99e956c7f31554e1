"""Loss curves of runs, as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing of the caller's backend or open figures is touched.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = max(1, min(int(np.isfinite(run.steps["loss"]).sum()) for run in drawn) // 50)
    for number, run in enumerate(drawn):
        name = f"{run.name}: " if len(drawn) > 1 else ""
        _draw(axes, run, window, _COLOURS[number % len(_COLOURS)], name)
    _dress(axes, drawn, window)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with files.reported(path):
        files.write_bytes(path, picture.getvalue())


def held_out_loss(run: Run) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """By split: the steps of its evaluations, and the mean loss of each over all items, nats."""
    if run.evals is None:
        return {}
    sums = run.evals.group_by(["split", "step"], use_threads=False).aggregate([("loss_sum", "sum"), ("count", "sum")])
    curves = {}
    for split in sums["split"].unique().to_pylist():
        rows = sums.filter(pc.field("split") == split).sort_by("step")
        means = rows["loss_sum_sum"].to_numpy() / rows["count_sum"].to_numpy()
        curves[split] = rows["step"].to_numpy(), means
    return curves


def _draw(axes: Any, run: Run, window: int, colour: str, name: str) -> None:
    """One run: raw losses thin, their running mean over `window` steps, and its evaluations with the last value."""
    is_finite = np.isfinite(run.steps["loss"])
    steps, losses = run.steps["step"][is_finite], run.steps["loss"][is_finite]
    if len(losses) < window:
        axes.plot([], [], color=colour, label=f"{name}no finite loss")
        return
    if window > 1:
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.6)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = steps[window // 2 :][: len(smooth)]
    axes.plot(middle, smooth, color=colour, linewidth=1.6, label=f"{name}training")
    for marker, (split, (at, means)) in zip("osD^", held_out_loss(run).items(), strict=False):
        axes.plot(
            at, means, color=colour, linestyle=":", linewidth=1, marker=marker, markersize=4.5,
            markerfacecolor="white", markeredgewidth=1.3, zorder=3, label=f"{name}{split}, last {means[-1]:.4f}",
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
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {item})")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    mean = f" (thick: mean of {window} steps, thin: each step)" if window > 1 else ""
    axes.set_title(f"{title}{mean}", loc="left", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
