import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmeff.compare.ledger import (
    JOB_FILE,
    LEDGER,
    LOSS,
    RUNS,
    SWEEP,
    Entry,
    Metric,
    entry_of,
    find_metric,
    known_metrics,
    label_arms,
    read_entries,
    read_facts,
    read_ledger,
    write_ledger,
)
from llmeff.compare.quantities import steps_to, value_at
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import as_dict
from llmeff.core.config import ConfigError
from llmeff.record.reader import read_run
from llmeff.record.schema import ENVIRONMENT

RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"


def test_a_ledger_gives_back_what_was_put_in(tmp_path, study, with_gain):
    study = [with_gain(run) for run in study]
    study[0] = replace(study[0], status="diverged", loss=None, trial={"optim.lr": 1e-3}, cell={"train.batch": 8})
    write_ledger(tmp_path / LEDGER, study, {"command": "llmeff sweep"})
    assert read_ledger(tmp_path / LEDGER) == study
    assert read_facts(tmp_path / LEDGER) == {"command": "llmeff sweep"}
    assert read_entries([tmp_path / LEDGER]) == study


def without_goals(path):
    """The ledger as it was written before runs had metric_directions."""
    pq.write_table(pq.read_table(path).drop_columns(["curves", "metric_directions"]), path)


def test_a_ledger_without_goals_is_compared_as_one_that_says_those_of_text(tmp_path, study):
    text = [
        replace(
            run, metrics=run.metrics | {"bits_per_byte": run.loss / 2}, metric_directions=dict.fromkeys(GOALS, "lower")
        )
        for run in study
    ]
    write_ledger(tmp_path / LEDGER, text, {"sweep": {"target": 2.0}})
    without_goals(tmp_path / LEDGER)
    older = read_ledger(tmp_path / LEDGER)
    assert older == [replace(run, metric_directions={}) for run in text]
    assert read_facts(tmp_path / LEDGER) == {"sweep": {"target": 2.0}}
    assert as_dict(judge(older)) == as_dict(judge(text))
    assert "bits_per_byte" in judge(older).groups[0].table


GOALS = ("loss", "bits_per_byte")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.parquet")), ids=lambda path: path.stem)
def test_a_ledger_that_was_committed_is_read(path):
    entries = read_ledger(path)
    assert all(len(run.curve_losses) == len(run.curve_steps) for run in entries)
    assert all(run.curves.keys() == run.metric_directions.keys() - {"loss"} for run in entries)
    if not any(run.metric_directions for run in entries):  # from before there were any
        assert list(known_metrics(run.metric_directions for run in entries)) == ["loss", "bits_per_byte"]


def test_an_entry_of_a_run_folder(make_run):
    entry = entry_of(read_run(make_run("done", steps=4)), arm="mine")
    assert (entry.name, entry.arm, entry.status, entry.steps, entry.items) == ("done", "mine", "finished", 4, 256)
    assert (entry.loss, entry.metrics["bits_per_byte"]) == (2.5, 1.75)
    # documents of 1 and 3 items: (10 + 30) / step / 4
    assert dict(zip(entry.curve_steps, entry.curve_losses, strict=True)) == {2: 5.0, 4: 2.5}
    assert entry.measured["parameters"] == 1000
    assert entry.metric_directions == {"loss": "lower", "bits_per_byte": "lower", "accuracy": "higher"}
    assert entry.curves == {"bits_per_byte": (3.5, 1.75), "accuracy": (0.2, 0.4)}
    assert (entry.final("loss"), entry.final("accuracy"), entry.final("recall")) == (2.5, 0.4, None)
    assert (entry.curve("loss"), entry.curve("accuracy"), entry.curve("recall")) == ((5.0, 2.5), (0.2, 0.4), ())


def test_an_entry_has_all_that_a_run_folder_tells(make_run):
    folder = make_run("done", steps=4)
    config = {"name": "own", "seed": 3, "evaluation": {"split": "test"}}
    (folder / "config.json").write_text(json.dumps(config))
    environment = json.loads((folder / ENVIRONMENT).read_text())
    (folder / ENVIRONMENT).write_text(json.dumps(environment | {"commit": "c0ffee"}))
    result = json.loads((folder / "result.json").read_text())
    timings = {"startup_s": 1.0, "train_s": 2.0, "data_s": 0.25}
    told = result | {"timings": timings, "energy_j": 7.0, "diagnosis": "why", "status": "diverged"}
    (folder / "result.json").write_text(json.dumps(told))
    assert entry_of(read_run(folder)) == Entry(
        name="done", arm="own", status="diverged", diagnosis="why", seed=3, steps=4, items=256, item="token",
        parameters=1000, data_sha256="0" * 64, split="test", train_loss=pytest.approx((4 + 2 + 4 / 3 + 1) / 4),
        metric_directions=result["metric_directions"], items_per_s=103.5, train_s=2.25, energy_j=7.0, peak_bytes=100.0 * 2**20,
        predicted=result["predicted"], measured=result["measured"], device="a CPU", commit="c0ffee", config=config,
    )  # fmt: skip
    (folder / ENVIRONMENT).write_text(json.dumps(environment | {"device": "a GPU"}))
    assert entry_of(read_run(folder)).device == "a GPU"
    (folder / "config.json").write_text("{}")
    entry = entry_of(read_run(folder))
    assert (entry.arm, entry.seed, entry.split, entry.loss) == ("done", 0, "validation", 2.5)


def test_flops_of_a_step_are_measured_or_foreseen_on_every_rank(entry):
    shared = {"config": {"parallel": {"ranks": 4}}}
    assert entry("a", 0, measured={"executed_flops": 3.0}, predicted={"executed_flops": 2.0}, **shared).step_flops == 12
    assert entry("a", 0, measured={}, predicted={"executed_flops": 2.0}, config={}).step_flops == 2
    assert entry("a", 0, measured={}, predicted={}).step_flops is None
    assert (entry("a", 0).items_per_step, entry("a", 0, steps=0).items_per_step) == (64, None)


def test_a_value_that_rounding_puts_behind_the_last_evaluation_is_that_of_it(entry):
    run = entry("a", 0, curve_steps=(10, 20), curve_losses=(3.0, 2.0))
    assert value_at(run, 20 * (1 + 1e-12)) == 2.0
    assert value_at(run, 20 * (1 + 1e-6)) is None
    assert (value_at(run, 10), value_at(entry("a", 0, curve_steps=(), curve_losses=()), 10)) == (3.0, None)


def test_runs_of_one_config_and_several_names_are_called_by_what_sets_them_apart(entry):
    def run(name, seed, **config):
        return entry(name, seed, config={"name": name, "seed": seed, "task": "text"} | config)

    runs = [
        run("mine", 0, lr=0.1, kind={"a": 1}),
        run("yours", 1, lr=0.1, kind={"a": 1}),
        run("mine", 0, lr=0.2, kind={}),
    ]
    expected = ["kind.a=1, lr=0.1"] * 2 + ["kind={}, lr=0.2"]
    assert [own.arm for own in label_arms(runs)] == expected
    assert [own.arm for own in label_arms(runs[:2])] == ["run", "run"]  # which nothing sets apart
    assert [own.arm for own in label_arms([run("own-s12", 0), run("own-s3", 1)])] == ["own", "own"]


def test_a_place_that_cannot_be_read_is_one_error(tmp_path):
    (tmp_path / RUNS).mkdir()
    (tmp_path / SWEEP).write_text("{}")
    for content in ("{", "[]", '{"name": "a"}'):
        (tmp_path / RUNS / f"seed-0{JOB_FILE}").write_text(content)
        with pytest.raises(ConfigError, match=f"seed-0{JOB_FILE}: cannot be read; remove it"):
            read_entries([tmp_path])


def test_a_ledger_of_another_version_is_refused_by_its_number(tmp_path, study):
    write_ledger(tmp_path / LEDGER, study)
    table = pq.read_table(tmp_path / LEDGER)
    assert table.schema.metadata[b"ledger_version"] == b"1"
    pq.write_table(table.replace_schema_metadata({"ledger_version": "2"}), tmp_path / LEDGER)
    with pytest.raises(ConfigError, match="the file has ledger_version 2, but this version of llmeff reads only 1"):
        read_ledger(tmp_path / LEDGER)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / LEDGER)
    with pytest.raises(ConfigError, match="the file has ledger_version none"):
        read_facts(tmp_path / LEDGER)


def test_metrics_that_are_no_goals_or_that_an_evaluation_lacks_have_no_curve(make_run):
    folder = make_run("run")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(
        json.dumps(result | {"metric_directions": {"loss": "lower", "accuracy": "higher"}})
    )
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
    assert (entry.metric_directions, entry.curves) == ({}, {"bits_per_byte": (3.5,), "accuracy": (0.2,)})


def test_a_sweeps_folder_is_read_in_its_own_order_with_what_failed(make_run, tmp_path):
    folder = tmp_path / "sweep"
    (folder / RUNS / "b").mkdir(parents=True)
    (folder / SWEEP).write_text("{}")
    make_run("done", steps=4).rename(folder / RUNS / "b" / "seed-0")
    place = {"name": "b/seed-0", "arm": "b", "cell": {}, "factors": {}, "phase": "final", "trial": {}}
    (folder / RUNS / "b" / f"seed-0{JOB_FILE}").write_text(json.dumps(place | {"order": 2}))
    failed = place | {"name": "b/seed-1", "order": 1, "failure": "out of memory"}
    (folder / RUNS / "b" / f"seed-1{JOB_FILE}").write_text(json.dumps(failed))
    first, second = read_entries([folder])
    nothing = {"seed": 0, "steps": 0, "items": 0, "device": "none"}
    assert first == Entry(name="b/seed-1", arm="b", status="failed", diagnosis="out of memory", **nothing)
    assert (second.name, second.status, second.loss) == ("b/seed-0", "finished", 2.5)


def test_all_paths_that_are_nothing_are_named_at_once(tmp_path, make_run):
    (tmp_path / "text").write_text("no ledger")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / SWEEP).write_text("{}")
    with pytest.raises(ConfigError) as raised:
        read_entries([make_run("done"), tmp_path / "text", tmp_path / "begun", tmp_path / "nowhere"])
    text = str(raised.value)
    for part in (
        "text: is neither a ledger",
        "begun: this sweep has no runs yet",
        "nowhere: there is no such folder",
    ):
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
        (folder / RUNS / arm / f"seed-0{JOB_FILE}").write_text(json.dumps(place | {"order": order}))
    assert [entry.arm for entry in read_entries([folder])] == ["gpt-s1", "gpt-s2"]
    assert set(judge(read_entries([folder])).groups[0].arms) == {"gpt-s1", "gpt-s2"}
