"""Interface of a text source, and the base class of sources that consist of files."""

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
"""Minimum total size of files, in bytes, for which `digests` stores and reuses the hashes."""


class SourceConfig(Component, family="source"):
    """Source of text documents."""

    name: Text
    """The kind of source."""

    def documents(self) -> Iterator[Document]:
        """Yields the documents, always in the same order.

        Raises:
            ConfigError: the documents are not as the config describes them.
        """
        raise NotImplementedError(type(self))

    def fingerprint(self) -> str:
        """Returns a hash of the documents' names and contents. Equal sources have equal hashes on every machine."""
        raise NotImplementedError(type(self))


def fingerprint_of(parts: Iterable[object]) -> str:
    """Returns the SHA-256 of the parts, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, see `digests`."""
    return digests([path])[0]


def digests(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of each file.

    The hashes of large files are stored in the cache folder, and reused while the files' sizes and modification times
    stay the same.
    """
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
        with contextlib.suppress(OSError):  # if the hashes cannot be stored, the next call computes them again
            memo.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(memo, json.dumps(known))
    return list(known["sha256"])


def decode(content: bytes, where: str) -> str:
    """Decodes UTF-8.

    Raises:
        ConfigError: the content is not UTF-8. The error gives the index of the first invalid byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (invalid byte at index {error.start})") from None


class FileSource(SourceConfig):
    """Base class of text sources that read files."""

    suffixes: ClassVar[tuple[str, ...]]
    """Suffixes of the file names that the source finds in folders."""

    path: tuple[Text, ...] = ()
    """Files, folders or globs. A folder stands for all files below it with the source's suffixes. In a glob, `**`
    matches any number of folders."""
    by_split: dict[Split, tuple[Text, ...]] = Field(default_factory=dict)
    """Paths of each split, for a corpus that is already divided into splits. Give it instead of `path`."""

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
                "give either path (data.splits then divides the text) or by_split (for text that is already divided "
                "into splits), but not both"
            )
        return self

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the (name, text) pairs of a file's documents.

        Args:
            path: the file.
            unit: name of the file in the source.

        Raises:
            ConfigError: the file is not as the config describes it.
        """
        raise NotImplementedError(type(self))

    def check_suffix(self, path: Path) -> None:
        """Raises an error if this source cannot read files with such a name.

        Raises:
            ConfigError: the file's name has none of this source's suffixes.
        """
        if not path.name.endswith(self.suffixes):
            raise ConfigError(
                f"{path}: the source {self.name!r} reads only files that end in {', '.join(self.suffixes)}"
            )

    def documents(self) -> Iterator[Document]:
        """Yields the documents of the files. Within each split, files are sorted by name."""
        for split, unit, path in self._files():
            try:
                for name, text in self.read(path, unit):
                    yield Document(unit=name, text=text, split=split)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None

    def fingerprint(self) -> str:
        """Returns a hash of the files' names, contents and splits, and of the settings for reading them.

        Names are relative to the common folder of the files.
        """
        reading = self.model_dump(mode="json", exclude={"path", "by_split"})
        try:
            return fingerprint_of([reading, *([split, unit, digest(path)] for split, unit, path in self._files())])
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None

    def _files(self) -> list[tuple[Split | None, str, Path]]:
        """Returns each file with its split and its name relative to the common folder of all files."""
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
