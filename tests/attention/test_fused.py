"""What stands around a scan, handed to another kernel's forms: written out here, so that no package and no GPU is asked for."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmeff.attention import MixerConfig, fla
from llmeff.testing.failed import require_close
from llmeff.testing.mixers import SHAPE, build, inputs, plain
from tests.mixers import NAMES, config, layouts

FUSED = [name for name in NAMES if getattr(MixerConfig.registry[name], "fuses", None)]
LENGTH = 20


def short_conv(x, weight, bias, layout):
    taps, out = weight.shape[1], torch.zeros_like(x)
    places = layout.positions.expand(x.shape[:2])
    for token in range(x.shape[1]):
        for back in range(min(taps, token + 1)):
            is_own = (places[:, token] >= back)[:, None]
            out[:, token] += is_own * x[:, token - back] * weight[:, taps - 1 - back]
    return F.silu(out if bias is None else out + bias)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gated_rms_norm(x, gate, weight, eps, activation):
    return rms_norm(x, weight, eps) * {"silu": F.silu, "sigmoid": torch.sigmoid}[activation](gate)


def channel_decay(x, log_rate, bias):
    return -log_rate.exp()[:, None] * (1 + (x + bias.view(x.shape[-2:])).exp()).log()


FORMS = {form.__name__: form for form in (short_conv, unit, rms_norm, gated_rms_norm, channel_decay)}


@pytest.fixture
def other(monkeypatch):
    """Puts the forms above in the place of the kernels'; `called` are those that ran, `asked` for what it was asked."""
    seen = SimpleNamespace(called=set(), asked=[], fuses=True)

    def run(name, *given):
        seen.called.add(name)
        return FORMS[name](*given)

    def fuses(*given):
        seen.asked.append(given)
        return seen.fuses

    for name in FORMS:
        monkeypatch.setattr(fla, name, lambda *given, name=name: run(name, *given))
    monkeypatch.setattr(fla, "fuses", fuses)
    return seen


LAYOUTS = layouts(LENGTH, document=12, padded=5)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", FUSED)
def test_a_mixer_hands_on_all_that_it_fuses_and_gives_the_same(name, kind, other):
    mixer, x = build(config(name), SHAPE), inputs(LENGTH)
    found = mixer(x, LAYOUTS[kind])
    assert other.called == MixerConfig.registry[name].fuses
    other.called, other.fuses = set(), False
    expected = mixer(x, LAYOUTS[kind])
    assert not other.called
    if kind == "padded":
        found, expected = (out.masked_fill(~LAYOUTS[kind].padding[..., None], 0) for out in (found, expected))
    require_close("values", found, expected, 1e-9)


@pytest.mark.parametrize("name", FUSED)
def test_it_asks_with_its_kernel_and_the_format_of_products(name, other):
    mixer, x = config(name).model_copy(update={"kernel": "fla"}), inputs(LENGTH, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        build(mixer, SHAPE, torch.float32)(x, plain(LENGTH))
    assert other.asked == [("fla", torch.bfloat16, x.device, None)]


@pytest.mark.parametrize("name", FUSED)
def test_half_precision_stays_what_it_is(name, other):
    x = inputs(LENGTH, torch.bfloat16)
    assert build(config(name), SHAPE, torch.bfloat16)(x, plain(LENGTH)).dtype == torch.bfloat16
    assert other.called == MixerConfig.registry[name].fuses
