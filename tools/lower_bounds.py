"""Prints the lowest versions that pyproject.toml allows, as constraints for pip: one `name==version` a line."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def lower_bounds(project: dict[str, Any]) -> Iterator[str]:
    """One constraint for each requirement of a `[project]` table and of its extras.

    Raises:
        ValueError: a requirement has no lower bound, so nobody could say what its oldest version is.
    """
    requirements = [
        *project["dependencies"],
        *(row for rows in project["optional-dependencies"].values() for row in rows),
    ]
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        if name[0] == project["name"]:  # extras of its own, which are listed too
            continue
        lowest = re.search(r">=\s*([\w.]+)", requirement)
        if lowest is None:
            raise ValueError(f"pyproject.toml requires {requirement!r}: give it a lower bound, as in '{name[0]}>=1.0'")
        yield f"{name[0]}=={lowest[1]}"


if __name__ == "__main__":
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in sorted(lower_bounds(table)))
