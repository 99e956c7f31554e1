"""Text as training data: a source, a tokenizer, splits and windows."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from llmeff.core.config import ConfigError, Count
from llmeff.core.dist import cache_folder
from llmeff.data import cache, verified_cache
from llmeff.data.builtin import Builtin
from llmeff.data.byte_tokenizer import Bytes
from llmeff.data.data import DataConfig
from llmeff.data.packing import EvalWindows, Packing, TokenBatch, TrainWindows
from llmeff.data.source import SourceConfig, fingerprint_of
from llmeff.data.splits import Document, Split, SplitConfig
from llmeff.data.tokenizer import Tokenizer, TokenizerConfig

TOKEN_BYTES = 8
"""To train a tokenizer, this many bytes of the source are read per token of `max_tokens`. A character has at most half as
many, and tokens of most tokenizers average fewer, so the tokenizer sees all the text that it will encode."""


class TextData(DataConfig):
    """Documents as tokens."""

    name: Literal["text"] = "text"
    source: SourceConfig = Builtin()
    """Where the documents come from."""
    tokenizer: TokenizerConfig = Bytes()
    """How documents become token ids."""
    splits: SplitConfig = SplitConfig()
    """Which documents, or parts of documents, are trained on and which are held out."""
    sequence_length: Count = 256
    """T, tokens of a training window."""
    packing: Packing = "plain"
    """plain: a window is one text. documents: the documents of a window do not attend to one another."""
    max_tokens: Count | None = None
    """Read the source up to the document that reaches this many tokens, over all splits. To train the tokenizer, read up to
    the document that reaches eight times as many bytes. None: read all of it."""

    def open(self, *, is_main: bool = True, wait: Callable[[], None] = lambda: None) -> "TextCorpus":
        """Opens the corpus from the token cache; the main process makes the cache if it is missing.

        Args:
            is_main: whether this process makes and checks the cache.
            wait: returns once all processes have called it.

        Raises:
            ConfigError: the source or the tokenizer does not match its description, or the cache cannot be written.
        """
        key = fingerprint_of(
            [
                cache.FORMAT,
                self.source.fingerprint(),
                self.tokenizer.fingerprint(),
                self.splits.model_dump(mode="json"),
                None if self.max_tokens is None else [self.max_tokens, TOKEN_BYTES],
            ]
        )
        folder = cache_folder() / "tokens" / key[:32]
        verified_cache.ensure_by_one(folder, self._write, cache.KIND, is_main=is_main, wait=wait)
        return TextCorpus(self, cache.TokenCache(folder))

    def _documents(self) -> Iterator[tuple[Split, Document]]:
        for document in self.source.documents():
            yield from self.splits.assign(document)

    def _train_texts(self) -> Iterator[str]:
        num_bytes = 0
        for split, document in self._documents():
            if split == "train":
                yield document.text
            num_bytes += len(document.text.encode())
            if self.max_tokens is not None and num_bytes >= self.max_tokens * TOKEN_BYTES:
                return

    def _write(self, folder: Path) -> None:
        tokenizer = self.tokenizer.build(self._train_texts)
        source = self.source.model_dump_json(exclude_defaults=True)
        cache.write_corpus(folder, self._documents(), tokenizer, self.max_tokens, source)


class TextCorpus:
    """A text corpus, ready to read.

    Args:
        config: the config of the corpus.
        tokens: the cache of the corpus.
    """

    def __init__(self, config: TextData, tokens: cache.TokenCache):
        self._config, self._tokens = config, tokens
        self.name = config.source.name
        """Name of the source."""
        self.fingerprint = tokens.fingerprint
        """SHA-256 of the whole corpus: every token of every split, the documents' names and the tokenizer."""
        self.vocab_size = tokens.vocab_size
        """V: ids are in range(V)."""
        self.end_id = tokens.end_id
        """Id of the token before every document and after the last."""
        self.splits = tokens.splits
        """The size of each split; empty splits are absent."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus."""
        return self._config.tokenizer.load(self._tokens.folder)

    @cached_property
    def train(self) -> TrainWindows:
        """The training windows.

        Raises:
            ConfigError: there is less training text than one window.
        """
        return TrainWindows(self.stream("train"), self._config.sequence_length, self._config.packing)

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Returns rows of a step's batch, see `TrainWindows.batch`."""
        return self.train.batch(seed, step, rows, global_batch)

    def eval_windows(self, split: Split, length: int | None = None, max_tokens: int | None = None) -> EvalWindows:
        """A split's tokens in order, see `EvalWindows`; `length` defaults to that of the training windows.

        Raises:
            ConfigError: the split has no document.
        """
        length = length or self._config.sequence_length
        return EvalWindows(self.stream(split), length, self._config.packing, self.tokenizer.decode, max_tokens)

    def stream(self, split: Split) -> cache.TokenStream:
        """A split's tokens.

        Raises:
            ConfigError: the split has no document.
        """
        if split not in self._tokens.splits:
            there = ", ".join(f"{name} {facts.num_documents}" for name, facts in self.splits.items())
            raise ConfigError(
                f"data.splits: the split {split!r} is empty (documents: {there}): give it a larger share, or set "
                'data.splits.by = "span" to cut each document (for a corpus of few documents)'
            )
        return self._tokens.stream(split)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a model with fewer embeddings than the tokenizer has ids.

        Raises:
            ConfigError: the model's vocabulary is too small.
        """
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {vocab_size} given, but the tokenizer {self._config.tokenizer.name!r} has ids "
                f"up to {self.vocab_size - 1}: give at least {self.vocab_size}"
            )
