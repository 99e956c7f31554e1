"""What must hold of every mixer, over the registry: against formulas in float64, and of its forms against one another."""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmeff.attention import Mixer, MixerConfig, scan, sliding
from llmeff.attention.delta import DeltaMixer
from llmeff.attention.heads import HeadsMixer
from llmeff.attention.kernel import KernelMixer
from llmeff.core.config import ConfigError, validate
from llmeff.core.layout import Layout
from llmeff.testing import mixers as testing
from llmeff.testing.failed import require_close
from llmeff.testing.mixers import SHAPE, Kept, gradients, inputs, plain
from tests.mixers import NAMES, SETTINGS, config, every_mixer, grouped, layouts


def build(name, dtype=torch.float64):
    return testing.build(config(name), SHAPE, dtype)


# The formulas. Each is of one row of one document, (T, D) in float64, and takes weights by their names


def heads(mixer, name, x, num):
    return (x @ mixer.get_parameter(f"{name}.weight").T).unflatten(-1, (num, -1))


def repeated(x, num=SHAPE.num_heads):
    return torch.stack([x[:, head * x.shape[1] // num] for head in range(num)], dim=1)


def turned(x):
    cos, sin = (table[0].double().transpose(0, 1) for table in plain(len(x)).rotary(x.shape[-1], SHAPE.rope_theta))
    half = x.shape[-1] // 2
    return torch.cat(
        (x[..., :half] * cos[..., :half] - x[..., half:] * sin[..., :half],
         x[..., half:] * cos[..., half:] + x[..., :half] * sin[..., half:]), dim=-1
    )  # fmt: skip


def normed(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + SHAPE.norm_eps).sqrt() * weight


def convolved(mixer, *parts):
    x, weight, bias = torch.cat(parts, dim=-1), mixer.conv.weight[:, 0], mixer.conv.bias
    taps, out = weight.shape[1], []
    for t in range(len(x)):
        reached = [weight[:, taps - 1 - back] * x[t - back] for back in range(min(taps, t + 1))]
        out.append(F.silu(sum(reached) + (0 if bias is None else bias)))
    return torch.stack(out)


def weighed(mixer, weights, value):
    """(N, T, T) weights, those of later tokens not counted, and (T, N, V) values to (T, D)."""
    out = torch.einsum("nts,snv->tnv", weights.tril(), value)
    return out.flatten(1) @ mixer.o_proj.weight.T


def recurrent(query, key, value, decay, beta=None):
    """S_t = (I - beta k k') diag(decay) S_(t-1) + beta k v', row by row: (T, N, .) to (T, N, V)."""
    state, out = torch.zeros(*key.shape[1:], value.shape[-1], dtype=key.dtype), []
    for t in range(len(key)):
        rate = torch.ones(key.shape[1], dtype=key.dtype) if beta is None else beta[t]
        outer = key[t][:, :, None] * key[t][:, None, :]
        kept = torch.eye(key.shape[-1], dtype=key.dtype) - (0 if beta is None else rate[:, None, None] * outer)
        state = kept @ (decay[t][..., None] * state) + rate[:, None, None] * key[t][:, :, None] * value[t][:, None, :]
        out.append(torch.einsum("nkv,nk->nv", state, query[t]))
    return torch.stack(out)


def attended(mixer, scores, value, seen=True):
    """(N, T, T) scores, softmax over those of tokens that are seen and not later, and (T, N, V) values to (T, D)."""
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril() & seen
    return weighed(mixer, scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def softmax(mixer, x, seen=True):
    query, key, value = (heads(mixer, f"{name}_proj", x, num) for name, num in (("q", 4), ("k", 2), ("v", 2)))
    scores = torch.einsum("tnh,snh->nts", turned(query), repeated(turned(key))) / SHAPE.head_dim**0.5
    return attended(mixer, scores, repeated(value), seen)


def sliding_window(mixer, x):
    places = torch.arange(len(x))
    near = places[:, None] - places < 5
    return softmax(mixer, x, near | (places < 1) | (places % 7 == 6))


def latent(mixer, x):
    low = normed(x @ mixer.q_down_proj.weight.T, mixer.q_norm.weight)
    kept = normed(x @ mixer.kv_down_proj.weight.T, mixer.kv_norm.weight)
    query, key, value = (
        heads(mixer, name, own, 4) for name, own in (("q_up_proj", low), ("k_up_proj", kept), ("v_up_proj", kept))
    )
    scores = torch.einsum("tnh,snh->nts", query, key) + torch.einsum(
        "tnr,sr->nts", turned(heads(mixer, "q_rope_proj", low, 4)), turned(heads(mixer, "k_rope_proj", x, 1))[:, 0]
    )
    return attended(mixer, scores / (6 + 4) ** 0.5, value)


def kernel(mixer, x, features_of_queries, features_of_keys):
    query, key, value = (heads(mixer, f"{name}_proj", x, num) for name, num in (("q", 4), ("k", 2), ("v", 2)))
    weights = torch.einsum("tnm,snm->nts", features_of_queries(query), repeated(features_of_keys(key))).tril()
    return weighed(mixer, weights / weights.sum(-1, keepdim=True), repeated(value))


def linear(mixer, x):
    def features(own):
        return torch.where(own > 0, own + 1, own.exp())

    return kernel(mixer, x, features, features)


def performer(mixer, x):
    def features(own):
        own = turned(own) / SHAPE.head_dim**0.25
        return (own @ mixer.directions.T - own.square().sum(-1, keepdim=True) / 2).exp()

    return kernel(mixer, x, features, features)


def retention(mixer, x):
    query, key, value = (heads(mixer, f"{name}_proj", x, num) for name, num in (("q", 4), ("k", 2), ("v", 2)))
    scores = torch.einsum("tnh,snh->nts", turned(query), repeated(turned(key))) / SHAPE.head_dim**0.5
    places = torch.arange(len(x), dtype=torch.float64)
    rates = torch.tensor([1 - 2 ** (-5.0 - head) for head in range(4)], dtype=torch.float64)
    decays = rates[:, None, None] ** (places[:, None] - places).clamp(min=0)
    out = torch.einsum("nts,snv->tnv", (scores * decays).tril(), repeated(value))
    out = normed(out, mixer.o_norm.norm.weight) * F.silu(heads(mixer, "g_proj", x, 4))
    return out.flatten(1) @ mixer.o_proj.weight.T


def gla(mixer, x):
    query, key, value = (heads(mixer, f"{name}_proj", x, num) for name, num in (("q", 4), ("k", 2), ("v", 2)))
    opened = (x @ mixer.f_a_proj.weight.T @ mixer.f_b_proj.weight.T + mixer.decay_bias).sigmoid()
    decay = repeated((opened ** (1 / 16)).unflatten(-1, (2, -1)))
    out = recurrent(query / query.shape[-1] ** 0.5, repeated(key), repeated(value), decay)
    out = normed(out, mixer.o_norm.norm.weight) * F.silu(heads(mixer, "g_proj", x, 4))
    return out.flatten(1) @ mixer.o_proj.weight.T


def delta(mixer, x, decay, gate):
    mixed = convolved(mixer, *(x @ mixer.get_parameter(f"{name}_proj.weight").T for name in "qkv"))
    query, key, value = mixed.unflatten(-1, (8, 6)).split((2, 2, 4), dim=1)
    query, key = (own / (own.square().sum(-1, keepdim=True) + 1e-6).sqrt() for own in (query, key))
    beta = (x @ mixer.b_proj.weight.T).sigmoid()
    out = recurrent(repeated(query) / SHAPE.head_dim**0.5, repeated(key), value, decay, beta)
    return (normed(out) * gate).flatten(1) @ mixer.o_proj.weight.T


def deltanet(mixer, x):
    return delta(mixer, x, torch.ones(len(x), 4, 1, dtype=x.dtype), mixer.o_norm.weight)


def gated_deltanet(mixer, x):
    steps = (1 + (x @ mixer.a_proj.weight.T + mixer.step_bias).exp()).log()
    decay = (-mixer.log_rate.exp() * steps).exp()[..., None]
    return delta(mixer, x, decay, mixer.o_norm.norm.weight * F.silu(heads(mixer, "g_proj", x, 4)))


def kda(mixer, x):
    low, gate = x @ mixer.f_a_proj.weight.T, x @ mixer.g_a_proj.weight.T @ mixer.g_b_proj.weight.T
    steps = (1 + (low @ mixer.f_b_proj.weight.T + mixer.step_bias).exp()).log().unflatten(-1, (4, 6))
    decay = (-mixer.log_rate.exp()[:, None] * steps).clamp(min=-5).exp()
    return delta(mixer, x, decay, mixer.o_norm.norm.weight * gate.unflatten(-1, (4, 6)).sigmoid())


def mamba2(mixer, x):
    mixed = convolved(mixer, *(x @ mixer.get_parameter(f"{name}_proj.weight").T for name in "qkv"))
    query, key, value = mixed.split((10, 10, 48), dim=-1)
    query, key = (repeated(own.unflatten(-1, (2, 5)), 8) for own in (query, key))
    value = value.unflatten(-1, (8, 6))
    steps = (1 + (x @ mixer.a_proj.weight.T + mixer.step_bias).exp()).log()[..., None]
    out = recurrent(query, key, steps * value, (-mixer.log_rate.exp()[:, None] * steps).exp())
    out = (out + mixer.skip[:, None] * value).flatten(1) * F.silu(x @ mixer.g_proj.weight.T)
    return (normed(out.unflatten(-1, (2, 24))).flatten(1) * mixer.o_norm.weight) @ mixer.o_proj.weight.T


FORMULAS = {
    "deltanet": deltanet, "gated-deltanet": gated_deltanet, "gla": gla, "kda": kda, "linear": linear,
    "mamba2": mamba2, "mla": latent, "performer": performer, "retention": retention, "sliding": sliding_window,
    "softmax": softmax,
}  # fmt: skip


def test_the_table_of_formulas_is_complete():
    assert sorted(FORMULAS) == NAMES


@every_mixer
def test_values_and_gradients_are_those_of_the_formula(name):
    testing.check_formula(config(name), FORMULAS[name])


@every_mixer
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_its_forms_agree_and_cost_what_they_say(check, name):
    check(config(name), SHAPE)


@every_mixer
def test_block_chunk_and_segment_change_nothing(name, monkeypatch):
    mixer, x = build(name), inputs(70)
    whole = mixer(x, plain(70))
    monkeypatch.setattr(sliding, "LEAST_BLOCK", 40)
    monkeypatch.setattr(scan, "scan", functools.partial(scan.scan, chunk=16, segment=32))
    pieces = mixer(x, plain(70))
    require_close("values", pieces, whole, 1e-9)
    require_close("the gradient", *(gradients(out, x)[0] for out in (pieces, whole)), 1e-9)


LENGTH = 40


LAYOUTS = layouts(LENGTH, document=25, padded=9)


every_layout = pytest.mark.parametrize("kind", LAYOUTS)


@every_mixer
@every_layout
def test_all_that_it_makes_lies_where_its_tokens_lie(name, kind):
    """What says nothing of where it lies comes to lie elsewhere here, where no product with tokens can be made."""
    mixer, x, layout = build(name), inputs(LENGTH), LAYOUTS[kind]
    expected = mixer(x, LAYOUTS[kind])
    with torch.device("meta"):
        mixer.prepare(layout, 2, x.dtype)
        found = mixer(x, layout)
        torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, expected)


@every_layout
@pytest.mark.parametrize(("name", "length"), [*((name, LENGTH) for name in NAMES), ("sliding", 4)])
def test_it_prepares_all_tables_that_its_layers_share_and_no_others(name, length, kind):
    def cut():
        whole = LAYOUTS[kind]
        given = {part: getattr(whole, part) for part in ("positions", "documents", "padding")}
        return Layout(**{part: None if x is None else x[:, :length] for part, x in given.items()})

    mixer, x, made, found = build(name), inputs(length), cut(), cut()
    mixer(x, made)
    mixer.prepare(found, 2, x.dtype)
    for part in ("_rotary", "_masks", "_biases", "_tables"):
        assert list(getattr(found, part)) == list(getattr(made, part))


@pytest.mark.parametrize("name", ["softmax", "sliding"])
def test_normed_keys_are_kept_in_the_format_of_values(name):
    mixer = type(config(name))(**config(name).model_dump() | {"qk_norm": True}).build(grouped(name, SHAPE))
    cache = Kept()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for past, length in ((0, 9), (9, 1)):
            mixer(inputs(length, torch.float32), plain(length, past), cache)
    assert cache.states["key"].dtype == cache.states["value"].dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Numbers of the largest array that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.size = max(
            self.size,
            *(x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(made) if hasattr(x, "itemsize")),
            0,
        )
        return made


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"softmax", "mla"}))
def test_no_array_is_as_large_as_every_pair_of_tokens(name):
    """Forward and backward, without global tokens; twice the length makes arrays twice as large, and not four times."""
    given = {"window": 100, "sinks": 3} if name == "sliding" else SETTINGS.get(name, {})
    mixer = MixerConfig.registry[name](**given).build(grouped(name, SHAPE))
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    sizes = []
    for length in (1024, 2048):
        with Largest() as largest:
            mixer(inputs(length, torch.float32, batch=1), plain(length)).square().sum().backward()
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 2048**2 / 4


@pytest.mark.parametrize("name", [name for name in NAMES if "initial_rates" in MixerConfig.registry[name].model_fields])
def test_decays_begin_where_they_are_asked_to(name):
    shape = replace(grouped(name, SHAPE), num_heads=64, num_kv_heads=64)
    for given in ({}, {"initial_rates": (0.01, 0.1)}):
        torch.manual_seed(0)
        mixer = MixerConfig.registry[name](**given)
        least, most = mixer.initial_rates
        rates = mixer.build(shape).initial()["log_rate"].exp()
        assert least <= rates.min() < least + 0.1 * (most - least)
        assert most - 0.1 * (most - least) < rates.max() <= most


def first_values(name, **given):
    """What the module begins with beside the model's matrices, with parts' own under their names."""
    torch.manual_seed(0)
    shape = replace(grouped(name, SHAPE), num_heads=64, num_kv_heads=64)
    mixer = MixerConfig.registry[name](**SETTINGS.get(name, {}) | given).build(shape)
    return {
        f"{part}.{own}".lstrip("."): values
        for part, module in mixer.named_modules()
        for own, values in getattr(module, "initial", dict)().items()
    }


DECAYS, CONVOLUTION = {"log_rate", "step_bias"}, {"conv.weight"}
BEGUN = {
    "deltanet": CONVOLUTION,
    "gated-deltanet": DECAYS | CONVOLUTION,
    "gla": {"decay_bias"},
    "kda": DECAYS | CONVOLUTION,
    "mamba2": DECAYS | CONVOLUTION | {"conv.bias", "skip", "o_norm.weight"},
    "performer": {"directions"},
}
"""By mixer: what begins neither as matrices nor at 1 as norms do, or is said to begin at 1."""


@every_mixer
def test_what_begins_in_its_own_way(name):
    found = first_values(name)
    assert set(found) == BEGUN.get(name, set())
    if "conv.weight" in found:  # as torch's convolution over so many taps begins
        bound = MixerConfig.registry[name]().conv ** -0.5
        assert 0.98 * bound < found["conv.weight"].max() <= bound
        assert -bound <= found["conv.weight"].min() < -0.98 * bound
        assert found["conv.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.05)
    if "step_bias" in found:  # steps of time from 0.001 to 0.1, evenly in their logarithm
        steps = F.softplus(found["step_bias"]).log10()
        assert -3.0001 < steps.min() < -2.9
        assert -1.1 < steps.max() < -0.9999
        assert steps.mean() == pytest.approx(-2, abs=0.2)
    for own, value in {"conv.bias": 0, "skip": 1, "o_norm.weight": 1, "decay_bias": 0}.items():
        assert own not in found or bool((found[own] == value).all())


def test_untrained_decays_begin_with_the_bias_that_is_given():
    assert bool((first_values("gla", initial_bias=-2.5)["decay_bias"] == -2.5).all())


def test_what_a_mixer_built_on_another_must_add():
    """Python says so of a class that lacks it."""
    asked = {Mixer: {"forward"}, HeadsMixer: {"mix"}, KernelMixer: {"features"}, DeltaMixer: {"log_decay", "finish"}}
    assert {kind: set(kind.__abstractmethods__) for kind in asked} == asked


@every_mixer
def test_methods_are_called_as_those_that_they_stand_for(name):
    config_of = MixerConfig.registry[name]
    for kind in {*config_of.__mro__, *type(config(name).build(grouped(name, SHAPE))).__mro__}:
        for method, own in vars(kind).items():
            stood_for = next((getattr(base, method) for base in kind.__mro__[1:] if method in vars(base)), None)
            if kind.__module__.startswith("llmeff.attention") and inspect.isfunction(own) and method[0] != "_":
                asked = [] if stood_for is None else inspect.signature(stood_for).parameters.values()
                found = inspect.signature(own).parameters
                assert all(found[each.name].kind == each.kind for each in asked if each.name in found)


def test_a_name_that_is_none_is_answered_with_the_nearest():
    known = f"Known: {', '.join(NAMES)}."
    assert MixerConfig.registry.unknown("softmx") == f"unknown mixer 'softmx'. Did you mean 'softmax'? {known}"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([3.0, 1.0], r"higher than the second: \[3.0, 1.0\]. Give the lowest rate first, then the highest"),
        ([0.0, 1.0], "greater than 0"),
        ([1.0], "required"),
    ],
)
def test_rates_of_decay_that_are_none(given, problem):
    for name in NAMES:
        if "initial_rates" in MixerConfig.registry[name].model_fields:
            with pytest.raises(ConfigError, match=problem):
                validate(MixerConfig.registry[name], {"initial_rates": given})
