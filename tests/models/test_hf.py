"""Foreign models of transformers with the decoder's forward."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmeff.attention import Linear, Performer, Sliding, Softmax
from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.core.layout import Layout
from llmeff.core.parameters import parameter_infos
from llmeff.core.tensors import copy_tensors
from llmeff.cost.workload import Workload
from llmeff.data import Bpe, Bytes, Characters, HfTokenizer
from llmeff.data.tokenizer import Tokenizer
from llmeff.models import ModelConfig, interface, llama_format, save_model
from llmeff.models.hf import HFModel, HFModelConfig
from llmeff.models.transformer import DecoderConfig
from llmeff.plan.price import price_step
from llmeff.tasks.causal_lm import tokenizer_problems
from tests.prices import run_of

VOCABULARY = 61
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen2": transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_LLAMA, sliding_window=64),
}
every_model = pytest.mark.parametrize("kind", CONFIGS)


def folder(kind: str, path: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(path)
    return path


def build(path: Path | str, **fields: Any) -> HFModel:
    torch.manual_seed(0)
    return validate(HFModelConfig, {"path": str(path), "vocab_size": VOCABULARY} | fields).build()


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = IGNORED_TOKEN
    return tokens[:, :-1], targets


def packed(*lengths: int) -> Layout:
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].expand(2, -1)
    return Layout(positions=positions, documents=documents)


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_is_a_model_by_name() -> None:
    assert ModelConfig.registry["hf"] is HFModelConfig


@every_model
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder(kind, tmp_path))
    assert torch.equal(build(tmp_path).eval()(batch()[0]), theirs(batch()[0]).logits)


@every_model
def test_packed_documents_are_separate_documents(kind: str, tmp_path: Path) -> None:
    model, (tokens, _) = build(folder(kind, tmp_path)).eval(), batch()
    alone = torch.cat([model(part) for part in tokens.split((5, 1, 6), dim=1)], dim=1)
    equal(model(tokens, packed(5, 1, 6)), alone)
    assert not torch.allclose(model(tokens), alone, atol=1e-3)


@every_model
def test_padding_is_seen_by_nobody(kind: str, tmp_path: Path) -> None:
    model, (tokens, _) = build(folder(kind, tmp_path)).eval(), batch()
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[:, :3] = False
    layout = Layout(positions=(torch.arange(12) - 3).clamp(min=0)[None].expand(2, -1), padding=padding)
    equal(model(tokens, layout)[:, 3:], model(tokens[:, 3:]))


@pytest.mark.parametrize(
    "mixer", [Softmax(), Sliding(window=4, sinks=1), Linear(), Performer(num_features=8)], ids=lambda mixer: mixer.name
)
def test_a_mixer_attends_in_place_of_the_models_own_attention(mixer: Any, tmp_path: Path) -> None:
    tokens = batch()[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder("qwen2", tmp_path / "first"))
    own = theirs(tokens).logits
    interface.use(theirs, mixer)
    model = build(tmp_path / "first", mixer=mixer).eval()
    equal(model(tokens), theirs(tokens).logits)
    assert torch.allclose(model(tokens), own, atol=1e-4) == (mixer.name == "softmax")
    alone = torch.cat([model(part) for part in tokens.split((5, 1, 6), dim=1)], dim=1)
    equal(model(tokens, packed(5, 1, 6)), alone)
    save_model(model, tmp_path / "second", max_length=16, end_id=0)
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "second", attn_implementation=f"llmeff_{mixer.name}"
    )
    equal(saved(tokens).logits, model(tokens))


@pytest.mark.parametrize(
    ("kind", "mixer", "said"),
    [
        (
            "qwen2",
            {"name": "gla"},
            r"model\.mixer: mixer is .* supports Softmax\(\), Sliding\(\.\.\.\), Linear\(\) or Perf",
        ),
        (
            "mistral",
            {"name": "sliding", "window": 9},
            r"model\.mixer: .* the model has its own sliding_window, 64",
        ),
        (
            "recurrent",
            {"name": "linear"},
            r"model\.mixer: MambaForCausalLM does not use transformers' AttentionInterface",
        ),
        ("gpt2", {"name": "linear"}, r"GPT2Attention has an attention dropout of 0\.1"),
    ],
)
def test_a_mixer_that_a_model_cannot_take_is_told_before_its_step(
    kind: str, mixer: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = validate(HFModelConfig, foreign(kind, tmp_path).model_dump() | {"mixer": mixer})
    with pytest.raises(ConfigError, match=said):
        price_step(run_of(config), WORK)


@every_model
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_loss_sums_what_is_counted(kind: str, chunk: int | None, tmp_path: Path) -> None:
    model, (tokens, targets) = build(folder(kind, tmp_path)).eval(), batch()
    surprise = -model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    loss = model(tokens, targets=targets, loss_chunk=chunk)
    torch.testing.assert_close(loss, surprise[targets != IGNORED_TOKEN].sum())


@every_model
def test_recompute_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    model, (tokens, targets) = build(folder(kind, tmp_path)), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        assert model.recompute == recompute
        model.zero_grad()
        model(tokens, packed(7, 5), targets).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@every_model
def test_from_scratch_is_a_function_of_the_seed(kind: str, tmp_path: Path) -> None:
    folder(kind, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = build(tmp_path, from_scratch=True).eval(), build(tmp_path, from_scratch=True).eval()
    assert torch.equal(first(batch()[0]), second(batch()[0]))


@every_model
def test_on_meta_only_the_config_is_read(kind: str, tmp_path: Path) -> None:
    expected = sum(parameter.numel() for parameter in build(folder(kind, tmp_path)).parameters())
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        model = build(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_roles_come_from_the_modules(tmp_path: Path) -> None:
    gpt2 = build(folder("gpt2", tmp_path / "gpt2"))
    roles = gpt2.roles()
    assert sum(row.parameter.numel() for row in parameter_infos(gpt2, roles)) == sum(
        parameter.numel() for parameter in gpt2.parameters()
    )
    assert roles["network.transformer.wpe.weight"] == roles["network.transformer.wte.weight"] == "embedding"
    assert roles["network.transformer.h.0.attn.c_attn.weight"] == "matrix"
    assert roles["network.transformer.h.0.attn.c_attn.bias"] == "bias"
    assert roles["network.transformer.h.0.ln_1.weight"] == "norm"
    assert roles["network.transformer.h.0.ln_1.bias"] == "bias"
    assert build(folder("mistral", tmp_path / "mistral")).roles()["network.lm_head.weight"] == "head"


def test_a_recurrent_model_is_kept_from_packed_documents(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.save_pretrained(tmp_path)
    model, (tokens, targets) = build(tmp_path, from_scratch=True), batch()
    assert model(tokens, targets=targets).isfinite()
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot separate the documents of a row"):
        model(tokens, packed(7, 5), targets)


def test_a_model_with_logits_of_its_own_kind_is_kept_from_chunks(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=30.0)
    config.save_pretrained(tmp_path)
    model, (tokens, targets) = build(tmp_path, from_scratch=True), batch()
    assert model(tokens, targets=targets).isfinite()
    with pytest.raises(
        ConfigError, match="loss_chunk must be null, because Gemma2ForCausalLM can compute its logits only all at once"
    ):
        model(tokens, targets=targets, loss_chunk=5)


WORK = Workload(num_sequences=1, num_tokens=64)
_SHORT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
OTHERS = {
    "capped": transformers.Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=30.0),
    "scaled": transformers.CohereConfig(**_LLAMA, logit_scale=0.5),
    "biased": transformers.PhiConfig(**_LLAMA),
    "uncapped": transformers.Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=None),
    "half a body": transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
    ),
    "recurrent": transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4),
    "old": transformers.OpenAIGPTConfig(**_SHORT),
    "learned": transformers.GPT2Config(**_SHORT),
    "tabulated": transformers.GPTJConfig(**_SHORT, rotary_dim=8),
    "rotary": transformers.LlamaConfig(**_LLAMA, max_position_embeddings=32),
}


def foreign(kind: str, path: Path) -> HFModelConfig:
    (CONFIGS | OTHERS)[kind].save_pretrained(path)
    return validate(HFModelConfig, {"path": str(path), "vocab_size": VOCABULARY, "from_scratch": True})


@pytest.mark.parametrize(
    ("kind", "does"),
    [
        *((kind, True) for kind in [*CONFIGS, "uncapped", "half a body", "recurrent", "rotary"]),
        *((kind, False) for kind in ["capped", "scaled", "biased"]),
    ],
)
def test_whether_logits_come_in_chunks_is_known_before_the_weights(kind: str, does: bool, tmp_path: Path) -> None:
    config = foreign(kind, tmp_path)
    assert config.chunks_logits() is does
    model = config.build().eval()
    assert model.projects is does
    if does:
        tokens, targets = batch()
        chunked, whole = model(tokens, targets=targets, loss_chunk=5), model(tokens, targets=targets)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)  # sums over all tokens


@pytest.mark.parametrize(
    ("kind", "work", "said"),
    [
        ("gpt2", replace(WORK, loss_chunk=5, recompute=True), None),
        (
            "capped",
            replace(WORK, loss_chunk=5),
            "task.loss_chunk is 5, but Gemma2ForCausalLM can compute its logits only all at once",
        ),
        ("old", replace(WORK, num_tokens=32, recompute=True), "runtime.recompute is true, but OpenAIGPTLMHeadModel"),
        ("learned", WORK, "data.sequence_length is 64, but .* has learned positions for only 32 tokens"),
        ("half a body", WORK, "data.sequence_length is 64, but .* has learned positions for only 32 tokens"),
        ("learned", replace(WORK, num_tokens=32), None),
    ],
)
def test_what_a_model_cannot_is_told_by_its_config(kind: str, work: Workload, said: str | None, tmp_path: Path) -> None:
    problems = list(foreign(kind, tmp_path).problems(work))
    assert len(problems) == (said is not None)
    assert said is None or re.search(said, problems[0])


def test_all_that_a_model_cannot_is_told_at_once(tmp_path: Path) -> None:
    problems = list(foreign("old", tmp_path).problems(replace(WORK, recompute=True)))
    assert [problem.split()[0] for problem in problems] == ["runtime.recompute", "data.sequence_length"]


@pytest.mark.parametrize(
    ("kind", "work", "said"),
    [
        ("gpt2", replace(WORK, packed=True), None),
        ("recurrent", WORK, None),
        (
            "recurrent",
            replace(WORK, packed=True),
            "MambaForCausalLM cannot separate the documents of a row: use 'plain'",
        ),
        ("tabulated", WORK, "data.sequence_length is 64, but .* has only 32 positions"),
        ("tabulated", replace(WORK, num_tokens=32), None),
        ("rotary", WORK, None),
    ],
)
def test_what_only_a_run_tells_is_told_when_it_is_built(
    kind: str, work: Workload, said: str | None, tmp_path: Path
) -> None:
    config = foreign(kind, tmp_path)
    assert list(config.problems(work)) == []
    problems = list(config.problems(work, config.build()))
    assert len(problems) == (said is not None)
    assert said is None or re.search(said, problems[0])


@pytest.mark.parametrize(("num_tokens", "warned"), [(32, False), (33, True)])
def test_rotary_positions_go_on_with_a_warning(
    num_tokens: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="llmeff"):
        assert list(foreign("rotary", tmp_path).problems(replace(WORK, num_tokens=num_tokens))) == []
    assert ("data.sequence_length is 33, but" in caplog.text) == warned


TEXT = "the cat and the hat and the bat " * 20


@pytest.fixture
def trained_on(tmp_path: Path) -> Tokenizer:
    """The tokenizer of the pretrained model in the folder."""
    tokenizer = Bpe(vocab_size=280).build(lambda: [TEXT])
    tokenizer.save(folder("gpt2", tmp_path))
    return tokenizer


def with_more(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.backend.add_tokens(["<think>"])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda path: HfTokenizer(path=str(path)).build(list),
        lambda path: HfTokenizer(path=str(path), end_token="a").build(list),
        lambda path: with_more(HfTokenizer(path=str(path)).build(list)),
        lambda path: Bpe(vocab_size=280).build(lambda: [TEXT]),
    ],
    ids=["its own", "with another end", "with more tokens", "trained alike"],
)
def test_a_tokenizer_that_keeps_the_ids_is_the_models(tokenizer: Any, tmp_path: Path, trained_on: Tokenizer) -> None:
    model = validate(HFModelConfig, {"path": str(tmp_path)})
    assert list(tokenizer_problems(model, tokenizer(tmp_path))) == []


OTHER_TOKENIZERS = {
    "bytes": lambda: Bytes().build(list),
    "characters": lambda: Characters().build(lambda: [TEXT]),
    "trained on another text": lambda: Bpe(vocab_size=280).build(lambda: ["zebras graze " * 20]),
}


@pytest.mark.parametrize("tokenizer", OTHER_TOKENIZERS.values(), ids=OTHER_TOKENIZERS)
def test_pretrained_weights_refuse_a_tokenizer_with_other_ids(
    tokenizer: Any, tmp_path: Path, trained_on: Tokenizer
) -> None:
    model = validate(HFModelConfig, {"path": str(tmp_path)})
    (problem,) = tokenizer_problems(model, tokenizer())
    assert re.search(r"data.tokenizer: id \d+ is '.+', but it was '.+' when the weights in", problem)
    assert "model.from_scratch = true" in problem
    scratch = model.model_copy(update={"from_scratch": True})
    assert list(tokenizer_problems(scratch, tokenizer())) == []
    (tmp_path / "tokenizer.json").unlink()
    assert list(tokenizer_problems(model, tokenizer())) == []


def test_a_damaged_tokenizer_beside_the_weights_is_one_clear_error(tmp_path: Path, trained_on: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        list(tokenizer_problems(validate(HFModelConfig, {"path": str(tmp_path)}), trained_on))


def test_a_decoder_in_llmeff_format_is_a_foreign_model_too(tmp_path: Path) -> None:
    fields = {"vocab_size": VOCABULARY, "width": 32, "num_layers": 2, "layers": [{"num_heads": 2}, {"has_mlp": False}]}
    decoder = validate(DecoderConfig, fields).build()
    llama_format.save(decoder, tmp_path, max_position_embeddings=64)
    model, (tokens, targets) = build(tmp_path), batch()
    assert torch.equal(model(tokens, packed(7, 5), targets, 5), decoder(tokens, packed(7, 5), targets, 5))


@every_model
def test_a_saved_model_loads_whole(kind: str, tmp_path: Path) -> None:
    model = build(folder(kind, tmp_path / "first"))
    save_model(model, tmp_path / "second", max_length=16, end_id=0)
    assert torch.equal(build(tmp_path / "second").eval()(batch()[0]), model.eval()(batch()[0]))


def _without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _with_a_layer_more(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (path / "config.json").write_text(json.dumps(config | more))


def _at_odds(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def _of_no_known_type(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "nothing"}))


def _pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_weights, "is neither a folder with a causal language model in safetensors"),
        (_pickled, "is neither a folder with a causal language model in safetensors"),
        (_of_no_known_type, "is neither a folder with a causal language model in safetensors"),
        (_at_odds, r"`num_hidden_layers` \(3\) must be equal"),
        (_with_a_layer_more, "lacks the weights model.layers.2.* and 9 more"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(damage: Any, said: str, tmp_path: Path) -> None:
    damage(folder("qwen2", tmp_path))
    with pytest.raises(ConfigError, match=said):
        build(tmp_path)


@pytest.mark.parametrize("given", ["/nowhere/at/all", "./nowhere"])
def test_no_folder_is_one_clear_error(given: str) -> None:
    with pytest.raises(ConfigError, match=given):
        build(given)


def test_more_tokens_than_embeddings_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size is 62, but .* embeds only 61 tokens"):
        build(folder("qwen2", tmp_path), vocab_size=62)


@pytest.fixture
def stories() -> Path:
    data = Path(os.environ.get("LLMEFF_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = data / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"there is no {path}")
    return path


def test_stories260k_loads_both_ways_with_equal_logits(stories: Path) -> None:
    tokens = torch.randint(512, (1, 32), generator=torch.Generator().manual_seed(1))
    config, tensors = llama_format.load(stories)
    decoder = config.build()
    copy_tensors(decoder, tensors)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 260_032
    equal(build(stories, vocab_size=512)(tokens), decoder(tokens))
