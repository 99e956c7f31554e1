"""Distributed data parallel: every rank has the whole model, gradients are summed; the optimizer may be shared out."""

import contextlib
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.distributed
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from llmeff.core.config import ConfigError, Count, Flag
from llmeff.core.precision import PrecisionName
from llmeff.core.shard import replicated, whole_tensors
from llmeff.core.table import Row, Sharding
from llmeff.parallel.saved import Holder, whole
from llmeff.parallel.single import SingleProcess, check_joined
from llmeff.parallel.strategy import Parts, StrategyConfig


class DDP(StrategyConfig):
    """Torch's DistributedDataParallel (Li et al. 2020)."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "fp16")

    name: Literal["ddp"] = "ddp"
    bucket_mib: Count = 25
    """Gradients are summed over the ranks in buckets of about so many MiB, while backward goes on."""
    shard_optimizer: Flag = False
    """Each rank keeps the optimizer's state of, and updates, whole parameters of its own, and sends them to the others:
    ZeRO-1 (Rajbhandari et al. 2020) for optimizers that must see a matrix as a whole."""

    def refusal(self, sharding: Sharding) -> str | None:
        """Nothing is split but, where asked for, between parameters."""
        if self.shard_optimizer and sharding == "none":
            return "its state belongs to all parameters together, and parallel.shard_optimizer deals them out to ranks"
        return None

    def build(self, parts: Parts) -> "Replicas":
        """Joins this process's replica to the others."""
        return Replicas(parts, self)


class Replicas(SingleProcess):
    """Accelerate wraps the model; an optimizer that is shared out is stepped where its parameters are owned."""

    def __init__(self, parts: Parts, config: DDP):
        from accelerate import DistributedDataParallelKwargs

        self._config = config
        kwargs = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=config.bucket_mib
        )
        super().__init__(parts, kwargs_handlers=[kwargs])
        check_joined(self._accelerator, self.world.ranks)

    def _owned(self) -> list[Row]:
        sizes = {row.name: row.parameter.numel() for row in self._rows}
        deal = whole_tensors if self._config.shard_optimizer else replicated
        self._plan = deal(sizes, self.world.ranks)
        if not all(self._plan):
            raise ConfigError(f"parallel.shard_optimizer: {self.world.ranks} ranks share {len(sizes)} parameters")
        return self._rows_of(self.world.rank)

    def _rows_of(self, rank: int) -> list[Row]:
        names = {part.name for part in self._plan[rank]}
        return [row for row in self._rows if row.name in names]

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Gradients are summed over the ranks with the last micro-batch's."""
        with contextlib.nullcontext() if is_last or self.world.ranks == 1 else self.model.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """DDP takes the mean over ranks."""
        super().backward(loss * self.world.ranks)

    def step(self) -> bool:
        """Updates what this rank owns; then every owner sends its parameters to all."""
        updated = super().step()
        if self._config.shard_optimizer and updated:
            self._send()
        return updated

    @torch.no_grad()
    def _send(self) -> None:
        for rank in range(self.world.ranks):
            tensors = [row.parameter.detach() for row in self._rows_of(rank)]
            flat = _flatten_dense_tensors(tensors)
            torch.distributed.broadcast(flat, src=rank)
            if rank != self.world.rank:
                for tensor, values in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
                    tensor.copy_(values)

    def holders(self) -> list[Holder]:
        """What it updates; of what all update, the main rank's."""
        return self.updated() if self._config.shard_optimizer or self.world.is_main else []

    def updated(self) -> list[Holder]:
        """Every parameter, or where the optimizer is shared out this rank's."""
        return [whole(row) for row in self._rows_of(self.world.rank)]
