"""Kimi Delta Attention against Kimi Linear's own module, with its weights."""

import torch
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from llmeff.attention import KDA
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout

SHAPE = MixerShape(width=24, num_heads=4, num_kv_heads=4, head_dim=8, rope_theta=1e4, norm_eps=1e-6)
NAMES = {
    "conv.weight": "conv1d.weight", "f_a_proj.weight": "forget_gate.f_a_proj.weight",
    "f_b_proj.weight": "forget_gate.f_b_proj.weight", "log_rate": "forget_gate.A_log",
    "step_bias": "forget_gate.dt_bias", "o_norm.norm.weight": "o_norm.weight",
}  # fmt: skip


def pair():
    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=24, linear_num_heads=4, linear_head_dim=8, num_hidden_layers=1, rms_norm_eps=1e-6,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs, ours = KimiLinearDeltaAttention(config, 0), KDA().build(SHAPE)
    with torch.no_grad():
        theirs.forget_gate.A_log.normal_(-1.0)
        theirs.forget_gate.dt_bias.normal_()
        theirs.o_norm.weight.normal_()
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(theirs.get_parameter(NAMES.get(name, name)).detach().view_as(parameter))
    return ours, theirs


def test_it_is_that_of_kimi_linear():
    ours, theirs = pair()
    x = torch.randn(2, 90, 24, requires_grad=True)
    found, expected = ours(x, Layout.plain(90, x.device)), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    above = torch.randn_like(found)
    sources = [
        [x, *ours.parameters()],
        [x, *(theirs.get_parameter(NAMES.get(n, n)) for n, _ in ours.named_parameters())],
    ]
    grads = [torch.autograd.grad((y * above).sum(), own) for y, own in zip((found, expected), sources, strict=True)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other.view_as(own), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_that_of_kimi_linear():
    ours, theirs = pair()
    x, padding = torch.randn(2, 12, 24), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    layout = Layout(positions=torch.arange(12)[None], padding=padding)
    found, expected = ours(x, layout), theirs(x, attention_mask=padding.long())
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-4, atol=1e-5)


def test_no_channel_forgets_more_than_a_chunk_can_hold():
    ours, _ = pair()
    with torch.no_grad():
        ours.log_rate.fill_(5.0)
    x = torch.randn(1, 100, 24, requires_grad=True)
    assert float(ours.log_decay(x).detach().min()) == -5.0
    ours(x, Layout.plain(100, x.device)).square().sum().backward()
    assert x.grad.isfinite().all()
