"""Writes a run folder: rows during the run, the result at its end. A lock keeps out other writers."""

import contextlib
import fcntl
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.core.log import logger
from llmeff.record import schema
from llmeff.record.reader import read_environment, read_evals, read_evaluations, recorded, whole_rows
from llmeff.record.schema import Environment, EvalRow, Evaluation, Record, Result, StepRow

_LOCK = ".lock"


class RunWriter:
    """Writes one run folder, and locks it against other writers.

    Open a writer by `create`, `resume` or `restart`, and close it, or use it as a context manager. Every method that
    writes raises ConfigError if the disk is full or the folder is not writable. Rows that were written before stay
    complete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock: int | None = lock(folder)
        self._metrics: io.FileIO | None = None
        self._evals: Any = None
        self._evaluations: list[Evaluation] | None = []

    @classmethod
    def create(cls, folder: Path, config: BaseModel, environment: Environment) -> "RunWriter":
        """Begins a run in a folder that does not exist or is empty.

        Raises:
            ConfigError: the folder is not empty, is not writable, or is in use by another process.
        """
        with files.reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        check_free(folder)
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls(folder))
            with writer._writing(schema.CONFIG):
                files.sweep_partial(folder)
                _write_json(folder / schema.ENVIRONMENT, environment)
                # The config is written last, because its file marks the folder as a run.
                _write_json(folder / schema.CONFIG, config)
            writer._open()
            undo.pop_all()
        return writer

    @classmethod
    def resume(cls, folder: Path, config: BaseModel, environment: Environment) -> "RunWriter":
        """Continues an unfinished run with this config.

        Before the first row, call `truncate_after` with the checkpoint's step.

        Raises:
            ConfigError: the folder has no run, its run has ended, or another process uses the folder.
        """
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls._unfinished(folder))
            with writer._writing(schema.ENVIRONMENT):
                files.sweep_partial(folder)
                _write_json(folder / schema.ENVIRONMENT, _with_earlier(environment, read_environment(folder)))
                _write_json(folder / schema.CONFIG, config)
            writer._evals = read_evals(folder)
            undo.pop_all()
        return writer

    @classmethod
    def restart(cls, folder: Path, config: BaseModel, environment: Environment) -> "RunWriter":
        """Starts an unfinished run again from its beginning. Before the first row, call `truncate_after` with 0.

        Moves earlier records to the subfolder `discarded-N`, and logs a warning. The subfolder is itself a run folder.

        Raises:
            ConfigError: as in `resume`.
        """
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls._unfinished(folder))
            lost = recorded(folder)
            with writer._writing(schema.CONFIG):
                files.sweep_partial(folder)
                aside = files.set_aside(folder, schema.RECORDED, copied=(schema.CONFIG, schema.ENVIRONMENT))
                _write_json(folder / schema.ENVIRONMENT, environment)
                _write_json(folder / schema.CONFIG, config)
            if aside is not None:
                logger.warning(
                    "%s: starts again from the beginning; its earlier %s are kept in %s", folder, lost or "files", aside
                )
            undo.pop_all()
        return writer

    @classmethod
    def _unfinished(cls, folder: Path) -> "RunWriter":
        """Returns the writer of an unfinished run. Locks the folder, and changes nothing else in it."""
        if not (folder / schema.CONFIG).is_file():
            raise ConfigError(f"{folder}: there is no run to resume. Start a new run without --resume")
        files.refuse_links(folder)
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls(folder))
            if (folder / schema.RESULT).exists():
                raise ConfigError(
                    f"{folder}: this run has ended, so it cannot be resumed. Start a new run with another --out"
                )
            undo.pop_all()
        return writer

    def truncate_after(self, step: int) -> None:
        """Drops all rows and evaluations after a checkpoint's step (all if the step is 0), and an incomplete last line.

        The resumed run writes the dropped rows again, bit for bit. If there is no checkpoint, use `restart`.

        Raises:
            ConfigError: a row up to the step is missing, so the record would have a gap.
        """
        path = self.folder / schema.METRICS
        content = path.read_bytes() if path.exists() else b""
        kept = [(number, line) for number, line in whole_rows(content) if number <= step]
        if [number for number, _ in kept] != list(range(1, step + 1)):
            raise ConfigError(
                f"{path}: the checkpoint is from step {step}, but some rows up to that step are missing. Restore this "
                "file, or start a new run"
            )
        whole = b"".join(line for _, line in kept)
        if whole != content:
            with self._writing(schema.METRICS):
                files.write_bytes(path, whole)
        self._open()
        if self._evals is not None:
            before = self._evals.num_rows
            self._evals = self._evals.filter(pc.field("step") <= step)
            if self._evals.num_rows != before:
                self._write_evals()
        self._cut_evaluations(step)

    def _cut_evaluations(self, step: int) -> None:
        path = self.folder / schema.EVALUATIONS
        content = path.read_bytes() if path.exists() else b""
        self._evaluations = [row for row in read_evaluations(content, path) if row.step <= step]
        if not self._evaluations and self._evals is not None and self._evals.num_rows:
            self._evaluations = None  # from an older llmeff: a file without the first rows would mislead
        elif _lines(self._evaluations) != content:
            self._write_evaluations(self._evaluations)

    def step(self, row: StepRow) -> None:
        """Appends one row to `metrics.jsonl`. The row survives a killed process and, after `sync`, a machine crash."""
        assert self._metrics is not None
        line, written = _lines([row]), 0
        try:
            while written < len(line):  # a write to a nearly full disk may be partial
                written += self._metrics.write(line[written:])
        except OSError:
            with self._writing(schema.METRICS):
                end = self._metrics.tell() - written
                self._metrics.truncate(end)
                self._metrics.seek(end)
                raise

    def sync(self) -> None:
        """Flushes the rows to disk. Call it before a checkpoint is written: a resume needs the rows up to it."""
        assert self._metrics is not None
        with self._writing(schema.METRICS):
            os.fsync(self._metrics.fileno())

    def evaluation(self, rows: Sequence[EvalRow], metrics: Mapping[str, float]) -> None:
        """Adds an evaluation. Replaces an earlier evaluation of the same step and split.

        Args:
            rows: one row per unit, for `evals.parquet`. If empty, nothing is written.
            metrics: metrics over all units, for `evaluations.jsonl`.
        """
        if not rows:
            return
        step, split = rows[0].step, rows[0].split
        tables = [_eval_table(rows)]
        if self._evals is not None:
            again = (pc.field("step") == step) & (pc.field("split") == split)
            tables.insert(0, self._evals.filter(~again))
        self._evals = pa.concat_tables(tables, promote_options="default")
        self._write_evals()
        if self._evaluations is not None:
            others = [row for row in self._evaluations if (row.step, row.split) != (step, split)]
            self._write_evaluations([*others, Evaluation(step=step, split=split, metrics=dict(metrics))])

    def finish(self, result: Result) -> None:
        """Ends the run: flushes the rows to disk, then writes `result.json` atomically."""
        self.sync()
        with self._writing(schema.RESULT):
            _write_json(self.folder / schema.RESULT, result)

    def close(self) -> None:
        """Closes the files and releases the lock of the folder."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        path = self.folder / schema.METRICS
        with self._writing(schema.METRICS):
            self._metrics = io.FileIO(files.open_to_append(path), "ab")

    def _write_evals(self) -> None:
        buffer = io.BytesIO()
        metadata = {b"schema_version": str(schema.SCHEMA_VERSION).encode()}
        pq.write_table(self._evals.replace_schema_metadata(metadata), buffer, compression="zstd")
        with self._writing(schema.EVALS):
            files.write_bytes(self.folder / schema.EVALS, buffer.getvalue())

    def _write_evaluations(self, rows: list[Evaluation]) -> None:
        self._evaluations = rows
        with self._writing(schema.EVALUATIONS):
            files.write_bytes(self.folder / schema.EVALUATIONS, _lines(rows))

    def _writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        return files.reported(self.folder / name)


class NullWriter(RunWriter):
    """The writer of all ranks except the main rank. Writes nothing."""

    def __init__(self, folder: Path, *_of_the_run: object):
        self.folder = folder
        self._lock = self._metrics = None

    def truncate_after(self, step: int) -> None:
        """Does nothing, because only the main rank writes the record."""

    def step(self, row: StepRow) -> None:
        """Does nothing, because only the main rank writes the record."""

    def sync(self) -> None:
        """Does nothing, because only the main rank writes the record."""

    def evaluation(self, rows: Sequence[EvalRow], metrics: Mapping[str, float]) -> None:
        """Does nothing, because only the main rank writes the record."""

    def finish(self, result: Result) -> None:
        """Does nothing, because only the main rank writes the record."""


def writer_of(*, is_main: bool, resume: bool, anew: bool) -> Callable[[Path, BaseModel, Environment], RunWriter]:
    """Returns a function that takes the run's folder, config and environment and opens the writer of a rank."""
    if not is_main:
        return NullWriter
    return RunWriter.restart if anew else RunWriter.resume if resume else RunWriter.create


def _write_json(path: Path, content: BaseModel) -> None:
    files.write_text(path, content.model_dump_json(indent=1) + "\n")


def _lines(rows: Iterable[Record]) -> bytes:
    return b"".join(row.model_dump_json().encode() + b"\n" for row in rows)


def _with_earlier(now: Environment, before: Environment) -> Environment:
    """Returns this process's environment. Adds the previous process's environment to `earlier` if it differs."""
    last, earlier = before.model_copy(update={"earlier": ()}), before.earlier
    return now.model_copy(update={"earlier": earlier if last == now else (*earlier, last)})


_FIXED = ("step", "split", "unit", "loss_sum", "count")


def _eval_table(rows: Iterable[EvalRow]) -> Any:
    flat = []
    for row in rows:
        taken = sorted(row.metrics.keys() & set(_FIXED))
        if taken:
            raise ValueError(
                f"columns of {schema.EVALS} already have these names. Rename the metrics {', '.join(taken)}"
            )
        flat.append({name: getattr(row, name) for name in _FIXED} | row.metrics)
    return pa.Table.from_pylist(flat)


def _is_ours(file: Path) -> bool:
    """Returns whether a file is a lock, or was left by a process that was killed before its run began."""
    return file.name in (_LOCK, schema.ENVIRONMENT) or file.name.startswith(files.PARTIAL)


def check_free(folder: Path) -> None:
    """Checks that a run may begin in a folder. Changes nothing.

    Raises:
        ConfigError: the folder is not empty, or has symbolic links in it.
    """
    with files.reported(folder):
        lying = sorted(file.name for file in folder.iterdir() if not _is_ours(file)) if folder.is_dir() else []
    if lying:
        raise ConfigError(_not_empty(folder, lying))
    files.refuse_links(folder)


def _not_empty(folder: Path, lying: list[str]) -> str:
    named = ", ".join(lying[:4]) + (f" and {len(lying) - 4} more" if len(lying) > 4 else "")
    if schema.RESULT in lying:
        advice = "it has a run that has ended. Choose another --out"
    elif schema.CONFIG in lying:
        advice = "it has an unfinished run. Continue that run with --resume, or choose another --out"
    else:
        advice = "it is not a run folder. Choose another --out"
    return f"{folder}: is not empty ({named}); {advice}"


def wait_until_free(folder: Path, timeout_s: float) -> None:
    """Waits until no process holds the lock of a folder, for example after its process was killed.

    Raises:
        ConfigError: a process still holds the lock after `timeout_s` seconds.
    """
    deadline_s = time.monotonic() + timeout_s
    while (folder / _LOCK).exists():
        try:
            os.close(lock(folder))
            return
        except ConfigError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def lock(folder: Path) -> int:
    """Locks a folder for this process; returns the lock's file descriptor. The kernel unlocks it when the process ends.

    Raises:
        ConfigError: another process holds the lock, or the lock file is a symbolic link.
    """
    path = folder / _LOCK
    with files.reported(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"{folder}: another process is writing to this folder. Wait until it ends, or choose another --out"
        ) from None
    except OSError as error:  # some network file systems do not support locks
        logger.warning(
            "%s: the folder cannot be locked (%s). Do not start a second run in it",
            folder,
            error.strerror,
        )
    return handle
