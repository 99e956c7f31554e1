"""Plain text files as a source."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from llmeff.core.config import ConfigError, Text
from llmeff.data.source import FileSource, decode


class TextFiles(FileSource):
    """UTF-8 text files: each holds one document, or several with a separator between them."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    name: Literal["text"] = "text"
    separator: Text | None = None
    """The text between two documents of a file, part of neither. None: each file is one document."""

    def check_suffix(self, path: Path) -> None:
        """Refuses only files that another source reads.

        Raises:
            ConfigError: the file's name has a suffix of another source.
        """
        for name in self.registry.names():
            other = self.registry[name]
            if other is not type(self) and path.name.endswith(getattr(other, "suffixes", ())):
                raise ConfigError(f"{path}: the source {self.name!r} reads plain text; for this file use {name!r}")

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the file's text, or its parts."""
        text = decode(path.read_bytes(), str(path))
        if self.separator is None:
            yield unit, text
        else:
            for place, part in enumerate(text.split(self.separator)):
                yield f"{unit}:{place}", part
