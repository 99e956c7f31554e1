"""How decays of states begin: rates, and steps through which time passes."""

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from llmeff.core.config import Positive
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the least comes first, given: {list(bounds)}")
    return bounds


Rates = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
"""The least and the largest initial rate of decay; a head's, times a step, is what its state forgets at a token.

Rows of few tokens may need slower ones than long texts do: from a head that forgets within a few there is nothing to learn.
"""


def initial_rates(like: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Logarithms of rates of decay, which are uniform between bounds."""
    return torch.empty_like(like).uniform_(*bounds).log()


def initial_steps(like: Tensor) -> Tensor:
    """Biases whose softplus is spread over 0.001 to 0.1, evenly in its logarithm (Gu and Dao 2023)."""
    steps = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp()
    return steps + torch.log(-torch.expm1(-steps))


def steps_law(tape: Tape, x: Array, bias: Array) -> Array:
    """The price of softplus(wide(x) + bias)."""
    return laws.function(tape, laws.plus(tape, laws.cast(tape, x, "float32"), bias), "input")


def rates_law(tape: Tape, num_heads: int) -> Array:
    """The price of -exp(log_rate)."""
    return laws.function(tape, laws.function(tape, tape.weight("log_rate", num_heads), "output"), "nothing")
