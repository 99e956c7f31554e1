"""The laws of mixers and norms, by hand."""

from llmeff.attention import Latent, Sliding, Softmax, norm
from llmeff.attention.mixer import MixerShape
from llmeff.cost import laws
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from tests.mixers import config, every_mixer, grouped

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
