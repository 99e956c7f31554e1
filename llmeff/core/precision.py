"""The dtypes that each precision uses for parameters, compute, gradients and communication."""

from dataclasses import dataclass
from typing import Literal, get_args

PrecisionName = Literal["fp32", "bf16", "fp16", "bf16_master"]
"""Names of precisions.

`fp32`: everything in fp32. `bf16`, `fp16`: fp32 parameters, and a forward pass under autocast. `bf16_master`: bf16
parameters and an fp32 master copy.
"""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per number, by format."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes that a run uses, by torch's names ("float32")."""

    name: PrecisionName
    """Name of the precision."""
    parameters: str
    """Format of the model's weights."""
    compute: str
    """Format of matrix products, and of other operations that autocast runs in the same format."""
    gradients: str
    """Format in which backward accumulates gradients."""
    communication: str
    """Format of gradients sent between ranks."""
    master: str | None
    """Format of the master copy that the optimizer updates. None if the optimizer updates the parameters themselves."""
    logits: str
    """Format in which the cross-entropy is computed."""

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
    """Returns the dtypes that a precision uses."""
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
