"""Workspace: the memory that libraries allocate besides tensors while convolutions and matrix products run on a CPU.

For a convolution, oneDNN copies feature maps and weights to its own layout, and allocates buffers. Without oneDNN,
torch lays out patches. The memory depends on the instruction set and the dtype. `workspace.json` has an entry for each
pair of these that was measured (`analysis/workspace.py` measures and adds entries). For other pairs the workspace is
unknown. Float32 on SSE41 and AVX has no entry, because matrix products lay out as many patches at a time as fit in the
CPU's cache. Bfloat16 with AMX has no entry, because its block sizes depend on the cache too.

On a CPU with AVX-512, oneDNN also allocates memory for matrix products in bfloat16. Without AVX512_BF16, this is a
float32 copy of the result (`matrix_bytes`). With AVX512_BF16, it is blocks that fit in the cache (`matrices` in
analysis/results/workspace.json). Prices do not include these blocks: a decoder's step has its peak at another moment,
and the measured peak is within 2 % of the price.
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
"""The result of one of a convolution's three contractions: the output, or the gradient of the input or the weight."""
PRODUCTS: tuple[Product, ...] = get_args(Product)

MEASURED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""The name of the measured form in `FORMS`, by instruction set and dtype."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Shapes, dtype and threads of a convolution of B images from C to D channels."""

    x: tuple[int, ...]
    """(B, C, H, W)."""
    weight: tuple[int, ...]
    """(D, C, k, k)."""
    y: tuple[int, ...]
    """(B, D, H', W')."""
    dtype: str
    """The dtype of input, weight and output."""
    num_threads: int

    @property
    def is_measured(self) -> bool:
        """Whether the forms in `FORMS` apply: they are for two-dimensional images without channel groups."""
        return len(self.x) == 4 and self.weight[1] == self.x[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is a matrix product over pixels: a 1x1 kernel, and input and output of equal size."""
        return self.is_1x1 and self.x[2:] == self.y[2:]

    @property
    def is_1x1(self) -> bool:
        """Whether the kernel has size 1 in each dimension."""
        return set(self.weight[2:]) == {1}

    @property
    def patches(self) -> int:
        """Number of elements in all patches of one image. A patch has C k k elements."""
        return prod(self.weight[1:]) * prod(self.y[2:])


_PLAIN = {8: {3}, 16: {1, 2, 3}}
"""Numbers of input channels that the weight's gradient reads without a copy, by the number of channels in a block."""
_MANY, _SMALL, _FEW = 16, 3, 20480
"""Limits by which torch chooses oneDNN (`use_mkldnn`): number of images, kernel size, and elements of the input."""
_ROW = 4
"""Number of elements that are appended to each row of a transposed map."""


@dataclass(frozen=True)
class Room:
    """The workspace of one contraction: memory besides its inputs and its result."""

    during: int = 0
    """Bytes that are allocated while the contraction is computed."""
    result: int = 0
    """Bytes of a copy of the result, which are allocated until the tensor of the result is made."""


Form = Callable[[Convolution, Product], Room]
"""Returns the workspace of one contraction of a convolution."""


def room(
    work: Workload,
    product: Product,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
) -> Room | None:
    """Returns the workspace of one contraction of a convolution, or None if it is unknown.

    On a GPU the result is empty, because prices do not include the workspace of GPU libraries.

    Args:
        work: the step, with its device, instruction set and threads.
        product: the result of the contraction.
        x: shape of the input.
        weight: shape of the weight.
        y: shape of the output.
        dtype: the dtype of the computation.
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
    """Returns the workspace of a depthwise convolution over tokens: (B, C, L) by (C, 1, k) to (B, C, L - k + 1).

    The arguments are those of `room`. For the weight's gradient in float32, oneDNN copies input, weight and output. In
    all other cases nothing is copied. The result is None if the instruction set and the dtype were not measured.
    """
    if not work.on_cpu:
        return Room()
    if _measured(work, dtype) is None:
        return None
    is_copied = product == "weight" and dtype == "float32"
    return Room(during=sum(map(prod, (x, weight, y))) * BYTES[dtype] if is_copied else 0)


_WIDE_RESULTS = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Instruction sets on which oneDNN computes bfloat16 matrix products in a float32 buffer, and then casts the result."""
_ALIGNED, _BESIDE = 256, 128
"""The float32 buffer is padded to a multiple of the first number of bytes. The second number of bytes is added."""


def matrix_bytes(work: Workload, size: int, dtype: str) -> int:
    """Returns the bytes that a matrix product allocates besides its result of `size` elements. 0 if none or unknown."""
    if not work.on_cpu or dtype != "bfloat16" or work.instruction_set not in _WIDE_RESULTS:
        return 0
    return _filled(size * BYTES["float32"], _ALIGNED) + _BESIDE


def _measured(work: Workload, dtype: str) -> str | None:
    return MEASURED.get(work.instruction_set or "", {}).get(dtype)


def _form_of(work: Workload, x: tuple[int, ...], weight: tuple[int, ...], dtype: str) -> str | None:
    """Returns the key in `FORMS` for the workspace of a convolution on a CPU, or None if it was not measured.

    In float32, torch does not use oneDNN (`use_mkldnn`) for a single small image with a kernel of at most 3x3, or for
    fewer than 16 images with a 1x1 kernel and a single thread.
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
    """Returns whether a convolution runs on a CPU by torch's own code, without oneDNN. False if this is not known."""
    return work.on_cpu and _form_of(work, x, weight, dtype) == "torch"


def _torch(convolution: Convolution, product: Product) -> Room:
    """Returns the workspace without oneDNN: torch lays out all patches of all images as the columns of a matrix."""
    if convolution.is_pointwise or product == "input":
        return Room()
    return Room(result=convolution.x[0] * convolution.patches * BYTES[convolution.dtype])


def _filled(number: int, block: int) -> int:
    return -(-number // block) * block


def _blocks(block: int, convolution: Convolution, product: Product) -> Room:
    """Returns the workspace of oneDNN's copies, with channels padded to whole blocks of `block` channels.

    With a 1x1 kernel the input is always copied. With other kernels, the computation of the output copies no input with
    fewer channels than a block, and the weight's gradient copies no input whose number of channels is in `_PLAIN`.
    """
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
    """Returns the workspace for blocks of 16 channels.

    For the weight's gradient of 4 to 15 input channels, AVX2 kernels use blocks of 8.
    """
    is_few = convolution.x[1] < 16 and convolution.x[1] not in _PLAIN[16] and not convolution.is_1x1
    return _blocks(8 if is_few and product == "weight" else 16, convolution, product)


def _blocks_with_sums(convolution: Convolution, product: Product) -> Room:
    """Returns the workspace for blocks of 16 channels in a 16-bit dtype, and float32 buffers for sums in each thread.

    With a 1x1 kernel, each thread sums one image's map in float32. With other kernels, each thread sums the weight's
    gradient in float32. For that it copies one image of input and output, transposed and with padded rows. An input
    with fewer than 16 channels is not copied. But if the number of output channels is not a multiple of 16, all patches
    of this input are laid out for a matrix product. With many channels and small maps, threads share the channels and
    need less memory than this function returns.
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
"""The measured forms of workspace, by name."""
