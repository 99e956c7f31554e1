"""Parameters of a state's decay, a decay rate per head and a time step per token: initial values and price."""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(
            f"the first rate is higher than the second: {list(bounds)}. Give the lowest rate first, then the highest"
        )
    return bounds


_Rate = Annotated[float, Field(strict=True, gt=0, le=1e6)]
Rates = Annotated[tuple[_Rate, _Rate], AfterValidator(_ascending)]
"""(lowest, highest) decay rate per unit of time. The initial rate of each head is drawn uniformly between the two.

Each token multiplies the state by exp(-rate * step), where step is the time that the token takes.
"""


def initial_decays(rates: tuple[float, float], log_rate: Tensor, step_bias: Tensor) -> dict[str, Tensor]:
    """Draws initial values for `log_rate` and `step_bias`, of the same shapes (Gu and Dao 2023; Dao and Gu 2024)."""
    return {"log_rate": torch.empty_like(log_rate).uniform_(*rates).log(), "step_bias": _steps(step_bias)}


def _steps(like: Tensor) -> Tensor:
    """Draws biases, in the shape of `like`, whose softplus is log-uniform between 0.001 and 0.1 (Gu and Dao 2023)."""
    steps = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp()
    return steps + torch.log(-torch.expm1(-steps))


def steps_law(tape: Tape, x: Array, bias: Array) -> Array:
    """Records the price of the time steps, softplus(at_least_float32(x) + bias), on the tape."""
    return laws.function(tape, laws.plus(tape, laws.cast(tape, x, "float32"), bias), "input")


def rates_law(tape: Tape, num_heads: int) -> Array:
    """Records the price of the negative decay rates, -exp(log_rate), on the tape."""
    return laws.function(tape, laws.function(tape, tape.weight("log_rate", num_heads), "output"), "nothing")
