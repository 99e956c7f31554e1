"""The laws of single operations, as eager PyTorch runs them: what each computes, saves and allocates."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

from llmeff.cost.arrays import Array, Node
from llmeff.cost.tape import Tape
from llmeff.cost.workspace import matrix_bytes

# B batch, T queries, S keys, N heads, K key-value heads, H head width


class Batch:
    """A micro-batch as the law of a model sees it: tokens and `core.layout.Layout` without numbers.

    Args:
        tape: counts it.
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
        places = self._places if workload.packed else []  # otherwise the forward pass makes them
        self.num_bytes = sum(array.storage.num_bytes for array in (self.tokens, self.targets, *places))
        """Bytes of a micro-batch that is made and waits for its turn."""
        self._biases: dict[str, tuple[Array, Array]] = {}
        self._rotary: dict[tuple[int, float], tuple[Array, Array]] = {}
        self._tables: dict[Hashable, Any] = {}

    def tables(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, which is called once a key, as in `Layout.tables`."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def rotary(self, head_dim: int, theta: float) -> tuple[Array, Array]:
        """Cosines and sines, each (B or 1, 1, T, head_dim)."""
        key = (head_dim, theta)
        if key not in self._rotary:
            shape = (self._rows, 1, self.shape[1], head_dim)
            self._rotary[key] = self._tape.new(shape, "float32"), self._tape.new(shape, "float32")
        return self._rotary[key]

    def bias(self, dtype: str) -> Array | None:
        """Which keys each query sees, (B, 1, T, T); None for plain causal attention."""
        if not self._tape.workload.packed:
            return None
        if dtype not in self._biases:
            shape = (self.shape[0], 1, self.shape[1], self.shape[1])
            # the boolean mask that the bias is made from stays alive
            self._biases[dtype] = self._tape.new(shape, dtype), self._tape.new(shape, "bool")
        return self._biases[dtype][0]


def cast(tape: Tape, x: Array, dtype: str) -> Array:
    """An array in another format; the array itself if it has that format."""
    if x.dtype == dtype:
        return x
    node = tape.save((x,), (), partial(_cast_back, tape, x.dtype))
    return tape.elementwise(x.shape, dtype, node)


def _cast_back(tape: Tape, dtype: str, gradient: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, dtype),)


def autocast(tape: Tape, x: Array) -> Array:
    """An array in the format in which autocast gives it to a contraction."""
    return cast(tape, x, tape.precision.compute) if tape.precision.autocast else x


def autocast_weight(tape: Tape, weight: Array) -> Array:
    """A weight in the format in which autocast gives it to a contraction; it is cast once a forward pass."""
    return tape.cached(weight, lambda: autocast(tape, weight)) if tape.precision.autocast else weight


def linear(tape: Tape, x: Array, weight: Array) -> Array:
    """(..., in) by (out, in) to (..., out), without bias."""
    if tape.strategy_law.replaces_linear:
        return _replaced_linear(tape, x, weight)
    weight, x = autocast_weight(tape, weight), autocast(tape, x)
    node = tape.save((x, weight), (x, weight), partial(_linear_back, tape))
    tape.contract(2 * x.size * weight.shape[0])
    return multiplied(tape, (*x.shape[:-1], weight.shape[0]), x.dtype, node)


def multiplied(tape: Tape, shape: tuple[int, ...], dtype: str, node: Node | None = None) -> Array:
    """A new array that is the product of two matrices; what oneDNN takes beside it comes and goes."""
    result = tape.new(shape, dtype, node)
    tape.workspace(matrix_bytes(tape.workload, result.size, dtype))
    return result


def _linear_back(tape: Tape, gradient: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    tape.execute(2 * 2 * x.size * weight.shape[0])
    grad_weight = multiplied(tape, weight.shape, gradient.dtype)
    return multiplied(tape, x.shape, gradient.dtype), grad_weight


def _replaced_linear(tape: Tape, x: Array, weight: Array) -> Array:
    """`linear` as an autograd.Function: it saves its inputs uncast, after use, and casts them in each pass."""
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
    # autograd casts gradients to the formats of their inputs, one after another
    if x.dtype != dtype:
        grad_x = tape.new(x.shape, x.dtype)
    if weight.dtype != dtype:
        grad_weight = tape.new(weight.shape, weight.dtype)
    return grad_x, grad_weight


def embedding(tape: Tape, batch: Batch, weight: Array) -> Array:
    """Rows of (V, D) by (B, T) tokens, to (B, T, D)."""
    return rows(tape, weight, batch.tokens)


def rows(tape: Tape, x: Array, index: Array) -> Array:
    """Rows of (V, D) by an index of shape (...), as `torch.nn.functional.embedding`, to (..., D)."""
    node = tape.save((x,), (index,), partial(_new_back, tape, x.shape))
    return tape.elementwise((*index.shape, x.shape[1]), x.dtype, node)


def _new_back(tape: Tape, shape: tuple[int, ...], gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def promote(left: str, right: str) -> str:
    """The format of a sum or product of two formats."""
    return left if left == right else "float32"


def add(tape: Tape, left: Array, right: Array) -> Array:
    """The sum of two arrays; backward passes its gradient on, without a copy if formats agree."""
    node = tape.save((left, right), (), partial(_add_back, tape, left.dtype, right.dtype))
    return tape.elementwise(left.shape, promote(left.dtype, right.dtype), node)


def _add_back(tape: Tape, left: str, right: str, gradient: Array) -> tuple[Array, Array]:
    def given(dtype: str) -> Array:
        return gradient if gradient.dtype == dtype else tape.new(gradient.shape, dtype)

    return given(left), given(right)


def multiply(tape: Tape, left: Array, right: Array) -> Array:
    """The elementwise product of two arrays, which are both saved."""
    node = tape.save((left, right), (left, right), partial(_multiply_back, tape))
    return tape.elementwise(left.shape, promote(left.dtype, right.dtype), node)


def _multiply_back(tape: Tape, gradient: Array, left: Array, right: Array) -> tuple[Array, Array]:
    return tape.new(left.shape, left.dtype), tape.new(right.shape, right.dtype)


def scale(tape: Tape, x: Array, constant: Array) -> Array:
    """Multiplies by a constant that broadcasts. The constant is saved for backward."""
    node = tape.save((x,), (constant,), partial(_scale_back, tape))
    return tape.elementwise(x.shape, x.dtype, node)


def _scale_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)


def function(tape: Tape, x: Array, keeps: Literal["input", "output", "nothing"]) -> Array:
    """Any elementwise function.

    Args:
        tape: counts it.
        x: the input.
        keeps: what is saved for the derivative.
    """
    node = tape.save((x,), (x,) if keeps == "input" else (), partial(_scale_back, tape))
    y = tape.elementwise(x.shape, x.dtype, node)
    if keeps == "output":
        tape.save_output(node, y)
    return y


def shift(tape: Tape, x: Array) -> Array:
    """The sum with an array that has no gradient and broadcasts; backward passes its gradient on."""
    return tape.elementwise(x.shape, x.dtype, tape.save((x,), (), _shift_back))


def _shift_back(gradient: Array) -> tuple[Array]:
    return (gradient,)


def silu(tape: Tape, x: Array) -> Array:
    """`torch.nn.functional.silu`; the input is saved."""
    return function(tape, x, "input")


def times(tape: Tape, x: Array, factor: Array) -> Array:
    """The product with a factor that broadcasts; both are saved."""
    node = tape.save((x, factor), (x, factor), partial(_times_back, tape))
    return tape.elementwise(x.shape, promote(x.dtype, factor.dtype), node)


def _times_back(tape: Tape, gradient: Array, x: Array, factor: Array) -> tuple[Array, Array]:
    grad_x = tape.new(gradient.shape, x.dtype)
    return grad_x, _summed(tape, tape.new(gradient.shape, gradient.dtype), factor.shape, factor.dtype)


def _summed(tape: Tape, gradient: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A gradient, summed over the dimensions that were broadcast."""
    return gradient if gradient.shape == shape else tape.new(shape, dtype)


def plus(tape: Tape, x: Array, summand: Array) -> Array:
    """The sum with a summand that broadcasts."""
    node = tape.save((x, summand), (), partial(_plus_back, tape, x.dtype, summand.shape, summand.dtype))
    return tape.elementwise(x.shape, promote(x.dtype, summand.dtype), node)


def _plus_back(
    tape: Tape, dtype: str, summand_shape: tuple[int, ...], summand_dtype: str, gradient: Array
) -> tuple[Array, Array]:
    grad_x = gradient if gradient.dtype == dtype else tape.new(gradient.shape, dtype)
    return grad_x, _summed(tape, gradient, summand_shape, summand_dtype)


def concat(tape: Tape, *parts: Array) -> Array:
    """Arrays joined along the last dimension; backward returns views of its gradient."""
    given = [part.shape for part in parts]
    node = tape.save(parts, (), partial(_concat_back, given))
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return tape.elementwise(shape, parts[0].dtype, node)


def _concat_back(given: list[tuple[int, ...]], gradient: Array) -> tuple[Array, ...]:
    return tuple(Array(shape, gradient.dtype, gradient.storage) for shape in given)


def split(tape: Tape, x: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Views of parts; backward waits for the gradients of all parts and joins them."""
    arrived: list[Array] = []
    first = tape.save((x,), (), partial(_split_back, tape, x.shape, arrived))
    others = [tape.save((), (), partial(put_aside, arrived)) for _ in shapes[1:]]
    return [Array(shape, x.dtype, x.storage, node) for shape, node in zip(shapes, (first, *others), strict=True)]


def _split_back(tape: Tape, shape: tuple[int, ...], arrived: list[Array], gradient: Array) -> tuple[Array]:
    whole = tape.new(shape, gradient.dtype)
    arrived.clear()
    return (whole,)


def put_aside(arrived: list[Array], gradient: Array) -> tuple[()]:
    """Keeps the gradient of a further output of an operation until the operation's backward reads it."""
    arrived.append(gradient)
    return ()


_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
"""(queries at least, block): how many queries torch's CPU kernel takes at a time, by how many there are."""
_KEY_BLOCK = 512
"""Keys that torch's CPU kernel takes at a time."""


def attention(
    tape: Tape, query: Array, key: Array, value: Array, bias: Array | None, model_flops: int | None = None
) -> Array:
    """`scaled_dot_product_attention` by the workload's kernel.

    Args:
        tape: counts it.
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, H).
        bias: (B, 1, T, S), added to the scores; None for plain causal attention.
        model_flops: FLOPs that the model asks for in a forward pass; None: those of causal attention.

    Returns:
        (B, N, T, H), with memory in the order (B, T, N, H).
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
    """The buffers of torch's CPU kernel in each thread, freed at the end: scores of blocks of queries by blocks of keys."""
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
    # five products of (T, S) by H, since the weights are computed again
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
    """A copy of the array; backward copies its gradient."""
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return tape.elementwise(x.shape, x.dtype, node)


def padded(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """The array with zeros appended up to a shape; the array itself if it has the shape."""
    if x.shape == shape:
        return x
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return tape.elementwise(shape, x.dtype, node)


def view(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """A view in another shape: a part, an expansion or the whole; backward makes a gradient in the input's shape."""
    node = tape.save((x,), (), partial(_new_back, tape, x.shape))
    return Array(shape, x.dtype, x.storage, node)


def cut(tape: Tape, x: Array, shape: tuple[int, ...]) -> Array:
    """The beginning of the second dimension; backward pads its gradient with zeros. The array itself if all is left.

    It is a view of one row. Of several rows it is not contiguous, and `linear` copies it.
    """
    if x.shape == shape:
        return x
    part = view(tape, x, shape)
    return part if shape[0] == 1 else copy(tape, part)


def product(tape: Tape, flops: int, model_flops: int, left: Array, right: Array, shape: tuple[int, ...]) -> Array:
    """A product of matrices, which are both saved."""
    node = tape.save((left, right), (left, right), partial(_product_back, tape, flops))
    tape.contract(flops, model_flops)
    return tape.new(shape, left.dtype, node)


def _product_back(tape: Tape, flops: int, gradient: Array, left: Array, right: Array) -> tuple[Array, Array]:
    tape.execute(2 * flops)
    grad_right = tape.new(right.shape, right.dtype)
    return tape.new(left.shape, left.dtype), grad_right


def joined_heads(tape: Tape, mixed: Array) -> Array:
    """(B, N, T, H) to (B, T, N H): a view of the result of `flash`, a copy of that of `math`."""
    num_batch, num_heads, num_tokens, head_dim = mixed.shape
    joined = mixed.view(num_batch, num_tokens, num_heads * head_dim)
    if tape.workload.kernel == "flash":
        return joined
    return copy(tape, mixed).view(*joined.shape)


def log_softmax(tape: Tape, x: Array) -> Array:
    """`log_softmax` over the last dimension; the result is saved."""
    node = tape.save((x,), (), partial(_scale_back, tape))
    result = tape.elementwise(x.shape, x.dtype, node)
    tape.save_output(node, result)
    return result


def pick_and_sum(tape: Tape, log_probabilities: Array, batch: Batch) -> Array:
    """The negative log-likelihood of the targets, summed."""
    saved = (log_probabilities, batch.targets)
    node = tape.save((log_probabilities,), saved, partial(_pick_back, tape))
    total_weight = tape.new((), log_probabilities.dtype)
    tape.save_output(node, total_weight)
    return tape.elementwise((), log_probabilities.dtype, node)


def _pick_back(tape: Tape, gradient: Array, log_probabilities: Array, *_: Array) -> tuple[Array]:
    return (tape.new(log_probabilities.shape, log_probabilities.dtype),)


def cross_entropy(tape: Tape, logits: Array, batch: Batch) -> Array:
    """`torch.nn.functional.cross_entropy` of (M, V) logits, summed."""
    tape.counts["logits_bytes", "loss"] = logits.storage.num_bytes
    return pick_and_sum(tape, log_softmax(tape, logits), batch)
