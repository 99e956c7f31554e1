"""Training in one process, without collectives."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from llmeff.core.config import ConfigError
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import Precision, PrecisionName
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Weight
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload
from llmeff.parallel.group_state import group_entries
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, load_whole, whole
from llmeff.parallel.strategy import Strategy, StrategyConfig, StrategyInputs


class Single(StrategyConfig):
    """Training in one process."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "fp16")
    joins: ClassVar[bool] = False
    launch_flags: ClassVar[tuple[str, ...]] = ()

    name: Literal["single"] = "single"

    @model_validator(mode="after")
    def _alone(self) -> "Single":
        if self.ranks != 1:
            raise ValueError(f"ranks is {self.ranks}, but strategy 'single' has only one process: use ranks = 1")
        return self

    def refusal(self, sharding: Sharding) -> str | None:
        """Returns None: the strategy works with every optimizer, because nothing is split."""
        return None

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> StrategyLaw:
        """Returns the law of one process, which keeps everything and sends nothing."""
        return StrategyLaw(weights, work.precision)

    def build(self, inputs: StrategyInputs) -> "SingleProcess":
        """Sets up the model and the optimizer on the device."""
        return SingleProcess(inputs)


def accelerator(device: torch.device, precision: Precision, **settings: Any) -> Any:
    """Returns a new Accelerator that is independent of earlier runs in this process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    check_tested("accelerate")
    # Accelerate keeps one state per process, and an earlier run may have used another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision.compute]
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, **settings)


def check_joined(accelerator: Any, ranks: int, engine: str | None = None) -> None:
    """Checks that Accelerate joined all ranks and uses the requested engine, because it may silently do neither.

    Args:
        accelerator: the Accelerator of this process.
        ranks: the expected number of ranks.
        engine: Accelerate's name for the expected engine. None allows any engine that joins the ranks.

    Raises:
        ConfigError: Accelerate has another number of processes or another engine.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    is_alone = ranks > 1 and kind == "NO"
    if accelerator.num_processes != ranks or is_alone or (engine is not None and kind != engine):
        wanted = f"parallel.ranks is {ranks}" + (f" and the engine is {engine}" if engine else "")
        raise ConfigError(
            f"{wanted} in the config, but Accelerate has {accelerator.num_processes} processes with the engine {kind}"
        )


class SingleProcess(Strategy):
    """One process: Accelerate places the model and adds autocast and loss scaling. The rest is plain PyTorch."""

    def __init__(self, inputs: StrategyInputs, **settings: Any):
        super().__init__(inputs)
        self._accelerator = accelerator(inputs.device, inputs.precision, **settings)
        self._rows = inputs.parameter_infos(inputs.model)
        self._parameters = [row.parameter for row in self._rows]
        # Not wrapped by Accelerate: its optimizer looks for packages on disk at every step, which takes 0.4 ms.
        self.optimizer, self._scaler = inputs.optimizer(self._owned()), self._accelerator.scaler
        self.model = self._accelerator.prepare(inputs.model)
        self.begun = group_entries(self.optimizer)

    def _owned(self) -> list[ParameterInfo]:
        """Returns the parameters that this process updates."""
        return self._rows

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass of the loss, which is scaled in fp16."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips the gradients to `max_norm`. In fp16 they are unscaled first. Returns the norm before clipping."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit)

    def step(self) -> bool:
        """Updates the parameters and clears the gradients. In fp16, loss scaling may skip the update."""
        updated = True
        if self._scaler is None:
            self.optimizer.step()
        else:
            scale = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            updated = self._scaler.get_scale() >= scale  # the scale falls if a gradient overflowed
        self.skip()
        return updated

    def skip(self) -> None:
        """Clears the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def loss_scale(self) -> float | None:
        """The factor of fp16 loss scaling. None if the precision is not fp16."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    @property
    def may_overflow(self) -> bool:
        """Whether non-finite gradients may come from loss scaling: in fp16, while the scale is above 1."""
        return self._scaler is not None and self._scaler.get_scale() > 1

    def owners(self) -> list[ShardOwner]:
        """Returns every parameter that this process updates, whole."""
        return [whole(row) for row in self._owned()]

    def extra_state(self) -> dict[str, Any]:
        """Returns the state of fp16 loss scaling, or an empty dict if the precision is not fp16."""
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict()}

    def load_extra_state(self, others: Mapping[str, Any]) -> None:
        """Restores the state of fp16 loss scaling."""
        if self._scaler is not None and "scaler" in others:
            self._scaler.load_state_dict(others["scaler"])

    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads every parameter and buffer."""
        load_whole(self._plain, self._rows, saved)
