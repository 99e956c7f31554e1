"""Saved states of a run: whole or absent, checksummed, the last few kept, a damaged one passed over."""

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmeff.core import files, group
from llmeff.core.config import ConfigError
from llmeff.core.dist import world
from llmeff.core.log import logger

_MANIFEST = "manifest.json"
_STATE = "state.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    """Where its files lie."""
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What the loop had to remember beside weights and optimizer."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; need not exist.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Saves a checkpoint; older ones go only once it is whole on disk. One that is there already is left.

        All ranks call it: each writes its own files, the main one makes and seals the folder.

        Args:
            step: optimizer steps done.
            state: what the loop must remember, as JSON.
            write: writes this rank's files into a folder.

        Raises:
            ConfigError: the disk is full or not writable; checkpoints already there are untouched.
        """
        place = self.folder / f"step-{step:08d}"
        part = place.with_name(f"{files.PARTIAL}{place.name}")
        is_main = world().is_main
        with group.agreed(), files.reported(place):
            if is_main:
                self._make_room(place, part)
        if not group.total(torch.tensor(int(is_main and part.exists()))):
            return
        try:
            with group.agreed(), files.reported(place):
                write(part)
                save_file(_random_states(), part / _rng(world().rank))
            with group.agreed(), files.reported(place):
                if is_main:
                    _seal(part, {"step": step, "state": state})
                    files.settle(part, place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        with group.agreed(), files.reported(place):
            for old in [old for old in self._places() if old.name < place.name][self.keep - 1 :] if is_main else ():
                doomed = old.with_name(f"{files.PARTIAL}{old.name}")
                old.rename(doomed)
                shutil.rmtree(doomed)

    def _make_room(self, place: Path, part: Path) -> None:
        """An empty folder to write into; none where the checkpoint is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep_partial(self.folder)
        if place.exists():
            if _whole(place) is not None:
                return
            place.rename(place.with_name(f"damaged-{place.name}-{uuid.uuid4().hex[:8]}"))
        part.mkdir()

    def resume_point(self, data: str) -> Checkpoint | None:
        """The newest whole checkpoint; None where none was saved yet. The main rank looks for all.

        Args:
            data: fingerprint of what the run now reads.

        Raises:
            ConfigError: there are some, and none can be read: going on would begin the run anew and drop its record. Or
                the data are no longer those that it was made with.
        """
        checkpoint = group.from_main(self.newest() if world().is_main else None)
        if checkpoint is None and any(self.folder.glob("step-*")):
            raise ConfigError(
                f"{self.folder}: no checkpoint there can be read, for the reasons above, and the run is left as it is; "
                "to begin it anew, move them away"
            )
        if checkpoint is not None and checkpoint.state.get("data", "") not in ("", data):
            raise ConfigError(
                f"{checkpoint.folder}: was made with other data (SHA-256 {checkpoint.state['data'][:12]}... then, "
                f"{data[:12]}... now): put the files back, or begin a new run"
            )
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; a damaged one is passed over with a warning. None where there is none."""
        return next(filter(None, map(_whole, self._places())), None)

    def _places(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def restore_random_states(checkpoint: Checkpoint) -> None:
    """Puts torch's generators back; a rank that was not there before keeps its own."""
    path = checkpoint.folder / _rng(world().rank)
    if not path.exists():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _rng(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _seal(part: Path, state: dict[str, Any]) -> None:
    """Adds what the loop remembers, and last the checksums of all."""
    (part / _STATE).write_text(json.dumps(state), encoding="utf-8")
    sums = {file.name: files.sha256(file) for file in sorted(part.iterdir())}
    manifest = {"schema_version": SCHEMA_VERSION, "sha256": sums}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _whole(place: Path) -> Checkpoint | None:
    """The checkpoint; None, with a warning, where it is damaged."""
    try:
        return _verify(place)
    except (OSError, ValueError, KeyError) as problem:
        logger.warning("checkpoint %s is damaged and passed over: %s", place.name, problem)
        return None


def _verify(place: Path) -> Checkpoint:
    manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"its format is {manifest['schema_version']}, this version reads {SCHEMA_VERSION}")
    for name, expected in manifest["sha256"].items():
        if files.sha256(place / name) != expected:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(folder=place, **json.loads((place / _STATE).read_text(encoding="utf-8")))
