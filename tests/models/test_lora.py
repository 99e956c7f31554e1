"""LoRA trains its updates alone, begins as the plain model, and leaves a plain model with the updates in it."""

import copy

import pytest
import torch
from torch import nn

from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.core.parameters import parameter_infos
from llmeff.models import Decoder, DecoderConfig, LoRA

peft = pytest.importorskip("peft")

SHAPE = DecoderConfig(vocab_size=31, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
TOKENS = torch.arange(24).view(2, 12) % 31
TARGETS = torch.where(TOKENS % 5 == 0, IGNORED_TOKEN, (TOKENS + 1) % 31)


def decoder() -> Decoder:
    torch.manual_seed(0)
    return SHAPE.build()


def trained(lora: LoRA) -> tuple[Decoder, nn.Module]:
    plain = decoder()
    model = lora.apply(copy.deepcopy(plain))
    optimizer = torch.optim.SGD([row.parameter for row in parameter_infos(model, model.roles())], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(TOKENS, targets=TARGETS).backward()
        optimizer.step()
    return plain, model


@pytest.mark.parametrize(
    "settings", [LoRA(), LoRA(rank=2, alpha=1.0, rank_stabilized=True, targets=("q_proj", "up_proj"))]
)
def test_what_is_kept_is_the_plain_model_with_the_updates_in_it(settings):
    plain, model = trained(settings)
    expected = model.double()(TOKENS)
    folded = settings.fold(model)
    assert {name: tensor.shape for name, tensor in folded.named_parameters()} == {
        name: tensor.shape for name, tensor in plain.named_parameters()
    }
    torch.testing.assert_close(folded(TOKENS), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(plain(TOKENS).double(), expected, atol=1e-3)
    assert all(parameter.requires_grad for parameter in folded.parameters())


def test_it_begins_as_the_plain_model():
    plain = decoder()
    assert torch.equal(LoRA().apply(copy.deepcopy(plain))(TOKENS), plain(TOKENS))


def test_the_updates_alone_are_trained():
    model = LoRA(rank=3, targets=("q_proj",)).apply(decoder())
    rows = parameter_infos(model, model.roles())
    assert sum(row.parameter.numel() for row in rows) == SHAPE.num_layers * 3 * (16 + 16)
    assert {row.role for row in rows} == {"matrix"}
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    _, model = trained(LoRA(rank=3, targets=("q_proj",)))
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != ("lora_B" in name) or "lora_A" in name


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no linear layer is called 'q_porj'. Did you mean 'q_proj'\?"):
        LoRA(targets=("q_porj",)).apply(decoder())


def test_a_rank_of_none_is_refused():
    with pytest.raises(ConfigError, match="rank: Input should be greater than or equal to 1"):
        validate(LoRA, {"rank": 0})
