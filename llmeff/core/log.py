"""llmeff's warnings and errors, the final message of a process, and a separate file for the output of libraries.

The progress display is in `record/progress.py`.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.core.dist import ending_file, world

logger = logging.getLogger("llmeff")


def configure(*, quiet: bool) -> None:
    """Sends llmeff's log messages to standard error: warnings and errors, and also info messages unless `quiet`."""
    handler = logging.StreamHandler(err())
    handler.setFormatter(logging.Formatter("llmeff: %(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def out() -> TextIO:
    """Returns the stream for llmeff's own output: the original standard output, even inside `engines_apart`."""
    return sys.stdout if _apart is None else _apart.out


def err() -> TextIO:
    """Returns the stream for llmeff's own messages: the original standard error, even inside `engines_apart`."""
    return sys.stderr if _apart is None else _apart.err


def complaint(problems: Sequence[str]) -> str:
    """Formats an error message with one or more problems for the terminal."""
    if len(problems) == 1:
        return f"llmeff: error: {problems[0]}\n"
    return "llmeff: error:\n" + "".join(f"  {problem}\n" for problem in problems)


def say_last(text: str, code: int) -> None:
    """Reports why this process ends: to the `llmeff train` that started it or, if there is none, on standard error.

    If several processes of a run report to the same `llmeff train`, only the first report is kept.

    Args:
        text: the message.
        code: the exit code.
    """
    ending = ending_file()
    if ending is None:
        err().write(text)
        err().flush()
        return
    with contextlib.suppress(FileExistsError, FileNotFoundError), ending.open("x", encoding="utf-8") as file:
        json.dump({"message": text, "code": code}, file)


class _Apart:
    """Redirects the process's standard output and error to a file. Only llmeff still writes to the original streams."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="llmeff-engine-", suffix=".log")
        self.path, self.is_settled = Path(name), False
        sys.stdout.flush()
        sys.stderr.flush()
        self._kept = [os.dup(1), os.dup(2)]
        self.out, self.err = (open(os.dup(fd), "w", buffering=1, encoding="utf-8") for fd in self._kept)  # noqa: SIM115  closed in `close`
        self._turn(handle)

    def _turn(self, handle: int) -> None:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    def settle(self, path: Path) -> None:
        """Appends the output so far to another file, and redirects later output there."""
        _flush()
        handle = files.open_to_append(path)
        os.write(handle, self.path.read_bytes())
        self._turn(handle)
        self.path.unlink()
        self.path, self.is_settled = path, True

    def close(self) -> None:
        """Restores standard output and error."""
        _flush()
        for number, fd in enumerate(self._kept, start=1):
            os.dup2(fd, number)
            os.close(fd)
        self.out.close()
        self.err.close()
        if not self.is_settled:
            self.path.unlink()


_apart: _Apart | None = None


@contextlib.contextmanager
def engines_apart() -> Iterator[None]:
    """Context manager that redirects the output of libraries, such as DeepSpeed, from the terminal to a file.

    The file is temporary until `settle` names a lasting one. If an exception other than ConfigError ends the block
    before that, the output is shown on the terminal.
    """
    global _apart
    _apart = _Apart()
    _redirect_logger()
    try:
        yield
    except ConfigError:
        raise
    except Exception:
        _flush()
        if not _apart.is_settled:
            with _apart.path.open(encoding="utf-8", errors="replace") as printed:
                shutil.copyfileobj(printed, _apart.err)
        if ending_file() is not None:
            say_last(f"llmeff: error: rank {world().rank} failed\n{traceback.format_exc()}", 1)
        raise
    finally:
        ended, _apart = _apart, None
        _redirect_logger()
        ended.close()


def settle(path: Path) -> None:
    """Keeps the output of libraries in this file: the output so far and all later output.

    Appends if the file exists. Does nothing outside an `engines_apart` block.
    """
    if _apart is not None:
        _apart.settle(path)


def _redirect_logger() -> None:
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(err())


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
