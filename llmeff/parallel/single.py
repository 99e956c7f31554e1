"""One process on one device, through Accelerate."""

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core.dist import world
from llmeff.core.optimizer_state import load_named_state, named_state
from llmeff.core.precision import Precision, PrecisionName
from llmeff.core.table import Row
from llmeff.core.tensors import copy_tensors, stored_tensors
from llmeff.parallel.strategy import Strategy, StrategyConfig


class Single(StrategyConfig):
    """One process."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "fp16")

    name: Literal["single"] = "single"

    @model_validator(mode="after")
    def _alone(self) -> "Single":
        if self.ranks != 1:
            raise ValueError(f"ranks is {self.ranks}, but the strategy 'single' is one process")
        return self

    def build(
        self,
        model: nn.Module,
        rows: list[Row],
        optimizer: Optimizer,
        device: torch.device,
        precision: Precision,
    ) -> "SingleProcess":
        """Sets the model and the optimizer up on the device."""
        return SingleProcess(model, rows, optimizer, device, precision)


class SingleProcess(Strategy):
    """Accelerate places the model, casts its forward and scales its loss; the step itself is plain PyTorch."""

    def __init__(
        self,
        model: nn.Module,
        rows: list[Row],
        optimizer: Optimizer,
        device: torch.device,
        precision: Precision,
    ):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # Accelerate keeps one state for the process, and a run before this one may have had another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision.compute]
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
        self.device = device
        self.world = world()
        self.model = self.accelerator.prepare(model)
        # Not prepared: Accelerate's optimizer looks for other packages on disk at every step, which takes 0.4 ms.
        self._optimizer, self._scaler = optimizer, self.accelerator.scaler
        self._plain, self._rows = model, rows
        self._parameters = [row.parameter for row in rows]

    def backward(self, loss: Tensor) -> None:
        """Backward of the loss, scaled in fp16."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The value: there is one rank."""
        return value

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips to the norm; unscales fp16's gradients first."""
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit)

    def step(self) -> bool:
        """Updates and clears."""
        updated = True
        if self._scaler is None:
            self._optimizer.step()
        else:
            scale = self._scaler.get_scale()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            updated = self._scaler.get_scale() >= scale  # it falls where a gradient overflowed
        self._optimizer.zero_grad(set_to_none=True)
        return updated

    def skip(self) -> None:
        """Clears."""
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def loss_scale(self) -> float | None:
        """The scaler's factor in fp16."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    @property
    def may_overflow(self) -> bool:
        """In fp16, until the factor has fallen to 1: then the gradients themselves are not finite."""
        return self._scaler is not None and self._scaler.get_scale() > 1

    def barrier(self) -> None:
        """Returns at once."""

    def state_dict(self) -> dict[str, Tensor]:
        """The weights and buffers."""
        return stored_tensors(self._plain)

    def save(self, folder: Path) -> None:
        """Weights, moments and loss scaling, as safetensors and JSON."""
        save_file(_plain_copies(self.state_dict()), folder / "weights.safetensors")
        tensors, others = named_state(self._optimizer, self._rows)
        save_file(_plain_copies(tensors), folder / "optimizer.safetensors")
        others["scaler"] = None if self._scaler is None else self._scaler.state_dict()
        (folder / "optimizer.json").write_text(json.dumps(others), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Puts back what `save` wrote."""
        copy_tensors(self._plain, load_file(folder / "weights.safetensors"))
        others = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
        scaler = others.pop("scaler")
        if self._scaler is not None and scaler is not None:
            self._scaler.load_state_dict(scaler)
        tensors = load_file(folder / "optimizer.safetensors")
        load_named_state(self._optimizer, self._rows, tensors, others)


def _plain_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
