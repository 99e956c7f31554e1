"""How decays of states begin: rates, and steps through which time passes."""

import torch
from torch import Tensor


def initial_rates(like: Tensor, least: float) -> Tensor:
    """Logarithms of rates of decay, which are uniform in `least` to 16."""
    return torch.empty_like(like).uniform_(least, 16).log()


def initial_steps(like: Tensor) -> Tensor:
    """Biases whose softplus is spread over 0.001 to 0.1, evenly in its logarithm (Gu and Dao 2023)."""
    steps = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp()
    return steps + torch.log(-torch.expm1(-steps))
