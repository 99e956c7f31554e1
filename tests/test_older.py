"""Runs, sweeps, ledgers and configs that version 0.1.0 wrote (commit 48abdd6) are read, compared and continued.

`older/` holds one of each kind. Its `run.toml` and `sweep.toml` made the folders beside them. Pictures, locks, logs and the
states and models of the sweep's runs were left out.
"""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from llmeff.cli import main
from llmeff.record.reader import read_run

OLDER = Path(__file__).parent / "older"


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A copy of the folder, as the working folder."""
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    return tmp_path / "older"


def rows(text):
    """The rows of a table in CSV, without the words by which a comparison is called."""
    return [{name: value for name, value in row.items() if name != "call"} for row in csv.DictReader(io.StringIO(text))]


def printed(capsys, *arguments):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("study", ["sweep", "sweep/ledger.parquet"])
def test_a_study_is_compared_as_it_was(older, capsys, study):
    now = rows(printed(capsys, "compare", study, "--format", "csv"))
    then = rows((older / "compared.csv").read_text(encoding="utf-8"))
    assert [row.keys() for row in now] == [row.keys() for row in then]
    for new, old in zip(now, then, strict=True):
        for name, value in old.items():
            if name in ("quantity", "arm", "baseline", "cell", "method") or not value:
                assert new[name] == value
            else:
                assert float(new[name]) == pytest.approx(float(value), rel=1e-9), (name, old)


def test_a_sweep_has_nothing_left_to_run(older, capsys):
    before = {path: path.read_bytes() for path in (older / "sweep" / "runs").rglob("result.json")}
    assert main(["sweep", "--config", "sweep.toml", "--out", "sweep", "--quiet"]) == 0
    assert len(before) == 6
    assert {path: path.read_bytes() for path in (older / "sweep" / "runs").rglob("result.json")} == before


@pytest.mark.parametrize("name", ["text_run", "image_run"])
def test_a_run_is_shown(older, capsys, name):
    (row,) = rows(printed(capsys, "compare", name, "--format", "csv"))
    result = json.loads((older / name / "result.json").read_text(encoding="utf-8"))
    assert row["status"] == "finished"
    assert int(row["parameters"]) == result["measured"]["parameters"]


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(older):
    folder = older / "text_run"
    steps, evaluations = read_run(folder).steps, read_run(folder).evaluations
    for name in ("result.json", "evals.parquet"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert main(["train", "--resume", "--out", "text_run", "--quiet"]) == 0
    again = read_run(folder)
    assert list(again.steps["step"]) == list(steps["step"]) == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert list(again.steps[name]) == pytest.approx(list(steps[name]), rel=1e-5)
    for new, old in zip(again.evaluations, evaluations, strict=True):
        assert new.metrics == pytest.approx(old.metrics, rel=1e-5)


def test_models_are_used(older, capsys):
    from PIL import Image

    (older / "photos").mkdir()
    Image.new("RGB", (40, 36), (90, 120, 40)).save(older / "photos" / "one.png")
    assert main(["segment", "image_run", "photos", "-o", "out"]) == 0
    assert (older / "out" / "one.mask.png").is_file()
    assert main(["context", "text_run", "--out", "context.json"]) == 0
    assert json.loads((older / "context.json").read_text(encoding="utf-8"))


def test_configs_are_read(older, capsys):
    given = json.loads(printed(capsys, "train", "--config", "text_run/config.json", "--print-config"))
    assert given["model"]["vocab_size"] == 257
    assert json.loads(printed(capsys, "train", "--config", "run.toml", "--print-config"))["model"]["width"] == 8
    assert "2 tuning runs and 4 final runs" in printed(capsys, "sweep", "--config", "sweep.toml", "--plan")
    assert "2 tuning runs and 4 final runs" in printed(capsys, "sweep", "--config", "sweep/sweep.json", "--plan")
