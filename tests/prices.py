"""What a measured peak is held to, whether or not this CPU's workspace is known."""

import pytest

from llmeff.cost.price import Price


def assert_peak(predicted: Price, measured_bytes: int, *, rel: float) -> None:
    """That the peak is as predicted, or, where it is unknown, no less than what is known of it.

    Args:
        predicted: the price.
        measured_bytes: of the same step.
        rel: tolerance, as a share of what was measured.
    """
    if predicted.known("peak_bytes") is None:
        assert predicted.at_least("peak_bytes") <= measured_bytes * (1 + rel)
    else:
        assert predicted.total("peak_bytes") == pytest.approx(measured_bytes, rel=rel)
