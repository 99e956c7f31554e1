"""The decoder against transformers' Llama and Qwen3, against itself, and against float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.core.layout import Layout
from llmeff.models.transformer import PRESETS, Decoder, DecoderConfig

VOCABULARY = 61
PRUNED = {
    "num_layers": 3,
    "layers": [{"has_mixer": False, "mlp_width": 24}, {"num_heads": 2, "num_kv_heads": 1}, {"has_mlp": False}],
}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "head_dim": 12, "tied_embeddings": False},
    "qk_norm": {"mixer": {"name": "softmax", "qk_norm": True}, "num_kv_heads": 2},
    "pruned": PRUNED,
}


def build(**fields: Any) -> Decoder:
    torch.manual_seed(0)
    base = {"vocab_size": VOCABULARY, "width": 32, "num_layers": 2, "mlp_width": 48}
    return validate(DecoderConfig, base | fields).build()


def batch(rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED_TOKEN
    return tokens[:, :-1], targets


def documents(*lengths: int) -> Layout:
    return Layout(
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        documents=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
    )


def gradients(model: Decoder, *, dtype: torch.dtype = torch.float32, chunk: int | None = None) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype)
    tokens, targets = batch()
    model(tokens, targets=targets, loss_chunk=chunk).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_packed_documents_are_separate_documents(fields: dict[str, Any]) -> None:
    model, (tokens, _) = build(**fields), batch(rows=1)
    alone = torch.cat([model(part) for part in tokens.split((5, 1, 6), dim=1)], dim=1)
    torch.testing.assert_close(model(tokens, documents(5, 1, 6)), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_no_token_sees_a_later_one(fields: dict[str, Any]) -> None:
    model, (tokens, _) = build(**fields), batch()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert not moved[:7].any()
    assert moved[7] > 0


class GrowingCache:
    def __init__(self) -> None:
        self.pieces: list[tuple[Tensor, Tensor]] = []

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.pieces.append((key, value))
        keys, values = zip(*self.pieces, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_cached_pieces_are_the_whole(fields: dict[str, Any]) -> None:
    model, (tokens, _) = build(**fields), batch()
    caches, past, pieces = [GrowingCache() for _ in model.layers], 0, []
    for piece in tokens.split((5, 1, 6), dim=1):
        pieces.append(model.hidden(piece, Layout.plain(piece.shape[1], tokens.device, past), caches))
        past += piece.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_first_gradients_agree_with_float64(fields: dict[str, Any], chunk: int | None) -> None:
    model = build(**fields)
    exact = gradients(model, dtype=torch.float64)
    for name, grad in gradients(model, chunk=chunk).items():
        assert exact[name].dtype == torch.float64
        assert relative(grad, exact[name]) < 2e-6, name


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_recomputed_layers_give_equal_gradients(fields: dict[str, Any]) -> None:
    model = build(**fields)
    plain = gradients(model)
    model.recompute = True
    again = gradients(model)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, again[name]), name


def test_recompute_respects_documents() -> None:
    model, (tokens, targets) = build(), batch(rows=1)
    plain = model(tokens, documents(5, 7), targets)
    plain.backward()
    expected = model.embed_tokens.weight.grad
    model.zero_grad()
    model.recompute = True
    model(tokens, documents(5, 7), targets).backward()
    assert torch.equal(expected, model.embed_tokens.weight.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_torch_compile_takes_it_whole(recompute: bool) -> None:
    model, (tokens, targets) = build(num_kv_heads=2), batch(rows=1)
    model.recompute = recompute
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, documents(5, 7), targets, 5)
    found.backward()
    grad, model.embed_tokens.weight.grad = model.embed_tokens.weight.grad, None
    expected = model(tokens, documents(5, 7), targets, 5)
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad, model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_sums_what_is_counted() -> None:
    model, (tokens, targets) = build(), batch()
    surprise = -model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets=targets), surprise[targets != IGNORED_TOKEN].sum())


def test_ragged_accumulation_is_the_whole_batch() -> None:
    model, (tokens, targets) = build(), batch(rows=4)
    targets[3, 2:] = IGNORED_TOKEN
    whole = model(tokens, targets=targets)
    parts = sum(model(tokens[row : row + 1], targets=targets[row : row + 1]) for row in range(4))
    assert relative(torch.as_tensor(parts).detach(), whole.detach()) < 1e-6


def test_roles_follow_the_tying() -> None:
    tied, untied = build().roles(), build(tied_embeddings=False).roles()
    assert tied.keys() == dict(build().named_parameters()).keys()
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert untied["lm_head.weight"] == "head"
    assert tied["embed_tokens.weight"] == "embedding"
    assert tied["layers.0.input_layernorm.weight"] == "norm"
    assert tied["layers.1.self_attn.q_proj.weight"] == "matrix"


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, second = build(num_layers=8), build(num_layers=8)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        if one.dim() == 2:
            assert one.std().item() == pytest.approx(first.config.initial_std(name), rel=0.2)
        else:
            assert (one == 1).all()
    written = first.layers[0].mlp.down_proj.weight.std() / first.layers[0].mlp.gate_proj.weight.std()
    assert written.item() == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_they_name(name: str) -> None:
    sizes = {"llama-1m": 0.8e6, "llama-10m": 10.6e6, "llama-30m": 28.3e6, "llama-125m": 85e6, "llama-350m": 308e6}
    sizes |= {"llama-1b": 973e6, "llama-3b": 2818e6, "llama-7b": 6476e6}
    config = validate(PRESETS[name], {"vocab_size": 16})
    with torch.device("meta"):
        model = config.build()
    embeddings = sum(
        {id(weight): weight.numel() for weight in (model.embed_tokens.weight, model.lm_head.weight)}.values()
    )
    assert sum(p.numel() for p in model.parameters()) - embeddings == pytest.approx(sizes[name], rel=0.01)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 30}, "width 30 is not a multiple of num_heads 4: change either, or set head_dim"),
        ({"head_dim": 7}, "head_dim is 7, but rotary positions rotate pairs"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"layers": [{}]}, "layers has 1 entries, but num_layers is 2"),
        ({"mixer": "softmaxx"}, "Did you mean 'softmax'"),
        ({"widht": 3}, "Did you mean 'width'"),
    ],
)
def test_shapes_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**fields)
