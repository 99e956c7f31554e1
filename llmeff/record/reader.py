"""Reads run folders: finished ones, unfinished ones, and those whose last line is incomplete."""

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
"""One array per field of StepRow. A null value is NaN."""

R = TypeVar("R", bound=Record)


class Run:
    """One run folder. Each file is read at its first use and then cached."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's config, as `config.json` holds it.

        Raises:
            ConfigError: the file cannot be read.
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
        """The environment of the run's last process."""
        return read_environment(self.folder)

    @cached_property
    def steps(self) -> Columns:
        """The rows of `metrics.jsonl` as columns."""
        path = self.folder / schema.METRICS
        return read_steps(path.read_bytes() if path.exists() else b"", path)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The rows of `evaluations.jsonl`. Empty before the first evaluation, and for runs of older versions."""
        path = self.folder / schema.EVALUATIONS
        return read_evaluations(path.read_bytes() if path.exists() else b"", path)

    @cached_property
    def evals(self) -> Any:
        """The rows of `evals.parquet` as a pyarrow.Table. None before the first evaluation."""
        return read_evals(self.folder)

    @cached_property
    def result(self) -> Result | None:
        """The content of `result.json`. None if the run has not ended."""
        path = self.folder / schema.RESULT
        return _load(path, Result) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run: steps, items, loss and speed so far."""

    steps: int
    """Optimizer steps done."""
    items: int
    """Items trained on."""
    train_loss: float | None
    """Training loss as `final_loss` computes it, in nats per item. None if unknown."""
    items_per_s: float | None
    """Median items per second after warm-up. None if unknown."""


def progress(run: Run) -> Progress:
    """Returns the progress of a run: from its result if it has ended, otherwise from its rows."""
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
    """Returns the folder with the trained model of a run.

    Raises:
        ConfigError: the run has no model.
    """
    place = run.folder / schema.MODEL
    if place.is_dir():
        return place
    state = f"unfinished at step {progress(run).steps}" if run.result is None else run.result.status
    there = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    raise ConfigError(
        f"{run.folder}: the run is {state} and has no model, which a run writes when it ends. The folder has {there}"
    )


def read_run(folder: Path) -> Run:
    """Opens a run folder.

    Raises:
        ConfigError: the folder does not exist or is not a run folder.
    """
    if (folder / schema.CONFIG).is_file() and (folder / schema.ENVIRONMENT).is_file():
        return Run(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    runs = sorted(file.parent.name for file in folder.glob(f"*/{schema.CONFIG}"))
    hint = f" It contains runs: {', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}." if runs else ""
    raise ConfigError(f"{folder}: is not a run folder, because it lacks {schema.CONFIG} or {schema.ENVIRONMENT}.{hint}")


def recorded(folder: Path) -> str:
    """Returns a text that states how much a run has recorded, such as "12 steps and 3 evaluations".

    The text is empty if the run has recorded nothing. Counts lines without parsing them, so damaged lines count too.
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
    """Reads `env.json` of a run folder.

    Raises:
        ConfigError: the file cannot be read, or has another schema version.
    """
    return _load(folder / schema.ENVIRONMENT, Environment)


def read_evals(folder: Path) -> Any:
    """Reads `evals.parquet` of a run folder as a pyarrow.Table. Returns None if the file does not exist.

    Raises:
        ConfigError: the file cannot be read, or has another schema version.
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
    """Parses the content of `evaluations.jsonl`. Ignores an incomplete last line.

    Raises:
        ConfigError: a line does not parse, or has another schema version. The message names the file by `path`.
    """
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_parse(line, f"{path}: line {number}", Evaluation) for number, line in enumerate(lines, start=1)]


def whole_rows(content: bytes) -> list[tuple[int, bytes]]:
    """Returns (step, line) for each line of `metrics.jsonl` up to the first damaged line."""
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
    """Parses the content of `metrics.jsonl` into columns. Ignores an incomplete last line.

    Raises:
        ConfigError: a line does not parse, or has another schema version. The message names the file by `path`.
    """
    whole = content[: content.rfind(b"\n") + 1]
    columns = _read_fast(whole) or _read_slowly(whole, path)
    versions = columns["schema_version"]
    if (versions != schema.SCHEMA_VERSION).any():
        raise ConfigError(_other_version(path, versions[versions != schema.SCHEMA_VERSION][0]))
    return columns


def _read_fast(content: bytes) -> Columns | None:
    """Parses rows with pyarrow. Returns None if there is no row, a row is damaged, or a number is written "NaN"."""
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
            raise ConfigError(f"{path}: line {number} is not a valid row of a step ({error!r})") from None
    # NumPy converts the strings "NaN" and "Infinity" to floats, and None to NaN.
    return {
        name: np.array([row[n] for row in rows], kind.to_pandas_dtype())
        for n, (name, kind) in enumerate(_COLUMNS.items())
    }


def final_loss(steps: Columns) -> float | None:
    """Returns the mean training loss over the last `LAST_STEPS` steps, or over all steps if there are fewer.

    Returns None if there are no steps.
    """
    losses = steps["loss"][-schema.LAST_STEPS :]
    return float(losses.mean()) if len(losses) else None


def throughput(steps: Columns) -> Quartiles | None:
    """Returns the quartiles of items per second over the steps after warm-up. None if there are no such steps."""
    speeds = steps["items_per_s"][~steps["is_warmup"]]
    if not len(speeds):
        return None
    lower, median, upper = np.quantile(speeds, (0.25, 0.5, 0.75)).tolist()
    return Quartiles(lower=lower, median=median, upper=upper)


def _column(annotation: Any) -> Any:
    """Returns the Arrow type of a field's column. Nullable numbers become floats, with NaN for null."""
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
    return f"{where}: has schema_version {version}, but this version of llmeff reads only {schema.SCHEMA_VERSION}"
