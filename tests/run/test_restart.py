"""A run that has rows and no checkpoint begins anew only where somebody says so, and nothing that it recorded is lost."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from llmeff.cli import main
from llmeff.config.sweep import SweepConfig
from llmeff.core import files
from llmeff.core.config import ConfigError, override, validate
from llmeff.lab import sweep
from llmeff.record import schema
from llmeff.record.reader import read_run, recorded
from llmeff.record.writer import RunWriter
from llmeff.run import launch
from llmeff.run.checkpoint import Checkpoints, is_before_first
from llmeff.run.loop import Trainer, train
from tests.conftest import SeedOnly
from tests.lab.test_sweep import SMALL
from tests.run.test_loop import tiny
from tests.test_links import state


def checkpoint(folder, step):
    Checkpoints(folder / "checkpoints", keep=9).save(step, {}, lambda part: (part / "weights").write_text("w"))


def damage(folder):
    for step in (2, 4):
        checkpoint(folder, step)
        (folder / "checkpoints" / f"step-{step:08d}" / "weights").write_text("x")


LACKS = {
    "deleted": (lambda folder: None, "checkpoints: the folder does not exist, so there is no checkpoint"),
    "empty": (lambda folder: (folder / "checkpoints").mkdir(), "checkpoints: the folder contains nothing, so"),
    "renamed": (
        lambda folder: (folder / "checkpoints" / "old").mkdir(parents=True),
        "checkpoints: the folder contains only old, so",
    ),
    "a file": (
        lambda folder: (folder / "checkpoints").touch(),
        r"checkpoints: the folder cannot be read \(Not a directory\), so",
    ),
    "all damaged": (damage, "checkpoints: no checkpoint in this folder can be read, for the reasons above"),
}
KEPT = {
    "all": (["metrics.jsonl", "evaluations.jsonl", "evals.parquet"], "4 steps and 2 evaluations"),
    "rows": (["metrics.jsonl"], "4 steps"),
    "evaluations": (["evaluations.jsonl"], "2 evaluations"),
    "units": (["evals.parquet"], r"the evaluations in evals\.parquet"),
}


@pytest.mark.parametrize(("lose", "why"), LACKS.values(), ids=LACKS)
@pytest.mark.parametrize(("kept", "what"), KEPT.values(), ids=KEPT)
def test_a_record_without_a_checkpoint_is_left_as_it_is_and_the_ways_on_are_named(make_run, lose, why, kept, what):
    folder = make_run("run", is_finished=False)
    for name in KEPT["all"][0]:
        if name not in kept:
            (folder / name).unlink()
    lose(folder)
    before, point = state(folder), Checkpoints(folder / "checkpoints", keep=2).resume_point
    with pytest.raises(ConfigError, match=f"{why}.* would discard {what}") as raised:
        point("")
    assert f"--restart-from-scratch --out {shlex.quote(str(folder))}" in str(raised.value)
    assert f"{folder}/discarded-N" in str(raised.value)
    assert "another --out" in str(raised.value)
    assert state(folder) == before
    assert point("", or_anew=True) is None
    assert state(folder) == before


def test_checkpoints_that_cannot_be_listed_are_no_checkpoints(make_run, monkeypatch):
    folder, real = make_run("run", is_finished=False), os.scandir

    def closed(path):
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    checkpoint(folder, 4)
    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "listdir", lambda path: [*closed(path)])
    with pytest.raises(
        ConfigError, match=r"cannot be read \(Permission denied\), so .* would discard 4 steps and 2 eval"
    ):
        Checkpoints(folder / "checkpoints", keep=2).resume_point("")


@pytest.mark.parametrize("torn", [b"", b'{"step": 1, "lo'])
def test_a_run_that_recorded_nothing_begins_without_a_word(make_run, torn):
    folder = make_run("run", steps=0, is_finished=False)
    (folder / "metrics.jsonl").write_bytes(torn)
    assert recorded(folder) == ""
    assert Checkpoints(folder / "checkpoints", keep=2).resume_point("") is None


def test_what_was_recorded_is_set_aside_each_time_and_is_a_run_of_its_own(make_run, environment, step_row, caplog):
    folder = make_run("run", is_finished=False)
    checkpoint(folder, 2)
    (folder / "notes.txt").write_text("mine")
    old = {name: own for name, own in state(folder).items() if name.split("/")[0] in schema.RECORDED}
    for number in (1, 2):
        with RunWriter.restart(folder, SeedOnly(), environment) as writer:
            writer.truncate_after(0)
            writer.step(step_row(1))
        aside = folder / f"discarded-{number}"
        assert (
            f"starts again from the beginning; its earlier {('1 step', '4 steps and 2 evaluations')[number == 1]} are kept in {aside}"
            in caplog.text
        )
        assert read_run(folder).steps["step"].tolist() == [1]
        assert read_run(aside).config == {"seed": 7}
        assert not (folder / "checkpoints").exists()
        assert (folder / "notes.txt").read_text() == "mine"
    assert state(folder / "discarded-1").items() >= old.items()
    assert len(read_run(folder / "discarded-1").evaluations) == 2
    assert read_run(folder / "discarded-2").steps["step"].tolist() == [1]


@pytest.mark.parametrize("moved", range(5))
def test_cut_off_while_it_sets_aside_it_loses_nothing_and_ends_in_one_place(make_run, environment, monkeypatch, moved):
    folder, rename, left = make_run("run", is_finished=False), Path.rename, [moved]
    checkpoint(folder, 2)
    old = {name: own for name, own in state(folder).items() if name.split("/")[0] in schema.RECORDED}

    def dies(self, place):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        if moved < 4:
            with pytest.raises(KeyboardInterrupt):
                RunWriter.restart(folder, SeedOnly(), environment)
            assert state(folder).items() | state(folder / "discarded-1").items() >= old.items()
            assert (folder / "metrics.jsonl").exists()
            assert (folder / "checkpoints").exists() == (moved == 0)
    RunWriter.restart(folder, SeedOnly(), environment).close()
    assert state(folder / "discarded-1").items() >= old.items()
    assert not (folder / "discarded-2").exists()


def test_a_run_that_has_ended_is_not_begun_anew(make_run, environment):
    folder = make_run("run")
    before = state(folder)
    with pytest.raises(ConfigError, match="has ended"):
        RunWriter.restart(folder, SeedOnly(), environment)
    before[".lock"] = state(folder)[".lock"]
    assert state(folder) == before


def test_the_command_line_refuses_then_begins_anew_and_comes_to_the_same_run(tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = tiny("train.steps=4", "checkpoint.keep=1", "evaluation.every=2", "evaluation.sample_tokens=0")
    train(settings, whole)
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    before = state(folder)
    assert main(["train", "--resume", f"--out={folder}", "--quiet"]) == 2
    assert "would discard 4 steps and 2 evaluations" in capsys.readouterr().err
    before["env.json"] = state(folder)["env.json"]
    assert state(folder) == before
    assert main(["train", "--restart-from-scratch", f"--out={folder}", "--quiet"]) == 0
    first, second = read_run(whole), read_run(folder)
    assert second.steps["loss"].tolist() == first.steps["loss"].tolist()
    assert second.result.metrics == first.result.metrics
    for name in ("metrics.jsonl", "evaluations.jsonl", "evals.parquet", "model/model.safetensors"):
        assert (folder / "discarded-1" / name).read_bytes() == (whole / name).read_bytes(), name


def test_with_resume_it_begins_anew_only_where_there_is_no_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with Trainer(tiny("train.steps=4"), folder, resume=False, is_silent=True) as trainer:
        for _ in range(3):
            trainer.train_step()
            trainer.save_if_due()
    with Trainer(tiny("train.steps=4"), folder, resume=True, anew=True, is_silent=True) as trainer:
        assert trainer.step == 2
    assert not list(folder.glob(f"{files.DISCARDED}*"))
    with Trainer(tiny("train.steps=4"), folder, resume=False, anew=True, is_silent=True) as trainer:
        assert trainer.step == 0
    assert (folder / "discarded-1" / "checkpoints" / "step-00000002").is_dir()
    assert read_run(folder / "discarded-1").steps["step"].tolist() == [1, 2]


@pytest.mark.parametrize("flag", ["--resume", "--restart-from-scratch"])
def test_there_must_be_a_run(tmp_path, capsys, flag):
    assert main(["train", flag]) == 2
    assert f"{flag} needs --out DIR" in capsys.readouterr().err
    assert main(["train", flag, f"--out={tmp_path}"]) == 2
    assert f"{flag}: {tmp_path} contains no config.json" in capsys.readouterr().err


# -- who goes on by itself


@pytest.mark.parametrize(
    ("every", "rows", "saved", "is_early"),
    [
        (0, 3, None, True),
        (0, 4, None, True),  # the one at the end comes after the last evaluation
        (2, 0, None, True),
        (2, 2, None, True),  # killed after the row, before the checkpoint
        (2, 3, None, False),  # it was there
        (2, 2, 2, False),
        (9, 4, None, True),
    ],
)
def test_a_run_that_ended_before_its_first_checkpoint_is_told_from_one_that_lost_it(
    make_run, every, rows, saved, is_early
):
    folder = make_run("run", steps=rows, is_finished=False)
    (folder / "config.json").write_text(json.dumps({"checkpoint": {"every": every}, "train": {"steps": 4}}))
    if saved is not None:
        checkpoint(folder, saved)
    assert is_before_first(folder) == is_early
    assert launch.going_on(folder) == ("--restart-from-scratch" if is_early else "--resume")


class _Recorded:
    """Stands for a run's processes, which fail."""

    lines: list[list[str]]

    def __init__(self, line, _folder):
        self.lines.append(line)

    def wait(self):
        return 1


@pytest.mark.parametrize(("every", "flag"), [(0, "--restart-from-scratch"), (2, "--resume")])
@pytest.mark.parametrize("first", [[], ["--resume"]])
def test_a_run_that_restarts_by_itself_begins_anew_before_its_first_checkpoint_alone(
    make_run, monkeypatch, every, flag, first
):
    folder = make_run("run", is_finished=False)
    (folder / "config.json").write_text(tiny(f"checkpoint.every={every}").model_dump_json())
    monkeypatch.setattr(launch, "_Job", _Recorded)
    monkeypatch.setattr("llmeff.run.launch.check_free", lambda own: None)
    _Recorded.lines = []
    given = [f"--config={folder / 'config.json'}", f"--out={folder}", "--restarts=1", "--quiet"]
    assert main(["train", *given, *first]) == 1
    assert [line[-1] for line in _Recorded.lines] == [flag if first else f"--out={folder}", flag]


@pytest.mark.parametrize(("every", "flag"), [(0, "--restart-from-scratch"), (2, "--resume")])
def test_a_sweep_repeats_a_run_that_was_cut_off_before_its_first_checkpoint(
    make_run, tmp_path, monkeypatch, every, flag
):
    small = override(SMALL | {"arms": {"a": {}, "b": {"settings": ["optim=muon"]}}, "baseline": "a"}, [])
    study = validate(SweepConfig, override(small, [f"base.checkpoint.every={every}"]))
    folder, started = tmp_path / "study", []
    job = sweep.final_jobs(study, folder)[0]
    own = make_run("study/runs/" + job.path, steps=3, is_finished=False)
    (own / "config.json").write_text(sweep.job_config(study, job).model_dump_json())

    class Process:
        def __init__(self, line, **how):
            started.append((line, how))

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    running = sweep.Sweep(study, folder, cores=1, modules=[], command="", tell=lambda line: None)
    running._start(job, sweep.job_config(study, job), 1)
    ((line, how),) = started
    assert line[2:] == [flag, f"--out={own}", "--quiet"]
    assert how["env"]["PYTHONSAFEPATH"] == "1"
