"""The recurrence: chunks against single steps in float64, values and gradients, over every kind of decay and rule."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from llmeff.attention import MixerConfig, fla
from llmeff.attention.scan import BLOCK, CHUNK, LEAST, SEGMENT, ScanConfig, mix, scan, step
from llmeff.core import kernels
from llmeff.core.layout import Layout
from llmeff.testing.mixers import SHAPE
from tests.mixers import NAMES, Kept

KINDS = list(itertools.product([None, "head", "channel"], [False, True]))
every_kind = pytest.mark.parametrize(("decays", "has_delta"), KINDS)


def inputs(decays, has_delta, length=50, batch=2, heads=3, width=8, values=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (batch, heads, length)
    key = torch.nn.functional.normalize(normal(*shape, width), dim=-1)
    given = {"query": normal(*shape, width), "key": key, "value": normal(*shape, values)}
    if decays is not None:
        given["log_decay"] = -normal(*shape, 1 if decays == "head" else width).exp() * 0.3
        given["log_decay"] = given["log_decay"].clamp(min=-5)
    if has_delta:
        given["beta"] = normal(*shape).sigmoid()
    return {name: x.to(dtype).requires_grad_() for name, x in given.items()}


def stepwise(given, documents=None, state=None):
    query, key, value = given["query"], given["key"], given["value"]
    batch, heads, length, width = key.shape
    if state is None:
        state = value.new_zeros(batch, heads, width, value.shape[-1])
    out = []
    for t in range(length):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        log_decay, beta = given.get("log_decay"), given.get("beta")
        mixed, state = step(
            query[:, :, t], key[:, :, t], value[:, :, t],
            None if log_decay is None else log_decay[:, :, t],
            None if beta is None else beta[:, :, t],
            state,
        )  # fmt: skip
        out.append(mixed)
    return torch.stack(out, dim=2), state


def gradients(given, run):
    out, end = run(given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    ends = torch.randn(end.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weights).sum() + (end * ends).sum(), list(given.values()))
    return {"out": out, "end": end} | dict(zip(given, found, strict=True))


def assert_same(found, expected, tolerance, scale=None):
    """Within a part of each tensor's own largest number, or of `scale`."""
    for name, values in expected.items():
        own = float(values.detach().abs().max()) if scale is None else scale
        torch.testing.assert_close(
            found[name].double(), values, rtol=0, atol=tolerance * own, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_kind
@pytest.mark.parametrize("length", [1, 16, 50, 64])
def test_chunks_are_the_steps(decays, has_delta, length):
    given = inputs(decays, has_delta, length)
    expected = gradients(given, stepwise)
    for chunk in (16, 32):
        assert_same(gradients(given, lambda own, c=chunk: scan(**own, chunk=c, segment=2 * c)), expected, 1e-11)


@every_kind
def test_in_float32_it_is_the_steps_of_float64(decays, has_delta):
    given = inputs(decays, has_delta, 200, width=32, values=32)
    expected = gradients(given, stepwise)
    single = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    assert_same(gradients(single, lambda own: scan(**own)), expected, 1e-5)


@every_kind
def test_documents_of_a_row_do_not_see_one_another(decays, has_delta):
    given = inputs(decays, has_delta, 70)
    documents = torch.stack((torch.arange(70) // 17, (torch.arange(70) >= 32).long() + (torch.arange(70) >= 33)))
    assert_same(
        gradients(given, lambda own: scan(**own, documents=documents, chunk=16, segment=32)),
        gradients(given, lambda own: stepwise(own, documents)),
        1e-11,
    )


@every_kind
def test_a_state_goes_on(decays, has_delta):
    given = inputs(decays, has_delta, 50)
    whole, end = scan(**given, chunk=16, segment=16)
    first = {name: x[:, :, :21] for name, x in given.items()}
    second = {name: x[:, :, 21:] for name, x in given.items()}
    out, state = scan(**first, chunk=16)
    torch.testing.assert_close(out, whole[:, :, :21])
    out, state = scan(**second, state=state, chunk=32)
    torch.testing.assert_close(out, whole[:, :, 21:])
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("has_delta", [False, True])
def test_the_strongest_decays_do_not_overflow(has_delta):
    given = inputs("channel", has_delta, 64, dtype=torch.float32)
    with torch.no_grad():
        given["log_decay"].fill_(-5.0)
    found = gradients(given, lambda own: scan(**own))
    assert all(bool(x.isfinite().all()) for x in found.values())
    double = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    # where all decays away, the gradient of a decay is what rounding leaves of sums of gradients of keys and queries
    expected = gradients(double, stepwise)
    assert_same(found, expected, 1e-6, scale=max(float(x.detach().abs().max()) for x in expected.values()))


@pytest.mark.parametrize(
    ("num_tokens", "has_cache", "has_documents", "is_whole"),
    [
        (1, False, False, False),
        (2, False, False, True),
        (2, False, True, True),
        (1, True, False, False),
        (2, True, False, True),
        (2, True, True, False),  # the other kernel keeps no state of several documents
    ],
)
def test_the_other_kernel_is_asked_for_more_tokens_than_one(
    num_tokens, has_cache, has_documents, is_whole, monkeypatch
):
    given = {name: x[:, :, :num_tokens].transpose(1, 2) for name, x in inputs("head", True).items()}
    positions = torch.arange(num_tokens)[None].expand(2, -1)
    layout = Layout(positions=positions, documents=torch.zeros_like(positions) if has_documents else None)
    state, cache = torch.ones(2, 3, 8, 5), Kept() if has_cache else None
    asked = []
    monkeypatch.setattr(fla, "takes", lambda kernel, dtype, device: not asked.append((kernel, dtype, device)))
    monkeypatch.setattr(fla, "can_scan", lambda *_: True)
    monkeypatch.setattr(fla, "scan", lambda query, key, value, *_: (value, state))
    with kernels.noted() as ran:
        mixed = mix(**given, layout=layout, cache=cache)
    assert ran == ({"scan: flash-linear-attention": False} if is_whole else {"scan: torch": True})
    assert asked == [("torch", torch.float32, torch.device("cpu"))] * is_whole  # where nothing else is said
    assert (mixed is given["value"]) == is_whole
    assert cache is None or (cache.states["state"] is state) == is_whole


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(MixerConfig.registry[name], ScanConfig)])
@pytest.mark.parametrize(
    ("is_installed", "on_cpu", "is_flawed", "said"),
    [
        (True, False, False, []),
        (False, False, False, [f"kernel 'fla' {fla.MISSING}"]),
        (True, True, True, ["kernel 'fla' runs only on GPUs, but this run is on the CPU; use 'auto'"]),
        (True, False, True, [f"kernel 'fla' {fla.FLAW}, or kernel 'auto'"]),
    ],
)
def test_what_a_kernel_of_gpus_lacks(name, is_installed, on_cpu, is_flawed, said, monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: is_installed)
    monkeypatch.setattr(fla, "is_flawed", lambda: is_flawed)
    asked, usual = (
        MixerConfig.registry[name](kernel=kernel).missing_requirements(SHAPE, on_cpu=on_cpu)
        for kernel in ("fla", "auto")
    )
    gates_heads = name in ("gated-deltanet", "mamba2", "performer")
    assert asked == ([] if is_flawed and not on_cpu and not gates_heads else [f"mixer {name!r}: {own}" for own in said])
    assert usual == []


def test_a_delta_rule_by_a_kernel_of_gpus_has_narrow_keys(monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: True)
    for name in ("deltanet", "gated-deltanet", "kda"):
        asked, usual = (MixerConfig.registry[name](kernel=kernel) for kernel in ("fla", "auto"))
        said = f"mixer {name!r}: kernel 'fla' supports a head_dim of at most 256, but head_dim is 257"
        assert asked.missing_requirements(replace(SHAPE, head_dim=257), on_cpu=False) == [said]
        assert asked.missing_requirements(replace(SHAPE, head_dim=256), on_cpu=False) == []
        assert usual.missing_requirements(replace(SHAPE, head_dim=257), on_cpu=False) == []


def test_blocks_fit_into_chunks_and_chunks_into_segments():
    assert CHUNK % BLOCK == SEGMENT % CHUNK == 0
    assert math.exp(-LEAST * BLOCK) < torch.finfo(torch.float32).max
    assert math.exp(LEAST) == pytest.approx(0.007, abs=5e-4)
