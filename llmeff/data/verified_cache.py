"""Verified caches: folders that are checked when they are opened, and made again if they are damaged.

The name of a cache's folder is a hash of everything that determines its content. The folder contains its files' hashes.
"""

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
"""Opening a cache hashes 64 blocks of 256 KiB spread over each file, which covers files of up to 16 MiB entirely."""
ABANDONED_S = 3600.0
"""A half-written folder counts as abandoned if its files have not changed for this many seconds."""


def ensure_by_one(
    folder: Path, write: Callable[[Path], None], kind: str, *, is_main: bool, wait: Callable[[], None]
) -> None:
    """Calls `ensure` in the main process only. The other processes wait for it.

    Args:
        folder: see `ensure`.
        write: see `ensure`.
        kind: see `ensure`.
        is_main: whether this process makes and checks the cache.
        wait: returns once all processes have called it.

    Raises:
        ConfigError: the cache cannot be made. Only the error of the main process gives the reason.
    """
    try:
        if is_main:
            ensure(folder, write, kind)
    finally:
        wait()
    if not folder.exists():
        raise ConfigError(f"the {kind} could not be made: see the error of the main process")


def ensure(folder: Path, write: Callable[[Path], None], kind: str) -> None:
    """Makes the cache, unless it exists and is undamaged. A damaged cache is renamed with a warning, and made again.

    Args:
        folder: the cache's folder. Its name is a hash of everything that determines the content.
        write: fills a new folder. It must write `meta.json`, a JSON object with all metadata that a reader of
            the cache needs.
        kind: name of the cache in messages, such as "token cache".

    Raises:
        ConfigError: the disk is full, or the folder cannot be written.
    """
    if os.path.lexists(folder):
        damage = _damage(folder)
        if damage is None:
            return
        aside = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        logger.warning("the %s is damaged (%s) and is made again. The damaged cache is now %s", kind, damage, aside)
    try:
        _sweep_abandoned(folder.parent)
        with files.new_folder(folder) as part:
            write(part)
            _seal(part)
    except OSError as error:
        if (folder / "meta.json").exists():  # another process made it first
            return
        raise ConfigError(
            f"the {kind} {folder} cannot be written ({error.strerror or error}): "
            "free some space, or set LLMEFF_CACHE to a writable folder with enough space"
        ) from None


def read_meta(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the content of `meta.json` and its SHA-256.

    The SHA-256 identifies the whole cache, because `meta.json` contains the hashes of all other files.
    """
    content = (folder / "meta.json").read_bytes()
    return json.loads(content), hashlib.sha256(content).hexdigest()


def _sample(path: Path) -> str:
    """Returns a hash of a file's size and of blocks that are spread evenly over the file."""
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
    """Adds two hashes of each file to `meta.json`.

    The hash of the whole file identifies the content. The hash of sampled blocks is checked when the cache is opened.
    """
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(file.name for file in folder.iterdir() if file != path)
    hashes = {name: {"sha256": files.sha256(folder / name), "sample": _sample(folder / name)} for name in names}
    path.write_text(json.dumps({**meta, "files": hashes}, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Returns a description of the cache's damage, or None if it is undamaged."""
    try:
        files.refuse_links(folder, itself=True)
        hashes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
        wrong = [name for name, known in hashes.items() if _sample(folder / name) != known["sample"]]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed" if wrong else None


def _sweep_abandoned(folder: Path) -> None:
    """Removes half-written caches, left by killed processes, that have not changed for `ABANDONED_S` seconds."""
    for part in folder.glob(f"{files.PARTIAL}*"):
        times = [entry.stat().st_mtime for entry in (part, *part.glob("*"))]
        if time.time() - max(times) > ABANDONED_S:
            shutil.rmtree(part, ignore_errors=True)
