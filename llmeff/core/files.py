"""Writes files atomically, and refuses links in the folders that llmeff writes.

An atomic write goes to a temporary file in the same folder, which is flushed to disk and then renamed.

The folder of a run, a sweep or a cache entry may be reached through symbolic links, but may not contain any. Otherwise,
anyone who can write there could make llmeff read, overwrite or delete files elsewhere.
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
"""Prefix of temporary files and folders. A killed process may leave some behind. Nothing reads them."""

DISCARDED = "discarded-"
"""Prefix of folders with the earlier records of a run that was begun anew. Nothing reads or removes them."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


_UNUSUAL = re.compile(r"[^A-Za-z0-9.+=-]+")


def safe_name(text: str) -> str:
    """Returns a file name for a text: the text itself, if it is a safe name.

    Otherwise, unusual characters become dashes, and a short digest of the text is appended.
    """
    kept = _UNUSUAL.sub("-", text).strip("-.")
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def _beside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Flushes a file to disk, or the list of entries of a folder."""
    beat()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path to write. At the end of the block, that file replaces `path`.

    If the block raises an exception, the temporary file is deleted and `path` is unchanged.
    """
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
    """Writes a file atomically: a reader sees either the old content or the new content, never a mixture."""
    with new_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder to fill. At the end of the block, it is moved to `path`.

    If the block raises an exception, the temporary folder is deleted.

    Raises:
        OSError: if `path` exists at the end of the block and is not an empty folder.
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
    """Flushes a folder and its contents to disk, then renames it.

    Args:
        part: the folder.
        path: its new path.

    Raises:
        OSError: if `path` exists and is not an empty folder.
    """
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    part.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Context manager for a block that writes a file or folder. Converts file-system errors to a ConfigError.

    Args:
        path: the file or folder that the error names.

    Raises:
        ConfigError: if the block could not write. The message gives the reason and, if the disk is full, advice.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        advice = " Free some space and try again. To continue a run, use --resume." if number in _FULL else ""
        raise ConfigError(f"{path}: cannot be written ({os.strerror(number)}).{advice}") from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors gives the number only in its text
    return int(found[1]) if found else None


def sweep_partial(folder: Path) -> None:
    """Deletes the temporary files and folders that killed processes left anywhere under a folder.

    If one of them is a symbolic link, only the link is deleted, not its target.
    """
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
    """Raises an error if a folder that llmeff writes contains a symbolic link or a special file, at any depth.

    Call this before anything in the folder is read or written. Subfolders that cannot be listed are skipped.

    Args:
        folder: the folder. It may be absent, and its path may contain links.
        itself: whether to refuse the folder itself too if it is a link. Use it for a folder inside one that llmeff
            writes.

    Raises:
        ConfigError: if the folder contains a symbolic link (even a broken link), a pipe, a socket or a device. With
            `itself`, also if the folder is a symbolic link.
    """
    top = [folder] if itself and folder.is_symlink() else []
    found = top or list(_strangers(folder))
    if not found:
        return
    first = found[0]
    what = f"is a symbolic link to {os.readlink(first)}" if first.is_symlink() else "is neither a file nor a folder"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ConfigError(
        f"{first}: {what}{more}. llmeff follows no links inside the folders that it writes, and has changed nothing. "
        "Remove this entry, or replace the link by a copy of its target (only the top folder may be a link)"
    )


def _strangers(folder: Path) -> Iterator[Path]:
    """Yields everything at any depth in a folder that is neither a file nor a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            lying = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # absent or unreadable: code that needs the folder reports that
        return
    for entry in lying:
        if entry.is_dir(follow_symlinks=False):
            yield from _strangers(Path(entry))
        elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry):
            yield Path(entry)


def open_to_append(path: Path) -> int:
    """Opens a file to append to, and creates it if absent. Returns the file descriptor.

    If the file has other hard links, a copy replaces it first, so that the content of the other links does not change.

    Raises:
        OSError: if the file cannot be written or is a symbolic link.
    """
    if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
        write_bytes(path, path.read_bytes())
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)


def open_anew(path: Path) -> int:
    """Creates a new file and returns its file descriptor.

    A file or link of the same name is removed first, so that nothing is written through a hard or symbolic link.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)


def set_aside(folder: Path, names: Iterable[str], copied: Iterable[str]) -> Path | None:
    """Moves entries of a folder into its subfolder `discarded-N`, in the order of `names`.

    N is the lowest number from 1 for which `discarded-N` contains none of the entries to move. So if a call was
    interrupted, the next call continues in the same subfolder.

    Args:
        folder: the folder.
        names: names of the entries to move. Absent entries are skipped.
        copied: names of files to copy, not move, into the subfolder. Absent files are skipped.

    Returns:
        The path of `discarded-N`, or None if there was nothing to move.
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
    """Returns the SHA-256 digest of a file, in hexadecimal."""
    beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
