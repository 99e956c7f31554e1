"""Caches that are whole or made again: folders of files whose hashes are written down, named by what decides them."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.core.log import logger

SAMPLE_BLOCKS = 64
SAMPLE_BLOCK_BYTES = 256 * 1024
"""Opening a cache hashes 64 blocks of 256 KiB spread over each file: all of a file of up to 16 MiB."""
ABANDONED_S = 3600.0
"""A half-written folder whose files have not grown for so long has no writer any more."""


def ensure_by_one(
    folder: Path, write: Callable[[Path], None], kind: str, *, is_main: bool, wait: Callable[[], None]
) -> None:
    """`ensure`, by one process of several that will read the cache.

    Args:
        folder: see `ensure`.
        write: see `ensure`.
        kind: see `ensure`.
        is_main: whether this process looks after the cache.
        wait: returns when all processes have called it.

    Raises:
        ConfigError: the cache cannot be made; the processes that are not the main one only say so.
    """
    try:
        if is_main:
            ensure(folder, write, kind)
    finally:
        wait()
    if not folder.exists():
        raise ConfigError(f"the {kind} was not made: the main process says why")


def ensure(folder: Path, write: Callable[[Path], None], kind: str) -> None:
    """Makes the cache unless a whole one is there; a damaged one is set aside, with a warning, and made again.

    Args:
        folder: where the cache lies; its name is the hash of what decides its content.
        write: fills a new folder; among its files is `meta.json`, a table of all else that a reader must know.
        kind: what to call it in messages, as in "token cache".

    Raises:
        ConfigError: the disk is full, or the folder cannot be written.
    """
    if os.path.lexists(folder):
        damage = _damage(folder)
        if damage is None:
            return
        aside = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        logger.warning("the %s is damaged (%s): made again; the old one is kept as %s", kind, damage, aside)
    try:
        _sweep_abandoned(folder.parent)
        with files.new_folder(folder) as part:
            write(part)
            _seal(part)
    except OSError as error:
        if (folder / "meta.json").exists():  # another process was faster
            return
        raise ConfigError(
            f"the {kind} {folder} cannot be written ({error.strerror or error}): "
            "make room, or set LLMEFF_CACHE to a folder that has it"
        ) from None


def read_meta(folder: Path) -> tuple[dict[str, Any], str]:
    """What a whole cache's `meta.json` says, and its SHA-256: since it holds all files' hashes, the whole content's."""
    content = (folder / "meta.json").read_bytes()
    return json.loads(content), hashlib.sha256(content).hexdigest()


def _sample(path: Path) -> str:
    """A hash of the file's size and of blocks spread evenly over it."""
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BLOCK_BYTES)
    step = max(SAMPLE_BLOCK_BYTES, -(-last // (SAMPLE_BLOCKS - 1)))
    with path.open("rb") as file:
        for place in [*range(0, last, step), last]:
            file.seek(place)
            hasher.update(file.read(SAMPLE_BLOCK_BYTES))
    return hasher.hexdigest()


def _seal(folder: Path) -> None:
    """Writes down each file's hashes: the whole one names the content, the sampled one is checked at every opening."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(file.name for file in folder.iterdir() if file != path)
    hashes = {name: {"sha256": files.sha256(folder / name), "sample": _sample(folder / name)} for name in names}
    path.write_text(json.dumps({**meta, "files": hashes}, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with the cache; None where it is whole."""
    try:
        files.refuse_links(folder, itself=True)
        hashes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
        wrong = [name for name, known in hashes.items() if _sample(folder / name) != known["sample"]]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed" if wrong else None


def _sweep_abandoned(folder: Path) -> None:
    """Removes half-written caches whose writer was killed; a living writer's files grow."""
    for part in folder.glob(f"{files.PARTIAL}*"):
        times = [entry.stat().st_mtime for entry in (part, *part.glob("*"))]
        if time.time() - max(times) > ABANDONED_S:
            shutil.rmtree(part, ignore_errors=True)
