"""Anything that the `datasets` library loads, as a source: a Hugging Face Hub name, a folder, or a format with files."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmeff.core.config import ConfigError, Flag, Text
from llmeff.core.registry import nearest
from llmeff.data.source import SourceConfig, digest, fingerprint_of
from llmeff.data.splits import Document


class Datasets(SourceConfig):
    """The rows of a dataset.

    Local files are identified by their content, a name on the Hub by name and revision. Give a revision if the corpus must
    not change.
    """

    name: Literal["datasets"] = "datasets"
    path: Text
    """The first argument of `datasets.load_dataset`: "wikitext", a folder, or "json"."""
    subset: Text | None = None
    """The dataset's configuration. None: its default."""
    data_files: tuple[Text, ...] = ()
    """The files, if `path` is a format."""
    revision: Text | None = None
    """A commit on the Hub. None: the newest of the default branch."""
    split: Text = "train"
    """The split of the dataset to read. Its rows are divided again by `data.splits`."""
    column: Text = "text"
    """The column that holds the text."""
    streaming: Flag = False
    """Read row by row while the token cache is written, instead of fetching everything first. With `data.max_tokens`, only
    the needed part is fetched."""

    def documents(self) -> Iterator[Document]:
        """One document per row."""
        for row, entry in enumerate(self._load()):
            if self.column not in entry:
                raise ConfigError(
                    f"data.source: {self.path} has no column {self.column!r}.{nearest(self.column, entry)}"
                )
            text = entry[self.column]
            if not isinstance(text, str):
                raise ConfigError(
                    f"data.source: {self.path}, row {row}: the column {self.column!r} holds "
                    f"{type(text).__name__}, not text"
                )
            yield Document(unit=f"{self.split}:{row}", text=text)

    def fingerprint(self) -> str:
        """Hashes the settings, and the names and contents of local files."""
        settings = self.model_dump(mode="json", exclude={"path", "data_files", "streaming"})
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            below = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            parts: list[object] = [[file.relative_to(folder).as_posix(), digest(file)] for file in below]
        else:
            parts = [self.path]
        for name in self.data_files:
            local = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            parts += [[file.name, digest(file)] for file in local if file.is_file()] if local else [name]
        return fingerprint_of([settings, *parts])

    def _load(self) -> Iterator[dict[str, object]]:
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                'data.source: the source "datasets" needs the package datasets: pip install "llmeff[data]"'
            ) from None
        try:
            yield from datasets.load_dataset(
                self.path,
                self.subset,
                data_files=list(self.data_files) or None,
                revision=self.revision,
                split=self.split,
                streaming=self.streaming,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"data.source: datasets cannot read {self.path!r} ({error})") from None
