"""The number formats of each precision, as the design has them."""

from typing import get_args

import pytest
import torch

from llmeff.core.precision import BYTES, PrecisionName, precision


@pytest.mark.parametrize(
    ("name", "parameters", "compute", "gradients", "master", "autocast"),
    [
        ("fp32", "float32", "float32", "float32", None, False),
        ("bf16", "float32", "bfloat16", "float32", None, True),
        ("fp16", "float32", "float16", "float32", None, True),
        ("bf16_master", "bfloat16", "bfloat16", "bfloat16", "float32", False),
    ],
)
def test_formats(name, parameters, compute, gradients, master, autocast):
    record = precision(name)
    assert (record.name, record.parameters, record.compute) == (name, parameters, compute)
    assert (record.gradients, record.master, record.autocast) == (gradients, master, autocast)
    assert record.communication == gradients
    assert record.logits == "float32"


@pytest.mark.parametrize("name", get_args(PrecisionName))
def test_every_format_is_torchs_and_has_a_size(name):
    record = precision(name)
    for dtype in (record.parameters, record.compute, record.gradients, record.logits):
        assert BYTES[dtype] == getattr(torch, dtype).itemsize
