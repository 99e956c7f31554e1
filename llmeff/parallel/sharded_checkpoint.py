"""Sharded checkpoints: a run's weights and optimizer state on disk, in slices that any number of ranks can read.

Each rank writes what it owns. `rank-00000.safetensors` has the weights that the rank updates, and their optimizer
state. `rank-00000.json` states which slice of which parameter each tensor is, and has the counts that the optimizer
keeps in its groups. So a checkpoint does not depend on the strategy or the number of ranks that wrote it. It has only
tensors and JSON, so reading it runs no code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core.parameters import ParameterInfo
from llmeff.core.shard import Slice
from llmeff.core.tensors import local, stored_tensors
from llmeff.parallel.group_state import Entries, changed_entries, put_back

_BETWEEN = "::"
_WEIGHT = "weight"
_BUFFERS = "buffers.safetensors"


@dataclass(frozen=True, kw_only=True)
class ShardOwner:
    """A tensor that the optimizer updates, with the slices of parameters that it contains."""

    key: Tensor
    """The tensor itself, which is the key of its optimizer state."""
    parts: tuple[tuple[Slice, int], ...]
    """Slices of parameters, each with the index of its first element in the flattened local tensor."""
    is_whole: bool = False
    """Whether the tensor is one whole parameter. Then its optimizer state may have any shape."""

    @property
    def numbers(self) -> Tensor:
        """A flat view of this rank's elements."""
        return flat(self.key)


def flat(tensor: Tensor) -> Tensor:
    """Returns a one-dimensional view of the elements of a tensor that are on this rank."""
    return local(tensor).detach().view(-1)


def save(
    folder: Path,
    rank: int,
    owners: Iterable[ShardOwner],
    optimizer: Optimizer,
    begun: Sequence[Entries],
    buffers: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> None:
    """Writes this rank's share of a checkpoint.

    Args:
        folder: the folder that all ranks write into.
        rank: the rank of this process.
        owners: the tensors that this rank saves.
        optimizer: the optimizer that has their state.
        begun: `group_entries` of the optimizer before its first step.
        buffers: the model's buffers. Only the main rank writes them.
        others: the strategy's `extra_state`, as JSON values.

    Raises:
        ConfigError: the optimizer's groups have an entry that cannot be saved.
    """
    changed = changed_entries(optimizer, begun)
    entries = {
        key: counted for group, counted in zip(optimizer.param_groups, changed, strict=True) for key in group["params"]
    }
    owners = list(owners)
    groups = {part.name: counted for owner in owners if (counted := entries.get(owner.key)) for part, _ in owner.parts}
    tensors: dict[str, Tensor] = {}
    slices: dict[str, tuple[int, int]] = {}
    whole: list[str] = []
    plain: dict[str, Any] = {}
    shared: dict[str, str] = {}
    storages: dict[int, str] = {}
    for owner in owners:
        state = optimizer.state.get(owner.key, {})
        for part, at in owner.parts:
            slices[part.name] = part.start, part.stop
            if owner.is_whole:
                whole.append(part.name)
            span = slice(at, at + part.size)
            tensors[part.name + _BETWEEN + _WEIGHT] = owner.numbers[span]
            for kind, value in state.items():
                name = part.name + _BETWEEN + kind
                if not isinstance(value, Tensor):
                    plain[name] = value
                elif value.dim() == 0:
                    tensors[name] = value
                elif owner.is_whole:
                    first = storages.setdefault(value.untyped_storage()._cdata, name)
                    if first == name:
                        tensors[name] = value
                    else:  # a state tensor that several parameters share is written once
                        shared[name] = first
                else:
                    tensors[name] = flat(value)[span]
    save_file(_plain_copies(tensors), folder / f"rank-{rank:05d}.safetensors")
    content = {
        "slices": slices, "whole": whole, "state": plain, "groups": groups, "shared": shared, "others": dict(others)
    }  # fmt: skip
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(content), encoding="utf-8")
    if rank == 0:
        save_file(_plain_copies(buffers), folder / _BUFFERS)


class ShardedCheckpoint:
    """Reads a checkpoint that `save` wrote on all ranks.

    Args:
        folder: the checkpoint's folder.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._contents = [
            (path.with_suffix(".safetensors"), json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(folder.glob("rank-*.json"))
        ]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {str(path): safe_open(path, framework="pt") for path, _ in self._contents}

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int, Any, set[str]]]]:
        """The saved slices of each parameter, by its name: start, stop, file, and the names of the file's tensors."""
        places: dict[str, list[tuple[int, int, Any, set[str]]]] = {}
        for path, content in self._contents:
            file = self._files[str(path)]
            names = set(file.keys())
            for name, (start, stop) in content["slices"].items():
                places.setdefault(name, []).append((start, stop, file, names))
        return places

    @cached_property
    def _whole(self) -> set[str]:
        return {name for _, content in self._contents for name in content["whole"]}

    @property
    def parameters(self) -> dict[str, int]:
        """The number of elements of each parameter, by its name."""
        return {name: max(stop for _, stop, _, _ in places) for name, places in self._places.items()}

    @property
    def others(self) -> dict[str, Any]:
        """The `extra_state` that the main rank's strategy saved."""
        return dict(self._contents[0][1]["others"])

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers."""
        with safe_open(self._folder / _BUFFERS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping

    def kinds(self, parameter: str) -> set[str]:
        """Returns the names of the tensors in a parameter's optimizer state, such as `exp_avg`."""
        prefix = parameter + _BETWEEN
        every = [*self._shared, *(name for *_, names in self._places[parameter] for name in names)]
        found = {name.removeprefix(prefix) for name in every}
        return {kind for kind in found if _BETWEEN not in kind} - {_WEIGHT}

    @cached_property
    def _shared(self) -> dict[str, str]:
        """State tensors shared by several parameters: maps each name of such a tensor to the name in the file."""
        return {name: first for _, content in self._contents for name, first in content["shared"].items()}

    def plain(self, parameter: str) -> dict[str, Any]:
        """Returns the values in a parameter's optimizer state that are not tensors, by key."""
        prefix = parameter + _BETWEEN
        return {
            name.removeprefix(prefix): value
            for _, content in self._contents
            for name, value in content["state"].items()
            if name.startswith(prefix)
        }

    @cached_property
    def _groups(self) -> dict[str, Entries]:
        """The saved entries of each parameter's group, by the parameter's name."""
        return {name: entry for _, content in self._contents for name, entry in content.get("groups", {}).items()}

    def whole(self, parameter: str, kind: str) -> Tensor:
        """Returns a state tensor as it was saved: a scalar, or the state of a parameter that was saved whole."""
        name = parameter + _BETWEEN + kind
        name = self._shared.get(name, name)
        _, _, file, _ = self._places[name.partition(_BETWEEN)[0]][0]
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def read(self, part: Slice, kind: str = _WEIGHT) -> Tensor:
        """Returns the elements of a slice of a weight or state tensor, joined from all ranks that saved some of them.

        Raises:
            ValueError: some elements are missing, or the state tensor does not have one element per parameter element.
        """
        found: list[Tensor] = []
        at = part.start
        for start, stop, file, _ in sorted(self._places.get(part.name, []), key=lambda place: place[:2]):
            if start <= at < min(stop, part.stop):
                numbers = file.get_tensor(part.name + _BETWEEN + kind).view(-1)
                if numbers.numel() != stop - start:
                    raise ValueError(
                        f"{part.name}: its state tensor {kind} belongs to the whole parameter and cannot be split"
                    )
                found.append(numbers[at - start : min(stop, part.stop) - start])
                at = min(stop, part.stop)
        if at < part.stop:
            raise ValueError(f"{part.name}: elements {at} to {part.stop} are missing in the checkpoint")
        return torch.cat(found) if found else torch.empty(0)

    @torch.no_grad()
    def load(self, owners: Iterable[ShardOwner], optimizer: Optimizer) -> None:
        """Reads weights and optimizer state into this rank's tensors.

        Raises:
            ValueError: the checkpoint belongs to another model, or its optimizer state cannot be split as
                `owners` require.
        """
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        there: dict[str, Tensor] = {}
        for owner in owners:
            for part, at in owner.parts:
                owner.numbers[at : at + part.size].copy_(self.read(part))
            named = [part for part, _ in owner.parts]
            if not named:
                continue
            first = named[0].name
            group = groups.get(owner.key, optimizer.param_groups[0])
            put_back(group, self._groups.get(first, {}), owner.key.device)
            on_device = group.get("fused") or group.get("capturable")  # then torch keeps step counters on the device
            state = optimizer.state[owner.key]
            for kind in sorted(self.kinds(first)):
                value = self.whole(first, kind)
                if value.dim() == 0:
                    state[kind] = value.to(owner.key.device if on_device else "cpu")
                elif owner.is_whole and first in self._whole:
                    name = first + _BETWEEN + kind
                    state[kind] = there.setdefault(self._shared.get(name, name), value.to(owner.key.device))
                else:
                    state[kind] = self._cut(owner, kind, value.dtype)
            state.update(self.plain(first))

    def _cut(self, owner: ShardOwner, kind: str, dtype: torch.dtype) -> Tensor:
        made = torch.zeros_like(owner.key, dtype=dtype, requires_grad=False)
        for part, at in owner.parts:
            flat(made)[at : at + part.size].copy_(self.read(part, kind))
        return made


def _plain_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def whole(row: ParameterInfo) -> ShardOwner:
    """Returns the owner of a parameter that is updated as a whole."""
    part = Slice(name=row.name, start=0, stop=row.parameter.numel())
    return ShardOwner(key=row.parameter, parts=((part, 0),), is_whole=True)


@torch.no_grad()
def load_whole(model: nn.Module, rows: list[ParameterInfo], saved: ShardedCheckpoint) -> None:
    """Reads parameters that this process keeps whole, and the buffers.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    check_fit(rows, saved)
    for row in rows:
        values = saved.read(Slice(name=row.name, start=0, stop=row.parameter.numel()))
        row.parameter.view(-1).copy_(values)
    load_buffers(model, saved)


def check_fit(rows: list[ParameterInfo], saved: ShardedCheckpoint, sizes: Mapping[str, int] | None = None) -> None:
    """Checks that the checkpoint belongs to this model.

    Args:
        rows: the parameters of this model.
        saved: the checkpoint.
        sizes: number of elements of each parameter, by its name. None takes the sizes from `rows`.

    Raises:
        ValueError: names or sizes differ.
    """
    expected = {row.name: row.parameter.numel() for row in rows} if sizes is None else dict(sizes)
    if expected.keys() != saved.parameters.keys():
        missing = sorted(expected.keys() - saved.parameters.keys())
        extra = sorted(saved.parameters.keys() - expected.keys())
        raise ValueError(f"the weights do not fit the model: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, size in expected.items():
        if size != saved.parameters[name]:
            raise ValueError(f"{name} has {saved.parameters[name]} elements in the checkpoint, but {size} in the model")


@torch.no_grad()
def load_buffers(model: nn.Module, saved: ShardedCheckpoint) -> None:
    """Reads the model's buffers.

    Raises:
        ValueError: the model lacks a saved buffer, or has it in another shape.
    """
    tensors = stored_tensors(model)
    for name, values in saved.buffers.items():
        if name not in tensors or tensors[name].shape != values.shape:
            raise ValueError(
                f"the checkpoint has a buffer {name} of shape {tuple(values.shape)}, but the model has no such buffer"
            )
        tensors[name].copy_(values)
