"""The laws of single operations, computed by hand."""

import pytest

from llmeff.cost import laws
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload

B, T, D, F, V = 2, 8, 4, 6, 10


def tape(**workload):
    return Tape(Workload(num_sequences=B, num_tokens=T, **workload))


def embedded(tape):
    return laws.embedding(tape, laws.Batch(tape), tape.weight("embedding", V, D))


def test_linear():
    it = tape()
    x = embedded(it)
    it.counts.clear()
    y = laws.linear(it, x, it.weight("w", F, D))
    assert y.shape == (B, T, F)
    assert it.counts["executed_flops", ""] == 2 * B * T * D * F
    it.backward(laws.pick_and_sum(it, y, laws.Batch(it)))
    assert it.counts["executed_flops", ""] == it.counts["model_flops", ""] == 3 * 2 * B * T * D * F


@pytest.mark.parametrize(("kernel", "backward"), [("flash", 10), ("math", 8)])
def test_attention(kernel, backward):
    it = tape(kernel=kernel)
    heads = embedded(it).view(B, 2, T, D // 2)
    it.counts.clear()
    mixed = laws.attention(it, heads, heads, heads, None)
    assert it.counts["executed_flops", ""] == 4 * B * T * T * D
    assert it.counts["model_flops", ""] == 3 * 4 * B * D * T * (T + 1) // 2
    it.backward(laws.pick_and_sum(it, mixed, laws.Batch(it)))
    assert it.counts["executed_flops", ""] == (4 + backward) * B * T * T * D


def test_bytes_live_as_long_as_names_and_nodes():
    it = tape()
    x = embedded(it)
    before = it.live.total
    y = laws.silu(it, x)
    assert it.live.total == before + 4 * B * T * D
    del y
    assert it.live.total == before
    del x  # the node of silu keeps it
    assert it.live.total == before


def test_a_step_ends_with_its_gradients_alone():
    it = tape()
    x = embedded(it)
    it.backward(laws.pick_and_sum(it, laws.linear(it, x, it.weight("w", V, D)), laws.Batch(it)))
    del x
    assert it.live.total == 4 * sum(weight.size for weight in it.weights.values()) == 4 * 2 * V * D


def test_a_tied_weight_has_one_gradient():
    it = tape()
    weight = it.weight("w", V, D)
    x = laws.embedding(it, laws.Batch(it), weight)
    it.backward(laws.pick_and_sum(it, laws.linear(it, x, weight), laws.Batch(it)))
    del x
    assert it.live.total == 4 * V * D


def test_recomputation_keeps_the_input_alone_and_stops_before_the_last_product():
    it = tape()
    x = embedded(it)
    it.counts.clear()

    def layer(x):
        hidden = laws.silu(it, laws.linear(it, x, it.weight("up", F, D)))
        return laws.add(it, x, laws.linear(it, hidden, it.weight("down", D, F)))

    y = it.checkpoint(layer, x)
    it.end_forward()
    saved = {part: count for (kind, part), count in it.counts.items() if kind == "saved_bytes"}
    assert saved == {"layer inputs": 4 * B * T * D}
    it.backward(laws.pick_and_sum(it, y, laws.Batch(it)))
    assert it.counts["model_flops", ""] == 6 * 2 * B * T * D * F
    assert it.counts["executed_flops", ""] == 7 * 2 * B * T * D * F


def test_autocast_copies_a_weight_once_and_an_activation_each_time():
    it = tape(precision_name="bf16")
    x, weight = embedded(it), it.weight("w", F, D)
    before = it.live.total
    outputs = [laws.linear(it, x, weight) for _ in range(2)]
    assert all(y.dtype == "bfloat16" for y in outputs)
    assert it.live.total - before == 2 * (F * D + 2 * B * T * D + 2 * B * T * F)
