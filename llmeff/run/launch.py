"""Launches the processes of a run on this machine: builds their command, waits for their end, and restarts them."""

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
"""Seconds that processes have to exit after the run has reported its end, or after a signal. Then they are killed."""
_FAILED, _BAD_INPUT = 1, 2


def command(config: RunConfig, arguments: Sequence[str]) -> list[str]:
    """Returns the command that starts a run's processes on this machine. With several ranks, it is `accelerate launch`.

    Args:
        config: config of the run.
        arguments: arguments of `llmeff train`, which every process gets.
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
    """Quotes a path, if necessary, for an option in a Slurm batch script. Slurm reads quotes there as a shell does.

    Raises:
        ConfigError: the path contains a double quote or a line break, which cannot be quoted.
    """
    text = str(path)
    if any(character in text for character in '"\n\r'):
        raise ConfigError(
            f"{text!r}: a batch script cannot contain this path: it has a double quote or a line break. Choose another folder"
        )
    return f'"{text}"' if any(map(str.isspace, text)) else text


def slurm_job(
    name: str, line: str, *, log: Path, cores: int, gpus: int = 0, count: int | None = None, more: Sequence[str] = ()
) -> str:
    """Returns a Slurm batch script for one task on one node.

    Args:
        name: name of the job.
        line: the command, in bash syntax. In a job array, $SLURM_ARRAY_TASK_ID is the index of the job.
        log: the file for the job's output. `%a` in it stands for the index.
        cores: number of cores for the job.
        gpus: number of GPUs for the job.
        count: number of jobs in the array, or None if the job is not an array.
        more: further sbatch options. They override default options of the same name.

    Raises:
        ConfigError: a path contains a double quote or a line break.
    """
    defaults = [f"--job-name={name}", f"--output={_quoted(log)}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cores}"]
    defaults += [f"--array=0-{count - 1}"] if count is not None else []
    defaults += [f"--gpus={gpus}"] if gpus else []
    given = {option.partition("=")[0] for option in more}
    options = [*(option for option in defaults if option.partition("=")[0] not in given), *more]
    head = "".join(f"#SBATCH {option}\n" for option in [f"--chdir={_quoted(Path.cwd())}", *options])
    return f"#!/bin/bash\n{head}\nexec {line}\n"


def supplied(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's raw data. If the config names no DeepSpeed file, adds the file from the launcher's flags.

    A missing strategy, or a strategy for one process, is then replaced by the strategy that reads DeepSpeed files. If
    the config names any other strategy that does not read such files, returns the data unchanged.

    Raises:
        ConfigError: the config names a file whose content differs from the launcher's file.
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
            "and their contents differ. Leave one of them out"
        )
    if configured is not None:
        return dict(data)
    strategies = StrategyConfig.registry
    readers = [name for name in strategies.names() if "file" in strategies[name].model_fields]
    alone = [None, *(name for name in strategies.names() if not strategies[name].joins)]
    if parallel.get("name") in alone:
        parallel = {**parallel, "name": readers[0], "ranks": world().ranks}
    if parallel["name"] not in readers:
        return dict(data)  # validation, or the check of the launcher's other flags, will report the mismatch
    return {**data, "parallel": {**parallel, "file": given}}


def going_on(folder: Path) -> str:
    """Returns the flag for an automatic restart of a run that ended without a result.

    A run that ended before its first checkpoint was due begins anew, and its old rows are kept. Any other run is resumed.
    If its checkpoints are missing, `--resume` reports an error.
    """
    return "--restart-from-scratch" if is_before_first(folder) else "--resume"


def first_flags(folder: Path, *, resume: bool, anew: bool, is_restarted: bool) -> list[str]:
    """Returns the flags for the first start of a run's processes.

    Args:
        folder: folder of the run.
        resume: whether the user gave `--resume`.
        anew: whether the user gave `--restart-from-scratch`.
        is_restarted: whether the run is restarted automatically if it ends abnormally. In that case, if the run
            ended before its first checkpoint was due, `--resume` begins it anew.

    Raises:
        ConfigError: neither flag was given, and the folder is not empty.
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
    """Starts a run's processes and waits for them. If they end abnormally, restarts them from the newest checkpoint.

    Args:
        start: function that takes flags and returns the command that starts the run. The first start has no flags.
        folder: folder of the run.
        restarts: maximum number of restarts.
        tell: called with each command before it starts.

    Returns:
        The exit code of `llmeff train`: 0 if the run finished, 1 if it failed, 2 if the input is invalid.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after all processes of the run have ended.
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
"""Matches log lines of torch's launcher. On a busy machine they may come before the run has reported its end."""


class _Job:
    """The processes started by one command. One of them reports in a file how the run ended.

    Standard error of the processes is passed on until that report. Later output comes from the launcher and goes into
    `engine.log` in the run's folder.
    """

    def __init__(self, line: list[str], folder: Path):
        self._line, self._log = line, folder / "engine.log"
        self._kept: list[bytes] = []

    def wait(self) -> int:
        """Starts the processes, waits until all have ended, and returns the run's exit code."""
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
        """Waits until all processes have ended, but at most `_GRACE_S` seconds after the report of the run's end."""
        deadline_s = float("inf")
        while time.monotonic() < deadline_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
                return
            if deadline_s == float("inf") and self._ending.exists():
                deadline_s = time.monotonic() + _GRACE_S

    def _interrupt(self) -> None:
        self._ending.touch()  # later output does not help the user at the terminal
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.wait(_GRACE_S)

    def _keep(self) -> None:
        if self._kept and self._log.parent.is_dir():
            with open(files.open_to_append(self._log), "ab") as file:
                file.writelines(self._kept)

    def _code(self) -> int:
        """Returns the exit code in the report of the run's end. Without a report, returns 0 if the command succeeded, else 1."""
        if not self._ending.exists():
            return _FAILED if self._process.returncode else 0
        ending = json.loads(self._ending.read_text(encoding="utf-8"))
        log.err().write(ending["message"])
        code: int = ending["code"]
        return code


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_starter() -> None:
    """Makes Linux send this process a SIGTERM when its parent ends, even by SIGKILL. Call it in the started process."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Returns a context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all its descendants. A signal to its group is not enough: ranks have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        left = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
