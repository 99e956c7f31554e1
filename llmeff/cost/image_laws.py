"""Laws of operations on feature maps as eager PyTorch runs them: the FLOPs, saved tensors and allocations of each."""

from functools import partial

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape
from llmeff.cost.workspace import is_torchs, room

# Dimensions: B batch, C channels, H height, W width, K classes


class Images:
    """A micro-batch of images with a label for every pixel.

    Args:
        tape: the tape that counts the memory of the micro-batch.
    """

    def __init__(self, tape: Tape):
        assert tape.workload.image_size is not None, "the law of an image model needs a workload with image_size"
        height, width = tape.workload.image_size
        num = tape.workload.num_sequences
        self.images = tape.given((num, 3, height, width), "float32")
        """(B, 3, H, W)."""
        self.labels = tape.given((num, height, width), "int64")
        """(B, H, W)."""
        self.num_bytes = self.images.storage.num_bytes + self.labels.storage.num_bytes
        """Bytes of a micro-batch that is in memory but has not been used yet."""


def convolution(tape: Tape, x: Array, weight: Array, bias: Array | None) -> Array:
    """Convolves (B, C, H, W) with a weight of shape (D, C, k, k) to (B, D, H, W), with stride 1 and "same" padding.

    The FLOPs do not include the addition of the bias. On a CPU the kernels copy their inputs (see `workspace`).
    """
    is_input = x.node is None
    weight, x = laws.autocast_weight(tape, weight), laws.autocast(tape, x)
    bias = None if bias is None else laws.autocast_weight(tape, bias)
    parameters = (weight,) if bias is None else (weight, bias)
    node = tape.save((x, *parameters), (x, weight), partial(_convolution_back, tape, bias, is_input))
    tape.contract(_flops(x, weight))
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    with tape.room(room(tape.workload, "output", x.shape, weight.shape, shape, x.dtype)):
        return tape.new(shape, x.dtype, node)


def _flops(x: Array, weight: Array) -> int:
    num_pixels = x.size // x.shape[1] if x.shape[1] else 0
    return 2 * num_pixels * weight.size


def _convolution_back(
    tape: Tape, bias: Array | None, is_input: bool, gradient: Array, x: Array, weight: Array
) -> tuple[Array | None, ...]:
    tape.execute((1 if is_input else 2) * _flops(x, weight))
    grad_bias = grad_x = None
    find = partial(room, tape.workload, x=x.shape, weight=weight.shape, y=gradient.shape, dtype=x.dtype)
    if not is_input:
        with tape.room(find("input")):
            grad_x = tape.new(x.shape, x.dtype)
    if bias is not None and x.dtype != "float32" and is_torchs(tape.workload, x.shape, weight.shape, x.dtype):
        tape.new(gradient.shape, "float32")  # the gradient of the bias is summed in float32
    with tape.room(find("weight")):
        if bias is not None:
            grad_bias = tape.new(bias.shape, bias.dtype)
        grad_weight = tape.new(weight.shape, weight.dtype)
    return (grad_x, grad_weight) if bias is None else (grad_x, grad_weight, grad_bias)


def relu(tape: Tape, x: Array) -> Array:
    """Applies ReLU in place. The result is saved for backward."""
    node = tape.save((x,), (), partial(_new_back, tape))
    tape.elementwise_in_place(x)
    y = Array(x.shape, x.dtype, x.storage, node)
    tape.save_output(node, y)
    return y


def _new_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)


add = laws.add


def concat(tape: Tape, left: Array, right: Array) -> Array:
    """Joins (B, C, H, W) and (B, D, H, W) to (B, C + D, H, W). Backward returns two views of the result's gradient.

    If an input has another dtype than the result, its gradient is a cast copy.
    """
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
    """Applies 2 x 2 max pooling.

    The input and the indices are saved for backward.

    Returns:
        The maxima, (B, C, H // 2, W // 2), and the index of each maximum in its map, int64.
    """
    shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    node = tape.save((x,), (x,), partial(_shaped_back, tape, x.shape))
    pooled = tape.elementwise(shape, x.dtype, node)
    indices = tape.new(shape, "int64")
    tape.save_output(node, indices)
    return pooled, indices


def _shaped_back(tape: Tape, shape: tuple[int, ...], gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def max_unpool(tape: Tape, x: Array, indices: Array, size: tuple[int, ...]) -> Array:
    """Inverts `max_pool`: writes the values at their indices into a map of zeros, (B, C, *size).

    The indices are saved for backward. Under autocast on a CPU the operation runs in float32.
    """
    x = laws.cast(tape, x, "float32") if tape.precision.autocast and tape.workload.on_cpu else x
    node = tape.save((x,), (indices,), partial(_shaped_back, tape, x.shape))
    return tape.elementwise((*x.shape[:2], *size), x.dtype, node)


def cross_entropy(tape: Tape, logits: Array, batch: Images) -> Array:
    """Computes `torch.nn.functional.cross_entropy` of (B, K, H, W) logits, with class weights and reduction "sum"."""
    logits = laws.cast(tape, logits, tape.precision.logits)
    tape.counts["logits_bytes", "loss"] = logits.storage.num_bytes
    log_probabilities = laws.log_softmax(tape, logits)
    node = tape.save((log_probabilities,), (log_probabilities, batch.labels), partial(_shaped_back, tape, logits.shape))
    tape.save_output(node, tape.new((), log_probabilities.dtype))
    return tape.elementwise((), log_probabilities.dtype, node)
