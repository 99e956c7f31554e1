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
"""Bytes of the source that are read to train a tokenizer, per token of `max_tokens`. Tokens of most tokenizers have
fewer bytes on average, and a character has at most 4, so the tokenizer sees all the text that it will encode."""


class TextData(DataConfig):
    """Text documents, tokenized and packed into windows."""

    name: Literal["text"] = "text"
    source: SourceConfig = Builtin()
    """Source of the documents."""
    tokenizer: TokenizerConfig = Bytes()
    """Tokenizer of the documents."""
    splits: SplitConfig = SplitConfig()
    """Division of documents among training and held-out splits."""
    sequence_length: Count = 256
    """Tokens in a training window (T)."""
    packing: Packing = "plain"
    """plain: tokens attend to all earlier tokens of the window. documents: tokens attend only within their document."""
    max_tokens: Count | None = None
    """Number of tokens to read, over all splits. Reading stops after the document that reaches it. To train the
    tokenizer, reading stops after the document that reaches eight times as many bytes. None for the whole source."""

    def open(self, *, is_main: bool = True, wait: Callable[[], None] = lambda: None) -> "TextCorpus":
        """Opens the corpus from the token cache. The main process makes the cache if it is missing.

        Args:
            is_main: whether this process makes and checks the cache.
            wait: returns once all processes have called it.

        Raises:
            ConfigError: the source or the tokenizer is not as the config describes it, or the cache cannot be written.
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
    """A text corpus in an opened token cache.

    Args:
        config: the config of the corpus.
        tokens: the cache of the corpus.
    """

    def __init__(self, config: TextData, tokens: cache.TokenCache):
        self._config, self._tokens = config, tokens
        self.name = config.source.name
        """Name of the source."""
        self.fingerprint = tokens.fingerprint
        """SHA-256 of the whole corpus: the tokens of every split, the documents' names and the tokenizer."""
        self.vocab_size = tokens.vocab_size
        """Size of the vocabulary (V). Token ids are in range(V)."""
        self.end_id = tokens.end_id
        """Id of the end token, which comes before every document and after the last document."""
        self.splits = tokens.splits
        """Sizes of each split. Empty splits are absent."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the corpus."""
        return self._config.tokenizer.load(self._tokens.folder)

    @cached_property
    def train(self) -> TrainWindows:
        """Training windows of the corpus.

        Raises:
            ConfigError: the training split is empty or shorter than one window.
        """
        return TrainWindows(self.stream("train"), self._config.sequence_length, self._config.packing)

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Returns some rows of a step's global batch, see `TrainWindows.batch`."""
        return self.train.batch(seed, step, rows, global_batch)

    def eval_windows(self, split: Split, length: int | None = None, max_tokens: int | None = None) -> EvalWindows:
        """Returns the evaluation windows of a split, see `EvalWindows`.

        Args:
            split: the split to evaluate.
            length: tokens in a window. None for the length of the training windows.
            max_tokens: number of tokens to use as targets. None for all.

        Raises:
            ConfigError: the split has no document.
        """
        length = length or self._config.sequence_length
        return EvalWindows(self.stream(split), length, self._config.packing, self.tokenizer.decode, max_tokens)

    def stream(self, split: Split) -> cache.TokenStream:
        """Returns the tokens of a split.

        Raises:
            ConfigError: the split has no document.
        """
        if split not in self._tokens.splits:
            there = ", ".join(f"{name} {facts.num_documents}" for name, facts in self.splits.items())
            raise ConfigError(
                f"data.splits: the split {split!r} is empty (documents: {there}). Give it a larger share or, if the "
                'corpus has few documents, set data.splits.by = "span", which divides each document among the splits'
            )
        return self._tokens.stream(split)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises an error if a model has fewer embeddings than the tokenizer has ids.

        Raises:
            ConfigError: the model's vocabulary is too small.
        """
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {vocab_size}, but the tokenizer {self._config.tokenizer.name!r} has ids "
                f"up to {self.vocab_size - 1}. Give at least {self.vocab_size}"
            )
