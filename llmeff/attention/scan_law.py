"""The price of `scan.mix` in training: its products, what it saves, and its memory while it recomputes segments."""

from functools import partial
from typing import Any

from llmeff.attention.scan import BLOCK, CHUNK, SEGMENT
from llmeff.cost import laws
from llmeff.cost.arrays import Backward, Node
from llmeff.cost.tape import Array, Tape

# B batch, N heads, T tokens, K key width, V value width, M chunks, C tokens of a chunk

_Rows = list[Array | None]


def law(
    tape: Tape,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    *,
    is_convolved: bool = False,
) -> Array:
    """Records the price of `scan.mix` on the tape. Maps its inputs, (B, T, N, .), to (B, T, N, V).

    Variables here live exactly as long as those in `scan._Scan.forward`, so that the tape measures the same peak
    memory. `is_convolved` is True if queries, keys and values come from a convolution. Their memory layout then has
    channels before tokens.
    """
    rows: _Rows = [None if x is None else laws.cast(tape, x, "float32") for x in (query, key, value, log_decay, beta)]
    del query, key, value, log_decay, beta
    given = [x for x in rows if x is not None]
    num_rows, length, num_heads, width = given[2].shape
    state, states = tape.new((num_rows, num_heads, given[1].shape[-1], width), "float32"), []
    out = tape.new((num_rows, length, num_heads, width), "float32")
    with tape.inside():
        for start in range(0, length, SEGMENT):
            states.append(state)
            own: list[Any] = [*_part(rows, start), state]
            mixed, state = _segment(tape, *_dense(given[2].shape, is_convolved), *own)
            del mixed
    flows = [x is not None and x.node is not None for x in rows]
    present = [x is not None for x in rows]
    back = partial(_back, tape, _dense(out.shape, is_convolved), present, flows)
    node = tape.save(tuple(given), (*given, *states), back)
    return Array(out.shape, out.dtype, out.storage, node)


def _dense(shape: tuple[int, ...], is_convolved: bool) -> tuple[bool, bool]:
    """Returns two bools: whether segments of queries, keys and values need no copy, and the same for other arrays.

    A segment of (B, T, N, .) needs no copy if it already has the memory layout of (B, N, L, .), where L is its length.
    Queries, keys and values from a convolution (`is_convolved`) always need a copy.
    """
    is_dense = shape[2] == 1 and (shape[0] == 1 or shape[1] <= SEGMENT)
    return is_dense and not is_convolved, is_dense


def _part(rows: _Rows, start: int) -> _Rows:
    """Returns the segment of each array that begins at token `start`: (B, T, N, .) to (B, N, L, .)."""
    return [
        None
        if x is None
        else Array((x.shape[0], x.shape[2], min(SEGMENT, x.shape[1] - start), *x.shape[3:]), x.dtype, x.storage, x.node)
        for x in rows
    ]


def _back(
    tape: Tape, dense: tuple[bool, bool], present: list[bool], flows: list[bool], gradient: Array, *saved: Array
) -> tuple[Array | None, ...]:
    kept = list(saved)
    rows: _Rows = [kept.pop(0) if is_there else None for is_there in present]
    found = [
        tape.new(x.shape, x.dtype) if x is not None and flow else None for x, flow in zip(rows, flows, strict=True)
    ]
    above = [tape.new(kept[-1].shape, kept[-1].dtype)]
    for index in reversed(range(len(kept))):
        starts = [*_part(rows, index * SEGMENT), kept[index]]
        assert starts[2] is not None
        part = Array(starts[2].shape, gradient.dtype, gradient.storage)
        given = partial(_given, tape, part, above, dense[1])
        *parts, last = tape.run_again(partial(_segment, tape, *dense), starts, (*flows, True), given)
        assert last is not None
        above[:] = [last]
        del parts, last
    return tuple(own for own, is_there in zip(found, present, strict=True) if is_there)


def _given(tape: Tape, part: Array, above: list[Array], is_dense: bool) -> list[Array]:
    """Returns the gradients of the results of a segment: its output and its final state.

    The gradient of the whole output has the memory layout (B, T, N, .). If the segment's part of it is not dense, the
    part is copied.
    """
    return [part if is_dense else tape.new(part.shape, part.dtype), *above]


def _segment(
    tape: Tape,
    are_dense: bool,
    is_dense: bool,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    state: Array,
) -> tuple[Array, Array]:
    """Records the price of `scan._segment` on the tape.

    Variables here live exactly as long as those in `scan._segment`, so that the tape measures the same peak memory.
    """
    length, width = key.shape[2], value.shape[-1]
    query, key, value = (_chunks(tape, x, are_dense) for x in (query, key, value))
    decay = None if log_decay is None else _function(tape, _chunks(tape, log_decay, is_dense))
    sees = _sees(tape, key)
    sites = (*key.shape[:3], CHUNK)
    read, kept, carry = query, key, None
    if decay is not None:
        read = _times(tape, query, _function(tape, decay))
        kept = _times(tape, key, _function(tape, _less(tape, _last(tape, decay), decay)))
        carry = _function(tape, _last(tape, decay))
    borders = _borders(tape, key) if tape.workload.packed else []
    if borders:
        read, kept = _times(tape, read, borders[0]), _times(tape, kept, borders[1])
    taken, erased = value, None
    if beta is not None:
        beta = _chunks(tape, Array((*beta.shape, 1), beta.dtype, beta.storage, beta.node), is_dense)
        found = key if decay is None else _times(tape, key, _function(tape, decay))
        found = _times(tape, found, borders[0]) if borders else found
        overlap = _function(tape, _times(tape, _pairs(tape, key, key, decay, sees), beta))
        right = _times(tape, laws.concat(tape, value, found), beta)
        solved = _solve(tape, overlap, right)
        del right
        taken = laws.view(tape, solved, (*sites, width))
        erased = laws.view(tape, solved, (*sites, key.shape[-1]))
    states, end, taken = _hand_on(tape, kept, taken, carry, erased, state)
    inner = _product(tape, _pairs(tape, query, key, decay, sees), taken, (*sites, width))
    mixed = laws.add(tape, inner, _product(tape, read, states, (*sites, width)))
    del inner
    return _cut(tape, mixed, length), end


def _node(tape: Tape, inputs: tuple[Array, ...], backward: Backward) -> Node | None:
    """Returns a node for an operation that saves no tensors, or None if no input needs a gradient (constant decays)."""
    return None if all(x.node is None for x in inputs) else tape.save(inputs, (), backward)


def _function(tape: Tape, x: Array) -> Array:
    """Records an elementwise function. It saves nothing: its backward uses tensors that a later product saves."""
    return tape.elementwise(x.shape, x.dtype) if x.node is None else laws.function(tape, x, "nothing")


def _times(tape: Tape, x: Array, factor: Array) -> Array:
    return laws.scale(tape, x, factor) if factor.node is None else laws.times(tape, x, factor)


def _chunks(tape: Tape, x: Array, is_dense: bool) -> Array:
    num_chunks = -(-x.shape[2] // CHUNK)
    shape = (*x.shape[:2], num_chunks, CHUNK, x.shape[-1])
    if num_chunks * CHUNK == x.shape[2]:
        if is_dense:
            return Array(shape, x.dtype, x.storage, x.node)
        return tape.elementwise(shape, x.dtype, _node(tape, (x,), partial(_same_back, x.shape)))
    return tape.elementwise(shape, x.dtype, _node(tape, (x,), partial(_new_back, tape, x.shape)))


def _same_back(shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (gradient.view(*shape),)


def _new_back(tape: Tape, shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def _cut(tape: Tape, x: Array, length: int) -> Array:
    """Joins the chunks and returns the first `length` tokens: (B, N, M, C, V) to (B, N, length, V)."""
    if x.shape[2] * CHUNK == length:
        return Array((*x.shape[:2], length, x.shape[-1]), x.dtype, x.storage, x.node)
    return laws.view(tape, x, (*x.shape[:2], length, x.shape[-1]))


def _last(tape: Tape, decay: Array) -> Array:
    node = _node(tape, (decay,), partial(_new_back, tape, decay.shape))
    return Array((*decay.shape[:3], 1, decay.shape[-1]), decay.dtype, decay.storage, node)


def _less(tape: Tape, left: Array, right: Array, shape: tuple[int, ...] | None = None) -> Array:
    """Records the price of left - right on the tape."""
    back = partial(_less_back, tape, left.shape, right.shape)
    return tape.elementwise(shape or right.shape, "float32", _node(tape, (left, right), back))


def _less_back(tape: Tape, left: tuple[int, ...], right: tuple[int, ...], gradient: Array) -> tuple[Array, Array]:
    grad_left = gradient if gradient.shape == left else tape.new(left, "float32")
    negative = tape.new(gradient.shape, "float32")
    return grad_left, negative if gradient.shape == right else tape.new(right, "float32")


def _sees(tape: Tape, key: Array) -> Array:
    num_rows, num_chunks = (key.shape[0], key.shape[2]) if tape.workload.packed else (1, 1)
    return tape.new((num_rows, 1, num_chunks, CHUNK, CHUNK), "bool")


def _borders(tape: Tape, key: Array) -> list[Array]:
    return [tape.new((key.shape[0], 1, key.shape[2], CHUNK, 1), "float32") for _ in range(2)]


def _masked(tape: Tape, x: Array, sees: Array) -> Array:
    hidden = sees.like()
    if x.node is None:
        return tape.elementwise(x.shape, x.dtype)
    node = tape.save((x,), (hidden,), partial(_masked_back, tape))
    return tape.elementwise(x.shape, x.dtype, node)


def _masked_back(tape: Tape, gradient: Array, _: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)


def _product(tape: Tape, left: Array, right: Array, shape: tuple[int, ...]) -> Array:
    flops = 2 * left.size * shape[-1]
    return laws.product(tape, flops, flops, left, right, shape)


def _pairs(tape: Tape, rows: Array, keys: Array, decay: Array | None, sees: Array) -> Array:
    shape = (*keys.shape[:3], CHUNK, CHUNK)
    if decay is None:
        return _masked(tape, _product(tape, rows, keys, shape), sees)
    if decay.shape[-1] == 1:
        between = _masked(tape, _less(tape, decay, decay, shape), sees)
        return _times(tape, _product(tape, rows, keys, shape), _function(tape, between))
    blocks = [_block(tape, rows, keys, decay, start) for start in range(0, CHUNK, BLOCK)]
    node = tape.save(tuple(blocks), (), partial(_blocks_back, [block.shape for block in blocks]))
    return _masked(tape, tape.elementwise(shape, "float32", node), sees)


def _block(tape: Tape, rows: Array, keys: Array, decay: Array, start: int) -> Array:
    def cut(x: Array, tokens: int) -> Array:
        return laws.view(tape, x, (*x.shape[:3], tokens, x.shape[-1]))

    def scaled(x: Array, tokens: int) -> Array:
        between = _less(tape, base, cut(decay, tokens))
        return _times(tape, cut(x, tokens), _function(tape, between))

    base, end = cut(decay, 1), start + BLOCK
    own, theirs = scaled(rows, BLOCK), scaled(keys, end)
    found = _product(tape, own, theirs, (*rows.shape[:3], BLOCK, end))
    node = tape.save((found,), (), partial(_new_back, tape, found.shape))
    return tape.elementwise((*rows.shape[:3], BLOCK, CHUNK), "float32", node)


def _blocks_back(shapes: list[tuple[int, ...]], gradient: Array) -> tuple[Array, ...]:
    return tuple(Array(shape, gradient.dtype, gradient.storage) for shape in shapes)


def _solve(tape: Tape, overlap: Array, right: Array) -> Array:
    """Records the price of a triangular solve, which takes half the multiply-adds of a matrix product."""
    flops = right.size * CHUNK
    node = tape.save((overlap, right), (overlap,), partial(_solve_back, tape, flops))
    tape.contract(flops)
    solved = tape.new(right.shape, right.dtype, node)
    tape.save_output(node, solved)
    return solved


def _solve_back(tape: Tape, flops: int, gradient: Array, overlap: Array, solved: Array) -> tuple[Array, Array]:
    """Records the price of the backward pass of a triangular solve.

    The gradient of the right side solves the transposed system. The gradient of the matrix is a full product.
    """
    tape.execute(3 * flops)
    grad_right = tape.new(solved.shape, solved.dtype)
    grad_overlap = tape.new(overlap.shape, overlap.dtype)
    tape.new(overlap.shape, overlap.dtype)
    return grad_overlap, grad_right


def _hand_on(
    tape: Tape, keys: Array, values: Array, carry: Array | None, erased: Array | None, state: Array
) -> tuple[Array, Array, Array]:
    """Records the price of `scan._HandOn` on the tape."""
    num_rows, num_heads, num_chunks, _, width = keys.shape
    flops = 2 * keys.size * values.shape[-1] * (1 if erased is None else 2)
    tape.contract(flops)
    states = tape.new((num_rows, num_heads, num_chunks, width, values.shape[-1]), "float32")
    if erased is None:
        taken = values
        added = tape.new(states.shape, "float32")
    else:
        taken = tape.new(values.shape, "float32")
        added = tape.new(state.shape, "float32")
    end = tape.new(state.shape, "float32")
    del added
    arrived: list[Array] = []
    given = [x for x in (keys, values, carry, erased, state) if x is not None]
    saved = [x for x in (keys, taken, carry, erased, states) if x is not None]
    shapes = (
        keys.shape,
        values.shape,
        None if carry is None else carry.shape,
        None if erased is None else erased.shape,
    )
    learns = carry is not None and carry.node is not None
    back = partial(_hand_on_back, tape, arrived, flops, shapes, state.shape, learns)
    node = tape.save(tuple(given), tuple(saved), back)
    aside = [tape.save((), (), partial(laws.put_aside, arrived)) for _ in range(1 if erased is None else 2)]
    states = Array(states.shape, states.dtype, states.storage, node)
    end = Array(end.shape, end.dtype, end.storage, aside[0])
    if erased is not None:
        taken = Array(taken.shape, taken.dtype, taken.storage, aside[1])
    return states, end, taken


def _hand_on_back(
    tape: Tape,
    arrived: list[Array],
    flops: int,
    shapes: tuple[tuple[int, ...] | None, ...],
    state: tuple[int, ...],
    learns: bool,
    gradient: Array,
    *_: Array,
) -> tuple[Array | None, ...]:
    """Records the price of the backward pass of `scan._HandOn`. `learns` is whether the decays need gradients."""
    tape.execute(2 * flops)
    keys, values, carry, erased = shapes
    assert keys is not None
    assert values is not None
    after = tape.new(gradient.shape, "float32")
    grad_taken = None if erased is None else tape.new(values, "float32")
    before = tape.new(state, "float32")
    moved = None if erased is None else tape.new(state, "float32")
    found: list[Array | None] = [
        tape.new(keys, "float32"),
        tape.new(values, "float32") if grad_taken is None else grad_taken,
    ]
    grad_erased = []
    if erased is not None:
        product = tape.new(erased, "float32")
        grad_erased = [tape.new(erased, "float32")]
        del product
    if carry is not None:
        weighted = tape.new(after.shape, "float32") if learns else None
        found.append(tape.new(carry, "float32") if learns else None)
        del weighted
    del moved
    arrived.clear()
    return (*found, *grad_erased, before)
