import json
import subprocess
import sys

import pytest

from llmeff.core.config import ConfigError
from llmeff.record.reader import final_loss, read_run, throughput


def test_a_folder_that_is_no_run_says_so(tmp_path, make_run):
    make_run("first")
    with pytest.raises(ConfigError, match=r"is no run folder.*There are runs in it: first"):
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "line 2 is no row"),
        (b"\0\0\0\0\n", "line 2 is no row"),
        (b'{"schema_version":1,"step":2}\n', "line 2 is no row.*loss"),
        (b"[1]\n", "line 2 is no row"),
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
        (b'{"schema_version":2}\n', "line 2: its schema_version is 2"),
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
    with pytest.raises(ConfigError, match=f"{name}: its schema_version is 2, this llmeff reads 1"):
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
