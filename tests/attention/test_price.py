"""The laws of mixers and norms: by hand, and array by array beside what torch's allocator tells."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llmeff.attention import GLA, Latent, Mamba2, MixerConfig, Performer, Retention, Sliding, Softmax, norm
from llmeff.attention.mixer import MixerShape
from llmeff.attention.scan import ScanConfig
from llmeff.core.cpu import instruction_set
from llmeff.core.dist import silence_profiler
from llmeff.core.layout import Layout
from llmeff.core.meters import saved_bytes
from llmeff.cost import laws
from llmeff.cost.arrays import Node
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from tests.mixers import NAMES, config, every_mixer, grouped
from tests.prices import own_products

B, T, D, N, K, H = 2, 8, 12, 4, 2, 6
SHAPE = MixerShape(width=D, num_heads=N, num_kv_heads=K, head_dim=H, rope_theta=1e4, norm_eps=1e-5)


def play(mixer, shape=SHAPE, **workload):
    tape = Tape(Workload(num_sequences=B, num_tokens=T, **workload))
    batch = laws.Batch(tape)
    x = laws.embedding(tape, batch, tape.weight("embedding", 10, D))
    with tape.within("mixer", "attention"):
        mixer.law(shape, tape, x, batch)
    tape.end_forward()
    return tape


def test_softmax_keeps_its_input_the_heads_a_number_a_head_and_the_rotary_tables():
    kept = play(Softmax()).counts["saved_bytes", "attention"]
    assert kept == 4 * B * T * (D + 2 * N * H + 2 * K * H + N) + 4 * 2 * T * H


def test_the_norms_of_queries_and_keys_keep_what_they_normalize():
    more = play(Softmax(qk_norm=True)).counts["saved_bytes", "attention"]
    assert more - play(Softmax()).counts["saved_bytes", "attention"] == 4 * B * T * (N + K) * (H + 1)


def test_packed_documents_have_a_mask_and_tables_a_row():
    plain, packed = play(Softmax()).counts, play(Softmax(), packed=True).counts
    more = packed["saved_bytes", "attention"] - plain["saved_bytes", "attention"]
    assert more == 4 * (B * T * T + 2 * (B - 1) * T * H)


def test_softmax_flops():
    products = 2 * B * T * D * H * (2 * N + 2 * K)
    pairs = T * (T + 1) // 2
    assert play(Softmax()).counts["model_flops", "attention"] == 3 * (products + 4 * B * N * H * pairs)


def test_a_window_asks_for_its_pairs_alone():
    products = 2 * B * T * D * H * (2 * N + 2 * K)
    # a token sees 3 with itself, and sink 0 and global token 3 once they are farther back
    pairs = 1 + 2 + 3 + 4 + 4 + 4 + 5 + 5
    asked = play(Sliding(window=3, sinks=1, global_every=4)).counts["model_flops", "attention"]
    assert asked == 3 * (products + 4 * B * N * H * pairs)


def test_latent_attention_flops_and_what_it_keeps():
    latent, rotary = 10, 4
    played = play(Latent(latent=latent, rotary=rotary))
    products = 2 * B * T * (D * N * (H + rotary) + D * (latent + rotary) + 2 * latent * N * H + N * H * D)
    pairs = T * (T + 1) // 2
    assert played.counts["model_flops", "attention"] == 3 * (products + 2 * B * N * pairs * (2 * H + rotary))
    numbers = D + (latent + 1) + latent + 4 * N * (H + rotary) + N + N * H
    assert played.counts["saved_bytes", "attention"] == 4 * (B * T * numbers + 2 * T * rotary)


def test_norm_keeps_its_input_and_a_number_a_row():
    tape = Tape(Workload(num_sequences=B, num_tokens=T))
    x = laws.embedding(tape, laws.Batch(tape), tape.weight("embedding", 10, D))
    with tape.within("norm", "norms"):
        norm.law(tape, x)
    tape.end_forward()
    assert tape.counts["saved_bytes", "norms"] == 4 * B * T * (D + 1)


@every_mixer
def test_every_mixer_states_its_parameters(name):
    own, shape = config(name), grouped(name, SHAPE)
    tape = play(own, shape)
    declared = {n.removeprefix("mixer."): w.shape for n, w in tape.weights.items() if n.startswith("mixer.")}
    assert declared == {n: tuple(p.shape) for n, p in own.build(shape).named_parameters()}


def test_the_widths_that_auto_stands_for():
    shape = replace(SHAPE, num_heads=4, num_kv_heads=2, head_dim=64)
    assert (GLA().width(shape), GLA(key_width=5).width(shape)) == (32, 5)
    assert (Retention().width(shape), Retention(value_width=5).width(shape)) == (128, 5)
    assert [Performer().width(head_dim) for head_dim in (2, 6, 64)] == [2, 11, 267]  # H ln H is 1.4, 10.8 and 266.2
    assert Performer(num_features=5).width(64) == 5
    assert Latent().widths(shape) == (256, 32)
    assert Latent().widths(SHAPE) == (24, 4)
    assert Latent(latent=7, rotary=2).widths(shape) == (7, 2)
    assert (Mamba2().num_heads(shape), Mamba2(expand=3).num_heads(shape)) == (8, 12)
    assert Mamba2(state_width=5).channels(shape) == 8 * 64 + 2 * 2 * 5


# Array by array


@pytest.fixture
def one_thread():
    """As many as a workload has, each with room of its own in attention."""
    before = torch.get_num_threads()
    torch.set_num_threads(Workload(num_sequences=1, num_tokens=1).num_threads)
    yield
    torch.set_num_threads(before)


class Arrays:
    """Bytes of a forward and backward pass of a mixer alone: the most at once, those of each array, and what backward keeps."""

    def __init__(self, changes, made, saved):
        self.peak, self.made, self.saved = max(accumulate(changes)), Counter(made), saved


def of_law(own, shape, work):
    """By its law; the most at once is None where a workspace of convolutions is unknown."""
    tape, changes, made = Tape(work), [], []
    batch = laws.Batch(tape)
    x = tape.new((work.num_sequences, work.num_tokens, shape.width), "float32", Node())
    change = tape.live.change

    def noted(label, num_bytes):
        change(label, num_bytes)
        changes.append(num_bytes)
        # what is kept was made before, and a single number (the loss below) is no array of the mixer
        if num_bytes > 4 and label[0] == "temporaries":
            made.append(num_bytes)

    tape.live.change = noted
    with tape.within("mixer", "attention"):
        out = own.law(shape, tape, x, batch)
    above = tape.new(out.shape, out.dtype)  # whoever calls backward holds it
    loss = tape.new((), "float32", tape.save((out,), (), lambda _: (above,)))
    tape.end_forward()
    tape.backward(loss)
    tape.live.change = change
    found = Arrays(changes, made, tape.counts["saved_bytes", "attention"])
    if "peak_bytes" in tape.unknown:
        found.peak = None
    return found


def of_torch(own, shape, work):
    """As torch's allocator tells the profiler."""
    mixer = own.build(shape)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    places = torch.arange(work.num_tokens).repeat(work.num_sequences, 1)
    half, layout = work.num_tokens // 2, Layout.plain(work.num_tokens, places.device)
    if work.packed:
        layout = Layout(positions=places % half, documents=places // half)
    # no leaf: of one, autocast would keep its copy
    x = torch.randn(work.num_sequences, work.num_tokens, shape.width, requires_grad=True).clone()

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=work.precision.autocast):
            return mixer(x, layout)

    silence_profiler()
    with own_products(work.precision_name), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = run()
        out.backward(torch.ones_like(out))
    found = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [own for own in (*mixer.buffers(), layout.positions, layout.documents) if own is not None]
    return Arrays(found, [num_bytes for num_bytes in found if num_bytes > 0], saved_bytes(run, held))


FEW_BYTES = 160
"""Single numbers, and the room of a kernel, of which no law speaks."""
MASKS = 0.002
"""The part of the most at once that masks of documents, and of segments, may be on their way."""
ONE_HEAD = replace(SHAPE, num_heads=1, num_kv_heads=1)
WIDE = replace(SHAPE, num_heads=2, num_kv_heads=2, head_dim=96)
FORMS = {
    "two chunks": (SHAPE, {"num_sequences": 2, "num_tokens": 83}, 0.0),
    "a row of chunks": (SHAPE, {"num_sequences": 1, "num_tokens": 128}, 0.0),
    "autocast": (SHAPE, {"num_sequences": 2, "num_tokens": 110, "precision_name": "bf16"}, 0.0),
    "documents": (SHAPE, {"num_sequences": 2, "num_tokens": 66, "packed": True}, MASKS),
    "segments": (SHAPE, {"num_sequences": 1, "num_tokens": 1100}, MASKS),
    "one head": (ONE_HEAD, {"num_sequences": 1, "num_tokens": 128}, 0.0),
    "wide heads": (WIDE, {"num_sequences": 1, "num_tokens": 83}, 0.0),
}
"""Widths, a step, and by which part of it the most at once may be off."""
SCANS = [name for name in NAMES if issubclass(MixerConfig.registry[name], ScanConfig)]
SETTINGS = [
    Latent(),
    Latent(query_latent=9, rotary=2),
    Performer(num_features=5),
    Retention(value_width=5),
    Retention(value_width=90),
    Sliding(window=90),
    Sliding(window=5, sinks=2, qk_norm=True),
    Sliding(window=20, sinks=3, global_every=9),
    Softmax(qk_norm=True),
]


def assert_arrays(own, shape, workload, within=0.0):
    """As much is kept for backward, the most at once is as large, but for few bytes, and torch makes every array of the law."""
    work = Workload(instruction_set=instruction_set(), **workload)
    law, real = of_law(own, shape, work), of_torch(own, shape, work)
    assert law.saved == real.saved
    if law.peak is not None:
        assert law.peak == pytest.approx(real.peak, abs=FEW_BYTES, rel=within)
    # gradients of parts of an array, which autograd may put straight into that of the whole
    unlike = {"mla": 3, "sliding": 1}.get(own.name, int(work.precision.autocast and hasattr(own, "conv")))
    assert (law.made - real.made).total() <= unlike


FEW = {
    "segments": ["gated-deltanet", "kda", "linear"],  # what they are for others is known by one segment
    "wide heads": SCANS,
    "one head": SCANS,
}
"""For which mixers some forms are tried: those with a scan."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "form"), [(name, form) for form in FORMS for name in FEW.get(form, NAMES)])
def test_a_law_makes_the_arrays_that_torch_makes(name, form):
    shape, workload, within = FORMS[form]
    assert_arrays(config(name), grouped(name, shape) if shape is SHAPE else shape, workload, within)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_tokens", [25, 40, 90])
@pytest.mark.parametrize("own", SETTINGS, ids=str)
def test_so_do_laws_of_other_settings(own, num_tokens):
    shape = replace(SHAPE, num_kv_heads=N) if own.problems(SHAPE) else SHAPE
    assert_arrays(own, shape, {"num_sequences": 2, "num_tokens": num_tokens})
