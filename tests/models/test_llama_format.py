"""ShardedCheckpoint decoders are what plain transformers loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmeff.core.config import ConfigError, validate
from llmeff.core.tensors import copy_tensors
from llmeff.models import llama_format, save_model
from llmeff.models.transformer import Decoder, DecoderConfig

QK_NORM = {"mixer": {"name": "softmax", "qk_norm": True}}
STOCK: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_kv_heads": 2, "rope_theta": 5000.0},
    "mqa": {"num_kv_heads": 1, "tied_embeddings": False, "norm_eps": 1e-6},
    "wide heads": {"head_dim": 12, "num_kv_heads": 2},
    "qwen3": QK_NORM | {"num_kv_heads": 2},
    "qwen3 wide heads": QK_NORM | {"head_dim": 12, "tied_embeddings": False},
    "layers alike": {"layers": [{"num_heads": 2}, {"num_heads": 2}], "head_dim": 8},
}
OWN: dict[str, dict[str, Any]] = {
    "heads": {"layers": [{"num_heads": 2}, {}]},
    "width": {"layers": [{}, {"mlp_width": 40}], "tied_embeddings": False},
    "no mixer": {"layers": [{"has_mixer": False}, {}]},
    "no mlp anywhere": {"layers": [{"has_mlp": False}, {"has_mlp": False}]},
}


def build(**fields: Any) -> Decoder:
    torch.manual_seed(0)
    model = validate(DecoderConfig, {"vocab_size": 61, "width": 32, "num_layers": 2} | fields).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones would hide that they are mixed up
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Decoder, folder: Path) -> Path:
    llama_format.save(model, folder, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fields", STOCK.values(), ids=STOCK.keys())
def test_stock_models_load_whole_in_transformers_with_equal_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build(**fields)
    assert llama_format.is_stock(model.config)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        save(model, tmp_path / "model"), output_loading_info=True
    )
    assert type(loaded).__name__ == ("Qwen3ForCausalLM" if "mixer" in fields else "LlamaForCausalLM")
    assert not any(info.values())
    assert loaded.config.max_position_embeddings == 64
    assert loaded.generation_config.eos_token_id == 2
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", (STOCK | OWN).values(), ids=(STOCK | OWN).keys())
def test_a_round_trip_changes_no_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build(**fields)
    config, tensors = llama_format.load(save(model, tmp_path))
    again = config.build()
    copy_tensors(again, tensors)
    assert torch.equal(again(tokens()), model(tokens()))
    assert again.config.tied_embeddings == model.config.tied_embeddings


@pytest.mark.parametrize("fields", OWN.values(), ids=OWN.keys())
def test_others_load_with_llmeff(fields: dict[str, Any], tmp_path: Path) -> None:
    import llmeff.models.pretrained  # noqa: F401

    model = build(**fields)
    assert not llama_format.is_stock(model.config)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(tokens()).logits, model(tokens()))


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    own, tensors = llama_format.load(tmp_path)
    model = own.build()
    copy_tensors(model, tensors)
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_the_loop_saves_it_by_its_kind(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path, max_length=32, end_id=5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()))
    assert loaded.config.max_position_embeddings == 32
    assert loaded.generation_config.eos_token_id == loaded.generation_config.bos_token_id == 5


def test_a_model_in_bf16_is_saved_in_bf16(tmp_path: Path) -> None:
    _, tensors = llama_format.load(save(build().bfloat16(), tmp_path))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_old_readers_find_the_rotary_base(tmp_path: Path) -> None:
    raw = json.loads((save(build(rope_theta=123.0), tmp_path) / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 123.0


def test_neither_llmeff_nor_transformers_is_needed_by_the_other(tmp_path: Path) -> None:
    save(build(), tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
    code += "assert not any(name.startswith('llmeff') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    code = "import sys, llmeff.models.llama_format; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', but llmeff's decoder reads only llama, qwen3, llmeff"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions are 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "absent"}, "lacks the field hidden_size"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.input_layernorm.weight; .* \(and \d+ more\)"),
        ({"intermediate_size": 7}, r"gate_proj.weight has shape \(96, 32\), but the config gives \(7, 32\)"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is unexpected"),
    ],
)
def test_what_is_no_decoder_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(build(), tmp_path)
    _rewrite(tmp_path, **fields)
    with pytest.raises(ConfigError, match=said):
        llama_format.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", b"{", "config.json: is not JSON"),
        ("config.json", b"[]", "a model's config must be a JSON object, but this is a list"),
        ("model.safetensors", None, "model.safetensors: cannot be read"),
        ("model.safetensors", b"damaged", "model.safetensors: cannot be read"),
    ],
)
def test_damage_is_one_clear_error(file: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    path = save(build(), tmp_path) / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        llama_format.load(tmp_path)
