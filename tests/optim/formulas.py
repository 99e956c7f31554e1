"""The equations of every optimizer's source, of one parameter, written out in float64: what an optimizer must be registered with."""

import torch
from torch import Tensor

from llmeff.testing import Given, apart

BLOCK = 256
"""Numbers of a moment in 8 bits that share a scale (Dettmers et al. 2022, section 2.1)."""


def decay_of(config, given: Given) -> float:
    return config.weight_decay if given.is_decayed else 0.0


def sgd(config, given):
    """Robbins and Monro 1951; momentum as the sum of Sutskever et al. 2013 with the rate outside of it, decay in the gradient."""
    weight, velocity = given.weight, torch.zeros_like(given.weight)
    for gradient, rate in zip(given.gradients, given.rates, strict=True):
        gradient = gradient + decay_of(config, given) * weight
        velocity = config.momentum * velocity + gradient
        weight = weight - rate * (gradient + config.momentum * velocity if config.nesterov else velocity)
    return weight


def adamw(config, given, eps=None):
    """Loshchilov and Hutter 2019, algorithm 2, where the decay is times the rate."""
    weight, eps = given.weight, config.eps if eps is None else eps
    first = second = torch.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(given.gradients, given.rates, strict=True), start=1):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        direction = (first / (1 - config.beta1**step)) / ((second / (1 - config.beta2**step)).sqrt() + eps)
        weight = weight - rate * (direction + decay_of(config, given) * weight)
    return weight


def tree(is_signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantization (Dettmers 2016, section 2.2; unsigned: Dettmers et al. 2022, appendix F).

    Behind e zeros, which stand for 10^-e, all bits that are left cut (0.1, 1) into equal parts, of which the middle is meant.
    0 and 1 are values of their own.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        parts = 2 ** (6 - zeros + (not is_signed))
        middles = [10.0**-zeros * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-middle for middle in middles] if is_signed else [])
    assert len(values) == 2**8
    return torch.tensor(sorted(values), dtype=torch.float64)


def in_8_bits(moment: Tensor, values: Tensor) -> Tensor:
    """Each block over its largest magnitude, at the value that bitsandbytes takes for the nearest."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    codes, state = quantize_blockwise(moment.float(), code=values.float(), blocksize=BLOCK)
    return dequantize_blockwise(codes, state).double()


def adamw8bit(config, given):
    """AdamW, whose moments lie in 8 bits between steps (Dettmers et al. 2022): a step computes with what it read, unrounded."""
    if given.weight.numel() < config.min_8bit_size:
        return adamw(config, given)
    weight, signed, unsigned = given.weight, tree(is_signed=True), tree(is_signed=False)
    first = second = torch.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(given.gradients, given.rates, strict=True), start=1):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        direction = (first / (1 - config.beta1**step)) / ((second / (1 - config.beta2**step)).sqrt() + config.eps)
        weight = weight - rate * (direction + decay_of(config, given) * weight)
        first, second = in_8_bits(first, signed), in_8_bits(second, unsigned)
    return weight


def lion(config, given):
    """Chen et al. 2023, algorithm 2."""
    weight, momentum = given.weight, torch.zeros_like(given.weight)
    for gradient, rate in zip(given.gradients, given.rates, strict=True):
        direction = (config.beta1 * momentum + (1 - config.beta1) * gradient).sign()
        weight = weight - rate * (direction + decay_of(config, given) * weight)
        momentum = config.beta2 * momentum + (1 - config.beta2) * gradient
    return weight


def orthogonal(matrix: Tensor, num_iterations: int) -> Tensor:
    """X := a X + b (X X') X + c (X X')^2 X, of X over its norm, in the form that is not tall (Jordan et al. 2024)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, num_iterations).T
    x = matrix / matrix.square().sum().sqrt()
    for _ in range(num_iterations):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def muon(config, given):
    """Jordan et al. 2024 as Liu et al. 2025 scale it (equation 4) for matrices within layers, AdamW elsewhere."""
    if given.role not in ("matrix", "conv"):
        return adamw(config, given, eps=1e-8)
    weight, momentum = given.weight, torch.zeros_like(given.weight)
    rows, columns = len(weight), weight.numel() // len(weight)
    for gradient, rate in zip(given.gradients, given.rates, strict=True):
        momentum = config.momentum * momentum + (1 - config.momentum) * gradient
        ahead = config.momentum * momentum + (1 - config.momentum) * gradient if config.nesterov else momentum
        direction = orthogonal(ahead.reshape(rows, columns), config.ns_steps).view_as(weight)
        weight = weight - rate * (0.2 * max(rows, columns) ** 0.5 * direction + config.weight_decay * weight)
    return weight


FORMULAS = {
    "adamw": apart(adamw),
    "adamw8bit": apart(adamw8bit),
    "lion": apart(lion),
    "muon": apart(muon),
    "sgd": apart(sgd),
}
"""By name; the registry is held to have no others."""
