"""Saves, restores and checks state that optimizers keep in their parameter groups, such as step counts."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core.config import ConfigError
from llmeff.core.parameters import ParameterInfo, Role

_SCHEDULED = ("params", "lr", "peak_lr")
"""Keys of a group that are not saved here, because the training loop sets them."""
_STATELESS = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)
"""Types of values that cannot change in place."""
_TENSOR, _TUPLE = "::tensor", "::tuple"
_MOST = 2**20
"""Elements of the largest parameter that a trial step uses. Larger parameters are left out."""

Entries = dict[str, Any]
"""Entries of one optimizer group, by key."""


def group_entries(optimizer: Optimizer) -> list[Entries]:
    """Returns copies of the entries of each group, without its parameters and learning rate."""
    return [
        {
            key: value if isinstance(value, _STATELESS) else copy.deepcopy(value)
            for key, value in _unscheduled(group).items()
        }
        for group in optimizer.param_groups
    ]


def _unscheduled(group: Mapping[str, Any]) -> Entries:
    return {key: value for key, value in group.items() if key not in _SCHEDULED}


def changed_entries(optimizer: Optimizer, begun: Sequence[Entries]) -> list[Entries]:
    """Returns the entries of each group that steps have changed or added, as JSON values.

    Args:
        optimizer: the optimizer, after any number of steps.
        begun: its `group_entries` before the first step.

    Raises:
        ConfigError: a value has a type that cannot be saved.
    """
    found = []
    for group, before in zip(optimizer.param_groups, begun, strict=True):
        now = _unscheduled(group)
        changed = {key: now[key] for key in now if key not in before or not _same(now[key], before[key])}
        found.append({key: _packed(f"{key!r} in its groups", value) for key, value in changed.items()})
    return found


def put_back(group: Entries, saved: Mapping[str, Any], device: torch.device) -> None:
    """Restores the entries that `changed_entries` returned for a group.

    Args:
        group: a group of the optimizer.
        saved: the saved entries of that group.
        device: device of its parameters. Tensors that were not on the CPU when they were saved go to this device.
    """
    group.update({key: _unpacked(value, device) for key, value in saved.items()})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _packed(what: str, value: Any) -> Any:
    """Returns the value in a form that JSON can hold.

    Args:
        what: name of the value, for the error.
        value: a number, flag, string, None or one-element tensor, or a list or tuple of these.

    Raises:
        ConfigError: the value has another type.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), value.item(), value.is_cpu]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TENSOR: ["python", [], repr(float(value)), True]}
    if isinstance(value, list | tuple):
        packed = [_packed(what, each) for each in value]
        return {_TUPLE: packed} if isinstance(value, tuple) else packed
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ConfigError(
        f"{what} is {kind}, which a checkpoint cannot store. Allowed are numbers, flags, strings, one-element tensors, "
        "and lists of these. Keep what belongs to a parameter as tensors in the optimizer's `state`"
    )


def _unpacked(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, device) for each in value]
    if not isinstance(value, dict):
        return value
    if _TUPLE in value:
        return tuple(_unpacked(each, device) for each in value[_TUPLE])
    dtype, shape, number, was_on_cpu = value[_TENSOR]
    if dtype == "python":
        return float(number)
    return torch.full(shape, number, dtype=getattr(torch, dtype), device="cpu" if was_on_cpu else device)


def check_savable(
    name: str,
    build: Callable[[list[ParameterInfo]], Optimizer],
    rows: Sequence[ParameterInfo],
    miscounts: str | None = None,
) -> None:
    """Refuses an optimizer whose state a checkpoint could not store. Tries one step with copies of a few parameters.

    Args:
        name: the optimizer's name.
        build: function that takes parameters and builds the optimizer for them.
        rows: all parameters. The smallest parameter of each role is copied.
        miscounts: the reason why counts in groups would go wrong. None if they stay right (`StrategyConfig.miscounts`).

    Raises:
        ConfigError: some state cannot be saved, or the optimizer's updates depend on counts that would go wrong.
    """
    copies = _copies(rows)
    if not copies:
        return
    optimizer = build(copies)
    try:
        for group in optimizer.param_groups:
            _check_settings(group)
        begun = group_entries(optimizer)
        for row in copies:
            row.parameter.grad = torch.full_like(row.parameter, 1e-3)
        optimizer.step()
        changed = changed_entries(optimizer, begun)
        for state in optimizer.state.values():
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    _packed(f"{key!r} in its state", value)
    except ConfigError as error:
        raise ConfigError([f"optim {name!r}: {problem}" for problem in error.problems]) from None
    counted = sorted({key for entries in changed for key in entries})
    if counted and miscounts is not None and not (_is_idle(build, rows, counted) and _is_same_apart(build, rows)):
        raise ConfigError(f"optim {name!r} keeps step counts in its param_groups ({', '.join(counted)}): {miscounts}")


_AHEAD = (0, 10, 1_000, 100_000)
"""Amounts that are added to counts, to see whether the next update depends on them."""


def _is_idle(
    build: Callable[[list[ParameterInfo]], Optimizer], rows: Sequence[ParameterInfo], counted: Sequence[str]
) -> bool:
    """Returns whether counts in the optimizer's groups have no effect on updates. Tests this on copied parameters."""
    ends = []
    for ahead in _AHEAD:
        copies = _copies(rows)
        optimizer = build(copies)
        for number in (1, 2):
            for group in optimizer.param_groups if number == 2 else ():
                for key in counted:
                    if isinstance(group[key], int | float | Tensor) and not isinstance(group[key], bool):
                        group[key] = group[key] + ahead
            for row in copies:
                row.parameter.grad = torch.full_like(row.parameter, (-1.0) ** number / number)
            optimizer.step()
        ends.append([row.parameter for row in copies])
    return all(torch.equal(one, other) for end in ends[1:] for one, other in zip(ends[0], end, strict=True))


def _is_same_apart(build: Callable[[list[ParameterInfo]], Optimizer], rows: Sequence[ParameterInfo]) -> bool:
    """Returns whether stepping each group alone gives the same result as stepping all together. Tests three updates."""
    ends = []
    for is_apart in (False, True):
        copies = _copies(rows)
        optimizer = build(copies)
        owned = [group["params"] for group in optimizer.param_groups]
        for number in range(1, 4):
            for row in copies:
                row.parameter.grad = torch.full_like(row.parameter, (-1.0) ** number / number)
            for place in range(len(owned)) if is_apart else [None]:
                for other, group in enumerate(optimizer.param_groups):
                    group["params"] = owned[other] if place in (None, other) else []
                optimizer.step()
        ends.append([row.parameter for row in copies])
    return all(map(torch.equal, *ends))


def _copies(rows: Sequence[ParameterInfo]) -> list[ParameterInfo]:
    """Returns a copy of the smallest parameter of each role, without parameters of more than `_MOST` elements."""
    least: dict[Role, ParameterInfo] = {}
    for row in sorted(rows, key=lambda row: row.parameter.numel()):
        if row.parameter.numel() <= _MOST:
            least.setdefault(row.role, row)
    return [
        ParameterInfo(name=row.name, parameter=nn.Parameter(row.parameter.detach().clone()), role=row.role)
        for row in least.values()
    ]


def _check_settings(group: Mapping[str, Any]) -> None:
    """Refuses entries that cannot be saved and could change in place, even if they have not changed yet.

    Raises:
        ConfigError: an entry has a type that cannot be saved.
    """
    for key, value in _unscheduled(group).items():
        if not isinstance(value, _STATELESS):
            _packed(f"{key!r} in its groups", value)
