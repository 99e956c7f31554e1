"""The number formats of a run, as one record."""

from dataclasses import dataclass
from typing import Literal, get_args

PrecisionName = Literal["fp32", "bf16", "fp16", "bf16_master"]
"""`fp32`; `bf16`, `fp16`: fp32 parameters computed under autocast; `bf16_master`: bf16 parameters, fp32 master copy."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per number of each format."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The format of each kind of number, by torch's name ("float32")."""

    name: PrecisionName
    parameters: str
    """The weights that the forward pass reads."""
    compute: str
    """Matrix products, and what autocast runs in the same format."""
    gradients: str
    """What backward accumulates gradients in."""
    communication: str
    """What travels between ranks."""
    master: str | None
    """The copy that the optimizer updates; None if it updates the parameters themselves."""
    logits: str
    """What the cross-entropy is computed in."""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.compute != self.parameters


_TABLE = {
    "fp32": ("float32", "float32", "float32", None),
    "bf16": ("float32", "bfloat16", "float32", None),
    "fp16": ("float32", "float16", "float32", None),
    "bf16_master": ("bfloat16", "bfloat16", "bfloat16", "float32"),
}
assert set(_TABLE) == set(get_args(PrecisionName))


def precision(name: PrecisionName) -> Precision:
    """The formats of a precision, by its name."""
    parameters, compute, gradients, master = _TABLE[name]
    return Precision(
        name=name,
        parameters=parameters,
        compute=compute,
        gradients=gradients,
        communication=gradients,
        master=master,
        logits="float32",
    )
