"""What libraries allocate beside tensors while a convolution runs on a CPU.

oneDNN copies maps and weights into its own layout, and allocates buffers. Without oneDNN, torch lays out patches. Which
of these happens depends on the instruction set and the number format. `workspace.json` has a row for each pair that was
measured (`analysis/workspace.py` measures and adds rows); other pairs are unknown, and nothing is guessed. Float32 on
SSE41 and AVX has no row, because products of matrices lay out as many patches at a time as fit the CPU's cache.
Bfloat16 with AMX has no row, because its blocks depend on the cache too.

On a CPU with AVX-512, oneDNN also allocates memory for products of matrices in bfloat16. Without AVX512_BF16 it is a
result in float32 (`matrix_bytes`). With AVX512_BF16 it is blocks that fit the cache (`matrices` in
analysis/results/workspace.json), which no price includes: the peak of a decoder's step is at another moment, and within
2 % of its price.
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
"""The result of one of a convolution's three contractions: its output, or the gradient of its input or its weight."""
PRODUCTS: tuple[Product, ...] = get_args(Product)

MEASURED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""By instruction set and number format: the name of the measured form in `FORMS`."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Shapes of a convolution of B images from C to D channels, with the sides of its maps and of its kernel."""

    x: tuple[int, ...]
    """(B, C, H, W)."""
    weight: tuple[int, ...]
    """(D, C, k, k)."""
    y: tuple[int, ...]
    """(B, D, H', W')."""
    dtype: str
    """The format of all three."""
    num_threads: int

    @property
    def is_measured(self) -> bool:
        """Whether the forms hold for it: they are of images, without groups of channels."""
        return len(self.x) == 4 and self.weight[1] == self.x[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a plain product of matrices, whose columns are the pixels of a map."""
        return self.is_1x1 and self.x[2:] == self.y[2:]

    @property
    def is_1x1(self) -> bool:
        """Whether all sides of its kernel are 1."""
        return set(self.weight[2:]) == {1}

    @property
    def patches(self) -> int:
        """Numbers in all patches of one image; a patch has the size of the kernel, C k k."""
        return prod(self.weight[1:]) * prod(self.y[2:])


_PLAIN = {8: {3}, 16: {1, 2, 3}}
"""By the channels of a block: the counts of channels that the gradient of the weights reads without a copy."""
_MANY, _SMALL, _FEW = 16, 3, 20480
"""Images, side of a kernel, and numbers of the input: the limits at which torch uses oneDNN (`use_mkldnn`)."""
_ROW = 4
"""Numbers that are appended to each row of a transposed map."""


@dataclass(frozen=True)
class Room:
    """What is allocated beside the input and the result of a product."""

    during: int = 0
    """Bytes that live while the product is computed."""
    result: int = 0
    """Bytes of a copy of the result, which live until the tensor of the result is made."""


Form = Callable[[Convolution, Product], Room]


def room(
    work: Workload,
    product: Product,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
) -> Room | None:
    """What one product of a convolution allocates; None if that is unknown.

    On a GPU it is nothing, since prices do not include what libraries allocate there.

    Args:
        work: the step, with its device, instruction set and threads.
        product: which of the three.
        x: shape of the input.
        weight: shape of the weights.
        y: shape of the output.
        dtype: the format of the computation.
    """
    if not work.on_cpu:
        return Room()
    form = _form_of(work, x, weight, dtype)
    convolution = Convolution(x=x, weight=weight, y=y, dtype=dtype, num_threads=work.num_threads)
    return None if form is None or not convolution.is_measured else FORMS[form](convolution, product)


def depthwise_room(
    work: Workload,
    product: Product,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
) -> Room | None:
    """`room` of a depthwise convolution over tokens: (B, C, L) by (C, 1, k) to (B, C, L - k + 1).

    For the gradient of the weights oneDNN copies all three. In formats that torch computes without oneDNN nothing is
    copied.
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
    """The form in `FORMS` of a convolution on a CPU; None if it was not measured.

    In float32 torch decides (`use_mkldnn`): it does without oneDNN for one small image, and for few images if the
    kernel is 1x1.
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
    """Whether a convolution runs on a CPU and is known to do without oneDNN."""
    return work.on_cpu and _form_of(work, x, weight, dtype) == "torch"


def _torch(convolution: Convolution, product: Product) -> Room:
    """Torch lays out all patches of all images as the columns of a matrix."""
    if convolution.is_pointwise or product == "input":
        return Room()
    return Room(result=convolution.x[0] * convolution.patches * BYTES[convolution.dtype])


def _filled(number: int, block: int) -> int:
    return -(-number // block) * block


def _blocks(block: int, convolution: Convolution, product: Product) -> Room:
    """Memory of copies whose channels are padded to whole blocks. Images with fewer channels than a block are not copied."""
    num_bytes, (images, inputs, *sides), (_, outputs, *made) = BYTES[convolution.dtype], convolution.x, convolution.y
    kernel = prod(convolution.weight[2:]) * num_bytes
    filled_in, filled_out = _filled(inputs, block), _filled(outputs, block)
    x, y = images * filled_in * prod(sides) * num_bytes, images * filled_out * prod(made) * num_bytes
    if product == "input":
        return Room(during=y + filled_out * filled_in * kernel, result=x)
    if product == "output":
        is_plain = inputs < block and not convolution.is_1x1
        return Room(during=filled_out * inputs * kernel if is_plain else x + filled_out * filled_in * kernel, result=y)
    if inputs in _PLAIN[block] and not convolution.is_1x1:
        return Room(during=y, result=filled_out * inputs * kernel)
    return Room(during=x + y, result=filled_out * filled_in * kernel)


def _blocks_of_16(convolution: Convolution, product: Product) -> Room:
    """Blocks of 16, except that kernels of AVX2 compute the gradient of the weights for 4 to 15 input channels."""
    is_few = convolution.x[1] < 16 and convolution.x[1] not in _PLAIN[16] and not convolution.is_1x1
    return _blocks(8 if is_few and product == "weight" else 16, convolution, product)


def _blocks_with_sums(convolution: Convolution, product: Product) -> Room:
    """Blocks of 16 in a 16-bit format, and the buffers of each thread.

    A 1x1 kernel sums an image's map in float32. The gradient of the weights of other kernels is summed in float32 too,
    from one image of each map, transposed and with padded rows. If an image has fewer than 16 channels, it is not
    copied, or a product of matrices lays out all its patches. If there are many channels and small maps, threads share
    the channels and need less.
    """
    copies, num_threads = _blocks(16, convolution, product), convolution.num_threads
    (inputs, height, width), (outputs, *made) = convolution.x[1:], convolution.y[1:]
    num_bytes, sum_bytes, kernel = BYTES[convolution.dtype], BYTES["float32"], prod(convolution.weight[2:])
    blocks_in, blocks_out = _filled(inputs, 16), _filled(outputs, 16)
    if convolution.is_1x1:
        sums = {"output": blocks_out * prod(made), "input": blocks_in * height * width, "weight": 0}[product]
        return Room(copies.during + num_threads * sums * sum_bytes, copies.result)
    is_few = inputs < 16
    if product == "output" and is_few:
        return Room(blocks_out * _filled(inputs, 2) * kernel * num_bytes, copies.result)  # channels are read by twos
    if product != "weight":
        return copies
    if is_few and outputs % 16:
        taken = convolution.patches * num_bytes + 4 * outputs * inputs * kernel * sum_bytes
        return Room(num_threads * taken, outputs * inputs * kernel * num_bytes)
    turned = outputs if is_few else blocks_out + blocks_in
    sums = (outputs * inputs if is_few else blocks_out * blocks_in) * kernel * sum_bytes
    each = sums + turned * height * (width + _ROW) * num_bytes
    if is_few:
        y = convolution.x[0] * outputs * prod(made) * num_bytes
        return Room(y + num_threads * each, outputs * inputs * kernel * num_bytes)
    return Room(copies.during + num_threads * each, copies.result)


FORMS: dict[str, Form] = {
    "torch": _torch,
    "blocks of 8": partial(_blocks, 8),
    "blocks of 16": _blocks_of_16,
    "blocks of 16 with sums": _blocks_with_sums,
}
"""What convolutions were measured to allocate, by name."""
