"""Token cache: a tokenized corpus in memory-mapped files.

Its folder is named by a hash of everything that determines the tokens.
"""

import contextlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import ConfigError
from llmeff.core.heartbeat import beat
from llmeff.data import verified_cache
from llmeff.data.baseline import Gzip
from llmeff.data.splits import Document, Split
from llmeff.data.tokenizer import Tokenizer

KIND = "token cache"
"""Name of this cache in messages."""
FORMAT = 1
"""Version of the cache format. Increase it if caches of older versions must not be read."""
ENCODED_CHARACTERS = 2**20
"""Number of characters at which a batch of documents is full and goes to the tokenizer."""
CHARACTER_TOKENS = 8
"""Upper bound of tokens per character, including the end token. It limits batches, so that no document after the one
that reaches `max_tokens` is encoded. Such a document may contain characters that the tokenizer does not know."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """Sizes of a split."""

    num_documents: int
    """Number of documents, or of spans of documents."""
    num_tokens: int
    """Tokens of all documents, including the end token after each document."""
    num_bytes: int
    """Bytes of all documents as UTF-8 text."""
    gzip_bits_per_byte: float | None
    """Bits per byte of the concatenated documents under `gzip -9`. None for the train split: it is not compressed."""


class TokenStream:
    """Tokens of a split as one stream: [end] document [end] document ... [end].

    Args:
        tokens: (N,) unsigned token ids.
        starts: (documents + 1,) int64: index of the end token before each document, and finally of the last end token.
        document_bytes: (documents,) int64: UTF-8 bytes of each document.
        read_units: function that reads and returns the documents' names.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        starts: NDArray[np.int64],
        document_bytes: NDArray[np.int64],
        read_units: Callable[[], list[str]],
    ):
        self.tokens = tokens
        self.starts = starts
        self.document_bytes = document_bytes
        self._read_units = read_units

    @cached_property
    def units(self) -> list[str]:
        """Names of the documents, in order."""
        return self._read_units()


class TokenCache:
    """A complete token cache on disk.

    Args:
        folder: a folder that `verified_cache.ensure` made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        meta, self.fingerprint = verified_cache.read_meta(folder)
        self.vocab_size: int = meta["vocab_size"]
        self.end_id: int = meta["end_id"]
        self.dtype = np.dtype(meta["dtype"])
        self.splits: dict[Split, SplitFacts] = {split: SplitFacts(**facts) for split, facts in meta["splits"].items()}

    def stream(self, split: Split) -> TokenStream:
        """Returns the tokens of a split, which must not be empty."""

        def read(kind: str, dtype: np.dtype[Any]) -> NDArray[Any]:
            return np.memmap(self.folder / f"{split}.{kind}", dtype=dtype, mode="r").view(np.ndarray)

        def units() -> list[str]:
            text = (self.folder / f"{split}.units.jsonl").read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines()]

        index = np.dtype("<i8")
        return TokenStream(read("tokens", self.dtype), read("starts", index), read("bytes", index), units)


def write_corpus(
    folder: Path,
    documents: Iterable[tuple[Split, Document]],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    source: str = "it",
) -> None:
    """Tokenizes documents and writes the files of a token cache.

    Args:
        folder: folder to fill.
        documents: the documents, each with its split.
        tokenizer: encodes the documents.
        max_tokens: stop after the document that reaches this many tokens in total. None to encode all documents.
        source: description of the source, for errors.

    Raises:
        ConfigError: there is no document, or all documents are empty.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    writers: dict[Split, _SplitWriter] = {}
    with contextlib.ExitStack() as opened:
        for split, document, ids in _encoded(documents, tokenizer, max_tokens):
            if split not in writers:
                writers[split] = _SplitWriter(folder, split, tokenizer.end_id, dtype, opened)
            writers[split].add(document, ids)
    if not writers:
        raise ConfigError(f"data.source: there is no text in {source}: it has no documents, or all of them are empty")
    tokenizer.save(folder)
    meta = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "dtype": dtype.str,
        "splits": {split: asdict(writer.finish()) for split, writer in writers.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _encoded(
    documents: Iterable[tuple[Split, Document]], tokenizer: Tokenizer, max_tokens: int | None
) -> Iterator[tuple[Split, Document, NDArray[np.unsignedinteger]]]:
    """Yields (split, document, token ids). Stops after the document that brings the total to `max_tokens` tokens."""
    remaining, num_left = iter(documents), math.inf if max_tokens is None else max_tokens
    while batch := _batch(remaining, min(ENCODED_CHARACTERS, num_left / CHARACTER_TOKENS)):
        all_ids = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), ids in zip(batch, all_ids, strict=True):
            yield split, document, ids
            num_left -= len(ids) + 1
            if num_left <= 0:
                return


def _batch(documents: Iterator[tuple[Split, Document]], num_wanted: float) -> list[tuple[Split, Document]]:
    """Returns the next documents. Stops after the document that brings their total to `num_wanted` characters."""
    batch, num_characters = [], 0
    for split, document in documents:
        beat()
        batch.append((split, document))
        num_characters += len(document.text)
        if num_characters >= num_wanted:
            break
    return batch


class _SplitWriter:
    """Writes the files of one split. It keeps only the documents' offsets and sizes in memory."""

    def __init__(self, folder: Path, split: Split, end_id: int, dtype: np.dtype[Any], opened: contextlib.ExitStack):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._end = np.array([end_id], dtype=dtype).tobytes()
        self._tokens = opened.enter_context((folder / f"{split}.tokens").open("wb"))
        self._units = opened.enter_context((folder / f"{split}.units.jsonl").open("w", encoding="utf-8"))
        self._starts, self._bytes = array("q", [0]), array("q")
        self._gzip = Gzip() if split != "train" else None
        self._tokens.write(self._end)

    def add(self, document: Document, ids: NDArray[np.unsignedinteger]) -> None:
        content = document.text.encode()
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._tokens.write(self._end)
        self._units.write(json.dumps(document.unit) + "\n")
        self._starts.append(self._starts[-1] + len(ids) + 1)
        self._bytes.append(len(content))
        if self._gzip is not None:
            self._gzip.add(content)

    def finish(self) -> SplitFacts:
        for kind, values in (("starts", self._starts), ("bytes", self._bytes)):
            content = np.array(values, dtype="<i8").tobytes()
            (self._folder / f"{self._split}.{kind}").write_bytes(content)
        return SplitFacts(
            num_documents=len(self._bytes),
            num_tokens=self._starts[-1],
            num_bytes=sum(self._bytes),
            gzip_bits_per_byte=self._gzip.bits_per_byte() if self._gzip is not None else None,
        )
