"""Writes a run folder: rows as they come, the result last; one writer at a time, nothing half-written ever read."""

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
    """The one writer of a run folder. Use `create` or `resume`, and close it, or use it as a context.

    Every method that writes raises ConfigError where the disk is full or the folder not writable; all rows written
    before are then whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock: int | None = lock(folder)
        self._metrics: io.FileIO | None = None
        self._evals: Any = None
        self._evaluations: list[Evaluation] | None = []

    @classmethod
    def create(cls, folder: Path, config: BaseModel, environment: Environment) -> "RunWriter":
        """Begins a run in a folder that is absent or empty.

        Raises:
            ConfigError: something lies there, it is not writable, or another process writes there.
        """
        with files.reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        check_free(folder)
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls(folder))
            with writer._writing(schema.CONFIG):
                files.sweep_partial(folder)
                _write_json(folder / schema.ENVIRONMENT, environment)
                # Last: from now on the folder is a run.
                _write_json(folder / schema.CONFIG, config)
            writer._open()
            undo.pop_all()
        return writer

    @classmethod
    def resume(cls, folder: Path, config: BaseModel, environment: Environment) -> "RunWriter":
        """Goes on with an unfinished run, as the config now is; call `truncate_after` with the checkpoint's step before the first row.

        Raises:
            ConfigError: no run was begun there, it has ended, or another process writes there.
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
        """Begins an unfinished run anew; call `truncate_after` with 0 before the first row.

        What it had recorded is moved into `discarded-N` in its folder, with a warning; that is a run folder, too.

        Raises:
            ConfigError: see `resume`.
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
                logger.warning("%s: begins anew; %s of before are kept in %s", folder, lost or "files", aside)
            undo.pop_all()
        return writer

    @classmethod
    def _unfinished(cls, folder: Path) -> "RunWriter":
        """The writer of a run that was begun and has not ended, before it touches anything."""
        if not (folder / schema.CONFIG).is_file():
            raise ConfigError(f"{folder}: there is no run to resume; start it without --resume")
        files.refuse_links(folder)
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(cls(folder))
            if (folder / schema.RESULT).exists():
                raise ConfigError(f"{folder}: this run has ended; there is nothing to resume")
            undo.pop_all()
        return writer

    def truncate_after(self, step: int) -> None:
        """Drops what lies beyond a checkpoint's step (0: everything), and a line that was left half-written.

        What is dropped is made again, bit for bit, by the steps that the run now goes on with. Where no checkpoint says up to
        where it stands, that is for `restart`.

        Raises:
            ConfigError: rows up to the step are missing, so that the record would have a hole.
        """
        path = self.folder / schema.METRICS
        content = path.read_bytes() if path.exists() else b""
        kept = [(number, line) for number, line in whole_rows(content) if number <= step]
        if [number for number, _ in kept] != list(range(1, step + 1)):
            raise ConfigError(f"{path}: the checkpoint is of step {step}, but not every row up to it is there")
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
            self._evaluations = None  # an older llmeff began the run: a file that lacks its first rows would mislead
        elif _lines(self._evaluations) != content:
            self._write_evaluations(self._evaluations)

    def step(self, row: StepRow) -> None:
        """Appends one line to `metrics.jsonl`; it survives a killed process, and after `sync` a dead machine."""
        assert self._metrics is not None
        line, written = _lines([row]), 0
        try:
            while written < len(line):  # a disk that fills takes a part
                written += self._metrics.write(line[written:])
        except OSError:
            with self._writing(schema.METRICS):
                end = self._metrics.tell() - written
                self._metrics.truncate(end)
                self._metrics.seek(end)
                raise

    def sync(self) -> None:
        """Flushes the rows to disk; call it before a checkpoint that stands on them."""
        assert self._metrics is not None
        with self._writing(schema.METRICS):
            os.fsync(self._metrics.fileno())

    def evaluation(self, rows: Sequence[EvalRow], metrics: Mapping[str, float]) -> None:
        """Adds an evaluation, in place of any of the same step and split.

        Args:
            rows: its units, for `evals.parquet`.
            metrics: what they come to, for `evaluations.jsonl`.
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
        """Ends the run: writes `result.json`, whole or not at all, after everything else is on disk."""
        self.sync()
        with self._writing(schema.RESULT):
            _write_json(self.folder / schema.RESULT, result)

    def close(self) -> None:
        """Lets the folder go, for another writer."""
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
    """What ranks beside the main one have in a writer's place: it writes nothing."""

    def __init__(self, folder: Path, *_of_the_run: object):
        self.folder = folder
        self._lock = self._metrics = None

    def truncate_after(self, step: int) -> None:
        """Nothing."""

    def step(self, row: StepRow) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def evaluation(self, rows: Sequence[EvalRow], metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def finish(self, result: Result) -> None:
        """Nothing."""


def writer_of(*, is_main: bool, resume: bool, anew: bool) -> Callable[[Path, BaseModel, Environment], RunWriter]:
    """What opens a rank's writer, of the run's folder, config and environment."""
    if not is_main:
        return NullWriter
    return RunWriter.restart if anew else RunWriter.resume if resume else RunWriter.create


def _write_json(path: Path, content: BaseModel) -> None:
    files.write_text(path, content.model_dump_json(indent=1) + "\n")


def _lines(rows: Iterable[Record]) -> bytes:
    return b"".join(row.model_dump_json().encode() + b"\n" for row in rows)


def _with_earlier(now: Environment, before: Environment) -> Environment:
    """This process's environment, with those before it where they differ."""
    last, earlier = before.model_copy(update={"earlier": ()}), before.earlier
    return now.model_copy(update={"earlier": earlier if last == now else (*earlier, last)})


_FIXED = ("step", "split", "unit", "loss_sum", "count")


def _eval_table(rows: Iterable[EvalRow]) -> Any:
    flat = []
    for row in rows:
        taken = sorted(row.metrics.keys() & set(_FIXED))
        if taken:
            raise ValueError(f"metrics named like a column of {schema.EVALS}: {', '.join(taken)}")
        flat.append({name: getattr(row, name) for name in _FIXED} | row.metrics)
    return pa.Table.from_pylist(flat)


def _is_ours(file: Path) -> bool:
    """Whether a file is a lock, or what a process left that was killed before its run began."""
    return file.name in (_LOCK, schema.ENVIRONMENT) or file.name.startswith(files.PARTIAL)


def check_free(folder: Path) -> None:
    """Says early whether a run may begin in a folder; touches nothing.

    Raises:
        ConfigError: something lies there.
    """
    with files.reported(folder):
        lying = sorted(file.name for file in folder.iterdir() if not _is_ours(file)) if folder.is_dir() else []
    if lying:
        raise ConfigError(_not_empty(folder, lying))
    files.refuse_links(folder)


def _not_empty(folder: Path, lying: list[str]) -> str:
    named = ", ".join(lying[:4]) + (f" and {len(lying) - 4} more" if len(lying) > 4 else "")
    if schema.RESULT in lying:
        advice = "a run that has ended; choose another --out"
    elif schema.CONFIG in lying:
        advice = "an unfinished run; go on with it by --resume, or choose another --out"
    else:
        advice = "no run; choose another --out"
    return f"{folder}: is not empty ({named}): {advice}"


def wait_until_free(folder: Path, timeout_s: float) -> None:
    """Returns when no process writes in a folder any more, as after one that was just killed.

    Raises:
        ConfigError: one still does, after the time.
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
    """Takes the folder for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        ConfigError: another process has it, or its lock is a symbolic link.
    """
    path = folder / _LOCK
    with files.reported(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{folder}: another process is writing here; wait, or choose another --out") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning(
            "%s: the folder cannot be locked (%s): start no second run in it",
            folder,
            error.strerror,
        )
    return handle
