"""Messages go to standard error, once, and no further than asked."""

import logging

import pytest

from llmeff.core import log


@pytest.fixture(autouse=True)
def restored():
    handlers, level, propagate = log.logger.handlers[:], log.logger.level, log.logger.propagate
    yield
    log.logger.handlers[:], log.logger.propagate = handlers, propagate
    log.logger.setLevel(level)


@pytest.mark.parametrize(("quiet", "shown"), [(True, ["WARNING: two"]), (False, ["INFO: one", "WARNING: two"])])
def test_messages_come_once_whatever_is_configured_before(capsys, quiet, shown):
    log.configure(quiet=not quiet)
    log.configure(quiet=quiet)
    log.logger.info("one")
    log.logger.warning("two")
    assert capsys.readouterr().err == "".join(f"llmeff: {line}\n" for line in shown)


def test_other_loggers_are_left_alone(capsys):
    level = logging.getLogger().level
    log.configure(quiet=False)
    assert logging.getLogger().level == level
