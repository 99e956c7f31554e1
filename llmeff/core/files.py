"""Files that are whole or absent: written next to their place, flushed to disk, then renamed. Their folders hold no links.

A folder of ours (a run's, a sweep's, a cache entry's) may itself be reached through links that its user made. Nothing in
it may be a link: otherwise, whoever can write there could make us read, overwrite or delete files elsewhere.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from llmeff.core.config import ConfigError
from llmeff.core.heartbeat import beat

PARTIAL = ".partial-"
"""Prefix of what a killed process left behind. Nothing reads it."""

DISCARDED = "discarded-"
"""Prefix of folders that hold what was recorded before a run began anew. Nothing reads or removes them."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


_UNUSUAL = re.compile(r"[^A-Za-z0-9.+=-]+")


def safe_name(text: str) -> str:
    """A name for a file: the text itself or, if it holds anything unusual, the rest of it and a digest."""
    kept = _UNUSUAL.sub("-", text).strip("-.")
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def _beside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    beat()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write. It replaces `path` if the block ends well; otherwise nothing is left of it."""
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
    """Like `write_bytes`, for text in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill. It appears at `path` if the block ends well; otherwise nothing is left of it.

    Raises:
        FileExistsError: something that is not empty is at `path` when the block ends.
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
    """Moves a filled folder to its place once everything in it is on disk.

    Raises:
        FileExistsError: something that is not empty is already there.
    """
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    part.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns errors in a block that writes a file or folder into the one error that a user sees.

    Raises:
        ConfigError: names the path and the reason and, if the disk is full, says what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        advice = " Free some space and try again; continue a run with --resume." if number in _FULL else ""
        raise ConfigError(f"{path}: cannot be written ({os.strerror(number)}).{advice}") from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors gives the number only in its text
    return int(found[1]) if found else None


def sweep_partial(folder: Path) -> None:
    """Removes what killed processes left half-written anywhere under the folder. A link is removed, not its target."""
    for place, folders, names in os.walk(folder):
        for name in [name for name in folders if name.startswith(PARTIAL)]:
            folders.remove(name)
            left = Path(place, name)
            if left.is_symlink():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)
        for name in names:
            if name.startswith(PARTIAL):
                Path(place, name).unlink(missing_ok=True)


def refuse_links(folder: Path, *, itself: bool = False) -> None:
    """Refuses a folder of ours in which something leads elsewhere. Call it before anything in it is touched.

    Args:
        folder: may be reached through links, and need not exist. Parts that cannot be listed are skipped.
        itself: whether the folder is inside one of ours, so that it may not be a link either.

    Raises:
        ConfigError: the folder (with `itself`) or anything at any depth in it is a symbolic link (even a broken one), or is
            neither a file nor a folder (a pipe, a socket, a device).
    """
    top = [folder] if itself and folder.is_symlink() else []
    found = top or list(_strangers(folder))
    if not found:
        return
    first = found[0]
    what = f"is a symbolic link to {os.readlink(first)}" if first.is_symlink() else "is neither a file nor a folder"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ConfigError(
        f"{first}: {what}{more}; llmeff follows no links inside the folders that it writes, and nothing was touched: "
        "put what it leads to in its place, or remove it (the folder itself may be a link)"
    )


def _strangers(folder: Path) -> Iterator[Path]:
    """Everything that is neither a file nor a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            lying = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # absent, just removed, or not to be listed: whoever needs it will say so
        return
    for entry in lying:
        if entry.is_dir(follow_symlinks=False):
            yield from _strangers(Path(entry))
        elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry):
            yield Path(entry)


def open_to_append(path: Path) -> int:
    """A handle that writes at the end of a file, which is created if absent.

    If the file has another name elsewhere (a hard link), a copy replaces it first, so that only this one grows.

    Raises:
        OSError: the file cannot be written, or is a symbolic link.
    """
    if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
        write_bytes(path, path.read_bytes())
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)


def open_anew(path: Path) -> int:
    """A handle to a new file, which replaces whatever has its name. It writes through no link, hard or symbolic."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)


def set_aside(folder: Path, names: Iterable[str], copied: Iterable[str]) -> Path | None:
    """Moves parts of a folder into `discarded-N` inside it; N is the first number whose folder holds none of them.

    If it is interrupted and called again, it continues with the same N. Parts move in the order of `names`.

    Args:
        folder: the folder whose parts are moved.
        names: the parts to move; absent ones are skipped.
        copied: files to copy next to them.

    Returns:
        where they are now; None if there was nothing to move.
    """
    names = list(names)
    lying = [name for name in names if os.path.lexists(folder / name)]
    if not lying:
        return None
    number = 1
    while any(os.path.lexists(folder / f"{DISCARDED}{number}" / name) for name in lying):
        number += 1
    place = folder / f"{DISCARDED}{number}"
    place.mkdir(exist_ok=True)
    for name in copied:
        if (folder / name).is_file():
            write_bytes(place / name, (folder / name).read_bytes())
    for name in lying:
        (folder / name).rename(place / name)
    sync(place)
    sync(folder)
    return place


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
