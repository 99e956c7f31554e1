"""The contract of a text source, and what the sources that are files have in common."""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from llmeff.core import files
from llmeff.core.config import Component, ConfigError, Text
from llmeff.core.dist import cache_folder
from llmeff.data.splits import Document, Split

REMEMBERED_BYTES = 8 * 2**20
"""Files that are so large, alone or together, are hashed once and again only when their size or time changes."""


class SourceConfig(Component, family="source"):
    """Where the documents come from."""

    name: Text
    """The kind of source."""

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order.

        Raises:
            ConfigError: the source cannot be read as it is described.
        """
        raise NotImplementedError(type(self))

    def fingerprint(self) -> str:
        """A hash of the documents' names and content: equal sources have equal ones, on every machine."""
        raise NotImplementedError(type(self))


def fingerprint_of(parts: Iterable[object]) -> str:
    """SHA-256 of the parts, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """The file's SHA-256, see `digests`."""
    return digests([path])[0]


def digests(paths: Sequence[Path]) -> list[str]:
    """Each file's SHA-256; of files large together it is remembered in the cache folder, with their sizes and times."""
    states = [path.stat() for path in paths]
    if sum(state.st_size for state in states) < REMEMBERED_BYTES:
        return [files.sha256(path) for path in paths]
    memo = cache_folder() / "digests" / f"{fingerprint_of(str(path.resolve()) for path in paths)}.json"
    stamp = [[state.st_size, state.st_mtime_ns] for state in states]
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("stamp") != stamp:
        known = {"stamp": stamp, "sha256": [files.sha256(path) for path in paths]}
        with contextlib.suppress(OSError):  # without a place for it, it is computed again
            memo.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(memo, json.dumps(known))
    return list(known["sha256"])


def decode(content: bytes, where: str) -> str:
    """UTF-8.

    Raises:
        ConfigError: it is not; names the byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start})") from None


class FileSource(SourceConfig):
    """A source that is one or more files."""

    suffixes: ClassVar[tuple[str, ...]]
    """What the files' names end in; a folder is searched for these."""

    path: tuple[Text, ...] = ()
    """Files, folders (all below that end as such files do) or globs (`**` crosses folders)."""
    by_split: dict[Split, tuple[Text, ...]] = Field(default_factory=dict)
    """Instead of `path`, for a corpus that comes divided: the paths of each split."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("by_split", mode="before")
    @classmethod
    def _one_path_each(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {split: (paths,) if isinstance(paths, str) else paths for split, paths in value.items()}
        return value

    @model_validator(mode="after")
    def _path_or_splits(self) -> Self:
        if bool(self.path) == bool(self.by_split):
            raise ValueError("give either path (the splits are made here) or by_split (they are given), not both")
        return self

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """The (unit, text) pairs of one file that the source knows as `unit`.

        Raises:
            ConfigError: the file is not what the source is described as.
        """
        raise NotImplementedError(type(self))

    def check_suffix(self, path: Path) -> None:
        """Refuses a file of another kind.

        Raises:
            ConfigError: its name does not end as this source's files do.
        """
        if not path.name.endswith(self.suffixes):
            raise ConfigError(f"{path}: the source {self.name!r} reads files that end in {', '.join(self.suffixes)}")

    def documents(self) -> Iterator[Document]:
        """The files' documents, in the order of their names within each split."""
        for split, unit, path in self._files():
            try:
                for name, text in self.read(path, unit):
                    yield Document(unit=name, text=text, split=split)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None

    def fingerprint(self) -> str:
        """Of the files' names relative to the folder that holds them all, their content, and how they are read."""
        reading = self.model_dump(mode="json", exclude={"path", "by_split"})
        try:
            return fingerprint_of([reading, *([split, unit, digest(path)] for split, unit, path in self._files())])
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None

    def _files(self) -> list[tuple[Split | None, str, Path]]:
        """Each file with its split and its name below the folder that holds them all."""
        given: list[tuple[Split | None, tuple[str, ...]]] = [*self.by_split.items()] or [(None, self.path)]
        found = [(split, path) for split, paths in given for path in self._expand(paths)]
        root = os.path.commonpath([path.parent for _, path in found])
        return [(split, path.relative_to(root).as_posix(), path) for split, path in found]

    def _expand(self, given: tuple[str, ...]) -> list[Path]:
        found: set[Path] = set()
        for text in given:
            path = Path(text).expanduser()
            if path.is_dir():
                matches = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(self.suffixes)]
                wanted = f"file that ends in {', '.join(self.suffixes)} below"
            elif glob.has_magic(text):
                matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
                wanted = "file matches"
            else:
                matches = [path] if path.is_file() else []
                wanted = "such file:"
            if not matches:
                raise ConfigError(f"data.source: there is no {wanted} {text}")
            found.update(path.absolute() for path in matches)
        for file in sorted(found):
            self.check_suffix(file)
        return sorted(found)
