"""A step of a small law, and what is kept in it, computed by hand."""

from functools import partial

import pytest

from llmeff.core.precision import precision
from llmeff.cost import image_laws, laws
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Price
from llmeff.cost.step import price_state, price_step, weights
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from llmeff.cost.workspace import Room

B, T, D, V = 2, 8, 4, 10
TOKENS = B * T
NUM_WEIGHTS = 2 * V * D
BATCH = 8 * 2 * TOKENS
"""Tokens and targets in int64."""
PLACES = 8 * T
"""Of all rows alike."""


def law(tape, batch):
    with tape.within("model", "body"):
        x = laws.embedding(tape, batch, tape.weight("embedding", V, D))
        logits = laws.linear(tape, x, tape.weight("head", V, D))
    return laws.cross_entropy(tape, logits, batch)


def priced(strategy_law=None, of=law, **work):
    return price_step(of, Workload(num_sequences=B, num_tokens=T, **work), strategy_law)


def test_a_law_names_its_weights_by_where_they_lie():
    assert [(own.name, own.shape, own.part) for own in weights(law)] == [
        ("model.embedding", (V, D), "body"), ("model.head", (V, D), "body"),
    ]  # fmt: skip


def test_what_one_micro_batch_takes():
    price = priced()
    assert price.parts("parameters") == {"body": NUM_WEIGHTS}
    assert price.parts("parameter_bytes") == price.parts("gradient_bytes") == {"body": 4 * NUM_WEIGHTS}
    assert price.parts("batch_bytes") == {"batch": BATCH + PLACES}
    assert price.parts("logits_bytes") == {"loss": 4 * TOKENS * V}
    assert price.parts("model_flops") == price.parts("executed_flops") == {"body": 3 * 2 * TOKENS * D * V}
    # rows of the embedding; log probabilities, and their sum
    assert price.parts("elementwise_ops") == {"body": TOKENS * D, "": TOKENS * V + 1}
    assert price.parts("saved_bytes") == {"body": 4 * TOKENS * D, "": 4 * TOKENS * V + 4}
    assert price.unknown == frozenset()
    assert price.source == "law"


def test_the_peak_is_told_apart_by_what_lives_then():
    """When the gradient of the logits is made of that of their logarithms: nothing has its own gradient yet."""
    logits = 4 * TOKENS * V
    assert priced().parts("peak_bytes") == {
        "parameters": 4 * NUM_WEIGHTS,
        "batch": BATCH + PLACES,
        "saved activations": 4 * TOKENS * D + logits,
        "temporaries": 2 * logits + 4,  # and the loss
    }


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_what_is_done_for_every_micro_batch_is_counted_as_often(num):
    one, price = priced(), priced(num_micro_batches=num)
    for kind in ("model_flops", "executed_flops", "elementwise_ops"):
        assert price.parts(kind) == {part: num * count for part, count in one.parts(kind).items()}
    for kind in ("parameters", "parameter_bytes", "gradient_bytes", "batch_bytes", "saved_bytes", "logits_bytes"):
        assert price.parts(kind) == one.parts(kind)
    # while the second is computed the gradients of the first are there, and those after it wait
    assert price.parts("peak_bytes").get("gradients", 0) == (4 * NUM_WEIGHTS if num > 1 else 0)
    assert price.parts("peak_bytes")["batch"] == PLACES + BATCH * (1 + max(0, num - 2))


class Sending(StrategyLaw):
    """Notes what it is told, and sends something with every micro-batch, more with the last, and once with the update."""

    def __init__(self, own):
        super().__init__(own)
        self.told = []

    def set_use_order(self, uses):
        self.told.append(("set_use_order", uses))

    def begin_micro_batch(self, is_last):
        super().begin_micro_batch(is_last)
        self.told.append(("begins", is_last))

    def on_use(self, weight, in_backward):
        self.told.append((weight.name, in_backward))

    def end_backward(self):
        self.send("all_reduce", 1000 if self.is_last else 10)

    def update(self):
        self.send("all_gather", 7)


@pytest.mark.parametrize(("num", "sent"), [(1, 1000), (2, 1010), (3, 1020), (5, 1040)])
def test_what_is_sent_is_counted_for_every_micro_batch_and_the_update(num, sent):
    strategy_law = Sending(weights(law))
    price = priced(strategy_law, num_micro_batches=num)
    assert price.parts("wire_bytes") == {"all_reduce": sent, "all_gather": 7}
    begun = [is_last for name, is_last in strategy_law.told if name == "begins"]
    assert begun == [False] * (min(num, 3) - 1) + [True]  # the second stands for all others


def test_a_strategy_law_is_told_of_every_use_before_the_step_and_in_it():
    strategy_law = Sending(weights(law))
    priced(strategy_law)
    uses = [("model.embedding", False), ("model.head", False), ("model.head", True), ("model.embedding", True)]
    assert strategy_law.told == [("set_use_order", uses), ("begins", True), *uses]


def test_a_weight_that_is_used_again_in_backward_is_used_there():
    def of(tape, batch):
        x = laws.embedding(tape, batch, tape.weight("embedding", V, D))
        y = tape.checkpoint(lambda x: laws.silu(tape, laws.linear(tape, x, tape.weight("w", D, D))), x)
        return laws.cross_entropy(tape, y, batch)

    strategy_law = Sending(weights(of))
    priced(strategy_law, of)
    assert strategy_law.told[2:] == [
        ("embedding", False), ("w", False), ("w", True), ("w", True), ("embedding", True),
    ]  # fmt: skip


class Holding(StrategyLaw):
    """Holds something of every kind while the loss is computed."""

    def begin_micro_batch(self, is_last):
        for number, label in enumerate(LABELS):
            self.hold(label, 10_000 + number)
        self.hold("gathered_bytes", 1)

    def end_backward(self):
        for label in LABELS:
            self.drop(label)


LABELS = ("master_bytes", "frozen_bytes", "gathered_bytes", "bucket_bytes", "workspace_bytes")


def test_what_lives_at_the_peak_is_named_for_people():
    price = priced(Holding(weights(law)), num_micro_batches=2)
    peak = price.parts("peak_bytes")
    assert {name: peak[name] for name in peak if peak[name] > 9_999} == {
        "master copy": 10_000, "frozen parameters": 10_001, "gathered parameters": 10_003, "buckets": 10_003,
        "workspace": 10_004,
    }  # fmt: skip
    assert price.parts("gathered_bytes") == {"at most": 10_003}
    assert price.parts("bucket_bytes") == {"at most": 10_003}
    assert price.parts("workspace_bytes") == {"at most": 10_004}


def test_what_nobody_knows_of_one_operation_is_unknown_of_the_step():
    def of(tape, batch):
        x = laws.embedding(tape, batch, tape.weight("embedding", V, D))
        with tape.room(None):
            logits = laws.linear(tape, x, tape.weight("head", V, D))
        return laws.cross_entropy(tape, logits, batch)

    assert priced(of=of).unknown == {"workspace_bytes", "peak_bytes"}


def test_room_is_there_while_a_product_is_made_and_that_of_its_copy_until_it_is():
    tape = Tape(Workload(num_sequences=B, num_tokens=T))
    before = tape.live.total
    with tape.room(Room(during=100, result=30)):
        assert (tape.live.peak_total - before, tape.live.total - before) == (130, 30)
        made = tape.new((5,), "float32")
        assert tape.live.total - before == 50
    assert tape.live.total - before == 4 * made.size
    assert tape.live.most["workspace_bytes"] == 130


def frozen_first():
    """Two weights, of which one is trained, in two parts."""
    return [
        Weight("base", (V, D), "float32", "base", is_trained=False), Weight("own", (D, D), "float32", "own"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "each", "master", "updated"),
    [("fp32", 4, None, "float32"), ("bf16", 4, None, "float32"), ("bf16_master", 2, 4, "float32")],
)
def test_weights_stand_in_their_format_and_frozen_ones_apart(name, each, master, updated):
    strategy_law = StrategyLaw(frozen_first(), precision(name))
    Tape(Workload(num_sequences=B, num_tokens=T, precision_name=name), strategy_law)
    assert dict(strategy_law.counts) == {
        ("frozen_bytes", "base"): each * V * D, ("parameter_bytes", "own"): each * D * D,
    } | ({} if master is None else {("master_bytes", "own"): master * D * D})  # fmt: skip
    assert [(own.name, own.dtype) for own in strategy_law.updated()] == [("own", updated)]


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_state_of_weights_without_a_model(comes_back):
    strategy_law = StrategyLaw(frozen_first())
    uses = [(strategy_law.every[0], comes_back), (strategy_law.every[1], True)]
    price = price_state(uses, Workload(num_sequences=1, num_tokens=1), strategy_law)
    assert price.only(["parameters", "parameter_bytes", "frozen_bytes", "gradient_bytes"]) == Price({
        ("parameters", "own"): D * D, ("parameter_bytes", "own"): 4 * D * D, ("frozen_bytes", "base"): 4 * V * D,
        ("gradient_bytes", "own"): 4 * D * D,
    })  # fmt: skip
    told = Sending(frozen_first())
    price_state(uses, Workload(num_sequences=1, num_tokens=1), told)
    assert told.told[2:] == [("base", False), ("own", False), ("own", True)] + [("base", True)] * comes_back


# -- single operations whose formats or sizes torch leaves no choice of


def test_a_batch_of_plain_rows_has_places_that_are_made_with_it_and_one_table():
    tape = Tape(Workload(num_sequences=B, num_tokens=T))
    batch = laws.Batch(tape)
    assert (batch.num_bytes, tape.live.total, tape.counts["batch_bytes", "batch"]) == (BATCH, *[BATCH + PLACES] * 2)
    assert batch.bias("float32") is None
    cosines, sines = batch.rotary(6, 1e4)
    assert cosines.shape == sines.shape == (1, 1, T, 6)
    assert tape.live.total == BATCH + PLACES + 4 * 2 * T * 6
    assert batch.rotary(6, 1e4)[0] is cosines
    assert batch.rotary(6, 5e5)[0] is not cosines
    assert batch.tables("own", list) is batch.tables("own", list)


def test_a_batch_of_packed_rows_has_places_documents_tables_and_masks_of_each():
    tape = Tape(Workload(num_sequences=B, num_tokens=T, packed=True))
    batch = laws.Batch(tape)
    assert batch.num_bytes == tape.live.total == 2 * BATCH
    assert [own.shape for own in batch.rotary(6, 1e4)] == [(B, 1, T, 6)] * 2
    before = tape.live.total
    bias = batch.bias("bfloat16")
    assert (bias.shape, bias.dtype) == ((B, 1, T, T), "bfloat16")
    assert tape.live.total - before == (2 + 1) * B * T * T  # and a mask of booleans, which it is made from
    assert batch.bias("bfloat16") is bias
    assert batch.bias("float32").dtype == "float32"


@pytest.mark.parametrize(
    ("name", "on_cpu", "dtype"),
    [("fp32", True, "float32"), ("fp32", False, "float32"), ("bf16", True, "float32"), ("bf16", False, "bfloat16")],
)
def test_maps_are_unpooled_in_float32_under_autocast_on_a_cpu_alone(name, on_cpu, dtype):
    tape = Tape(Workload(num_sequences=B, num_tokens=24, image_size=(4, 6), precision_name=name, on_cpu=on_cpu))
    x = tape.new((B, 3, 4, 6), tape.precision.compute, tape.save((), (), partial(lambda gradient: ())))
    pooled, places = image_laws.max_pool(tape, x)
    assert (pooled.shape, places.shape, places.dtype) == ((B, 3, 2, 3), (B, 3, 2, 3), "int64")
    back = image_laws.max_unpool(tape, pooled, places, (5, 6))
    assert (back.shape, back.dtype) == ((B, 3, 5, 6), dtype)


def test_a_batch_of_images_has_a_label_for_every_pixel():
    tape = Tape(Workload(num_sequences=B, num_tokens=24, image_size=(4, 6)))
    batch = image_laws.Images(tape)
    assert (batch.images.shape, batch.labels.shape) == ((B, 3, 4, 6), (B, 4, 6))
    assert batch.num_bytes == tape.live.total == tape.counts["batch_bytes", "batch"] == B * 24 * (3 * 4 + 8)


@pytest.mark.parametrize(
    ("left", "right", "both"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
    ],
)
def test_a_sum_has_the_wider_format(left, right, both):
    assert laws.promote(left, right) == both


class Replacing(StrategyLaw):
    replaces_linear = True


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [
        # copies of both, and what is made; at last both gradients of one width, and one of them of the other
        ("float32", 2 * (32 * D + V * D), 4 * 32 * D + 2 * 32 * D + 2 * V * D),
        # copies of the weight alone
        ("bfloat16", 2 * V * D, 2 * 32 * D + 2 * V * D + 4 * V * D),
    ],
)
def test_a_replaced_linear_under_autocast_casts_what_is_not_in_the_format(dtype, forward, backward):
    """Of 32 rows, more than there are outputs: so a copy of the input would be seen."""
    tape = Tape(Workload(num_sequences=B, num_tokens=T, precision_name="bf16"), Replacing())
    weight = tape.weight("w", V, D)
    made = tape.save((), (), partial(lambda gradient: ()))
    x = tape.new((32, D), dtype, made)
    before = tape.live.peak_total = tape.live.total
    y = laws.linear(tape, x, weight)
    assert (y.shape, y.dtype) == ((32, V), "bfloat16")
    assert tape.live.peak_total - before == forward + 2 * y.size
    assert tape.live.total - before == 2 * y.size
    before = tape.live.peak_total = tape.live.total
    tape.backward(y)
    assert tape.live.peak_total - before == backward + 2 * y.size
