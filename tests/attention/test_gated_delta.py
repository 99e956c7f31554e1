"""Gated DeltaNet against Qwen3-Next's own module, with its weights."""

import torch
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from llmeff.attention.gated_delta import GatedDelta
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout

SHAPE = MixerShape(width=24, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4, norm_eps=1e-6)


def pair():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=24, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        theirs.dt_bias.normal_()
        theirs.norm.weight.normal_()
    ours = GatedDelta().build(SHAPE)
    qkvz = theirs.in_proj_qkvz.weight.view(2, -1, 24)
    query, key, value, gate = (x.flatten(0, 1) for x in qkvz.split((8, 8, 16, 16), dim=1))
    beta, alpha = (x.flatten(0, 1) for x in theirs.in_proj_ba.weight.view(2, 4, 24).split((2, 2), dim=1))
    tensors = {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": alpha, "b_proj.weight": beta, "conv.weight": theirs.conv1d.weight,
        "log_rate": theirs.A_log, "step_bias": theirs.dt_bias, "o_norm.norm.weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    ours.load_state_dict({name: x.detach().clone() for name, x in tensors.items()})
    return ours, theirs


def test_it_is_that_of_qwen3_next():
    ours, theirs = pair()
    x = torch.randn(2, 90, 24, requires_grad=True)
    found, expected = ours(x, Layout.plain(90, x.device)), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    above = torch.randn_like(found)
    grads = [torch.autograd.grad((y * above).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_is_that_of_qwen3_next():
    ours, theirs = pair()
    x, padding = torch.randn(2, 12, 24), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    layout = Layout(positions=torch.arange(12)[None], padding=padding)
    found, expected = ours(x, layout), theirs(x, attention_mask=padding.long())
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-4, atol=1e-5)
