"""Processes that train together, kept for many tests: what a function gives on each of two, three or four ranks."""

import atexit
import importlib
import multiprocessing
import os
import traceback
from typing import Any

from llmeff.core.dist import become_rank, free_port

CONTEXT = multiprocessing.get_context("spawn")
TIMEOUT_S = 240


class Ranks:
    """So many gloo ranks of one process group.

    Args:
        number: how many.
    """

    def __init__(self, number: int):
        port = free_port()
        self.number = number
        self._lanes = []
        self.processes: list[Any] = []
        """By rank."""
        for rank in range(number):
            lane, end = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, number, port, end), daemon=True)
            process.start()
            end.close()
            self._lanes.append(lane)
            self.processes.append(process)

    def start(self, function: Any, *arguments: Any) -> None:
        """Has each rank call a module's function."""
        for lane in self._lanes:
            lane.send((function.__module__, function.__qualname__, arguments))

    def run(self, function: Any, *arguments: Any) -> list[Any]:
        """What a module's function gives on each rank.

        Raises:
            RuntimeError: it raised on a rank; its traceback is the message.
        """
        self.start(function, *arguments)
        answers = [lane.recv() if lane.poll(TIMEOUT_S) else ("error", "no answer in time") for lane in self._lanes]
        errors = [f"rank {rank}: {value}" for rank, (kind, value) in enumerate(answers) if kind == "error"]
        if errors:  # ranks that erred apart are of no use to the next test
            if _POOLS.get(self.number) is self:
                del _POOLS[self.number]
            self.close()
            raise RuntimeError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()


def _serve(rank: int, number: int, port: int, lane: Any) -> None:
    become_rank(rank, number, port)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from llmeff.core import group

    torch.set_num_threads(1)
    group.connect(torch.device("cpu"), 120)
    while True:
        try:
            module, name, arguments = lane.recv()
        except EOFError:
            return
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            lane.send(("value", target(*arguments)))
        except BaseException:  # noqa: BLE001  whatever it is, the test shall see it
            lane.send(("error", traceback.format_exc()))


_POOLS: dict[int, Ranks] = {}


def ranks(number: int) -> Ranks:
    """The ranks of that number, started when first asked for."""
    if number not in _POOLS:
        _POOLS[number] = Ranks(number)
        atexit.register(_POOLS[number].close)
    return _POOLS[number]
