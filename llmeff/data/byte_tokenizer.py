"""Tokenizer with one token per UTF-8 byte."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from llmeff.data.tokenizer import END, Tokenizer, TokenizerConfig, byte_level


class ByteTokenizer(Tokenizer):
    """Byte tokenizer: ids 0 to 255 are the bytes, and id 256 is the end token."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Returns the UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class Bytes(TokenizerConfig):
    """One token per UTF-8 byte, and an end token: 257 ids, without training.

    Bits per byte are close to bits per token, because a document has one token per byte and a single end token.
    """

    name: Literal["bytes"] = "bytes"

    def vocabulary(self) -> int:
        """Returns 257: the 256 bytes and the end token."""
        return 257

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Builds the tokenizer. It does not read the texts."""
        # GPT-2's byte-level alphabet: printable bytes map to their own characters, others to code points 256, 257, ...
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
        others = [byte for byte in range(256) if byte not in printable]
        symbols = {byte: chr(byte) for byte in printable}
        symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
        vocabulary = {symbols[byte]: byte for byte in range(256)}
        backend = byte_level(tokenizers.models.BPE(vocab=vocabulary, merges=[]), words=False)
        backend.add_special_tokens([END])
        return ByteTokenizer(backend)

    def load(self, folder: Path) -> Tokenizer:
        """Reads the tokenizer that was saved in the folder."""
        return ByteTokenizer.load(folder)
