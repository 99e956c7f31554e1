"""State that optimizers keep in their groups, beside parameters and settings: counts of steps, sums of weights."""

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
"""Keys of a group that the loop sets itself."""
_STATELESS = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)
"""Kinds of values that cannot change without being replaced."""
_TENSOR, _TUPLE = "::tensor", "::tuple"
_MOST = 2**20
"""Numbers of the largest parameter that a trial step is made with; larger ones are left out."""

Entries = dict[str, Any]
"""Entries of one group, by key."""


def group_entries(optimizer: Optimizer) -> list[Entries]:
    """Copies of what each group holds beside its parameters and its learning rate."""
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
    """The entries of each group that steps have changed or added, as JSON.

    Args:
        optimizer: after any number of steps.
        begun: its `group_entries` before the first step.

    Raises:
        ConfigError: a value has a kind that is not saved.
    """
    found = []
    for group, before in zip(optimizer.param_groups, begun, strict=True):
        now = _unscheduled(group)
        changed = {key: now[key] for key in now if key not in before or not _same(now[key], before[key])}
        found.append({key: _packed(f"its groups' {key!r}", value) for key, value in changed.items()})
    return found


def put_back(group: Entries, saved: Mapping[str, Any], device: torch.device) -> None:
    """Restores what `changed_entries` returned for a group.

    Args:
        group: a group of the optimizer.
        saved: the entries of that group.
        device: of its parameters; tensors that were on no CPU go there.
    """
    group.update({key: _unpacked(value, device) for key, value in saved.items()})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _packed(what: str, value: Any) -> Any:
    """The value as JSON; tensors must have one number.

    Args:
        what: names the value in the error.
        value: a number, flag, word or tensor, or a list or tuple of them.

    Raises:
        ConfigError: the value is of another kind.
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
        f"{what} is {kind}, which a checkpoint cannot hold: there, keep numbers, flags, words, lists of them, or tensors of "
        "one number; what belongs to a parameter, as tensors in the optimizer's `state`"
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
    """Refuses an optimizer whose state a checkpoint could not hold, by a step with copies of a few parameters.

    Args:
        name: of the optimizer.
        build: builds the optimizer of given parameters.
        rows: all parameters; the smallest of each role is copied.
        miscounts: why an optimizer that counts in its groups would silently differ; None if it would not.

    Raises:
        ConfigError: with what cannot be saved and its kind, or with `miscounts`.
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
                    _packed(f"its state's {key!r}", value)
    except ConfigError as error:
        raise ConfigError([f"optim {name!r}: {problem}" for problem in error.problems]) from None
    counted = sorted({key for entries in changed for key in entries})
    if counted and miscounts is not None and not (_is_idle(build, rows, counted) and _is_same_apart(build, rows)):
        raise ConfigError(f"optim {name!r} counts in its groups ({', '.join(counted)}): {miscounts}")


_AHEAD = (0, 10, 1_000, 100_000)
"""How far counts are moved ahead, to see whether the next update depends on them."""


def _is_idle(
    build: Callable[[list[ParameterInfo]], Optimizer], rows: Sequence[ParameterInfo], counted: Sequence[str]
) -> bool:
    """Whether the second update is the same whatever the counts are by then."""
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
    """Whether updates are the same if each group is stepped alone, as they are if counts do not matter."""
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
    """A copy of the smallest parameter of each role, if it has at most `_MOST` numbers."""
    least: dict[Role, ParameterInfo] = {}
    for row in sorted(rows, key=lambda row: row.parameter.numel()):
        if row.parameter.numel() <= _MOST:
            least.setdefault(row.role, row)
    return [
        ParameterInfo(name=row.name, parameter=nn.Parameter(row.parameter.detach().clone()), role=row.role)
        for row in least.values()
    ]


def _check_settings(group: Mapping[str, Any]) -> None:
    """Refuses any object that could change in place, whether or not it does.

    Raises:
        ConfigError: with the entry and its kind.
    """
    for key, value in _unscheduled(group).items():
        if not isinstance(value, _STATELESS):
            _packed(f"its groups' {key!r}", value)
