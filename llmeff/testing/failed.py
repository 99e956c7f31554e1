"""Failures of checks: a component is not what it says."""

import torch
from torch import Tensor


class CheckFailed(AssertionError):  # noqa: N818  a failure, and no fault of the check
    """A component is not what it says. The message names it, what was checked, what was found and what was expected."""


def require(holds: bool, message: str) -> None:
    """Raises `CheckFailed` with the message unless `holds`."""
    if not holds:
        raise CheckFailed(message)


def require_close(what: str, found: Tensor, expected: Tensor, within: float, least: float = 1e-3) -> None:
    """Requires every number to be within `within` times the largest expected one; NaN never is.

    Args:
        what: what is compared, as the message names it.
        found: of any shape.
        expected: of the same shape.
        within: relative to the largest absolute value of `expected`.
        least: that largest value is taken to be at least this.

    Raises:
        CheckFailed: a number is further off, or the shapes differ.
    """
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    scale = max(float(expected.detach().abs().max()), least)
    off = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
    require(off <= within, f"{what}: differs by {off:.1e} of the largest number; the limit is {within:.0e}")


def share_off(found: Tensor, expected: Tensor, begin: Tensor) -> float:
    """Distance of the found result from the expected one, over the expected movement; infinite if only that is 0."""
    size = torch.linalg.vector_norm(expected.double() - begin.double())
    off = torch.linalg.vector_norm(found.double() - expected.double())
    return float(off / size) if float(off) else 0.0
