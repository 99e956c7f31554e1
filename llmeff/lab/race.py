"""The engine of races: fresh processes take turns in random order, and ratios carry an interval over generations.

A generation is a set of fresh processes. Processes of one program differ by a few per cent for as long as they live,
depending on where their memory lies, so the rounds of one process are not independent. Each generation therefore gives
one value, and intervals are over generations.
"""

import contextlib
import math
import multiprocessing
import operator
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from llmeff.compare.intervals import Estimate, mean_interval, ratio_interval
from llmeff.core.config import ConfigError
from llmeff.core.dist import folder_off_paths

T = TypeVar("T")

END_S = 30.0
"""Seconds that a process has to end before it is killed."""


def spawn(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """Starts a fresh Python process that calls `target`; the working folder is not on its path.

    Args:
        target: must be importable by name, as its arguments must be picklable.
        arguments: of the call.
        daemon: it ends with this process, and cannot start processes of its own.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=daemon)
    with folder_off_paths():
        process.start()
    return process


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A process in a race, and the pipe to it."""

    process: BaseProcess
    pipe: Connection
    early_end: str
    """The error if the process ends before it has answered."""

    def ask(self, question: Any) -> Any:
        """Sends a question and waits for the answer.

        Raises:
            ConfigError: the process ended.
        """
        try:
            self.pipe.send(question)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise ConfigError(f"{self.early_end}: its error stands above") from None


class Generation:
    """The fresh processes of one generation.

    It is a context manager. At its end each process is sent None and has `END_S` to end; after an error all are killed.
    """

    def __init__(self) -> None:
        self._racers: list[Racer] = []

    def start(self, work: Callable[..., None], *arguments: Any, early_end: str) -> Racer:
        """Starts a process.

        Args:
            work: runs in the process. It takes the arguments and its end of the pipe, reads questions and answers each;
                the question None asks it to return.
            arguments: of `work`, before the pipe.
            early_end: the error if the process ends before it has answered.
        """
        pipe, end = multiprocessing.get_context("spawn").Pipe()
        process = spawn(work, *arguments, end)  # no daemon: it may start ranks
        end.close()
        racer = Racer(process=process, pipe=pipe, early_end=early_end)
        self._racers.append(racer)
        return racer

    def __enter__(self) -> "Generation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._ask_to_end()
        finally:
            for racer in self._racers:
                racer.process.kill()
                racer.process.join()
                racer.pipe.close()

    def _ask_to_end(self) -> None:
        for racer in self._racers:
            with contextlib.suppress(OSError):
                racer.pipe.send(None)
        for racer in self._racers:
            racer.process.join(END_S)


def run_generations(count: int, run: Callable[[Generation, int], T]) -> list[T]:
    """Runs generations one after another.

    Args:
        count: how many.
        run: starts the processes of a generation and lets them race; it is given the generation and its number, from 0.

    Returns:
        what `run` returned, by generation.
    """
    results = []
    for number in range(count):
        with Generation() as generation:
            results.append(run(generation, number))
    return results


def take_turns(names: Sequence[str], rounds: int, order: random.Random, turn: Callable[[str], T]) -> list[dict[str, T]]:
    """Gives each name one turn a round, in an order that is drawn anew for each round.

    Returns:
        by round and name, what `turn` returned.
    """
    return [{name: turn(name) for name in order.sample(names, len(names))} for _ in range(rounds)]


def ratio(values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]) -> Estimate:
    """The geometric mean of values / firsts within rounds, with a 95 % interval over generations.

    Args:
        values: positive, by generation and round.
        firsts: what the first racer has in the same rounds.
    """
    return ratio_interval(_means(lambda value, first: math.log(value / first), values, firsts))


def difference(values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values - firsts within rounds, with a 95 % interval over generations.

    Args:
        values: by generation and round.
        firsts: what the first racer has in the same rounds.
    """
    return mean_interval(_means(operator.sub, values, firsts))


def _means(
    compare: Callable[[float, float], float], values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]
) -> list[float]:
    """By generation, the mean over its rounds of what `compare` makes of both values."""
    return [
        statistics.fmean(map(compare, rounds, first_rounds))
        for rounds, first_rounds in zip(values, firsts, strict=True)
    ]
