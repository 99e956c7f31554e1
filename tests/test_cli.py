"""The command line: right commands, and for every wrong one a clear error, a code that is not 0, and nothing touched."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmeff.cli import main

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    "--recipe=debug",
    "--set=data.source.max_bytes=300000",
    "--set=data.splits.by=span",
    "--set=train.steps=2",
    "--set=schedule.warmup_steps=0",
    "--set=evaluation.sample_tokens=0",
]


def fails(capsys, *arguments):
    """The error of a command that must fail as wrong input."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("llmeff: error:")
    return captured.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.stepz=5"], "train.stepz: there is no such field. Did you mean 'steps'?"),
        (["optim=adamv"], "optim: unknown optimizer 'adamv'. Did you mean 'adamw'?"),
        (["optim.momentum=1"], "optim.momentum: there is no such field."),
        (["model=llama-9m"], "model: unknown model 'llama-9m'. Did you mean 'llama-1m'?"),
        (["data.source=buildin"], "data.source: unknown source 'buildin'. Did you mean 'builtin'?"),
        (["precision=fp8"], "precision: Input should be 'fp32', 'bf16', 'fp16' or 'bf16_master' (given: 'fp8')"),
        (["train.steps=ten"], "train.steps: Input should be a valid integer (given: 'ten')"),
        (["train.steps=0"], "train.steps: Input should be greater than or equal to 1 (given: 0)"),
        (
            ["train.batch=6", "train.micro_batch=4"],
            "train.micro_batch is 4, which does not divide train.batch 6. Allowed: 1, 2, 3, 6",
        ),
        (["model.width=33"], "width 33 is not a multiple of num_heads 2"),
        (["model.vocab_size=200"], "model.vocab_size is 200, but the tokenizer 'bytes' has ids up to 256"),
        (["precision=fp16", "runtime.device=cpu"], "precision 'fp16' needs a GPU"),
        (["schedule.warmup_steps=99"], "schedule.warmup_steps is 99, but train.steps is only 2"),
        (["parallel.ranks=2"], "ranks is 2, but strategy 'single' has only one process: use ranks = 1"),
        (["data.sequence_length=9000000"], "9000000"),
        (["train"], "--set 'train': expected KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_one_clear_error_before_anything_is_touched(capsys, tmp_path, settings, message):
    out = tmp_path / "run"
    error = fails(capsys, "train", *SMALL, *(f"--set={setting}" for setting in settings), "--out", out)
    assert message in error
    assert not out.exists()


def test_all_problems_come_at_once(capsys, tmp_path):
    error = fails(capsys, "train", "--set=train.stepz=1", "--set=optim.lr=-1", "--set=model.width=x", "--out", tmp_path)
    assert error.count("\n") == 4
    assert "train.stepz" in error
    assert "optim.lr" in error
    assert "model.width" in error


def source(kind, path, **more):
    fields = {"name": kind, "path": str(path)} | more
    return "--set=data.source=" + "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in fields.items()) + "}"


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("empty.txt", b"", "text", "empty"),
        ("latin.txt", "naïve".encode("latin-1"), "text", "UTF-8"),
        ("rows.jsonl", b'{"body": "x"}\n', "jsonl", "body"),
        ("rows.jsonl", b'{"text": "x"}\n{"text"\n', "jsonl", "line 2"),
    ],
)
def test_wrong_data_is_named_with_its_file(capsys, tmp_path, name, content, kind, message):
    path = tmp_path / name
    path.write_bytes(content)
    out = tmp_path / "run"
    error = fails(capsys, "train", *SMALL[:1], source(kind, path), "--out", out)
    assert name in error
    assert message in error
    assert not out.exists()


def test_data_that_is_not_there(capsys, tmp_path):
    error = fails(capsys, "train", *SMALL[:1], source("text", tmp_path / "none.txt"), "--out", tmp_path / "run")
    assert "none.txt" in error


def test_a_folder_that_is_not_empty_is_left_as_it_is(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    error = fails(capsys, "train", *SMALL, "--out", tmp_path)
    assert "is not empty (thesis.tex)" in error
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    error = fails(capsys, "train", *SMALL, "--out", tmp_path / "file" / "run")
    assert "cannot be written" in error


@pytest.mark.parametrize(("call", "what"), [(12, "checkpoint"), (3, "")])
def test_a_full_disk_is_one_error_and_loses_nothing(capsys, tmp_path, monkeypatch, call, what):
    from llmeff.core import files

    out, calls, sync = tmp_path / "run", [0], files.sync

    def full(path):
        calls[0] += 1
        if calls[0] >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        code = main(["train", *SMALL, "--quiet", "--set=checkpoint.every=1", "--out", str(out)])
    error = capsys.readouterr().err
    assert code == 2
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob(".partial-*"))
    if (out / "config.json").exists():
        assert main(["train", "--quiet", "--resume", "--out", str(out)]) == 0
        assert (out / "result.json").exists()


def test_resume_of_nothing(capsys, tmp_path):
    assert "needs --out" in fails(capsys, "train", "--resume")
    assert "no run to continue" in fails(capsys, "train", "--resume", "--out", tmp_path)


def test_an_unknown_recipe(capsys):
    assert "unknown recipe 'debugg'. Did you mean 'debug'?" in fails(capsys, "train", "--recipe=debugg")


def test_a_module_that_is_not_there(capsys):
    assert "--import no_such_module" in fails(capsys, "train", *SMALL, "--import=no_such_module")


def test_print_config_is_a_config(capsys, tmp_path):
    assert main(["train", "--recipe=debug", "--set=optim.lr=0.25", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "config.json").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "config.json"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert json.loads(printed)["optim"]["lr"] == 0.25


def test_a_run_prints_its_result_as_one_json_object(capsys, tmp_path):
    assert main(["train", *SMALL, "--json", "--out", str(tmp_path / "run")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "result.json").read_text())


def test_plan_prices_a_run_without_touching_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMEFF_CACHE", str(tmp_path))
    assert main(["plan", *SMALL, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"]["total"] > 0
    assert (printed["micro_batch"], printed["fits"]) == (4, True)
    assert list(tmp_path.iterdir()) == []
    assert main(["plan", *SMALL]) == 0
    assert "priced with train.micro_batch 4 (auto" in capsys.readouterr().out


def test_users_components_come_in_by_a_module(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_schedules.py").write_text(
        "from typing import Literal\n"
        "from llmeff.optim import ScheduleConfig\n"
        "class Staircase(ScheduleConfig):\n"
        "    name: Literal['staircase'] = 'staircase'\n"
        "    def after_warmup(self, progress):\n"
        "        return 1.0 if progress < 0.5 else 0.1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["train", *SMALL, "--import=my_schedules", "--set=schedule=staircase", "--print-config"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["schedule"]["name"] == "staircase"


def run_process(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_accelerate_launch_of_the_script_is_the_same_command(tmp_path):
    script = str(ROOT / "llmeff" / "train.py")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    options = ["--mixed_precision=no", "--dynamo_backend=no", script]
    done = run_process(*launch, *options, *SMALL, "--json", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"


def test_help_imports_no_torch():
    code = "import sys; from llmeff.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    done = run_process("-c", code + "sys.exit('torch' in sys.modules or 'pydantic' not in sys.modules)")
    assert done.returncode == 0


def test_plan_imports_no_engine(tmp_path):
    code = f"import sys; from llmeff.cli import main; main(['plan', *{SMALL!r}])\n"
    heavy = "{'transformers', 'accelerate', 'deepspeed'}"
    done = run_process("-c", code + f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)")
    assert done.returncode == 0, done.stderr


def test_imports_read_no_sources():
    # for the docstrings of configs' fields: it took a second
    # torch, which keeps the lines that import it, comes first
    done = run_process("-c", "import linecache, sys, torch, llmeff.run.loop; sys.exit(str(list(linecache.cache)))")
    assert done.stderr.startswith("[")
    assert "llmeff" not in done.stderr


def test_training_begins_without_what_it_needs_later(tmp_path):
    code = "import sys; import llmeff.run.loop as loop; from llmeff.cli import main\n"
    code += "def step(self): raise KeyboardInterrupt\n"
    code += f"loop.Trainer.train_step = step; code = main(['train', *{SMALL!r}, '--out', {str(tmp_path / 'run')!r}])\n"
    later = "{'transformers', 'matplotlib', 'scipy', 'datasets', 'peft'}"
    done = run_process("-c", code + f"sys.exit(str((code, {later} & set(sys.modules))))")
    assert done.stderr.endswith("(130, set())\n")


def test_the_version_is_the_packages():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = run_process("-m", "llmeff.cli", "--version")
    assert done.stdout == f"llmeff {version}\n"
