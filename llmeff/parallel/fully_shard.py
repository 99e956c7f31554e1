"""FSDP2: each rank keeps rows of the parameters, gradients and optimizer state. Parameters are gathered for use."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from llmeff.core.config import Flag
from llmeff.core.parameters import Sharding
from llmeff.core.precision import BYTES, PrecisionName
from llmeff.core.shard import part_length, split_rows
from llmeff.core.tensors import local, stored_tensors
from llmeff.cost.arrays import Array, Storage, Weight
from llmeff.cost.price import Kind
from llmeff.cost.workload import Workload
from llmeff.parallel.group_state import group_entries
from llmeff.parallel.rank_law import RankLaw
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, check_fit, load_buffers
from llmeff.parallel.strategy import Strategy, StrategyConfig, StrategyInputs


class FSDP(StrategyConfig):
    """PyTorch's fully_shard, called directly, because Accelerate's FSDP does nothing on a CPU and casts parameters."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16")

    launch_flags: ClassVar[tuple[str, ...]] = ("--multi_gpu", "--use_fsdp")

    name: Literal["fsdp"] = "fsdp"
    reshard_after_forward: Flag = True
    """Free a layer's gathered parameters after its forward pass and gather them again for backward."""

    def refusal(self, sharding: Sharding) -> str | None:
        """Refuses optimizers whose update is not elementwise, because they would update a slice differently."""
        if sharding == "elementwise":
            return None
        return "it must see whole parameters, but every rank has only some rows of each parameter"

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Refuses torch.compile, because the graph would break at every layer, where parameters are gathered."""
        if compiled != "off":
            yield (
                f"runtime.compile {compiled!r} does not work with parallel {self.name!r}: gathering parameters breaks "
                "the graph. Use 'off'"
            )

    def build(self, inputs: StrategyInputs) -> "Sharded":
        """Shards this process's copy of the model."""
        return Sharded(inputs, self)

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> "ShardLaw":
        """Returns the law of a rank, which keeps rows of every parameter and the units that are gathered."""
        return ShardLaw(weights, work, self, rank)


_ROOT = ""
"""Name of the root unit, which has all parameters that are in no layer."""


class ShardLaw(RankLaw):
    """The law of a rank under fully_shard, whose hooks gather a unit before its first use and free it after its last.

    A unit is a layer, or the root. Its parameters are gathered into a buffer, which is then copied into parameters. In
    forward the buffer lives until the next unit is gathered. In backward the buffer is freed at once, and the next
    unit's buffer is gathered ahead.
    """

    def __init__(self, weights: list[Weight], work: Workload, config: FSDP, rank: int):
        super().__init__(weights, work, config.ranks, rank)
        self._reshards = config.reshard_after_forward
        self._units: defaultdict[str, list[Weight]] = defaultdict(list)
        for weight in self.every:
            self._units[_unit(weight)].append(weight)
        self._order: list[str] = []
        self._whole: dict[str, Storage] = {}
        self._buffers: dict[str, Storage] = {}
        self._last_buffer: Storage | None = None
        self._last_input: Storage | None = None
        self._sums: dict[str, Storage] = {}
        self._num_ready: Counter[str] = Counter()

    def _padded(self, weight: Weight) -> int:
        """Returns the bytes of a weight whose number of rows is padded to a multiple of the number of ranks."""
        return (
            part_length(weight.shape[0], self.ranks) * self.ranks * prod(weight.shape[1:]) * self.parameter_number_bytes
        )

    def _size(self, unit: str) -> int:
        return sum(map(self._padded, self._units[unit]))

    def _trained(self, unit: str) -> list[Weight]:
        return [weight for weight in self._units[unit] if weight.is_trained]

    def add_resident(self) -> None:
        """Adds this rank's rows of every weight, with padding."""
        for weight in self.every:
            kind: Kind = "parameter_bytes" if weight.is_trained else "frozen_bytes"
            self.keep(kind, weight.part, self._padded(weight) // self.ranks)

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """Gathers the root and the weight's unit if they are not gathered yet."""
        unit = _unit(weight)
        if in_backward:
            self._use_backward(_ROOT)
            self._use_backward(unit)
        else:
            self._leave_layer(unit)
            self._use_forward(_ROOT)
            self._use_forward(unit)

    def _leave_layer(self, next_unit: str) -> None:
        last = self._order[-1] if self._order else _ROOT
        if last not in (next_unit, _ROOT) and self._reshards:
            self._whole.pop(last, None)

    def _use_forward(self, unit: str) -> None:
        if unit != _ROOT and unit not in self._order:
            self._order.append(unit)
        if unit not in self._whole:
            buffer = self._gather(unit)
            self._last_buffer = None
            self._whole[unit] = self.make("gathered_bytes", self._size(unit))
            self._last_buffer = buffer

    def _gather(self, unit: str) -> Storage | None:
        if self.ranks == 1:
            return None
        buffer = self.make("gathered_bytes", self._size(unit))
        self.gather(self._size(unit))
        return buffer

    def end_forward(self) -> None:
        """Frees the last layer and the root after forward. The backward of the loss then gathers the root again."""
        self._leave_layer(_ROOT)
        self._last_buffer = None
        if self._reshards:
            self._whole.pop(_ROOT, None)
        self._use_backward(_ROOT)  # the loss belongs to the root

    def _use_backward(self, unit: str) -> None:
        if unit in self._num_ready:
            return  # the unit's backward has begun
        self._num_ready[unit] = 0
        if unit not in self._whole:
            buffer = self._buffers.pop(unit, None) or self._gather(unit)
            self._whole[unit] = self.make("gathered_bytes", self._size(unit))
            del buffer
        ahead = self._order.pop() if self._order else None
        if ahead is not None and ahead not in self._whole:
            buffer = self._gather(ahead)
            if buffer is not None:
                self._buffers[ahead] = buffer

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Keeps the gradient. Once all gradients of a layer are ready, sums them over the ranks and frees the layer."""
        super().on_gradient(weight, gradient)
        unit = _unit(weight)
        self._num_ready[unit] += 1
        if unit != _ROOT and self._num_ready[unit] == len(self._trained(unit)):
            self._reduce(unit)

    def _reduce(self, unit: str) -> None:
        self._whole.pop(unit, None)
        self._last_input = None
        trained = self._trained(unit)
        if not trained:
            return
        size = sum(map(self._padded, trained))
        self._last_input = self.make("bucket_bytes", size)
        for weight in trained:
            self.whole.pop(weight.name)
        part = self.make("gradient_bytes", size // self.ranks)
        if self.ranks > 1:
            self.scatter(size)
        self._sums.setdefault(unit, part)

    def end_backward(self) -> None:
        """Sums the root's gradients over the ranks."""
        self._reduce(_ROOT)
        self._last_input = None
        self._num_ready.clear()

    def gradients(self) -> Counter[str]:
        """Returns the bytes of the gradients of this rank's rows, with padding, by part."""
        parts: Counter[str] = Counter()
        for weight in self.weights:
            parts[weight.part] += self._padded(weight) // self.ranks
        return parts

    def update(self) -> None:
        """Counts the all-reduces of the training loop and of the parameters' norms, then frees the gradients."""
        super().update()
        if self.ranks > 1:
            self.send("all_reduce", len(self.weights) * BYTES["float32"])
        self._sums.clear()

    def updated(self) -> list[Weight]:
        """Returns this rank's rows without padding, because padding has no optimizer state."""
        shapes = {weight.name: weight.shape for weight in self.weights}
        shard = split_rows(shapes, self.ranks)[self.rank]
        return [Weight(w.name, (part.size,), w.dtype, w.part) for w, part in zip(self.weights, shard, strict=True)]


def _unit(weight: Weight) -> str:
    """Returns the weight's layer, such as `layers.0` or `encoder.0`, or the root if the weight is in no layer."""
    first, number, *_ = (*weight.name.split("."), "")
    return f"{first}.{number}" if number.isdigit() else _ROOT


class Sharded(Strategy):
    """A model sharded by fully_shard. Each layer of `model.layers` is a unit, and the rest of the model is another."""

    def __init__(self, inputs: StrategyInputs, config: FSDP):
        super().__init__(inputs)
        self._shapes = {row.name: row.shape for row in inputs.parameter_infos(inputs.model)}
        mesh = init_device_mesh(inputs.device.type, (self.world.ranks,))
        for layer in getattr(inputs.model, "layers", ()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        fully_shard(inputs.model, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        if inputs.precision.autocast:
            autocast = torch.autocast(inputs.device.type, getattr(torch, inputs.precision.compute))
            inputs.model.forward = autocast(inputs.model.forward)
        self._rows = inputs.parameter_infos(inputs.model)
        self._parameters = [row.parameter for row in self._rows]
        self.optimizer = inputs.optimizer(self._rows)
        self.begun = group_entries(self.optimizer)
        self.model = inputs.model

    def backward(self, loss: Tensor) -> None:
        """Runs backward of the loss times the number of ranks, because FSDP averages the gradients over the ranks."""
        (loss * self.world.ranks).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips the gradients by their norm over the rows of all ranks. Returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, float("inf") if max_norm is None else max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> bool:
        """Updates this rank's rows and clears the gradients."""
        self.optimizer.step()
        self.skip()
        return True

    def skip(self) -> None:
        """Clears the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def owners(self) -> list[ShardOwner]:
        """Returns this rank's rows of every parameter."""
        shard = split_rows(self._shapes, self.world.ranks)[self.world.rank]
        return [
            ShardOwner(key=row.parameter, parts=((part, 0),) if part.size else ())
            for row, part in zip(self._rows, shard, strict=True)
        ]

    def resident(self) -> Iterable[Tensor]:
        """Yields this rank's rows of parameters and optimizer state, and the buffers."""
        for tensor in super().resident():
            yield local(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Gathers one parameter at a time. Returns the whole model on the main rank, and an empty dict on others."""
        whole = {}
        for name, tensor in stored_tensors(self._plain).items():
            values = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.world.is_main:
                whole[name] = values.detach().cpu()
        return whole

    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads only the buffers.

        The weights are already read by `load`, because forward uses the same tensors that the optimizer updates.
        """
        check_fit(self._rows, saved)
        load_buffers(self._plain, saved)

    def close(self) -> None:
        """Frees the gathered parameters."""
        for module in self._plain.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
