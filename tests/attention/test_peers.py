"""Mixers with a state against transformers' own modules, with their weights: whole rows, gradients, padding, and by a cache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from llmeff.attention import KDA, Mamba2
from llmeff.attention.gated_delta import GatedDelta
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout
from tests.mixers import Kept

WIDTH = 24


def shape(num_heads, num_kv_heads, norm_eps=1e-6):
    return MixerShape(
        width=WIDTH, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, rope_theta=1e4, norm_eps=norm_eps
    )


def filled(ours, tensors):
    ours.load_state_dict({name: x.detach().clone() for name, x in tensors.items()})
    return ours


def mamba2(groups):
    inner, state, width = 48, 16, groups * 16
    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=6, head_dim=8, state_size=state, n_groups=groups, num_hidden_layers=1,
        chunk_size=32,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        theirs.norm.weight.normal_()
        theirs.D.normal_()
    gate, value, key, query, steps = theirs.in_proj.weight.split((inner, inner, width, width, 6))
    order = torch.cat(torch.arange(inner + 2 * width).split((inner, width, width))[::-1])
    same = {
        "log_rate": theirs.A_log, "step_bias": theirs.dt_bias, "skip": theirs.D, "o_norm.weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    ours = filled(Mamba2(state_width=state).build(shape(3, groups, 1e-5)), same | {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": steps, "conv.weight": theirs.conv1d.weight[order], "conv.bias": theirs.conv1d.bias[order],
    })  # fmt: skip
    return ours, theirs, same, config


def gated_delta():
    config = Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        theirs.dt_bias.normal_()
        theirs.norm.weight.normal_()
    qkvz = theirs.in_proj_qkvz.weight.view(2, -1, WIDTH)
    query, key, value, gate = (x.flatten(0, 1) for x in qkvz.split((8, 8, 16, 16), dim=1))
    beta, alpha = (x.flatten(0, 1) for x in theirs.in_proj_ba.weight.view(2, 4, WIDTH).split((2, 2), dim=1))
    same = {
        "conv.weight": theirs.conv1d.weight, "log_rate": theirs.A_log, "step_bias": theirs.dt_bias,
        "o_norm.norm.weight": theirs.norm.weight, "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    ours = filled(GatedDelta().build(shape(4, 2)), same | {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": alpha, "b_proj.weight": beta,
    })  # fmt: skip
    return ours, theirs, same, config


def kda():
    names = {
        "conv.weight": "conv1d.weight", "f_a_proj.weight": "forget_gate.f_a_proj.weight",
        "f_b_proj.weight": "forget_gate.f_b_proj.weight", "log_rate": "forget_gate.A_log",
        "step_bias": "forget_gate.dt_bias", "o_norm.norm.weight": "o_norm.weight",
    }  # fmt: skip
    config = KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=4, linear_head_dim=8, num_hidden_layers=1, rms_norm_eps=1e-6,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs, ours = KimiLinearDeltaAttention(config, 0), KDA().build(shape(4, 4))
    with torch.no_grad():
        theirs.forget_gate.A_log.normal_(-1.0)
        theirs.forget_gate.dt_bias.normal_()
        theirs.o_norm.weight.normal_()
    same = {name: theirs.get_parameter(names.get(name, name)) for name, _ in ours.named_parameters()}
    return filled(ours, {name: same[name].view_as(own) for name, own in ours.named_parameters()}), theirs, same, config


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
        expected = theirs(x[:, start:end], cache_params=cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_channel_of_kda_forgets_more_than_a_chunk_can_hold():
    ours, *_ = kda()
    with torch.no_grad():
        ours.log_rate.fill_(5.0)
    x = torch.randn(1, 100, WIDTH, requires_grad=True)
    assert float(ours.log_decay(x, fused=False).detach().min()) == -5.0
    ours(x, Layout.plain(100, x.device)).square().sum().backward()
    assert x.grad.isfinite().all()
