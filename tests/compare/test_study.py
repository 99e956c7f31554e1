"""`llmeff compare`, as it is called."""

import json
import time
from dataclasses import replace

import pytest

from llmeff.cli import main
from llmeff.compare.ledger import JOB_FILE, LEDGER, RUNS, SWEEP, read_entries, read_ledger, write_ledger
from llmeff.compare.study import is_list, name_of, read_study, write_pictures
from llmeff.compare.timing import TIMING, read_timing, timing_name
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import as_dict
from llmeff.core.config import ConfigError


def test_a_ledger_is_compared_in_every_form(study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ledger(tmp_path / LEDGER, study, {"command": "llmeff sweep --recipe it", "sweep": {"baseline": "same"}})
    for form, words in (("terminal", "Against same"), ("markdown", "**Against same"), ("csv", "cell,quantity,arm")):
        assert main(["compare", LEDGER, f"--format={form}", "--html=it.html", "--plot=it.png"]) == 0
        assert words in capsys.readouterr().out
    assert main(["compare", LEDGER, "--format=json", "--baseline=base", "--target=2.0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == (f"llmeff sweep --recipe it && llmeff compare {LEDGER} --baseline base --target 2.0")
    assert found["targets"] == {"": 2.0}
    assert {row["baseline"] for row in found["table"]} == {"base"}
    assert (tmp_path / "it.html").exists()
    assert (tmp_path / "it.png").exists()


def test_a_study_is_judged_by_its_own_metric_or_by_the_one_that_is_asked_for(
    study, with_gain, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    facts = {"command": "llmeff sweep --recipe it", "sweep": {"metric": "gain", "target": 0.4}}
    write_ledger(tmp_path / LEDGER, [with_gain(run) for run in study], facts)

    def compared(*options):
        assert main(["compare", LEDGER, "--format=json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    own = compared("--html=it.html", "--plot=it.png")
    assert (own["metric"], own["targets"]) == ("gain", {"": 0.4})
    assert own["metric_directions"] == {"gain": "higher", "loss": "lower"}
    assert own["command"] == "llmeff sweep --recipe it"
    assert "higher is better for gain, lower for everything else" in own["notes"]
    assert "steps to gain 0.4000" in (tmp_path / "it.html").read_text()
    other = compared("--metric=loss")
    assert other["metric"] == "loss"
    assert 1.5 < other["targets"][""] < 2.5  # a target of another metric is none
    assert other["command"] == f"llmeff sweep --recipe it && llmeff compare {LEDGER} --metric loss"
    assert compared("--metric=gain")["targets"] == {"": 0.4}
    assert main(["compare", LEDGER, "--metric=gian"]) == 2
    assert (
        "'gian': these runs do not have this metric. Did you mean 'gain'? Known: gain, loss." in capsys.readouterr().err
    )


def test_a_metric_that_is_asked_for_makes_a_comparison_of_plain_runs(make_run, capsys):
    runs = [make_run("one"), make_run("two", scale=2)]
    (runs[1] / "config.json").write_text('{"seed": 7, "name": "two", "width": 8}')
    assert main(["compare", *map(str, runs), "--metric=accuracy"]) == 0
    assert "steps to accuracy 0.4000" in capsys.readouterr().out


def test_plain_runs_of_different_kinds_stay_a_list(make_run, capsys):
    assert main(["compare", str(make_run("one")), str(make_run("two", steps=3))]) == 0
    assert "These are single runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"step_s": 3, "races": []}',
        '{"step_s": {}, "races": [{}]}',
        '{"step_s": {"a": ["x"]}, "races": []}',
    ],
)
def test_a_file_that_holds_no_step_times_is_refused(tmp_path, content):
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a file of step times"):
        read_timing(tmp_path / "times.json")


def race(**changes):
    return {"rounds": 30, "noisy_rounds_dropped": 4, "busy_generations": []} | changes


def test_dropped_rounds_are_said_and_step_times_come_from_those_that_were_kept(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lanes = {"base": [0.1, 0.1, 0.1], "fast": [0.05, 0.05, 0.05], "same": [0.1, 0.1, 0.1]}
    (tmp_path / "timing.json").write_text(json.dumps({"step_s": lanes, "races": [race(), race(busy_generations=[2])]}))
    write_ledger(tmp_path / LEDGER, study, {"timing": read_timing(tmp_path / "timing.json")})
    assert main(["compare", LEDGER, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = {row["arm"]: row for row in found["table"] if row["quantity"] == "step_s"}
    assert times["fast"]["ratio"] == pytest.approx(0.5)
    (note,) = (note for note in found["notes"] if "timing run" in note)
    assert "60 rounds, of which 8 were dropped" in note
    assert "1 generations had too few quiet rounds" in note
    assert main(["compare", LEDGER, "--timing=timing.json", "--format=csv"]) == 0
    assert "8 were dropped" in capsys.readouterr().err


def test_a_lane_that_an_arm_lacks_is_said(study, tmp_path, capsys):
    (tmp_path / "timing.json").write_text(json.dumps({"step_s": {"base": [0.1, 0.1]}, "races": [race()]}))
    write_ledger(tmp_path / LEDGER, study)
    assert main(["compare", str(tmp_path / LEDGER), f"--timing={tmp_path / 'timing.json'}", "--format=json"]) == 0
    assert any("does not include 'fast', 'same'" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_a_ledger_is_compared_as_what_it_was_made_of(study, tmp_path):
    cell = {"train.batch": 8, "model": "llama-1m"}
    entries = [replace(run, cell=cell) for run in study]
    write_ledger(tmp_path / LEDGER, entries)
    lanes = {timing_name(arm, cell): [0.1, 0.2] for arm in ("base", "fast", "same")}
    found = [judge(own, step_times=lanes) for own in (entries, read_ledger(tmp_path / LEDGER))]
    assert as_dict(found[0]) == as_dict(found[1])
    assert list(found[1].groups[0].cell) == ["train.batch", "model"]


def test_plain_runs_that_read_other_data_are_noted(make_run, capsys):
    runs = [make_run("one"), make_run("two", steps=3)]
    result = json.loads((runs[1] / "result.json").read_text())
    (runs[1] / "result.json").write_text(json.dumps(result | {"data": {"sha256": "1" * 64}}))
    for form in ("terminal", "markdown", "json"):
        assert main(["compare", *map(str, runs), f"--format={form}"]) == 0
        assert "read different data" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", *map(str, runs), "--format=csv"]) == 0
    assert "read different data" in capsys.readouterr().err


def test_a_config_that_was_cut_off_is_one_error(make_run, capsys):
    run = make_run("one")
    (run / "config.json").write_text('{"seed": ')
    assert main(["compare", str(run)]) == 2
    assert "config.json: cannot be read" in capsys.readouterr().err


@pytest.fixture
def sweep(make_run, tmp_path):
    """A sweep's folder with two arms of one run each."""
    folder = tmp_path / "sweep"
    for order, arm in enumerate(("first", "second")):
        (folder / RUNS / arm).mkdir(parents=True)
        make_run(arm).rename(folder / RUNS / arm / "seed-0")
        place = {"name": f"{arm}/seed-0", "arm": arm, "cell": {}, "factors": {}, "phase": "final", "trial": {}}
        (folder / RUNS / arm / f"seed-0{JOB_FILE}").write_text(json.dumps(place | {"order": order}))
    told = {"name": "a sweep", "baseline": "second", "metric": "accuracy", "target": 0.3}
    (folder / SWEEP).write_text(json.dumps(told))
    return folder


def test_a_sweeps_folder_says_what_it_is_judged_by_and_has_its_own_step_times(sweep):
    lanes = {"first": [0.2, 0.2], "second": [0.1, 0.1]}
    (sweep / TIMING).write_text(json.dumps({"step_s": lanes, "races": [race()]}))
    found = read_study([sweep])
    (group,) = found.groups
    assert (group.baseline, group.metric.name, group.target) == ("second", "accuracy", 0.3)
    assert group.table["step_s"]["first"].difference.ratio.value == pytest.approx(2.0)
    assert (
        found.notes[0] == "the timing run had 30 rounds, of which 4 were dropped because other processes used the CPU"
    )
    assert found.command == f"llmeff compare {sweep}"
    other = read_study([sweep], metric="loss", baseline="first")
    assert (other.groups[0].metric.name, other.groups[0].baseline) == ("loss", "first")
    assert other.groups[0].target != 0.3
    assert other.command == f"llmeff compare {sweep} --baseline first --metric loss"
    times = sweep.parent / "times.json"
    times.write_text(json.dumps({"step_s": {"first": [0.4], "second": [0.1]}, "races": [race(rounds=1)]}))
    given = read_study([sweep], timing=times, target=0.35, mixed=True)
    assert given.groups[0].table["step_s"]["first"].difference.ratio.value == pytest.approx(4.0)
    assert given.groups[0].target == 0.35
    assert given.command == f"llmeff compare {sweep} --target 0.35 --timing {times} --mixed"
    # of several nothing is said by one
    assert read_study([sweep, sweep.parent / "more"], read_entries([sweep])).groups[0].baseline == "first"


def test_a_sweeps_name_is_that_of_its_study_or_of_its_ledgers_or_of_its_arms(sweep, study, tmp_path):
    entries = read_entries([sweep])
    assert name_of([sweep], entries) == "a sweep"
    write_ledger(sweep / LEDGER, entries, {"sweep": {"name": "another"}})
    assert name_of([sweep], entries) == name_of([sweep / LEDGER], entries) == "another"
    write_ledger(tmp_path / LEDGER, study)
    assert name_of([tmp_path / LEDGER], study) == "base, fast, same"
    assert name_of([sweep, tmp_path / LEDGER], [*entries, *study]) == "first, second, base, fast, same"


def test_runs_of_other_data_are_compared_where_that_is_asked_for(study):
    runs = [replace(run, data_sha256="b" * 64) if run.arm == "fast" else run for run in study]
    with pytest.raises(ConfigError, match="not comparable"):
        read_study([], runs)
    found = read_study([], runs, mixed=True)
    assert any(note.startswith("the runs are compared although they read different data") for note in found.notes)
    assert found.command == "llmeff compare --mixed"


def test_what_is_a_list_and_what_is_a_study(sweep, entry, tmp_path):
    one, two = entry("one", 0), entry("two", 0)
    (tmp_path / LEDGER).write_bytes(b"")
    assert is_list([tmp_path], [one])
    assert is_list([tmp_path, tmp_path], [one, two])
    assert is_list([tmp_path] * 3, [one, one, one])
    assert not is_list([tmp_path] * 3, [one, one, two])
    assert not is_list([sweep], [one, two])
    assert not is_list([tmp_path / LEDGER], [one, two])


def test_each_cell_has_a_picture_of_its_own(study, entry, tmp_path):
    write_pictures(judge(study), tmp_path / "it.png")
    cells = [replace(run, cell={"train.batch": batch}) for batch in (8, 16) for run in study]
    write_pictures(judge(cells), tmp_path / "many.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "it.png", "many-train.batch=16.png", "many-train.batch=8.png",
    ]  # fmt: skip
    once = [replace(run, curve_steps=(0,), curve_losses=(1.0,)) for run in study]
    with pytest.raises(ConfigError, match="nothing to plot, because no finished run has at least two evaluations"):
        write_pictures(judge(once), tmp_path / "none.png")


def test_a_file_of_step_times_that_is_not_there_is_an_error_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"times\.json: cannot be read \(No such file"):
        read_timing(tmp_path / "times.json")


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
