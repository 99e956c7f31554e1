"""What `llmeff compare` does with a study: its arms judged, shown, drawn and written as a page."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.ledger import LEDGER, SWEEP, Entry, read_facts
from llmeff.compare.plots import arm_curves
from llmeff.compare.report import title_of, write_report
from llmeff.compare.verdict import StepTimes, judge, show_cell
from llmeff.compare.verdict_table import render_comparison
from llmeff.core import files
from llmeff.core.config import ConfigError

TIMING = "timing.json"
"""Where a sweep's step times lie in its folder."""


def is_list(paths: Sequence[Path], entries: Sequence[Entry]) -> bool:
    """Whether these are plain runs, each of its own kind: side by side, without seeds there is nothing to judge."""
    if any(path.is_file() or (path / SWEEP).is_file() for path in paths):
        return False
    arms = [entry.arm for entry in entries]
    return len(set(arms)) in (1, len(arms))


def compare_arms(
    paths: Sequence[Path],
    entries: Sequence[Entry],
    *,
    kind: str = "terminal",
    baseline: str | None = None,
    target: float | None = None,
    timing: Path | None = None,
    mixed: bool = False,
    html: Path | None = None,
    plot: Path | None = None,
) -> str:
    """Judges the arms; writes the page and the picture where they are asked for.

    Args:
        paths: that the entries were read from.
        entries: the runs.
        kind: of the text, see `render_comparison`.
        baseline: see `judge`; None: the sweep's own, where there is one.
        target: see `judge`; None: the sweep's own, where it has one.
        timing: a file of step times; None: the sweep's own, where there is one.
        mixed: see `judge`.
        html: where the page is to be written.
        plot: where the loss curves are to be drawn; of several cells, each has a file of its own.

    Returns:
        the text.

    Raises:
        ConfigError: see `judge`; or a file cannot be read or written.
    """
    said = _said(paths)
    if timing is None and len(paths) == 1 and (paths[0] / TIMING).is_file():
        timing = paths[0] / TIMING
    command = said.get("command") or shlex.join(["llmeff", "compare", *map(str, paths)])
    comparison = judge(
        entries,
        baseline=baseline or said.get("sweep", {}).get("baseline"),
        target=target or said.get("sweep", {}).get("target"),
        step_times=None if timing is None else read_step_times(timing),
        mixed=mixed,
        command=command,
    )
    if html is not None:
        write_report(comparison, html, said.get("sweep", {}).get("name") or title_of(entries))
    if plot is not None:
        for group in comparison.groups:
            picture = arm_curves(group)
            if picture is None:
                raise ConfigError(f"{plot}: there is nothing to draw, no run was evaluated twice")
            path = plot
            if len(comparison.groups) > 1:
                path = plot.with_name(f"{plot.stem}-{show_cell(group.cell).replace(' ', '')}{plot.suffix}")
            with files.reported(path):
                files.write_bytes(path, picture)
    return render_comparison(comparison, kind)


def _said(paths: Sequence[Path]) -> dict[str, Any]:
    """What a single sweep or ledger says of itself."""
    if len(paths) != 1:
        return {}
    if paths[0].is_file():
        return read_facts(paths[0])
    if (paths[0] / LEDGER).is_file():
        return read_facts(paths[0] / LEDGER)
    sweep = paths[0] / SWEEP
    return {"sweep": json.loads(sweep.read_text(encoding="utf-8"))} if sweep.is_file() else {}


def read_step_times(path: Path) -> StepTimes:
    """Seconds a step by arm, a value for each generation of a timing lane's file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        generations = json.loads(path.read_text(encoding="utf-8"))["generations"]
        names = list(generations[0][0])
        return {
            name: [sum(turns[name]["step_s"] for turns in rounds) / len(rounds) for rounds in generations]
            for name in names
        }
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError):
        raise ConfigError(f"{path}: is no file of step times, which `llmeff sweep --timing` writes") from None
