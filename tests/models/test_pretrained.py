"""The Hugging Face face: what transformers, its `generate`, and PEFT do with a decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llmeff.core.config import ConfigError, validate
from llmeff.models import llama_format
from llmeff.models.pretrained import CACHE, LlmeffConfig, LlmeffForCausalLM
from llmeff.models.transformer import Decoder, DecoderConfig

VOCABULARY, PAD = 61, 0
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa untied": {"num_kv_heads": 2, "tied_embeddings": False},
    "mqa": {"num_kv_heads": 1},
    "qk_norm": {"mixer": {"name": "softmax", "qk_norm": True}},
    "pruned": {
        "num_layers": 3,
        "layers": [{"has_mixer": False}, {"num_heads": 2, "num_kv_heads": 1}, {"has_mlp": False, "mlp_width": 8}],
    },
}
every_shape = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
stock_shapes = pytest.mark.parametrize(
    "fields", [fields for name, fields in SHAPES.items() if name != "pruned"], ids=[n for n in SHAPES if n != "pruned"]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**fields: Any) -> Decoder:
    base = {"vocab_size": VOCABULARY, "width": 32, "num_layers": 2, "mlp_width": 48, "init_std": 0.3}
    return validate(DecoderConfig, base | fields).build().eval()


def face(**fields: Any) -> LlmeffForCausalLM:
    return LlmeffForCausalLM.from_decoder(build(**fields), pad_token_id=PAD, max_position_embeddings=64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape or (2, 9), generator=torch.Generator().manual_seed(1))


def stock(model: LlmeffForCausalLM, folder: Path) -> transformers.PreTrainedModel:
    llama_format.save(model.to_decoder(), folder, max_position_embeddings=64, pad_token_id=PAD)
    return AutoModelForCausalLM.from_pretrained(folder)


def left_padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :5] = mask[1, :1] = 0
    return tokens(3, 9).masked_fill(mask == 0, PAD), mask


def generated(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    defaults = {
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": PAD,
        "attention_mask": torch.ones_like(prompt),
    }
    return model.generate(prompt, **(defaults | options))[:, prompt.shape[1] :]


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# The forward pass


@every_shape
def test_both_faces_are_one_model(fields: dict[str, Any]) -> None:
    decoder = build(**fields)
    model = LlmeffForCausalLM.from_decoder(decoder)
    assert torch.equal(model(tokens()).logits, decoder(tokens()))
    assert {id(p) for p in model.parameters()} == {id(p) for p in decoder.parameters()}
    back = model.to_decoder()
    assert {id(p) for p in back.parameters()} == {id(p) for p in decoder.parameters()}
    assert torch.equal(back(tokens()), decoder(tokens()))


@stock_shapes
def test_logits_equal_transformers_llama_with_cache_and_padding(fields: dict[str, Any], tmp_path: Path) -> None:
    model = face(**fields)
    theirs = stock(model, tmp_path)
    equal(model(tokens()).logits, theirs(tokens()).logits)
    prompt, mask = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, expected = (m(prompt, attention_mask=mask, position_ids=positions) for m in (model, theirs))
    equal(ours.logits[mask.bool()], expected.logits[mask.bool()])
    step, mask = tokens(3, 2), torch.cat((mask, torch.ones(3, 2, dtype=torch.long)), dim=-1)
    positions = positions[:, -1:] + torch.tensor([[1, 2]])
    found, wanted = (
        m(step, attention_mask=mask, position_ids=positions, **{CACHE: getattr(before, CACHE)})
        for m, before in ((model, ours), (theirs, expected))
    )
    equal(found.logits, wanted.logits)


@every_shape
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 7), (8, 1)])
def test_cached_pieces_are_the_whole(fields: dict[str, Any], sizes: tuple[int, ...]) -> None:
    model, cache, pieces = face(**fields), None, []
    for piece in tokens().split(sizes, dim=1):
        output = model(piece, use_cache=True, **{CACHE: cache})
        cache = getattr(output, CACHE)
        pieces.append(output.logits)
    equal(torch.cat(pieces, dim=1), model(tokens(), use_cache=False).logits)


@every_shape
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("start", [0, 20])
def test_positions_that_begin_anew_separate_documents(fields: dict[str, Any], use_cache: bool, start: int) -> None:
    """Wherever they begin."""
    model, lengths = face(**fields), (4, 1, 4)
    positions = torch.cat([torch.arange(length) + start * place for place, length in enumerate(lengths)])[None]
    alone = torch.cat([model(part).logits for part in tokens().split(lengths, dim=1)], dim=1)
    equal(model(tokens(), position_ids=positions.expand(2, -1), use_cache=use_cache).logits, alone)


def test_embeddings_in_place_of_tokens() -> None:
    model = face()
    equal(model(inputs_embeds=model.get_input_embeddings()(tokens())).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize(
    ("kept", "expected"), [(0, slice(None)), (1, [8]), (3, [6, 7, 8]), (torch.tensor([2, 5]), [2, 5])]
)
def test_logits_to_keep(kept: Any, expected: Any) -> None:
    model = face()
    equal(model(tokens(), logits_to_keep=kept).logits, model(tokens()).logits[:, expected])


@stock_shapes
def test_labels_give_the_loss_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    model = face(**fields)
    labels = tokens().clone()
    labels[0, :4] = -100
    theirs = stock(model, tmp_path)
    equal(model(tokens(), labels=labels).loss, theirs(tokens(), labels=labels).loss)
    counted = torch.tensor(100)
    equal(
        model(tokens(), labels=labels, num_items_in_batch=counted).loss,
        theirs(tokens(), labels=labels, num_items_in_batch=counted).loss,
    )


def test_hidden_states(tmp_path: Path) -> None:
    model = face()
    theirs = stock(model, tmp_path)
    ours, expected = (m(tokens(), output_hidden_states=True).hidden_states for m in (model, theirs))
    assert len(ours) == len(expected) == 3
    for found, state in zip(ours, expected, strict=True):
        equal(found, state)


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 9, 9\)"):
        face()(tokens(), attention_mask=torch.ones(2, 1, 9, 9))


# Generation


@every_shape
def test_greedy_is_a_loop_over_argmax(fields: dict[str, Any]) -> None:
    model, row = face(**fields), tokens()
    for _ in range(10):
        row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), dim=-1)
    assert torch.equal(generated(model, tokens()), row[:, 9:])


@every_shape
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=["uncached", "static", "chunked prefill"],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_cache_gives_the_same_text(fields: dict[str, Any], options: dict[str, Any], beams: int) -> None:
    model = face(**fields)
    assert torch.equal(
        generated(model, tokens(), num_beams=beams, **options), generated(model, tokens(), num_beams=beams)
    )


@every_shape
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_left_padded_rows_are_single_rows(fields: dict[str, Any], options: dict[str, Any]) -> None:
    model = face(**fields)
    prompt, mask = left_padded()
    together = generated(model, prompt, attention_mask=mask, **options)
    alone = [generated(model, row[real.bool()][None], **options) for row, real in zip(prompt, mask, strict=True)]
    assert torch.equal(together, torch.cat(alone))


@stock_shapes
def test_beams_are_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    model = face(**fields)
    theirs = stock(model, tmp_path)
    assert torch.equal(generated(model, tokens(), num_beams=4), generated(theirs, tokens(), num_beams=4))


def test_sampling_is_that_of_transformers(tmp_path: Path) -> None:
    model = face()
    theirs = stock(model, tmp_path)
    options = {"do_sample": True, "top_k": 20, "temperature": 0.7, "num_return_sequences": 3}
    torch.manual_seed(3)
    ours = generated(model, tokens(), **options)
    torch.manual_seed(3)
    assert torch.equal(ours, generated(theirs, tokens(), **options))
    assert ours.shape == (6, 10)
    assert len({tuple(row.tolist()) for row in ours}) > 2


# Files


@every_shape
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_saved_model_loads_whole(fields: dict[str, Any], shard: str, tmp_path: Path) -> None:
    model = face(**fields)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LlmeffForCausalLM
    assert not any(info.values())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    inner, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(inner(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


@every_shape
def test_the_config_round_trips(fields: dict[str, Any], tmp_path: Path) -> None:
    plain = build(**fields).config
    LlmeffConfig.wrap(plain, eos_token_id=7).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.unwrap() == plain
    assert again.eos_token_id == 7
    assert (again.hidden_size, again.num_hidden_layers, again.head_dim) == (32, plain.num_layers, 8)
    assert (again.num_attention_heads, again.num_key_value_heads) == plain.layer_heads(0)


def test_a_wrong_field_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        LlmeffConfig(decoder_config={"widht": 3})


def test_from_config_initializes_as_the_decoder_does() -> None:
    model = AutoModelForCausalLM.from_config(LlmeffConfig.wrap(build(width=128, tied_embeddings=False).config))
    for name, parameter in model.to_decoder().named_parameters():
        expected = model.config.unwrap().initial_std(name)
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert (parameter == 1).all()


# Training


@every_shape
def test_gradient_checkpointing_changes_no_gradient(fields: dict[str, Any]) -> None:
    model = face(**fields).train()
    found = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [80, 50])
def test_the_vocabulary_can_be_resized(tied: bool, size: int, tmp_path: Path) -> None:
    model = face(tied_embeddings=tied)
    before = model(tokens() % 50).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    equal(model(tokens() % 50).logits[..., :50], before[..., :50])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.unwrap().vocab_size == size
    assert model.to_decoder()(tokens() % 50).shape[-1] == size
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tokens() % 50).logits, model(tokens() % 50).logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_trains_saves_loads_and_merges(recompute: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    face().save_pretrained(tmp_path / "base")
    base = LlmeffForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    if recompute:
        model.base_model.model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model.double()(input_ids=tokens()).logits  # merging adds numbers in another order: doubles do not mind
    fresh = LlmeffForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(fresh(tokens()).logits.double(), expected)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval().double()
    equal(loaded(input_ids=tokens()).logits, expected)
    equal(loaded.merge_and_unload()(tokens()).logits, expected)
