"""Checks for every mixer: its forms agree with one another and with a formula, and it costs what its law states."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmeff.attention import MixerConfig
from llmeff.attention.mixer import Mixer, MixerShape
from llmeff.core.layout import Layout
from llmeff.core.meters import count_flops, saved_bytes
from llmeff.cost.price import Kind
from llmeff.cost.workload import Workload
from llmeff.models import DecoderConfig
from llmeff.models.transformer import LayerConfig
from llmeff.testing.failed import CheckFailed, require, require_close

SHAPE = MixerShape(width=12, num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=1e4, norm_eps=1e-5)
"""Default widths for checks. A mixer that cannot share key-value heads gets as many of them as query heads."""
WORKLOADS = (
    Workload(num_sequences=2, num_tokens=83),
    Workload(num_sequences=2, num_tokens=66, packed=True, recompute=True),
    Workload(num_sequences=2, num_tokens=110, precision_name="bf16"),
)
"""Steps whose price is checked. Their sequences are longer than a chunk of a scan."""

Formula = Callable[[Any, Tensor], Tensor]
"""Function of (module, x) that returns the mixer's output, computed by the equations of its source. x is one document,
(T, D) in float64, and so is the output."""


def check_mixer(config: MixerConfig, formula: Formula | None = None, *, shape: MixerShape = SHAPE) -> None:
    """Runs the checks that llmeff's own mixers pass, on the CPU, in float64 unless a check names another format.

    No token may depend on later tokens, other documents or padding. Decoding with a cache, token by token or in pieces,
    must give the result of one pass. A cache must have the bytes that `cache_bytes` states. Results in half precision
    must be close to those in float64. A second derivative must be right, or refused with an error. The mixer must
    compile to one graph. Parameters, buffers, saved bytes and FLOPs must match its law. Given a formula, values and
    gradients must match it.

    Args:
        config: config of the mixer, with settings for which a dozen tokens exercise all its parts.
        formula: equations of the mixer's source, written out. None to skip their check.
        shape: widths of the mixer, with the number of key-value heads from `grouped`.

    Raises:
        CheckFailed: a check failed. The message states what differs.
    """
    for check in CHECKS:
        check(config, shape)
    if formula is not None:
        check_formula(config, formula, shape)


class Kept:
    """Simple layer cache that stores every state by name."""

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, H) keys and values; returns all of them, (B, K, S, H)."""
        for name, new in (("key", key), ("value", value)):
            self.states[name] = torch.cat((self.states[name], new), dim=2) if name in self.states else new
        return self.states["key"], self.states["value"]

    def recall(self, name: str) -> Tensor | None:
        """Returns the state that was kept under a name, or None if there is none."""
        return self.states.get(name)

    def keep(self, name: str, state: Tensor) -> None:
        """Stores a state under a name, replacing the previous state."""
        self.states[name] = state


def grouped(config: MixerConfig, shape: MixerShape) -> MixerShape:
    """Returns the shape with half as many key-value heads as query heads, or equally many if the mixer needs this."""
    half = replace(shape, num_kv_heads=shape.num_heads // 2)
    return replace(shape, num_kv_heads=shape.num_heads) if config.problems(half) else half


def build(config: MixerConfig, shape: MixerShape = SHAPE, dtype: torch.dtype = torch.float64) -> Mixer:
    """Builds the module for the grouped shape, with weights so large that all its parts affect the result."""
    torch.manual_seed(0)
    mixer = config.build(grouped(config, shape))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0.0, 0.5)
        for module in mixer.modules():
            for name, values in getattr(module, "initial", dict)().items():
                getattr(module, name).copy_(values + 0.2 * torch.randn_like(values))
    return mixer.to(dtype)


def inputs(length: int, dtype: torch.dtype = torch.float64, batch: int = 2, width: int = SHAPE.width) -> Tensor:
    """Returns (B, T, D) random numbers in a leaf tensor that requires a gradient."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def plain(length: int, past: int = 0) -> Layout:
    """Returns a layout with one document per row: `length` tokens after `past` cached tokens."""
    return Layout.plain(length, torch.device("cpu"), past)


def gradients(out: Tensor, sources: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of `sources`, given a fixed random gradient of `out`."""
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.autograd.grad((out * above).sum(), sources)


def _name(config: MixerConfig) -> str:
    return f"mixer {config.name!r}"


def _drawn(config: MixerConfig, shape: MixerShape, length: int) -> tuple[Mixer, Tensor]:
    return build(config, shape), inputs(length, width=shape.width)


# -- the checks of every mixer


def check_registered(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that the mixer is registered under its name, supports the widths, and has the projection `o_proj`."""
    registry = MixerConfig.registry
    is_known = config.name in registry and registry[config.name] is type(config)
    require(is_known, f"{_name(config)} is not registered under that name. Registered: {', '.join(registry.names())}")
    problems = config.problems(grouped(config, shape))
    require(not problems, f"{_name(config)} does not support {grouped(config, shape)}: {'; '.join(problems)}")
    shapes = {name: parameter.shape for name, parameter in build(config, shape).named_parameters()}
    output = shapes.get("o_proj.weight")
    what = f"{_name(config)}: o_proj.weight, which writes into the residual stream, has shape"
    require(
        output is not None and output[0] == shape.width,
        f"{what} {output and tuple(output)}, but must have {shape.width} rows",
    )


def check_causality(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that no token depends on later tokens, and that each depends on itself and on the token before it."""
    mixer, x = _drawn(config, shape, 20)
    out = mixer(x, plain(20))
    (grad,) = torch.autograd.grad(out[:, 9].square().sum(), x)
    later = grad[:, 10:].any(-1).any(0).nonzero().flatten().tolist()
    require(not later, f"{_name(config)}: token 9 depends on the later tokens {[10 + place for place in later]}")
    seen = bool((grad[:, [8, 9]] != 0).any(-1).all())
    require(seen, f"{_name(config)}: token 9 must depend on itself and on token 8, but does not depend on both")
    changed = torch.cat((x[:, :10], x[:, 10:] * 3), dim=1)
    what = f"{_name(config)}: output of tokens 0 to 9 after later tokens changed"
    require_close(what, mixer(changed, plain(20))[:, :10], out[:, :10], 1e-12)


def check_decoding(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that decoding with a cache, token by token or in pieces, gives the result of one pass without it."""
    mixer, x = _drawn(config, shape, 12)
    x = x.detach()
    for sizes in ((1,) * 12, (5, 4, 3), (7, 1, 4)):
        cache, past, pieces = Kept(), 0, []
        for piece in x.split(sizes, dim=1):
            pieces.append(mixer(piece, plain(piece.shape[1], past), cache))
            past += piece.shape[1]
        what = f"{_name(config)} with a cache, in pieces of {sizes} tokens"
        require_close(what, torch.cat(pieces, dim=1), mixer(x, plain(12)), 1e-9)


def check_packing(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that documents packed in one row have the values and gradients of separate documents."""
    (mixer, x), lengths = _drawn(config, shape, 80), (5, 1, 60, 14)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].expand(2, -1)
    found = mixer(x, Layout(positions=positions, documents=documents))
    expected = torch.cat([mixer(part, plain(part.shape[1])) for part in x.split(lengths, dim=1)], dim=1)
    require_close(f"{_name(config)}: output for packed documents", found, expected, 1e-9)
    grads = [gradients(out, x)[0] for out in (found, expected)]
    require_close(f"{_name(config)}: input gradient for packed documents", grads[0], grads[1], 1e-8)


def check_padding(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that padding on the left changes no result, makes no NaN and gets no gradient, also with a cache."""
    mixer, x = _drawn(config, shape, 12)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    positions = (padding.long().cumsum(-1) - 1).clamp(min=0)
    cache, pieces = Kept(), []
    for start, end in ((0, 3), (3, 10), (10, 11), (11, 12)):
        layout = Layout(positions=positions[:, start:end], padding=padding[:, :end], past=start)
        pieces.append(mixer(x[:, start:end], layout, cache))
    alone, whole = mixer(x[:1, 5:], plain(7)), mixer(x[1:], plain(12))
    forms = {
        "without a cache": mixer(x, Layout(positions=positions, padding=padding)),
        "with a cache": torch.cat(pieces, 1),
    }
    for form, found in forms.items():
        what = f"{_name(config)} {form}"
        require(bool(found.isfinite().all()), f"{what}: padding leads to numbers that are not finite")
        require_close(f"{what}: output for the row with padding", found[:1, 5:], alone, 1e-9)
        require_close(f"{what}: output for the row without padding", found[1:], whole, 1e-9)
        (grad,) = gradients(found.masked_fill(~padding[..., None], 0), x)
        require(not grad[0, :5].any(), f"{what}: padding must not get a gradient, but does")


def check_cache_bytes(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that a cache has the bytes that `cache_bytes` states, in float32, in bfloat16 and under autocast."""
    for form, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("autocast", torch.float32)):
        mixer, cache = build(config, shape, dtype), Kept()
        number_bytes = 4 if form == "fp32" else 2
        for past, length in ((0, 9), (9, 1)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
                mixer(inputs(length, dtype, width=shape.width), plain(length, past), cache)
            kept = sum(state.untyped_storage().nbytes() for state in cache.states.values())
            stated = 2 * config.cache_bytes(grouped(config, shape), past + length, number_bytes)
            what = f"{_name(config)} in {form}: the cache of two rows of {past + length} tokens"
            require(kept == stated, f"{what} has {kept} bytes, but cache_bytes states {stated}")


def check_second_derivative(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that a second derivative is right, or refused with an error."""
    mixer, x = _drawn(config, shape, 6)

    def loss(given: Tensor) -> Tensor:
        out: Tensor = mixer(given, plain(6)).square().sum()
        return out

    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    try:
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (found,) = torch.autograd.grad((grad * direction).sum(), x)
    except RuntimeError as error:
        if re.search("only first derivatives|differentiated (only )?once|is not implemented", str(error)):
            return
        raise CheckFailed(f"{_name(config)}: a second derivative fails with {error}") from error
    step = 1e-4
    ends = [torch.autograd.grad(loss(x + sign * step * direction), x)[0] for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    off = float((found - expected).detach().norm() / expected.norm())
    require(
        off <= 1e-4,
        f"{_name(config)}: the second derivative differs from finite differences by {off:.1e}, and is not refused",
    )


def check_half_precision(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that results in bfloat16 and under autocast are close to float64, with finite gradients."""
    for form, dtype in (("bfloat16", torch.bfloat16), ("autocast", torch.float32)):
        mixer, x = build(config, shape, dtype), inputs(20, dtype, width=shape.width)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            out = mixer(x, plain(20))
        require(out.dtype == torch.bfloat16, f"{_name(config)} in {form} returns {out.dtype}, not torch.bfloat16")
        expected = copy.deepcopy(mixer).double()(x.double(), plain(20))
        off = float((out - expected).detach().norm() / expected.detach().norm())
        require(off <= 0.05, f"{_name(config)} in {form} differs from float64 by {off:.2g}. Allowed: at most 0.05")
        out.float().square().sum().backward()
        assert x.grad is not None
        require(bool(x.grad.isfinite().all()), f"{_name(config)} in {form}: the input's gradient is not finite")


def check_buffers(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that the buffers have the bytes that `buffer_bytes` states."""
    widths = grouped(config, shape)
    kept, stated = sum(buffer.nbytes for buffer in config.build(widths).buffers()), config.buffer_bytes(widths, 4)
    require(kept == stated, f"{_name(config)} has buffers of {kept} bytes, but buffer_bytes states {stated}")


def check_compiles(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that the mixer compiles to one graph and matches eager mode, once the layout's tables are prepared."""
    length = 150
    mixer, given, layout = (
        build(config, shape, torch.float32),
        inputs(length, torch.float32, width=shape.width),
        plain(length),
    )
    mixer.prepare(layout, 2, torch.float32)
    out = torch.compile(mixer, backend="eager", fullgraph=True)(given, layout)
    expected = mixer(given, layout)
    leaves = [given, *mixer.parameters()]
    require_close(f"{_name(config)} compiled: output", out, expected, 1e-5)
    for found, wanted in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        require_close(f"{_name(config)} compiled: gradient", found, wanted, 1e-5)


def check_price(config: MixerConfig, shape: MixerShape = SHAPE) -> None:
    """Checks that a layer with the mixer has the parameters, saved bytes and FLOPs that its law states."""
    widths = grouped(config, shape)
    model = DecoderConfig(
        vocab_size=61, width=widths.width, num_layers=1, num_heads=widths.num_heads, num_kv_heads=widths.num_kv_heads,
        head_dim=widths.head_dim, layers=(LayerConfig(has_mlp=False),), mixer=config,
    )  # fmt: skip
    for work in WORKLOADS:
        price, measured = model.price(work), _measured(model, work)
        for kind, found in measured.items():
            stated = price.total(kind)
            where = (
                f"{work.precision_name}{', packed' if work.packed else ''}{', recomputed' if work.recompute else ''}"
            )
            require(
                stated == found, f"{_name(config)} in a step ({where}): {kind} is {found}, but its law states {stated}"
            )


def _measured(config: DecoderConfig, work: Workload) -> dict[Kind, int]:
    torch.manual_seed(0)
    model: Any = config.build()
    model.recompute = work.recompute
    shape = (work.num_sequences, work.num_tokens)
    tokens = torch.randint(61, shape)
    layout = plain(work.num_tokens)
    if work.packed:
        places = torch.arange(work.num_tokens).repeat(work.num_sequences, 1)
        layout = Layout(positions=places % (work.num_tokens // 2), documents=places // (work.num_tokens // 2))

    def loss() -> Tensor:
        with torch.autocast("cpu", getattr(torch, work.precision.compute), enabled=work.precision.autocast):
            summed: Tensor = model(tokens, layout, tokens)
        return summed

    held = [*model.parameters(), *model.buffers(), tokens, layout.positions]
    held += [] if layout.documents is None else [layout.documents]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if work.kernel == "flash" else SDPBackend.MATH):
        flops = count_flops(lambda: loss().backward())
        kept = saved_bytes(loss, held)
    counted = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": counted, "executed_flops": flops, "saved_bytes": kept}


CHECKS: tuple[Callable[[MixerConfig, MixerShape], None], ...] = (
    check_registered,
    check_causality,
    check_decoding,
    check_packing,
    check_padding,
    check_cache_bytes,
    check_second_derivative,
    check_half_precision,
    check_buffers,
    check_compiles,
    check_price,
)
"""The checks that `check_mixer` runs before that of the formula, in this order."""


def check_formula(config: MixerConfig, formula: Formula, shape: MixerShape = SHAPE) -> None:
    """Checks that values and gradients equal those of the formula, on a sequence longer than a chunk."""
    mixer, x = _drawn(config, shape, 70)
    sources = {"the input": x, **dict(mixer.named_parameters())}
    found, expected = mixer(x, plain(70)), torch.stack([formula(mixer, row) for row in x])
    require_close(f"{_name(config)}: output, compared with the formula", found, expected, 1e-9)
    pairs = zip(gradients(found, list(sources.values())), gradients(expected, list(sources.values())), strict=True)
    for name, (ours, theirs) in zip(sources, pairs, strict=True):
        require_close(f"{_name(config)}: gradient of {name}, compared with the formula", ours, theirs, 1e-8)
