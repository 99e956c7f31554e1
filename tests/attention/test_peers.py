"""Mixers with a state against transformers' own modules and models, with their weights: whole rows, gradients, padding, by a cache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention, KimiLinearForCausalLM
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM, Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM, Qwen3NextGatedDeltaNet

from llmeff.attention import KDA, Mamba2
from llmeff.attention.gated_delta import GatedDelta
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout
from llmeff.models import DecoderConfig
from llmeff.models.pretrained import CACHE, LlmeffForCausalLM
from tests.mixers import Kept

WIDTH = 24
LAYER_CACHE = {"past_key_values": "cache_params", "cache": "cache"}[CACHE]
"""What their layers with a state call the cache."""


def shape(num_heads, num_kv_heads, norm_eps=1e-6):
    return MixerShape(
        width=WIDTH, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, rope_theta=1e4, norm_eps=norm_eps
    )


def filled(ours, tensors):
    ours.load_state_dict({name: x.detach().clone() for name, x in tensors.items()})
    return ours


def mamba2_tensors(theirs, groups):
    """Ours by name: what is the same tensor in theirs, and what is a part of one or turned."""
    inner, width = theirs.intermediate_size, groups * theirs.ssm_state_size
    gate, value, key, query, steps = theirs.in_proj.weight.split((inner, inner, width, width, theirs.num_heads))
    order = torch.cat(torch.arange(inner + 2 * width).split((inner, width, width))[::-1])
    same = {
        "log_rate": theirs.A_log, "step_bias": theirs.dt_bias, "skip": theirs.D, "o_norm.weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    return same, {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": steps, "conv.weight": theirs.conv1d.weight[order], "conv.bias": theirs.conv1d.bias[order],
    }  # fmt: skip


def mamba2_config(groups, num_layers=1, **more):
    return Mamba2Config(
        hidden_size=WIDTH, num_heads=6, head_dim=8, state_size=16 * groups, n_groups=groups,
        num_hidden_layers=num_layers, chunk_size=32, **more,
    )  # fmt: skip


def mamba2(groups):
    config = mamba2_config(groups)
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        theirs.norm.weight.normal_()
        theirs.D.normal_()
    same, turned = mamba2_tensors(theirs, groups)
    return filled(Mamba2(state_width=16 * groups).build(shape(3, groups, 1e-5)), same | turned), theirs, same, config


def gated_delta_tensors(theirs):
    qkvz = theirs.in_proj_qkvz.weight.view(2, -1, WIDTH)
    query, key, value, gate = (x.flatten(0, 1) for x in qkvz.split((8, 8, 16, 16), dim=1))
    beta, alpha = (x.flatten(0, 1) for x in theirs.in_proj_ba.weight.view(2, 4, WIDTH).split((2, 2), dim=1))
    same = {
        "conv.weight": theirs.conv1d.weight, "log_rate": theirs.A_log, "step_bias": theirs.dt_bias,
        "o_norm.norm.weight": theirs.norm.weight, "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    return same, {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": alpha, "b_proj.weight": beta,
    }  # fmt: skip


def gated_delta_config(num_layers=1, **more):
    return Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=num_layers,
        layer_types=["linear_attention"] * num_layers, **more,
    )  # fmt: skip


def gated_delta():
    config = gated_delta_config()
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        theirs.dt_bias.normal_()
        theirs.norm.weight.normal_()
    same, turned = gated_delta_tensors(theirs)
    return filled(GatedDelta().build(shape(4, 2)), same | turned), theirs, same, config


def kda_tensors(theirs):
    names = {
        "conv.weight": "conv1d.weight", "f_a_proj.weight": "forget_gate.f_a_proj.weight",
        "f_b_proj.weight": "forget_gate.f_b_proj.weight", "log_rate": "forget_gate.A_log",
        "step_bias": "forget_gate.dt_bias", "o_norm.norm.weight": "o_norm.weight",
    }  # fmt: skip
    with torch.device("meta"):
        ours = {name: own.shape for name, own in KDA().build(shape(4, 4)).named_parameters()}
    same = {name: theirs.get_parameter(names.get(name, name)) for name in ours}
    return same, {name: x.view(ours[name]) for name, x in same.items()}


def kda_config(num_layers=1, **more):
    return KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=4, linear_head_dim=8, num_hidden_layers=num_layers, rms_norm_eps=1e-6,
        layer_types=["linear_attention"] * num_layers, **more,
    )  # fmt: skip


def kda():
    config = kda_config()
    theirs = KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        theirs.forget_gate.A_log.normal_(-1.0)
        theirs.forget_gate.dt_bias.normal_()
        theirs.o_norm.weight.normal_()
    same, turned = kda_tensors(theirs)
    return filled(KDA().build(shape(4, 4)), same | turned), theirs, same, config


PEERS = {
    "Mamba-2": lambda: mamba2(1),
    "Mamba-2 of three groups": lambda: mamba2(3),
    "Qwen3-Next": gated_delta,
    "Kimi": kda,
}


@pytest.fixture(params=PEERS)
def pair(request):
    """Ours, theirs, their parameters by the names that ours have for the same, and their config."""
    torch.manual_seed(0)
    return PEERS[request.param]()


def test_whole_rows_and_their_gradients(pair):
    ours, theirs, same, _ = pair
    x = torch.randn(2, 90, WIDTH, requires_grad=True)
    found, expected = ours(x, Layout.plain(90, x.device)), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    above = torch.randn_like(found)
    sources = [[x, *(ours.get_parameter(name) for name in same)], [x, *same.values()]]
    grads = [torch.autograd.grad((y * above).sum(), own) for y, own in zip((found, expected), sources, strict=True)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other.view_as(own), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left(pair):
    ours, theirs, *_ = pair
    x, padding = torch.randn(2, 12, WIDTH), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    layout = Layout(positions=torch.arange(12)[None], padding=padding)
    found, expected = ours(x, layout), theirs(x, attention_mask=padding.long())
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_prompt_and_then_token_by_token(pair):
    ours, theirs, _, config = pair
    prompt, length = 70, 76
    x, kept, cache = torch.randn(2, length, WIDTH), Kept(), DynamicCache(config=config)
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, length))]:
        found = ours(x[:, start:end], Layout.plain(end - start, x.device, past=start), kept)
        expected = theirs(x[:, start:end], **{LAYER_CACHE: cache})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_channel_of_kda_forgets_more_than_a_chunk_can_hold():
    ours, *_ = kda()
    with torch.no_grad():
        ours.log_rate.fill_(5.0)
    x = torch.randn(1, 100, WIDTH, requires_grad=True)
    assert float(ours.log_decay(x, fused=False).detach().min()) == -5.0
    ours(x, Layout.plain(100, x.device)).square().sum().backward()
    assert x.grad.isfinite().all()


# Whole models


class CountingCache(DynamicCache):
    """States alone do not tell transformers how many tokens they have seen."""

    num_tokens = 0

    def count(self, module, args, kwargs, output):
        given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        self.num_tokens += given.shape[1]

    def get_seq_length(self, layer_idx=0):
        return self.num_tokens

    def get_mask_sizes(self, query_length, layer_idx):
        return self.num_tokens + query_length, 0


SPECIAL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
MLPS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "tie_word_embeddings": False}
DECODER = {"vocab_size": 61, "width": WIDTH, "num_layers": 2, "head_dim": 8, "tied_embeddings": False}


def mamba2_model():
    theirs = Mamba2ForCausalLM(mamba2_config(3, 2, tie_word_embeddings=False, **SPECIAL))
    tensors = {
        "embed_tokens.weight": theirs.backbone.embeddings.weight, "norm.weight": theirs.backbone.norm_f.weight,
        "lm_head.weight": theirs.lm_head.weight,
    }  # fmt: skip
    for index, layer in enumerate(theirs.backbone.layers):
        tensors[f"layers.{index}.input_layernorm.weight"] = layer.norm.weight
        for part in mamba2_tensors(layer.mixer, 3):
            tensors |= {f"layers.{index}.self_attn.{name}": x for name, x in part.items()}
    layers = [{"has_mlp": False}] * 2
    return theirs, tensors, {"mixer": Mamba2(state_width=48), "num_heads": 3, "num_kv_heads": 3, "layers": layers}


def with_mlps(theirs, own_name, tensors_of, shift):
    """A model's with MLPs, whose normalizations have weights of `shift` more."""
    tensors = {}
    for name, x in theirs.state_dict().items():
        if own_name not in name:
            is_norm = name.endswith(("layernorm.weight", "model.norm.weight"))
            tensors[name.removeprefix("model.")] = x + shift if is_norm else x
    for index, layer in enumerate(theirs.model.layers):
        same, turned = tensors_of(getattr(layer, own_name))
        tensors |= {f"layers.{index}.self_attn.{name}": x for name, x in (same | turned).items()}
    return tensors


def gated_delta_model():
    config = gated_delta_config(2, mlp_only_layers=[0, 1], **SPECIAL, **MLPS)
    theirs = Qwen3NextForCausalLM(config)
    tensors = with_mlps(theirs, "linear_attn", gated_delta_tensors, shift=1)
    return theirs, tensors, {"mixer": GatedDelta(), "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48}


def kda_model():
    theirs = KimiLinearForCausalLM(kda_config(2, mlp_layer_types=["dense"] * 2, **SPECIAL, **MLPS))
    with torch.no_grad():  # slow enough for the bound of ours
        for layer in theirs.model.layers:
            layer.self_attn.forget_gate.A_log.normal_(-1.0)
    tensors = with_mlps(theirs, "self_attn", kda_tensors, shift=0)
    return theirs, tensors, {"mixer": KDA(), "num_heads": 4, "mlp_width": 48}


MODELS = {"Mamba-2": (mamba2_model, 1e-5), "Qwen3-Next": (gated_delta_model, 1e-6), "Kimi": (kda_model, 1e-6)}
"""With what is added under the root of their normalizations."""


@pytest.fixture(params=MODELS)
def models(request):
    """Ours and theirs."""
    torch.manual_seed(0)
    make, norm_eps = MODELS[request.param]
    theirs, tensors, fields = make()
    decoder = filled(DecoderConfig(**DECODER, norm_eps=norm_eps, **fields).build(), tensors)
    return LlmeffForCausalLM.from_decoder(decoder, pad_token_id=0).eval(), theirs.eval()


def test_logits_of_whole_models(models):
    given = torch.randint(1, 61, (2, 70))
    found, expected = (model(given, use_cache=False).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_whole_models_write(models, beams):
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :7] = mask[1, :2] = 0
    prompt = torch.randint(1, 61, (3, 9)).masked_fill(mask == 0, 0)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    ours, theirs = models
    found = ours.generate(prompt, **options)
    if isinstance(theirs, Mamba2ForCausalLM):  # which makes its cache itself
        assert torch.equal(found, theirs.generate(prompt, **options))
        return
    cache = CountingCache(config=theirs.config)
    theirs.base_model.register_forward_hook(cache.count, with_kwargs=True)
    assert torch.equal(found, theirs.generate(prompt, **options, **{CACHE: cache}))
    assert cache.num_tokens == 9 + 11
