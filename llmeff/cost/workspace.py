"""What libraries take beside tensors while a convolution runs on a CPU.

oneDNN copies maps and weights into a layout of its own, and takes room to compute in; torch, where it does without oneDNN,
lays out patches. Which of it is taken depends on the instruction set and the format. `workspace.json` says which was measured
to be so (`analysis/workspace.py` measures it, and adds rows); what is not in it is not known, and nothing is guessed. Float32 on
SSE41 and AVX has no row: products of matrices lay out as many patches at a time as suit the CPU's cache. The rows of AVX-512 rest on
whole steps that were measured before (`analysis/results/price_gate.json`), not on single convolutions.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, get_args

from llmeff.core.precision import BYTES
from llmeff.cost.workload import Workload

Product = Literal["output", "input", "weight"]
"""Which of a convolution's three contractions: of the output, of the gradient of its input, of that of its weight."""
PRODUCTS: tuple[Product, ...] = get_args(Product)

MEASURED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""By instruction set and format: the name of what is taken, among `FORMS`."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Shapes of a convolution: B images, C and D channels, sides of its maps and of its kernel."""

    x: tuple[int, ...]
    """(B, C, H, W)."""
    weight: tuple[int, ...]
    """(D, C, k, k)."""
    y: tuple[int, ...]
    """(B, D, H', W')."""
    dtype: str
    """Of all three."""
    num_threads: int

    @property
    def is_measured(self) -> bool:
        """Whether it is of the kind that forms are of: of images, and no groups of channels."""
        return len(self.x) == 4 and self.weight[1] == self.x[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether it reads every map as the columns of a matrix, as it lies."""
        return set(self.weight[2:]) == {1} and self.x[2:] == self.y[2:]

    @property
    def reads_plain(self) -> bool:
        """Whether oneDNN reads images as they lie: those of few colours."""
        return self.x[1] <= _PLAIN and set(self.weight[2:]) != {1}

    @property
    def patches(self) -> int:
        """Numbers in all patches of an image that the kernel sees."""
        return prod(self.weight[1:]) * prod(self.y[2:])


_PLAIN = 3
"""Channels of an image that oneDNN reads as they lie, at most."""
_MANY, _SMALL, _FEW = 16, 3, 20480
"""Images, a kernel's side and numbers of a map, by which torch takes oneDNN or does without."""
_ROW = 4
"""By so many numbers a row is longer in a turned map."""


@dataclass(frozen=True)
class Room:
    """What is taken beside what a product reads and makes."""

    during: int = 0
    """Bytes, while it computes."""
    result: int = 0
    """Bytes of a copy of what it makes, which is there meanwhile, and until the tensor itself is made."""


Form = Callable[[Convolution, Product], Room]


def room(
    work: Workload,
    product: Product,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
) -> Room | None:
    """What one product of a convolution takes; None where that is not known.

    On a GPU what its libraries take is not foreseen, and is no part of a price.

    Args:
        work: the step: its device, instruction set and threads.
        product: which.
        x: shape of the input.
        weight: shape of the kernels.
        y: shape of the output.
        dtype: the format in which it is computed.
    """
    if not work.on_cpu:
        return Room()
    form = _form_of(work, x, weight, dtype)
    own = Convolution(x=x, weight=weight, y=y, dtype=dtype, num_threads=work.num_threads)
    return None if form is None or not own.is_measured else FORMS[form](own, product)


def depthwise_room(
    work: Workload,
    product: Product,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
) -> Room | None:
    """The same of a convolution of each channel by itself, over tokens: (B, C, L) by (C, 1, k) to (B, C, L - k + 1).

    oneDNN takes copies of all three for the weights' gradient; torch, in formats that it computes itself, none.
    """
    if not work.on_cpu:
        return Room()
    if _measured(work, dtype) is None:
        return None
    is_copied = product == "weight" and dtype == "float32"
    return Room(during=sum(map(prod, (x, weight, y))) * BYTES[dtype] if is_copied else 0)


def _measured(work: Workload, dtype: str) -> str | None:
    return MEASURED.get(work.instruction_set or "", {}).get(dtype)


def _form_of(work: Workload, x: tuple[int, ...], weight: tuple[int, ...], dtype: str) -> str | None:
    """Which of `FORMS` a convolution on a CPU takes; None where that was not measured.

    In float32 torch chooses (`use_mkldnn`): it does without oneDNN for one small image, and for few through kernels of 1x1.
    """
    kernel = max(weight[2:])
    if kernel == 1:
        is_blocked = x[0] >= _MANY or work.num_threads > 1
    else:
        is_blocked = kernel > _SMALL or x[0] > 1 or prod(x) > _FEW
    if dtype == "float32" and not is_blocked:
        return "torch"
    return _measured(work, dtype)


def is_torchs(work: Workload, x: tuple[int, ...], weight: tuple[int, ...], dtype: str) -> bool:
    """Whether a convolution on a CPU is known to do without oneDNN."""
    return work.on_cpu and _form_of(work, x, weight, dtype) == "torch"


def _torch(own: Convolution, product: Product) -> Room:
    """All patches of all images, as the columns of a matrix."""
    if own.is_pointwise or product == "input":
        return Room()
    return Room(result=own.x[0] * own.patches * BYTES[own.dtype])


def _blocks(block: int, own: Convolution, product: Product) -> Room:
    """Copies whose channels fill whole blocks."""

    def filled(first: int, second: int, *sides: int) -> int:
        return first * -(-second // block) * block * prod(sides) * BYTES[own.dtype]

    x, y, outputs = filled(*own.x), filled(*own.y), -(-own.weight[0] // block) * block
    weight = filled(outputs, *own.weight[1:])
    if product == "input":
        return Room(during=y + weight, result=x)
    if own.reads_plain:
        x, weight = 0, outputs * prod(own.weight[1:]) * BYTES[own.dtype]
    return Room(during=x + weight, result=y) if product == "output" else Room(during=x + y, result=weight)


def _blocks_with_sums(block: int, own: Convolution, product: Product) -> Room:
    """The same in a narrow format, and what each thread computes in.

    A kernel of 1x1 adds up an image's map in float32. The gradient of other kernels is added up so too, from an image of
    either map that is turned, its rows filled up. Of many channels on small maps threads share the channels, and need less.
    """
    inputs, outputs = (-(-channels // block) * block for channels in (own.x[1], own.y[1]))
    copies, extra = _blocks(block, own, product), 0
    is_narrow = set(own.weight[2:]) == {1}
    if is_narrow and product != "weight":
        channels, sides = (outputs, own.y[2:]) if product == "output" else (inputs, own.x[2:])
        extra = channels * prod(sides) * BYTES["float32"]
    elif not is_narrow and product == "weight":
        height, width = own.x[2:]
        turned = outputs if own.reads_plain else outputs + inputs
        extra = outputs * inputs * prod(own.weight[2:]) * BYTES["float32"]
        extra += turned * height * (width + _ROW) * BYTES[own.dtype]
    return Room(copies.during + own.num_threads * extra, copies.result)


FORMS: dict[str, Form] = {
    "torch": _torch,
    "blocks of 8": partial(_blocks, 8),
    "blocks of 16": partial(_blocks, 16),
    "blocks of 16 with sums": partial(_blocks_with_sums, 16),
}
"""What convolutions were found to take, by name."""
