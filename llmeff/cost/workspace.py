"""What libraries take beside tensors while a convolution runs on a CPU.

oneDNN copies maps and weights into a layout of its own, and takes room to compute in; torch, where it does without oneDNN,
lays out patches. Which of it is taken depends on the instruction set and the format. `workspace.json` says which was measured
to be so (`analysis/workspace.py` measures it, and adds rows); what is not in it is not known, and nothing is guessed. Float32 on
SSE41 and AVX has no row: products of matrices lay out as many patches at a time as suit the CPU's cache. Bfloat16 with AMX has no
row: its blocks, too, suit the cache.

Products of matrices in bfloat16 take room of oneDNN's as well if a CPU has AVX-512: without AVX512_BF16 a result in float32
(`matrix_bytes`), with it blocks that suit the cache (`matrices` in analysis/results/workspace.json). These blocks are in no price:
in a step of a decoder other moments take the most, and its peak is within 2 % of its price, as on a CPU without them.
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
        return self.is_1x1 and self.x[2:] == self.y[2:]

    @property
    def is_1x1(self) -> bool:
        """Whether its kernel is."""
        return set(self.weight[2:]) == {1}

    @property
    def patches(self) -> int:
        """Numbers in all patches of an image that the kernel sees."""
        return prod(self.weight[1:]) * prod(self.y[2:])


_PLAIN = {8: {3}, 16: {1, 2, 3}}
"""By the channels of a block: how many channels an image has that the weights' gradient reads as they lie."""
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


_WIDE_RESULTS = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Sets on which oneDNN multiplies matrices in bfloat16 into a result in float32, of which it then makes the one asked for."""
_ALIGNED, _BESIDE = 256, 128
"""Bytes to which such a result is filled up, and more beside it."""


def matrix_bytes(work: Workload, size: int, dtype: str) -> int:
    """What a product of two matrices takes beside its result of so many numbers, as far as it is known."""
    if not work.on_cpu or dtype != "bfloat16" or work.instruction_set not in _WIDE_RESULTS:
        return 0
    return _filled(size * BYTES["float32"], _ALIGNED) + _BESIDE


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


def _filled(number: int, block: int) -> int:
    return -(-number // block) * block


def _blocks(block: int, own: Convolution, product: Product) -> Room:
    """Copies whose channels fill whole blocks; an image of fewer channels than one is read as it lies."""
    num_bytes, (images, inputs, *sides), (_, outputs, *made) = BYTES[own.dtype], own.x, own.y
    kernel = prod(own.weight[2:]) * num_bytes
    wide, high = _filled(inputs, block), _filled(outputs, block)
    x, y = images * wide * prod(sides) * num_bytes, images * high * prod(made) * num_bytes
    if product == "input":
        return Room(during=y + high * wide * kernel, result=x)
    if product == "output":
        is_plain = inputs < block and not own.is_1x1
        return Room(during=high * inputs * kernel if is_plain else x + high * wide * kernel, result=y)
    if inputs in _PLAIN[block] and not own.is_1x1:
        return Room(during=y, result=high * inputs * kernel)
    return Room(during=x + y, result=high * wide * kernel)


def _blocks_of_16(own: Convolution, product: Product) -> Room:
    """The same, but that the kernels of AVX2 make the weights' gradient of 4 to 15 channels."""
    is_few = own.x[1] < 16 and own.x[1] not in _PLAIN[16] and not own.is_1x1
    return _blocks(8 if is_few and product == "weight" else 16, own, product)


def _blocks_with_sums(own: Convolution, product: Product) -> Room:
    """Blocks of 16 in a narrow format, and what each thread computes in.

    A kernel of 1x1 adds up an image's map in float32. The weights' gradient of other kernels is added up so too, from an image
    of either map that is turned, its rows filled up. If an image has fewer than 16 channels, it is not copied, or a product of
    matrices takes all its patches. Of many channels on small maps threads share the channels, and need less.
    """
    copies, num_bytes, kernel = _blocks(16, own, product), BYTES[own.dtype], prod(own.weight[2:])
    (inputs, height, width), outputs, wide = own.x[1:], own.y[1], BYTES["float32"]
    blocks_in, blocks_out = _filled(inputs, 16), _filled(outputs, 16)
    if own.is_1x1:
        sums = {"output": blocks_out * prod(own.y[2:]), "input": blocks_in * height * width, "weight": 0}[product]
        return Room(copies.during + own.num_threads * sums * wide, copies.result)
    is_few = inputs < 16
    if product == "output" and is_few:
        return Room(blocks_out * _filled(inputs, 2) * kernel * num_bytes, copies.result)  # channels are read by twos
    if product != "weight":
        return copies
    if is_few and outputs % 16:
        taken = own.patches * num_bytes + 4 * outputs * inputs * kernel * wide
        return Room(own.num_threads * taken, outputs * inputs * kernel * num_bytes)
    turned = outputs if is_few else blocks_out + blocks_in
    sums = (outputs * inputs if is_few else blocks_out * blocks_in) * kernel * wide
    each = sums + turned * height * (width + _ROW) * num_bytes
    if is_few:
        y = own.x[0] * outputs * prod(own.y[2:]) * num_bytes
        return Room(y + own.num_threads * each, outputs * inputs * kernel * num_bytes)
    return Room(copies.during + own.num_threads * each, copies.result)


FORMS: dict[str, Form] = {
    "torch": _torch,
    "blocks of 8": partial(_blocks, 8),
    "blocks of 16": _blocks_of_16,
    "blocks of 16 with sums": _blocks_with_sums,
}
"""What convolutions were found to take, by name."""
