"""Interface of a tokenizer. A tokenizer is saved as the two files that transformers' AutoTokenizer loads."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from llmeff.core import files
from llmeff.core.config import Component, ConfigError, Text
from llmeff.data.source import fingerprint_of

END = "<|endoftext|>"
"""End token of our own tokenizers, which comes before and after every document."""


class Tokenizer:
    """Converts text to token ids and back.

    Args:
        backend: a tokenizer of the library `tokenizers`.
        settings: content of tokenizer_config.json. None for `END` as both `bos_token` and `eos_token`.
        end_token: token before and after every document. None for the `eos_token` of the settings.

    Raises:
        ConfigError: there is no end token, or it is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        end_token: str | None = None,
    ):
        self.backend = backend
        self.settings = dict(settings or {"bos_token": END, "eos_token": END})
        # With the generic class, transformers reads tokenizer.json and nothing from a model in the same folder.
        self.settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        token = end_token if end_token is not None else self.settings.get("eos_token")
        token = token["content"] if isinstance(token, Mapping) else token
        if token not in vocabulary:
            raise ConfigError(
                f"data.tokenizer: the end token {token!r} is not in the vocabulary. Set data.tokenizer.end_token"
            )
        self.end_id: int = vocabulary[token]

    @classmethod
    def load(cls, folder: Path, end_token: str | None = None) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote."""
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), settings, end_token)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads."""
        files.write_text(folder / "tokenizer.json", self.backend.to_str())
        files.write_text(folder / "tokenizer_config.json", json.dumps(self.settings, indent=2))

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines the ids."""
        return hashlib.sha256(f"{self.end_id}\n{self.backend.to_str()}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Encodes each text, without an end token."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(entry.ids, dtype=np.uint32) for entry in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text. Special tokens are skipped; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=True))


class TokenizerConfig(Component, family="tokenizer"):
    """Config of a tokenizer, which converts text to token ids."""

    name: Text
    """The kind of tokenizer."""

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines the tokenizer, except its training text."""
        return fingerprint_of([self.model_dump(mode="json")])

    def vocabulary(self) -> int | None:
        """Returns the vocabulary's size or an upper bound. Returns None if only the training text determines it."""
        return None

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Builds the tokenizer.

        Args:
            texts: returns the texts of the train split, in order. It may be called repeatedly.
        """
        raise NotImplementedError(type(self))

    def load(self, folder: Path) -> Tokenizer:
        """Reads a tokenizer that `build` made and `Tokenizer.save` wrote to the folder."""
        return Tokenizer.load(folder)


def byte_level(model: Any, *, words: bool) -> tokenizers.Tokenizer:
    """Returns a backend over UTF-8 bytes.

    Args:
        model: model of the library `tokenizers`.
        words: whether text is first split into words, numbers and spaces, as in GPT-2.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend
