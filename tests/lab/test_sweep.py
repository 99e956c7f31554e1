"""Sweeps: equal budgets, fresh seeds, and the same ledger however often they were stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from llmeff.cli import main
from llmeff.compare.effects import effects
from llmeff.compare.ledger import LEDGER, RUNS, Entry, read_ledger, read_sweep
from llmeff.compare.verdict import judge
from llmeff.config.recipes import SWEEPS
from llmeff.config.sweep import Job, SweepConfig, job_config
from llmeff.core.config import ConfigError, override, validate
from llmeff.lab.jobs import as_begun, best_trial, final_jobs, tuning_jobs
from llmeff.lab.sweep import Sweep, open_sweep, plan_text

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "name": "small",
    "base": {
        "model": {"name": "decoder", "width": 8, "num_layers": 1, "num_heads": 1, "mlp_width": 8},
        "data": {
            "name": "text",
            "source": {"name": "builtin", "max_bytes": 200_000},
            "splits": {"by": "span"},
            "sequence_length": 16,
        },
        "schedule": {"name": "constant"},
        "train": {"steps": 4, "batch": 4},
        "evaluation": {"every": 2, "max_units": 2, "sample_tokens": 0},
        "checkpoint": {"every": 2},
        "runtime": {"device": "cpu", "threads": 1},
    },
    "arms": {
        "adamw": {"settings": ["optim=adamw"], "search": {"optim.lr": {"low": 1e-4, "high": 1e-2}}},
        "muon": {"settings": ["optim=muon"], "search": {"optim.lr": [1e-3, 1e-2]}},
    },
    "baseline": "adamw",
    "tuning": {"trials": 2},
    "seeds": [0, 1],
}


RATES = {"optim.lr": {"low": 1e-4, "high": 1e-2}}


def sweep_of(*settings, **changes):
    return validate(SweepConfig, override(SMALL | changes, settings))


def test_the_study_of_the_guide_is_one_that_works():
    block = (ROOT / "GUIDE.md").read_text(encoding="utf-8").partition("# study.toml")[2].partition("```")[0]
    sweep = validate(SweepConfig, tomllib.loads(block.partition("\n")[2]))
    assert plan_text(sweep).startswith("20 tuning runs and 12 final runs, ")


def test_one_span_is_searched_evenly_over_its_logarithm():
    rates = [trial["optim.lr"] for trial in sweep_of("tuning.trials=2").trials("adamw")]
    assert rates == pytest.approx([10**-3.5, 10**-2.5], rel=1e-3)


def test_a_list_is_gone_through():
    assert sweep_of().trials("muon") == [{"optim.lr": 1e-3}, {"optim.lr": 1e-2}]


def test_several_spans_are_spread_over_the_square():
    span = {"low": 1.0, "high": math.e}
    arms = {name: {"search": {"optim.lr": span, "optim.eps": span}} for name in ("a", "b")}
    trials = sweep_of(arms=arms, baseline="a", tuning={"trials": 16}).trials("a")
    points = [(math.log(trial["optim.lr"]), math.log(trial["optim.eps"])) for trial in trials]
    quarters = {(int(2 * x), int(2 * y)) for x, y in points}
    assert quarters == {(0, 0), (0, 1), (1, 0), (1, 1)}
    nearest = min(math.dist(one, other) for n, one in enumerate(points) for other in points[:n])
    assert nearest > 0.1


def test_values_of_any_kind_reach_the_config():
    paths = [["über.txt"], ["äber.txt"], ["😀.txt"]]
    sweep = sweep_of("base.data.source=text", "base.data.source.path=x", axes={"data.source.path": paths})
    assert [list(sweep.run_config("adamw", cell, {}, 0).data.source.path) for cell in sweep.cells()] == paths
    folders = {Job(arm="adamw", cell=cell, phase="final", number=0, trial={}, order=0).path for cell in sweep.cells()}
    assert len(folders) == 3
    tables = [{"name": "adamw", "lr": 0.5}, "muon"]
    sweep = sweep_of(axes={"optim": tables}, arms={"a": {}, "b": {"settings": ["train.clip_norm=2.0"]}}, baseline="a")
    assert [sweep.run_config("a", cell, {}, 0).optim.name for cell in sweep.cells()] == ["adamw", "muon"]
    assert sweep.run_config("a", sweep.cells()[0], {}, 0).optim.lr == 0.5


def test_no_arm_leaves_the_folder_of_runs():
    for name in ("..", ".", "/", "a/../../b"):
        path = Job(arm=name, cell={}, phase="final", number=0, trial={}, order=0).path
        assert path.count("/") == 1
        assert not path.startswith(".")


def test_a_budget_of_items_makes_the_steps_of_each_batch():
    sweep = sweep_of(axes={"train.batch": [2, 8]}, budget=640)
    assert [sweep.run_config("adamw", cell, {}, 0).train.steps for cell in sweep.cells()] == [20, 5]


def test_final_runs_have_fresh_seeds_and_the_split_that_was_not_searched():
    sweep = sweep_of()
    trials = tuning_jobs(sweep)
    assert [(job.arm, job.number) for job in trials] == [("adamw", 0), ("adamw", 1), ("muon", 0), ("muon", 1)]
    tried, final = job_config(sweep, trials[0]), sweep.run_config("adamw", {}, {"optim.lr": 0.5}, 1)
    assert (tried.seed, tried.evaluation.split) == (1000, "search")
    assert (final.seed, final.evaluation.split, final.optim.lr) == (1, "validation", 0.5)


def test_trials_may_be_judged_on_the_validation_split_where_the_test_judges_final_runs():
    sweep = sweep_of("base.evaluation.split=test", "tuning.split=validation")
    tried, final = job_config(sweep, tuning_jobs(sweep)[0]), sweep.run_config("adamw", {}, {}, 1)
    assert (tried.evaluation.split, final.evaluation.split) == ("validation", "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "sgd"}, "baseline is 'sgd', which is not an arm. Arms: adamw, muon"),
        ({"seeds": [1, 1]}, "seeds must list at least one seed, and no seed twice"),
        ({"seeds": [1000]}, r"tuning.seed is 1000, which is also a seed of a final run"),
        ({"tuning": {"trials": 3}}, "arms.muon.search has 2 combinations, but tuning.trials is 3"),
        ({"arms": {"one": {}}, "baseline": "one"}, "a sweep needs at least two arms. Given: one"),
        ({"arms": {"a": {}, "b": {"settings": ["optim=adamv"]}}, "baseline": "a"}, r"arms\.b: optim: .*adamw"),
        (
            {"arms": {"a": {}, "b": {"search": {"optim.lr": {"low": 2, "high": 1}}}}, "baseline": "a"},
            "low must be smaller",
        ),
        (
            {"arms": {"a": {"search": RATES}, "b": {"tuned_as": "aa"}}, "baseline": "a"},
            r"tuned_as is 'aa', which is not an arm. Did you mean 'a'",
        ),
        ({"arms": {"a": {}, "b": {"tuned_as": "a"}}, "baseline": "a"}, "b.tuned_as is 'a', but that arm has no search"),
        (
            {"arms": {"a": {"search": RATES}, "b": {"search": RATES, "tuned_as": "a"}}, "baseline": "a"},
            "b has both search and tuned_as = 'a': remove one of them",
        ),
        ({"axes": {"train.batch": []}}, "each axis needs at least one value"),
        (
            {
                "tuning": {"trials": 2, "steps": 2},
                "arms": SMALL["arms"] | {"wide": {"settings": ["train.batch=8"], "search": RATES}},
            },
            "different numbers of items: adamw 128, muon 128, wide 256",
        ),
        ({"axes": {"train.batch": [4, 8, 4]}}, r"axes\.train\.batch lists a value twice: 4, 8, 4"),
        ({"axes": {"seed": [1, 2]}}, "axes sets seed, which is not allowed: the sweep takes it from `seeds`"),
        ({"axes": {"train.steps": [1, 2]}, "budget": 640}, "train.steps, but budget also determines the steps"),
        ({"axes": {"optim.lr": [0.1, 0.2]}}, r"arms\.adamw\.search sets optim\.lr, which is also an axis"),
        (
            {
                "tuning": {"trials": 2, "steps": 2},
                "base": SMALL["base"] | {"schedule": {"name": "cosine", "warmup_steps": 3}},
            },
            "arms.adamw, optim.lr = .*: schedule.warmup_steps is 3",
        ),
        (
            {"tuning": {"trials": 2, "split": "validation"}},
            "tuning.split and base.evaluation.split are both 'validation'. Choose different splits: final runs must",
        ),
        ({"trails": 3}, "no such field"),
        ({"baseline_seeds": [1, 7]}, r"baseline_seeds must differ from .* the baseline's other seeds. Repeated: \[1\]"),
        ({"baseline_seeds": [7], "aa_seeds": [8, 7, 8]}, r"aa_seeds must differ from .* Repeated: \[7, 8\]"),
        ({"aa_seeds": [1000]}, r"tuning.seed is 1000, which is also a seed of a final run"),
        ({"aa_seeds": 0}, "aa_seeds"),
        (
            {"arms": SMALL["arms"] | {"adamw (A/A)": {}}, "aa_seeds": 2},
            r"arms contains 'adamw \(A/A\)', but this name is reserved for the A/A arm",
        ),
    ],
)
def test_a_sweep_that_cannot_work_is_said_before_anything_starts(changes, words):
    with pytest.raises(ConfigError, match=words):
        sweep_of(**changes)


def test_another_sweep_in_the_folder_is_refused_and_left_alone(tmp_path):
    open_sweep(sweep_of(), tmp_path / "it")
    before = (tmp_path / "it" / "sweep.json").read_bytes()
    open_sweep(sweep_of(), tmp_path / "it")
    with pytest.raises(ConfigError, match=r"contains another sweep\. These fields differ: seeds\."):
        open_sweep(sweep_of(seeds=[5]), tmp_path / "it")
    assert (tmp_path / "it" / "sweep.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        open_sweep(sweep_of(), tmp_path / "other")


def test_the_baseline_may_have_more_seeds_than_the_others_and_an_arm_that_repeats_it(tried, tmp_path):
    tried |= {"adamw": {"trial-01": 2.0}, "muon": {"trial-00": 2.0}}
    sweep = sweep_of(baseline_seeds=[7, 5], aa_seeds=3)
    jobs = final_jobs(sweep, tmp_path)
    by_arm = {arm: [job.number for job in jobs if job.arm == arm] for arm in dict.fromkeys(job.arm for job in jobs)}
    repeated = by_arm.pop("adamw (A/A)")
    assert by_arm == {"adamw": [0, 1, 7, 5], "muon": [0, 1]}
    assert len(repeated) == 3
    assert set(repeated).isdisjoint([0, 1, 5, 7, sweep.tuning.seed])
    assert {job.arm for job in tuning_jobs(sweep)} == {"adamw", "muon"}
    by_path = {job.path: job_config(sweep, job) for job in jobs}
    assert len(by_path) == len(jobs)
    again = [config for config in by_path.values() if config.name == "adamw (A/A)"]
    first = next(config for config in by_path.values() if config.name == "adamw")
    assert all(config.model_copy(update={"name": "adamw", "seed": 0}) == first for config in again)
    assert plan_text(sweep).startswith("4 tuning runs and 9 final runs, ")


def test_counted_seeds_stay_where_they_are_when_a_study_grows():
    small, large = sweep_of(baseline_seeds=2, aa_seeds=2), sweep_of(seeds=[*range(50)], baseline_seeds=4, aa_seeds=3)
    for arm in small.every_arm:
        assert set(small.seeds_of(arm)) < set(large.seeds_of(arm))
    every = [seed for arm in ("adamw", "adamw (A/A)") for seed in large.seeds_of(arm)]
    assert len(set(every)) == len(every) == 50 + 4 + 3


def test_an_arm_that_repeats_a_baseline_that_is_tuned_as_another_is_tuned_as_that_one():
    arms = {"fp32": {"search": RATES}, "bf16": {"settings": ["precision=bf16"], "tuned_as": "fp32"}}
    sweep = sweep_of(arms=arms, baseline="bf16", aa_seeds=1)
    assert [sweep.tuned_by(arm) for arm in sweep.every_arm] == ["fp32"] * 3
    assert sweep.run_config("bf16 (A/A)", {}, {}, 3).precision == "bf16"


def test_a_sweep_goes_on_when_seeds_are_added_and_runs_what_is_missing(tried, tmp_path, monkeypatch):
    tried |= {"adamw": {"trial-01": 2.0}, "muon": {"trial-00": 2.0}}
    folder = tmp_path / "it"
    asked = []

    def go_on(sweep):
        asked.clear()
        running = Sweep(sweep, folder, cores=1, modules=[], command="", tell=lambda line: None)

        def run_jobs(jobs):
            for job in jobs:
                place = folder / RUNS / f"{job.path}.place.json"
                if job.phase == "final" and not place.is_file():
                    asked.append((job.arm, job.number))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    running._write_job(job, None)

        monkeypatch.setattr(running, "run_jobs", run_jobs)
        running.run()
        return [(entry.arm, entry.seed, entry.repeats) for entry in read_ledger(folder / LEDGER)]

    go_on(sweep_of())
    assert asked == [("adamw", 0), ("adamw", 1), ("muon", 0), ("muon", 1)]
    found = go_on(sweep_of(seeds=[0, 1, 2], baseline_seeds=[9], aa_seeds=[30]))
    assert asked == [("adamw", 2), ("adamw", 9), ("muon", 2), ("adamw (A/A)", 30)]
    own = [("adamw", 0), ("adamw", 1), ("adamw", 2), ("adamw", 9), ("muon", 0), ("muon", 1), ("muon", 2)]
    assert found == [*((*run, None) for run in own), ("adamw (A/A)", 30, "adamw")]
    written = (folder / "sweep.json").read_bytes()
    for fewer in ({}, {"seeds": [0, 1, 2]}, {"seeds": [0, 1, 2], "baseline_seeds": [9]}):
        with pytest.raises(
            ConfigError, match=r"contains another sweep\. These fields differ: .*seeds\..*only seeds may be added"
        ):
            open_sweep(sweep_of(**fewer), folder)
    with pytest.raises(ConfigError, match=r"contains another sweep\. These fields differ: aa_seeds, budget\."):
        open_sweep(sweep_of(seeds=[0, 1, 2], baseline_seeds=[9], aa_seeds=[30, 31], budget=640), folder)
    assert (folder / "sweep.json").read_bytes() == written


def test_a_sweep_is_read_by_the_names_that_its_fields_had_before(tmp_path):
    sweep = sweep_of(budget=640)
    older = {name: value for name, value in json.loads(sweep.model_dump_json()).items() if name != "budget"} | {
        "items": 640
    }
    assert validate(SweepConfig, older) == sweep == sweep_of("items=640")
    open_sweep(sweep, tmp_path / "it")
    (tmp_path / "it" / "sweep.json").write_text(json.dumps(older))
    open_sweep(sweep, tmp_path / "it")


def test_what_submits_a_sweep_is_an_array_of_trials_then_of_final_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    given = ["sweep", "--config=small.json", "--out=out"]
    assert main([*given, "--rounds=3"]) == 2
    assert "--rounds applies only to a timing run: give --timing too" in capsys.readouterr().err
    assert main([*given, "--slurm", "--sbatch=time=2"]) == 2
    assert "as in --sbatch=--time=2:00:00" in capsys.readouterr().err
    assert main([*given, "--slurm", "--sbatch=--time=2:00:00", "--sbatch=--cpus-per-task=7"]) == 0
    assert capsys.readouterr().out == f"bash {tmp_path}/out/slurm/submit.sh\n"
    tuning, final, ledger = (
        (tmp_path / "out" / "slurm" / f"{name}.sbatch").read_text() for name in ("tuning", "final", "ledger")
    )
    for text, array in ((tuning, "--array=0-3"), (final, "--array=0-3"), (ledger, None)):
        options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
        assert [option for option in options if option.startswith("--array")] == ([array] if array else [])
        assert [option for option in options if option.startswith("--cpus")] == ["--cpus-per-task=7"]
        assert "--time=2:00:00" in options
    assert tuning.rstrip().endswith('--only="tuning:$SLURM_ARRAY_TASK_ID"')
    for wrong in ("tuning", "middle:3", "final:-1"):
        assert main([*given, f"--only={wrong}"]) == 2
        assert "give tuning:N or final:N" in capsys.readouterr().err
    assert main([*given, "--only=final:99"]) == 2
    assert "there are 4 final runs, numbered from 0" in capsys.readouterr().err
    assert main([*given, "--only=final:0", "--quiet"]) == 0
    assert "there is nothing to run" in capsys.readouterr().err


@pytest.fixture
def tried(monkeypatch):
    """Sets the losses of trials, by arm; infinite where one has none."""
    losses = {}
    monkeypatch.setattr(
        "llmeff.lab.jobs._cost", lambda folder, metric: losses.get(folder.parent.name, {}).get(folder.name, math.inf)
    )
    return losses


def test_the_best_trial_that_finished_is_chosen(tried, tmp_path):
    sweep = sweep_of()
    assert best_trial(tuning_jobs(sweep)[:2], tmp_path, "loss") is None
    assert final_jobs(sweep, tmp_path) == []
    tried["adamw"] = {"trial-01": 2.0}
    assert best_trial(tuning_jobs(sweep)[:2], tmp_path, "loss") == sweep.trials("adamw")[1]
    tried["adamw"]["trial-00"] = 1.5
    assert best_trial(tuning_jobs(sweep)[:2], tmp_path, "loss") == sweep.trials("adamw")[0]
    assert {job.arm for job in final_jobs(sweep, tmp_path)} == {"adamw"}


@pytest.fixture
def trials(make_run, tmp_path):
    """Writes the trials of `adamw`, with the metrics that they ended with."""

    def make(*metrics, metric_directions=None):
        for number, own in enumerate(metrics):
            run = make_run(f"trial-{number}")
            result = json.loads((run / "result.json").read_text())
            result |= {"metrics": {"search": own}, "metric_directions": metric_directions or {}}
            (run / "result.json").write_text(json.dumps(result))
            (run / "config.json").write_text(json.dumps({"seed": 0, "evaluation": {"split": "search"}}))
            place = tmp_path / RUNS / "adamw" / f"trial-{number:02d}"
            place.parent.mkdir(parents=True, exist_ok=True)
            run.rename(place)

    return make


def test_a_loss_that_is_no_number_is_never_the_best(trials, tmp_path):
    sweep = sweep_of()
    trials({"loss": math.nan}, {"loss": 1.5})
    assert best_trial(tuning_jobs(sweep)[:2], tmp_path, "loss") == sweep.trials("adamw")[1]


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", 0), ("mean_iou", 1), ("error", 0), ("recall", 1), ("precision", None)]
)
def test_the_metric_decides_which_trial_is_the_best(trials, tmp_path, metric, best):
    sweep = sweep_of()
    metric_directions = {"mean_iou": "higher", "error": "lower", "recall": "higher", "precision": "higher"}
    trials(
        {"loss": 1.5, "mean_iou": 0.4, "error": 0.1, "recall": math.nan},
        {"loss": 1.6, "mean_iou": 0.5, "error": 0.2, "recall": 0.1},
        metric_directions=metric_directions,
    )
    chosen = best_trial(tuning_jobs(sweep)[:2], tmp_path, metric)
    assert chosen == (None if best is None else sweep.trials("adamw")[best])


def test_what_the_sweep_chose_is_what_the_comparison_says_was_chosen(trials, tmp_path, entry_of_levels):
    sweep, metric_directions = sweep_of(metric="bits_per_byte"), {"loss": "lower", "bits_per_byte": "lower"}
    reached = [{"loss": 1.5, "bits_per_byte": 2.5}, {"loss": 1.6, "bits_per_byte": 2.4}]
    trials(*reached, metric_directions=metric_directions)
    (chosen,) = {job.trial["optim.lr"] for job in final_jobs(sweep, tmp_path)}
    tried = [
        replace(
            entry_of_levels({}, 1000),
            arm="adamw",
            phase="tuning",
            trial=trial,
            metrics=own,
            metric_directions=metric_directions,
        )
        for trial, own in zip(sweep.trials("adamw"), reached, strict=True)
    ]
    finals = [replace(entry_of_levels({}, 0), arm=arm) for arm in ("adamw", "muon")]
    assert judge([*tried, *finals], metric="bits_per_byte").groups[0].tuning["adamw"].best == {"optim.lr": chosen}


def test_a_metric_that_the_task_does_not_have_is_refused_before_anything_starts():
    with pytest.raises(
        ConfigError, match=r"'bits_per_bite': .* Did you mean 'bits_per_byte'\? Known: bits_per_byte, loss"
    ):
        sweep_of(metric="bits_per_bite")


def test_runs_of_one_sweep_iterate_in_one_format_on_any_machine(tmp_path, monkeypatch):
    sweep = sweep_of()
    running = Sweep(sweep, tmp_path, cores=1, modules=[], command="", tell=print)
    first, second = [job for job in tuning_jobs(sweep) if job.arm == "muon"]
    (other, *_) = [job for job in tuning_jobs(sweep) if job.arm == "adamw"]
    assert as_begun(sweep, tmp_path, job_config(sweep, first)).optim.ns_format == "auto"
    begun = job_config(sweep, first)
    begun = begun.model_copy(update={"optim": begun.optim.model_copy(update={"ns_format": "bfloat16"})})
    for job, config in ((other, job_config(sweep, other)), (first, begun)):
        folder = tmp_path / RUNS / job.path
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.model_dump_json())
    asked = []
    monkeypatch.setattr(Sweep, "_start", lambda self, job, config, cores: asked.append(config))
    running.run_jobs([second])
    (config,) = asked
    assert config.optim == job_config(sweep, second).optim.model_copy(update={"ns_format": "bfloat16"})


def test_an_arm_that_names_its_format_decides_for_no_other(tmp_path):
    arms = {
        "named": {"settings": ["optim=muon", "optim.ns_format=bfloat16"]},
        "open": {"settings": ["optim=muon"]},
    }
    sweep = sweep_of(arms=arms, baseline="named")
    for job in final_jobs(sweep, tmp_path):
        if job.arm == "named":
            folder = tmp_path / RUNS / job.path
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(job_config(sweep, job).model_dump_json())
    (left, *_) = [job for job in final_jobs(sweep, tmp_path) if job.arm == "open"]
    assert as_begun(sweep, tmp_path, job_config(sweep, left)).optim.ns_format == "auto"


def test_a_sweep_from_before_there_was_a_choice_of_metrics_goes_on_by_the_loss(tmp_path):
    open_sweep(sweep_of(), tmp_path / "it")
    written = json.loads((tmp_path / "it" / "sweep.json").read_text())
    assert (written.pop("metric"), written.pop("baseline_seeds"), written.pop("aa_seeds")) == ("loss", [], [])
    (tmp_path / "it" / "sweep.json").write_text(json.dumps(written))
    open_sweep(sweep_of(), tmp_path / "it")
    with pytest.raises(ConfigError, match=r"contains another sweep\. These fields differ: metric\."):
        open_sweep(sweep_of(metric="bits_per_byte"), tmp_path / "it")


def test_what_was_chosen_stays_though_a_trial_that_had_failed_comes_to_be_better(tried, tmp_path, monkeypatch):
    sweep = sweep_of()
    open_sweep(sweep, tmp_path / "it")
    tried["adamw"] = {"trial-01": 2.0}
    started = []
    running = Sweep(sweep, tmp_path / "it", cores=1, modules=[], command="", tell=print)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: started.append(1))
    running._start(final_jobs(sweep, tmp_path / "it")[0], sweep.run_config("adamw", {}, {}, 0), 1)
    assert started
    tried["adamw"]["trial-00"] = 1.0
    assert {job.trial["optim.lr"] for job in final_jobs(sweep, tmp_path / "it")} == {
        sweep.trials("adamw")[1]["optim.lr"]
    }


def test_an_arm_can_be_tuned_as_another(monkeypatch, tmp_path):
    arms = {"fp32": {"search": RATES}, "bf16": {"settings": ["precision=bf16"], "tuned_as": "fp32"}}
    sweep = sweep_of(arms=arms, baseline="fp32")
    assert {job.arm for job in tuning_jobs(sweep)} == {"fp32"}
    monkeypatch.setattr("llmeff.lab.jobs.best_trial", lambda trials, folder, metric: trials[1].trial)
    jobs = final_jobs(sweep, tmp_path)
    assert [(job.arm, job.number) for job in jobs] == [("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1)]
    assert {job.trial["optim.lr"] for job in jobs} == {sweep.trials("fp32")[1]["optim.lr"]}
    assert [job_config(sweep, job).precision for job in jobs] == ["fp32"] * 2 + ["bf16"] * 2


def test_a_plan_counts_runs_and_items():
    assert plan_text(sweep_of()).startswith("4 tuning runs and 4 final runs, 2.0k items in total")


@pytest.mark.parametrize("name", SWEEPS.names())
def test_the_sweeps_that_come_with_it_are_well_formed(name):
    sweep = SWEEPS[name]()
    assert sweep.name == name
    assert validate(SweepConfig, json.loads(sweep.model_dump_json())) == sweep


# -- whole sweeps


def command(folder, *more):
    (folder / "small.json").write_text(json.dumps(SMALL))
    return [sys.executable, "-m", "llmeff.cli", "sweep", "--config=small.json", "--out=out", *more]


def start(folder, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(folder, *more), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def what_was_found(folder):
    """All of a ledger that does not hang on the clock."""
    return [
        (entry.name, entry.status, entry.trial, entry.loss, entry.train_loss, entry.curve_losses, entry.peak_bytes)
        for entry in read_ledger(folder / "out" / LEDGER)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_again_and_again_gives_the_same_ledger(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    process = start(whole)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "Against adamw; seeds: 2" in out
    for number, stop in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        process = start(broken)
        ended = f"{RUNS}/**/result.json"
        while process.poll() is None and len(list((broken / "out").glob(ended))) <= 2 * number:
            time.sleep(0.05)
        process.send_signal(stop)
        process.communicate(timeout=60)
        assert process.returncode != 0
    process = start(broken, "--quiet")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert what_was_found(broken) == what_was_found(whole)
    assert len(what_was_found(whole)) == 8
    best = {entry.arm: entry.trial for entry in read_sweep(whole / "out") if entry.phase == "final"}
    assert all(best.values())


@pytest.mark.slow
def test_a_run_that_diverges_is_in_the_ledger_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = {"sane": {}, "mad": {"settings": ["optim.lr=1e30", "train.clip_norm=null"]}}
    (tmp_path / "mad.json").write_text(json.dumps(SMALL | {"arms": arms, "baseline": "sane", "seeds": [0]}))
    assert main(["sweep", "--config=mad.json", "--out=out", "--quiet"]) == 0
    found = {entry.arm: entry.status for entry in read_ledger(tmp_path / "out" / LEDGER)}
    assert found == {"sane": "finished", "mad": "diverged"}


@pytest.mark.slow
def test_the_arms_of_a_sweep_are_timed_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL | {"seeds": [0]}))
    given = ["sweep", "--config=small.json", "--out=out"]
    assert main([*given, "--timing"]) == 2
    assert "there is no sweep to time" in capsys.readouterr().err
    assert main([*given, "--quiet"]) == 0
    assert "because there is no timing run" in " ".join(capsys.readouterr().out.split())
    assert main([*given, "--timing", "--processes=3", "--rounds=3", "--steps=1"]) == 0
    assert "time of a step" in capsys.readouterr().out
    assert main(["compare", "out", "--html=page.html", "--plot=curves.png"]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_half_fraction_of_five_factors_confuses_no_pair(entry_of_levels):
    arms = SWEEPS["contribution"]().arms
    assert len(arms) == 16
    found = effects(
        [entry_of_levels(arm.factors, seed) for arm in arms.values() for seed in (0, 1)], lambda run: run.loss
    )
    assert found.aliased == []
    assert len(found.effects) == 5 + 10


@pytest.fixture
def entry_of_levels():
    def make(factors, seed):
        return Entry(
            name="x", arm="x", factors=factors, status="finished", seed=seed, steps=1, items=1, device="", loss=1.5
        )

    return make
