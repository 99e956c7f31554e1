"""Files that are whole or absent: written beside their place, flushed to disk, then renamed; in folders that hold no links.

A folder of ours (a run's, a sweep's, a cache's entry) may itself be reached through links, which its user made. Nothing in
it may be one: whoever can write there could else have files elsewhere read, written over or deleted in the user's name.
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
"""Names that begin so are what a killed process left behind; nothing reads them."""

DISCARDED = "discarded-"
"""Folders that begin so hold what was recorded before a run began anew; nothing reads them, and nothing removes them."""

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
    """Removes what killed processes left half-written anywhere under the folder; a link goes, not what it leads to."""
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
    """Refuses a folder of ours in which something leads elsewhere; call it before anything in it is touched.

    Args:
        folder: may be reached through links, and need not exist. What of it cannot be listed is left out.
        itself: the folder too is inside one of ours, and may be no link.

    Raises:
        ConfigError: it, or something at any depth in it, is a symbolic link (also one that leads nowhere), or neither a
            file nor a folder (a pipe, a socket, a device).
    """
    own = [folder] if itself and folder.is_symlink() else []
    found = own or list(_strangers(folder))
    if not found:
        return
    first = found[0]
    what = f"is a symbolic link to {os.readlink(first)}" if first.is_symlink() else "is neither a file nor a folder"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ConfigError(
        f"{first}: {what}{more}; nothing inside a folder that llmeff writes is followed out of it, and nothing was touched: "
        "put what it leads to in its place, or remove it (the folder itself may be a link)"
    )


def _strangers(folder: Path) -> Iterator[Path]:
    """What is neither a file nor a folder, in order of their names."""
    try:
        with os.scandir(folder) as entries:
            lying = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # it is not there, or just went, or cannot be listed: who needs it will say so
        return
    for entry in lying:
        if entry.is_dir(follow_symlinks=False):
            yield from _strangers(Path(entry))
        elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry):
            yield Path(entry)


def open_to_append(path: Path) -> int:
    """A handle that writes at the end of a file, which is made where there is none.

    A file that has another name elsewhere (a hard link) is first replaced by a copy, so that only this one grows.

    Raises:
        OSError: it cannot be written, or is a symbolic link.
    """
    if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
        write_bytes(path, path.read_bytes())
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)


def open_anew(path: Path) -> int:
    """A handle that writes a new file in place of what has its name, which is not written through: no link of any kind is."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)


def set_aside(folder: Path, names: Iterable[str], copied: Iterable[str]) -> Path | None:
    """Moves parts of a folder into `discarded-N` inside it, N the first that holds none of them.

    Cut off and called again, it goes on with the same N. Parts move in the order of their names as given.

    Args:
        folder: whose parts.
        names: the parts that are moved, where they are there.
        copied: files that are copied beside them.

    Returns:
        where they are now; None where none was there.
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
