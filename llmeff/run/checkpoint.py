"""Saved states of a run: whole or absent, checksummed, the last few kept. A damaged one is skipped."""

import json
import os
import shlex
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmeff.core import files, group
from llmeff.core.config import ConfigError, read
from llmeff.core.dist import world
from llmeff.core.log import logger
from llmeff.record import schema
from llmeff.record.reader import recorded, whole_rows

_MANIFEST = "manifest.json"
_STATE = "state.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    """The folder with its files."""
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What the loop had to remember besides weights and optimizer."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the folder that holds them, inside the run's; need not exist.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Saves a checkpoint; one that exists already is left as it is. Older ones go only once this one is whole on disk.

        All ranks must call it: each writes its own files, and the main one makes and seals the folder.

        Args:
            step: optimizer steps done.
            state: what the loop must remember; saved as JSON.
            write: writes this rank's files into a folder.

        Raises:
            ConfigError: the disk is full or not writable; existing checkpoints are untouched.
        """
        place = self.folder / f"step-{step:08d}"
        part = place.with_name(f"{files.PARTIAL}{place.name}")
        is_main = world().is_main
        with group.agreed(), files.reported(place):
            if is_main:
                self._make_room(place, part)
        if not group.total(torch.tensor(int(is_main and part.exists()))):
            self._prune(place)  # the process that saved it may have been killed before it did this
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
        self._prune(place)

    def _prune(self, newest: Path) -> None:
        """Removes checkpoints older than the newest, but keeps as many as `keep` allows."""
        with group.agreed(), files.reported(newest):
            older = [old for old in self._places() if old.name < newest.name] if world().is_main else []
            for old in older[self.keep - 1 :]:
                doomed = old.with_name(f"{files.PARTIAL}{old.name}")
                old.rename(doomed)
                shutil.rmtree(doomed)

    def _make_room(self, place: Path, part: Path) -> None:
        """Makes an empty folder to write into, unless the checkpoint exists already."""
        files.refuse_links(self.folder, itself=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep_partial(self.folder)
        if place.exists():
            if _whole(place) is not None:
                return
            place.rename(place.with_name(f"damaged-{place.name}-{uuid.uuid4().hex[:8]}"))
        part.mkdir()

    def resume_point(self, data: str, *, or_anew: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint; None if the run begins at its first step. The main rank looks for all ranks.

        Args:
            data: fingerprint of the data that the run reads now.
            or_anew: if there is no whole checkpoint, begin at the first step, whatever was recorded.

        Raises:
            ConfigError: there is none, but there are rows or checkpoints that a run would drop if it began at its first step.
                Or the checkpoint was made with other data.
        """
        with group.agreed():
            found = self.newest() if world().is_main else None
            if found is None and world().is_main and not or_anew and (dropped := self._dropped()):
                run = self.folder.parent
                raise ConfigError(
                    f"{self._lack()}, and starting over from the first step would drop {dropped} of the run. Nothing was "
                    "changed. Put the checkpoints back; or start over with llmeff train --restart-from-scratch --out "
                    f"{shlex.quote(str(run))}, which keeps all that in {run / files.DISCARDED}N; or start another run "
                    "with another --out"
                )
        checkpoint = group.from_main(found)
        if checkpoint is not None and checkpoint.state.get("data", "") not in ("", data):
            raise ConfigError(
                f"{checkpoint.folder}: was made with other data (SHA-256 {checkpoint.state['data'][:12]}... then, "
                f"{data[:12]}... now): put the files back, or start a new run"
            )
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none. A damaged one is skipped with a warning."""
        return next(filter(None, map(_whole, self._places())), None)

    def _places(self) -> list[Path]:
        """All checkpoint folders, damaged ones too, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _dropped(self) -> str:
        """What a run that begins at its first step would drop, in words; empty if nothing."""
        named = [f"checkpoint {place.name}" for place in self._places()]
        return " and ".join([*filter(None, [recorded(self.folder.parent)]), *named])

    def _lack(self) -> str:
        """Why there is no whole checkpoint, in words."""
        if self._places():
            return f"{self.folder}: no checkpoint there can be read, for the reasons above"
        try:
            lying = os.listdir(self.folder)
        except FileNotFoundError:
            return f"{self.folder}: does not exist, so there is no checkpoint to continue from"
        except OSError as error:
            return f"{self.folder}: cannot be read ({error.strerror}), so there is no checkpoint to continue from"
        named = f"only {', '.join(sorted(lying)[:4])}" if lying else "nothing"
        return f"{self.folder}: holds {named}, so there is no checkpoint to continue from"


def is_before_first(run: Path) -> bool:
    """Whether an unfinished run ended before its first checkpoint was due, as far as its rows tell.

    If so, no checkpoint is missing, and whoever repeats runs automatically begins it anew. If a checkpoint was due and is
    missing, somebody must look.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    config, metrics = read(run / schema.CONFIG), run / schema.METRICS
    try:
        every, steps = config["checkpoint"]["every"], config["train"]["steps"]
        first: int = every if 0 < every < steps else steps
    except (KeyError, TypeError):
        raise ConfigError(f"{run / schema.CONFIG}: is not a run's config") from None
    if any((run / schema.CHECKPOINTS).glob("step-*")):
        return False
    rows = whole_rows(metrics.read_bytes()) if metrics.is_file() else []
    return len(rows) <= first


def restore_random_states(checkpoint: Checkpoint) -> None:
    """Restores the states of torch's generators. A rank that did not exist then keeps its own."""
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
    """Adds what the loop remembers and, last, the checksums of all files."""
    (part / _STATE).write_text(json.dumps(state), encoding="utf-8")
    sums = {file.name: files.sha256(file) for file in sorted(part.iterdir())}
    manifest = {"schema_version": SCHEMA_VERSION, "sha256": sums}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _whole(place: Path) -> Checkpoint | None:
    """The checkpoint; None, with a warning, if it is damaged."""
    try:
        return _verify(place)
    except (OSError, ValueError, KeyError) as problem:
        logger.warning("checkpoint %s is damaged and skipped: %s", place.name, problem)
        return None


def _verify(place: Path) -> Checkpoint:
    manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"its format is {manifest['schema_version']}, this version reads {SCHEMA_VERSION}")
    for name, expected in manifest["sha256"].items():
        if files.sha256(place / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(folder=place, **json.loads((place / _STATE).read_text(encoding="utf-8")))
