"""What the pages show can be given as it stands: commands, options, fields of configs, modules."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from llmeff.cli.command_line import _parser
from llmeff.config.recipes import RECIPES, SWEEPS
from llmeff.config.run import RunConfig
from llmeff.config.sweep import SweepConfig
from llmeff.core.config import override, read, validate
from llmeff.data.images import ImageData

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "GUIDE.md", "CONTRIBUTING.md", "analysis/README.md", "ds_configs/README.md", "jobs/README.md")


def blocks(language):
    """Of all pages: the page, and what a block in a language holds."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        yield from (
            (page, block) for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        )


COMMANDS = [
    (page, shlex.split(line, comments=True))
    for page, block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if shlex.split(line, comments=True)
]
GIVEN = [(page, words) for page, words in COMMANDS if words[0] in ("llmeff", "accelerate")]


def arguments(words):
    """Of llmeff, by whatever it is started."""
    if words[0] == "llmeff":
        return words[1:]
    return ["train", *words[words.index("llmeff/train.py") + 1 :]]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working folder that the pages speak of, as far as commands are read: its config files, and the repository's."""
    for _, block in blocks("toml"):
        (tmp_path / block.split(":")[0].split()[1]).write_text(block, encoding="utf-8")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)


def test_the_pages_show_every_command():
    assert {words[1] for _, words in GIVEN if words[0] == "llmeff"} == set(
        _parser()._subparsers._group_actions[0].choices
    )


@pytest.mark.parametrize(
    ("page", "words"), GIVEN, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_is_one_and_its_config_can_be(page, words, files):
    options = _parser().parse_args(arguments(words))
    settings = getattr(options, "set", [])
    if options.command.__module__ == "llmeff.cli.sweep":
        data = read(options.config) if options.config else SWEEPS[options.recipe]().model_dump(mode="json")
        validate(SweepConfig, override(data, settings))
    elif hasattr(options, "config") and not getattr(options, "resume", False):
        data = (
            read(options.config) if options.config else RECIPES[options.recipe or "default"]().model_dump(mode="json")
        )
        validate(RunConfig, override(data, settings))
        for arm in getattr(options, "arms", []):
            validate(RunConfig, override(data, [*settings, *shlex.split(arm)[1:]]))


@pytest.mark.parametrize(("page", "words"), [each for each in COMMANDS if each not in GIVEN], ids=str)
def test_other_commands_are_there(page, words):
    program = next(word for word in words if "=" not in word)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    else:
        assert program == "sbatch"
        assert (ROOT / next(word for word in words if word.endswith(".sbatch"))).is_file()


def test_photos_are_read_as_the_page_says(files):
    data = validate(RunConfig, read(Path("photos.toml"))).data
    assert isinstance(data, ImageData)
    assert data.size == (180, 240)


@pytest.mark.parametrize(("page", "block"), [*blocks("python")], ids=lambda value: value[:30])
def test_python_imports_what_there_is(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            found = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(found, alias.name) for alias in node.names)


@pytest.mark.parametrize(("page", "block"), [*blocks("toml")], ids=lambda value: value[:30])
def test_toml_is_one(page, block):
    assert tomllib.loads(block)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()) <= 45
    glossary = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    assert len(glossary.strip().splitlines()) <= 25
