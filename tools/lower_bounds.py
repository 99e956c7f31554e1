"""Prints the lowest versions that pyproject.toml allows as pip constraints, one `name==version` per line."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def lower_bounds(project: dict[str, Any]) -> Iterator[str]:
    """Yields a constraint `name==version` for each requirement of a `[project]` table, including its extras.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    requirements = [
        *project["dependencies"],
        *(row for rows in project["optional-dependencies"].values() for row in rows),
    ]
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        if name[0] == project["name"]:  # refers to the project's own extras, which are listed themselves
            continue
        lowest = re.search(r">=\s*([\w.]+)", requirement)
        if lowest is None:
            raise ValueError(
                f"pyproject.toml requires {requirement!r} without a lower bound. Add one, as in '{name[0]}>=1.0'"
            )
        yield f"{name[0]}=={lowest[1]}"


if __name__ == "__main__":
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in sorted(lower_bounds(table)))
