"""The laws of operations on feature maps, as PyTorch runs them eagerly: what each computes, keeps, and makes on the way."""

from functools import partial

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, C channels, H height, W width, K classes


class Images:
    """A micro-batch of images with a label for every pixel.

    Args:
        tape: where it is taken down.
    """

    def __init__(self, tape: Tape):
        assert tape.workload.image_size is not None, "a law of images needs a workload of images"
        height, width = tape.workload.image_size
        num = tape.workload.num_sequences
        self.images = tape.given((num, 3, height, width), "float32")
        """(B, 3, H, W)."""
        self.labels = tape.given((num, height, width), "int64")
        """(B, H, W)."""
        self.num_bytes = self.images.storage.num_bytes + self.labels.storage.num_bytes
        """What a micro-batch takes that is made and waits for its turn."""


_BLOCK, _WIDE_BLOCK = 8, 16
"""Channels of a block of oneDNN on AVX2, and on AVX-512."""
_PLAIN = 4
"""Channels that it reads as they lie, at most."""
_MANY, _SMALL, _FEW = 16, 3, 20480
"""Images, a kernel's side and numbers of a map, by which torch takes oneDNN or does without."""


def convolution(tape: Tape, x: Array, weight: Array, bias: Array | None) -> Array:
    """(B, C, H, W) by (D, C, k, k) to (B, D, H, W): stride 1, padded to keep the size; the sums of a bias are no contraction.

    On a CPU the kernels work on copies: those of oneDNN, with channels in blocks, in float32 and in formats for which the CPU
    has instructions; of all patches where torch does without it: for one small image, and in other formats.
    """
    is_input = x.node is None
    weight, x = laws.autocast_weight(tape, weight), laws.autocast(tape, x)
    bias = None if bias is None else laws.autocast_weight(tape, bias)
    own = (weight,) if bias is None else (weight, bias)
    node = tape.save((x, *own), (x, weight), partial(_convolution_back, tape, bias, is_input))
    tape.contract(_flops(x, weight))
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    kernel = kernel_of(tape, x, weight)
    if kernel == "blocks":
        room = sums(tape, x, weight, shape)
        read = blocks(tape, x.shape, x.dtype), blocks(tape, weight.shape, x.dtype)
        made = blocks(tape, shape, x.dtype)
        del read, room
        y = tape.new(shape, x.dtype, node)
        del made
        return y
    patches = _patches(tape, x, weight) if kernel == "patches" else None
    y = tape.new(shape, x.dtype, node)
    del patches
    return y


def _flops(x: Array, weight: Array) -> int:
    num_pixels = x.size // x.shape[1] if x.shape[1] else 0
    return 2 * num_pixels * weight.size


def kernel_of(tape: Tape, x: Array, weight: Array) -> str:
    """What a convolution copies, as torch chooses (`use_mkldnn`): `blocks`, `patches`, or `nothing`.

    On a GPU, what its libraries take is not foreseen.
    """
    if not tape.workload.on_cpu:
        return "nothing"
    num_images, kernel = x.shape[0], weight.shape[2]
    if kernel == 1:
        is_blocked = num_images >= _MANY or tape.workload.num_threads > 1
    else:
        is_blocked = kernel > _SMALL or num_images > 1 or x.size > _FEW
    if is_blocked if x.dtype == "float32" else tape.workload.has_avx512:
        return "blocks"
    return "nothing" if kernel == 1 else "patches"


def blocks(tape: Tape, shape: tuple[int, ...], dtype: str) -> Array | None:
    """A copy of a map or a weight with its channels filled up to whole blocks; None where it is read as it lies."""
    first, second, *sides = shape
    if len(sides) == 2 and second <= _PLAIN and sides[0] != sides[1]:
        return None
    return tape.new((first, _filled(tape, second), *sides), dtype)


def _filled(tape: Tape, channels: int) -> int:
    block = _WIDE_BLOCK if tape.workload.has_avx512 else _BLOCK
    return -(-channels // block) * block


def sums(tape: Tape, x: Array, weight: Array, shape: tuple[int, ...]) -> list[Array]:
    """Of an image's map for each thread, which a kernel of 1 x 1 adds up in float32 where its format is narrow."""
    if x.dtype == "float32" or weight.shape[2] > 1:
        return []
    return [tape.new((tape.workload.num_threads, _filled(tape, shape[1]), *shape[2:]), "float32")]


def turned(tape: Tape, gradient: Array, x: Array, weight: Array) -> list[Array]:
    """What each thread needs for the gradient of weights in a narrow format: its sums, and an image of either map, turned.

    Rows of the latter are filled up. Of many channels on small maps threads share the channels, and need less.
    """
    if x.dtype == "float32" or weight.shape[2] == 1:
        return []
    num_threads, (height, width) = tape.workload.num_threads, x.shape[2:]
    channels = [_filled(tape, own.shape[1]) for own in (gradient, x)]
    maps = channels[:1] if x.shape[1] <= _PLAIN else channels
    return [
        tape.new((num_threads, *channels, *weight.shape[2:]), "float32"),
        *(tape.new((num_threads, own, height, width + 4), x.dtype) for own in maps),
    ]


def _patches(tape: Tape, x: Array, weight: Array) -> Array:
    """Every patch that the kernel sees, as the column of a matrix."""
    return tape.new((x.shape[0], weight.size // weight.shape[0], *x.shape[2:]), x.dtype)


def _convolution_back(
    tape: Tape, bias: Array | None, is_input: bool, gradient: Array, x: Array, weight: Array
) -> tuple[Array | None, ...]:
    tape.execute((1 if is_input else 2) * _flops(x, weight))
    grad_bias = grad_x = None
    kernel = kernel_of(tape, x, weight)
    if kernel == "blocks":
        if not is_input:
            read = blocks(tape, gradient.shape, x.dtype), blocks(tape, weight.shape, x.dtype)
            made = blocks(tape, x.shape, x.dtype)
            room = sums(tape, x, weight, x.shape)
            del read, room
            grad_x = tape.new(x.shape, x.dtype)
            del made
        read = blocks(tape, gradient.shape, x.dtype), blocks(tape, x.shape, x.dtype)
        made = blocks(tape, weight.shape, x.dtype)
        room = turned(tape, gradient, x, weight)
        del read, room
    else:
        made = None
        grad_x = None if is_input else tape.new(x.shape, x.dtype)
        if bias is not None and x.dtype != "float32":
            tape.new(gradient.shape, "float32")  # gradients of a bias are added up in this format
        if kernel == "patches":
            made = _patches(tape, x, weight)
    if bias is not None:
        grad_bias = tape.new(bias.shape, bias.dtype)
    grad_weight = tape.new(weight.shape, weight.dtype)
    del made
    return (grad_x, grad_weight) if bias is None else (grad_x, grad_weight, grad_bias)


def relu(tape: Tape, x: Array) -> Array:
    """ReLU in the place of its input; the result is kept."""
    node = tape.save((x,), (), partial(_new_back, tape))
    tape.elementwise_in_place(x)
    y = Array(x.shape, x.dtype, x.storage, node)
    tape.save_output(node, y)
    return y


def _new_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)


add = laws.add


def concat(tape: Tape, left: Array, right: Array) -> Array:
    """(B, C, H, W) and (B, D, H, W) to (B, C + D, H, W); backward hands on views of its gradient, where formats agree."""
    shape = (left.shape[0], left.shape[1] + right.shape[1], *left.shape[2:])
    given = ((left.shape, left.dtype), (right.shape, right.dtype))
    node = tape.save((left, right), (), partial(_concat_back, tape, given))
    return tape.elementwise(shape, laws.promote(left.dtype, right.dtype), node)


def _concat_back(tape: Tape, given: tuple[tuple[tuple[int, ...], str], ...], gradient: Array) -> tuple[Array, ...]:
    views = [Array(shape, gradient.dtype, gradient.storage) for shape, _ in given]
    return tuple(
        view if view.dtype == dtype else tape.new(view.shape, dtype)
        for view, (_, dtype) in zip(views, given, strict=True)
    )


def max_pool(tape: Tape, x: Array) -> tuple[Array, Array]:
    """2 x 2 pooling to (B, C, H // 2, W // 2), with the place of each maximum in its map, int64; its input is kept."""
    shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    node = tape.save((x,), (x,), partial(_shaped_back, tape, x.shape))
    pooled = tape.elementwise(shape, x.dtype, node)
    indices = tape.new(shape, "int64")
    tape.save_output(node, indices)
    return pooled, indices


def _shaped_back(tape: Tape, shape: tuple[int, ...], gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def max_unpool(tape: Tape, x: Array, indices: Array, size: tuple[int, ...]) -> Array:
    """The opposite of `max_pool`: values go back to their places in a map of zeros, (B, C, *size); the indices are kept.

    On a CPU autocast has it done in float32.
    """
    x = laws.cast(tape, x, "float32") if tape.precision.autocast and tape.workload.on_cpu else x
    node = tape.save((x,), (indices,), partial(_shaped_back, tape, x.shape))
    return tape.elementwise((*x.shape[:2], *size), x.dtype, node)


def cross_entropy(tape: Tape, logits: Array, batch: Images) -> Array:
    """`torch.nn.functional.cross_entropy` of (B, K, H, W), weighted by class and summed."""
    logits = laws.cast(tape, logits, tape.precision.logits)
    tape.counts["logits_bytes", "loss"] = logits.storage.num_bytes
    log_probabilities = laws.log_softmax(tape, logits)
    node = tape.save((log_probabilities,), (log_probabilities, batch.labels), partial(_shaped_back, tape, logits.shape))
    tape.save_output(node, tape.new((), log_probabilities.dtype))
    return tape.elementwise((), log_probabilities.dtype, node)
