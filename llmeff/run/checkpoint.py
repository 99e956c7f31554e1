"""Saved states of a run: whole or absent, checksummed, the last few kept, a damaged one passed over."""

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
    """Where its files lie."""
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What the loop had to remember beside weights and optimizer."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, in the run's; need not exist.
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
            self._prune(place)  # its process may have been killed before it did
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
        """Removes those before the newest, but for as many as are kept with it."""
        with group.agreed(), files.reported(newest):
            older = [old for old in self._places() if old.name < newest.name] if world().is_main else []
            for old in older[self.keep - 1 :]:
                doomed = old.with_name(f"{files.PARTIAL}{old.name}")
                old.rename(doomed)
                shutil.rmtree(doomed)

    def _make_room(self, place: Path, part: Path) -> None:
        """An empty folder to write into; none where the checkpoint is there already."""
        files.refuse_links(self.folder, itself=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep_partial(self.folder)
        if place.exists():
            if _whole(place) is not None:
                return
            place.rename(place.with_name(f"damaged-{place.name}-{uuid.uuid4().hex[:8]}"))
        part.mkdir()

    def resume_point(self, data: str, *, or_anew: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint; None where the run begins at its first step. The main rank looks for all.

        Args:
            data: fingerprint of what the run now reads.
            or_anew: begin at the first step where there is no whole checkpoint, whatever was recorded.

        Raises:
            ConfigError: there is none, but rows or checkpoints that the run would drop if it began at its first step. Or
                the data are no longer those that it was made with.
        """
        with group.agreed():
            found = self.newest() if world().is_main else None
            if found is None and world().is_main and not or_anew and (dropped := self._dropped()):
                run = self.folder.parent
                raise ConfigError(
                    f"{self._lack()}, and going on from the first step would drop {dropped} of the run; it is left as it "
                    "is. Put its checkpoints back; or begin it anew by llmeff train --restart-from-scratch --out "
                    f"{shlex.quote(str(run))}, which keeps all that in {run / files.DISCARDED}N; or begin another run with another --out"
                )
        checkpoint = group.from_main(found)
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
        """Of all there are, damaged ones too, the newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _dropped(self) -> str:
        """What a run that begins at its first step would drop, in words; nothing where there is nothing."""
        named = [f"checkpoint {place.name}" for place in self._places()]
        return " and ".join([*filter(None, [recorded(self.folder.parent)]), *named])

    def _lack(self) -> str:
        """Why there is no whole checkpoint, in words."""
        if self._places():
            return f"{self.folder}: no checkpoint there can be read, for the reasons above"
        try:
            lying = os.listdir(self.folder)
        except FileNotFoundError:
            return f"{self.folder}: is not there, so there is no checkpoint to go on from"
        except OSError as error:
            return f"{self.folder}: cannot be read ({error.strerror}), so there is no checkpoint to go on from"
        named = f"only {', '.join(sorted(lying)[:4])}" if lying else "nothing"
        return f"{self.folder}: holds {named}, so there is no checkpoint to go on from"


def is_before_first(run: Path) -> bool:
    """Whether an unfinished run ended before its first checkpoint was due, as far as its rows tell.

    There is then none to go on from and none is missing: whoever repeats runs by themselves begins it anew. Where one was due
    and is not there, somebody must look.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    config, metrics = read(run / schema.CONFIG), run / schema.METRICS
    try:
        every, steps = config["checkpoint"]["every"], config["train"]["steps"]
        first: int = every if 0 < every < steps else steps
    except (KeyError, TypeError):
        raise ConfigError(f"{run / schema.CONFIG}: is no config of a run") from None
    if any((run / schema.CHECKPOINTS).glob("step-*")):
        return False
    rows = whole_rows(metrics.read_bytes()) if metrics.is_file() else []
    return len(rows) <= first


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
