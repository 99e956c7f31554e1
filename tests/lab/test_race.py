"""The engine of races: turns, generations, processes that end, and intervals by hand."""

import math
import os
import random

import pytest

from llmeff.core.config import ConfigError
from llmeff.lab import race as module
from llmeff.lab.race import Generation, difference, ratio, run_generations, take_turns


def test_each_round_gives_everyone_one_turn_in_an_order_of_its_own():
    names, taken = ["a", "b", "c"], []
    rounds = take_turns(names, 50, random.Random(0), lambda name: taken.append(name) or len(taken))
    assert all(sorted(turns) == names for turns in rounds)
    assert [name for turns in rounds for name in turns] == taken
    assert [turn for turns in rounds for turn in turns.values()] == [*range(1, 151)]
    assert len({tuple(turns) for turns in rounds}) == math.factorial(3)


def test_the_order_of_turns_is_that_of_the_seed():
    first, second = (take_turns("abcd", 9, random.Random(seed), str.upper) for seed in (5, 5))
    assert [list(turns) for turns in first] == [list(turns) for turns in second]


def test_intervals_are_over_generations_by_hand():
    found = ratio([[2.0, 8.0], [9.0]], [[1.0, 1.0], [1.0]])
    # by generation 4 and 9: the geometric mean is 6; half the width is t(0.975, 1) = 12.7062 times log(9 / 4) / 2
    assert (found.value, found.n) == (pytest.approx(6.0), 2)
    assert math.log(found.upper / found.value) == pytest.approx(12.7062 * math.log(9 / 4) / 2, rel=1e-5)
    found = difference([[2.0, 4.0], [9.0]], [[1.0, 1.0], [3.0]])
    assert (found.value, found.n) == (pytest.approx(4.0), 2)
    assert found.upper - found.value == pytest.approx(12.7062 * 2.0, rel=1e-5)


def answers(factor, pipe):
    while (question := pipe.recv()) is not None:
        pipe.send((factor * question, os.getpid()))


def returns_at_once(pipe):
    pass


def stays(pipe):
    pipe.send(pipe.recv())
    pipe.recv()
    pipe.recv()


def test_each_generation_has_fresh_processes_which_end_with_it():
    racers = []

    def run(generation, number):
        racers.append(generation.start(answers, 3, early_end="it ended"))
        return [racers[-1].ask(question) for question in (number, 10)]

    generations = run_generations(2, run)
    assert [[value for value, _ in turns] for turns in generations] == [[0, 30], [3, 30]]
    pids = [{pid for _, pid in turns} for turns in generations]
    assert [len(each) for each in pids] == [1, 1]
    assert pids[0] != pids[1]
    assert [racer.process.exitcode for racer in racers] == [0, 0]


def test_a_process_that_ends_early_is_an_error():
    with Generation() as generation:
        racer = generation.start(returns_at_once, early_end="the racer ended too soon")
        with pytest.raises(ConfigError, match="the racer ended too soon: see its error above"):
            racer.ask(1)


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(module, "END_S", 0.1)
    with Generation() as generation:
        racer = generation.start(stays, early_end="it ended")
        assert racer.ask(1) == 1
    assert racer.process.exitcode < 0


def test_an_error_kills_the_processes_at_once():
    racers = []

    def run(generation, number):
        racers.append(generation.start(stays, early_end="it ended"))
        assert racers[0].ask(1) == 1
        raise KeyError

    with pytest.raises(KeyError):
        run_generations(3, run)
    (racer,) = racers
    assert racer.process.exitcode < 0
    assert racer.pipe.closed
