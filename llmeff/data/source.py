"""The contract of a text source, and the common parts of sources that consist of files."""

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
"""If files have this many bytes in total, their hashes are remembered until a size or a modification time changes."""


class SourceConfig(Component, family="source"):
    """Where the documents come from."""

    name: Text
    """The kind of source."""

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order.

        Raises:
            ConfigError: the source does not match its description.
        """
        raise NotImplementedError(type(self))

    def fingerprint(self) -> str:
        """A hash of the documents' names and contents; equal for equal sources on every machine."""
        raise NotImplementedError(type(self))


def fingerprint_of(parts: Iterable[object]) -> str:
    """SHA-256 of the parts, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file, see `digests`."""
    return digests([path])[0]


def digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file. The hashes of large files are kept in the cache folder, with the files' sizes and times."""
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
        with contextlib.suppress(OSError):  # if it cannot be saved, it is computed again
            memo.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(memo, json.dumps(known))
    return list(known["sha256"])


def decode(content: bytes, where: str) -> str:
    """Decodes UTF-8.

    Raises:
        ConfigError: the content is not UTF-8; the error names the first wrong byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start})") from None


class FileSource(SourceConfig):
    """A source of one or more files."""

    suffixes: ClassVar[tuple[str, ...]]
    """Ends of the files' names; folders are searched for these."""

    path: tuple[Text, ...] = ()
    """Files, folders (all files below with the source's suffixes) or globs (`**` crosses folders)."""
    by_split: dict[Split, tuple[Text, ...]] = Field(default_factory=dict)
    """The paths of each split, instead of `path`, for a corpus that is already divided."""

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
            raise ValueError(
                "give either path (data.splits divides the text) or by_split (it is divided already), not both"
            )
        return self

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the (unit, text) pairs of one file; `unit` is the file's name in the source.

        Raises:
            ConfigError: the file does not match the source's description.
        """
        raise NotImplementedError(type(self))

    def check_suffix(self, path: Path) -> None:
        """Refuses files of other sources.

        Raises:
            ConfigError: the file's name has none of this source's suffixes.
        """
        if not path.name.endswith(self.suffixes):
            raise ConfigError(f"{path}: the source {self.name!r} reads files that end in {', '.join(self.suffixes)}")

    def documents(self) -> Iterator[Document]:
        """Yields the documents of the files; within each split, files are sorted by name."""
        for split, unit, path in self._files():
            try:
                for name, text in self.read(path, unit):
                    yield Document(unit=name, text=text, split=split)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None

    def fingerprint(self) -> str:
        """Hashes the files' names relative to their common folder, their contents and the settings for reading them."""
        reading = self.model_dump(mode="json", exclude={"path", "by_split"})
        try:
            return fingerprint_of([reading, *([split, unit, digest(path)] for split, unit, path in self._files())])
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None

    def _files(self) -> list[tuple[Split | None, str, Path]]:
        """Each file with its split and its name relative to the common folder of all files."""
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
                problem = f"no file below {text} ends in {', '.join(self.suffixes)}"
            elif glob.has_magic(text):
                matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
                problem = f"no file matches {text}"
            else:
                matches = [path] if path.is_file() else []
                problem = f"there is no file {text}"
            if not matches:
                raise ConfigError(f"data.source: {problem}")
            found.update(path.absolute() for path in matches)
        for file in sorted(found):
            self.check_suffix(file)
        return sorted(found)
