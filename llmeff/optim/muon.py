"""Muon: orthogonalized momentum for matrices (Newton-Schulz, Jordan et al. 2024), and AdamW for other parameters."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, Self

from torch.optim import Optimizer

from llmeff.core.config import BelowOne, Count, Flag, NotNegative
from llmeff.core.cpu import multiplies_bfloat16
from llmeff.core.parameters import ParameterInfo, Role, Sharding
from llmeff.core.precision import BYTES, Precision
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Kind, Price
from llmeff.optim.adamw import AdamW
from llmeff.optim.chained import ChainedOptimizer
from llmeff.optim.newton_schulz import IterationFormat, OrthogonalMomentum
from llmeff.optim.optimizer import OptimizerConfig

_MATRICES: tuple[Role, ...] = ("matrix", "conv")


class Muon(OptimizerConfig):
    """`OrthogonalMomentum` for matrices and convolutions, and torch.optim.AdamW for all other parameters.

    A convolution's weight counts as a matrix with a row per output channel. The updates of matrices are scaled to the
    size of AdamW's updates (Liu et al. 2025, equation 4), so that both optimizers use the same learning rate.
    """

    sharding: ClassVar[Sharding] = "whole_tensor"

    name: Literal["muon"] = "muon"
    momentum: BelowOne = 0.95
    """Decay rate of the matrices' momentum."""
    nesterov: Flag = True
    """Use Nesterov momentum for matrices."""
    ns_steps: Count = 5
    """Number of Newton-Schulz iterations."""
    ns_format: IterationFormat | Literal["auto"] = "auto"
    """Number format of the iterations. auto: bfloat16 on devices that multiply it faster than float32 (GPUs, CPUs with
    AMX), and float32 on others. It is chosen when a run starts, and kept when the run is resumed."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices and embeddings, times the learning rate. Norms and biases do not decay."""
    beta1: BelowOne = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: BelowOne = 0.95
    """Decay rate of AdamW's second moment."""

    def resolve(self, *, is_bfloat16_fast: bool) -> Self:
        """Returns the config with `ns_format` "auto" replaced by "bfloat16" or "float32"."""
        if self.ns_format != "auto":
            return self
        return self.model_copy(update={"ns_format": "bfloat16" if is_bfloat16_fast else "float32"})

    def groups(self, roles: Mapping[str, Role]) -> list[list[str]]:
        """Returns the names of the matrices, then AdamW's groups of the other parameters. Empty groups are left out."""
        matrices = [name for name, role in roles.items() if role in _MATRICES]
        rest = {name: role for name, role in roles.items() if role not in _MATRICES}
        return [names for names in (matrices, *self._adamw.groups(rest)) if names]

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """Builds both optimizers, chained into one. An optimizer without parameters is left out.

        If `ns_format` is still "auto", the device of the matrices decides it.
        """
        matrices = [row.parameter for row in rows if row.role in _MATRICES]
        others = [row for row in rows if row.role not in _MATRICES]
        optimizers: list[Optimizer] = []
        if matrices:
            decided = self.resolve(is_bfloat16_fast=multiplies_bfloat16(matrices[0].device.type)).ns_format
            assert decided != "auto"
            optimizers.append(
                OrthogonalMomentum(
                    matrices,
                    lr=self.lr,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    weight_decay=self.weight_decay,
                    num_iterations=self.ns_steps,
                    iteration_format=decided,
                )
            )
        if others:
            optimizers.append(self._adamw.build(others))
        return ChainedOptimizer(optimizers)

    @property
    def _adamw(self) -> AdamW:
        return AdamW(lr=self.lr, beta1=self.beta1, beta2=self.beta2, weight_decay=self.weight_decay)

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of each matrix's moment and iterations, and of AdamW's states for the other parameters."""
        entries: Counter[tuple[Kind, str]] = Counter()
        rest = []
        for weight in weights:
            if weight.role not in _MATRICES:
                rest.append(weight)
                continue
            num_bytes = weight.size * BYTES[precision.master or precision.parameters]
            entries["optimizer_bytes", weight.part] += num_bytes
            entries["peak_bytes", "optimizer"] += num_bytes
            short, long = sorted((weight.shape[0], weight.size // weight.shape[0]))
            # the products X X', (X X')^2, and the polynomial of X X' times X
            entries["executed_flops", "optimizer"] += self.ns_steps * (4 * short**2 * long + 2 * short**3)
        return Price(entries) + self._adamw.price(rest, precision)
