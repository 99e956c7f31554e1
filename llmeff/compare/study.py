"""A study as a whole: reads its runs and what its sweep or ledger holds about it, judges it, and draws its curves."""

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
    """Whether these are plain runs of one arm, or each of an arm of its own. They are listed: without seeds nothing can be judged."""
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
    """Reads and judges a study.

    Args:
        paths: run folders, sweeps' folders, or ledgers.
        entries: the runs in them, if they were read before.
        baseline: see `judge`; None: the sweep's own, if it has one.
        target: see `judge`; None: the sweep's own, if it has one for this metric.
        metric: see `judge`; None: the sweep's own, or the loss.
        timing: a file of step times; None: the sweep's or the ledger's own, if there are any.
        mixed: see `judge`.

    Raises:
        ConfigError: see `judge` and `read_entries`; or the step times cannot be read.
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
    """The command that makes the study, if it is known, and the one for this view of it, if it differs from the study's own."""
    options = {"--baseline": baseline, "--target": target, "--metric": metric, "--timing": timing}
    asked = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    asked += ["--mixed"] if mixed else []
    view = shlex.join(["llmeff", "compare", *map(str, paths), *asked])
    study: str | None = facts.get("command")
    if study is None:
        return view
    return f"{study} && {view}" if asked else study


def write_pictures(comparison: Comparison, path: Path) -> None:
    """Draws the curves. If there are several cells, each has a file of its own.

    Raises:
        ConfigError: there is nothing to draw, or a file cannot be written.
    """
    for group in comparison.groups:
        picture = arm_curves(group)
        if picture is None:
            raise ConfigError(f"{path}: there is nothing to draw, no run was evaluated twice")
        file = path
        if len(comparison.groups) > 1:
            file = path.with_name(f"{path.stem}-{files.safe_name(show_cell(group.cell).replace(' ', ''))}{path.suffix}")
        with files.reported(file):
            files.write_bytes(file, picture)


def name_of(paths: Sequence[Path], entries: Sequence[Entry]) -> str:
    """The name of the study, or those of its arms."""
    return _facts(paths).get("sweep", {}).get("name") or title_of(entries)


def _facts(paths: Sequence[Path]) -> dict[str, Any]:
    """What a single sweep or ledger holds about its study; empty for anything else."""
    if len(paths) != 1:
        return {}
    if paths[0].is_file():
        return read_facts(paths[0])
    if (paths[0] / LEDGER).is_file():
        return read_facts(paths[0] / LEDGER)
    sweep = paths[0] / SWEEP
    return {"sweep": json.loads(sweep.read_text(encoding="utf-8"))} if sweep.is_file() else {}


def _timing(paths: Sequence[Path], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The step times of a single sweep or ledger."""
    if len(paths) == 1 and (paths[0] / TIMING).is_file():
        return read_timing(paths[0] / TIMING)
    return facts.get("timing")
