"""Batch normalization against torch's own, and over ranks against one process on the joined batch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmeff.core import group
from llmeff.core.dist import world
from llmeff.models.image_norm import BatchNorm, averaged, build, replayed
from tests.ranks import ranks

C = 5


def maps(num_images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_images, C, 4, 3, generator=generator, dtype=torch.float64) + torch.arange(C).view(
        -1, 1, 1
    )


def norm(kind: Any = "batch") -> Any:
    """With a scale and a shift that are not those of the beginning."""
    made = build(kind, C, 1).double()
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, 2, C))
        made.bias.copy_(torch.linspace(1, -1, C))
    return made


def passed(module: nn.Module, x: Tensor, above: Tensor) -> dict[str, Tensor]:
    """The output of a module, the gradients under a gradient from above, and its buffers."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(above)
    assert x.grad is not None
    own = {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x": x.grad, **own, **{name: tensor.clone() for name, tensor in module.named_buffers()}}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **within: float) -> None:
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], msg=lambda text, name=name: f"{name}: {text}", **within)


def torchs(ours: BatchNorm) -> nn.BatchNorm2d:
    theirs = nn.BatchNorm2d(C).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs


@pytest.mark.parametrize("kind", ["batch", "batch_sync"])
def test_by_the_batch_it_is_torchs(kind):
    ours = norm(kind)
    theirs = torchs(ours)
    for seed in range(3):
        x, above = maps(4, seed), maps(4, seed + 10)
        assert_close(passed(ours, x, above), passed(theirs, x, above), rtol=0, atol=0)
    ours.eval()
    theirs.eval()
    assert_close(passed(ours, maps(4), maps(4, 1)), passed(theirs, maps(4), maps(4, 1)), rtol=0, atol=0)


def test_frozen_statistics_never_move():
    ours = norm("frozen")
    assert [tuple(buffer.tolist()) for buffer in ours.buffers()] == [(0,) * C, (1,) * C]
    with torch.no_grad():
        ours.running_mean.fill_(0.5)
        ours.running_var.fill_(4.0)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    theirs = torchs(ours).eval()
    found = passed(ours, maps(4), maps(4, 1))
    assert_close(found, passed(theirs, maps(4), maps(4, 1)), rtol=0, atol=0)
    averaged(ours, [maps(4)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())


def test_a_batch_that_is_seen_again_moves_nothing_and_gives_the_same():
    ours = norm()
    first = ours(maps(4))
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    with replayed():
        assert torch.equal(ours(maps(4)), first)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())
    ours(maps(4))
    assert not torch.equal(ours.running_mean, before["running_mean"])


# -- over ranks


def shares(sizes: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """A rank's part of one batch, and of the gradient from above."""
    x, above = maps(sum(sizes)), maps(sum(sizes), 1)
    return x.split(sizes)[rank], above.split(sizes)[rank]


def synchronised(sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Two batches on this rank; gradients of the parameters are summed over the ranks, as a strategy does it."""
    torch.manual_seed(world().rank)
    ours = norm("batch_sync").to(dtype)
    for _ in range(2):
        x, above = shares(sizes, world().rank)
        found = passed(ours, x.to(dtype), above.to(dtype))
    return found | {name: group.total(found[name]) for name in ("weight", "bias")}


@pytest.mark.parametrize("sizes", [(3, 3), (1, 4)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.float64, {"rtol": 1e-12, "atol": 1e-12}), (torch.float32, {"rtol": 1e-5, "atol": 2e-5})],
    ids=["float64", "float32"],
)
def test_over_two_ranks_it_is_one_process_on_the_joined_batch(sizes, dtype, within):
    alone = norm("batch").double()
    for _ in range(2):
        expected = passed(alone, maps(sum(sizes)), maps(sum(sizes), 1))
    for rank, found in enumerate(ranks(2).run(synchronised, sizes, dtype)):
        assert all(values.dtype == dtype for values in found.values())
        own = {name: values.split(sizes)[rank] if name in "xy" else values for name, values in expected.items()}
        assert_close({name: values.double() for name, values in found.items()}, own, **within)


def of_bfloat16(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """One batch as autocast gives it to the module."""
    x, above = shares(sizes, world().rank)
    found = passed(norm("batch_sync").float(), x.bfloat16(), above.bfloat16())
    return found | {name: group.total(found[name]) for name in ("weight", "bias")}


def test_over_two_ranks_maps_of_bfloat16_have_statistics_of_float32():
    sizes = (2, 3)
    rounded = [part.bfloat16().double() for part in (maps(5), maps(5, 1))]
    expected = passed(norm("batch"), *rounded)
    for rank, found in enumerate(ranks(2).run(of_bfloat16, sizes)):
        assert {name for name, values in found.items() if values.dtype == torch.bfloat16} == {"x", "y"}
        for name, values in found.items():
            own = expected[name].split(sizes)[rank] if name in "xy" else expected[name]
            within = 2**-7 if name in "xy" else 1e-5
            torch.testing.assert_close(values.double(), own, rtol=within, atol=within * float(own.abs().max()))


def far_from_zero() -> Tensor:
    """The output for numbers whose mean is ten thousand times their deviation."""
    x = (maps(2, seed=world().rank) + 2e4).float()
    found: Tensor = norm("batch_sync").float()(x).detach()
    return found


def test_sums_over_ranks_lose_nothing_where_the_mean_is_large():
    found = torch.cat(ranks(2).run(far_from_zero))
    joined = torch.cat([(maps(2, seed=rank) + 2e4).float() for rank in range(2)]).double()
    torch.testing.assert_close(found.double(), norm()(joined).detach(), rtol=0, atol=2e-2)


def seen_again_on_this_rank() -> bool:
    """Whether statistics stay as they are, and outputs the same, where all ranks run a batch again."""
    ours = norm("batch_sync")
    x, _ = shares((2, 2), world().rank)
    first, before = ours(x), [buffer.clone() for buffer in ours.buffers()]
    with replayed():
        again = ours(x)
    return torch.equal(first, again) and all(map(torch.equal, ours.buffers(), before))


def test_over_ranks_too_a_batch_that_is_seen_again_moves_nothing():
    assert ranks(2).run(seen_again_on_this_rank) == [True, True]


# -- averages


def two_norms(kind: Any = "batch") -> nn.Sequential:
    return nn.Sequential(norm(kind), nn.ReLU(), norm(kind))


def averages(kind: Any) -> dict[str, Tensor]:
    module = two_norms(kind).eval()
    averaged(module, [maps(2, seed) for seed in range(3)])
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("kind", ["batch", "batch_sync"])
def test_averages_are_the_mean_of_the_batches_statistics(kind):
    module, batches = two_norms(kind), [maps(2, seed) for seed in range(3)]
    with torch.no_grad():
        given = [batches, [module[1](module[0](batch)) for batch in copy.deepcopy(batches)]]
    found = averages(kind)
    for place, inputs in zip((0, 2), given, strict=True):
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variances = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(found[f"{place}.running_mean"], means)
        torch.testing.assert_close(found[f"{place}.running_var"], variances)


def test_a_smaller_last_batch_counts_by_its_images():
    module, x = norm("batch"), torch.cat([torch.zeros(8, C, 3, 3), torch.ones(1, C, 3, 3)]).double()
    averaged(module, x.split(8))
    torch.testing.assert_close(module.running_mean, torch.full_like(module.running_mean, 1 / 9))


def test_averaging_leaves_the_mode_and_the_momentum_as_they_are():
    module = two_norms("batch_sync")
    module[0].eval()
    averaged(module, [maps(2)])
    assert [module.training, module[0].training, module[2].training] == [True, False, True]
    kept = module[2].running_mean.clone()
    module[2](maps(2, 1))
    expected = 0.9 * kept + 0.1 * maps(2, 1).mean((0, 2, 3))
    torch.testing.assert_close(module[2].running_mean, expected)


def test_all_ranks_average_the_same_batches_as_one_process_does():
    expected = averages("batch_sync")
    for found in ranks(2).run(averages, "batch_sync"):
        assert_close(found, expected)
