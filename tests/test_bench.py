"""The timing lane: every arm has its turns, ratios carry an interval, a wrong arm is said before anything starts."""

import json

import pytest

from llmeff.bench import ARMS, _summarize, bench, find_arm, show
from llmeff.bench import Turn as BenchTurn
from llmeff.cli import main
from llmeff.core.config import ConfigError, override, validate
from llmeff.runconfig import RunConfig
from tests.test_loop import TINY


def turns(*seconds, others=0.0):
    names = ("first", "second")
    return [
        {name: BenchTurn(step_s=step_s, cpu_s=step_s, others=others) for name, step_s in zip(names, pair, strict=True)}
        for pair in seconds
    ]


def test_ratio_and_interval_by_hand():
    result = _summarize(["first", "second"], turns((1.0, 2.0), (1.0, 2.0), (2.0, 4.0), (1.0, 2.0)))
    ratio = result["ratios"]["second / first"]
    assert ratio["mean"] == pytest.approx(2.0)
    assert ratio["lower"] == pytest.approx(2.0)
    assert ratio["upper"] == pytest.approx(2.0)
    # 1, 1, 2, 1: mean 1.25, standard deviation 0.5, t(0.975, 3) = 3.1824
    difference = result["differences_s"]["second - first"]
    assert difference["mean"] == pytest.approx(1.25)
    assert difference["upper"] - difference["mean"] == pytest.approx(3.18245 * 0.5 / 2, rel=1e-5)


def test_noisy_rounds_are_left_out_and_said():
    rounds = turns((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)) + turns((1.0, 9.0), others=0.5)
    result = _summarize(["first", "second"], rounds)
    assert result["noisy_rounds_dropped"] == 1
    assert result["ratios"]["second / first"]["mean"] == pytest.approx(1.0)
    assert len(result["turns"]) == 4
    assert "1 of 4 rounds were noisy" in show(result)


@pytest.mark.parametrize("name", ["our", "arms.py:run", "arms.py", ""])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(ConfigError, match="unknown arm"):
        find_arm(name)


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "arms.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no function 'run'"):
        find_arm(f"{tmp_path / 'arms.py'}:run")


def test_an_unknown_arm_is_wrong_input(capsys):
    assert main(["bench", "--recipe=debug", "--arm=ours", "--arm=theirs"]) == 2
    assert "unknown arm 'theirs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--arm=ours"], ["--arm=ours", "--arm=ours"], ["--rounds=1"], ["--steps=0"], ["--warmup=0"]]
)
def test_a_race_that_cannot_be_run_is_wrong_input(capsys, wrong):
    assert main(["bench", "--recipe=debug", *wrong]) == 2
    assert "at least" in capsys.readouterr().err


@pytest.mark.slow
def test_all_arms_take_turns():
    result = bench(validate(RunConfig, override(TINY, [])), list(ARMS), rounds=3, steps=2, warmup_steps=4)
    assert set(result["arms"]) == set(ARMS)
    assert all(turn["step_s"] > 0 for each in result["turns"] for turn in each.values())
    json.dumps(result)
