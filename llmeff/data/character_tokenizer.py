"""One token per character."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from llmeff.core.config import ConfigError
from llmeff.data.tokenizer import END, Tokenizer, TokenizerConfig


class CharacterTokenizer(Tokenizer):
    """The characters in the order of their code points, then the end token."""

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        """The id of each code point; -1 if it has none."""
        ids = np.full(0x110000, -1, dtype=np.int64)
        for character, place in self.backend.get_vocab(with_added_tokens=False).items():
            ids[ord(character)] = place
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """The characters of each text.

        Raises:
            ConfigError: a character is unknown. A shared token for unknown characters would make every loss look better.
        """
        encoded = []
        for text in texts:
            ids = self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
            if ids.size and ids.min() < 0:
                unknown = text[int(ids.argmin())]
                raise ConfigError(
                    f"data.tokenizer: the character {unknown!r} (U+{ord(unknown):04X}) is not in the training text; "
                    "the tokenizers bytes and bpe know every character"
                )
            encoded.append(ids.astype(np.uint32))
        return encoded


class Characters(TokenizerConfig):
    """The characters of the training text; suits a text with few distinct characters."""

    name: Literal["characters"] = "characters"

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Collects the characters."""
        found: set[str] = set()
        for text in texts():
            found.update(text)
        characters = sorted(found)
        vocabulary = {character: place for place, character in enumerate(characters)}
        # Without an unknown token, the library refuses unknown characters, as we do.
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        backend.add_special_tokens([END])
        return CharacterTokenizer(backend)

    def load(self, folder: Path) -> Tokenizer:
        """Reads the saved tokenizer."""
        return CharacterTokenizer.load(folder)
