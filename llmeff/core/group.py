"""Collectives of the processes of a run: sums, broadcasts, barriers, and errors that all ranks raise together."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from llmeff.core.config import ConfigError
from llmeff.core.dist import in_a_world

T = TypeVar("T")


def connect(device: torch.device, timeout_s: float) -> None:
    """Joins the launcher's process group, or creates a group of this process alone.

    Does nothing if this process has already joined a group.

    Args:
        device: this process's device. GPUs use NCCL, CPUs use gloo.
        timeout_s: seconds that a collective waits for other ranks before it fails.
    """
    if torch.distributed.is_initialized():
        return
    is_gpu = device.type == "cuda"
    if is_gpu:  # NCCL also gathers objects on the current device
        torch.cuda.set_device(device)
    with in_a_world():
        torch.distributed.init_process_group(
            "nccl" if is_gpu else "gloo", timeout=timedelta(seconds=timeout_s), device_id=device if is_gpu else None
        )


def disconnect() -> None:
    """Leaves the process group, if this process has joined one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_loss(error: BaseException | None) -> bool:
    """Returns whether an error means that another rank ended or did not respond in time."""
    lost = (torch.distributed.DistError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    return isinstance(error, lost) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def is_joined() -> bool:
    """Returns whether this process has joined a process group."""
    return torch.distributed.is_initialized()


def is_shared() -> bool:
    """Returns whether this process has joined a process group of more than one rank."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def barrier() -> None:
    """Waits until every rank has called it."""
    if is_shared():
        torch.distributed.barrier()


def total(value: Tensor) -> Tensor:
    """Returns the sum over all ranks, on the value's device. With one rank, returns the value itself."""
    return _reduced(value, torch.distributed.ReduceOp.SUM)


def _reduced(value: Tensor, by: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    if not is_shared():
        return value
    on_gpu = torch.distributed.get_backend() == "nccl"
    reduced = value.detach().cuda() if on_gpu else value.detach().clone()
    torch.distributed.all_reduce(reduced, by)
    return reduced.to(value.device)


def least(value: int) -> int:
    """Returns the smallest of the values that the ranks give."""
    return -int(_reduced(torch.tensor(-value), torch.distributed.ReduceOp.MAX))


def totals(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums counts by name over micro-batches and ranks. A step's summed losses are divided by these totals.

    A total of 0 is replaced by 1, so that a step in which every target is masked has zero loss and zero gradient.

    Args:
        counts: the counts of each micro-batch on this rank, by name.
    """
    summed = {name: sum(count[name] for count in counts) for name in counts[0]}
    if is_shared():
        values = total(torch.tensor([*summed.values()], dtype=torch.float64)).tolist()  # exact for integers
        summed = dict(zip(summed, values, strict=True))
    return {name: number or 1 for name, number in summed.items()}


def from_main(value: T) -> T:
    """Broadcasts the main rank's value and returns it on every rank."""
    if not is_shared():
        return value
    given = [value]
    torch.distributed.broadcast_object_list(given, src=0)
    return given[0]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Context manager in which a ConfigError on any rank is raised on all ranks, so that no rank waits forever.

    All ranks must enter the block, and they wait for each other at its end.

    Raises:
        ConfigError: if the block raised a ConfigError on any rank. The problems are those of the lowest such rank.
    """
    raised: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        raised = error
    everyones: list[list[str] | None] = [raised.problems if raised else None]
    if is_shared():
        everyones *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, raised.problems if raised else None)
    first = next(filter(None, everyones), None)
    if first is not None:
        raise ConfigError(first) from raised
