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
"""Names of files and folders to skip: installed packages, the machine's sitecustomize.py, and tests, which contain
tables of cases rather than text."""

LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
"""Prefixes of names of files and folders to skip, because they describe the machine that Python was built on."""


class Builtin(SourceConfig):
    """The source files of the running Python's standard library: about 11 MB of code and prose that need no download.

    Each file is a document. Files are ordered by a hash of their names, so the first files are a fair sample of all
    files. Files that cannot be read or are not UTF-8 are skipped. The text differs slightly between Python versions, so
    runs record its hash.
    """

    name: Literal["builtin"] = "builtin"
    max_bytes: Count | None = None
    """Maximum bytes of all files together. Reading stops at the first file that would exceed it. None for all files."""

    def documents(self) -> Iterator[Document]:
        """Returns an iterator over the documents, one per file."""
        return (Document(unit=unit, text=content.decode()) for unit, content in self._contents())

    def fingerprint(self) -> str:
        """Returns a hash of the files' names and contents."""
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
    """Returns the file's content, or empty bytes if the file cannot be read or is not UTF-8."""
    try:
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return content
