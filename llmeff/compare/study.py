"""Reads a study (its runs, and the facts that its sweep or ledger records), compares its arms, and plots its curves."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.alike import show_cell
from llmeff.compare.ledger import LEDGER, LOSS, SWEEP, Entry, read_entries, read_facts
from llmeff.compare.plots import arm_curves
from llmeff.compare.report import title_of
from llmeff.compare.timing import TIMING, read_timing
from llmeff.compare.verdict import Comparison, judge
from llmeff.core import files
from llmeff.core.config import ConfigError


def is_list(paths: Sequence[Path], entries: Sequence[Entry]) -> bool:
    """Whether to list these runs side by side instead of comparing arms.

    True for run folders (not sweeps or ledgers) if all runs belong to one arm, or if every run is an arm of its own.
    In these cases there is nothing to judge: there is no other arm, or no arm has several seeds.
    """
    if any(path.is_file() or (path / SWEEP).is_file() for path in paths):
        return False
    arms = [entry.arm for entry in entries]
    return len(set(arms)) in (1, len(arms))


def read_study(
    paths: Sequence[Path],
    entries: Sequence[Entry] | None = None,
    *,
    baseline: str | None = None,
    target: float | None = None,
    metric: str | None = None,
    timing: Path | None = None,
    mixed: bool = False,
) -> Comparison:
    """Reads a study and compares its arms.

    Args:
        paths: run folders, sweep folders, or ledger files.
        entries: the entries of these paths. None to read them.
        baseline: see `judge`. None for the baseline of the sweep, if there is one.
        target: see `judge`. None for the target of the sweep, if it has one for this metric.
        metric: see `judge`. None for the metric of the sweep, or else the loss.
        timing: a file of step times. None for the step times of the sweep or the ledger, if there are any.
        mixed: see `judge`.

    Raises:
        ConfigError: the step times cannot be read, or `read_entries` or `judge` fails.
    """
    facts = _facts(paths)
    sweep = facts.get("sweep", {})
    metric_of_sweep = sweep.get("metric", LOSS.name)
    timed = _timing(paths, facts) if timing is None else read_timing(timing)
    return judge(
        read_entries(paths) if entries is None else entries,
        baseline=sweep.get("baseline") if baseline is None else baseline,
        target=sweep.get("target") if target is None and metric in (None, metric_of_sweep) else target,
        metric=metric_of_sweep if metric is None else metric,
        step_times=None if timed is None else timed["step_s"],
        notes=[] if timed is None else [timed["note"]],
        mixed=mixed,
        command=_command(paths, facts, baseline=baseline, target=target, metric=metric, timing=timing, mixed=mixed),
    )


def _command(
    paths: Sequence[Path], facts: dict[str, Any], *, baseline: str | None, target: float | None, metric: str | None,
    timing: Path | None, mixed: bool,
) -> str:  # fmt: skip
    """Returns a command line that reproduces this comparison.

    It is the command that made the study, followed by `llmeff compare` if options were given. If the command of the
    study is unknown, it is `llmeff compare` alone.
    """
    options = {"--baseline": baseline, "--target": target, "--metric": metric, "--timing": timing}
    asked = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    asked += ["--mixed"] if mixed else []
    view = shlex.join(["llmeff", "compare", *map(str, paths), *asked])
    study: str | None = facts.get("command")
    if study is None:
        return view
    return f"{study} && {view}" if asked else study


def write_pictures(comparison: Comparison, path: Path) -> None:
    """Plots the training curves of the arms as PNG.

    Args:
        comparison: the comparison.
        path: the file to write. If there are several cells, one file is written per cell, and the cell is added to its
            name.

    Raises:
        ConfigError: there is nothing to plot, or a file cannot be written.
    """
    for group in comparison.groups:
        picture = arm_curves(group)
        if picture is None:
            raise ConfigError(f"{path}: there is nothing to plot, because no finished run has at least two evaluations")
        file = path
        if len(comparison.groups) > 1:
            file = path.with_name(f"{path.stem}-{files.safe_name(show_cell(group.cell).replace(' ', ''))}{path.suffix}")
        with files.reported(file):
            files.write_bytes(file, picture)


def name_of(paths: Sequence[Path], entries: Sequence[Entry]) -> str:
    """Returns the name of the study's sweep, or else the names of its arms."""
    return _facts(paths).get("sweep", {}).get("name") or title_of(entries)


def _facts(paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the facts about the study that a single sweep or ledger records.

    Empty for run folders and for several paths.
    """
    if len(paths) != 1:
        return {}
    if paths[0].is_file():
        return read_facts(paths[0])
    if (paths[0] / LEDGER).is_file():
        return read_facts(paths[0] / LEDGER)
    sweep = paths[0] / SWEEP
    return {"sweep": json.loads(sweep.read_text(encoding="utf-8"))} if sweep.is_file() else {}


def _timing(paths: Sequence[Path], facts: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the timing run of a single sweep or ledger (see `read_timing`). None if there is none."""
    if len(paths) == 1 and (paths[0] / TIMING).is_file():
        return read_timing(paths[0] / TIMING)
    return facts.get("timing")
