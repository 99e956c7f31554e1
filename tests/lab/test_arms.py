"""Timing runs: every arm has its turns, ratios carry an interval, a wrong arm is an error before anything starts."""

import itertools
import json
import math
import random
import re
import sys
import time

import pytest
import torch

from llmeff.cli import main
from llmeff.compare.intervals import mean_interval
from llmeff.config.run import RunConfig
from llmeff.core import meters
from llmeff.core.config import ConfigError, override, validate
from llmeff.lab import arms as module
from llmeff.lab.arms import ARMS, _rounded, _summarize, bench, find_arm, race_runs, show
from llmeff.lab.arms import Turn as BenchTurn
from llmeff.lab.race import END_S, run_generations, take_turns
from llmeff.optim import OptimizerConfig
from tests.run.test_loop import TINY

NAMES = ("first", "second")


def turns(*seconds, others=0.0):
    return [
        {name: BenchTurn(step_s=step_s, cpu_s=step_s, others=others) for name, step_s in zip(NAMES, pair, strict=True)}
        for pair in seconds
    ]


def test_ratio_and_interval_by_hand():
    result = _summarize(NAMES, [turns((1.0, 2.0), (1.0, 2.0)), turns((1.0, 1.0), (1.0, 4.0)), turns((2.0, 4.0))])
    for kind in ("ratios", "cpu_ratios"):
        ratio = result[kind]["second / first"]
        assert (ratio["mean"], ratio["lower"], ratio["upper"]) == pytest.approx((2.0, 2.0, 2.0))
    # by generation 1, 1.5, 2: mean 1.5, standard deviation 0.5, t(0.975, 2) = 4.3027
    difference = result["differences_s"]["second - first"]
    assert difference["mean"] == pytest.approx(1.5)
    assert difference["upper"] - difference["mean"] == pytest.approx(4.30265 * 0.5 / math.sqrt(3), rel=1e-5)
    assert difference["n"] == 3
    assert "n = 3 generations, 5 rounds" in show(result)


def a_bench(random_numbers, ratio):
    """Turns of 5 processes of each arm: a process is faster or slower by 2 % for good, a turn by 1 % for once."""
    generations = []
    for _ in range(5):
        process_s = [value * math.exp(random_numbers.gauss(0.0, 0.02)) for value in (1.0, ratio)]
        generations.append(
            turns(*([value * math.exp(random_numbers.gauss(0.0, 0.01)) for value in process_s] for _ in range(6)))
        )
    return generations


def test_the_interval_holds_the_true_ratio_95_times_of_100():
    random_numbers, ratio, num_benches = random.Random(1), 1.05, 1000
    covered = covered_by_rounds = 0
    for _ in range(num_benches):
        generations = a_bench(random_numbers, ratio)
        interval = _summarize(NAMES, generations)["ratios"]["second / first"]
        covered += interval["lower"] <= ratio <= interval["upper"]
        rounds = itertools.chain.from_iterable(generations)
        wrong = mean_interval([math.log(each["second"].step_s / each["first"].step_s) for each in rounds])
        covered_by_rounds += wrong.lower <= math.log(ratio) <= wrong.upper
    # three standard deviations of a count of 1,000 at 95 % are 21
    assert covered / num_benches == pytest.approx(0.95, abs=0.021)
    # as if rounds of one process were independent
    assert covered_by_rounds / num_benches < 0.75


def test_noisy_rounds_are_left_out_and_said():
    noisy = turns((1.0, 9.0), others=0.5)
    generations = [turns((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)) + noisy, turns((1.0, 1.0)), turns((1.0, 1.0))]
    result = _summarize(NAMES, generations)
    assert result["noisy_rounds_dropped"] == 1
    assert result["rounds_used"] == 5
    assert result["ratios"]["second / first"]["mean"] == pytest.approx(1.0)
    assert [len(rounds) for rounds in result["generations"]] == [4, 1, 1]
    assert "1 of 6 rounds were noisy" in show(result)
    assert "busy" not in show(result)


def test_a_generation_with_too_few_quiet_rounds_uses_all_and_says_so():
    noisy = turns((1.0, 1.0), (1.0, 1.0), others=0.5)
    result = _summarize(NAMES, [turns((1.0, 1.0)) * 3, turns((1.0, 1.0)) * 2 + noisy, turns((1.0, 1.0)) * 3])
    assert result["noisy_rounds_dropped"] == 0
    assert result["busy_generations"] == [2]
    assert show(result).endswith("in which too few rounds were quiet, so that all rounds are used: 2")


def test_measurements_are_written_with_six_digits():
    assert _rounded({"a": [1.23456789e-5, 12345678.9], "n": 1234567}) == {
        "a": [1.23457e-5, 12345700.0],
        "n": 1234567,
    }


def test_rounds_are_shared_out_evenly(monkeypatch):
    class Racer:
        def ask(self, steps):
            return BenchTurn(step_s=1.0, cpu_s=1.0, others=0.0)

    monkeypatch.setattr(module, "_start", lambda generation, arguments, *others: dict.fromkeys(arguments, Racer()))
    config = validate(RunConfig, TINY)
    result = bench(config, ["ours", "bare"], rounds=11, steps=1, warmup_steps=1, processes=4)
    assert [len(rounds) for rounds in result["generations"]] == [3, 3, 3, 2]
    assert result["rounds"] == 11
    assert result["ratios"]["bare / ours"]["n"] == 4


ARM = """
import os
from pathlib import Path

def arm(config, tick):
    ended = Path(__file__).with_name("ended")
    try:
        while True:
            tick()
    finally:
        with ended.open("a") as file:
            file.write(f"{os.getpid()}\\n")
"""


def rounds_of(config, arm, modules=(), *, rounds, steps, generations=1):
    """The rounds of each generation of one arm."""

    def run(generation, number):
        racer = module._start(generation, {"one": (config, arm, list(modules))}, 1, random.Random(0))["one"]
        return take_turns(["one"], rounds, random.Random(0), lambda name: racer.ask(steps))

    return run_generations(generations, run)


def test_each_generation_has_a_process_of_its_own_and_ends_it(tmp_path):
    (tmp_path / "arms.py").write_text(ARM)
    began_s = time.monotonic()
    generations = rounds_of(TINY, f"{tmp_path / 'arms.py'}:arm", rounds=3, steps=2, generations=2)
    assert [len(rounds) for rounds in generations] == [3, 3]
    assert time.monotonic() - began_s < 2 * END_S  # none had to be killed
    assert len(set((tmp_path / "ended").read_text().splitlines())) == 2


def test_an_arm_that_ends_is_an_error(tmp_path):
    (tmp_path / "arms.py").write_text("def arm(config, tick):\n    tick()\n")
    with pytest.raises(ConfigError, match="arm 'one' ended before its turn was over: see its error above"):
        rounds_of(TINY, f"{tmp_path / 'arms.py'}:arm", rounds=3, steps=1)


OWN = """
from typing import Literal
from llmeff.optim import ScheduleConfig

class Halved(ScheduleConfig):
    name: Literal["halved"] = "halved"

    def after_warmup(self, progress):
        return 1.0 if progress < 0.5 else 0.5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder, the one worked in, that holds a user's own schedule and arm."""
    (tmp_path / "own_schedules.py").write_text(OWN)
    (tmp_path / "arms.py").write_text(ARM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_users_components_come_into_an_arms_process(own):
    config = TINY | {"schedule": {"name": "halved"}}
    ((turns,),) = rounds_of(config, "arms.py:arm", ["own_schedules"], rounds=1, steps=1)
    assert list(turns) == ["one"]


@pytest.mark.slow
def test_users_components_come_into_a_bench(own):
    (own / "other.py").write_text(ARM)
    arms = ["--arm=arms.py:arm", "--arm=other.py:arm", "--processes=3", "--rounds=3", "--steps=1", "--warmup=1"]
    assert main(["bench", "--recipe=debug", "--import=own_schedules", "--set=schedule=halved", *arms, "--out=it"]) == 0
    assert json.loads((own / "it").read_text())["config"]["schedule"]["name"] == "halved"


@pytest.mark.slow
def test_runs_of_one_and_of_two_ranks_are_raced():
    config = TINY | {"train": {"steps": 100, "batch": 4}}
    runs = {
        "one": (validate(RunConfig, config), "ours"),
        "two": (validate(RunConfig, config | {"parallel": {"name": "deepspeed", "stage": 3, "ranks": 2}}), "ours"),
    }
    found = race_runs(runs, seed=0, rounds=3, steps=2, warmup_steps=1, processes=3)
    assert found["ratios"]["two / one"]["mean"] > 1
    assert list(found["generations"][0][0]) == ["one", "two"]


def test_an_arm_may_have_settings_of_its_own(monkeypatch):
    raced = {}
    monkeypatch.setattr(module, "race_runs", lambda runs, **others: raced.update(runs) or {})
    shaped = "ours train.batch=8 'name=\"two words\"'"
    bench(validate(RunConfig, TINY), ["ours", shaped], rounds=3, steps=1, warmup_steps=1, processes=3)
    assert raced == {
        "ours": (validate(RunConfig, TINY), "ours"),
        shaped: (validate(RunConfig, override(TINY, ["train.batch=8", 'name="two words"'])), "ours"),
    }


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("ours train.bach=8", r"--arm 'ours train.bach=8': train.bach: there is no such field. Did you mean 'batch'"),
        ("ours 'train.batch=8", "cannot be read"),
        ("", "unknown arm ''"),
    ],
)
def test_wrong_settings_of_an_arm_are_said_before_any_starts(capsys, arm, words):
    assert main(["bench", "--recipe=debug", "--arm=ours", f"--arm={arm}"]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["our", "arms.py:run", "arms.py", ""])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(ConfigError, match="unknown arm"):
        find_arm(name)


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "arms.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no function 'run'"):
        find_arm(f"{tmp_path / 'arms.py'}:run")


def test_an_arm_refuses_a_model_that_it_cannot_train(tmp_path):
    images = {"name": "images", "source": {"name": "scenes", "height": 32, "width": 32, "num_train": 4}}
    given = {"task": "segmentation", "model": {"name": "segnet", "width": 8}, "data": images}
    with pytest.raises(
        ConfigError, match="'hf-trainer' can train only llmeff's own decoders, but the model is 'segnet'"
    ):
        ARMS["hf-trainer"](validate(RunConfig, given | {"train": {"batch": 2}}), lambda: None)


def test_an_unknown_arm_is_wrong_input(capsys):
    assert main(["bench", "--recipe=debug", "--arm=ours", "--arm=theirs"]) == 2
    assert "unknown arm 'theirs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--arm=ours"], ["--arm=ours", "--arm=ours"], ["--processes=2"], ["--rounds=4"], ["--steps=0"], ["--warmup=0"]],
)
def test_a_race_that_cannot_be_run_is_wrong_input(capsys, wrong):
    assert main(["bench", "--recipe=debug", *wrong]) == 2
    assert "at least" in capsys.readouterr().err


@pytest.mark.slow
def test_all_arms_take_turns():
    config = validate(RunConfig, override(TINY, []))
    result = bench(config, list(ARMS), rounds=3, steps=2, warmup_steps=4, processes=3)
    assert set(result["arms"]) == set(ARMS)
    assert all(turn["step_s"] > 0 for rounds in result["generations"] for each in rounds for turn in each.values())
    json.dumps(result)


class EnoughError(Exception):
    """An arm has made its steps."""


def losses_of(arm, config, num_steps, monkeypatch):
    """What the arm differentiates, step by step: one micro-batch a step."""
    losses, made = [], itertools.count(1)
    backward = torch.Tensor.backward

    def seen(loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(loss, *args, **kwargs)

    def tick():
        if next(made) == num_steps:
            raise EnoughError

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", seen)
        with pytest.raises(EnoughError):
            ARMS[arm](config, tick)
    assert len(losses) == num_steps
    return losses


@pytest.mark.parametrize("name", OptimizerConfig.registry.names())
def test_the_bare_loop_and_ours_train_alike_to_the_last_bit(name, monkeypatch):
    """Over warm-up and decay of the rate, groups with and without weight decay, and steps that are clipped.

    Without the step whose FLOPs are counted: the counter takes some operations apart, which round otherwise then.
    """
    monkeypatch.setattr(module, "_MANY_STEPS", 0)
    monkeypatch.setattr(meters, "metered_steps", lambda num_steps, interval: (0, 0))
    settings = (f"optim={name}", "optim.weight_decay=0.1", "train.steps=20", "train.batch=4", "train.clip_norm=0.7")
    schedule = ("schedule=cosine", "schedule.warmup_steps=5", "evaluation.every=0", "checkpoint.every=0")
    config = validate(RunConfig, override(TINY, [*settings, *schedule]))
    bare, ours = (losses_of(arm, config, 20, monkeypatch) for arm in ("bare", "ours"))
    assert ours == bare
    assert ours[-1] < ours[0]
