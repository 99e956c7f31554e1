"""From a RunConfig to the processes of a run on this machine: their command, how they end, and restarts."""

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
"""Seconds after a run's last word, or after a signal. What still runs then is killed."""
_FAILED, _BAD_INPUT = 1, 2


def command(config: RunConfig, arguments: Sequence[str]) -> list[str]:
    """The command that starts a run's processes on this machine: `accelerate launch` if there are several.

    Args:
        config: the run's.
        arguments: those of `llmeff train`, for each process.
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
    """A path as an option in a batch script. Slurm reads quotes there as a shell does.

    Raises:
        ConfigError: quotes cannot help.
    """
    text = str(path)
    if any(character in text for character in '"\n\r'):
        raise ConfigError(f"{text!r}: a batch script cannot name this folder; choose another")
    return f'"{text}"' if any(map(str.isspace, text)) else text


def slurm_job(
    name: str, line: str, *, log: Path, cores: int, gpus: int = 0, count: int | None = None, more: Sequence[str] = ()
) -> str:
    """A Slurm batch script for one task on one node.

    Args:
        name: the job's.
        line: the command, as bash reads it; $SLURM_ARRAY_TASK_ID is the job's number in an array.
        log: the file for its output; `%a` stands for the number.
        cores: how many cores it needs.
        gpus: how many GPUs it needs.
        count: how many jobs the array has; None: it is no array.
        more: options of sbatch; they replace those above that have the same names.

    Raises:
        ConfigError: a folder's name cannot stand in a batch script.
    """
    defaults = [f"--job-name={name}", f"--output={_quoted(log)}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cores}"]
    defaults += [f"--array=0-{count - 1}"] if count is not None else []
    defaults += [f"--gpus={gpus}"] if gpus else []
    given = {option.partition("=")[0] for option in more}
    options = [*(option for option in defaults if option.partition("=")[0] not in given), *more]
    head = "".join(f"#SBATCH {option}\n" for option in [f"--chdir={_quoted(Path.cwd())}", *options])
    return f"#!/bin/bash\n{head}\nexec {line}\n"


def supplied(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's raw data. If it names no DeepSpeed file but the launcher's flags do, that file is added.

    If it names no strategy of several processes either, the strategy that reads such a file is added, too.

    Raises:
        ConfigError: the config names a file with other content.
    """
    given = launcher_file()
    parallel = data.get("parallel", {})
    parallel = {"name": parallel} if isinstance(parallel, str) else parallel
    if given is None or not isinstance(parallel, Mapping):
        return dict(data)
    configured = parallel.get("file")
    if configured is not None and configured != given and read(Path(configured)) != read(Path(given)):
        raise ConfigError(
            f"parallel.file is {configured!r} in the config, but accelerate launch --deepspeed_config_file names {given!r}, "
            "and their contents differ: leave one of them out"
        )
    if configured is not None:
        return dict(data)
    strategies = StrategyConfig.registry
    readers = [name for name in strategies.names() if "file" in strategies[name].model_fields]
    alone = [None, *(name for name in strategies.names() if not strategies[name].joins)]
    if parallel.get("name") in alone:
        parallel = {**parallel, "name": readers[0], "ranks": world().ranks}
    if parallel["name"] not in readers:
        return dict(data)  # the launcher's other flags, or validation, will report it
    return {**data, "parallel": {**parallel, "file": given}}


def going_on(folder: Path) -> str:
    """The flag with which a run that ended without a result continues by itself.

    If it ended before its first checkpoint, it begins anew and its rows are kept. If checkpoints are missing, `--resume`
    says so.
    """
    return "--restart-from-scratch" if is_before_first(folder) else "--resume"


def first_flags(folder: Path, *, resume: bool, anew: bool, is_restarted: bool) -> list[str]:
    """The flags with which a run's processes are first started.

    Args:
        folder: the run's.
        resume: `--resume` was given.
        anew: `--restart-from-scratch` was given.
        is_restarted: the run continues by itself if it ends abnormally, and so also from where it ended before.

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
    """Runs a run's processes to their end. If that is abnormal, starts them again from the newest whole checkpoint.

    Args:
        start: makes the command, from the flags that continue a run; there are none at first.
        folder: the run's.
        restarts: how often at most.
        tell: is given each command before it starts.

    Returns:
        The exit code, as of `llmeff train`: 0; 1 if it failed; 2 if the input is wrong.

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
"""A line of torch's launcher about the processes. On a busy machine it may come before the last word."""


class _Job:
    """Processes started by one command; one of them says last how the run ended.

    Until then, what they write to standard error is passed on. What comes after is the launcher's account of the end; it
    goes into a file in the run's folder.
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
        """Waits until all have ended, or for a while after the last word."""
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
        """The last word's code; without a last word, whether the command succeeded."""
        if not self._ending.exists():
            return _FAILED if self._process.returncode else 0
        ending = json.loads(self._ending.read_text(encoding="utf-8"))
        log.err().write(ending["message"])
        code: int = ending["code"]
        return code


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_starter() -> None:
    """Runs in the started process: Linux then ends it when its starter goes, even by SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A block in which SIGTERM acts like Ctrl-C, so that it is passed on too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills whatever is left of a process and of those that it started; its ranks have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        left = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
