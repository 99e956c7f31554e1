"""How a command ends: exit codes, and one message that says what is wrong."""

import time
from collections.abc import Sequence

from llmeff.core import log
from llmeff.core.dist import world

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_MAIN_SPEAKS_S = 30.0
"""Seconds after which a rank that is still alive is the only one with its error, and reports it itself."""


def fail(problems: Sequence[str], code: int) -> int:
    """Reports what is wrong, once: all ranks come here, and the launcher ends the others after the main one.

    Returns:
        `code`.
    """
    if not world().is_main:
        time.sleep(_MAIN_SPEAKS_S)
    log.say_last(log.complaint(problems), code)
    return code
