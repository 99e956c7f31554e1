"""The campaign of mutants: every module has judges, the patches still apply, and an operator changes what it says."""

import ast
import subprocess

import pytest

from tests.mutants.campaign import HERE, ROOT, patches, path_of, read_equivalent, read_map
from tests.mutants.mutation import MODULE, AttributeChanger, KeywordDropper, TextReplacer, mutants_of, mutated
from tests.mutants.tracing import plain_name

OWN = {"text": TextReplacer(), "keyword": KeywordDropper(), "attribute": AttributeChanger()}
PACKAGES = ("tasks", "optim", "attention", "data", "compare", "record", "cost")
UNJUDGED = {"llmeff.attention.fla", "llmeff.attention.flex"}
"""Kernels of GPUs, which `make test-kernels` and `make test-gpu` run."""
SOURCE = '''
"""A docstring."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Kind = Literal["one", "two"]


class Thing(Base, family="thing"):
    """Another."""

    sharding: ClassVar[str] = "whole"
    every_s = 10.0
    rate: float = 0.5
    """A rate."""
    count: int = 3

    def key(self, value: "Thing") -> dict[str, "int"]:
        assert value, "some text"
        if value is None:
            raise ValueError(f"no {value} given", code=1)
        logger.warning("slow", stacklevel=2)
        return make(value, size=2, label="size", help="size", key=f"kind.{value}", encoding="utf-8")

    def problems(self):
        yield f"{self.rate} is too high"


def pairs(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]
'''


def changed_lines(operator):
    """By mutant: the lines that it comes to in the stead of the original's."""
    given = SOURCE.splitlines()
    found = {}
    for mutant in mutants_of(SOURCE, "it", {operator: OWN[operator]}):
        code = mutated(SOURCE, mutant, OWN)
        lines = [] if code is None else [line.strip() for line in code.splitlines() if line not in given]
        found[mutant.name] = lines
    return found


def test_text_is_replaced_where_it_decides_something():
    assert changed_lines("text") == {
        "it:Thing:text:0": ['class Thing(Base, family="XXthing"):'],
        "it:Thing:text:1": ['sharding: ClassVar[str] = "XXwhole"'],
        "it:Thing.key:text:0": [
            'return make(value, size=2, label="size", help="size", key=f"XXkind.{value}", encoding="utf-8")'
        ],
    }


def test_named_arguments_are_left_out():
    rest = 'label="size", help="size", '
    assert changed_lines("keyword") == {
        "it:Thing:keyword:0": ["class Thing(Base):"],
        "it:Thing.key:keyword:0": [f'return make(value, {rest}key=f"kind.{{value}}", encoding="utf-8")'],
        "it:Thing.key:keyword:1": [f'return make(value, size=2, {rest}encoding="utf-8")'],
    }


def test_class_attributes_are_inherited_none_or_twice_the_number():
    assert changed_lines("attribute") == {
        "it:Thing:attribute:0": ["sharding: ClassVar[str]"],
        "it:Thing:attribute:1": ["every_s = None"],
        "it:Thing:attribute:2": ["rate: float = (2 * 0.5)"],
    }


def test_a_mutant_keeps_its_name_whatever_happens_to_other_functions():
    longer = SOURCE.replace("def problems", "def before(self):\n        return dict(a=1)\n\n    def problems")
    longer = longer.replace("\n\ndef pairs", "\n\ndef other():\n    return f(x=1)\n\n\ndef pairs")
    names = [{mutant.name for mutant in mutants_of(source, "it", OWN)} for source in (SOURCE, longer)]
    assert names[1] - names[0] == {"it:Thing.before:keyword:0", "it:other:keyword:0"}
    assert names[0] <= names[1]


@pytest.mark.parametrize(
    ("qualified", "plain"),
    [
        ("f", "f"),
        ("A.f.<locals>.<lambda>", "A.f"),
        ("f.<locals>.g", "f.g"),
        ("A.f.<locals>.g.<locals>.<listcomp>", "A.f.g"),
    ],
)
def test_lambdas_are_part_of_the_function_around_them(qualified, plain):
    assert plain_name(qualified) == plain


def test_every_module_has_judges_that_are_there():
    judged = {module for own in read_map().values() for module in own}
    there = {
        f"llmeff.{package}.{path.stem}"
        for package in PACKAGES
        for path in (ROOT / "llmeff" / package).glob("*.py")
        if path.stem != "__init__"
    } | {"llmeff.loop", "llmeff.prepare"}
    assert judged == there - UNJUDGED
    missing = {
        file for own in read_map().values() for files in own.values() for file in files if not (ROOT / file).exists()
    }
    assert not missing
    assert all(files for own in read_map().values() for files in own.values())


def test_what_is_said_to_be_equivalent_is_in_a_function_that_is_there():
    for name, reason in read_equivalent().items():
        module, function, operator, occurrence = name.split(":")
        tree = ast.parse((ROOT / path_of(module)).read_text(encoding="utf-8"))
        for part in [] if function == MODULE else function.split("."):
            (tree,) = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
            ][:1]
        assert operator.split("/")[0] in ("core", "own")
        assert occurrence.isdecimal()
        assert reason


def test_there_is_a_patch_for_every_known_fault():
    assert len(patches()) == len(list(HERE.glob("*.patch"))) == 7


@pytest.mark.parametrize("name", patches())
def test_a_patch_applies_and_names_its_judges(name):
    path, judges = patches()[name]
    checked = subprocess.run(["git", "apply", "--check", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert judges
    assert all((ROOT / judge).exists() for judge in judges)
