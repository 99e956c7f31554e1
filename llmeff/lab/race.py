"""Races processes against one another: they take turns in random order, and their times are compared.

A generation is a set of fresh processes. Two processes of the same program differ in speed by a few per cent for as long as
they live, because their memory is at different addresses. So the rounds of one process are not independent. Each
generation therefore gives one value, and confidence intervals are over generations.
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
    """Starts a fresh Python process that calls `target`. The working folder is not on its sys.path.

    Args:
        target: the function to call. It must be importable by name.
        arguments: arguments of the call, which must be picklable.
        daemon: whether the process ends with this one. A daemon cannot start processes of its own.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=daemon)
    with folder_off_paths():
        process.start()
    return process


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A process in a race, with the pipe to it."""

    process: BaseProcess
    pipe: Connection
    early_end: str
    """The error message if the process ends before it has answered."""

    def ask(self, question: Any) -> Any:
        """Sends a question and waits for the answer.

        Raises:
            ConfigError: the process ended before it answered.
        """
        try:
            self.pipe.send(question)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise ConfigError(f"{self.early_end}: see its error above") from None


class Generation:
    """The fresh processes of one generation, as a context manager.

    At the end of the `with` block, each process gets None and has `END_S` seconds to end. If the block raises an error,
    all processes are killed at once.
    """

    def __init__(self) -> None:
        self._racers: list[Racer] = []

    def start(self, work: Callable[..., None], *arguments: Any, early_end: str) -> Racer:
        """Starts a process.

        Args:
            work: the function to run in the process. It takes the arguments and its end of the pipe, reads questions from
                the pipe and answers each of them. It should return if the question is None.
            arguments: arguments of `work`, before the pipe.
            early_end: the error message if the process ends before it has answered.
        """
        pipe, end = multiprocessing.get_context("spawn").Pipe()
        process = spawn(work, *arguments, end)  # not a daemon, because it may start ranks
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
        count: number of generations.
        run: starts the processes of a generation and lets them race. It takes the generation and its number, from 0.

    Returns:
        The results of `run`, one per generation.
    """
    results = []
    for number in range(count):
        with Generation() as generation:
            results.append(run(generation, number))
    return results


def take_turns(names: Sequence[str], rounds: int, order: random.Random, turn: Callable[[str], T]) -> list[dict[str, T]]:
    """Calls `turn` for each name once per round, in a new random order in each round.

    Returns:
        A dict per round, with the result of `turn` for each name.
    """
    return [{name: turn(name) for name in order.sample(names, len(names))} for _ in range(rounds)]


def ratio(values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]) -> Estimate:
    """Returns the geometric mean of values / firsts within rounds, with a 95 % interval over generations.

    Args:
        values: positive values of a racer, by generation and round.
        firsts: values of the first racer in the same rounds.
    """
    return ratio_interval(_means(lambda value, first: math.log(value / first), values, firsts))


def difference(values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]) -> Estimate:
    """Returns the mean of values - firsts within rounds, with a 95 % interval over generations.

    Args:
        values: values of a racer, by generation and round.
        firsts: values of the first racer in the same rounds.
    """
    return mean_interval(_means(operator.sub, values, firsts))


def _means(
    compare: Callable[[float, float], float], values: Sequence[Sequence[float]], firsts: Sequence[Sequence[float]]
) -> list[float]:
    """Returns the mean of `compare(value, first value)` over the rounds of each generation."""
    return [
        statistics.fmean(map(compare, rounds, first_rounds))
        for rounds, first_rounds in zip(values, firsts, strict=True)
    ]
