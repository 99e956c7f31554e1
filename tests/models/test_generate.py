"""Text from every mixer through transformers' `generate`, and from models whose layers differ in theirs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmeff.core.config import validate
from llmeff.models.pretrained import LlmeffForCausalLM
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
