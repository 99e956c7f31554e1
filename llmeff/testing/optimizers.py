"""Checks for every optimizer: what it declares is true, and its update matches the formula of its source."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core.config import ConfigError
from llmeff.core.meters import count_flops
from llmeff.core.optimizer_state import set_learning_rate, state_bytes
from llmeff.core.parameters import UNDECAYED, ParameterInfo, Role, Sharding
from llmeff.core.precision import precision
from llmeff.core.shard import split_group
from llmeff.cost.arrays import Weight
from llmeff.optim import OptimizerConfig
from llmeff.parallel.group_state import check_savable, group_entries
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, flat, save, whole
from llmeff.testing.failed import CheckFailed, require, share_off

STEPS = 20
FACTORS = (0.25, 0.5, 0.75, *(1.0 - 0.04 * step for step in range(STEPS - 3)))
"""Factors on the peak learning rate by step: a warm-up, then a decay."""
OF_GROUPS = (1.0, 0.5, 2.0, 0.25)
"""Factors on the peak learning rate by group, for a check in which each group has its own learning rate."""
PARAMETERS: dict[str, tuple[Role, tuple[int, ...]]] = {
    "embedding": ("embedding", (31, 12)),
    "first.scale": ("norm", (17,)),
    "first.tall": ("matrix", (131, 37)),
    "first.bias": ("bias", (37,)),
    "second.wide": ("matrix", (6, 40)),
    "second.square": ("matrix", (9, 9)),
    "third.conv": ("conv", (6, 3, 5, 3)),
    "third.heads": ("fused_heads", (12, 7)),
    "head": ("head", (11, 12)),
}
"""Role and shape of each parameter. `first.tall` is so large that 8-bit optimizers do not keep its state in float32."""
ROUNDING = 1e-5
"""Largest allowed difference between the update of slices and that of whole parameters, relative to the update, in
float32. It is not 0, because vectorized loops round differently at their ends."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """Input of a formula for one parameter."""

    name: str
    role: Role
    weight: Tensor
    """The weight before the first step, in float64."""
    gradients: tuple[Tensor, ...]
    """The gradient of each step, in float64, in the weight's shape."""
    rates: tuple[float, ...]
    """The learning rate of each step."""

    @property
    def is_decayed(self) -> bool:
        """Whether weight decay applies to the parameter, according to its role."""
        return self.role not in UNDECAYED


Formula = Callable[[Any, Sequence[Given]], Sequence[Tensor]]
"""Function of (config, parameters) that returns the parameters after the last step, computed by the equations of the
optimizer's source."""


def apart(one: Callable[[Any, Given], Tensor]) -> Formula:
    """Returns the `Formula` of an optimizer that updates each parameter alone. `one` is the formula of a parameter."""
    return lambda config, every: [one(config, given) for given in every]


def check_optimizer(
    config: OptimizerConfig, formula: Formula | None = None, *, dtype: torch.dtype = torch.float64, within: float = 1e-9
) -> None:
    """Runs the checks that llmeff's own optimizers pass.

    Nine parameters of all roles get up to 20 steps of random gradients, at a learning rate that rises and falls. The
    groups must be as stated. The optimizer must minimize a quadratic, repeat its update exactly, and move nothing at a
    learning rate of 0. The bytes of its state and the FLOPs of a step must match its price. It must allow the splitting
    that `sharding` declares. Its state, with the counters in its groups, must be saved and restored to the last bit.
    Given a formula, its update must match it, with and without weight decay if it has a field `weight_decay`.

    Args:
        config: config of the optimizer, with any settings.
        formula: equations of the optimizer's source, written out. None to skip their check.
        dtype: format of the parameters in the formula's check. float32 for an optimizer that does not support float64.
        within: largest allowed difference from the formula after the last step, relative to the parameter's movement.
            In float64, rounding errors are far below the default. If a part of the update has a lower format, give the
            rounding error of that format.

    Raises:
        CheckFailed: a check failed. The message states what differs.
    """
    for check in CHECKS:
        check(config)
    if formula is not None:
        check_formula(config, formula, dtype=dtype, within=within)


# -- the problem


def _drawn(dtype: torch.dtype, num_steps: int = STEPS) -> tuple[list[ParameterInfo], list[dict[str, Tensor]]]:
    """Returns parameters of all roles, and each step's gradients by name. Their magnitude differs from step to step."""
    draw = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    rows = [
        ParameterInfo(name=name, parameter=nn.Parameter((0.5 * normal(shape)).to(dtype)), role=role)
        for name, (role, shape) in PARAMETERS.items()
    ]
    gradients = [
        {name: (10.0 ** -(step % 3) * normal(shape)).to(dtype) for name, (_, shape) in PARAMETERS.items()}
        for step in range(num_steps)
    ]
    return rows, gradients


def _step(optimizer: Optimizer, rows: Sequence[ParameterInfo], gradients: dict[str, Tensor], factor: float) -> None:
    for row in rows:
        row.parameter.grad = gradients[row.name].clone()
    set_learning_rate(optimizer, factor)
    optimizer.step()


def _walked(
    config: OptimizerConfig, rows: Sequence[ParameterInfo], gradients: Sequence[dict[str, Tensor]]
) -> Optimizer:
    optimizer = config.build(list(rows))
    for step, step_gradients in enumerate(gradients):
        _step(optimizer, rows, step_gradients, FACTORS[step])
    return optimizer


def _name(config: OptimizerConfig) -> str:
    return f"optimizer {config.name!r}"


def _roles() -> dict[str, Role]:
    return {name: role for name, (role, _) in PARAMETERS.items()}


# -- the checks of every optimizer


def check_registered(config: OptimizerConfig) -> None:
    """Checks that the optimizer is registered under its name."""
    registry = OptimizerConfig.registry
    is_known = config.name in registry and registry[config.name] is type(config)
    require(is_known, f"{_name(config)} is not registered under that name. Registered: {', '.join(registry.names())}")


def check_groups(config: OptimizerConfig) -> None:
    """Checks that the optimizer builds the groups that it states, with every parameter once, at the peak rate."""
    rows, _ = _drawn(torch.float32)
    names = {row.parameter: row.name for row in rows}
    groups = config.build(rows).param_groups
    built = [[names[parameter] for parameter in group["params"]] for group in groups]
    stated = config.groups(_roles())
    require(stated == built, f"{_name(config)} states the groups {stated} but builds {built}")
    require(all(stated), f"{_name(config)} states a group without parameters: {stated}")
    every = sorted(name for group in stated for name in group)
    require(
        every == sorted(PARAMETERS), f"{_name(config)}: its groups must hold {sorted(PARAMETERS)}, but hold {every}"
    )
    rates = {group["lr"] for group in groups}
    require(rates == {config.lr}, f"{_name(config)}: its groups start with the rates {rates}, but lr is {config.lr}")


def check_minimizes(config: OptimizerConfig) -> None:
    """Checks that the optimizer minimizes a quadratic at its own learning rate, or at 10 or 100 times that rate."""

    def left(rate: float, num_steps: int = 100) -> float:
        draw = torch.Generator().manual_seed(0)
        begin, target = (torch.randn(3, 4, generator=draw) for _ in range(2))
        (row,) = rows = [ParameterInfo(name="weight", parameter=nn.Parameter(begin.clone()), role="matrix")]
        optimizer = _without_decay(config, lr=rate).build(rows)
        for step in range(num_steps):
            _step(optimizer, rows, {"weight": 2 * (row.parameter.detach() - target)}, 1 - step / num_steps)
        return share_off(row.parameter.detach(), target, begin) ** 2

    tried: list[float] = []
    for factor in (1.0, 10.0, 100.0):
        tried.append(left(config.lr * factor))
        if tried[-1] < 0.2:
            return
    shares = ", ".join(f"{share:.2g}" for share in tried)
    raise CheckFailed(
        f"{_name(config)} leaves {shares} of a quadratic loss after 100 steps at lr, 10 times lr and 100 times lr, but "
        "must leave less than 0.2 at one of these learning rates"
    )


def _without_decay(config: OptimizerConfig, **changes: Any) -> OptimizerConfig:
    decay = {"weight_decay": 0.0} if "weight_decay" in type(config).model_fields else {}
    return type(config)(**config.model_dump() | decay | changes)


def check_repeats(config: OptimizerConfig) -> None:
    """Checks that the same gradients lead to the same update, to the last bit."""
    ends = []
    for _ in range(2):
        rows, gradients = _drawn(torch.float32, 5)
        _walked(config, rows, gradients)
        ends.append(rows)
    for one, other in zip(*ends, strict=True):
        require(
            torch.equal(one.parameter, other.parameter),
            f"{_name(config)} moves {one.name!r} differently in two runs with the same gradients",
        )


def check_rate(config: OptimizerConfig) -> None:
    """Checks that each step uses the learning rate of the groups: at a rate of 0 nothing moves, not even by decay."""
    rows, gradients = _drawn(torch.float32, 4)
    optimizer = _walked(config, rows, gradients)
    before = [row.parameter.detach().clone() for row in rows]
    _step(optimizer, rows, gradients[0], 0.0)
    moved = [row.name for row, weight in zip(rows, before, strict=True) if not torch.equal(row.parameter, weight)]
    require(not moved, f"{_name(config)} moves {moved} at a learning rate of 0: it does not read its groups' `lr`")


def check_price(config: OptimizerConfig) -> None:
    """Checks that the bytes of the state and the FLOPs of a step match the price."""
    rows, gradients = _drawn(torch.float32, 2)
    optimizer = _walked(config, rows, gradients[:1])
    weights = [Weight(row.name, row.shape, "float32", "layers", role=row.role) for row in rows]
    price, kept = config.price(weights, precision("fp32")), state_bytes(optimizer)
    for kind in ("optimizer_bytes", "peak_bytes"):
        stated = price.total(kind)
        require(stated == kept, f"{_name(config)} is priced at {stated} {kind}, but keeps {kept}")
    executed = count_flops(lambda: _step(optimizer, rows, gradients[1], 1.0))
    stated = price.total("executed_flops")
    require(stated == executed, f"{_name(config)} is priced at {stated} executed_flops, but executes {executed}")


def check_sharding(config: OptimizerConfig) -> None:
    """Checks that the optimizer may be split as `sharding` declares."""
    order = get_args(Sharding)
    proved, told = proved_sharding(config)
    require(
        order.index(config.sharding) >= order.index(proved),
        f"{_name(config)} declares sharding {config.sharding!r}, but {told}: declare {proved!r}",
    )


def proved_sharding(config: OptimizerConfig) -> tuple[Sharding, str]:
    """Returns (sharding, message): the finest sharding that does not change the update, and why no finer one works.

    The message is empty if there is no finer sharding.
    """
    told = ""
    split: tuple[tuple[Sharding, Callable[[OptimizerConfig], Iterator[tuple[str, Tensor]]]], ...]
    split = (("elementwise", _in_slices), ("whole_tensor", _dealt_out))
    for sharding, update in split:
        begin, expected = {row.name: row.parameter.detach().clone() for row in _drawn(torch.float32)[0]}, {}
        rows, gradients = _drawn(torch.float32)
        _walked(config, rows, gradients)
        expected = {row.name: row.parameter.detach() for row in rows}
        try:
            off = {name: share_off(found, expected[name], begin[name]) for name, found in update(config)}
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            told = told or f"{_OF[sharding]} cannot be updated ({error})"
            continue
        worst = max(off, key=lambda name: off[name])
        if all(share <= ROUNDING for share in off.values()):  # false for NaN
            return sharding, told
        told = told or f"{_OF[sharding]} is updated differently: {worst!r} differs by {off[worst]:.1e} of its movement"
    return "none", told


_OF = {"elementwise": "a slice that ends within tensors", "whole_tensor": "a share of the tensors"}


def _owners(
    config: OptimizerConfig, rows: Sequence[ParameterInfo], optimizer: Optimizer, rank: int, ranks: int
) -> list[ShardOwner]:
    """Replaces each group's parameters by a rank's slice of the group, as ZeRO does."""
    by_name, owners = {row.name: row for row in rows}, []
    for names, group in zip(config.groups(_roles()), optimizer.param_groups, strict=True):
        shard = split_group({name: by_name[name].parameter.numel() for name in names}, ranks)[rank]
        numbers = [flat(by_name[part.name].parameter)[part.start : part.stop] for part in shard]
        starts = [sum(part.size for part in shard[:place]) for place in range(len(shard))]
        group["params"] = [nn.Parameter(torch.cat(numbers))]
        owners.append(ShardOwner(key=group["params"][0], parts=tuple(zip(shard, starts, strict=True))))
    return owners


def _step_slices(
    optimizer: Optimizer, owners: Sequence[ShardOwner], gradients: dict[str, Tensor], factor: float
) -> None:
    for owner in owners:
        parts = [gradients[part.name].view(-1)[part.start : part.stop] for part, _ in owner.parts]
        owner.key.grad = torch.cat(parts)
    set_learning_rate(optimizer, factor)
    optimizer.step()


def _in_slices(config: OptimizerConfig, ranks: int = 3) -> Iterator[tuple[str, Tensor]]:
    ends = {name: torch.zeros(shape) for name, (_, shape) in PARAMETERS.items()}
    for rank in range(ranks):
        rows, gradients = _drawn(torch.float32)
        optimizer = config.build(rows)
        owners = _owners(config, rows, optimizer, rank, ranks)
        for step, step_gradients in enumerate(gradients):
            _step_slices(optimizer, owners, step_gradients, FACTORS[step])
        _gather(owners, ends)
    yield from ends.items()


def _gather(owners: Sequence[ShardOwner], ends: dict[str, Tensor]) -> None:
    for owner in owners:
        for part, at in owner.parts:
            ends[part.name].view(-1)[part.start : part.stop] = owner.numbers[at : at + part.size]


def _dealt_out(config: OptimizerConfig, ranks: int = 2) -> Iterator[tuple[str, Tensor]]:
    for rank in range(ranks):
        rows, gradients = _drawn(torch.float32)
        _walked(config, rows[rank::ranks], gradients)
        yield from ((row.name, row.parameter.detach()) for row in rows[rank::ranks])


def check_saved(config: OptimizerConfig) -> None:
    """Checks that the state is saved and restored to the last bit, also in slices if `sharding` is "elementwise"."""
    rows, gradients = _drawn(torch.float32, 6)
    try:
        check_savable(config.name, config.build, rows)
    except ConfigError as error:
        raise CheckFailed(str(error)) from error
    optimizer = config.build(rows)
    begun = group_entries(optimizer)
    for step in range(3):
        _step(optimizer, rows, gradients[step], FACTORS[step])
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), 0, map(whole, rows), optimizer, begun, {}, {})
        again = _drawn(torch.float32)[0]
        resumed = config.build(again)
        ShardedCheckpoint(Path(name)).load(map(whole, again), resumed)
        cut, ends = _drawn(torch.float32)[0], {row.name: torch.zeros_like(row.parameter.detach()) for row in rows}
        sliced, owners = config.build(cut), []
        if config.sharding == "elementwise":
            owners = _owners(config, cut, sliced, 0, 1)
            ShardedCheckpoint(Path(name)).load(owners, sliced)
    for step in range(3, 6):
        _step(optimizer, rows, gradients[step], FACTORS[step])
        _step(resumed, again, gradients[step], FACTORS[step])
        if owners:
            _step_slices(sliced, owners, gradients[step], FACTORS[step])
    _gather(owners, ends)
    begin = _drawn(torch.float32)[0]
    for row, other, first in zip(rows, again, begin, strict=True):
        off = share_off(other.parameter.detach(), row.parameter.detach(), first.parameter.detach())
        require(
            off == 0,
            f"{_name(config)}, saved and restored, moves {row.name!r} differently, by {off:.1e} of its movement",
        )
        off = share_off(ends[row.name], row.parameter.detach(), first.parameter.detach()) if owners else 0.0
        message = (
            f"{_name(config)}, saved and restored in slices, moves {row.name!r} differently, by {off:.1e} of its "
            "movement"
        )
        require(off <= ROUNDING, message)


CHECKS: tuple[Callable[[OptimizerConfig], None], ...] = (
    check_registered,
    check_groups,
    check_minimizes,
    check_repeats,
    check_rate,
    check_price,
    check_sharding,
    check_saved,
)
"""The checks that `check_optimizer` runs before that of the formula, in this order."""


def check_formula(config: OptimizerConfig, formula: Formula, *, dtype: torch.dtype, within: float) -> None:
    """Checks the update against the formula, with and without weight decay, with a learning rate for each group.

    The arguments are those of `check_optimizer`.
    """
    kinds = [config]
    if "weight_decay" in type(config).model_fields:
        kinds = [
            _without_decay(config, weight_decay=decay) for decay in (0.0, getattr(config, "weight_decay", 0) or 0.3)
        ]
    for kind in kinds:
        decay = f" with weight_decay {kind.weight_decay}" if hasattr(kind, "weight_decay") else ""
        for name, off in _off_the_formula(kind, formula, dtype):
            message = (
                f"{_name(config)}{decay}: after {STEPS} steps {name!r} differs from the formula by {off:.1e} of its "
                "movement"
            )
            require(off <= within, f"{message}, but at most {within:.0e} is allowed")


def _off_the_formula(config: OptimizerConfig, formula: Formula, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    rows, gradients = _drawn(dtype)
    begin = {row.name: row.parameter.detach().double() for row in rows}
    begin = {name: weight.clone() for name, weight in begin.items()}
    optimizer = config.build(rows)
    rates: dict[int, tuple[float, ...]] = {}
    for place, group in enumerate(optimizer.param_groups):
        peak = config.lr * OF_GROUPS[place % len(OF_GROUPS)]
        group["lr"] = peak
        rates |= {id(parameter): tuple(peak * factor for factor in FACTORS) for parameter in group["params"]}
    every = [
        Given(
            name=row.name,
            role=row.role,
            weight=begin[row.name].clone(),
            gradients=tuple(step_gradients[row.name].double() for step_gradients in gradients),
            rates=rates[id(row.parameter)],
        )
        for row in rows
    ]
    for step, step_gradients in enumerate(gradients):
        _step(optimizer, rows, step_gradients, FACTORS[step])
    found = formula(config, every)
    if len(found) != len(every):
        raise CheckFailed(f"{_name(config)}: its formula returns {len(found)} parameters, but must return {len(every)}")
    for row, expected in zip(rows, found, strict=True):
        yield row.name, share_off(row.parameter.detach(), expected, begin[row.name])
