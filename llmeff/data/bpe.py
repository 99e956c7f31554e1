"""Tokenizer by byte-level byte-pair encoding (BPE), trained on the corpus."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
from pydantic import Field

from llmeff.core.config import Count
from llmeff.data.tokenizer import END, Tokenizer, TokenizerConfig, byte_level


class BpeTokenizer(Tokenizer):
    """Byte-level BPE tokenizer. Its ids are the 256 bytes, then the merges, then the end token.

    Text is never encoded as the end token, even if it contains the token's characters.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        end_token: str | None = None,
    ):
        super().__init__(backend, settings, end_token)
        backend.encode_special_tokens = True  # set on every load, because tokenizer.json does not store this flag


class Bpe(TokenizerConfig):
    """Byte-level BPE: merges frequent pairs of tokens within words.

    Text is split into words as in GPT-2 (Radford et al. 2019, section 2.2).
    """

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(strict=True, ge=257)] = 4096
    """Size of the vocabulary, including the 256 bytes and the end token. If the text has too few pairs, the trained
    vocabulary is smaller."""
    training_bytes: Count = 4_000_000
    """Bytes of text to train the tokenizer on. It is trained on the first documents of the train split, up to and
    including the document that reaches this number."""

    def vocabulary(self) -> int:
        """Returns `vocab_size`, which is an upper bound for the trained vocabulary."""
        return self.vocab_size

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Trains the tokenizer on the texts. The same texts always give the same tokenizer."""
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
        """Reads the tokenizer that was saved in the folder."""
        return BpeTokenizer.load(folder)

    def _sample(self, texts: Iterable[str]) -> Iterator[str]:
        num_bytes = 0
        for text in texts:
            yield text
            num_bytes += len(text.encode())
            if num_bytes >= self.training_bytes:
                return
