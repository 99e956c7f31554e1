"""Distributed data parallel: every rank has the whole model, and gradients are summed. The optimizer may be sharded."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
import torch.distributed
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from llmeff.core.config import ConfigError, Count, Flag
from llmeff.core.dist import in_a_world
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import PrecisionName
from llmeff.core.shard import replicated, whole_tensors
from llmeff.cost.arrays import Array, Weight
from llmeff.cost.workload import Workload
from llmeff.parallel.rank_law import RankLaw
from llmeff.parallel.sharded_checkpoint import ShardOwner, whole
from llmeff.parallel.single import SingleProcess, check_joined
from llmeff.parallel.strategy import StrategyConfig, StrategyInputs


class DDP(StrategyConfig):
    """PyTorch's DistributedDataParallel (Li et al. 2020)."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "fp16")

    name: Literal["ddp"] = "ddp"
    bucket_mib: Count = 25
    """Approximate size of a gradient bucket in MiB. Buckets are summed over the ranks while backward runs."""
    shard_optimizer: Flag = False
    """Assign each parameter, whole, to one rank, which keeps its optimizer state, updates it and sends it to the other
    ranks. This is ZeRO-1 (Rajbhandari et al. 2020) for optimizers that must see a whole matrix."""

    def refusal(self, sharding: Sharding) -> str | None:
        """Refuses `shard_optimizer` for an optimizer whose state belongs to all parameters together."""
        if self.shard_optimizer and sharding == "none":
            return (
                "its state belongs to all parameters together, but parallel.shard_optimizer distributes the parameters "
                "over the ranks"
            )
        return None

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Refuses fp16 with `shard_optimizer`: ranks would see different overflows and use different loss scales."""
        if precision == "fp16" and self.shard_optimizer:
            yield (
                "precision 'fp16' does not work with parallel.shard_optimizer: each rank would adapt the loss scale to "
                "the gradients of its own parameters only. Use precision 'bf16', or set shard_optimizer = false"
            )

    def build(self, inputs: StrategyInputs) -> "Replicas":
        """Wraps this process's copy of the model in DDP and joins the other ranks."""
        with in_a_world():
            return Replicas(inputs, self)

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> "ReplicaLaw":
        """Returns the law of a rank, which keeps the whole model and all gradient buckets throughout the step."""
        return ReplicaLaw(weights, work, self, rank)


class ReplicaLaw(RankLaw):
    """The law of a rank under DDP.

    Gradients of earlier micro-batches live in tensors of their own. The last backward copies gradients to the buckets.
    """

    def __init__(self, weights: list[Weight], work: Workload, config: DDP, rank: int):
        super().__init__(weights, work, config.ranks, rank)
        deal = whole_tensors if config.shard_optimizer else replicated
        sizes = {weight.name: weight.size for weight in self.weights}
        self._owned = [{part.name for part in shard} for shard in deal(sizes, config.ranks)]
        self._shares_optimizer = config.shard_optimizer

    def add_resident(self) -> None:
        """Adds every weight with its master copy, and the buckets."""
        super().add_resident()
        for weight in self.weights:
            self.keep("gradient_bytes", weight.part, weight.num_bytes)

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Keeps the gradient. In the last micro-batch, moves it to its bucket and counts the all-reduce."""
        if not self.is_last:
            super().on_gradient(weight, gradient)
            return
        self.whole.pop(weight.name, None)
        self.send("all_reduce", weight.num_bytes)

    def update(self) -> None:
        """Counts the training loop's all-reduces and, with `shard_optimizer`, the broadcasts of updated parameters."""
        super().update()
        if self._shares_optimizer:
            previous = None
            for owned in self._owned:
                sizes = [weight.size for weight in self.weights if weight.name in owned]
                flat = self.flatten(sizes, self.parameter_number_bytes)
                self.send("broadcast", sum(sizes) * self.parameter_number_bytes)
                del previous  # each flat copy lives until the next one has been made
                previous = flat

    def updated(self) -> list[Weight]:
        """Returns the parameters that this rank updates."""
        return [weight for weight in super().updated() if weight.name in self._owned[self.rank]]


class Replicas(SingleProcess):
    """A model that Accelerate wraps in DDP. With `shard_optimizer`, each rank updates only its own parameters."""

    def __init__(self, inputs: StrategyInputs, config: DDP):
        from accelerate import DistributedDataParallelKwargs

        self._config = config
        self._num_steps = 0
        self._buckets: list[Tensor] = []
        kwargs = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=config.bucket_mib
        )
        super().__init__(inputs, kwargs_handlers=[kwargs])
        check_joined(self._accelerator, self.world.ranks)

    def _owned(self) -> list[ParameterInfo]:
        sizes = {row.name: row.parameter.numel() for row in self._rows}
        deal = whole_tensors if self._config.shard_optimizer else replicated
        self._plan = deal(sizes, self.world.ranks)
        if not all(self._plan):
            raise ConfigError(
                f"parallel.shard_optimizer needs at least one parameter per rank, but there are {self.world.ranks} "
                f"ranks and {len(sizes)} parameters"
            )
        return self._rows_of(self.world.rank)

    def _rows_of(self, rank: int) -> list[ParameterInfo]:
        names = {part.name for part in self._plan[rank]}
        return [row for row in self._rows if row.name in names]

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Makes DDP sum gradients over the ranks only in the backward pass of the last micro-batch."""
        with contextlib.nullcontext() if is_last or self.world.ranks == 1 else self.model.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """Runs backward of the loss times the number of ranks, because DDP averages the gradients over the ranks."""
        super().backward(loss * self.world.ranks)

    def step(self) -> bool:
        """Updates this rank's parameters. With `shard_optimizer`, each rank then sends its parameters to all others."""
        self._num_steps += 1
        if self._num_steps == 2:  # after the first step DDP knows the order of gradients and rebuilds its buckets
            self._buckets = [row.parameter.grad for row in self._rows if row.parameter.grad is not None]
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

    def resident(self) -> Iterable[Tensor]:
        """Yields the model, the optimizer state and, from the second step on, the buckets."""
        yield from super().resident()
        yield from self._buckets

    def owners(self) -> list[ShardOwner]:
        """Returns the parameters that this rank saves.

        With `shard_optimizer`, each rank saves its own parameters. Otherwise, the main rank saves all.
        """
        return self.owned() if self._config.shard_optimizer or self.world.is_main else []

    def owned(self) -> list[ShardOwner]:
        """Returns the whole parameters that this rank updates: all of them, or its own with `shard_optimizer`."""
        return [whole(row) for row in self._rows_of(self.world.rank)]
