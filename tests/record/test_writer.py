import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmeff.core.config import Config, ConfigError
from llmeff.record.reader import read_run
from llmeff.record.schema import EvalRow, Evaluation, StepRow
from llmeff.record.writer import RunWriter
from tests.conftest import SeedOnly


def test_what_is_written_is_read(make_run, step_row, environment, result):
    run = read_run(make_run("run", steps=4))

    assert run.name == "run"
    assert run.config == {"seed": 7}
    assert run.environment == environment
    assert run.result == result
    for name in StepRow.model_fields:
        expected = [getattr(step_row(step), name) for step in (1, 2, 3, 4)]
        np.testing.assert_array_equal(run.steps[name], np.array(expected, run.steps[name].dtype))
    assert run.evals.to_pylist()[-1] == {
        "step": 4, "split": "validation", "unit": "document-3", "loss_sum": 7.5, "count": 3, "bytes": 90.0,
    }  # fmt: skip
    assert run.evals.num_rows == 4
    assert run.evaluations == [
        Evaluation(
            step=step, split="validation", metrics={"loss": 10 / step, "bits_per_byte": 7 / step, "accuracy": step / 10}
        )
        for step in (2, 4)
    ]


def test_each_file_says_its_version(make_run):
    folder = make_run("run")
    for name in ("env.json", "result.json"):
        assert json.loads((folder / name).read_text())["schema_version"] == 1
    for name, count in (("metrics.jsonl", 4), ("evaluations.jsonl", 2)):
        lines = (folder / name).read_text().splitlines()
        assert [json.loads(line)["schema_version"] for line in lines] == [1] * count
    assert read_run(folder).evals.schema.metadata[b"schema_version"] == b"1"


def test_what_is_not_finite_is_json_and_comes_back(make_run):
    folder = make_run("run", steps=3, loss=math.nan, grad_norm=math.inf, loss_scale=-math.inf)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    steps = read_run(folder).steps
    assert np.isnan(steps["loss"]).all()
    assert (steps["grad_norm"] == np.inf).all()
    assert (steps["loss_scale"] == -np.inf).all()
    assert np.isnan(steps["forward_s"]).all()
    assert steps["step"].tolist() == [1, 2, 3]
    assert steps["is_warmup"].tolist() == [True, True, False]


def test_a_metric_that_is_no_number_comes_back(tmp_path, environment):
    row = EvalRow(step=1, split="validation", unit="a", loss_sum=1.0, count=2)
    with RunWriter.create(tmp_path / "run", Config(), environment) as writer:
        writer.evaluation([row], {"recall": math.nan, "loss": math.inf})
    json.loads((tmp_path / "run" / "evaluations.jsonl").read_text(), parse_constant=pytest.fail)
    (read,) = read_run(tmp_path / "run").evaluations
    assert math.isnan(read.metrics["recall"])
    assert read.metrics["loss"] == math.inf


def test_evaluations_may_have_other_metrics(tmp_path, environment):
    row = {"split": "validation", "unit": "a", "loss_sum": 1.0, "count": 2}
    with RunWriter.create(tmp_path / "run", Config(), environment) as writer:
        writer.evaluation([EvalRow(step=1, **row, metrics={"bytes": 3.0})], {"loss": 0.5})
        writer.evaluation([EvalRow(step=2, **row, metrics={"correct": 1.0})], {"loss": 0.5, "recall": 1.0})
        with pytest.raises(ValueError, match="count"):
            writer.evaluation([EvalRow(step=3, **row, metrics={"count": 1.0})], {"loss": 0.5})
    evals = read_run(tmp_path / "run").evals
    assert [own.metrics for own in read_run(tmp_path / "run").evaluations] == [
        {"loss": 0.5}, {"loss": 0.5, "recall": 1.0},
    ]  # fmt: skip
    assert evals["bytes"].to_pylist() == [3.0, None]
    assert evals["correct"].to_pylist() == [None, 1.0]


def test_an_evaluation_made_again_counts_once(tmp_path, environment):
    def row(step, split, loss_sum):
        return EvalRow(step=step, split=split, unit="a", loss_sum=loss_sum, count=2)

    with RunWriter.create(tmp_path / "run", Config(), environment) as writer:
        for rows in (
            [row(1, "validation", 1)],
            [row(2, "validation", 2)],
            [row(2, "test", 3)],
            [row(2, "validation", 4)],
        ):
            writer.evaluation(rows, {"loss": rows[0].loss_sum / 2})
    run = read_run(tmp_path / "run")
    assert run.evals["loss_sum"].to_pylist() == [1.0, 3.0, 4.0]
    assert [own.metrics["loss"] for own in run.evaluations] == [0.5, 1.5, 2.0]


@pytest.mark.parametrize("order", [*itertools.permutations([(1, "validation"), (2, "test"), (2, "validation")])])
def test_evaluations_of_other_steps_and_splits_stay_in_whatever_order_they_come(tmp_path, environment, order):
    with RunWriter.create(tmp_path / "run", Config(), environment) as writer:
        for step, split in (*order, order[-1]):
            unit = EvalRow(step=step, split=split, unit="a", loss_sum=1.0, count=2)
            writer.evaluation([unit], {"loss": 0.5})
    run = read_run(tmp_path / "run")
    assert [(own.step, own.split) for own in run.evaluations] == list(order)
    assert [(row["step"], row["split"]) for row in run.evals.to_pylist()] == list(order)


def test_no_result_means_unfinished(make_run):
    assert read_run(make_run("run", is_finished=False)).result is None


def _resume(folder, environment, step):
    writer = RunWriter.resume(folder, SeedOnly(), environment)
    writer.truncate_after(step)
    return writer


@pytest.mark.parametrize("kept", [0, 2, 3])
def test_resuming_drops_what_the_checkpoint_does_not_know(make_run, step_row, environment, kept):
    folder = make_run("run", steps=5, is_finished=False)
    with _resume(folder, environment, kept) as writer:
        writer.step(step_row(kept + 1))
    run = read_run(folder)
    assert run.steps["step"].tolist() == list(range(1, kept + 2))
    assert set(run.evals["step"].to_pylist()) == {2} - set(range(kept + 1, 3))
    assert [row.step for row in run.evaluations] == [2][: kept // 2]


def test_a_run_resumed_is_byte_for_byte_the_run_that_was_not(make_run, step_row, environment):
    whole = make_run("whole", steps=5, is_finished=False)
    cut = make_run("cut", steps=5, is_finished=False)
    last = read_run(cut).evaluations[-1]
    with _resume(cut, environment, 3) as writer:
        for step in (4, 5):
            writer.step(step_row(step))
            if step == last.step:
                unit = EvalRow(step=step, split=last.split, unit="a", loss_sum=1.0, count=1)
                writer.evaluation([unit], last.metrics)
    for name in ("metrics.jsonl", "evaluations.jsonl", "env.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_kill_at_any_byte_of_the_last_line_loses_that_line_alone(make_run, step_row, environment):
    folder = make_run("run", steps=3, is_finished=False)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    two = whole[: whole[:-1].rfind(b"\n") + 1]
    for end in range(len(two), len(whole)):
        metrics.write_bytes(whole[:end])
        assert read_run(folder).steps["step"].tolist() == [1, 2]
        with _resume(folder, environment, 2) as writer:
            writer.step(step_row(3))
        assert metrics.read_bytes() == whole


def test_a_kill_at_any_byte_of_an_evaluation_loses_that_evaluation_alone(make_run, environment):
    folder = make_run("run", steps=4, is_finished=False)
    path = folder / "evaluations.jsonl"
    whole = path.read_bytes()
    first = whole[: whole[:-1].rfind(b"\n") + 1]
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end])
        assert [row.step for row in read_run(folder).evaluations] == [2]
        with _resume(folder, environment, 3):
            assert path.read_bytes() == first


def test_a_run_that_had_no_evaluation_goes_on_without_a_file_of_them(make_run, environment):
    folder = make_run("run", steps=4, is_finished=False)
    for name in ("evaluations.jsonl", "evals.parquet"):
        (folder / name).unlink()
    before = sorted(path.name for path in folder.iterdir())
    _resume(folder, environment, 3).close()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_run_that_was_begun_before_there_were_evaluations_goes_on_without(make_run, environment):
    """Of a file that lacks the first of them a curve would begin late."""
    folder = make_run("run", steps=4, is_finished=False)
    (folder / "evaluations.jsonl").unlink()
    row = EvalRow(step=4, split="validation", unit="a", loss_sum=1.0, count=2)
    with _resume(folder, environment, 3) as writer:
        writer.evaluation([row], {"loss": 0.5})
    run = read_run(folder)
    assert (run.evaluations, sorted(set(run.evals["step"].to_pylist()))) == ([], [2, 4])
    with _resume(folder, environment, 1) as writer:  # before the first evaluation there is none that it would lack
        writer.evaluation([row], {"loss": 0.5})
    assert [own.step for own in read_run(folder).evaluations] == [4]


def test_a_record_with_a_hole_is_refused(make_run, environment):
    folder = make_run("run", steps=3, is_finished=False)
    with RunWriter.resume(folder, SeedOnly(), environment) as writer, pytest.raises(ConfigError, match="step 4"):
        writer.truncate_after(4)
    assert read_run(folder).steps["step"].tolist() == [1, 2, 3]


def test_a_run_that_moves_keeps_every_environment(make_run, environment):
    folder = make_run("run", steps=2, is_finished=False)
    elsewhere = environment.model_copy(update={"cpu": "another CPU"})
    for place in (elsewhere, elsewhere, environment):
        _resume(folder, place, 2).close()
    now = read_run(folder).environment
    assert (now.cpu, [before.cpu for before in now.earlier]) == ("a CPU", ["a CPU", "another CPU"])


@pytest.mark.parametrize(
    ("lying", "message"),
    [
        (["thesis.tex"], r"not empty \(thesis.tex\); it is not a run folder\. Choose another --out"),
        (["config.json", "env.json"], r"unfinished run\. Continue that run with --resume"),
        (["config.json", "result.json"], "a run that has ended"),
        (list("abcdef"), r"\(a, b, c, d and 2 more\)"),
    ],
)
def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, environment, lying, message):
    for name in lying:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=message):
        RunWriter.create(tmp_path, Config(), environment)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(lying)


def test_a_run_killed_before_it_began_may_begin(tmp_path, environment):
    for name in (".lock", "env.json", ".partial-config.json-12345678"):
        (tmp_path / name).write_text("")
    RunWriter.create(tmp_path, Config(), environment).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".lock", "config.json", "env.json", "metrics.jsonl",
    ]  # fmt: skip


def test_there_must_be_something_to_resume(make_run, tmp_path, environment):
    with pytest.raises(ConfigError, match=r"no run to resume\. Start a new run without --resume"):
        RunWriter.resume(tmp_path / "nowhere", SeedOnly(), environment)
    with pytest.raises(ConfigError, match="has ended"):
        RunWriter.resume(make_run("run"), SeedOnly(), environment)


def test_a_run_begun_anew_keeps_what_it_had_recorded_as_a_run_of_its_own(make_run, step_row, environment, caplog):
    folder = make_run("run", is_finished=False)
    aside = folder / "discarded-1"
    before = (folder / "metrics.jsonl").read_bytes()
    elsewhere = environment.model_copy(update={"cpu": "another CPU"})
    with RunWriter.restart(folder, SeedOnly(seed=8), elsewhere) as writer:
        writer.truncate_after(0)
        writer.step(step_row(1))
    assert (
        f"{folder}: starts again from the beginning; its earlier 4 steps and 2 evaluations are kept in {aside}"
        in caplog.text
    )
    now, kept = read_run(folder), read_run(aside)
    assert (now.config, now.environment, now.steps["step"].tolist()) == ({"seed": 8}, elsewhere, [1])
    assert (now.evaluations, now.evals) == ([], None)
    assert (kept.config, kept.environment, kept.evals.num_rows) == ({"seed": 7}, environment, 4)
    assert (aside / "metrics.jsonl").read_bytes() == before


def test_a_run_that_recorded_nothing_is_begun_anew_without_a_word(make_run, environment, caplog):
    folder = make_run("run", steps=0, is_finished=False)
    (folder / "metrics.jsonl").unlink()
    RunWriter.restart(folder, SeedOnly(), environment).close()
    assert caplog.text == ""
    assert not (folder / "discarded-1").exists()


def test_two_writers_are_one_too_many(tmp_path, make_run, environment):
    folder = make_run("run", steps=2, is_finished=False)
    with RunWriter.resume(folder, SeedOnly(), environment), pytest.raises(ConfigError, match="another process"):
        RunWriter.resume(folder, SeedOnly(), environment)
    RunWriter.resume(folder, SeedOnly(), environment).close()


_HOLD = """
import sys, time
from pathlib import Path
from llmeff.record.writer import RunWriter
writer = RunWriter(Path(sys.argv[1]))
sys.stdout.write("held"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_killed_process_lets_go(make_run, environment):
    folder = make_run("run", steps=2, is_finished=False)
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b"held"
        with pytest.raises(ConfigError, match="another process"):
            RunWriter.resume(folder, SeedOnly(), environment)
        os.kill(process.pid, signal.SIGKILL)
    RunWriter.resume(folder, SeedOnly(), environment).close()


def test_a_full_disk_costs_no_row(tmp_path, step_row, environment, monkeypatch):
    folder = tmp_path / "run"
    with RunWriter.create(folder, Config(), environment) as writer:
        writer.step(step_row(1))

        class Full:
            """The file, on a disk with room for ten more bytes."""

            def __init__(self, file):
                self.file, self.room = file, 10

            def write(self, content):
                if not self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written, self.room = self.file.write(content[: self.room]), 0
                return written

            def __getattr__(self, name):
                return getattr(self.file, name)

        file = writer._metrics
        writer._metrics = Full(file)
        with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written \(No space left.*--resume"):
            writer.step(step_row(2))
        writer._metrics = file
        assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == 1
        writer.step(step_row(2))
    assert read_run(folder).steps["step"].tolist() == [1, 2]


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run"])
def test_an_unwritable_folder_is_one_clear_error(out, environment):
    with pytest.raises(ConfigError, match=f"{out}: cannot be written"):
        RunWriter.create(Path(out), Config(), environment)
