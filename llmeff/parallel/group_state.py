"""What optimizers keep in their groups beside parameters and settings: counts of steps, sums of weights."""

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
"""What the loop sets itself."""
_STATELESS = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)
"""Settings of these kinds cannot change without being replaced."""
_TENSOR, _TUPLE = "::tensor", "::tuple"
_MOST = 2**20
"""Numbers of a parameter that is stepped to see what an optimizer keeps; larger ones are left out."""

Entries = dict[str, Any]
"""Of one group, by key."""


def group_entries(optimizer: Optimizer) -> list[Entries]:
    """Copies of what each group holds beside its parameters and its rate."""
    return [
        {key: value if isinstance(value, _STATELESS) else copy.deepcopy(value) for key, value in _own(group).items()}
        for group in optimizer.param_groups
    ]


def _own(group: Mapping[str, Any]) -> Entries:
    return {key: value for key, value in group.items() if key not in _SCHEDULED}


def changed_entries(optimizer: Optimizer, begun: Sequence[Entries]) -> list[Entries]:
    """What steps have changed in or added to each group, as JSON.

    Args:
        optimizer: after any number of steps.
        begun: `group_entries` of it before the first.

    Raises:
        ConfigError: a value has a kind that is not saved.
    """
    found = []
    for group, before in zip(optimizer.param_groups, begun, strict=True):
        own = _own(group)
        changed = {key: own[key] for key in own if key not in before or not _same(own[key], before[key])}
        found.append({key: _packed(f"its groups' {key!r}", value) for key, value in changed.items()})
    return found


def put_back(group: Entries, saved: Mapping[str, Any], device: torch.device) -> None:
    """Puts what `changed_entries` gave of a group into it.

    Args:
        group: of the optimizer.
        saved: of that group.
        device: of its parameters, where tensors lie that did then.
    """
    group.update({key: _unpacked(value, device) for key, value in saved.items()})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _packed(what: str, value: Any) -> Any:
    """The value as JSON: of tensors those of one number.

    Raises:
        ConfigError: it is of another kind.
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
    """Steps an optimizer of copies of a few parameters once, and refuses one whose state a checkpoint could not hold.

    Args:
        name: of the optimizer.
        build: builds it.
        rows: of all parameters, of which the smallest of each role is copied.
        miscounts: why an optimizer that counts in its groups would not be itself here; None where it is.

    Raises:
        ConfigError: naming what cannot be saved and its kind, or the reason above.
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
"""So far ahead counts are set to see whether a step by them differs."""


def _is_idle(
    build: Callable[[list[ParameterInfo]], Optimizer], rows: Sequence[ParameterInfo], counted: Sequence[str]
) -> bool:
    """Whether a second step is the same whatever an optimizer has counted by then."""
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
    return all(torch.equal(one, other) for own in ends[1:] for one, other in zip(ends[0], own, strict=True))


def _is_same_apart(build: Callable[[list[ParameterInfo]], Optimizer], rows: Sequence[ParameterInfo]) -> bool:
    """Whether its update is the same where each group is stepped by itself: what it counts may not matter to it."""
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
    """Of the smallest parameter of each role."""
    least: dict[Role, ParameterInfo] = {}
    for row in sorted(rows, key=lambda row: row.parameter.numel()):
        if row.parameter.numel() <= _MOST:
            least.setdefault(row.role, row)
    return [
        ParameterInfo(name=row.name, parameter=nn.Parameter(row.parameter.detach().clone()), role=row.role)
        for row in least.values()
    ]


def _check_settings(group: Mapping[str, Any]) -> None:
    """An object that could change within is refused, whether or not it does."""
    for key, value in _own(group).items():
        if not isinstance(value, _STATELESS):
            _packed(f"its groups' {key!r}", value)
