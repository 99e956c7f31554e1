"""Holds the package's structure to its limits: imports between rooms, cycles of modules, complexity of functions.

Prints what it counted; exits with 1 if a limit is passed. A room is a package directly below `llmeff`.
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
"""Pairs of rooms, of which one imports the other."""
MOST_ROOMS = 17
MOST_COMPLEX = 16
"""Of any function, by radon: paths through it."""
PLAIN = 10
"""Of those below, which people read first."""
PLAIN_FUNCTIONS = {
    "compare": {"effects", "_shown", "judge", "tuning_of", "_effects", "group_of", "row", "entry_of"},
    "config": {"_problems"},
    "lab": {"_summarize"},
    "attention": {"mix"},
}


def room_of(module: str) -> str | None:
    """The room that a module lies in; None of the package itself, and of modules beside the rooms."""
    parts = module.split(".")
    folder = ROOT / PACKAGE / (parts[1] if len(parts) > 1 else "")
    return parts[1] if len(parts) > 1 and folder.is_dir() else None


def room_imports(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """Pairs of rooms, of which the first imports the second."""
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = room_of(module), room_of(imported)
            if None not in pair and pair[0] != pair[1]:
                found.add((str(pair[0]), str(pair[1])))
    return found


def cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
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
    """Of every function and method: its room, its place and name, and its complexity."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        room = path.relative_to(ROOT / PACKAGE).parts[0]
        blocks = cc_visit(path.read_text(encoding="utf-8"))
        for block in (block for block in blocks if isinstance(block, Function)):
            yield room, f"{path.relative_to(ROOT)}:{block.lineno} {block.name}", block.complexity


def main() -> int:
    """Counts everything, and says what passes its limit."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    pairs, circles = room_imports(graph), cycles(graph)
    rooms = {room_of(module) for module in graph.modules} - {None}
    problems = [f"modules import one another: {', '.join(group)}" for group in circles]
    if len(pairs) > MOST_IMPORTS:
        problems.append(f"{len(pairs)} imports between rooms, at most {MOST_IMPORTS}")
    if len(rooms) > MOST_ROOMS:
        problems.append(f"{len(rooms)} rooms, at most {MOST_ROOMS}")
    for room, name, complexity in complexities():
        is_plain = name.rpartition(" ")[2] in PLAIN_FUNCTIONS.get(room, ())
        most = PLAIN if is_plain else MOST_COMPLEX
        if complexity > most:
            problems.append(f"{name}: complexity {complexity}, at most {most}")
    sys.stdout.write(f"{len(pairs)} imports between {len(rooms)} rooms; {len(circles)} cycles of modules\n")
    sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
