"""Normalization of feature maps, with batch statistics (of one rank or all), group statistics or frozen statistics."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.core import group
from llmeff.cost.tape import Array, Tape

# B batch, C channels, H height, W width

ImageNorm = Literal["batch", "batch_sync", "group", "frozen"]
"""Source of the mean and variance that normalize a feature map. batch: a rank's micro-batch (Ioffe and Szegedy 2015).
batch_sync: the micro-batches of all ranks together. group: each image's channel groups (Wu and He 2018). frozen:
running statistics that never change, which leaves only a scale and a shift per channel."""

EPS = 1e-5
"""Added to the variance, so that nothing is divided by 0."""
_MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics."""

_is_replayed = False
"""Whether the current forward pass is a recomputation. Not a ContextVar, because torch.compile cannot read one."""


@contextlib.contextmanager
def replayed() -> Iterator[None]:
    """Context for recomputing a forward pass. In it, running statistics stay as the first forward pass left them."""
    global _is_replayed
    before, _is_replayed = _is_replayed, True
    try:
        yield
    finally:
        _is_replayed = before


class _SyncedNorm(torch.autograd.Function):
    """Batch normalization with statistics of all ranks.

    In the forward pass, ranks add up sums, sums of squares and counts. In the backward pass, they add up the sums
    that the gradient of `x` needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # torch returns statistics in the format of the running statistics that it is given; x may be in half precision
        unmoved = torch.zeros_like(weight), torch.zeros_like(weight)
        mean, variance = (part.double() for part in torch.batch_norm_update_stats(x, *unmoved, 0.0))
        count = x.numel() // x.shape[1]
        # in double precision, sums of squares keep the accuracy of the float32 mean and variance
        sums = torch.cat([mean * count, (variance + mean * mean) * count, mean.new_tensor([count])])
        sums = group.total(sums)
        num_channels, total = x.shape[1], sums[-1]
        mean, square = sums[:num_channels] / total, sums[num_channels:-1] / total
        variance = (square - mean * mean).clamp(min=0)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.total = total
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=EPS), mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, mean, variance = ctx.saved_tensors
        gradient = gradient.contiguous()
        # With constant statistics: gradient * weight / std, sum of gradient * normalized x, and sum of gradient. The
        # gradient through the statistics, which depend on all ranks' x, is added below.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, EPS, [True, True, True]
        )
        sums = group.total(torch.cat([grad_weight, grad_bias]).double())
        along, shift = (sums / ctx.total).to(weight.dtype).chunk(2)
        inverse = (variance + EPS).rsqrt()
        slope = along * weight * inverse * inverse
        shift = shift * weight * inverse - slope * mean
        shape = (1, -1, 1, 1)
        grad_x.sub_(shift.view(shape)).addcmul_(x, slope.view(shape), value=-1.0)
        return grad_x, grad_weight, grad_bias


_synced_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] = _SyncedNorm.apply


class BatchNorm(nn.Module):
    """Batch normalization of (B, C, H, W). Uses the running statistics in evaluation mode, and if `kind` is "frozen".

    Args:
        num_channels: C, number of channels.
        kind: source of the statistics, see `ImageNorm`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, kind: Literal["batch", "batch_sync", "frozen"]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.kind, self.momentum = kind, _MOMENTUM
        self.is_synced = kind == "batch_sync"

    def forward(self, x: Tensor) -> Tensor:
        """Returns x normalized, (B, C, H, W)."""
        by_batch = self.training and self.kind != "frozen"
        if not (by_batch and self.is_synced and group.is_shared()):
            mean, variance = self.running_mean, self.running_var
            if by_batch and _is_replayed:
                mean, variance = mean.clone(), variance.clone()
            return F.batch_norm(x, mean, variance, self.weight, self.bias, by_batch, self.momentum, EPS)
        y, mean, variance, total = _synced_norm(x, self.weight, self.bias)
        if not _is_replayed:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (total / (total - 1)).to(variance.dtype), self.momentum)
        return y


def build(kind: ImageNorm, num_channels: int, num_groups: int) -> nn.Module:
    """Builds the normalization of `num_channels` channels. `num_groups` is used only if `kind` is "group"."""
    return nn.GroupNorm(num_groups, num_channels, EPS) if kind == "group" else BatchNorm(num_channels, kind)


def law(tape: Tape, x: Array, kind: ImageNorm, num_groups: int) -> Array:
    """Records the price of the normalization on the tape, and returns its output. Call it in the module's scope."""
    num_channels = x.shape[1]
    weight, bias = tape.weight("weight", num_channels), tape.weight("bias", num_channels)
    synced = kind == "batch_sync" and tape.strategy_law.is_shared
    node = tape.save((x, weight, bias), (x, weight), partial(_law_back, tape, weight.shape, synced))
    if synced:
        tape.strategy_law.send("all_reduce", (2 * num_channels + 1) * _DOUBLE)
    y = tape.elementwise(x.shape, x.dtype, node)
    # the saved means and inverse standard deviations; frozen statistics are buffers, which are priced elsewhere
    shape = {"group": (x.shape[0], num_groups), "frozen": (0,)}.get(kind, (num_channels,))
    tape.save_output(node, *(tape.new(shape, "float32") for _ in range(2)))
    return y


_DOUBLE = 8
"""Bytes per number of the float64 sums that ranks add up."""


def _law_back(
    tape: Tape, shape: tuple[int, ...], synced: bool, gradient: Array, x: Array, weight: Array, *_: Array
) -> tuple[Array, Array, Array]:
    if synced:
        tape.strategy_law.send("all_reduce", 2 * weight.size * _DOUBLE)
    return tape.new(x.shape, x.dtype), tape.new(shape, weight.dtype), tape.new(shape, weight.dtype)


@torch.no_grad()
def averaged(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces all running statistics, except frozen ones, by their mean over batches, weighted by image counts.

    Args:
        model: model with normalizations of ours or of torch, updated in place. Its training mode is restored.
        batches: images, (B, 3, H, W) each. All ranks need the same batches, because nothing is communicated.
    """
    norms: list[Any] = [module for module in model.modules() if _moves(module)]
    synced = [norm for norm in norms if isinstance(norm, BatchNorm) and norm.is_synced]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in synced:
        norm.is_synced = False
    num_images = 0
    for images in batches:
        num_images += len(images)
        for norm in norms:
            norm.train()
            norm.momentum = len(images) / num_images
        model(images)
    for norm, (learns, momentum) in zip(norms, before, strict=True):
        norm.train(learns)
        norm.momentum = momentum
    for norm in synced:
        norm.is_synced = True


def _moves(module: nn.Module) -> bool:
    """Returns whether a module, ours or torch's, updates running statistics in training."""
    return isinstance(module, nn.BatchNorm2d) or (isinstance(module, BatchNorm) and module.kind != "frozen")
