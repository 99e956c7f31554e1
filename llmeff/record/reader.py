"""Reads run folders, whether finished, unfinished, or cut off in the middle of a line."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from pydantic import ValidationError

from llmeff.core.config import ConfigError
from llmeff.record import schema
from llmeff.record.schema import Environment, Evaluation, Quartiles, Record, Result, StepRow

Columns = dict[str, npt.NDArray[Any]]
"""One array per field of StepRow; null is NaN."""

R = TypeVar("R", bound=Record)


class Run:
    """One run folder. Each file is read once, when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config that was run, as written.

        Raises:
            ConfigError: it cannot be read.
        """
        path = self.folder / schema.CONFIG
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @cached_property
    def environment(self) -> Environment:
        """Where it ran last."""
        return read_environment(self.folder)

    @cached_property
    def steps(self) -> Columns:
        """The rows of `metrics.jsonl` as columns."""
        path = self.folder / schema.METRICS
        return read_steps(path.read_bytes() if path.exists() else b"", path)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The rows of `evaluations.jsonl`; empty before the first evaluation, and for an older run."""
        path = self.folder / schema.EVALUATIONS
        return read_evaluations(path.read_bytes() if path.exists() else b"", path)

    @cached_property
    def evals(self) -> Any:
        """The rows of `evals.parquet` as a pyarrow.Table; None before the first evaluation."""
        return read_evals(self.folder)

    @cached_property
    def result(self) -> Result | None:
        """How it ended; None if it has not."""
        path = self.folder / schema.RESULT
        return _load(path, Result) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come. If it has ended, its result tells, without reading the rows again."""

    steps: int
    """Optimizer steps done."""
    items: int
    """Items trained on."""
    train_loss: float | None
    """Nats per item, see `final_loss`; None if unknown."""
    items_per_s: float | None
    """Median items per second, see `throughput`; None if unknown."""


def progress(run: Run) -> Progress:
    """How far a run has come."""
    result = run.result
    if result is not None:
        return Progress(
            steps=result.steps,
            items=result.items_seen,
            train_loss=None if np.isnan(result.train_loss) else result.train_loss,
            items_per_s=None if result.items_per_s is None else result.items_per_s.median,
        )
    rows = run.steps
    speed, is_begun = throughput(rows), len(rows["step"]) > 0
    return Progress(
        steps=int(rows["step"][-1]) if is_begun else 0,
        items=int(rows["items_seen"][-1]) if is_begun else 0,
        train_loss=final_loss(rows),
        items_per_s=None if speed is None else speed.median,
    )


def model_folder(run: Run) -> Path:
    """The folder with the model of a run that has ended.

    Raises:
        ConfigError: the run has no model.
    """
    place = run.folder / schema.MODEL
    if place.is_dir():
        return place
    state = f"unfinished at step {progress(run).steps}" if run.result is None else run.result.status
    there = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    raise ConfigError(
        f"{run.folder}: the run is {state} and has no model, which a run writes when it ends; the folder holds {there}"
    )


def read_run(folder: Path) -> Run:
    """Opens a run folder.

    Raises:
        ConfigError: no run was begun there.
    """
    if (folder / schema.CONFIG).is_file() and (folder / schema.ENVIRONMENT).is_file():
        return Run(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    runs = sorted(file.parent.name for file in folder.glob(f"*/{schema.CONFIG}"))
    hint = f" There are runs in it: {', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}." if runs else ""
    raise ConfigError(f"{folder}: is not a run folder: it has no {schema.CONFIG} and {schema.ENVIRONMENT}.{hint}")


def recorded(folder: Path) -> str:
    """How much a run has recorded, in words ("12 steps and 3 evaluations"); empty if it recorded nothing.

    Damaged lines count too: lines are counted, not read.
    """
    found = []
    for name, what in ((schema.METRICS, "step"), (schema.EVALUATIONS, "evaluation")):
        path = folder / name
        number = path.read_bytes().count(b"\n") if path.is_file() else 0
        if number:
            found.append(f"{number} {what}{'s' if number > 1 else ''}")
    if len(found) < 2 and (folder / schema.EVALS).is_file() and (folder / schema.EVALS).stat().st_size:
        found.append(f"the evaluations in {schema.EVALS}")
    return " and ".join(found)


def read_environment(folder: Path) -> Environment:
    """`env.json` of a run folder.

    Raises:
        ConfigError: it cannot be read, or is of another version.
    """
    return _load(folder / schema.ENVIRONMENT, Environment)


def read_evals(folder: Path) -> Any:
    """`evals.parquet` of a run folder as a pyarrow.Table; None if there is none.

    Raises:
        ConfigError: it cannot be read, or is of another version.
    """
    path = folder / schema.EVALS
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(schema.SCHEMA_VERSION):
        raise ConfigError(_other_version(path, version))
    return table


def read_evaluations(content: bytes, path: Path) -> list[Evaluation]:
    """The lines of `evaluations.jsonl`, without an incomplete last line.

    Raises:
        ConfigError: a line does not parse, or is of another version; the message names the file by `path`.
    """
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_parse(line, f"{path}: line {number}", Evaluation) for number, line in enumerate(lines, start=1)]


def whole_rows(content: bytes) -> list[tuple[int, bytes]]:
    """(step, line) for each line of `metrics.jsonl` before the first damaged one."""
    rows = []
    for line in io.BytesIO(content):
        try:
            if not line.endswith(b"\n"):
                break
            rows.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError):
            break
    return rows


def read_steps(content: bytes, path: Path) -> Columns:
    """The lines of `metrics.jsonl` as columns, without an incomplete last line.

    Raises:
        ConfigError: a line does not parse, or is of another version; the message names the file by `path`.
    """
    whole = content[: content.rfind(b"\n") + 1]
    columns = _read_fast(whole) or _read_slowly(whole, path)
    versions = columns["schema_version"]
    if (versions != schema.SCHEMA_VERSION).any():
        raise ConfigError(_other_version(path, versions[versions != schema.SCHEMA_VERSION][0]))
    return columns


def _read_fast(content: bytes) -> Columns | None:
    """The columns; None if a line is damaged, "NaN" stands for a number, or there is no line."""
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(content),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=pa.schema(_COLUMNS)),
        )
    except pa.ArrowInvalid:
        return None
    if any(table[name].null_count for name in _REQUIRED):
        return None
    return {name: table[name].to_numpy() for name in _COLUMNS}


def _read_slowly(content: bytes, path: Path) -> Columns:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append([row[name] for name in _COLUMNS])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {number} is not a step's row ({error!r})") from None
    # NumPy reads "NaN" and "Infinity" as such, and None as NaN.
    return {
        name: np.array([row[n] for row in rows], kind.to_pandas_dtype())
        for n, (name, kind) in enumerate(_COLUMNS.items())
    }


def final_loss(steps: Columns) -> float | None:
    """Mean training loss over the last `LAST_STEPS` steps, or all if there are fewer; None if there are none."""
    losses = steps["loss"][-schema.LAST_STEPS :]
    return float(losses.mean()) if len(losses) else None


def throughput(steps: Columns) -> Quartiles | None:
    """Items per second over the steps after warm-up; None if there are none."""
    speeds = steps["items_per_s"][~steps["is_warmup"]]
    if not len(speeds):
        return None
    lower, median, upper = np.quantile(speeds, (0.25, 0.5, 0.75)).tolist()
    return Quartiles(lower=lower, median=median, upper=upper)


def _column(annotation: Any) -> Any:
    """The column type of a field. A number that may be null is a float, and NaN stands for null."""
    kinds = get_args(annotation)
    if NoneType in kinds or annotation is float:
        return pa.float64()
    return pa.bool_() if annotation is bool else pa.int64()


_REQUIRED = [name for name, field in StepRow.model_fields.items() if field.is_required()]
_COLUMNS = {name: _column(field.annotation) for name, field in StepRow.model_fields.items()}


def _load(path: Path, kind: type[R]) -> R:
    try:
        return _parse(path.read_bytes(), path, kind)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(content: bytes, where: object, kind: type[R]) -> R:
    try:
        data = json.loads(content.decode("utf-8"))
        version = data.get("schema_version")
        if version != schema.SCHEMA_VERSION:
            raise ConfigError(_other_version(where, version))
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{where}: does not parse ({error})") from None


def _other_version(where: object, version: object) -> str:
    return f"{where}: its schema_version is {version}, this llmeff reads {schema.SCHEMA_VERSION}"
