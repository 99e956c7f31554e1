"""The built-in corpus: the source text of the Python standard library."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmeff.core.config import Count
from llmeff.data.source import SourceConfig, fingerprint_of
from llmeff.data.splits import Document

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "sitecustomize.py"}
"""Files and folders to skip: installed packages, and tests, whose tables of cases are not text."""

LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
"""Files to skip because they describe the machine that Python was built on."""


class Builtin(SourceConfig):
    """The modules of the running Python's standard library: about 11 MB of code and prose, without a download.

    Each file is a document. Files are ordered by a hash of their names, so that any prefix is a fair sample. Files that
    cannot be read or are not UTF-8 are skipped. The text differs slightly between Python versions; its hash is recorded.
    """

    name: Literal["builtin"] = "builtin"
    max_bytes: Count | None = None
    """Take the first files, up to this many bytes in total. None: all files."""

    def documents(self) -> Iterator[Document]:
        """One document per file."""
        return (Document(unit=unit, text=content.decode()) for unit, content in self._contents())

    def fingerprint(self) -> str:
        """Hashes the files' names and contents."""
        return fingerprint_of([unit, hashlib.sha256(content).hexdigest()] for unit, content in self._contents())

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        root = Path(sysconfig.get_path("stdlib"))
        units = []
        for folder, below, names in os.walk(root):
            below[:] = filter(_is_library, below)
            prefix = Path(folder).relative_to(root)
            units += [(prefix / name).as_posix() for name in filter(_is_library, names) if name.endswith(".py")]
        num_bytes = 0
        for unit in sorted(units, key=lambda unit: hashlib.sha256(unit.encode()).digest()):
            content = _read(root / unit)
            num_bytes += len(content)
            if self.max_bytes is not None and num_bytes > self.max_bytes:
                return
            if content:
                yield unit, content


def _is_library(name: str) -> bool:
    return name not in LEFT_OUT and not name.startswith(LEFT_OUT_PREFIXES)


def _read(path: Path) -> bytes:
    """The file's content; empty if it cannot be read or is not UTF-8."""
    try:
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return content
