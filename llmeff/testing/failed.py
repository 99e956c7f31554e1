"""What a check says of a component that is not what it says of itself."""

import torch
from torch import Tensor


class CheckFailed(AssertionError):  # noqa: N818  a failure, and no fault of the check
    """A component is not what it says: the message names it, what was checked, what was found and what was expected."""


def require(holds: bool, message: str) -> None:
    """Raises `CheckFailed` with the message where it does not hold."""
    if not holds:
        raise CheckFailed(message)


def require_close(what: str, found: Tensor, expected: Tensor, within: float, least: float = 1e-3) -> None:
    """Every number lies within `within` times the largest expected one; NaN lies nowhere.

    Args:
        what: is compared, as the message names it.
        found: of any shape.
        expected: of the same.
        within: relative to the largest absolute value of `expected`.
        least: the largest absolute value is taken to be at least this.

    Raises:
        CheckFailed: it does not, or the shapes differ.
    """
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    scale = max(float(expected.detach().abs().max()), least)
    off = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
    require(off <= within, f"{what}: differs by {off:.1e} of the largest number, and may by {within:.0e}")


def share_off(found: Tensor, expected: Tensor, begin: Tensor) -> float:
    """How far the found movement from `begin` is from the expected one, over the size of that; infinite where one is 0."""
    size = torch.linalg.vector_norm(expected.double() - begin.double())
    off = torch.linalg.vector_norm(found.double() - expected.double())
    return float(off / size) if float(off) else 0.0
