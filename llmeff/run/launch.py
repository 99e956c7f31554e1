"""RunConfig -> the processes of a run on this machine: the command that starts them, how they ended, and restarts."""

import contextlib
import ctypes
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from llmeff.config.run import RunConfig
from llmeff.core import files, log
from llmeff.core.config import ConfigError, read
from llmeff.core.dist import free_port, launched_environment, launcher_file, world
from llmeff.parallel import StrategyConfig
from llmeff.record import schema
from llmeff.record.writer import check_free
from llmeff.run.checkpoint import is_before_first

SCRIPT = Path(__file__).parents[1] / "train.py"

_GRACE_S = 10.0
"""After the last word of a run, or a signal: what is still there then is killed."""
_FAILED, _BAD_INPUT = 1, 2


def command(config: RunConfig, arguments: Sequence[str]) -> list[str]:
    """What starts a run's processes on this machine: `accelerate launch` where there are several.

    Args:
        config: the run's.
        arguments: of `llmeff train`, for each of them.
    """
    ranks, parallel = config.parallel.ranks, config.parallel
    if ranks == 1:
        return [sys.executable, str(SCRIPT), *arguments]
    return [
        sys.executable, "-m", "accelerate.commands.launch", parallel.launch_flags[0],
        "--num_processes", str(ranks), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), str(SCRIPT), *arguments,
    ]  # fmt: skip


def _quoted(path: Path) -> str:
    """As an option in a batch script; Slurm reads quotes there as a shell does.

    Raises:
        ConfigError: no quotes help.
    """
    text = str(path)
    if any(character in text for character in '"\n\r'):
        raise ConfigError(f"{text!r}: a batch script cannot name this folder; choose another")
    return f'"{text}"' if any(map(str.isspace, text)) else text


def slurm_job(
    name: str, line: str, *, log: Path, cores: int, gpus: int = 0, count: int | None = None, more: Sequence[str] = ()
) -> str:
    """A batch script of Slurm, for one task on one node.

    Args:
        name: the job's.
        line: what it runs, as bash reads it; $SLURM_ARRAY_TASK_ID is the number in an array.
        log: where its output goes; `%a` stands for the number.
        cores: that it needs.
        gpus: that it needs.
        count: of an array's jobs; None: it is no array.
        more: options of sbatch, which go before those above where they say the same.

    Raises:
        ConfigError: a folder's name cannot stand in a batch script.
    """
    own = [f"--job-name={name}", f"--output={_quoted(log)}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cores}"]
    own += [f"--array=0-{count - 1}"] if count is not None else []
    own += [f"--gpus={gpus}"] if gpus else []
    given = {option.partition("=")[0] for option in more}
    options = [*(option for option in own if option.partition("=")[0] not in given), *more]
    head = "".join(f"#SBATCH {option}\n" for option in [f"--chdir={_quoted(Path.cwd())}", *options])
    return f"#!/bin/bash\n{head}\nexec {line}\n"


def supplied(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's raw data, with the DeepSpeed file that the launcher's flags name where the config names none.

    Where it names no strategy of several processes either, it is the one that such a file is for.

    Raises:
        ConfigError: the config names a file with another content.
    """
    given = launcher_file()
    parallel = data.get("parallel", {})
    parallel = {"name": parallel} if isinstance(parallel, str) else parallel
    if given is None or not isinstance(parallel, Mapping):
        return dict(data)
    own = parallel.get("file")
    if own is not None and own != given and read(Path(own)) != read(Path(given)):
        raise ConfigError(
            f"parallel.file is {own!r} in the config, but accelerate launch --deepspeed_config_file names {given!r}, "
            "which says otherwise: leave one of them out"
        )
    if own is not None:
        return dict(data)
    strategies = StrategyConfig.registry
    readers = [name for name in strategies.names() if "file" in strategies[name].model_fields]
    alone = [None, *(name for name in strategies.names() if not strategies[name].joins)]
    if parallel.get("name") in alone:
        parallel = {**parallel, "name": readers[0], "ranks": world().ranks}
    if parallel["name"] not in readers:
        return dict(data)  # of which the launcher's other flags tell, or validation
    return {**data, "parallel": {**parallel, "file": given}}


def going_on(folder: Path) -> str:
    """The flag by which a run that ended without a result goes on by itself.

    Where it ended before its first checkpoint it begins anew, and its rows are kept; where checkpoints are missing, `--resume`
    says so.
    """
    return "--restart-from-scratch" if is_before_first(folder) else "--resume"


def first_flags(folder: Path, *, resume: bool, anew: bool, is_restarted: bool) -> list[str]:
    """The flags with which a run's processes are started first.

    Args:
        folder: the run's.
        resume: `--resume` was given.
        anew: `--restart-from-scratch` was given.
        is_restarted: the run goes on by itself if it ends abnormally, and so also from where it ended before.

    Raises:
        ConfigError: neither was given, and the folder is not free.
    """
    if not (resume or anew):
        check_free(folder)
        return []
    if is_restarted and not anew:
        return [going_on(folder)]
    return [flag for flag, is_given in (("--resume", resume), ("--restart-from-scratch", anew)) if is_given]


def run(
    start: Callable[[Sequence[str]], list[str]], folder: Path, *, restarts: int, tell: Callable[[str], None]
) -> int:
    """Runs a run's processes to their end; where they ended abnormally, again, from the newest whole checkpoint.

    Args:
        start: the command, with the flags by which a run that was begun goes on; none at first.
        folder: the run's.
        restarts: how often at most.
        tell: is handed each command before it is started.

    Returns:
        As of `llmeff train`: 0, 1 where it failed, 2 where the input is wrong.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once nothing of the run is left running.
    """
    how: list[str] = []
    for number in range(restarts + 1):
        if number:
            log.logger.warning("restart %d of %d", number, restarts)
            how = [going_on(folder)] if (folder / schema.CONFIG).is_file() else []
        line = start(how)
        tell(shlex.join(line))
        code = _Job(line, folder).wait()
        if code in (0, _BAD_INPUT) or (folder / schema.RESULT).exists():
            break
    return code


_LAUNCHERS_OWN = re.compile(rb"[IWE]\d{4} [\d:.]+ +\d+ \S*torch/distributed/(elastic|run)")
"""A line of torch's launcher about the processes, which on a busy machine it may write before the last word is there."""


class _Job:
    """Processes that are started by one command, of which one says last how the run ended.

    What they write to standard error is passed on until then; what comes after is the launcher's account of it, and
    goes into a file of the run's folder.
    """

    def __init__(self, line: list[str], folder: Path):
        self._line, self._log = line, folder / "engine.log"
        self._kept: list[bytes] = []

    def wait(self) -> int:
        """Starts them and returns the run's exit code when all have ended."""
        with tempfile.TemporaryDirectory(prefix="llmeff-") as place, terminable():
            self._ending = Path(place) / "ending.json"
            self._process = subprocess.Popen(
                self._line, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=end_with_starter,
                cwd=place, env=launched_environment(self._ending, on_gpu=torch.cuda.is_available()),
            )  # fmt: skip
            assert self._process.stderr is not None
            relay = threading.Thread(target=self._relay, args=(self._process.stderr,), daemon=True)
            relay.start()
            try:
                self._wait()
            except KeyboardInterrupt:
                self._interrupt()
                raise
            finally:
                _kill(self._process)
                relay.join(_GRACE_S)
                self._keep()
            return self._code()

    def _relay(self, stream: IO[bytes]) -> None:
        for line in stream:
            if self._ending.exists() or _LAUNCHERS_OWN.match(line):
                self._kept.append(line)
            else:
                log.err().write(line.decode(errors="replace"))
                log.err().flush()

    def _wait(self) -> None:
        """Until all have ended, or a while after the last word."""
        deadline_s = float("inf")
        while time.monotonic() < deadline_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
                return
            if deadline_s == float("inf") and self._ending.exists():
                deadline_s = time.monotonic() + _GRACE_S

    def _interrupt(self) -> None:
        self._ending.touch()  # what they say from now on is of no use at the terminal
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.wait(_GRACE_S)

    def _keep(self) -> None:
        if self._kept and self._log.parent.is_dir():
            with open(files.open_to_append(self._log), "ab") as file:
                file.writelines(self._kept)

    def _code(self) -> int:
        """By the last word; where there was none, whether the command did well."""
        if not self._ending.exists():
            return _FAILED if self._process.returncode else 0
        ending = json.loads(self._ending.read_text(encoding="utf-8"))
        log.err().write(ending["message"])
        code: int = ending["code"]
        return code


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_starter() -> None:
    """In the process that is started: Linux ends it when its starter goes, be that by SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A block in which SIGTERM is Ctrl-C, so that it too is passed on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a process and those that it started; its ranks have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        left = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
