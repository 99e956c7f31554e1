"""Text source that reads Parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from llmeff.core.config import ConfigError, Text
from llmeff.core.registry import nearest
from llmeff.data.source import FileSource


class Parquet(FileSource):
    """Parquet files. Each row is a document."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    name: Literal["parquet"] = "parquet"
    column: Text = "text"
    """Name of the column that contains the text."""

    def read(self, path: Path, unit: str) -> Iterator[tuple[str, str]]:
        """Yields the name and text of each row."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.column not in names:
                    raise ConfigError(f"{path}: there is no column {self.column!r}.{nearest(self.column, names)}")
                row = 0
                for batch in file.iter_batches(columns=[self.column]):
                    for text in batch.column(0).to_pylist():
                        if not isinstance(text, str):
                            raise ConfigError(
                                f"{path}, row {row}: the column {self.column!r} contains a value of type "
                                f"{type(text).__name__}, not text"
                            )
                        yield f"{unit}:{row}", text
                        row += 1
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{path}: is not a Parquet file ({error})") from None
