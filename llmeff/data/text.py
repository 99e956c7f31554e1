"""Text as training data: a source, a tokenizer, splits and windows."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from llmeff.core.config import ConfigError, Count
from llmeff.core.dist import cache_folder
from llmeff.data import cache
from llmeff.data import verified_cache as sealed
from llmeff.data.builtin import Builtin
from llmeff.data.byte_tokenizer import Bytes
from llmeff.data.data import DataConfig
from llmeff.data.packing import EvalWindows, Packing, TokenBatch, TrainWindows
from llmeff.data.source import SourceConfig, fingerprint_of
from llmeff.data.splits import Document, Split, SplitConfig
from llmeff.data.tokenizer import Tokenizer, TokenizerConfig

TOKEN_BYTES = 8
"""For each of `max_tokens`, so many bytes of the source are read to train a tokenizer. No character takes more than half
of them, and few tokenizers' tokens hold so many on average: it sees all the text that it is to encode."""


class TextData(DataConfig):
    """Documents as tokens."""

    name: Literal["text"] = "text"
    source: SourceConfig = Builtin()
    """Where the documents come from."""
    tokenizer: TokenizerConfig = Bytes()
    """How they become token ids."""
    splits: SplitConfig = SplitConfig()
    """What is trained on and what is held out."""
    sequence_length: Count = 256
    """T, tokens of a training window."""
    packing: Packing = "plain"
    """plain: a window is read as one text. documents: its documents do not see one another."""
    max_tokens: Count | None = None
    """Read the source up to the document that reaches so many tokens, in all splits together; to train the tokenizer, up
    to the one that reaches eight times as many bytes. None: all of it."""

    def open(self, *, is_main: bool = True, wait: Callable[[], None] = lambda: None) -> "TextCorpus":
        """The corpus, from the token cache; one process makes the cache where there is none.

        Args:
            is_main: whether this process looks after the cache.
            wait: returns when all processes have called it.

        Raises:
            ConfigError: the source or the tokenizer is not what it is described as, or the cache cannot be written.
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
        sealed.ensure_by_one(folder, self._write, cache.KIND, is_main=is_main, wait=wait)
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
    """A corpus that is ready to be read.

    Args:
        config: what it is.
        tokens: its cache.
    """

    def __init__(self, config: TextData, tokens: cache.TokenCache):
        self._config, self._tokens = config, tokens
        self.name = config.source.name
        """The source's."""
        self.fingerprint = tokens.fingerprint
        """SHA-256 of all that the corpus is: every token of every split, the documents' names, the tokenizer."""
        self.vocab_size = tokens.vocab_size
        """V: ids are in range(V)."""
        self.end_id = tokens.end_id
        """Stands before every document and after the last."""
        self.splits = tokens.splits
        """What each split holds; a split without documents is not there."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self._config.tokenizer.load(self._tokens.folder)

    @cached_property
    def train(self) -> TrainWindows:
        """The training windows.

        Raises:
            ConfigError: there is no training text, or less than a window.
        """
        return TrainWindows(self.stream("train"), self._config.sequence_length, self._config.packing)

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Rows of what a step trains on, see `TrainWindows.batch`."""
        return self.train.batch(seed, step, rows, global_batch)

    def eval_windows(self, split: Split, length: int | None = None, max_tokens: int | None = None) -> EvalWindows:
        """A split's tokens in order, see `EvalWindows`; `length` is the training windows' unless given.

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
                f"data.splits: nothing fell in the split {split!r} (documents: {there}): give it a larger share, or "
                'cut each document of a corpus of few by data.splits.by = "span"'
            )
        return self._tokens.stream(split)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a model with fewer embeddings than the tokenizer has ids.

        Raises:
            ConfigError: a token id lies beyond the vocabulary.
        """
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {vocab_size} given, but the tokenizer {self._config.tokenizer.name!r} gives ids "
                f"up to {self.vocab_size - 1}: at least {self.vocab_size} are needed"
            )
