"""Renders tables as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of text: a title, headers, and rows of cells. The first cell of each row is its label."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def markdown(table: TextTable, num_left: int = 1) -> str:
    """Renders a table as Markdown, below its title if it has one.

    Args:
        table: the table.
        num_left: the number of left-aligned columns. All columns after them are right-aligned.
    """
    lines = [[_escaped(cell) for cell in row] for row in [table.headers, *table.rows]]
    lines.insert(1, ["---" if n < num_left else "---:" for n in range(len(table.headers))])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"**{table.title}**\n\n{body}" if table.title else body


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")


def render_tables(tables: Sequence[TextTable]) -> str:
    """Renders tables as Markdown, one below the other."""
    return "\n".join(map(markdown, tables))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Renders rows as CSV. All rows have the same keys, which become the header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
