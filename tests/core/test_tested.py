"""What is said of libraries that are newer than what was tested, and that the table of these agrees with what is installed."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import llmeff
from llmeff.core import tested
from llmeff.core.tested import TESTED, check_tested, release
from tools.lower_bounds import lower_bounds

PACKAGE = Path(llmeff.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
every_library = pytest.mark.parametrize("library", TESTED)


@pytest.fixture(autouse=True)
def _fresh():
    check_tested.cache_clear()
    yield
    check_tested.cache_clear()


def installed(monkeypatch, version):
    monkeypatch.setattr(tested.importlib.metadata, "version", lambda library: version)


@every_library
@pytest.mark.parametrize("newer", ["{}.1", "999.0", "999.0.0.dev1+cu130"])
def test_a_newer_version_is_warned_of_once_with_the_range(library, newer, monkeypatch, caplog):
    lowest, highest = TESTED[library]
    installed(monkeypatch, newer.format(highest))
    check_tested(library)
    check_tested(library)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for said in (f"{library} {newer.format(highest)}", f"{lowest} to {highest}", f"install {library}=={highest}"):
        assert said in record.getMessage()


@every_library
def test_what_was_tested_is_not_warned_of(library, monkeypatch, caplog):
    for version in (*TESTED[library], f"{TESTED[library][1]}+cpu"):
        check_tested.cache_clear()
        installed(monkeypatch, version)
        check_tested(library)
    assert caplog.records == []


def test_what_is_not_installed_is_not_warned_of(monkeypatch, caplog):
    def missing(library):
        raise importlib.metadata.PackageNotFoundError(library)

    monkeypatch.setattr(tested.importlib.metadata, "version", missing)
    check_tested("deepspeed")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.14.1+cu130", (2, 14, 1)), ("5.25.0.dev0", (5, 25, 0)), ("0.19", (0, 19))]
)
def test_a_version_is_its_numbers(version, numbers):
    assert release(version) == numbers


def same(version: str) -> tuple[int, ...]:
    numbers = release(version)
    return numbers + (0,) * (3 - len(numbers))


@every_library
def test_the_table_is_what_the_project_allows_and_installs(library):
    lowest, highest = TESTED[library]
    assert f"{library}=={lowest}" in set(lower_bounds(PROJECT))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert same(lowest) <= same(pins[library]) <= same(highest)


def test_every_library_of_the_table_is_asked_for():
    asked = {
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == check_tested.__name__
    }
    assert asked == set(TESTED)


def test_every_requirement_has_one_lower_bound():
    bounds = dict(line.split("==") for line in lower_bounds(PROJECT))
    assert bounds["numpy"] == re.search(r'"numpy>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert "llmeff" not in bounds
    extras = [row for rows in PROJECT["optional-dependencies"].values() for row in rows]
    others = [row for row in extras if not row.startswith("llmeff[")]
    assert len(bounds) == len(PROJECT["dependencies"]) + len(others)
    with pytest.raises(ValueError, match=r"requires 'numpy' without a lower bound\. Add one, as in 'numpy>=1\.0'"):
        list(lower_bounds({"name": "llmeff", "dependencies": ["numpy"], "optional-dependencies": {}}))
    given = {"name": "llmeff", "dependencies": ["a-b.c[d] >= 1.2, <2"], "optional-dependencies": {"x": ["llmeff[y]"]}}
    assert list(lower_bounds(given)) == ["a-b.c==1.2"]
