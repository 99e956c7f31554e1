"""Text source for datasets that the Hugging Face library `datasets` loads: from the Hub, a folder or files."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmeff.core.config import ConfigError, Flag, Text
from llmeff.core.registry import nearest
from llmeff.data.source import SourceConfig, digest, fingerprint_of
from llmeff.data.splits import Document


class Datasets(SourceConfig):
    """A dataset loaded by the library `datasets`. Each row is a document.

    The fingerprint identifies local files by their content, but a dataset on the Hub only by its name and revision. Set
    `revision` if the corpus must not change.
    """

    name: Literal["datasets"] = "datasets"
    path: Text
    """First argument of `datasets.load_dataset`: a name on the Hub ("wikitext"), a folder or a file format ("json")."""
    subset: Text | None = None
    """Configuration of the dataset, the second argument of `datasets.load_dataset`. None for the default."""
    data_files: tuple[Text, ...] = ()
    """Files to read, if `path` is a file format."""
    revision: Text | None = None
    """Commit on the Hub. None for the newest commit of the default branch."""
    split: Text = "train"
    """Split of the dataset to read. `data.splits` divides its rows again."""
    column: Text = "text"
    """Column that contains the text."""
    streaming: Flag = False
    """Whether to read row by row while the token cache is written, instead of downloading everything first. With
    `data.max_tokens`, only the needed part is downloaded."""

    def documents(self) -> Iterator[Document]:
        """Yields one document per row."""
        for row, entry in enumerate(self._load()):
            if self.column not in entry:
                raise ConfigError(
                    f"data.source: {self.path} has no column {self.column!r}.{nearest(self.column, entry)}"
                )
            text = entry[self.column]
            if not isinstance(text, str):
                raise ConfigError(
                    f"data.source: {self.path}, row {row}: the column {self.column!r} contains a value of type "
                    f"{type(text).__name__}, not text"
                )
            yield Document(unit=f"{self.split}:{row}", text=text)

    def fingerprint(self) -> str:
        """Returns a hash of the settings, and of the names and contents of local files."""
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
                'data.source: the source "datasets" needs the package datasets. Install it: pip install "llmeff[data]"'
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
