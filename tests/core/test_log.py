"""Messages go to standard error, once, and no further than asked."""

import logging
import os
import subprocess
import sys

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


def apart(body, tmp_path, **environment):
    """Standard output, standard error and the log of a process whose engines are apart."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom llmeff.core import log\nfrom llmeff.core.config import ConfigError\n"
        "log.configure(quiet=False)\nwith log.engines_apart():\n"
        "    print('printed')\n    os.write(1, b'from C\\n')\n    os.write(2, b'more from C\\n')\n"
    ) + "".join(f"    {line}\n" for line in body)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    written = tmp_path / "engine.log"
    return done.stdout, done.stderr, written.read_text() if written.exists() else None


def test_what_engines_print_goes_into_a_file_and_our_own_lines_to_the_terminal(tmp_path):
    body = [
        "log.settle(Path('engine.log'))",
        "print('later')",
        "log.out().write('ours\\n')",
        "log.logger.warning('so')",
    ]
    out, err, written = apart(body, tmp_path)
    assert out == "ours\n"
    assert err == "llmeff: WARNING: so\n"
    assert sorted(written.splitlines()) == ["from C", "later", "more from C", "printed"]


def test_a_log_that_is_there_is_added_to(tmp_path):
    (tmp_path / "engine.log").write_text("before\n")
    _, _, written = apart(["log.settle(Path('engine.log'))"], tmp_path)
    assert written.startswith("before\n")
    assert len(written.splitlines()) == 4


def test_a_set_up_that_fails_shows_what_engines_printed(tmp_path):
    out, err, written = apart(["raise RuntimeError('engine broke')"], tmp_path)
    assert (out, written) == ("", None)
    assert "printed\n" in err
    assert "more from C\n" in err
    assert err.endswith("RuntimeError: engine broke\n")


def test_wrong_input_shows_nothing_of_the_engines(tmp_path):
    _, err, _ = apart(["raise ConfigError('wrong')"], tmp_path)
    assert "from C" not in err


def test_the_first_of_many_last_words_is_kept_for_who_started_the_run(tmp_path):
    ending = tmp_path / "ending.json"
    body = ["log.say_last('first', 2)", "log.say_last('second', 1)"]
    _, err, _ = apart(body, tmp_path, LLMEFF_ENDING=str(ending))
    assert err == ""
    assert ending.read_text() == '{"message": "first", "code": 2}'
