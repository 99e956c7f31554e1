"""FSDP2: parameters, gradients and optimizer state are split by rows over the ranks, and gathered where they are used."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from llmeff.core.config import Flag
from llmeff.core.precision import PrecisionName
from llmeff.core.shard import split_rows
from llmeff.core.table import Sharding
from llmeff.core.tensors import stored_tensors
from llmeff.parallel.saved import Holder, Saved, check_fit, load_buffers
from llmeff.parallel.strategy import Parts, Strategy, StrategyConfig


class FSDP(StrategyConfig):
    """Torch's fully_shard, on every device: Accelerate leaves it out on a CPU, and casts otherwise than autocast does."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16")

    launch_flags: ClassVar[tuple[str, ...]] = ("--multi_gpu", "--use_fsdp")

    name: Literal["fsdp"] = "fsdp"
    reshard_after_forward: Flag = True
    """Let a layer's parameters go after forward and gather them again for backward."""

    def refusal(self, sharding: Sharding) -> str | None:
        """Only what is made number by number is the same on a slice."""
        if sharding == "elementwise":
            return None
        return "it must see whole parameters, and every rank has rows of each"

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """A compiled graph ends wherever a layer gathers its parameters."""
        if compiled != "off":
            yield f"runtime.compile {compiled!r} is not for parallel {self.name!r}: gathering parameters breaks the graph"

    def build(self, parts: Parts) -> "Sharded":
        """Splits this process's copy."""
        return Sharded(parts, self)


class Sharded(Strategy):
    """Layers are units of their own where the model has `layers`; the rest is one."""

    def __init__(self, parts: Parts, config: FSDP):
        super().__init__(parts)
        self._shapes = {row.name: row.shape for row in parts.table(parts.model)}
        mesh = init_device_mesh(parts.device.type, (self.world.ranks,))
        for layer in getattr(parts.model, "layers", ()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        fully_shard(parts.model, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        if parts.precision.autocast:
            autocast = torch.autocast(parts.device.type, getattr(torch, parts.precision.compute))
            parts.model.forward = autocast(parts.model.forward)
        self._rows = parts.table(parts.model)
        self._parameters = [row.parameter for row in self._rows]
        self.optimizer = parts.optimizer(self._rows)
        self.model = parts.model

    def backward(self, loss: Tensor) -> None:
        """FSDP takes the mean over ranks."""
        (loss * self.world.ranks).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips to the norm over all ranks' rows."""
        norm = nn.utils.clip_grad_norm_(self._parameters, float("inf") if max_norm is None else max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> bool:
        """Updates this rank's rows and clears."""
        self.optimizer.step()
        self.skip()
        return True

    def skip(self) -> None:
        """Clears."""
        for parameter in self._parameters:
            parameter.grad = None

    def holders(self) -> list[Holder]:
        """The rows of every parameter."""
        shard = split_rows(self._shapes, self.world.ranks)[self.world.rank]
        return [
            Holder(key=row.parameter, parts=((part, 0),) if part.size else ())
            for row, part in zip(self._rows, shard, strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Gathered on all ranks, a parameter at a time, and kept by the main one."""
        whole = {}
        for name, tensor in stored_tensors(self._plain).items():
            values = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.world.is_main:
                whole[name] = values.detach().cpu()
        return whole

    def load_weights(self, saved: Saved) -> None:
        """The buffers; the weights are what the holders update."""
        check_fit(self._rows, saved)
        load_buffers(self._plain, saved)

    def close(self) -> None:
        """Frees gathered parameters."""
        for module in self._plain.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
