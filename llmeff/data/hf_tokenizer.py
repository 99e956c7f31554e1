"""Tokenizer of a Hugging Face model, read from a folder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import tokenizers

from llmeff.core import files
from llmeff.core.config import ConfigError, Text
from llmeff.data.source import fingerprint_of
from llmeff.data.tokenizer import END, Tokenizer, TokenizerConfig, byte_level

TEMPLATE = "chat_template.jinja"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE)
"""Names of the files in a folder that determine its tokenizer."""


class HfTokenizer(TokenizerConfig):
    """A tokenizer read from a folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt.

    Special tokens in the text are recognized, as in transformers, but no special tokens are added.
    """

    name: Literal["hf"] = "hf"
    path: Text
    """Folder with the tokenizer's files."""
    end_token: Text | None = None
    """Token to put before and after every document, as in the training of the model. None for the tokenizer's
    `eos_token`."""

    def fingerprint(self) -> str:
        """Returns a hash of the tokenizer's files and the end token."""
        folder = self._folder()
        there = [name for name in FILES if (folder / name).is_file()]
        return fingerprint_of([self.end_token, *([name, files.sha256(folder / name)] for name in there)])

    def vocabulary(self) -> int:
        """Returns the size of the vocabulary, read from the folder."""
        return self.build(tuple).vocab_size

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Reads the tokenizer from its folder. It does not read the texts."""
        folder = self._folder()
        settings = {"eos_token": END, **_json(folder / "special_tokens_map.json")}
        settings |= _json(folder / "tokenizer_config.json")
        if (folder / TEMPLATE).is_file():
            settings["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
        backend = read_backend(folder)
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(backend, settings, self.end_token)

    def load(self, folder: Path) -> Tokenizer:
        """Reads the tokenizer that was saved in `folder`. The original folder, `path`, need not exist any more."""
        return Tokenizer.load(folder, self.end_token)

    def _folder(self) -> Path:
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"data.tokenizer.path: there is no folder {self.path}")
        return folder


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    return dict(content)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Reads a folder's tokenizer with the `tokenizers` library.

    Raises:
        ConfigError: the folder contains no tokenizer, or the tokenizer cannot be read.
    """
    whole, vocabulary, merges = (folder / name for name in FILES[:3])
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            backend = byte_level(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)), words=True)
            if backend.token_to_id(END) is not None:
                backend.add_special_tokens([END])
            return backend
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ConfigError(f"{folder}: the tokenizer cannot be read ({error})") from None
    raise ConfigError(f"{folder}: there is neither a tokenizer.json nor a vocab.json with merges.txt")
