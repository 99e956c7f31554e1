"""What the processes of a run exchange: sums, errors and barriers."""

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
    """Joins the launcher's process group, or makes one of this process alone.

    Args:
        device: where this process computes; NCCL connects GPUs, gloo CPUs.
        timeout_s: how long a collective waits for other ranks before it fails.
    """
    if torch.distributed.is_initialized():
        return
    is_gpu = device.type == "cuda"
    if is_gpu:  # objects are gathered there, too
        torch.cuda.set_device(device)
    with in_a_world():
        torch.distributed.init_process_group(
            "nccl" if is_gpu else "gloo", timeout=timedelta(seconds=timeout_s), device_id=device if is_gpu else None
        )


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_loss(error: BaseException | None) -> bool:
    """Whether an error says that another rank is gone or did not come in time."""
    lost = (torch.distributed.DistError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    return isinstance(error, lost) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def is_joined() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_initialized()


def is_shared() -> bool:
    """Whether there are other processes to talk to."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def barrier() -> None:
    """Returns when every rank has called it."""
    if is_shared():
        torch.distributed.barrier()


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, on the value's device; the value itself if there is only one rank."""
    return _reduced(value, torch.distributed.ReduceOp.SUM)


def _reduced(value: Tensor, by: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    if not is_shared():
        return value
    on_gpu = torch.distributed.get_backend() == "nccl"
    reduced = value.detach().cuda() if on_gpu else value.detach().clone()
    torch.distributed.all_reduce(reduced, by)
    return reduced.to(value.device)


def least(value: int) -> int:
    """The smallest number of all ranks."""
    return -int(_reduced(torch.tensor(-value), torch.distributed.ReduceOp.MAX))


def totals(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name over micro-batches and ranks, with 1 in place of 0. Named sums of losses are divided by these, once.

    So a step in which every target is masked has zero loss and zero gradient.
    """
    summed = {name: sum(count[name] for count in counts) for name in counts[0]}
    if is_shared():
        values = total(torch.tensor([*summed.values()], dtype=torch.float64)).tolist()  # whole numbers stay exact
        summed = dict(zip(summed, values, strict=True))
    return {name: number or 1 for name, number in summed.items()}


def from_main(value: T) -> T:
    """The main rank's value, on all ranks."""
    if not is_shared():
        return value
    given = [value]
    torch.distributed.broadcast_object_list(given, src=0)
    return given[0]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block in which one rank's ConfigError becomes every rank's, so that no rank waits for another.

    Raises:
        ConfigError: with the problems of the first rank that has any.
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
