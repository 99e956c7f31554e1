"""How decays of states begin: rates, and steps through which time passes."""

import torch
from torch import Tensor

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape


def initial_rates(like: Tensor, least: float) -> Tensor:
    """Logarithms of rates of decay, which are uniform in `least` to 16."""
    return torch.empty_like(like).uniform_(least, 16).log()


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
