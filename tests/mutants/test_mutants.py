"""The campaign of mutants: every module has judges, the patches still apply, and an operator changes what it says."""

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.mutants import campaign
from tests.mutants.campaign import (
    HERE,
    RESULTS,
    ROOT,
    Case,
    Clone,
    in_parallel,
    patches,
    path_of,
    read_equivalent,
    read_map,
    shortfalls,
    verdict,
)
from tests.mutants.mutation import MODULE, AttributeChanger, KeywordDropper, Mutant, TextReplacer, mutants_of, mutated
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
    } | {"llmeff.run.loop", "llmeff.run.prepare", "llmeff.core.meters"}  # meters make what is recorded
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


PACKAGE = "llmeff/it.py"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Of a repository of one module, whose text is what its tests do: end with a code or a signal, crash or wait; and say."""
    root = tmp_path / "root"
    (root / PACKAGE).parent.mkdir(parents=True)
    (root / PACKAGE).write_text("0\n")
    for arguments in ("init", "add .", "-c user.name=n -c user.email=e -c commit.gpgsign=false commit -m one"):
        subprocess.run(["git", *arguments.split()], cwd=root, check=True, capture_output=True)

    def run(arguments, *plugins):
        does, _, says = (tmp_path / "clone-0" / PACKAGE).read_text().strip().partition(" ")
        sys.stdout.write(says)
        if does == "waits":
            signal.pause()
        if does.startswith("-"):
            os.kill(os.getpid(), -int(does))
        return int(does)  # where this is no number, the fork crashes

    monkeypatch.setattr(campaign, "ROOT", root)
    monkeypatch.setattr(campaign, "load", lambda: None)
    monkeypatch.setattr(campaign, "run_tests", run)
    monkeypatch.setattr(campaign, "_takes_too_much", lambda case: case.name.startswith("waits"))
    return Clone(tmp_path / "clone-0")


def results_of(clone, *texts, stages=1):
    """In a campaign of sources of that module."""
    cases = [Case(text, {PACKAGE: text}, [(["test"], 60.0)] * stages) for text in texts]
    return {case.name: case.row["result"] for case in in_parallel([clone], cases, clone.folder.parent)}


COLLECTION = "2 !!!!!! Interrupted: 1 error during collection !!!!!!"
CONFTEST = "4 ImportError while loading conftest '/there/conftest.py'."


def test_a_mutant_is_killed_by_a_test_an_import_or_its_time_alone(clone):
    expected = {
        "0": "survived",
        "5": "survived",
        "1 FAILED a test": "killed",
        COLLECTION: "killed",
        CONFTEST: "killed",
        "waits": "timeout",
    }
    assert results_of(clone, *expected) == expected
    assert results_of(clone, "0", "1", stages=2) == {"0": "survived", "1": "killed"}


NO_VERDICT = {
    "2 !!! KeyboardInterrupt !!!": "exit code 2",
    COLLECTION.replace("2", "3", 1): "exit code 3",
    "4 ERROR: file or directory not found": "exit code 4",
    "crashes": "exit code 70",
    CONFTEST.replace("4", "-9", 1): "signal 9",
}


@pytest.mark.parametrize("text", NO_VERDICT)
def test_any_other_end_stops_the_campaign(clone, text):
    with pytest.raises(SystemExit) as stopped:
        results_of(clone, text)
    assert str(stopped.value).startswith(f"{text}: its tests ended ")
    assert NO_VERDICT[text] in str(stopped.value)
    assert str(clone.folder.parent / "clone-0.log") in str(stopped.value)


@pytest.mark.parametrize(("broken", "code"), [("test_it.py", 2), ("conftest.py", 4)])
def test_pytest_says_so_where_an_import_fails(tmp_path, broken, code):
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    (tmp_path / broken).write_text("raise ValueError\n")
    log = tmp_path / "log"
    process = campaign.fork(tmp_path, log, lambda: campaign.run_tests(["-x", "test_it.py"]))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code
    assert verdict("it", code, log) == "killed"


@pytest.mark.parametrize(("ends", "code"), [("assert False", 1), ("pass", 70)])
def test_what_a_failed_test_leaves_open_is_no_other_end(tmp_path, ends, code):
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    leaves = "    import gc\n    gc.disable()\n    own = [open(__file__)]\n    own.append(own)\n"
    (tmp_path / "test_it.py").write_text(f"def test_it():\n{leaves}    {ends}\n")
    log = tmp_path / "log"
    process = campaign.fork(tmp_path, log, lambda: campaign.run_tests(["-x", "test_it.py"]))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code, log.read_text()


@pytest.mark.parametrize(
    ("changes", "is_over"),
    [
        ({}, False),
        ({"MOST_BYTES": 2**20}, True),
        ({"cpu_s": lambda process: 61.0}, True),
        ({"LONGEST_S": -1.0, "WAITING": -1.0}, True),
    ],
)
def test_a_case_takes_too_much_of_memory_of_a_cpu_or_of_time(monkeypatch, changes, is_over):
    for name, value in {"cpu_s": lambda process: 0.0, **changes}.items():
        monkeypatch.setattr(campaign, name, value)
    case = Case("it", {}, [], limit_s=60.0, begun_s=time.monotonic(), process=os.getpid())
    assert campaign._takes_too_much(case) == is_over


def options_of(scratch, **changes):
    return argparse.Namespace(**{"scratch": scratch, "each": 80, "seed": 0, "again": False} | changes)


def test_known_faults_are_judged_by_tests_that_pass_without_them(clone, monkeypatch, capsys):
    scratch = clone.folder.parent

    def patch_to(text):
        patch = scratch / "a.patch"
        patch.write_text(f"--- a/{PACKAGE}\n+++ b/{PACKAGE}\n@@ -1 +1 @@\n-0\n+{text}\n")
        monkeypatch.setattr(campaign, "patches", lambda: {"a": (patch, ["tests/test_it.py"])})
        return campaign.known_faults(options_of(scratch))

    assert patch_to("1 FAILED tests/test_it.py::test") == 0
    assert "killed" in capsys.readouterr().out
    assert patch_to("5") == 1
    assert "LIVES" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^a: its tests ended with exit code 3"):
        patch_to("3")
    monkeypatch.setattr(campaign, "Clone", lambda folder: clone)
    for code in (1, 5, 70):
        clone.put(PACKAGE, str(code))
        with pytest.raises(SystemExit, match=rf"test_it.py: the tests fail without the patch \(exit code {code}\)"):
            patch_to("1")


def test_files_pass_without_a_mutant_before_they_judge_one(clone, monkeypatch):
    scratch, ran = clone.folder.parent, []
    monkeypatch.setattr(campaign, "commit", lambda: "commit")
    monkeypatch.setattr(
        campaign, "stages", lambda scratch, files, function: [] if files == ["none"] else [(files, 60.0)]
    )
    monkeypatch.setattr(campaign, "_begin", lambda *own, begin=campaign._begin: (ran.append(own[0].name), begin(*own)))
    for code in (1, 5):
        clone.put(PACKAGE, str(code))
        with pytest.raises(SystemExit, match=r"^no mutant, tests/a.py: the tests fail without a mutant"):
            campaign.control(scratch, [clone], ["tests/a.py"])
    ran.clear()
    campaign.control(scratch, [clone], ["tests/a.py", "tests/a.py", "tests/b.py"])
    campaign.control(scratch, [clone], ["tests/b.py"])
    assert ran == ["no mutant, tests/a.py", "no mutant, tests/b.py"]
    with pytest.raises(SystemExit, match=r"^no mutant, none: no test passes"):
        campaign.control(scratch, [clone], ["none"])


def test_a_sample_stays_as_it_was_drawn_and_another_takes_the_place_of_what_is_gone(tmp_path, monkeypatch):
    lines = [
        Mutant(module="llmeff.it", function=f"f{n}", line=n, operator="core/Some_One", occurrence=0) for n in range(40)
    ]
    there = list(lines)
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "mutants.json")
    monkeypatch.setattr(campaign, "read_map", lambda: {"optim": {"llmeff.it": []}})
    monkeypatch.setattr(campaign, "all_mutants", lambda *_: there)
    monkeypatch.setattr(campaign, "committed", lambda path: "")
    monkeypatch.setattr(campaign, "mutated", lambda *_: "")
    monkeypatch.setattr(campaign, "operators", dict)

    def drawn(scratch, seed=3):
        (tmp_path / scratch).mkdir(exist_ok=True)
        (own,) = campaign.chosen(options_of(tmp_path / scratch, each=10, seed=seed, packages=["optim"])).values()
        return [mutant.name for mutant in own]

    first = drawn("here")
    assert len(set(first)) == 10
    assert drawn("there") == first
    assert drawn("there", seed=4) != first
    there[:] = [replace(mutant, line=mutant.line + 5) for mutant in lines if mutant.name != first[2]]
    second = drawn("here")
    assert second[:9] == [name for name in first if name != first[2]]
    assert len(set(second)) == 10
    # and elsewhere it is that of the committed result
    (tmp_path / "mutants.json").write_text(json.dumps({"seed": 3, "packages": {"optim": {"mutants": second}}}))
    assert drawn("elsewhere") == second
    assert drawn("elsewhere", seed=4) != second


def scores_of(**changes):
    """Of all packages, enough of each: 80 sampled, 5 equivalent, 75 tested."""
    own = {"sampled": 80, "equivalent": 5, "tested": 75, "killed": 75, "score": 1.0, "survivors": [], "mutants": []}
    return {package: own | changes.get(package, {}) for package in read_map()}


def test_enough_is_enough():
    assert list(shortfalls(scores_of())) == []
    few = {package: {"sampled": 60, "equivalent": 0, "tested": 60} for package in ("optim", "cost")}
    assert list(shortfalls(scores_of(**few))) == []


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"optim": {"tested": 74}}, ["optim: 1 of 80 sampled were not tested"]),
        ({"data": {"equivalent": 4}}, ["data: 1 of 80 sampled were not tested"]),
        (
            {"loop": {"sampled": 39, "equivalent": 0, "tested": 39}},
            ["loop: 39 sampled, at least 40 are needed", "in all: 599 sampled, at least 600 are needed"],
        ),
        (
            {"cost": {"equivalent": 17, "tested": 63}},
            ["in all: 52 of 640 said to be equivalent, at most 8% may be"],
        ),
    ],
)
def test_what_a_result_lacks_is_said_and_nothing_written(tmp_path, monkeypatch, changes, problems):
    found = scores_of(**changes)
    assert list(shortfalls(found)) == problems
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "mutants.json")
    monkeypatch.setattr(campaign, "summarise", lambda *_: found)
    with pytest.raises(SystemExit) as refused:
        campaign.write(options_of(tmp_path, each=40, seed=3))
    assert all(problem in str(refused.value) for problem in problems)
    assert str(refused.value).endswith("go on with: make mutants ARGS='--each 75 --seed 3'")
    assert not (tmp_path / "mutants.json").exists()


def test_a_result_is_of_all_packages():
    found = scores_of()
    del found["tasks"]
    assert list(shortfalls(found)) == [
        "tasks: 0 sampled, at least 40 are needed",
        "in all: 560 sampled, at least 600 are needed",
    ]


def problems_of(result):
    """What a written result falls short of: a sample that is large enough and tested, and the scores that we promise."""
    found = result["packages"]
    yield from shortfalls(found)
    for package, own in [*found.items(), ("in all", result)]:
        least = 0.97 if package == "in all" else 0.90
        if own["killed"] < least * own["tested"]:
            yield f"{package}: {own['killed']} of {own['tested']} killed, at least {least:.0%} are promised"
    for package, own in found.items():
        if own["killed"] + len(own["survivors"]) != own["tested"]:
            yield f"{package}: killed and survivors are not what was tested"
    for key in ("tested", "killed"):
        if result[key] != sum(own[key] for own in found.values()):
            yield f"in all: {key} is not the sum"


def test_a_result_that_is_written_can_be_held_to_its_promise(tmp_path, monkeypatch):
    def written(**changes):
        monkeypatch.setattr(campaign, "RESULTS", tmp_path / "mutants.json")
        monkeypatch.setattr(campaign, "summarise", lambda *_: scores_of(**changes))
        monkeypatch.setattr(campaign, "chosen", lambda _: {})
        campaign.write(options_of(tmp_path))
        return json.loads((tmp_path / "mutants.json").read_text())

    def lived(number):
        return {"killed": 75 - number, "survivors": [f"llmeff.it:f:core/Some_One:{place}" for place in range(number)]}

    assert list(problems_of(written())) == []
    assert list(problems_of(written(optim=lived(7), cost=lived(7), data=lived(4)))) == []
    assert list(problems_of(written(optim=lived(8)))) == ["optim: 67 of 75 killed, at least 90% are promised"]
    few = list(problems_of(written(optim=lived(7), cost=lived(7), data=lived(5))))
    assert few == ["in all: 581 of 600 killed, at least 97% are promised"]
    assert list(problems_of(written(optim=lived(1) | {"killed": 75}))) == [
        "optim: killed and survivors are not what was tested"
    ]
    assert list(problems_of(written() | {"killed": 599})) == ["in all: killed is not the sum"]


def test_the_committed_result_keeps_its_promise():
    if not RESULTS.exists():
        pytest.skip(f"{RESULTS.relative_to(ROOT)} is not there: `make mutants`, then `make mutants ARGS=--write`")
    assert list(problems_of(json.loads(RESULTS.read_text(encoding="utf-8")))) == []
