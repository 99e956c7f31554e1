import json
import math
import subprocess
import sys

import pytest

from llmeff.core.config import ConfigError
from llmeff.record.reader import final_loss, model_folder, progress, read_run, recorded, throughput


def test_a_folder_that_is_no_run_says_so(tmp_path, make_run):
    make_run("first")
    with pytest.raises(ConfigError, match=r"is not a run folder.*It contains runs: first"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_a_run_before_its_first_step_is_empty(make_run):
    run = read_run(make_run("run", steps=0, is_finished=False))
    assert {len(column) for column in run.steps.values()} == {0}
    assert run.evals is None
    assert run.evaluations == []
    assert final_loss(run.steps) is None
    assert throughput(run.steps) is None


def test_means_and_quartiles(make_run):
    steps = read_run(make_run("run", steps=60)).steps
    assert final_loss(steps) == pytest.approx(sum(4 / step for step in range(11, 61)) / 50)
    speed = throughput(steps)
    # 103, 104, ..., 160: 57 steps of 1 between the first and the last
    assert (speed.lower, speed.median, speed.upper) == (103 + 57 / 4, 103 + 57 / 2, 103 + 57 * 3 / 4)


def test_a_row_may_hold_more_than_is_read(make_run):
    folder = make_run("run", steps=2)
    rows = [json.loads(line) | {"later": "x"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = read_run(folder).steps
    assert steps["step"].tolist() == [1, 2]
    assert "later" not in steps


class TestProgress:
    def told(self, folder):
        """Steps, items, loss and speed."""
        return tuple(vars(progress(read_run(folder))).values())

    def test_before_the_first_step_there_is_none(self, make_run):
        assert self.told(make_run("run", steps=0, is_finished=False)) == (0, 0, None, None)

    def test_during_a_run_it_is_what_the_rows_say(self, make_run):
        loss, speed = (4 + 2 + 4 / 3 + 1 + 4 / 5) / 5, (103 + 104 + 105) / 3
        assert self.told(make_run("run", steps=5, is_finished=False)) == (5, 5 * 64, pytest.approx(loss), speed)

    def test_of_a_run_that_has_ended_it_is_what_the_result_says(self, make_run, result):
        folder = make_run("run")
        (folder / "metrics.jsonl").unlink()
        assert self.told(folder) == (4, 256, result.train_loss, 103.5)
        diverged = result.model_copy(update={"train_loss": math.nan, "items_per_s": None})
        (folder / "result.json").write_text(diverged.model_dump_json())
        assert self.told(folder) == (4, 256, None, None)


@pytest.mark.parametrize(
    ("steps", "kept", "words"),
    [
        (4, "metrics.jsonl evaluations.jsonl evals.parquet", "4 steps and 2 evaluations"),
        (2, "evaluations.jsonl evals.parquet", "1 evaluation and the evaluations in evals.parquet"),
        (1, "metrics.jsonl", "1 step"),
        (2, "evals.parquet", "the evaluations in evals.parquet"),
        (2, "", ""),
        (0, "metrics.jsonl", ""),
    ],
)
def test_what_a_run_has_recorded_is_counted_in_words(make_run, steps, kept, words):
    folder = make_run("run", steps=steps, is_finished=False)
    for name in {"metrics.jsonl", "evaluations.jsonl", "evals.parquet"} - set(kept.split()):
        (folder / name).unlink(missing_ok=True)
    assert recorded(folder) == words


def test_an_empty_file_records_no_evaluation(make_run):
    folder = make_run("run", steps=0, is_finished=False)
    (folder / "evals.parquet").touch()
    assert recorded(folder) == ""


def test_a_model_lies_where_it_was_written_at_the_end(make_run, result):
    folder = make_run("run", is_finished=False)
    there = r"has no model, which a run writes when it ends\. The folder has \.lock, config\.json, env\.json, eval"
    with pytest.raises(ConfigError, match=f"the run is unfinished at step 4 and {there}"):
        model_folder(read_run(folder))
    (folder / "result.json").write_text(result.model_copy(update={"status": "diverged"}).model_dump_json())
    with pytest.raises(ConfigError, match=f"the run is diverged and {there}"):
        model_folder(read_run(folder))
    (folder / "model").mkdir()
    assert model_folder(read_run(folder)) == folder / "model"


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[1]", b"\xff"])
def test_a_config_that_cannot_be_read_is_one_clear_error(make_run, content):
    folder = make_run("run", steps=1)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        _ = read_run(folder).config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "line 2 is not a valid row of a step"),
        (b"\0\0\0\0\n", "line 2 is not a valid row of a step"),
        (b'{"schema_version":1,"step":2}\n', "line 2 is not a valid row of a step.*loss"),
        (b"[1]\n", "line 2 is not a valid row of a step"),
    ],
)
def test_a_damaged_line_is_named(make_run, line, message):
    folder = make_run("run", steps=1, is_finished=False)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=message):
        _ = read_run(folder).steps


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "line 2: does not parse"),
        (b"\0\0\0\0\n", "line 2: does not parse"),
        (b"[1]\n", "line 2: does not parse"),
        (b'{"schema_version":1,"step":2,"split":"test"}\n', "line 2: metrics: Field required"),
        (b'{"schema_version":2}\n', "line 2: has schema_version 2"),
    ],
)
def test_a_damaged_evaluation_is_named(make_run, line, message):
    folder = make_run("run", steps=2, is_finished=False)
    with (folder / "evaluations.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=rf"evaluations\.jsonl: {message}"):
        _ = read_run(folder).evaluations


@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", "result.json"])
def test_a_file_of_another_version_is_refused(make_run, name):
    folder = make_run("run", steps=1)
    data = json.loads((folder / name).read_text()) | {"schema_version": 2}
    (folder / name).write_text(json.dumps(data) + "\n")
    run = read_run(folder)
    with pytest.raises(ConfigError, match=f"{name}: has schema_version 2, but this version of llmeff reads only 1"):
        _ = run.steps, run.environment, run.result


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}'])
def test_a_damaged_result_is_one_clear_error(make_run, content):
    folder = make_run("run", steps=1)
    (folder / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=r"result\.json: "):
        _ = read_run(folder).result


def test_damaged_evaluations_are_one_clear_error(make_run):
    folder = make_run("run", steps=2)
    (folder / "evals.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"evals\.parquet: cannot be read"):
        _ = read_run(folder).evals


_NO_TORCH = """
import sys
import llmeff.compare.plots, llmeff.compare.table, llmeff.cost, llmeff.record.reader, llmeff.record.schema
sys.exit(", ".join({"torch", "transformers", "accelerate", "matplotlib"} & set(sys.modules)) or 0)
"""


def test_records_are_read_and_compared_without_torch():
    done = subprocess.run([sys.executable, "-c", _NO_TORCH], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
