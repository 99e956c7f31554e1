"""Many processes from one command: started, ended, interrupted, lost and begun again, as a user would see it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.record.reader import read_run
from llmeff.run.launch import _LAUNCHERS_OWN, SCRIPT, command, supplied
from tests.launched import ROOT, STEPS, run, small, start

FILES = ROOT / "ds_configs"
IN_TIME_S = 60
"""How long after its last progress a run with `timeout_s` = 12 may live on a busy machine."""


def config(*settings):
    return validate(RunConfig, override({}, ["train.batch=8", *settings]))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (["parallel=ddp", "parallel.ranks=2"], "--multi_gpu"),
        (["parallel=fsdp", "parallel.ranks=2"], "--multi_gpu"),
        (["parallel=deepspeed", "parallel.ranks=2"], "--use_deepspeed"),
    ],
)
def test_the_command_of_several_ranks_is_accelerate_launch(settings, flag):
    line = command(config(*settings), ["--recipe=debug"])
    assert line[:4] == [sys.executable, "-m", "accelerate.commands.launch", flag]
    assert line[line.index("--num_processes") + 1] == "2"
    assert line[-2:] == [str(SCRIPT), "--recipe=debug"]


def test_one_rank_needs_no_launcher():
    assert command(config(), ["--recipe=debug"]) == [sys.executable, str(SCRIPT), "--recipe=debug"]


@pytest.mark.parametrize("parallel", [{}, {"parallel": "single"}, {"parallel": {"name": "single", "ranks": 1}}])
def test_a_launchers_file_makes_a_silent_config_the_strategy_that_it_is_for(monkeypatch, parallel):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(FILES / "zero3.json"))
    run = validate(RunConfig, supplied(parallel))
    assert (run.parallel.name, run.parallel.ranks, run.parallel.stage) == ("deepspeed", 2, 3)


def test_a_launchers_file_is_read_where_the_strategy_names_none(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(FILES / "zero1.json"))
    assert validate(RunConfig, supplied({"parallel": "deepspeed"})).parallel.stage == 1
    with pytest.raises(ConfigError, match=r"stage is 3 in the config, but 1 in .*zero1\.json"):
        validate(RunConfig, supplied({"parallel": {"name": "deepspeed", "stage": 3}}))


def test_a_launchers_file_may_be_the_configs_and_no_other(monkeypatch, tmp_path):
    same = tmp_path / "same.json"
    same.write_text(json.dumps(json.loads((FILES / "zero1.json").read_text())))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(FILES / "zero1.json"))
    data = {"parallel": {"name": "deepspeed", "file": str(same)}}
    assert supplied(data) == data
    with pytest.raises(ConfigError) as raised:
        supplied({"parallel": {"name": "deepspeed", "file": str(FILES / "zero2.json")}})
    assert "zero1.json" in str(raised.value)
    assert "zero2.json" in str(raised.value)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs that nothing disturbed, by strategy, each started when first asked for."""
    done = {}

    def ask(strategy):
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            code, out, err = run(*small(f"parallel={strategy}"), "--out=run", "--json", folder=folder)
            assert code == 0, err
            assert json.loads(out)["status"] == "finished"
            assert err == ""
            done[strategy] = folder / "run"
        return done[strategy]

    return ask


def assert_same_run(one, other):
    """Losses, norms, rates, evaluations and weights, to the last bit."""
    first, second = read_run(one), read_run(other)
    for name in ("step", "loss", "grad_norm", "learning_rate", "items_seen"):
        assert first.steps[name].tolist() == second.steps[name].tolist(), name
    assert len(first.steps["step"]) == STEPS
    assert first.evals.equals(second.evals)
    assert first.evaluations == second.evaluations
    assert first.result.sample == second.result.sample
    weights = "model/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed", "fsdp"))]
)
def test_a_run_of_two_ranks_is_one_command_and_shows_only_our_own_lines(unbroken, strategy):
    folder = unbroken(strategy)  # which wrote one JSON object, and nothing to standard error
    assert {"engine-00000.log", "engine-00001.log"} <= {path.name for path in folder.iterdir()}
    assert not (folder / ".beats").exists()


@pytest.mark.parametrize(
    ("line", "is_own"),
    [
        (b"W1125 21:30:46.392000 15115 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 1", True),
        (b"E0101 00:00:00.000000 1 .venv/lib/site-packages/torch/distributed/elastic/agent.py:7] failed", True),
        (b"W0101 00:00:00.000000 1 /usr/lib/torch/distributed/run.py:851] Setting OMP_NUM_THREADS", True),
        (b"llmeff: error: rank 1 is gone", False),
        (b"W0101 is a name of torch/distributed/elastic", False),
    ],
)
def test_the_launchers_own_lines_are_told_from_the_runs(line, is_own):
    assert bool(_LAUNCHERS_OWN.match(line)) == is_own


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("strategy", "fault", "words"),
    [
        ("ddp", "killed", "rank 1 is gone"),
        pytest.param("ddp", "stopped", "rank 1 is stopped", marks=SLOW),
        pytest.param("deepspeed", "asleep", "rank 1 is behind", marks=SLOW),
        pytest.param("ddp", "asleep", "rank 1 is behind", marks=SLOW),
        pytest.param("deepspeed", "killed", "rank 1 is gone", marks=SLOW),
        pytest.param("deepspeed", "stopped", "rank 1 is stopped", marks=SLOW),
    ],
)
def test_a_lost_rank_ends_the_run_everywhere_and_resume_goes_on_as_if_never_lost(
    unbroken, tmp_path, strategy, fault, words
):
    settings = small(f"parallel={strategy}", "parallel.timeout_s=12")
    process = start(*settings, "--quiet", "--out=run", fault=fault, folder=tmp_path)
    rows = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") >= 7):
        time.sleep(0.05)
    began = time.monotonic()
    _, err = process.communicate(timeout=240)
    assert time.monotonic() - began < IN_TIME_S
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert err.startswith("llmeff: error: ")
    assert words in err
    assert err.endswith("To resume: llmeff train --resume --out run\n")
    assert no_rank_left(tmp_path)
    code, _, err = run("--resume", "--out=run", "--quiet", folder=tmp_path)
    assert code == 0, err
    assert_same_run(unbroken(strategy), tmp_path / "run")
    assert not (tmp_path / "run" / ".beats").exists()


@SLOW
def test_a_rank_that_is_slow_and_goes_on_ends_nothing(unbroken, tmp_path):
    settings = small("parallel=ddp", "parallel.timeout_s=12")
    code, _, err = run(*settings, "--quiet", "--out=run", fault="busy", folder=tmp_path)
    assert code == 0, err
    assert_same_run(unbroken("ddp"), tmp_path / "run")


def no_rank_left(folder: Path) -> bool:
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if str(SCRIPT) in (process.info["cmdline"] or []) and process.info["cwd"] == str(folder):
            return False
    return True


@SLOW
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed", "fsdp"])
def test_a_run_that_ended_abnormally_goes_on_by_itself_as_often_as_allowed(unbroken, tmp_path, strategy):
    once = {"FAULT_ONCE": str(tmp_path / "done")}
    arguments = [*small(f"parallel={strategy}"), "--quiet", "--out=run"]
    code, _, err = run(*arguments, "--restarts=1", fault="killed", folder=tmp_path, **once)
    assert code == 0, err
    assert "llmeff: WARNING: restart 1 of 1\n" in err
    assert_same_run(unbroken(strategy), tmp_path / "run")


def test_one_process_goes_on_by_itself_too(tmp_path):
    once = {"FAULT_ONCE": str(tmp_path / "done"), "FAULT_RANK": "0"}
    arguments = [*small("parallel.ranks=1"), "--quiet", "--out=run", "--restarts=2"]
    code, _, err = run(*arguments, fault="killed", folder=tmp_path, **once)
    assert code == 0, err
    assert err == "llmeff: WARNING: restart 1 of 2\n"
    assert read_run(tmp_path / "run").steps["step"].tolist() == list(range(1, STEPS + 1))


def test_bad_input_is_said_once_and_is_no_reason_to_try_again(tmp_path):
    arguments = [*small("parallel=ddp", "model.vocab_size=100"), "--out=run", "--restarts=3", "--quiet"]
    code, out, err = run(*arguments, folder=tmp_path)
    assert code == 2
    assert out == ""
    assert err.startswith("llmeff: error: model.vocab_size is 100")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@SLOW
def test_an_error_of_ones_own_keeps_its_traceback(tmp_path):
    code, _, err = run(*small("parallel=ddp"), "--quiet", "--out=run", fault="wrong", folder=tmp_path)
    assert code == 1
    assert err.startswith("llmeff: error: rank 1 failed\nTraceback")
    assert err.endswith("RuntimeError: a component of the user is wrong\n")


@SLOW
def test_ctrl_c_is_passed_on_and_leaves_nothing_running(tmp_path):
    process = start(*small("parallel=ddp", "train.steps=100000"), "--quiet", "--out=run", folder=tmp_path)
    rows = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "llmeff: error: interrupted\n"
    assert no_rank_left(tmp_path)


@SLOW
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its starter is gone")
@pytest.mark.parametrize("settings", [["parallel=ddp"], ["parallel=deepspeed"], ["parallel.ranks=1"]])
def test_a_starter_that_is_killed_takes_the_run_with_it(tmp_path, settings):
    process = start(*small(*settings, "train.steps=100000"), "--quiet", "--out=run", "--restarts=1", folder=tmp_path)
    rows = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        time.sleep(0.05)
    assert not no_rank_left(tmp_path)
    process.kill()
    process.communicate(timeout=IN_TIME_S)  # its pipes are closed when the run has gone, too
    deadline = time.monotonic() + IN_TIME_S
    while not no_rank_left(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert no_rank_left(tmp_path)


def test_a_launcher_that_starts_other_ranks_than_the_config_has_is_told_so_once(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    options = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(SCRIPT), "--recipe=debug"]
    done = subprocess.run(
        [sys.executable, *launch, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("parallel.ranks is 1 in the config, but the launcher (WORLD_SIZE) says 2") == 1
    assert not (tmp_path / "runs").exists()


GUIDE = (ROOT / "GUIDE.md").read_text(encoding="utf-8").partition("## Many processes\n")[2].partition("```\n")[0]
COMMANDS = [
    line.partition("  #")[0].strip() for line in GUIDE.splitlines() if line.startswith(("llmeff", "accelerate"))
]
PROGRAMS = {"llmeff": "llmeff.cli", "accelerate": "accelerate.commands.accelerate_cli"}


def test_the_guide_has_commands_of_many_processes():
    assert len(COMMANDS) >= 4


@SLOW
@pytest.mark.parametrize("line", [line for line in COMMANDS if "--resume" not in line])
def test_the_guides_commands_of_many_processes_train(line, tmp_path):
    program, *given = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-m", PROGRAMS[program], *given, *small(), "--quiet", f"--out={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_of = read_run(tmp_path / "run")
    assert len(run_of.steps["step"]) == STEPS
    assert run_of.config["parallel"]["ranks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["parallel.ranks=4"], ["parallel=single"], ["parallel=fsdp", "parallel.ranks=2"]])
def test_a_run_goes_on_at_other_ranks_by_its_own_config(unbroken, tmp_path, settings):
    code, _, err = run(*small("parallel=ddp"), "--quiet", "--out=run", fault="killed", folder=tmp_path)
    assert code == 1, err
    code, _, err = run("--resume", "--out=run", "--quiet", *(f"--set={one}" for one in settings), folder=tmp_path)
    assert code == 0, err
    first, second = read_run(unbroken("ddp")), read_run(tmp_path / "run")
    assert second.steps["loss"].tolist() == pytest.approx(first.steps["loss"].tolist(), rel=1e-5)
