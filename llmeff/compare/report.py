"""Renders a comparison as one self-contained HTML page: the verdict first, then curves, tables and configs."""

import base64
import html
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmeff.compare.alike import in_cell, show_cell
from llmeff.compare.group import Group
from llmeff.compare.ledger import Entry, flat_config
from llmeff.compare.plots import arm_curves, trials_curves, tuning_curves
from llmeff.compare.text_table import TextTable
from llmeff.compare.verdict import Comparison
from llmeff.compare.verdict_table import FOOTNOTE, show_ratio, tables
from llmeff.core import files

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.verdict { background: var(--soft); padding: .8rem 1.1rem; border-radius: .4rem; }
.verdict li { margin: .2rem 0; } .note { color: #b45309; } .small { opacity: .75; font-size: .9em; }
img { max-width: 100%; background: white; border-radius: .4rem; } code { font-size: .92em; }
"""
_BESIDE_METRIC = ("steps_to_target", "seconds_to_target", "peak_bytes", "optimizer_bytes")
"""Quantities in the verdict besides the main metric. A quantity that no run has is left out."""


def write_report(comparison: Comparison, path: Path, title: str) -> None:
    """Writes the comparison as an HTML page.

    Args:
        comparison: the comparison.
        path: the file to write.
        title: the title of the page.

    Raises:
        ConfigError: the file cannot be written.
    """
    with files.reported(path):
        files.write_text(path, page(comparison, title))


def page(comparison: Comparison, title: str) -> str:
    """Returns the page as HTML text. Escapes everything that comes from runs."""
    name = html.escape(title)
    body = [f"<h1>{name}</h1>", _verdict(comparison)]
    for group in comparison.groups:
        where = f": {html.escape(show_cell(group.cell))}" if group.cell else ""
        pictures = [
            (arm_curves(group), f"held-out {group.metric.label}"),
            (tuning_curves(group), "tuning"),
            (trials_curves(group), "tuning budget"),
        ]
        shown = [_picture(picture, f"{words}{where}") for picture, words in pictures if picture is not None]
        if shown:
            body += [f"<h2>Curves{where}</h2>", *shown]
    body += ["<h2>Tables</h2>", *map(_table, tables(comparison)), f'<p class="small">{html.escape(FOOTNOTE)}</p>']
    body += [
        "<h2>Differences between the configs of the arms</h2>",
        *(_table(_configs(group)) for group in comparison.groups),
    ]
    if comparison.command:
        body.append(
            f"<h2>Command to reproduce this comparison</h2><p><code>{html.escape(comparison.command)}</code></p>"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def verdicts(group: Group) -> list[str]:
    """Returns one sentence for each arm except the baseline, with the arm's results against the baseline."""
    sentences = []
    for name in group.arms:
        if name != group.baseline:
            parts = "; ".join(_verdict_parts(group, name)) or "nothing to compare"
            sentences.append(f"{name} against {group.baseline}: {parts}")
    return sentences


def _verdict_parts(group: Group, arm: str) -> Iterator[str]:
    """Yields one phrase for each quantity of the verdict, with the arm's result."""
    keys = (group.metric.name, f"{group.metric.name}_at_seconds", *_BESIDE_METRIC)
    for quantity in group.quantities:
        if quantity.key in keys:
            cell = group.table[quantity.key][arm]
            if cell.difference is not None:
                yield f"{quantity.label} {show_ratio(cell)}"
            elif len(cell.values) < cell.num_seeds:
                yield f"{quantity.label}: {len(cell.values)} of {cell.num_seeds} runs have a value"


def _verdict(comparison: Comparison) -> str:
    lines = []
    for group in comparison.groups:
        if group.cell:
            lines.append(f"<p><strong>{html.escape(show_cell(group.cell))}</strong></p>")
        items = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(group))
        lines.append(f"<ul>{items}</ul>")
    notes = "".join(f'<li class="note">{html.escape(note)}</li>' for note in comparison.notes)
    return f'<div class="verdict">{"".join(lines)}{f"<ul>{notes}</ul>" if notes else ""}</div>'


def _picture(content: bytes, words: str) -> str:
    encoded = base64.b64encode(content).decode("ascii")
    return f'<p><img alt="{html.escape(words)}" src="data:image/png;base64,{encoded}"></p>'


def _table(shown: TextTable) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(row(cells, "td") for cells in shown.rows)
    head = f"<thead>{row(shown.headers, 'th')}</thead>"
    caption = f"<caption>{html.escape(shown.title)}</caption>"
    return f'<div class="scroll"><table>{caption}{head}<tbody>{rows}</tbody></table></div>'


def _configs(group: Group) -> TextTable:
    """Returns a table of the config fields in which the first runs of the arms differ."""
    configs = {name: flat_config(runs[0]) for name, runs in group.arms.items() if runs}
    rows = []
    for key in sorted({key for config in configs.values() for key in config}):
        values = [config.get(key, "-") for config in configs.values()]
        if any(value != values[0] for value in values[1:]):
            rows.append([key, *map(_short, values)])
    return TextTable(title=f"Fields that differ{in_cell(group.cell)}", headers=["", *configs], rows=rows)


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return str(value)


def title_of(entries: Iterable[Entry]) -> str:
    """Returns a title for a study without a name: the names of its arms, at most six."""
    names = list(dict.fromkeys(entry.arm for entry in entries))
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
