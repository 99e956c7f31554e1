"""The working folder is on no path: what lies there is never imported, unless `--import` asks for it."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmeff.compare.ledger import LEDGER, read_ledger
from llmeff.core import dist
from llmeff.core.components import load_components
from llmeff.core.config import ConfigError
from tests.lab.test_sweep import SMALL
from tests.launched import ROOT, small

HOSTILE = """
import os
open(os.path.join(os.environ["MARKERS"], __name__), "w").close()
raise RuntimeError(__name__ + " of the working folder was imported")
"""
WITHOUT = {
    "tabulate",
    "wandb",
    "cupy",
    "apex",
    "mpi4py",
    "flash_attn",
    "bitsandbytes",
    "orjson",
    "simplejson",
    "colorama",
}
"""What libraries try to import and do without."""
AT_START = {"sitecustomize", "usercustomize"}
"""What Python itself imports where it is."""
PROGRAM = "import sys\nfrom llmeff.cli import main\nsys.exit(main())\n"
"""The command `llmeff`, as it is installed."""


def loaded(*arguments, folder):
    """Modules that Python has imported before a program's first line."""
    told = "import sys; print(' '.join(sys.modules))"
    (folder / "probe.py").write_text(told)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with a module for every name that anything here may import, which say so and fail."""
    folder, empty = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("empty")
    names = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | WITHOUT | AT_START
    # `python -m` looks for its own needs there first; nothing of ours runs before
    names -= loaded("-m", "probe", folder=empty) - {"sitecustomize", "usercustomize"}
    for name in names - {"llmeff"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(HOSTILE)
    return folder


@pytest.fixture
def run(hostile, tmp_path):
    """Runs Python in the hostile folder; returns its exit code and standard error, and that nothing there was imported."""
    markers, program = tmp_path / "markers", tmp_path / "bin" / "llmeff"
    markers.mkdir()
    program.parent.mkdir()
    program.write_text(PROGRAM)

    def run_it(*arguments, llmeff=False, allowed=frozenset(), **environment):
        told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MARKERS": str(markers)} | environment
        given = [str(program), *arguments] if llmeff else arguments
        done = subprocess.run(
            [sys.executable, *given], cwd=hostile, env=os.environ | told, capture_output=True, text=True, timeout=400
        )
        assert set(os.listdir(markers)) <= allowed, done.stderr
        return done.returncode, done.stderr

    return run_it


def test_the_folder_is_hostile(hostile, tmp_path):
    """Or the tests below would say nothing."""
    (tmp_path / "markers").mkdir()
    told = os.environ | {"MARKERS": str(tmp_path / "markers")}
    for name in ("random", "tabulate", "json", "torch", "numpy", "pathlib", "importlib.metadata"):
        if name != "importlib.metadata":
            line = [sys.executable, "-c", f"import {name}"]
            assert subprocess.run(line, cwd=hostile, env=told, capture_output=True, check=False).returncode, name
            assert (tmp_path / "markers" / name).exists()


def test_neither_module_nor_program_has_the_folder_on_its_path(run):
    assert run("train", "--recipe=debug", "--print-config", llmeff=True)[0] == 0
    assert run(str(ROOT / "llmeff" / "train.py"), "--recipe=debug", "--print-config")[0] == 0


def test_nor_has_a_run(run, tmp_path):
    given = [*small("train.steps=4", "parallel.ranks=1"), "--quiet", f"--out={tmp_path / 'run'}"]
    code, err = run("-m", "llmeff.cli", "train", *given)
    assert (code, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed", "ddp", "fsdp"])
def test_nor_has_any_process_of_a_run_of_two_ranks(run, tmp_path, strategy):
    given = [*small("train.steps=4", f"parallel={strategy}"), "--quiet", f"--out={tmp_path / 'run'}"]
    code, err = run("train", *given, llmeff=True)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--multi_gpu", "--use_deepspeed"])
def test_nor_has_what_accelerate_launches(run, tmp_path, flag):
    strategy = {"--multi_gpu": "ddp", "--use_deepspeed": "deepspeed"}[flag]
    line = [
        "-P", "-m", "accelerate.commands.launch", flag, "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", f"--main_process_port={dist.free_port()}", str(ROOT / "llmeff" / "train.py"),
    ]  # fmt: skip
    given = [*small("train.steps=4", f"parallel={strategy}"), "--quiet", f"--out={tmp_path / 'run'}"]
    # of what accelerate puts on PYTHONPATH for DeepSpeed, Python imports these two before any program's first line
    code, err = run(*line, *given, allowed=AT_START if strategy == "deepspeed" else frozenset())
    assert code == 0, err


@pytest.mark.slow
def test_nor_have_lanes_of_a_bench(run):
    mixers = ["bench", "mixers", "--mixer=softmax", "--mixer=linear", "--length=64", "--processes=2", "--rounds=1"]
    assert run(*mixers, llmeff=True)[0] == 0
    lanes = ["--arm=ours", "--arm=bare", "--processes=2", "--rounds=2", "--steps=1", "--warmup=1"]
    code, err = run("bench", *small("parallel.ranks=1"), *lanes, llmeff=True)
    assert code == 0, err


def test_nor_has_a_sweep_and_one_whose_runs_all_fail_says_so_and_fails(run, tmp_path):
    base = SMALL["base"] | {"data": {"name": "text", "source": {"name": "text", "path": ["nowhere.txt"]}}}
    arms = {"a": {}, "b": {"settings": ["optim=muon"]}}
    study = SMALL | {"base": base, "arms": arms, "baseline": "a", "seeds": [0]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    code, err = run("sweep", f"--config={tmp_path / 'study.json'}", f"--out={tmp_path / 'out'}", "--quiet", llmeff=True)
    assert code == 1
    assert err.startswith(
        f"llmeff: error: {tmp_path / 'out'}: no run of the sweep finished (2 failed). For example, a/seed-0: llmeff: "
    )
    assert "nowhere.txt" in err
    assert [entry.status for entry in read_ledger(tmp_path / "out" / LEDGER)] == ["failed", "failed"]


def test_what_a_run_starts_by_itself_has_it_neither(run):
    """Libraries do: multiprocessing, torch's compilers."""
    code, err = run("-c", "import random", PYTHONSAFEPATH=dist.child_environment()["PYTHONSAFEPATH"])
    assert code == 0, err


def test_processes_of_a_block_have_it_neither_and_the_choice_comes_back(monkeypatch):
    for before in (None, "", "1"):
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        if before is not None:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        with dist.folder_off_paths():
            assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ.get("PYTHONSAFEPATH") == before
    monkeypatch.delenv("PYTHONSAFEPATH")
    dist.keep_folder_off_paths()
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_launchers_start_in_a_folder_of_ours_and_relative_paths_of_the_users_stay_what_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"mine{os.pathsep}{ROOT}")
    told = dist.launched_environment(Path("ending"), on_gpu=True)
    assert told["PYTHONPATH"] == f"{tmp_path / 'mine'}{os.pathsep}{ROOT}"
    assert (told["LLMEFF_FOLDER"], told["PYTHONSAFEPATH"]) == (str(tmp_path), "1")


# -- modules that the user asks for


MODULES = {
    "own_parts.py": "import own_helper\nimport json\n\ndef later():\n    import own_sibling\n    return own_sibling",
    "own_helper.py": "import own_deeper",
    "own_deeper.py": "",
    "own_sibling.py": "",
    "own_package/__init__.py": "from own_package import part",
    "own_package/part.py": "import own_beside",
    "own_beside.py": "",
    "own_unasked.py": "",
    "json.py": "raise RuntimeError('the working folder hides the standard library')",
    "rich.py": "raise RuntimeError('the working folder hides an installed package')",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's modules; what is imported from it is forgotten."""
    for name, content in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [own for own in sys.path if own])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_module_of_the_users_is_found_here_with_what_it_imports_and_nothing_else_is(here):
    before = list(sys.path)
    load_components(["own_parts", "own_package.part"])
    assert {"own_helper", "own_deeper", "own_beside"} <= sys.modules.keys()
    assert sys.modules["own_parts"].later().__file__ == str(here / "own_sibling.py")
    assert sys.modules["own_parts"].json is json
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("own_unasked")
    assert sys.path == before


def test_without_import_nothing_is_found_here(here):
    load_components([])
    for name in ("own_parts", "own_package"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_a_module_that_is_not_here_is_one_error(here):
    with pytest.raises(ConfigError, match="--import own_party: no such module in the working folder"):
        load_components(["own_party"])
