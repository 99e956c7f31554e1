"""The rules of the house that no linter knows."""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmeff
from llmeff.config.recipes import RECIPES
from llmeff.config.run import RunConfig
from llmeff.core.config import Component, Config, validate

PACKAGE = Path(llmeff.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}
EMPTY = {"core", "cost", "record", "compare"}
"""Packages of which nothing is imported that is not asked for."""
WORDS = {"bytes", "datasets", "deepspeed", "images"}
"""Names of components that are words of the code, or a library's name, too: only where a thing is asked for its name do they count."""

for module in pkgutil.walk_packages(llmeff.__path__, "llmeff."):
    if module.name != "llmeff.train":  # a script, which changes sys.path
        importlib.import_module(module.name)


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def below(kind: type[Config]) -> Iterator[type[Config]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("llmeff."):
            yield child
        yield from below(child)


every_file = pytest.mark.parametrize("path", SOURCES, ids=place)
every_config = pytest.mark.parametrize("config", sorted(set(below(Config)), key=repr), ids=lambda kind: kind.__name__)


def names_read(tree: ast.Module) -> Iterator[str]:
    """Attributes that are read, and, where a module reads them by computed names, the words that it may compute."""
    nodes = list(ast.walk(tree))
    yield from (node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    if any(isinstance(node, ast.Name) and node.id == "getattr" for node in nodes):
        yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@functools.cache
def all_names_read() -> set[str]:
    return {name for tree in TREES.values() for name in names_read(tree)}


@every_config
def test_every_field_is_read(config):
    assert set(config.__annotations__) & set(config.model_fields) <= all_names_read()


@functools.cache
def component_files() -> dict[str, set[Path]]:
    """The files of each registered name."""
    found: dict[str, set[Path]] = {}
    for kind in below(Component):
        if "registry" in kind.__dict__:
            for name in kind.registry.names():
                own = kind.registry[name]
                if own.__module__.startswith("llmeff."):
                    found.setdefault(name, set()).add(Path(inspect.getfile(own)))
    return found


def config_defaults(tree: ast.Module) -> set[int]:
    """The ids of the nodes that are defaults of a class's fields."""
    fields = (node for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for node in kind.body)
    return {id(node.value) for node in fields if isinstance(node, ast.AnnAssign)}


def asked(tree: ast.Module) -> set[int]:
    """The ids of the nodes that a value is compared with, or that stand for `name` in a table."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            found |= {id(part) for side in sides for part in [side, *getattr(side, "elts", [])]}
        elif isinstance(node, ast.MatchValue):
            found.add(id(node.value))
        elif isinstance(node, ast.Dict):
            entries = zip(node.keys, node.values, strict=True)
            found |= {id(value) for key, value in entries if isinstance(key, ast.Constant) and key.value == "name"}
    return found


@every_file
def test_no_component_is_named_outside_its_own_file(path):
    if path.parent.name == "recipes":
        return
    tree, files = TREES[path], component_files()
    defaults, questions = config_defaults(tree), asked(tree)
    named = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path not in files.get(node.value, {path})
        if id(node) in questions or not (id(node) in defaults or node.value in WORDS)
    ]
    assert named == []


def test_the_loop_is_one_page():
    assert SOURCES[PACKAGE / "run" / "loop.py"].count("\n") <= 350


@every_file
def test_every_module_opens_with_its_caption(path):
    caption = ast.get_docstring(TREES[path], clean=False)
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert caption is None
    else:
        first, _, rest = (caption or "").partition("\n")
        assert first.endswith(".")
        assert rest == "" or rest.startswith("\n")


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=place)
def test_packages_hold_names_and_nothing_else(path):
    if path.parent.name in EMPTY:
        assert SOURCES[path] == ""
    elif path.parent != PACKAGE:
        for statement in TREES[path].body:
            assert isinstance(statement, ast.ImportFrom)
            assert [alias.asname for alias in statement.names] == [alias.name for alias in statement.names]


@pytest.mark.parametrize("name", sorted({place(path).split("/")[0].removesuffix(".py") for path in SOURCES}))
def test_no_module_hides_another_when_llmeff_is_first_on_the_path(name):
    others = {top for top, owners in importlib.metadata.packages_distributions().items() if owners != ["llmeff"]}
    assert name not in sys.stdlib_module_names
    assert name not in others


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_is_a_config_that_survives_a_file(name):
    config = RECIPES[name]()
    assert config.name == name
    assert validate(RunConfig, config.model_dump(mode="json")) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_the_script_defines_nothing():
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(TREES[PACKAGE / "train.py"]) if isinstance(node, definitions)]


def repository_files() -> list[str]:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.~}$])/(work|root|tmp|home|Users|mnt|scratch)/",
        r"\b(pypi|pythonhosted|anaconda|npmjs)\.(org|com)\b|\bindex[-_]url\b",
    ],
    ids=["a machine's paths", "registries"],
)
def test_the_repository_is_of_no_machine(pattern):
    names = repository_files()
    if not names:
        pytest.skip("needs a git checkout")
    lines = [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate((ROOT / name).read_bytes().decode(errors="replace").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert lines == []


def test_the_changelog_begins_with_this_version():
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("there is no changelog")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    entries = re.findall(r"^## \[?([^\s\]]+)", changelog.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert entries[0] == version == llmeff.__version__
