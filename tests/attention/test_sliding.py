"""Sliding windows against the formula written out over all pairs, and against transformers' Mistral."""

import itertools

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from llmeff.attention import Sliding
from llmeff.attention.mixer import MixerShape
from llmeff.attention.sliding import slide
from llmeff.core.config import ConfigError, validate
from llmeff.core.layout import Layout
from llmeff.models.pretrained import LlmeffForCausalLM
from llmeff.models.transformer import DecoderConfig
from tests.mixers import Kept

SHAPE = MixerShape(width=16, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
LENGTH, LEAST = 43, 4
REACHES = [
    Sliding(window=window, sinks=sinks, global_every=every)
    for window, sinks, every in [(1, 0, None), (5, 0, None), (6, 2, None), (5, 0, 7), (8, 3, 5), (3, 1, 4), (16, 2, 9)]
]
every_reach = pytest.mark.parametrize("config", REACHES, ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("llmeff.attention.sliding.LEAST_BLOCK", LEAST)
    torch.manual_seed(0)


def layouts():
    places = torch.arange(LENGTH)[None]
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, :9] = padding[1, :30] = False
    lengths = [(13, 1, 2, 27), (5, 38)]
    packed = {
        "positions": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]),
        "documents": torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]),
    }
    return {
        "plain": Layout.plain(LENGTH, places.device),
        "left padding": Layout(positions=(padding.cumsum(-1) - 1).clamp(min=0), padding=padding),
        "left padding, positions of the row": Layout(positions=places, padding=padding),
        "right padding": Layout(positions=places, padding=padding.flip(-1)),
        "packed": Layout(**packed),
        "packed with padding": Layout(**packed, padding=padding.flip(-1)),
    }


def written_out(config, layout):
    """(2, T, T): who sees whom, pair by pair."""
    sees = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if layout.padding is None else layout.padding
    documents = torch.zeros(2, LENGTH) if layout.documents is None else layout.documents
    for row in range(2):
        first = {}
        for t in range(LENGTH):
            if real[row, t]:
                first.setdefault(int(documents[row, t]), t)
        for query, key in itertools.product(range(LENGTH), repeat=2):
            place = key - first.get(int(documents[row, key]), 0)
            every = config.global_every
            far = place < config.sinks or (every is not None and (place + 1) % every == 0)
            near = query - key < config.window
            same = documents[row, query] == documents[row, key]
            sees[row, query, key] = same and key <= query and (near or far) and real[row, query] and real[row, key]
    return sees, real


def heads(dtype=torch.float64):
    return [torch.randn(2, num, LENGTH, 8, dtype=dtype, requires_grad=True) for num in (4, 2, 2)]


def dense(query, key, value, sees):
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.mT / 8**0.5).masked_fill(~(sees | ~sees.any(-1, keepdim=True))[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)


@every_reach
@pytest.mark.parametrize("name", layouts())
def test_blocks_are_the_formula_over_all_pairs(config, name):
    layout = layouts()[name]
    (sees, real), given = written_out(config, layout), heads()
    above = torch.randn(2, LENGTH, 32, dtype=torch.float64) * real[..., None]
    found, expected = slide(config, *given, layout), dense(*given, sees)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((y * above).sum(), given) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@every_reach
@pytest.mark.parametrize("least", [11, 32, 64])
def test_the_size_of_blocks_changes_nothing(config, least, monkeypatch):
    given = heads()
    found = [slide(config, *given, layout) for layout in layouts().values()]
    monkeypatch.setattr("llmeff.attention.sliding.LEAST_BLOCK", least)
    for layout, expected in zip(layouts().values(), found, strict=True):
        real = torch.ones(2, LENGTH, dtype=torch.bool) if layout.padding is None else layout.padding
        torch.testing.assert_close(slide(config, *given, layout)[real], expected[real], rtol=0, atol=1e-12)


@every_reach
@pytest.mark.parametrize(
    "sizes", [(LENGTH,), (1,) * LENGTH, (11, 1, 7, 24), (1, 42)], ids=["all", "each", "some", "rest"]
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_decoding_is_the_whole_and_keeps_only_what_is_still_seen(config, sizes, is_padded):
    mixer, x = config.build(SHAPE).double(), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    padding = layouts()["left padding"].padding if is_padded else torch.ones(2, LENGTH, dtype=torch.bool)
    whole = mixer(x, Layout(positions=torch.arange(LENGTH)[None], padding=padding))
    cache, past = Kept(), 0
    for piece in x.split(sizes, dim=1):
        start, past = past, past + piece.shape[1]
        known = padding[:, :past] if is_padded else None
        found = mixer(piece, Layout(positions=torch.arange(start, past)[None], padding=known, past=start), cache)
        real = padding[:, start:past]
        torch.testing.assert_close(found[real], whole[:, start:past][real], rtol=0, atol=1e-12)
        assert config.cache_bytes(SHAPE, past, 8) * 2 == sum(x.nbytes for x in cache.states.values())
        if not is_padded:  # else places of rows differ
            assert sorted(cache.states["places"][0, :, 0].tolist()) == seen_after(config, past)


def seen_after(config, past):
    """The places that a token at place `past` sees."""
    every = config.global_every or past + 2
    return [p for p in range(past) if past - p < config.window or p < config.sinks or (p + 1) % every == 0]


def test_the_cache_stops_growing():
    config = Sliding(window=32, sinks=4)
    sizes = [config.cache_bytes(SHAPE, num_tokens, 4) for num_tokens in (10, 35, 36, 100, 10_000)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] == sizes[4] == (31 + 4) * (2 * 2 * 8 * 4 + 8)


def test_rows_of_a_cache_are_reordered_like_any():
    config = Sliding(window=5, sinks=2)
    mixer, x = config.build(SHAPE), torch.randn(2, 12, 16)
    cache = Kept()
    mixer(x[:, :11], Layout.plain(11, x.device), cache)
    cache.states = {name: state[[1, 0]] for name, state in cache.states.items()}
    swapped = mixer(x[[1, 0], 11:], Layout.plain(1, x.device, past=11), cache)
    torch.testing.assert_close(swapped, mixer(x, Layout.plain(12, x.device))[[1, 0], 11:])


def largest_and_all(length):
    """Bytes of the largest array that is kept for backward, and of all."""
    given = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mixed = slide(Sliding(window=16, sinks=2), *given, Layout.plain(length, given[0].device))
    assert mixed.requires_grad
    return max(kept.values()), sum(kept.values())


def test_no_array_is_as_large_as_all_pairs():
    (_, smaller), (largest, all_kept) = largest_and_all(256), largest_and_all(512)
    assert largest < 4 * 512**2 / 4
    assert all_kept / smaller == pytest.approx(2, rel=0.02)


# Mistral


def mistral(window=6):
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=window, max_position_embeddings=64, pad_token_id=0,
        rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = MistralForCausalLM(config).eval()
    plain = DecoderConfig(
        vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, tied_embeddings=False,
        mixer=Sliding(window=window),
    )  # fmt: skip
    decoder = plain.build()
    decoder.load_state_dict({name.removeprefix("model."): x for name, x in theirs.state_dict().items()})
    return LlmeffForCausalLM.from_decoder(decoder, pad_token_id=0).eval(), theirs


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


def test_it_is_mistral():
    ours, theirs = mistral()
    given = tokens(2, 40)
    found, expected = (model(given, labels=given, use_cache=False) for model in (ours, theirs))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    found.loss.backward()
    expected.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"use_cache": False}])
def test_it_writes_what_mistral_writes(beams, options):
    ours, theirs = mistral()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :7] = mask[1, :2] = 0
    prompt = tokens(3, 9).masked_fill(mask == 0, 0)
    common = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    assert torch.equal(ours.generate(prompt, **common, **options), theirs.generate(prompt, **common))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": 0}, r"mixer.window: .* greater than or equal to 1 \(given: 0\)"),
        ({"window": 4, "sinks": 5}, "sinks is 5, which is more than the window of 4 tokens"),
        ({"sinks": -1}, "mixer.sinks: .* greater than or equal to 0"),
        ({"global_every": 1}, "global_every is 1, .* Use the mixer 'softmax' instead"),
        ({"windw": 4}, "Did you mean 'window'"),
    ],
)
def test_settings_that_make_no_sense(fields, said):
    with pytest.raises(ConfigError, match=said):
        validate(DecoderConfig, {"mixer": {"name": "sliding", **fields}})


def test_torch_compile_takes_it_whole():
    mixer = Sliding(window=6, sinks=2, global_every=5)
    model = DecoderConfig(vocab_size=61, width=32, num_layers=2, mlp_width=48, mixer=mixer).build()
    model.recompute = True
    given = tokens(2, 29)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (compiled, model):
        layout = Layout(positions=torch.arange(29)[None] % 17, documents=(torch.arange(29)[None] // 17).expand(2, -1))
        run(given, layout, given).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
