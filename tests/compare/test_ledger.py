import json
from dataclasses import replace

import pytest

from llmeff.compare.ledger import (
    LEDGER,
    PLACE,
    RUNS,
    SWEEP,
    entry_of,
    loss_at,
    read_entries,
    read_facts,
    read_ledger,
    steps_to,
    write_ledger,
)
from llmeff.compare.verdict import judge
from llmeff.core.config import ConfigError
from llmeff.record.reader import read_run


def test_a_ledger_gives_back_what_was_put_in(tmp_path, study):
    study[0] = replace(study[0], status="diverged", loss=None, trial={"optim.lr": 1e-3}, cell={"train.batch": 8})
    write_ledger(tmp_path / LEDGER, study, {"command": "llmeff sweep"})
    assert read_ledger(tmp_path / LEDGER) == study
    assert read_facts(tmp_path / LEDGER) == {"command": "llmeff sweep"}
    assert read_entries([tmp_path / LEDGER]) == study


def test_an_entry_of_a_run_folder(make_run):
    entry = entry_of(read_run(make_run("done", steps=4)), arm="mine")
    assert (entry.name, entry.arm, entry.status, entry.steps, entry.items) == ("done", "mine", "finished", 4, 256)
    assert (entry.loss, entry.metrics["bits_per_byte"]) == (2.5, 1.75)
    # documents of 1 and 3 items: (10 + 30) / step / 4
    assert dict(zip(entry.curve_steps, entry.curve_losses, strict=True)) == {2: 5.0, 4: 2.5}
    assert entry.measured["parameters"] == 1000


def test_an_unfinished_run_has_an_entry_too(make_run):
    entry = entry_of(read_run(make_run("cut", steps=3, is_finished=False)))
    assert (entry.status, entry.steps, entry.loss, entry.is_done) == ("unfinished", 3, None, False)


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
    assert loss_at(run, 15) == 2.5
    assert (loss_at(run, 9), loss_at(run, 31)) == (None, None)
    assert (steps_to(run, 2.5), steps_to(run, 2.0), steps_to(run, 0.5)) == (15.0, 20.0, None)
    assert steps_to(run, 3.5) == 10.0


def test_a_target_counts_when_it_is_first_reached(entry):
    run = entry("a", 0, curve_steps=(10, 20, 30, 40), curve_losses=(3.0, 1.9, 2.2, 1.8), steps=40)
    assert steps_to(run, 2.0) == pytest.approx(10 + 10 * 1.0 / 1.1)


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
