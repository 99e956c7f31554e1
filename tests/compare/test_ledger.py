import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmeff.compare.ledger import (
    LEDGER,
    LOSS,
    PLACE,
    RUNS,
    SWEEP,
    Metric,
    entry_of,
    find_metric,
    known_metrics,
    read_entries,
    read_facts,
    read_ledger,
    steps_to,
    value_at,
    write_ledger,
)
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import as_dict
from llmeff.core.config import ConfigError
from llmeff.record.reader import read_run

RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"


def test_a_ledger_gives_back_what_was_put_in(tmp_path, study, with_gain):
    study = [with_gain(run) for run in study]
    study[0] = replace(study[0], status="diverged", loss=None, trial={"optim.lr": 1e-3}, cell={"train.batch": 8})
    write_ledger(tmp_path / LEDGER, study, {"command": "llmeff sweep"})
    assert read_ledger(tmp_path / LEDGER) == study
    assert read_facts(tmp_path / LEDGER) == {"command": "llmeff sweep"}
    assert read_entries([tmp_path / LEDGER]) == study


def without_goals(path):
    """The ledger as it was written before runs had goals."""
    pq.write_table(pq.read_table(path).drop_columns(["curves", "goals"]), path)


def test_a_ledger_without_goals_is_compared_as_one_that_says_those_of_text(tmp_path, study):
    text = [
        replace(run, metrics=run.metrics | {"bits_per_byte": run.loss / 2}, goals=dict.fromkeys(GOALS, "lower"))
        for run in study
    ]
    write_ledger(tmp_path / LEDGER, text, {"sweep": {"target": 2.0}})
    without_goals(tmp_path / LEDGER)
    older = read_ledger(tmp_path / LEDGER)
    assert older == [replace(run, goals={}) for run in text]
    assert read_facts(tmp_path / LEDGER) == {"sweep": {"target": 2.0}}
    assert as_dict(judge(older)) == as_dict(judge(text))
    assert "bits_per_byte" in judge(older).groups[0].table


GOALS = ("loss", "bits_per_byte")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.parquet")), ids=lambda path: path.stem)
def test_a_ledger_that_was_committed_is_read(path):
    entries = read_ledger(path)
    assert all(len(run.curve_losses) == len(run.curve_steps) for run in entries)
    assert all(run.curves.keys() == run.goals.keys() - {"loss"} for run in entries)
    if not any(run.goals for run in entries):  # from before there were any
        assert list(known_metrics(run.goals for run in entries)) == ["loss", "bits_per_byte"]


def test_an_entry_of_a_run_folder(make_run):
    entry = entry_of(read_run(make_run("done", steps=4)), arm="mine")
    assert (entry.name, entry.arm, entry.status, entry.steps, entry.items) == ("done", "mine", "finished", 4, 256)
    assert (entry.loss, entry.metrics["bits_per_byte"]) == (2.5, 1.75)
    # documents of 1 and 3 items: (10 + 30) / step / 4
    assert dict(zip(entry.curve_steps, entry.curve_losses, strict=True)) == {2: 5.0, 4: 2.5}
    assert entry.measured["parameters"] == 1000
    assert entry.goals == {"loss": "lower", "bits_per_byte": "lower", "accuracy": "higher"}
    assert entry.curves == {"bits_per_byte": (3.5, 1.75), "accuracy": (0.2, 0.4)}
    assert (entry.final("loss"), entry.final("accuracy"), entry.final("recall")) == (2.5, 0.4, None)
    assert (entry.curve("loss"), entry.curve("accuracy"), entry.curve("recall")) == ((5.0, 2.5), (0.2, 0.4), ())


def test_metrics_that_are_no_goals_or_that_an_evaluation_lacks_have_no_curve(make_run):
    folder = make_run("run")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"goals": {"loss": "lower", "accuracy": "higher"}}))
    assert list(entry_of(read_run(folder)).curves) == ["accuracy"]
    first, second = (folder / "evaluations.jsonl").read_text().splitlines()
    (folder / "evaluations.jsonl").write_text(f"{first}\n{second.replace('accuracy', 'recall')}\n")
    entry = entry_of(read_run(folder))
    assert (entry.curves, entry.curve_losses) == ({}, (5.0, 2.5))


def test_the_losses_of_an_older_run_are_those_of_its_units(make_run):
    folder = make_run("run")
    newer = entry_of(read_run(folder))
    (folder / "evaluations.jsonl").unlink()
    older = entry_of(read_run(folder))
    assert (older.curve_steps, older.curve_losses, older.curves) == (newer.curve_steps, newer.curve_losses, {})


def test_an_unfinished_run_has_an_entry_too(make_run):
    entry = entry_of(read_run(make_run("cut", steps=3, is_finished=False)))
    assert (entry.status, entry.steps, entry.loss, entry.is_done) == ("unfinished", 3, None, False)
    assert (entry.goals, entry.curves) == ({}, {"bits_per_byte": (3.5,), "accuracy": (0.2,)})


def test_a_sweeps_folder_is_read_in_its_own_order_with_what_failed(make_run, tmp_path):
    folder = tmp_path / "sweep"
    (folder / RUNS / "b").mkdir(parents=True)
    (folder / SWEEP).write_text("{}")
    make_run("done", steps=4).rename(folder / RUNS / "b" / "seed-0")
    place = {"name": "b/seed-0", "arm": "b", "cell": {}, "factors": {}, "phase": "final", "trial": {}}
    (folder / RUNS / "b" / f"seed-0{PLACE}").write_text(json.dumps(place | {"order": 2}))
    failed = place | {"name": "b/seed-1", "order": 1, "failure": "out of memory"}
    (folder / RUNS / "b" / f"seed-1{PLACE}").write_text(json.dumps(failed))
    first, second = read_entries([folder])
    assert (first.name, first.status, first.diagnosis) == ("b/seed-1", "failed", "out of memory")
    assert (second.name, second.status, second.loss) == ("b/seed-0", "finished", 2.5)


def test_all_paths_that_are_nothing_are_named_at_once(tmp_path, make_run):
    (tmp_path / "text").write_text("no ledger")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / SWEEP).write_text("{}")
    with pytest.raises(ConfigError) as raised:
        read_entries([make_run("done"), tmp_path / "text", tmp_path / "begun", tmp_path / "nowhere"])
    text = str(raised.value)
    for part in ("text: is no ledger", "begun: this sweep has begun no run yet", "nowhere: there is no such folder"):
        assert part in text


def test_losses_are_read_between_evaluations(entry):
    run = entry("a", 0, curve_steps=(10, 20, 30), curve_losses=(3.0, 2.0, 1.0), steps=30)
    assert value_at(run, 15) == 2.5
    assert (value_at(run, 9), value_at(run, 31)) == (None, None)
    assert (steps_to(run, 2.5), steps_to(run, 2.0), steps_to(run, 0.5)) == (15.0, 20.0, None)
    assert steps_to(run, 3.5) == 10.0


def test_a_target_counts_when_it_is_first_reached(entry):
    run = entry("a", 0, curve_steps=(10, 20, 30, 40), curve_losses=(3.0, 1.9, 2.2, 1.8), steps=40)
    assert steps_to(run, 2.0) == pytest.approx(10 + 10 * 1.0 / 1.1)


def test_an_evaluation_that_gave_no_number_is_no_way_to_a_target(entry):
    run = entry("a", 0, curve_steps=(10, 20, 30), curve_losses=(3.0, math.nan, 1.0), steps=30)
    assert steps_to(run, 2.0) == 20.0


ACCURACY = Metric("accuracy", "higher")


def test_of_a_metric_of_which_more_is_better_a_target_is_reached_from_below(entry):
    run = entry(
        "a", 0, curve_steps=(10, 20, 30, 40), curves={"accuracy": (0.1, 0.5, 0.3, 0.7)}, curve_losses=(1.0,) * 4
    )
    assert (value_at(run, 15, ACCURACY), value_at(run, 41, ACCURACY)) == (pytest.approx(0.3), None)
    assert (steps_to(run, 0.1, ACCURACY), steps_to(run, 0.05, ACCURACY)) == (10.0, 10.0)
    assert (steps_to(run, 0.3, ACCURACY), steps_to(run, 0.6, ACCURACY)) == (pytest.approx(15), pytest.approx(37.5))
    assert steps_to(run, 0.8, ACCURACY) is None
    assert (value_at(run, 15, Metric("recall", "higher")), steps_to(run, 0.1, Metric("recall", "higher"))) == (
        None,
        None,
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("loss", "loss"),
        ("bits_per_byte", "bits per byte"),
        ("mean_iou", "mean IoU"),
        ("class_accuracy", "class accuracy"),
        ("boundary_f1", "boundary F1"),
    ],
)
def test_metrics_are_spelled_for_people(name, label):
    assert Metric(name, "higher").label == label


def test_the_loss_can_always_be_judged_by_and_what_cannot_is_one_error():
    known = known_metrics([{}, {"mean_iou": "higher", "loss": "lower"}])
    assert list(known.values()) == [LOSS, Metric("mean_iou", "higher")]
    with pytest.raises(ConfigError, match=r"'mean_iuo': .*Did you mean 'mean_iou'\? Known: loss, mean_iou\.") as raised:
        find_metric("mean_iuo", known)
    assert len(raised.value.problems) == 1


def test_a_sweeps_own_arms_keep_their_names(make_run, tmp_path):
    """An arm may be called as if by a seed, and its runs' configs may be those of another."""
    folder = tmp_path / "sweep"
    (folder / SWEEP).parent.mkdir()
    (folder / SWEEP).write_text("{}")
    for order, arm in enumerate(("gpt-s1", "gpt-s2")):
        (folder / RUNS / arm).mkdir(parents=True)
        make_run(arm).rename(folder / RUNS / arm / "seed-0")
        place = {"name": f"{arm}/seed-0", "arm": arm, "cell": {}, "factors": {}, "phase": "final", "trial": {}}
        (folder / RUNS / arm / f"seed-0{PLACE}").write_text(json.dumps(place | {"order": order}))
    assert [entry.arm for entry in read_entries([folder])] == ["gpt-s1", "gpt-s2"]
    assert set(judge(read_entries([folder])).groups[0].arms) == {"gpt-s1", "gpt-s2"}
