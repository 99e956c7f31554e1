"""Text source that reads JSON Lines files, plain or compressed."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, ClassVar, Literal, cast

from llmeff.core.config import ConfigError, Text
from llmeff.core.registry import nearest
from llmeff.data.source import FileSource, decode


class JsonLines(FileSource):
    """JSON Lines files. Each line is a JSON object that contains one document."""

    suffixes: ClassVar[tuple[str, ...]] = tuple(
        f".{kind}{compression}" for kind in ("jsonl", "ndjson", "json") for compression in ("", ".gz", ".zst")
    )

    name: Literal["jsonl"] = "jsonl"
    field: Text = "text"
    """Name of the field that contains the text."""

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the name and text of each line. Empty lines are skipped."""
        with _open(path) as file:
            try:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{unit}:{number}", self._text(line, f"{path}, line {number}")
            except (EOFError, zlib.error) as error:
                raise ConfigError(f"{path}: is damaged ({error})") from None

    def _text(self, line: bytes, where: str) -> str:
        try:
            entry = json.loads(decode(line, where))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: is not JSON ({error})") from None
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: expected a JSON object, found {type(entry).__name__}")
        if self.field not in entry:
            raise ConfigError(f"{where}: there is no field {self.field!r}.{nearest(self.field, entry)}")
        text = entry[self.field]
        if not isinstance(text, str):
            raise ConfigError(
                f"{where}: the field {self.field!r} contains a value of type {type(text).__name__}, not text"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{where}: the field {self.field!r} contains half a surrogate pair, which is not valid text"
            ) from None
        return text


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")
