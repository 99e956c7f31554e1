"""Latent attention: its two forms against one another, and against transformers' DeepSeek-V3."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from llmeff.attention.latent import Latent
from llmeff.attention.mixer import MixerShape
from llmeff.core.config import ConfigError, validate
from llmeff.core.layout import Layout
from llmeff.models.pretrained import LlmeffForCausalLM
from llmeff.models.transformer import DecoderConfig
from tests.mixers import Kept

SHAPE = MixerShape(width=16, num_heads=4, num_kv_heads=4, head_dim=8, rope_theta=1e4, norm_eps=1e-6)
every_query = pytest.mark.parametrize("query_latent", [None, 10])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_query
@pytest.mark.parametrize("is_plain", [True, False], ids=["absorbed", "expanded"])
def test_decoding_is_the_whole(query_latent, is_plain):
    config = Latent(query_latent=query_latent, latent=12, rotary=6)
    mixer, x = config.build(SHAPE).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    whole, cache, past = mixer(x, Layout.plain(11, x.device)), Kept(), 0
    if not is_plain:
        mixer.k_up_proj = Changed(mixer.k_up_proj)
    for piece in x.split((5, 1, 1, 4), dim=1):
        found = mixer(piece, Layout.plain(piece.shape[1], x.device, past), cache)
        torch.testing.assert_close(found, whole[:, past : past + piece.shape[1]], rtol=0, atol=1e-12)
        past += piece.shape[1]
        assert 2 * config.cache_bytes(SHAPE, past, 8) == sum(x.nbytes for x in cache.states.values())


class Changed(nn.Linear):
    """As a layer with LoRA: its weight alone says not what it does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
        self.whole = linear

    def forward(self, x):
        return self.whole(x)


def test_what_stands_beside_a_matrix_is_not_forgotten_in_decoding():
    mixer = Latent().build(SHAPE).double()
    mixer.v_up_proj = Changed(mixer.v_up_proj)
    x, cache = torch.randn(1, 4, 16, dtype=torch.float64), Kept()
    whole = mixer(x, Layout.plain(4, x.device))
    mixer(x[:, :3], Layout.plain(3, x.device), cache)
    torch.testing.assert_close(mixer(x[:, 3:], Layout.plain(1, x.device, 3), cache), whole[:, 3:])


def test_the_cache_is_the_latent_and_one_rotary_key():
    # DeepSeek-V2: 512 + 64 numbers a token and layer, where its 128 heads would have 2 x 16 384
    shape = MixerShape(width=5120, num_heads=128, num_kv_heads=128, head_dim=128, rope_theta=1e4, norm_eps=1e-6)
    assert Latent().cache_bytes(shape, 1, 1) == 512 + 64


def mla(theirs, name):
    """One layer's tensors by our names."""
    config, parts = theirs.config, {}
    heads, plain, rotary = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    tensors = {key.removeprefix(name): x for key, x in theirs.state_dict().items() if key.startswith(name)}
    pairs = torch.cat((torch.arange(0, rotary, 2), torch.arange(1, rotary, 2)))  # theirs are neighbours

    query = tensors["q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"].unflatten(0, (heads, -1))
    parts["q_up_proj.weight"] = query[:, :plain].flatten(0, 1)
    parts["q_rope_proj.weight"] = query[:, plain:][:, pairs].flatten(0, 1)
    if config.q_lora_rank is not None:
        parts["q_down_proj.weight"], parts["q_norm.weight"] = (
            tensors["q_a_proj.weight"],
            tensors["q_a_layernorm.weight"],
        )
    down, rope = tensors["kv_a_proj_with_mqa.weight"].split((config.kv_lora_rank, rotary))
    parts |= {"kv_down_proj.weight": down, "k_rope_proj.weight": rope[pairs]}
    key, value = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1)).split((plain, config.v_head_dim), dim=1)
    parts |= {"k_up_proj.weight": key.flatten(0, 1), "v_up_proj.weight": value.flatten(0, 1)}
    return parts | {"kv_norm.weight": tensors["kv_a_layernorm.weight"], "o_proj.weight": tensors["o_proj.weight"]}


def deepseek(query_latent):
    config = DeepseekV3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=20, q_lora_rank=query_latent, qk_rope_head_dim=6, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, initializer_range=0.3, num_mtp_layers=0,
    )  # fmt: skip
    theirs = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.uniform_(0.5, 2)
    mixer = Latent(latent=20, rotary=6, query_latent=query_latent)
    decoder = DecoderConfig(
        vocab_size=61, width=32, num_layers=2, num_heads=4, head_dim=8, mlp_width=48, tied_embeddings=False,
        norm_eps=1e-6, mixer=mixer,
    ).build()  # fmt: skip
    tensors = {key.removeprefix("model."): x for key, x in theirs.state_dict().items() if "self_attn" not in key}
    for index in range(2):
        found = mla(theirs, f"model.layers.{index}.self_attn.")
        tensors |= {f"layers.{index}.self_attn.{name}": x for name, x in found.items()}
    decoder.load_state_dict(tensors)
    return LlmeffForCausalLM.from_decoder(decoder, pad_token_id=0).eval(), theirs


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@every_query
def test_it_is_deepseek_v3(query_latent):
    ours, theirs = deepseek(query_latent)
    given = tokens(2, 17)
    found, expected = (model(given, labels=given, use_cache=False) for model in (ours, theirs))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    found.loss.backward()
    expected.loss.backward()
    theirs_too = {name: p.grad for name, p in theirs.named_parameters() if "self_attn" not in name}
    for name, parameter in ours.named_parameters():
        if name in theirs_too:
            torch.testing.assert_close(parameter.grad, theirs_too[name], rtol=1e-4, atol=1e-5)
    # gradients of the attention's matrices, brought into our order as the weights were
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    for index in range(2):
        for name, grad in mla(theirs, f"model.layers.{index}.self_attn.").items():
            parameter = ours.get_parameter(f"model.layers.{index}.self_attn.{name}")
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


@every_query
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_it_writes_what_deepseek_v3_writes(query_latent, options):
    ours, theirs = deepseek(query_latent)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :7] = mask[1, :2] = 0
    prompt = tokens(3, 9).masked_fill(mask == 0, 0)
    common = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": options.get("num_beams", 1),
    }
    assert torch.equal(ours.generate(prompt, **common | options), theirs.generate(prompt, **common))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads is 2, but num_heads is 4: mla computes keys and values for every head"),
        ({"mixer": {"name": "mla", "rotary": 5}}, "mla.rotary is 5, but .* Give an even number"),
        ({"mixer": {"name": "mla", "latent": 0}}, r"greater than or equal to 1 \(given: 0\)"),
    ],
)
def test_widths_that_cannot_be(fields, said):
    with pytest.raises(ConfigError, match=said):
        validate(DecoderConfig, {"mixer": "mla", **fields})
