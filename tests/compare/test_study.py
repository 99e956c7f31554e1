"""`llmeff compare`, as it is called."""

import json
import time

import pytest

from llmeff.cli import main
from llmeff.compare.ledger import LEDGER, write_ledger
from llmeff.compare.study import read_step_times
from llmeff.core.config import ConfigError


def test_a_ledger_is_compared_in_every_form(study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ledger(tmp_path / LEDGER, study, {"command": "llmeff sweep --recipe it", "sweep": {"baseline": "same"}})
    for form, words in (("terminal", "Against same"), ("markdown", "**Against same"), ("csv", "cell,quantity,arm")):
        assert main(["compare", LEDGER, f"--format={form}", "--html=it.html", "--plot=it.png"]) == 0
        assert words in capsys.readouterr().out
    assert main(["compare", LEDGER, "--format=json", "--baseline=base", "--target=2.0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "llmeff sweep --recipe it"
    assert found["targets"] == {"": 2.0}
    assert {row["baseline"] for row in found["table"]} == {"base"}
    assert (tmp_path / "it.html").exists()
    assert (tmp_path / "it.png").exists()


def test_plain_runs_of_different_kinds_stay_a_list(make_run, capsys):
    assert main(["compare", str(make_run("one")), str(make_run("two", steps=3))]) == 0
    assert "One run each" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "{}", '{"generations": []}', '{"generations": [[]]}', '{"generations": 3}'])
def test_a_file_that_holds_no_step_times_is_refused(tmp_path, content):
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(ConfigError, match="is no file of step times"):
        read_step_times(tmp_path / "times.json")


@pytest.mark.slow
def test_many_long_runs_are_compared_in_seconds(make_run, step_row, tmp_path, capsys):
    first = make_run("run-0")
    rows = b"".join(step_row(step).model_dump_json().encode() + b"\n" for step in range(1, 5001))
    (first / "metrics.jsonl").write_bytes(rows)
    content = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    for number in range(1, 500):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        for name, own in content.items():
            (folder / name).write_bytes(own)
    began = time.perf_counter()
    assert main(["compare", *(str(tmp_path / f"run-{number}") for number in range(500)), "--format=csv"]) == 0
    took_s = time.perf_counter() - began
    assert capsys.readouterr().out.count("\n") >= 500
    with capsys.disabled():
        print(f"500 runs of 5,000 rows: {took_s:.1f} s")  # noqa: T201
