"""Laws of single operations as eager PyTorch runs them: the FLOPs, saved tensors and allocations of each."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

from llmeff.cost.arrays import Array, Node
from llmeff.cost.tape import Tape
from llmeff.cost.workspace import matrix_bytes

# Dimensions: B batch, T queries, S keys, N heads, K key-value heads, H head width


class Batch:
    """A micro-batch as a model's law sees it: tokens and `core.layout.Layout` as shapes, without values.

    Args:
        tape: the tape that counts the memory of the micro-batch.
    """

    def __init__(self, tape: Tape):
        workload = tape.workload
        self._tape = tape
        self.shape = workload.num_sequences, workload.num_tokens
        self._rows = workload.num_sequences if workload.packed else 1
        self.tokens = tape.given(self.shape, "int64")
        self.targets = tape.given(self.shape, "int64")
        self._places = [tape.given((self._rows, workload.num_tokens), "int64")]
        if workload.packed:
            self._places.append(tape.given(self.shape, "int64"))
        places = self._places if workload.packed else []  # otherwise the forward pass makes the positions
        self.num_bytes = sum(array.storage.num_bytes for array in (self.tokens, self.targets, *places))
        """Bytes of a micro-batch that is in memory but has not been used yet."""
        self._biases: dict[str, tuple[Array, Array]] = {}
        self._rotary: dict[tuple[int, float], tuple[Array, Array]] = {}
        self._tables: dict[Hashable, Any] = {}

    def tables(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the result of `make`, which is called only once per key, as in `Layout.tables`."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def rotary(self, head_dim: int, theta: float) -> tuple[Array, Array]:
        """Returns the cosines and sines of the rotary angles, each of shape (B or 1, 1, T, head_dim)."""
        key = (head_dim, theta)
        if key not in self._rotary:
            shape = (self._rows, 1, self.shape[1], head_dim)
            self._rotary[key] = self._tape.new(shape, "float32"), self._tape.new(shape, "float32")
        return self._rotary[key]

    def bias(self, dtype: str) -> Array | None:
        """Returns the additive attention mask of packed documents, (B, 1, T, T). None for plain causal attention."""
        if not self._tape.workload.packed:
            return None
        if dtype not in self._biases:
            shape = (self.shape[0], 1, self.shape[1], self.shape[1])
            # the boolean mask, from which the bias is computed, stays in memory
            self._biases[dtype] = self._tape.new(shape, dtype), self._tape.new(shape, "bool")
        return self._biases[dtype][0]


def cast(tape: Tape, x: Array, dtype: str) -> Array:
    """Casts an array to another dtype. Returns the array itself if it already has that dtype."""
    if x.dtype == dtype:
        return x
    node = tape.save((x,), (), partial(_cast_back, tape, x.dtype))
    return tape.elementwise(x.shape, dtype, node)


def _cast_back(tape: Tape, dtype: str, gradient: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, dtype),)


def autocast(tape: Tape, x: Array) -> Array:
    """Casts an array as autocast does before a contraction."""
    return cast(tape, x, tape.precision.compute) if tape.precision.autocast else x


def autocast_weight(tape: Tape, weight: Array) -> Array:
    """Casts a weight as autocast does before a contraction. Each weight is cast only once per forward pass."""
    return tape.cached(weight, lambda: autocast(tape, weight)) if tape.precision.autocast else weight


def linear(tape: Tape, x: Array, weight: Array) -> Array:
    """Applies a linear layer without bias: (..., in) by a weight of shape (out, in) to (..., out)."""
    if tape.strategy_law.replaces_linear:
        return _replaced_linear(tape, x, weight)
    weight, x = autocast_weight(tape, weight), autocast(tape, x)
    node = tape.save((x, weight), (x, weight), partial(_linear_back, tape))
    tape.contract(2 * x.size * weight.shape[0])
    return multiplied(tape, (*x.shape[:-1], weight.shape[0]), x.dtype, node)


def multiplied(tape: Tape, shape: tuple[int, ...], dtype: str, node: Node | None = None) -> Array:
    """Returns a new array for the product of two matrices. Counts oneDNN's temporary workspace for the product."""
    result = tape.new(shape, dtype, node)
    tape.workspace(matrix_bytes(tape.workload, result.size, dtype))
    return result


def _linear_back(tape: Tape, gradient: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    tape.execute(2 * 2 * x.size * weight.shape[0])
    grad_weight = multiplied(tape, weight.shape, gradient.dtype)
    return multiplied(tape, x.shape, gradient.dtype), grad_weight


def _replaced_linear(tape: Tape, x: Array, weight: Array) -> Array:
    """Applies `linear` as an autograd.Function that casts its inputs in forward and backward, and saves them uncast."""
    is_cast = tape.precision.autocast
    dtype = tape.precision.compute if is_cast else x.dtype
    copies = [tape.new(array.shape, dtype) for array in (x, weight) if array.dtype != dtype]
    tape.contract(2 * x.size * weight.shape[0])
    y = multiplied(tape, (*x.shape[:-1], weight.shape[0]), dtype)
    del copies
    node = tape.save((x, weight), (x, weight), partial(_replaced_linear_back, tape, dtype))
    return Array(y.shape, y.dtype, y.storage, node)


def _replaced_linear_back(tape: Tape, dtype: str, gradient: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    tape.execute(2 * 2 * x.size * weight.shape[0])
    weight_copy = tape.new(weight.shape, dtype) if weight.dtype != dtype else None
    grad_x = multiplied(tape, x.shape, dtype)
    x_copy = tape.new(x.shape, dtype) if x.dtype != dtype else None
    grad_weight = multiplied(tape, weight.shape, dtype)
    del x_copy, weight_copy
    # autograd casts the gradients to the dtypes of their inputs, one after another
    if x.dtype != dtype:
        grad_x = tape.new(x.shape, x.dtype)
    if weight.dtype != dtype:
        grad_weight = tape.new(weight.shape, weight.dtype)
    return grad_x, grad_weight


def embedding(tape: Tape, batch: Batch, weight: Array) -> Array:
    """Looks up the rows of a (V, D) weight for the batch's tokens, (B, T), to (B, T, D)."""
    return rows(tape, weight, batch.tokens)


def rows(tape: Tape, x: Array, index: Array) -> Array:
    """Selects rows of (V, D) by an index of shape (...), to (..., D), as `torch.nn.functional.embedding` does."""
    node = tape.save((x,), (index,), partial(_new_back, tape, x.shape))
    return tape.elementwise((*index.shape, x.shape[1]), x.dtype, node)


def _new_back(tape: Tape, shape: tuple[int, ...], gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def promote(left: str, right: str) -> str:
    """Returns the dtype of a sum or product of arrays with these dtypes."""
    return left if left == right else "float32"


def add(tape: Tape, left: Array, right: Array) -> Array:
    """Adds two arrays. Backward passes the gradient on to both, without a copy if the dtypes agree."""
    node = tape.save((left, right), (), partial(_add_back, tape, left.dtype, right.dtype))
    return tape.elementwise(left.shape, promote(left.dtype, right.dtype), node)


def _add_back(tape: Tape, left: str, right: str, gradient: Array) -> tuple[Array, Array]:
    def given(dtype: str) -> Array:
        return gradient if gradient.dtype == dtype else tape.new(gradient.shape, dtype)

    return given(left), given(right)


def multiply(tape: Tape, left: Array, right: Array) -> Array:
    """Multiplies two arrays elementwise. Both are saved for backward."""
    node = tape.save((left, right), (left, right), partial(_multiply_back, tape))
    return tape.elementwise(left.shape, promote(left.dtype, right.dtype), node)


def _multiply_back(tape: Tape, gradient: Array, left: Array, right: Array) -> tuple[Array, Array]:
    return tape.new(left.shape, left.dtype), tape.new(right.shape, right.dtype)


def scale(tape: Tape, x: Array, constant: Array) -> Array:
    """Multiplies `x` by a constant. The constant is broadcast, is saved for backward and gets no gradient."""
    node = tape.save((x,), (constant,), partial(_scale_back, tape))
    return tape.elementwise(x.shape, x.dtype, node)


def _scale_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)


def function(tape: Tape, x: Array, keeps: Literal["input", "output", "nothing"]) -> Array:
    """Applies an elementwise function.

    Args:
        tape: the tape that records the operation.
        x: the input.
        keeps: the array that is saved for the derivative.
    """
    node = tape.save((x,), (x,) if keeps == "input" else (), partial(_scale_back, tape))
    y = tape.elementwise(x.shape, x.dtype, node)
    if keeps == "output":
        tape.save_output(node, y)
    return y


def shift(tape: Tape, x: Array) -> Array:
    """Adds to `x` an array that is broadcast and needs no gradient. Backward passes the gradient on to `x`."""
    return tape.elementwise(x.shape, x.dtype, tape.save((x,), (), _shift_back))


def _shift_back(gradient: Array) -> tuple[Array]:
    return (gradient,)


def silu(tape: Tape, x: Array) -> Array:
    """Applies `torch.nn.functional.silu`. The input is saved for backward."""
    return function(tape, x, "input")


def times(tape: Tape, x: Array, factor: Array) -> Array:
    """Multiplies `x` by a factor that is broadcast. Both are saved for backward, and both get a gradient."""
    node = tape.save((x, factor), (x, factor), partial(_times_back, tape))
    return tape.elementwise(x.shape, promote(x.dtype, factor.dtype), node)


def _times_back(tape: Tape, gradient: Array, x: Array, factor: Array) -> tuple[Array, Array]:
    grad_x = tape.new(gradient.shape, x.dtype)
    return grad_x, _summed(tape, tape.new(gradient.shape, gradient.dtype), factor.shape, factor.dtype)


def _summed(tape: Tape, gradient: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Sums a gradient over the dimensions that were broadcast."""
    return gradient if gradient.shape == shape else tape.new(shape, dtype)


def plus(tape: Tape, x: Array, summand: Array) -> Array:
    """Adds to `x` a second array that is broadcast and gets a gradient."""
    node = tape.save((x, summand), (), partial(_plus_back, tape, x.dtype, summand.shape, summand.dtype))
    return tape.elementwise(x.shape, promote(x.dtype, summand.dtype), node)


def _plus_back(
    tape: Tape, dtype: str, summand_shape: tuple[int, ...], summand_dtype: str, gradient: Array
) -> tuple[Array, Array]:
    grad_x = gradient if gradient.dtype == dtype else tape.new(gradient.shape, dtype)
    return grad_x, _summed(tape, gradient, summand_shape, summand_dtype)


def concat(tape: Tape, *parts: Array) -> Array:
    """Joins arrays along the last dimension. Backward returns views of the gradient."""
    given = [part.shape for part in parts]
    node = tape.save(parts, (), partial(_concat_back, given))
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return tape.elementwise(shape, parts[0].dtype, node)


def _concat_back(given: list[tuple[int, ...]], gradient: Array) -> tuple[Array, ...]:
    return tuple(Array(shape, gradient.dtype, gradient.storage) for shape in given)


def split(tape: Tape, x: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Splits an array into views of the given shapes. Backward joins the gradients of all views to one array."""
    arrived: list[Array] = []
    first = tape.save((x,), (), partial(_split_back, tape, x.shape, arrived))
    others = [tape.save((), (), partial(put_aside, arrived)) for _ in shapes[1:]]
    return [Array(shape, x.dtype, x.storage, node) for shape, node in zip(shapes, (first, *others), strict=True)]


def _split_back(tape: Tape, shape: tuple[int, ...], arrived: list[Array], gradient: Array) -> tuple[Array]:
    whole = tape.new(shape, gradient.dtype)
    arrived.clear()
    return (whole,)


def put_aside(arrived: list[Array], gradient: Array) -> tuple[()]:
    """Adds a gradient to `arrived`, where it is kept until the backward of the whole operation uses it.

    It is the gradient of an operation's second or later output.
    """
    arrived.append(gradient)
    return ()


_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
"""Pairs (n, block): for n or more queries, torch's CPU attention kernel processes `block` queries at a time."""
_KEY_BLOCK = 512
"""Number of keys that torch's CPU attention kernel processes at a time."""


def attention(
    tape: Tape, query: Array, key: Array, value: Array, bias: Array | None, model_flops: int | None = None
) -> Array:
    """Computes `scaled_dot_product_attention` with the workload's kernel.

    Args:
        tape: the tape that records the operation.
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, H).
        bias: (B, 1, T, S), added to the scores. None for plain causal attention.
        model_flops: model FLOPs of the forward pass. If None, counts the model FLOPs of causal attention.

    Returns:
        An array of shape (B, N, T, H), with the memory layout (B, T, N, H).
    """
    query, key, value = (autocast(tape, x) for x in (query, key, value))
    flash = tape.workload.kernel == "flash"
    asked = 2 * query.size * (query.shape[2] + 1) if model_flops is None else model_flops
    return (_flash if flash else _math)(tape, query, key, value, bias, asked)


def _flash(tape: Tape, query: Array, key: Array, value: Array, bias: Array | None, asked: int) -> Array:
    saved = (query, key, value) if bias is None else (query, key, value, bias)
    node = tape.save((query, key, value), saved, partial(_flash_back, tape))
    tape.contract(4 * query.size * key.shape[2], asked)
    mixed = tape.new(query.shape, query.dtype, node)
    log_sums = tape.elementwise(query.shape[:-1], "float32")
    _blocks(tape, query, key)
    tape.save_output(node, mixed, log_sums)
    return mixed


def _blocks(tape: Tape, query: Array, key: Array, *, is_backward: bool = False) -> None:
    """Counts the buffers of torch's CPU attention kernel: each thread keeps the scores of one block in them."""
    if not tape.workload.on_cpu:
        return
    num_queries, num_keys, width = query.shape[2], key.shape[2], query.shape[3]
    block = min(num_queries, next(size for least, size in _QUERY_BLOCKS if num_queries >= least))
    scores = block * min(num_keys, _KEY_BLOCK)
    held = 2 * scores if is_backward else scores + block * (width + 2)
    workspace = tape.new((tape.workload.num_threads, held), "float32")
    if query.dtype != "float32":
        tape.new((tape.workload.num_threads, 2 * scores if is_backward else scores), query.dtype)
    del workspace


def _flash_back(
    tape: Tape, gradient: Array, query: Array, key: Array, value: Array, *_: Array
) -> tuple[Array, Array, Array]:
    # five matrix products of size T x S x H, because the attention weights are computed again
    tape.execute(10 * query.size * key.shape[2])
    gradients = (
        tape.new(query.shape, query.dtype),
        tape.new(key.shape, key.dtype),
        tape.new(value.shape, value.dtype),
    )
    _blocks(tape, query, key, is_backward=True)
    return gradients


def _math(tape: Tape, query: Array, key: Array, value: Array, bias: Array | None, asked: int) -> Array:
    num_heads, num_keys = query.shape[1], key.shape[2]
    of = partial(product, tape, 2 * query.size * num_keys, asked // 2)
    key, value = _repeat(tape, key, num_heads), _repeat(tape, value, num_heads)
    scores = of(copy(tape, query), copy(tape, key), (*query.shape[:3], num_keys))
    scores = copy(tape, scores)  # with the bias added
    node = tape.save((scores,), (), partial(_scale_back, tape))
    weights = tape.elementwise(scores.shape, scores.dtype, node)
    tape.save_output(node, weights)
    del scores
    return of(weights, copy(tape, value), query.shape)


def _repeat(tape: Tape, x: Array, num_heads: int) -> Array:
    if x.shape[1] == num_heads:
        return x
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return tape.elementwise((x.shape[0], num_heads, *x.shape[2:]), x.dtype, node)


def copy(tape: Tape, x: Array) -> Array:
    """Copies the array. Backward copies the gradient."""
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return tape.elementwise(x.shape, x.dtype, node)


def padded(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """Pads the array with zeros to a shape. Returns the array itself if it already has the shape."""
    if x.shape == shape:
        return x
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return tape.elementwise(shape, x.dtype, node)


def view(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """Returns a view of `x`, such as a part or an expansion. Backward makes a new gradient with the shape of `x`."""
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return Array(shape, x.dtype, x.storage, node)


def cut(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """Cuts off the end of the second dimension, so that the array has the given shape. Backward pads with zeros.

    If the array already has the shape, returns the array itself. With one row the result is a view. With several rows
    it is a copy, because the view would not be contiguous and `linear` would copy it.
    """
    if x.shape == shape:
        return x
    part = view(tape, x, shape)
    return part if shape[0] == 1 else copy(tape, part)


def product(tape: Tape, flops: int, model_flops: int, left: Array, right: Array, shape: tuple[int, ...]) -> Array:
    """Multiplies two matrices, or batches of them. Both are saved for backward."""
    node = tape.save((left, right), (left, right), partial(_product_back, tape, flops))
    tape.contract(flops, model_flops)
    return tape.new(shape, left.dtype, node)


def _product_back(tape: Tape, flops: int, gradient: Array, left: Array, right: Array) -> tuple[Array, Array]:
    tape.execute(2 * flops)
    grad_right = tape.new(right.shape, right.dtype)
    return tape.new(left.shape, left.dtype), grad_right


def joined_heads(tape: Tape, mixed: Array) -> Array:
    """Joins the heads: (B, N, T, H) to (B, T, N H). With the kernel `flash` this is a view, with `math` a copy."""
    num_batch, num_heads, num_tokens, head_dim = mixed.shape
    joined = mixed.view(num_batch, num_tokens, num_heads * head_dim)
    if tape.workload.kernel == "flash":
        return joined
    return copy(tape, mixed).view(*joined.shape)


def log_softmax(tape: Tape, x: Array) -> Array:
    """Applies `log_softmax` over the last dimension. The result is saved for backward."""
    node = tape.save((x,), (), partial(_scale_back, tape))
    result = tape.elementwise(x.shape, x.dtype, node)
    tape.save_output(node, result)
    return result


def pick_and_sum(tape: Tape, log_probabilities: Array, batch: Batch) -> Array:
    """Returns the summed negative log-likelihood of the targets."""
    saved = (log_probabilities, batch.targets)
    node = tape.save((log_probabilities,), saved, partial(_pick_back, tape))
    total_weight = tape.new((), log_probabilities.dtype)
    tape.save_output(node, total_weight)
    return tape.elementwise((), log_probabilities.dtype, node)


def _pick_back(tape: Tape, gradient: Array, log_probabilities: Array, *_: Array) -> tuple[Array]:
    return (tape.new(log_probabilities.shape, log_probabilities.dtype),)


def cross_entropy(tape: Tape, logits: Array, batch: Batch) -> Array:
    """Computes `torch.nn.functional.cross_entropy` of (M, V) logits, with reduction "sum"."""
    tape.counts["logits_bytes", "loss"] = logits.storage.num_bytes
    return pick_and_sum(tape, log_softmax(tape, logits), batch)
