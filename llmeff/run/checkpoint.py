"""Checkpoints of a run. They are written atomically with checksums; the newest few are kept, and damaged ones skipped."""

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
    """A complete checkpoint on disk."""

    folder: Path
    """The folder with the checkpoint's files."""
    step: int
    """Number of optimizer steps completed."""
    state: dict[str, Any]
    """State of the training loop, apart from the model and the optimizer."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the folder of the checkpoints, inside the run's folder. It need not exist.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Saves a checkpoint, unless a complete one for this step exists. Then removes older ones, so that `keep` remain.

        Older checkpoints are removed only after this one is complete on disk. All ranks must call this method: each rank
        writes its own files, and the main rank creates the folder and adds the checksums.

        Args:
            step: number of optimizer steps completed.
            state: state of the training loop, which is saved as JSON.
            write: writes this rank's files into a folder.

        Raises:
            ConfigError: the disk is full or not writable. The existing checkpoints are kept.
        """
        place = self.folder / f"step-{step:08d}"
        part = place.with_name(f"{files.PARTIAL}{place.name}")
        is_main = world().is_main
        with group.agreed(), files.reported(place):
            if is_main:
                self._make_room(place, part)
        if not group.total(torch.tensor(int(is_main and part.exists()))):
            self._prune(place)  # the process that saved it may have been killed before it removed older checkpoints
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
        """Removes checkpoints older than `newest`, except for the latest `keep` - 1 of them."""
        with group.agreed(), files.reported(newest):
            older = [old for old in self._places() if old.name < newest.name] if world().is_main else []
            for old in older[self.keep - 1 :]:
                doomed = old.with_name(f"{files.PARTIAL}{old.name}")
                old.rename(doomed)
                shutil.rmtree(doomed)

    def _make_room(self, place: Path, part: Path) -> None:
        """Creates the empty folder `part` for a new checkpoint, unless `place` is already a complete checkpoint.

        If `place` is a damaged checkpoint, renames it, so that the new checkpoint can be moved to `place`.
        """
        files.refuse_links(self.folder, itself=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep_partial(self.folder)
        if place.exists():
            if _whole(place) is not None:
                return
            place.rename(place.with_name(f"damaged-{place.name}-{uuid.uuid4().hex[:8]}"))
        part.mkdir()

    def resume_point(self, data: str, *, or_anew: bool = False) -> Checkpoint | None:
        """Returns the newest complete checkpoint, or None if the run starts at its first step.

        The main rank searches, and all ranks get the same checkpoint.

        Args:
            data: fingerprint (SHA-256) of the data that the run reads now.
            or_anew: whether to return None if there is no complete checkpoint, even if the run has recorded something.

        Raises:
            ConfigError: there is no complete checkpoint, and starting at the first step would discard recorded rows or
                damaged checkpoints. Or the checkpoint was made with different data.
        """
        with group.agreed():
            found = self.newest() if world().is_main else None
            if found is None and world().is_main and not or_anew and (dropped := self._dropped()):
                run = self.folder.parent
                raise ConfigError(
                    f"{self._lack()}. Starting over from the first step would discard {dropped} of the run, so nothing was "
                    "changed. Put the checkpoints back, or start a new run with another --out, or start over with llmeff "
                    f"train --restart-from-scratch --out {shlex.quote(str(run))} (the old files are kept in "
                    f"{run / files.DISCARDED}N)"
                )
        checkpoint = group.from_main(found)
        if checkpoint is not None and checkpoint.state.get("data", "") not in ("", data):
            raise ConfigError(
                f"{checkpoint.folder}: this checkpoint was made with different data (SHA-256 "
                f"{checkpoint.state['data'][:12]}... then, {data[:12]}... now). Restore the data files, or start a new run"
            )
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """Returns the newest complete checkpoint, or None if there is none. Skips damaged checkpoints with a warning."""
        return next(filter(None, map(_whole, self._places())), None)

    def _places(self) -> list[Path]:
        """Returns all checkpoint folders, including damaged ones, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _dropped(self) -> str:
        """Describes the rows and checkpoints that starting at the first step would discard. Empty if there are none."""
        named = [f"checkpoint {place.name}" for place in self._places()]
        return " and ".join([*filter(None, [recorded(self.folder.parent)]), *named])

    def _lack(self) -> str:
        """Returns a message that explains why there is no complete checkpoint."""
        if self._places():
            return f"{self.folder}: no checkpoint in this folder can be read, for the reasons above"
        try:
            lying = os.listdir(self.folder)
        except FileNotFoundError:
            return f"{self.folder}: the folder does not exist, so there is no checkpoint to resume from"
        except OSError as error:
            return (
                f"{self.folder}: the folder cannot be read ({error.strerror}), so there is no checkpoint to resume from"
            )
        named = f"only {', '.join(sorted(lying)[:4])}" if lying else "nothing"
        return f"{self.folder}: the folder contains {named}, so there is no checkpoint to resume from"


def is_before_first(run: Path) -> bool:
    """Returns whether an unfinished run stopped before its first checkpoint was due, according to its metrics rows.

    If so, no checkpoint is missing, and an automatic restart may begin the run anew. If a checkpoint was due but is
    missing, the user must decide what to do.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    config, metrics = read(run / schema.CONFIG), run / schema.METRICS
    try:
        every, steps = config["checkpoint"]["every"], config["train"]["steps"]
        first: int = every if 0 < every < steps else steps
    except (KeyError, TypeError):
        raise ConfigError(f"{run / schema.CONFIG}: this file is not the config of a run") from None
    if any((run / schema.CHECKPOINTS).glob("step-*")):
        return False
    rows = whole_rows(metrics.read_bytes()) if metrics.is_file() else []
    return len(rows) <= first


def restore_random_states(checkpoint: Checkpoint) -> None:
    """Restores this rank's states of torch's random generators. If the checkpoint has none for this rank, changes nothing."""
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
    """Writes the loop state and, last, the manifest with the checksums of all files."""
    (part / _STATE).write_text(json.dumps(state), encoding="utf-8")
    sums = {file.name: files.sha256(file) for file in sorted(part.iterdir())}
    manifest = {"schema_version": SCHEMA_VERSION, "sha256": sums}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _whole(place: Path) -> Checkpoint | None:
    """Returns the checkpoint, or logs a warning and returns None if it is damaged."""
    try:
        return _verify(place)
    except (OSError, ValueError, KeyError) as problem:
        logger.warning("checkpoint %s is damaged, so it is skipped: %s", place.name, problem)
        return None


def _verify(place: Path) -> Checkpoint:
    manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"its format version is {manifest['schema_version']}, but this llmeff reads version {SCHEMA_VERSION}"
        )
    for name, expected in manifest["sha256"].items():
        if files.sha256(place / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(folder=place, **json.loads((place / _STATE).read_text(encoding="utf-8")))
