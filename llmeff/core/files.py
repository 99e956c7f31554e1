"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from llmeff.core.config import ConfigError
from llmeff.core.pulse import beat

PARTIAL = ".partial-"
"""Names that begin so are what a killed process left behind; nothing reads them."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


_UNUSUAL = re.compile(r"[^A-Za-z0-9.+=-]+")


def safe_name(text: str) -> str:
    """A name for a file: the text, or where that holds anything unusual, what is left of it and a digest."""
    kept = _UNUSUAL.sub("-", text).strip("-.")
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def _beside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk."""
    beat()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write; it replaces what is at `path` when the block ends well, and leaves nothing otherwise."""
    part = _beside(path)
    try:
        yield part
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step: a reader sees the old content or the new, never a part."""
    with new_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears at `path` when the block ends well, and leaves nothing otherwise.

    Raises:
        FileExistsError: something not empty is already at `path` when the block ends.
    """
    part = _beside(path)
    part.mkdir(parents=True)
    try:
        yield part
        settle(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def settle(part: Path, path: Path) -> None:
    """Puts a filled folder in its place, once all that is in it is on disk.

    Raises:
        FileExistsError: something not empty is already there.
    """
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    part.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns what goes wrong while the block writes a file or folder into the one error that a user sees.

    Raises:
        ConfigError: names the path and the reason; where the disk is full, what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        advice = " Free some, then try again; a run goes on by --resume." if number in _FULL else ""
        raise ConfigError(f"{path}: cannot be written ({os.strerror(number)}).{advice}") from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors keeps the number in its text only
    return int(said[1]) if said else None


def sweep_partial(folder: Path) -> None:
    """Removes what killed processes left half-written anywhere under the folder."""
    for left in list(folder.rglob(f"{PARTIAL}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
