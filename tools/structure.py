"""Checks limits of the package's structure: imports between rooms, import cycles, and complexity of functions.

Prints the counts, and exits with 1 if a limit is exceeded. A room is a package directly below `llmeff`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
from radon.complexity import cc_visit
from radon.visitors import Function
from scipy.sparse import lil_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llmeff"
MOST_IMPORTS = 55
"""Largest allowed number of pairs of rooms (A, B) where A imports B."""
MOST_ROOMS = 17
"""Largest allowed number of rooms."""
MOST_COMPLEX = 16
"""Largest allowed cyclomatic complexity (by radon) of any function."""
PLAIN = 10
"""Largest allowed complexity of the functions in `PLAIN_FUNCTIONS`."""
PLAIN_FUNCTIONS = {
    "compare": {"effects", "_shown", "judge", "tuning_of", "_effects", "group_of", "row", "entry_of"},
    "config": {"_problems"},
    "lab": {"_summarize"},
    "attention": {"mix"},
}
"""Functions that must stay simple because people read them first, by room."""


def room_of(module: str) -> str | None:
    """Returns the room of a module. None for the package itself, and for modules that are not in a room."""
    parts = module.split(".")
    folder = ROOT / PACKAGE / (parts[1] if len(parts) > 1 else "")
    return parts[1] if len(parts) > 1 and folder.is_dir() else None


def room_imports(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """Returns the pairs of rooms (A, B) where a module of A imports a module of B."""
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = room_of(module), room_of(imported)
            if None not in pair and pair[0] != pair[1]:
                found.add((str(pair[0]), str(pair[1])))
    return found


def cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Returns the import cycles: groups of modules that import one another, directly or through other modules."""
    modules = sorted(graph.modules)
    imports = lil_array((len(modules), len(modules)), dtype=bool)
    for number, module in enumerate(modules):
        for imported in graph.find_modules_directly_imported_by(module):
            imports[number, modules.index(imported)] = True
    num_groups, group_of = connected_components(imports, connection="strong")
    groups = [[module for module, group in zip(modules, group_of, strict=True) if group == number]
              for number in range(num_groups)]  # fmt: skip
    return [group for group in groups if len(group) > 1]


def complexities() -> Iterator[tuple[str, str, int]]:
    """Yields (room, "path:line name", complexity) for every function and method."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        room = path.relative_to(ROOT / PACKAGE).parts[0]
        blocks = cc_visit(path.read_text(encoding="utf-8"))
        for block in (block for block in blocks if isinstance(block, Function)):
            yield room, f"{path.relative_to(ROOT)}:{block.lineno} {block.name}", block.complexity


def main() -> int:
    """Prints the counts and the exceeded limits. Returns the exit code: 1 if a limit is exceeded, otherwise 0."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    pairs, circles = room_imports(graph), cycles(graph)
    rooms = {room_of(module) for module in graph.modules} - {None}
    problems = [f"import cycle of these modules: {', '.join(group)}" for group in circles]
    if len(pairs) > MOST_IMPORTS:
        problems.append(f"{len(pairs)} imports between rooms, but at most {MOST_IMPORTS} are allowed")
    if len(rooms) > MOST_ROOMS:
        problems.append(f"{len(rooms)} rooms, but at most {MOST_ROOMS} are allowed")
    for room, name, complexity in complexities():
        is_plain = name.rpartition(" ")[2] in PLAIN_FUNCTIONS.get(room, ())
        most = PLAIN if is_plain else MOST_COMPLEX
        if complexity > most:
            problems.append(f"{name}: complexity is {complexity}, but at most {most} is allowed")
    sys.stdout.write(f"{len(pairs)} imports between {len(rooms)} rooms; {len(circles)} import cycles\n")
    sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
