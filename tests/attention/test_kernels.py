"""Other kernels behind the same mixers give what torch's own forms give; which ran is known; what lacks is said."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmeff.attention import MixerConfig, Sliding, Softmax, fla, flex
from llmeff.attention.mixer import MixerShape
from llmeff.attention.scan import ScanConfig, scan
from llmeff.config.run import RunConfig
from llmeff.core import kernels
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.layout import Layout
from llmeff.core.meters import count_step
from llmeff.run.loop import train
from tests.mixers import Kept
from tests.run.test_loop import TINY

SHAPE = MixerShape(width=32, num_heads=4, num_kv_heads=2, head_dim=16, rope_theta=1e4, norm_eps=1e-5)
LENGTH = 150
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]
HALF, SINGLE, GPU = torch.bfloat16, torch.float32, torch.device("cuda")
SCANS = [name for name in MixerConfig.registry.names() if issubclass(MixerConfig.registry[name], ScanConfig)]


def documents(device):
    """(2, T): two documents of a row, three of the other."""
    cuts = torch.zeros(2, LENGTH, dtype=torch.int64, device=device)
    cuts[0, 61] = cuts[1, 20] = cuts[1, 130] = 1
    return cuts.cumsum(1)


def layouts(device):
    apart, places = documents(device), torch.arange(LENGTH, device=device)
    begins = torch.where(F.pad(apart[:, 1:] != apart[:, :-1], (1, 0)), places, 0).cummax(1).values
    padding = torch.ones(2, LENGTH, dtype=torch.bool, device=device)
    padding[0, :9] = padding[1, :70] = False
    return {
        "plain": Layout.plain(LENGTH, torch.device(device)),
        "packed": Layout(positions=places - begins, documents=apart),
        "padded": Layout(positions=(padding.cumsum(-1) - 1).clamp(min=0), padding=padding),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize(
    "config",
    [Softmax(), Softmax(qk_norm=True), Sliding(window=20), Sliding(window=20, sinks=3, global_every=11)],
    ids=["softmax", "qk norm", "sliding", "sinks and global"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_gives_what_sdpa_gives(config, kind, device, monkeypatch):
    taken = []
    monkeypatch.setattr(flex, "takes", lambda kernel, query, cache: kernel == "flex" and not taken.append(kernel))
    torch.manual_seed(0)
    module = config.build(SHAPE).to(device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other = config.model_copy(update={"kernel": "flex"}).build(SHAPE).to(device)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, LENGTH, SHAPE.width, device=device)
    layout, again = layouts(device)[kind], layouts(device)[kind]
    real = torch.ones(2, LENGTH, device=device) if layout.padding is None else layout.padding.float()
    has_gradient = device != "cpu"  # torch's FlexAttention has none there
    found = []
    with torch.set_grad_enabled(has_gradient):
        for each, own in ((module, layout), (other, again)):
            given = x.clone().requires_grad_(has_gradient)
            out = each(given, own) * real[..., None]
            found.append([out, *(torch.autograd.grad(out.square().sum(), given) if has_gradient else ())])
    assert bool(taken) == (kind != "plain" or config.name == "sliding")
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3 if has_gradient else 1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_makes_one_mask_for_all_layers(monkeypatch):
    monkeypatch.setattr(flex, "takes", lambda kernel, query, cache: kernel == "flex")
    module = Sliding(window=20, kernel="flex").build(SHAPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    layout, x = layouts("cpu")["packed"], torch.randn(2, LENGTH, SHAPE.width)
    with torch.no_grad():
        module(x, layout)
        made = dict(layout._tables)
        module(x, layout)
    assert layout._tables == made


needs_fla = pytest.mark.skipif(not fla.is_installed(), reason="flash-linear-attention, or Triton, is not installed")


INTERPRETED = [pytest.param("cpu", marks=needs_fla), pytest.param("cuda", marks=[needs_fla, *DEVICES[1].marks])]


@pytest.mark.parametrize("device", INTERPRETED)
@pytest.mark.parametrize("kind", ["a state before", "documents"])
@pytest.mark.parametrize("has_beta", [False, True], ids=["sum", "delta rule"])
@pytest.mark.parametrize("decays", [None, "fixed", 1, 16], ids=["no decay", "fixed", "of heads", "of channels"])
def test_flash_linear_attention_gives_what_the_scan_gives(decays, has_beta, kind, device, interpreted):
    if device == "cuda" and fla.is_flawed() and (decays == 1 or (has_beta and decays != 16)):
        pytest.skip(f"flash-linear-attention {fla.FLAW}")
    torch.manual_seed(0)
    length, width = 70, 16

    def drawn(*shape):
        return torch.randn(2, length, 2, *shape, device=device)

    query, key, value = 0.3 * drawn(width), F.normalize(drawn(width), dim=-1), drawn(width)
    log_decay = None
    if decays == "fixed":
        log_decay = -0.3 * torch.rand(2, 1, device=device).expand(2, length, 2, 1)
    elif decays:
        log_decay = -0.3 * drawn(decays).sigmoid()
    beta = drawn().sigmoid() if has_beta else None
    state = 0.5 * torch.randn(2, 2, width, width, device=device) if kind == "a state before" else None
    apart = None if state is not None else documents(device)[:, :length]
    rows = [query, key, value, log_decay, beta]
    leaves = [x.requires_grad_() for x in rows if x is not None and not (x is log_decay and decays == "fixed")]
    weight = drawn(width)

    layout = Layout(positions=torch.arange(length, device=device)[None], documents=apart)
    got, end = fla.scan(*rows, layout, state, torch.float32)
    gradients = torch.autograd.grad((got * weight).sum(), leaves)
    turned = [None if x is None else x.transpose(1, 2) for x in rows]
    expected, expected_end = scan(*turned, documents=apart, state=state)
    expected = expected.transpose(1, 2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 1e-2, "atol": 5e-3}  # products in TF32
    torch.testing.assert_close(got, expected, **tolerance)
    if state is None:
        assert end is None
    else:
        torch.testing.assert_close(end, expected_end, **tolerance)
    for own, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(own, theirs, **tolerance)


FUSED = [name for name in SCANS if MixerConfig.registry[name].fuses]
"""Mixers of which flash-linear-attention computes more than the scan."""


def counted(monkeypatch, called):
    owns = {part: getattr(fla, part) for name in FUSED for part in MixerConfig.registry[name].fuses}

    def run(part, *given):
        called.add(part)
        return owns[part](*given)

    for part in owns:
        monkeypatch.setattr(fla, part, partial(run, part))


@pytest.mark.parametrize("device", INTERPRETED)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("plain", SINGLE), ("packed", SINGLE), ("padded", SINGLE), ("plain", torch.float16)], ids=str
)
@pytest.mark.parametrize("name", FUSED)
def test_what_stands_around_the_scan_is_the_same_by_flash_linear_attention(
    name, kind, dtype, device, interpreted, monkeypatch
):
    """Convolutions, norms and decays: values, and gradients of what came in and of all weights."""
    module = built(name).to(device)
    x = torch.randn(2, LENGTH, SHAPE.width, device=device)
    layout = layouts(device)[kind]
    real = torch.ones(2, LENGTH, device=device) if layout.padding is None else layout.padding.float()
    monkeypatch.setattr(fla, "takes", lambda *given: False)
    found, called = [], set()
    counted(monkeypatch, called)
    for is_fused in (False, True):
        monkeypatch.setattr(fla, "fuses", lambda *given, is_fused=is_fused: is_fused)
        assert not called
        if is_fused:  # beside what torch gives in float32
            module = module.to(dtype)
        given = x.to(dtype if is_fused else SINGLE).requires_grad_()
        out = module(given, layouts(device)[kind])
        assert out.dtype == given.dtype
        out = out.float() * real[..., None]
        found.append([out, *torch.autograd.grad(out.square().sum(), [given, *module.parameters()])])
    assert called == MixerConfig.registry[name].fuses
    for expected, got in zip(*found, strict=True):
        scale = expected.detach().abs().max().item()
        if dtype == SINGLE:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, scale))
        else:
            assert (got.float() - expected).norm() <= 0.02 * expected.norm()


def test_decoding_leaves_what_stands_around_a_scan_to_torch(monkeypatch):
    monkeypatch.setattr(fla, "takes", lambda kernel, dtype, device: kernel == "auto")
    with kernels.noted() as ran:
        assert not fla.fuses("auto", HALF, GPU, Kept())
        assert not fla.fuses("torch", HALF, GPU, None)
        assert not ran
        assert fla.fuses("auto", HALF, GPU, None)
    assert ran == {"around the scan: flash-linear-attention": False}


def test_rows_that_a_kernel_does_not_take_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(fla, "takes", lambda *given: True)
    monkeypatch.setattr(fla, "fuses", lambda *given: False)
    monkeypatch.setattr(fla, "is_flawed", lambda: True)
    monkeypatch.setattr(fla, "scan", lambda *given: pytest.fail("handed to the kernel"))
    with kernels.noted() as ran:
        built("gated-deltanet")(torch.randn(2, 10, SHAPE.width), Layout.plain(10, torch.device("cpu")))
    assert set(ran) == {"scan: torch"}
    odd, even = torch.zeros(2, 5, 2, 3), torch.zeros(2, 5, 2, 4)
    assert fla.can_scan(odd, even, None, None, SINGLE)
    assert not fla.can_scan(odd, even, None, None, HALF)
    assert not fla.can_scan(even, odd, None, None, HALF)


@pytest.mark.parametrize("device", INTERPRETED)
def test_the_delta_rule_in_half_precision_is_a_kernel_of_its_own(device, interpreted):
    torch.manual_seed(0)
    query, key, value = (0.5 * torch.randn(2, 70, 2, 16, device=device) for _ in range(3))
    key, beta = F.normalize(key, dim=-1), torch.rand(2, 70, 2, device=device)
    layout = Layout.plain(70, torch.device(device))
    got, end = fla.scan(query, key, value, None, beta, layout, None, torch.float16)
    assert got.dtype == torch.float16
    turned = [x.transpose(1, 2) for x in (query, key, value)]
    expected, expected_end = scan(*turned, None, beta.transpose(1, 2))
    torch.testing.assert_close(got.float(), expected.transpose(1, 2), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(end, expected_end, rtol=1e-2, atol=1e-2)


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("capability", "triton", "flawed"),
    [(HOPPER, "3.6.0", True), (HOPPER, "3.4.0+git", True), (HOPPER, "3.7.1", False), (HOPPER, "3.3.1", False),
     (AMPERE, "3.6.0", False)],
)  # fmt: skip
def test_a_kernel_whose_gradients_are_wrong_is_left_to_torch_or_refused(capability, triton, flawed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(fla, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(fla, "is_flawed", fla.is_flawed.__wrapped__)
    assert fla.is_flawed() == flawed
    rows = (torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 4))
    of_heads, of_channels, beta = torch.zeros(2, 5, 2, 1), torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2)
    fixed = torch.zeros(2, 1).expand(2, 5, 2, 1)
    assert fla.can_scan(*rows, of_heads, None, HALF) == fla.can_scan(*rows, of_heads, beta, HALF) == (not flawed)
    assert fla.can_scan(*rows, None, beta, SINGLE) == fla.can_scan(*rows, fixed.clone(), None, HALF) == (not flawed)
    assert all(
        fla.can_scan(*rows, *own, HALF) for own in ((None, None), (fixed, None), (None, beta), (of_channels, beta))
    )
    learned = torch.zeros(2, 1, requires_grad=True).expand(2, 5, 2, 1)  # that kernel has no gradient of its decays
    assert fla.can_scan(*rows, learned, None, HALF) == (not flawed)
    refused = {
        name for name in SCANS if MixerConfig.registry[name](kernel="fla").missing_requirements(SHAPE, on_cpu=False)
    }
    assert refused == ({"performer", "mamba2", "gated-deltanet"} if flawed else set())


def test_documents_of_all_rows_stand_one_after_another():
    apart = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [3, 4, 4, 5]])
    assert fla._bounds(apart).tolist() == [0, 2, 4, 8, 9, 11, 12]


@pytest.mark.parametrize(
    ("kernel", "dtype", "device", "taken"),
    [
        ("auto", HALF, GPU, True),
        ("auto", torch.float16, GPU, True),
        ("auto", SINGLE, GPU, False),
        ("fla", SINGLE, GPU, True),
        ("torch", HALF, GPU, False),
        ("auto", HALF, torch.device("cpu"), False),
        ("fla", HALF, torch.device("cpu"), False),
    ],
)
def test_flash_linear_attention_is_taken_on_gpus_where_it_is_there(kernel, dtype, device, taken, monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: True)
    assert fla.takes(kernel, dtype, device) == taken
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not fla.takes(kernel, dtype, device)
    monkeypatch.undo()
    monkeypatch.setattr(fla, "is_installed", lambda: False)
    assert not fla.takes(kernel, dtype, device)


def built(name, **fields):
    torch.manual_seed(0)
    shape = replace(SHAPE, num_kv_heads=SHAPE.num_heads)
    module = MixerConfig.registry[name](**fields).build(shape)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for part, first in module.initial().items():
        module.get_buffer(part).copy_(first) if part in dict(module.named_buffers()) else None
    return module


@pytest.mark.parametrize("name", SCANS)
def test_half_precision_is_that_of_products(name, monkeypatch):
    """Also where a mixer widens what it hands on, but for those whose sums are float32."""
    asked = []
    monkeypatch.setattr(fla, "takes", lambda kernel, dtype, device: asked.append(dtype))
    monkeypatch.setattr(fla, "fuses", lambda *given: False)
    x, layout = torch.randn(2, 10, SHAPE.width), Layout.plain(10, torch.device("cpu"))
    module = built(name)
    with torch.autocast("cpu", torch.bfloat16):
        module(x, layout)
    module.bfloat16()(x.bfloat16(), layout)
    module.float()(x, layout)
    half = SINGLE if name in ("linear", "performer") else HALF
    assert asked == [half, half, SINGLE]


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_a_mixer_hands_the_other_kernel_what_it_hands_the_scan(name, kind, monkeypatch):
    def scanned(query, key, value, log_decay, beta, layout, state, dtype):
        rows = [None if x is None else x.float().transpose(1, 2) for x in (query, key, value, log_decay, beta)]
        mixed, end = scan(*rows, documents=layout.documents, state=state)
        return mixed.transpose(1, 2), end

    x, module = torch.randn(2, LENGTH, SHAPE.width), built(name)
    expected = module(x, layouts("cpu")[kind])
    monkeypatch.setattr(fla, "takes", lambda kernel, dtype, device: True)
    monkeypatch.setattr(fla, "fuses", lambda *given: False)
    monkeypatch.setattr(fla, "can_scan", lambda *given: True)
    monkeypatch.setattr(fla, "scan", scanned)
    torch.testing.assert_close(module(x, layouts("cpu")[kind]), expected)
    if kind == "plain":  # a prompt, and then token by token after the state that is kept
        cache = Kept()
        parts = [module(x[:, :-2], Layout.plain(LENGTH - 2, x.device), cache)]
        parts += [module(x[:, t : t + 1], Layout.plain(1, x.device, past=t), cache) for t in (LENGTH - 2, LENGTH - 1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_meters_see_no_kernel_that_they_cannot_look_into():
    query = SimpleNamespace(is_cuda=True)
    assert flex.takes("flex", query, None)
    with kernels.noted() as ran:
        _, noted = count_step(lambda: ran.update(inside=flex.takes("flex", query, None)))
    assert ran == {"inside": False}
    assert noted == ("attention: torch FlexAttention, counted as sdpa",)
    assert not flex.takes("sdpa", query, None)
    assert not flex.takes("flex", query, Kept())


def test_a_mask_of_one_row_of_documents_and_padding_of_several():
    documents = torch.tensor([[0] * 20 + [1] * 20])
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, -5:] = False
    layout = Layout(positions=torch.arange(40)[None] % 20, documents=documents, padding=padding)
    assert flex.block_mask(layout, "all", lambda query, key: (key >= 0) & (key <= query)).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "ran"),
    [
        ("softmax", ("attention: torch sdpa, scaled_dot_product_flash_attention_for_cpu",)),
        ("gated-deltanet", ("scan: torch",)),
        ("linear", ("scan: torch",)),
    ],
)
def test_a_run_records_which_kernels_ran(tmp_path, name, ran):
    result = train(validate(RunConfig, override(TINY, [f"model.mixer={name}"])), tmp_path / "run")
    assert result.kernels == ran
    assert result.error["executed_flops"] == 0


@pytest.mark.parametrize("name", SCANS)
def test_a_kernel_that_is_not_installed_is_an_error_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: False)
    config = validate(RunConfig, override(TINY, [f"model.mixer={name}", "model.mixer.kernel=fla"]))
    words = f"mixer '{name}': kernel 'fla' needs flash-linear-attention 0.6 or newer, with Triton. To install it: pip install \"llmeff\\[fla\\]\""
    with pytest.raises(ConfigError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_too_wide_for_a_kernel_are_refused_or_left_to_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: True)
    shape = replace(SHAPE, head_dim=512)
    words = "mixer 'kda': kernel 'fla' supports a head_dim of at most 256, but head_dim is 512"
    assert MixerConfig.registry["kda"](kernel="fla").missing_requirements(shape, on_cpu=False) == [words]
    assert not MixerConfig.registry["gla"](kernel="fla").missing_requirements(shape, on_cpu=False)
    with torch.device("meta"):
        assert MixerConfig.registry["kda"]().build(shape).kernel == "torch"
        assert MixerConfig.registry["kda"]().build(SHAPE).kernel == "auto"


@pytest.mark.parametrize(("name", "kernel", "other"), [("sliding", "flex", "sdpa"), ("kda", "fla", "auto")])
def test_a_kernel_of_gpus_is_refused_on_the_cpu(name, kernel, other, tmp_path, monkeypatch):
    monkeypatch.setattr(fla, "is_installed", lambda: True)
    config = validate(RunConfig, override(TINY, [f"model.mixer={name}", f"model.mixer.kernel={kernel}"]))
    with pytest.raises(ConfigError, match=f"kernel '{kernel}' .* only on GPUs.*use '{other}'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_on_the_cpu_a_model_of_another_kernel_is_read_as_sdpa_reads_it():
    module = Sliding(window=20, kernel="flex").build(SHAPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with kernels.noted() as ran:
        module(torch.randn(2, LENGTH, SHAPE.width), layouts("cpu")["plain"]).sum().backward()
    assert set(ran) == {kernels.SDPA}


def test_a_wrong_kernel_is_named():
    with pytest.raises(ConfigError, match=r"model\.mixer.*kernel"):
        validate(RunConfig, override(TINY, ["model.mixer=gla", "model.mixer.kernel=flaa"]))
