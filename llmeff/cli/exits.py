"""Exit codes of the commands, and the report of an error that ends a command."""

import time
from collections.abc import Sequence

from llmeff.core import log
from llmeff.core.dist import world

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_MAIN_SPEAKS_S = 30.0
"""Seconds that a rank other than rank 0 waits before it reports its error. If several ranks fail, rank 0 reports first,
and the launcher ends the waiting ranks. A rank that is still alive after the wait is the only one that failed."""


def fail(problems: Sequence[str], code: int) -> int:
    """Reports problems once, even if every rank calls this function.

    Ranks other than rank 0 wait first. If rank 0 has failed too, it reports and exits, and the launcher then ends the
    waiting ranks.

    Args:
        problems: the lines of the error.
        code: the exit code of the process.

    Returns:
        `code`.
    """
    if not world().is_main:
        time.sleep(_MAIN_SPEAKS_S)
    log.say_last(log.complaint(problems), code)
    return code
