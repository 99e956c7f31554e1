"""Text source that reads plain text files."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from llmeff.core.config import ConfigError, Text
from llmeff.data.source import FileSource, decode


class TextFiles(FileSource):
    """UTF-8 text files. Each file contains one document, or several documents with a separator between them."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    name: Literal["text"] = "text"
    separator: Text | None = None
    """Text between two documents of a file, which belongs to neither. None if each file is one document."""

    def check_suffix(self, path: Path) -> None:
        """Raises an error if another source reads files with such a name. All other names are allowed.

        Raises:
            ConfigError: the file's name has a suffix of another source.
        """
        for name in self.registry.names():
            other = self.registry[name]
            if other is not type(self) and path.name.endswith(getattr(other, "suffixes", ())):
                raise ConfigError(
                    f"{path}: the source {self.name!r} reads plain text. For this file, use the source {name!r}"
                )

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the name and text of the file or, if `separator` is set, of each of its parts."""
        text = decode(path.read_bytes(), str(path))
        if self.separator is None:
            yield unit, text
        else:
            for place, part in enumerate(text.split(self.separator)):
                yield f"{unit}:{place}", part
