"""Text from every mixer through transformers' `generate`, and from models whose layers differ in theirs."""

import zlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmeff.core.config import validate
from llmeff.models.pretrained import CACHE, LlmeffForCausalLM
from llmeff.models.transformer import DecoderConfig
from tests.mixers import NAMES, fields

VOCABULARY, PAD, NUM_NEW = 61, 0, 6
MODELS = {name: {**fields(name, num_kv_heads=2), "num_layers": 2} for name in NAMES} | {
    own: {"pattern": own, "num_layers": 3, "num_kv_heads": 2}
    for own in ("gated-deltanet*2+softmax", "sliding+mamba2+performer", "kda+linear+retention")
}
every_model = pytest.mark.parametrize("own", MODELS.values(), ids=MODELS.keys())


def face(own):
    torch.manual_seed(0)
    base = {"vocab_size": VOCABULARY, "width": 32, "mlp_width": 48, "init_std": 0.3}
    decoder = validate(DecoderConfig, base | own).build().eval()
    return LlmeffForCausalLM.from_decoder(decoder, pad_token_id=PAD, max_position_embeddings=64)


def tokens(rows=2, length=9):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def generated(model, prompt, **options):
    given = {"max_new_tokens": NUM_NEW, "do_sample": False, "attention_mask": torch.ones_like(prompt)} | options
    return model.generate(prompt, pad_token_id=PAD, **given)[:, prompt.shape[1] :]


@every_model
@torch.no_grad()
def test_greedy_is_a_loop_over_argmax_with_every_way_to_prefill(own):
    model, row = face(own), tokens()
    for _ in range(NUM_NEW):
        row = torch.cat((row, model(row, use_cache=False).logits[:, -1:].argmax(-1)), dim=-1)
    for options in ({}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        assert torch.equal(generated(model, tokens(), **options), row[:, 9:]), options


@every_model
def test_beams_are_those_without_a_cache(own):
    model = face(own)
    found, expected = (generated(model, tokens(), num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(found, expected)


@every_model
def test_left_padded_rows_are_single_rows(own):
    model, mask = face(own), torch.ones(3, 9, dtype=torch.long)
    mask[0, :5] = mask[1, :1] = 0
    prompt = tokens(3).masked_fill(mask == 0, PAD)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 4}):
        together = generated(model, prompt, attention_mask=mask, **options)
        alone = [generated(model, row[real.bool()][None], **options) for row, real in zip(prompt, mask, strict=True)]
        assert torch.equal(together, torch.cat(alone)), options


@every_model
def test_samples_are_those_without_a_cache(own):
    model, found = face(own), []
    for use in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3, "use_cache": use}
        found.append(generated(model, tokens(), **options))
    assert torch.equal(*found)
    assert len({tuple(row.tolist()) for row in found[0]}) > 2


@every_model
def test_a_saved_model_loads_whole(own, tmp_path):
    model = face(own)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.unwrap() == model.config.unwrap()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert torch.equal(again.to_decoder()(tokens()), model(tokens(), use_cache=False).logits)


@every_model
def test_from_config_begins_as_the_decoder_does(own):
    config = face(own).config
    model, decoder = AutoModelForCausalLM.from_config(config).to_decoder(), config.unwrap().build()
    for (name, own), (other_name, other) in zip(model.state_dict().items(), decoder.state_dict().items(), strict=True):
        assert name == other_name
        assert own.mean().item() == pytest.approx(other.mean().item(), abs=4 * other.std().nan_to_num().item() + 1e-6)
        assert own.isfinite().all(), name
        assert bool((own == 1).all()) == bool((other == 1).all()), name


def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that follow from a tensor's name and size by arithmetic on integers, whatever generator torch has."""
    places = np.arange(tensor.numel(), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) | 1)
    mixed = places * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    even = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)  # -1 to 1, 24 bits: exact
    scale, middle = (0.5, 0.0) if tensor.dim() > 1 else (0.1, 1.0 if "norm" in name else 0.0)
    return torch.from_numpy(even * np.float32(scale) + np.float32(middle)).reshape(tensor.shape)


def counted_face(own):
    model = face(own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(counted(name, parameter))
    return model


class Drawn:
    """In place of torch.multinomial: by the inverse of the distribution, at places that are spread evenly."""

    def __init__(self):
        self.num = 0

    def __call__(self, probabilities, num_samples):
        rows = probabilities.shape[0]
        places = (torch.arange(self.num, self.num + rows * num_samples, dtype=torch.float64) + 1) * 0.6180339887498949
        self.num += rows * num_samples
        edges = probabilities.double().cumsum(-1)
        return torch.searchsorted(edges, (places % 1).reshape(rows, num_samples) * edges[:, -1:], right=True)


COUNTED = torch.tensor([[5, 17, 42, 3, 28, 9, 60, 31, 12], [11, 2, 50, 33, 7, 19, 44, 26, 1]])
WRITTEN = {
    "softmax": {
        "greedy": [[9, 47, 24, 24, 9, 9], [33, 19, 24, 24, 46, 58]],
        "beams": [[10, 24, 24, 24, 47, 24], [33, 19, 24, 24, 24, 46]],
        "samples": [[24, 47, 6, 24, 34, 50], [16, 24, 35, 48, 10, 32]],
    },
    "gated-deltanet*2+softmax": {
        "greedy": [[28, 34, 44, 39, 15, 20], [13, 16, 50, 43, 53, 7]],
        "beams": [[8, 43, 58, 40, 11, 42], [13, 16, 50, 30, 4, 38]],
        "samples": [[28, 47, 1, 10, 36, 43], [13, 27, 54, 60, 13, 27]],
    },
    "sliding+mamba2+retention": {
        "greedy": [[10, 24, 10, 48, 27, 14], [59, 10, 10, 37, 40, 31]],
        "beams": [[44, 10, 10, 48, 27, 31], [59, 10, 30, 40, 31, 47]],
        "samples": [[38, 50, 10, 27, 48, 49], [16, 24, 48, 52, 15, 35]],
    },
}
"""After `COUNTED`, by what mixes the layers and how tokens are chosen."""
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITTEN)
def test_the_text_is_this_whatever_is_installed(name, way, monkeypatch):
    model = counted_face(MODELS.get(name, {"pattern": name, "num_layers": 3, "num_kv_heads": 2}))
    caches = [{}, {"use_cache": False}, {"prefill_chunk_size": 4}]
    if name == "softmax":
        caches.append({"cache_implementation": "static", "disable_compile": True})
    for cached in caches:
        monkeypatch.setattr(torch, "multinomial", Drawn())
        assert generated(model, COUNTED, **WAYS[way], **cached).tolist() == WRITTEN[name][way], cached


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@every_model
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_is_taken_by_either_name(own, name):
    model, row = face(own), tokens()
    whole = model(row, use_cache=False).logits
    for network in (model, model.model):
        cache = model.make_cache()
        network(row[:, :6], **{name: cache})
        assert cache.get_seq_length() == 6
        after = network(row[:, 6:], **{name: cache})
        assert getattr(after, CACHE) is cache
    torch.testing.assert_close(model.lm_head(after[0]), whole[:, 6:], rtol=0, atol=1e-5)
    cache = model.make_cache()
    assert torch.equal(generated(model, row, **{name: cache}), generated(model, row))
    assert cache.get_seq_length() == 9 + NUM_NEW - 1


def test_nothing_that_a_call_hands_over_is_passed_over():
    model, row = face({}), tokens()
    cache = model.make_cache()
    for network in (model, model.model):
        for unknown in ("cache_params", "kv_cache", "cachee", "cu_seq_lens_q", "seq_idx"):
            with pytest.raises(TypeError, match=f"got {unknown}, which llmeff's models do not support"):
                network(row, **{unknown: cache})
        with pytest.raises(TypeError, match=r"cache and past_key_values, two names for the same argument"):
            network(row, cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match=f"Did you mean '{CACHE}'"):
        model(row, **{f"{CACHE}_": cache})
    assert torch.equal(model(row, cu_seq_lens_q=None, output_attentions=False).logits, model(row).logits)
