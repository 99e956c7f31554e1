"""A byte-level byte-pair encoding trained on the corpus."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
from pydantic import Field

from llmeff.core.config import Count
from llmeff.data.tokenizer import END, Tokenizer, TokenizerConfig, byte_level


class BpeTokenizer(Tokenizer):
    """The 256 bytes, their merges, then the end token. No text is ever encoded as the end token."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        end_token: str | None = None,
    ):
        super().__init__(backend, settings, end_token)
        backend.encode_special_tokens = True  # tokenizer.json does not keep this flag


class Bpe(TokenizerConfig):
    """Merges of frequent pairs within words; words are cut as in GPT-2 (Radford et al. 2019, section 2.2)."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(strict=True, ge=257)] = 4096
    """V, including the 256 bytes and the end token; smaller if the text has too few pairs."""
    training_bytes: Count = 4_000_000
    """Train on the first documents of the train split, up to the one that reaches this many bytes."""

    def vocabulary(self) -> int:
        """Returns `vocab_size`, an upper bound."""
        return self.vocab_size

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Trains the tokenizer; the same texts give the same tokenizer."""
        backend = byte_level(tokenizers.models.BPE(), words=True)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(self._sample(texts()), trainer)
        backend.add_special_tokens([END])
        return BpeTokenizer(backend)

    def load(self, folder: Path) -> Tokenizer:
        """Reads the saved tokenizer."""
        return BpeTokenizer.load(folder)

    def _sample(self, texts: Iterable[str]) -> Iterator[str]:
        num_bytes = 0
        for text in texts:
            yield text
            num_bytes += len(text.encode())
            if num_bytes >= self.training_bytes:
                return
