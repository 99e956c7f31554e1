"""Our attention in transformers' models, against their own eager attention with the mask written out in four dimensions."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import and_masks, eager_mask
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward as gpt2_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager

from llmeff.attention import GatedDelta, Linear, Performer, Sliding, Softmax
from llmeff.core.config import ConfigError
from llmeff.models import interface
from llmeff.models.pretrained import CACHE

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "head_dim": 8,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {"Llama": SIZES, "Qwen2": SIZES, "Qwen3": SIZES, "GPT2": GPT2}
REACHES = [Sliding(window=5), Sliding(window=4, sinks=2, global_every=6)]
KERNELS = [Linear(), Performer(num_features=24)]
MIXERS = [Softmax(), *REACHES, *KERNELS]
every_model = pytest.mark.parametrize("name", MODELS)
every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("llmeff.attention.sliding.LEAST_BLOCK", 4)
    torch.manual_seed(0)


def build(name, **fields):
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**MODELS.get(name, SIZES) | fields)
    model = getattr(transformers, f"{name}{head}")._from_config(config, attn_implementation="eager")
    return model.eval()


def written_out(mixer):
    """A mask function of transformers that makes the whole mask of a mixer."""

    def make(attention_mask=None, mask_function=None, **kwargs):
        def sees(row, head, query, key):
            if not isinstance(mixer, Sliding):
                return key >= 0
            place = key if attention_mask is None else key - (~attention_mask).sum(-1)[row]
            far = place < mixer.sinks
            if mixer.global_every is not None:
                far = far | ((place + 1) % mixer.global_every == 0)
            return (query - key < mixer.window) | far

        return eager_mask(attention_mask=attention_mask, mask_function=and_masks(mask_function, sees), **kwargs)

    return make


def of_features(mixer):
    """Attention by all pairs of features, in float64, with a mask of four dimensions."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        query, key = query.double(), key.double()
        if isinstance(mixer, Linear):
            query, key = F.elu(query) + 1, F.elu(key) + 1
        else:
            scale, directions = query.shape[-1] ** -0.25, interface._directions_of(module, query).double()
            query, key = (
                torch.exp(x @ directions.mT - x.square().sum(-1, keepdim=True) / 2)
                for x in (query * scale, key * scale)
            )
        weights = (query @ key.mT) * (attention_mask == 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return (weights @ value.double()).to(value.dtype).transpose(1, 2), None

    return attend


def pair(name, mixer):
    """The model with our attention, and the same with transformers' own."""
    theirs = build(name)
    ours = build(name)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):  # of theirs the settings stay
        interface.use(model, mixer)
    eager = gpt2_eager if name == "GPT2" else llama_eager
    AttentionInterface.register("written_out", of_features(mixer) if mixer in KERNELS else eager)
    AttentionMaskInterface.register("written_out", written_out(mixer))
    theirs.set_attn_implementation("written_out")
    return ours, theirs


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


def padded(rows=3, length=19):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :12] = mask[1, :3] = 0
    return tokens(rows, length).masked_fill(mask == 0, 0), mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@every_model
@every_mixer
@pytest.mark.parametrize("is_padded", [False, True])
def test_logits_and_gradients_are_those_of_eager_attention(name, mixer, is_padded):
    given, mask = padded()
    real = {"attention_mask": mask, "position_ids": positions(mask)} if is_padded else {}
    counted = mask.bool() if is_padded else torch.ones_like(mask).bool()
    grads = []
    for model in pair(name, mixer):
        logits = model(given, **real, use_cache=False).logits[counted]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        (logits * weights).sum().backward()
        grads.append({"logits": logits, **{key: p.grad for key, p in model.named_parameters()}})
    for key, expected in grads[1].items():
        assert (grads[0][key] - expected).norm() <= 1e-5 * expected.norm().clamp(min=1), key


@every_model
@every_mixer
@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_with_a_cache_is_that_of_eager_attention(name, mixer, beams):
    prompt, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    ours, theirs = (model.generate(prompt, **options) for model in pair(name, mixer))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 5}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("mixer", [REACHES[1], *KERNELS], ids=str)
def test_other_ways_of_caching_write_the_same(options, mixer):
    prompt, mask = padded()
    model, _ = pair("Llama", mixer)
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt, **common, **options), model.generate(prompt, **common))


@pytest.mark.parametrize("mixer", [REACHES[1], *KERNELS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_are_float32_under_autocast(mixer, dtype):
    """In pieces as in one."""
    given, (model, _) = tokens(2, 19), pair("Llama", mixer)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        whole, cache, pieces = model(given, use_cache=False).logits, None, []
        for part in given.split((7, 6, 1, 5), dim=1):
            out = model(part, use_cache=True, **{CACHE: cache})
            cache, pieces = getattr(out, CACHE), [*pieces, out.logits]
    found = torch.cat(pieces, dim=1)
    assert found.dtype == whole.dtype == dtype
    assert (found - whole).float().norm() <= 0.02 * whole.float().norm()


@pytest.mark.parametrize("padding", [0, 3])
def test_long_keys_are_there_in_pieces_too(padding):
    """Beside those of the last tokens, which are short, their features would be 0."""
    layer = torch.nn.Module()
    layer.config = transformers.LlamaConfig(llmeff_performer={"num_features": 24})
    query, key, value = 0.1 * torch.randn(2, 4, 19, 8), torch.randn(2, 2, 19, 8), torch.randn(2, 2, 19, 8)
    key[:, :, :16] = 60 * F.normalize(1 + 0.02 * key[:, :, :16], dim=-1)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :padding] = 0
    whole, _ = interface._performer(layer, query, key, value, mask)
    piece, _ = interface._performer(layer, query[:, :, 13:], key, value, mask.clone())
    assert whole[:, 13:].norm(dim=-1).min() > 0.1
    torch.testing.assert_close(piece, whole[:, 13:], rtol=1e-4, atol=1e-4)


@every_mixer
def test_documents_that_positions_tell_apart_do_not_see_one_another(mixer):
    ours, _ = pair("Llama", mixer)
    given, lengths = tokens(2, 23), (9, 1, 13)
    places = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    alone = torch.cat([ours(part, use_cache=False).logits for part in given.split(lengths, dim=1)], dim=1)
    packed = ours(given, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_the_window_of_mistral_is_taken_from_its_config():
    theirs = build("Mistral", sliding_window=5)
    ours = build("Mistral", sliding_window=5)
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation("llmeff_sliding")
    prompt, mask = padded()
    found, expected = (m(prompt, attention_mask=mask, use_cache=False).logits for m in (ours, theirs))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


def test_layers_of_qwen_that_do_not_slide_see_all():
    fields = {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    }  # fmt: skip
    theirs, ours = build("Qwen2", **fields), build("Qwen2", **fields)
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation("llmeff_sliding")
    given = tokens(2, 19)
    torch.testing.assert_close(ours(given).logits, theirs(given).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(*(m.generate(given, max_new_tokens=9, do_sample=False) for m in (ours, theirs)))


@pytest.mark.parametrize("mixer", [REACHES[1], KERNELS[1]], ids=str)
def test_settings_are_saved_with_the_model(tmp_path, mixer):
    model, _ = pair("Llama", mixer)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=f"llmeff_{mixer.name}")
    given = tokens(2, 19)
    assert torch.equal(again(given).logits, model(given).logits)


def test_performer_estimates_what_the_model_attends_by():
    """The more features, the nearer; each layer has directions of its own."""
    theirs, errors = build("Llama", initializer_range=0.05), {}
    given = tokens(2, 40)
    for num_features in (16, 4096):
        ours = build("Llama", initializer_range=0.05)
        ours.load_state_dict(theirs.state_dict())
        interface.use(ours, Performer(num_features=num_features))
        with torch.no_grad():
            errors[num_features] = float((ours(given).logits - theirs(given).logits).norm())
    assert errors[4096] < 0.2 * errors[16]
    first, second = (interface._directions_of(layer.self_attn, torch.empty(1, 8)) for layer in ours.model.layers)
    assert first.shape == (4096, 8)
    assert not torch.equal(first, second)


def test_directions_are_those_of_the_mixer_that_was_given_last():
    given, model = tokens(2, 19), build("Llama")
    interface.use(model, Performer(num_features=16))
    first = model(given).logits
    interface.use(model, Performer(num_features=64))
    assert interface._directions_of(model.model.layers[0].self_attn, torch.empty(1, 8)).shape == (64, 8)
    assert not torch.allclose(model(given).logits, first, atol=1e-3)


def test_directions_are_drawn_from_nobody_elses_numbers():
    """And serve a step that comes after what was seen in inference mode."""
    given, model = tokens(2, 19), build("Llama")
    interface.use(model, Performer(num_features=16))
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = model(given).logits
    assert torch.equal(torch.get_rng_state(), state)
    logits = model(given).logits
    logits.square().sum().backward()
    assert torch.equal(logits, first)


@pytest.mark.parametrize("mixer", KERNELS, ids=str)
def test_a_window_is_not_forgotten(mixer):
    model = build("Mistral", sliding_window=5)
    interface.use(model, mixer)
    with pytest.raises(ConfigError, match=f"sliding_window is 5, but llmeff_{mixer.name} sees all tokens"):
        model(tokens(1, 3))


def test_layers_share_their_tables(monkeypatch):
    made = []
    make = interface._layout
    monkeypatch.setattr(interface, "_layout", lambda *args: made.append(args[1]) or make(*args))
    before = len(interface._layouts)
    model, _ = pair("Llama", REACHES[1])
    for places in (torch.arange(19), torch.arange(19) % 7):
        model(tokens(2, 19), position_ids=places[None], use_cache=False)
    assert len(made) == 2
    assert len(interface._layouts) == before


# What cannot be


def test_a_model_without_a_window_is_an_error():
    model = build("Llama")
    model.set_attn_implementation("llmeff_sliding")
    with pytest.raises(ConfigError, match="LlamaConfig has neither sliding_window nor llmeff_sliding"):
        model(tokens(1, 3))


@pytest.mark.parametrize(
    ("fields", "said"), [({"window": 0}, r"window: .* \(given: 0\)"), ({"windw": 3}, "Did you mean 'window'")]
)
def test_a_wrong_window_is_an_error(fields, said):
    model = build("Llama")
    model.config.llmeff_sliding = fields
    model.set_attn_implementation("llmeff_sliding")
    with pytest.raises(ConfigError, match=said):
        model(tokens(1, 3))


def test_two_windows_are_an_error():
    with pytest.raises(ConfigError, match="its own sliding_window, 5"):
        interface.use(build("Mistral", sliding_window=5), Sliding(window=4))
    model = build("Mistral", sliding_window=5)
    interface.use(model, Softmax())
    with pytest.raises(ConfigError, match="sliding_window is 5, but llmeff_softmax sees all tokens"):
        model(tokens(1, 3))


@pytest.mark.parametrize(
    "mixer", [GatedDelta(), Softmax(qk_norm=True), Sliding(window=4, kernel="flex"), Linear(kernel="fla")], ids=str
)
def test_a_mixer_that_is_more_than_attention_is_an_error(mixer):
    with pytest.raises(ConfigError, match=r"supports Softmax\(\), Sliding"):
        interface.use(build("Llama"), mixer)


def test_a_model_without_the_interface_is_an_error():
    bloom = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    mamba = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    for kind, fields in (("Bloom", bloom), ("Mamba", mamba)):
        with pytest.raises(ConfigError, match=f"{kind}ForCausalLM does not use transformers' AttentionInterface"):
            interface.use(getattr(transformers, f"{kind}ForCausalLM")(fields), Softmax())


def test_dropout_is_an_error():
    model = build("Llama", attention_dropout=0.1).train()
    interface.use(model, Softmax())
    with pytest.raises(ConfigError, match=r"has an attention dropout of 0\.1"):
        model(tokens(1, 3))


def test_a_model_that_looks_ahead_is_an_error():
    model = build("Llama")
    model.config.is_causal = False
    interface.use(model, Softmax())
    with pytest.raises(ConfigError, match="see later tokens"):
        model(tokens(1, 3))


def test_a_mask_of_four_dimensions_is_an_error():
    model = build("Llama")
    interface.use(model, Softmax())
    with pytest.raises(ConfigError, match=r"one of shape \(1, 1, 3, 3\)"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("mixer", [Softmax(), Linear()], ids=str)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_cache": True}, "position_ids describes several documents in one row"),
        (
            {"use_cache": False, "attention_mask": torch.ones(2, 10, dtype=torch.long)},
            "position_ids describes several documents in one row",
        ),
        (
            {"use_cache": True, "position_ids": None, "cu_seq_lens_q": torch.tensor([0, 4, 10])},
            "cu_seq_lens_q describes several documents in one row",
        ),
    ],
)
def test_documents_that_the_mask_does_not_keep_apart_are_an_error(mixer, more, said):
    model = build("Llama")
    interface.use(model, mixer)
    places = torch.cat((torch.arange(4), torch.arange(6)))[None].expand(2, -1)
    with pytest.raises(ConfigError, match=said):
        model(tokens(2, 10), **{"position_ids": places} | more)


def test_one_document_with_its_borders_is_no_packing():
    model, given = build("Llama"), tokens(1, 10)
    interface.use(model, Softmax())
    found = model(given, position_ids=torch.arange(10)[None], cu_seq_lens_q=torch.tensor([0, 10]), use_cache=False)
    assert torch.equal(found.logits, model(given).logits)


def test_other_scores_than_those_of_products_are_an_error():
    fields = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": ["full_attention"] * 2}
    model = build("Gemma2", **fields)
    interface.use(model, Softmax())
    with pytest.raises(ConfigError, match="uses softcap"):
        model(tokens(1, 3))
