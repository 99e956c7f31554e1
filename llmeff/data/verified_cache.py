"""Verified caches: folders with the hashes of their files, named by a hash of what determines them. Damaged ones are remade."""

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
"""A half-written folder is abandoned if its files have not changed for this many seconds."""


def ensure_by_one(
    folder: Path, write: Callable[[Path], None], kind: str, *, is_main: bool, wait: Callable[[], None]
) -> None:
    """Calls `ensure` in one of several processes that will read the cache.

    Args:
        folder: see `ensure`.
        write: see `ensure`.
        kind: see `ensure`.
        is_main: whether this process makes and checks the cache.
        wait: returns once all processes have called it.

    Raises:
        ConfigError: the cache cannot be made; only the main process gives the reason.
    """
    try:
        if is_main:
            ensure(folder, write, kind)
    finally:
        wait()
    if not folder.exists():
        raise ConfigError(f"the {kind} could not be made: see the error of the main process")


def ensure(folder: Path, write: Callable[[Path], None], kind: str) -> None:
    """Makes the cache unless it is there and undamaged. A damaged cache is set aside with a warning and remade.

    Args:
        folder: the cache's folder; its name is a hash of what determines the content.
        write: fills a new folder, including `meta.json`, a JSON object with everything else that a reader needs.
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
        logger.warning("the %s is damaged (%s): it is remade; the damaged one is kept as %s", kind, damage, aside)
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
            "free some space, or set LLMEFF_CACHE to a writable folder with enough"
        ) from None


def read_meta(folder: Path) -> tuple[dict[str, Any], str]:
    """Reads `meta.json` and its SHA-256, which identifies the whole cache, since `meta.json` holds all files' hashes."""
    content = (folder / "meta.json").read_bytes()
    return json.loads(content), hashlib.sha256(content).hexdigest()


def _sample(path: Path) -> str:
    """A hash of the file's size and of blocks spread evenly over the file."""
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
    """Adds each file's hashes to `meta.json`: the full one identifies the content, the sampled one is checked on opening."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(file.name for file in folder.iterdir() if file != path)
    hashes = {name: {"sha256": files.sha256(folder / name), "sample": _sample(folder / name)} for name in names}
    path.write_text(json.dumps({**meta, "files": hashes}, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with the cache. None: it is undamaged."""
    try:
        files.refuse_links(folder, itself=True)
        hashes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
        wrong = [name for name, known in hashes.items() if _sample(folder / name) != known["sample"]]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed" if wrong else None


def _sweep_abandoned(folder: Path) -> None:
    """Removes half-written caches whose writer was killed. The files of a live writer keep changing."""
    for part in folder.glob(f"{files.PARTIAL}*"):
        times = [entry.stat().st_mtime for entry in (part, *part.glob("*"))]
        if time.time() - max(times) > ABANDONED_S:
            shutil.rmtree(part, ignore_errors=True)
