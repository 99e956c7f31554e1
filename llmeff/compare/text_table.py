"""A table as text that other tools read: Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Something to show: a title, headers, rows of cells, of which the first says what the row is."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def markdown(table: TextTable, num_left: int = 1) -> str:
    """The table as Markdown, below its title where it has one; columns after the first `num_left` are set right."""
    lines = [[_escaped(cell) for cell in row] for row in [table.headers, *table.rows]]
    lines.insert(1, ["---" if n < num_left else "---:" for n in range(len(table.headers))])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"**{table.title}**\n\n{body}" if table.title else body


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")


def render_tables(tables: Sequence[TextTable]) -> str:
    """Tables below one another, as Markdown."""
    return "\n".join(map(markdown, tables))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one kind as CSV, with their names on top."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
