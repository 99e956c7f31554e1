"""Loss curves of runs over optimizer steps, as numbers and as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.record.figure import COLOURS, as_png, dress_axes, legend_name, new_figure
from llmeff.record.reader import Run


def loss_curve(runs: Sequence[Run], path: Path) -> None:
    """Writes a PNG with the training loss (raw and smoothed) and the held-out loss of runs over optimizer steps.

    Raises:
        ConfigError: no run has recorded a step, or the file cannot be written.
    """
    drawn = [run for run in runs if len(run.steps["step"])]
    if not drawn:
        raise ConfigError(f"{path}: nothing to draw, because no run has recorded a step")
    figure, axes = new_figure()
    window = max(1, min(int(np.isfinite(run.steps["loss"]).sum()) for run in drawn) // 50)
    for number, run in enumerate(drawn):
        name = f"{run.name}: " if len(drawn) > 1 else ""
        _draw(axes, run, window, COLOURS[number % len(COLOURS)], name)
    _dress(axes, drawn, window)
    with files.reported(path):
        files.write_bytes(path, as_png(figure))


def held_out_curves(run: Run) -> dict[str, tuple[list[int], dict[str, list[float]]]]:
    """Returns, for each split, the steps of its evaluations and the values of each metric.

    A metric is left out if an evaluation of the split lacks it.
    """
    if not run.evaluations:
        return _loss_curves(run)
    curves = {}
    for split in dict.fromkeys(row.split for row in run.evaluations):
        rows = [row for row in run.evaluations if row.split == split]
        names = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)]
        curves[split] = [row.step for row in rows], {name: [row.metrics[name] for row in rows] for name in names}
    return curves


def _loss_curves(run: Run) -> dict[str, tuple[list[int], dict[str, list[float]]]]:
    """Computes the mean loss per item at each evaluation from `evals.parquet`, for runs without `evaluations.jsonl`."""
    if run.evals is None:
        return {}
    sums = run.evals.group_by(["split", "step"], use_threads=False).aggregate([("loss_sum", "sum"), ("count", "sum")])
    curves = {}
    for split in sums["split"].unique().to_pylist():
        rows = sums.filter(pc.field("split") == split).sort_by("step")
        means = rows["loss_sum_sum"].to_numpy() / rows["count_sum"].to_numpy()
        curves[split] = rows["step"].to_pylist(), {"loss": means.tolist()}
    return curves


def _draw(axes: Any, run: Run, window: int, colour: str, name: str) -> None:
    """Draws one run: raw losses (thin), their mean over `window` steps (thick), and its evaluations (markers)."""
    is_finite = np.isfinite(run.steps["loss"])
    steps, losses = run.steps["step"][is_finite], run.steps["loss"][is_finite]
    if len(losses) < window:
        axes.plot([], [], color=colour, label=legend_name(f"{name}no finite loss"))
        return
    if window > 1:
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.6)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = steps[window // 2 :][: len(smooth)]
    axes.plot(middle, smooth, color=colour, linewidth=1.6, label=legend_name(f"{name}training"))
    held_out = {split: (at, curves["loss"]) for split, (at, curves) in held_out_curves(run).items() if "loss" in curves}
    for marker, (split, (at, means)) in zip("osD^", held_out.items(), strict=False):
        axes.plot(
            at, means, color=colour, linestyle=":", linewidth=1, marker=marker, markersize=4.5,
            markerfacecolor="white", markeredgewidth=1.3, zorder=3, label=legend_name(f"{name}{split}, last {means[-1]:.4f}"),
        )  # fmt: skip


def _dress(axes: Any, runs: Sequence[Run], window: int) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    if all((run.steps["loss"] > 0).all() for run in runs):
        # A log scale shows both the high loss at the start and differences of hundredths at the end.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    items = {run.result.item for run in runs if run.result is not None}
    item = items.pop() if len(items) == 1 else "item"
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    mean = f" (thick: mean of {window} steps, thin: each step)" if window > 1 else ""
    dress_axes(axes, "optimizer step", f"loss (nats per {item})", f"{title}{mean}")
    axes.set_xlim(left=0)
