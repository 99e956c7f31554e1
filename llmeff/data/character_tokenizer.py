"""Tokenizer with one token per character."""

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
    """Character tokenizer: ids follow the order of the characters' code points, and the end token has the last id."""

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        """Id of each code point; -1 if the code point is not in the vocabulary."""
        ids = np.full(0x110000, -1, dtype=np.int64)
        for character, place in self.backend.get_vocab(with_added_tokens=False).items():
            ids[ord(character)] = place
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Returns the ids of each text's characters.

        Raises:
            ConfigError: a character is not in the vocabulary. There is no token for unknown characters, because
                such a token would make every loss look better.
        """
        encoded = []
        for text in texts:
            ids = self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
            if ids.size and ids.min() < 0:
                unknown = text[int(ids.argmin())]
                raise ConfigError(
                    f"data.tokenizer: the character {unknown!r} (U+{ord(unknown):04X}) is not in the training text. "
                    "Use the tokenizer 'bytes' or 'bpe', which can encode every character"
                )
            encoded.append(ids.astype(np.uint32))
        return encoded


class Characters(TokenizerConfig):
    """One token for each distinct character of the training text. Suits a text with few distinct characters."""

    name: Literal["characters"] = "characters"

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Builds the tokenizer from the distinct characters of the texts."""
        found: set[str] = set()
        for text in texts():
            found.update(text)
        characters = sorted(found)
        vocabulary = {character: place for place, character in enumerate(characters)}
        # There is no unknown token, so the library also rejects unknown characters, as `encode_batch` does.
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        backend.add_special_tokens([END])
        return CharacterTokenizer(backend)

    def load(self, folder: Path) -> Tokenizer:
        """Reads the tokenizer that was saved in the folder."""
        return CharacterTokenizer.load(folder)
