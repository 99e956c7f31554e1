"""The error of a failed check, and comparisons that raise it."""

import torch
from torch import Tensor


class CheckFailed(AssertionError):  # noqa: N818  a failure of the component, not an error of the check
    """A component failed a check. The message names the component, the check, and the found and expected values."""


def require(holds: bool, message: str) -> None:
    """Raises `CheckFailed` with the message unless `holds` is true."""
    if not holds:
        raise CheckFailed(message)


def require_close(what: str, found: Tensor, expected: Tensor, within: float, least: float = 1e-3) -> None:
    """Checks that all numbers differ by at most `within` times the largest expected number. NaN always fails.

    Args:
        what: name of the compared quantity, for the message.
        found: tensor of any shape.
        expected: tensor of the same shape.
        within: largest allowed difference, relative to the largest absolute value of `expected`.
        least: lower bound of that largest absolute value, so that nothing is divided by 0.

    Raises:
        CheckFailed: the shapes differ, or a number differs by more.
    """
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, but must be {tuple(expected.shape)}")
    if not expected.numel():
        return
    scale = max(float(expected.detach().abs().max()), least)
    off = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
    require(
        off <= within,
        f"{what}: differs by {off:.1e} of the largest expected number, but at most {within:.0e} is allowed",
    )


def share_off(found: Tensor, expected: Tensor, begin: Tensor) -> float:
    """Returns the distance from found to expected, divided by the distance from begin to expected.

    Returns 0 if found equals expected, and infinity if begin equals expected but found does not.
    """
    size = torch.linalg.vector_norm(expected.double() - begin.double())
    off = torch.linalg.vector_norm(found.double() - expected.double())
    return float(off / size) if float(off) else 0.0
