"""What a measured peak is held to, whether or not this CPU's workspace is known."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from llmeff.config.run import RunConfig
from llmeff.core.precision import PrecisionName, precision
from llmeff.cost.price import Price
from llmeff.models import ModelConfig


def run_of(model: ModelConfig) -> RunConfig:
    """A run of any model, with AdamW; not validated, since no task goes with models of text and of images."""
    return RunConfig.model_construct(model=model)


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


@contextmanager
def own_products(precision_name: PrecisionName) -> Iterator[None]:
    """A block in which torch multiplies matrices without oneDNN in formats narrower than float32.

    On a CPU with AVX-512 oneDNN multiplies those, in buffers that no law speaks of (`llmeff.cost.workspace`).
    """
    before = torch._C._get_mkldnn_enabled()
    # torch.backends.mkldnn.flags sets more than is asked for, and warns of that
    torch._C._set_mkldnn_enabled(before and precision(precision_name).compute == "float32")
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
