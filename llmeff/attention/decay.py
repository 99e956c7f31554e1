"""How the decay of a state is initialized: rates per unit of time, and the time that each token takes."""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"give the lowest rate first, then the highest; given: {list(bounds)}")
    return bounds


_Rate = Annotated[float, Field(strict=True, gt=0, le=1e6)]
Rates = Annotated[tuple[_Rate, _Rate], AfterValidator(_ascending)]
"""(lowest, highest) rate of decay per unit of time; initial rates of heads are drawn uniformly between them.

At each token a state keeps exp(-rate * step) of itself, where step is the time that the token takes.
"""


def initial_decays(rates: tuple[float, float], log_rate: Tensor, step_bias: Tensor) -> dict[str, Tensor]:
    """Initial values of both parameters, for any shapes (Gu and Dao 2023; Dao and Gu 2024)."""
    return {"log_rate": torch.empty_like(log_rate).uniform_(*rates).log(), "step_bias": _steps(step_bias)}


def _steps(like: Tensor) -> Tensor:
    """Biases whose softplus is log-uniform between 0.001 and 0.1 (Gu and Dao 2023)."""
    steps = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp()
    return steps + torch.log(-torch.expm1(-steps))


def steps_law(tape: Tape, x: Array, bias: Array) -> Array:
    """The price of softplus(at_least_float32(x) + bias)."""
    return laws.function(tape, laws.plus(tape, laws.cast(tape, x, "float32"), bias), "input")


def rates_law(tape: Tape, num_heads: int) -> Array:
    """The price of -exp(log_rate)."""
    return laws.function(tape, laws.function(tape, tape.weight("log_rate", num_heads), "output"), "nothing")
