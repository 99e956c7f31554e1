"""Small records and run folders for all tests, and caches that are not the user's."""

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmeff.core.config import Config
from llmeff.record.schema import (
    Environment,
    EvalRow,
    Quartiles,
    Result,
    StepRow,
    Timings,
)
from llmeff.record.writer import RunWriter

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores it, and so would the processes that tests start and interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


class SeedOnly(Config):
    seed: int = 7


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders that all tests of this process, and the processes that they start, share in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMEFF_CACHE", str(tmp_path_factory.mktemp("tokens")))
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture
def step_row() -> Callable[..., StepRow]:
    """A row of a step; the loss falls with the step, speeds are 100 + step."""

    def make(step: int, **changes: Any) -> StepRow:
        values: dict[str, Any] = {
            "step": step,
            "loss": 4.0 / step,
            "grad_norm": 1.5,
            "learning_rate": 1e-3,
            "items": 64,
            "items_seen": 64 * step,
            "step_s": 0.5,
            "data_s": 0.1,
            "items_per_s": 100.0 + step,
            "is_warmup": step <= 2,
        }
        return StepRow(**values | changes)

    return make


@pytest.fixture
def environment() -> Environment:
    return Environment(
        llmeff="0.1.0",
        commit=None,
        diff_sha256=None,
        python="3.11.7",
        packages={"torch": "2.13.0"},
        system="Linux x86_64",
        cpu="a CPU",
        cores=2,
        threads=1,
        memory_bytes=2**34,
        device="cpu",
    )


@pytest.fixture
def result() -> Result:
    predicted = {"parameters": 1000.0, "peak_bytes": 95.0 * 2**20, "wire_bytes": 0.0}
    measured = {"parameters": 1000.0, "peak_bytes": 100.0 * 2**20, "resident_bytes": 2.0**28}
    return Result(
        status="finished",
        steps=4,
        item="token",
        items_seen=256,
        parameters=1000,
        train_loss=(4 + 2 + 4 / 3 + 1) / 4,
        metrics={"validation": {"loss": 2.5, "bits_per_byte": 1.75, "accuracy": 0.4}},
        metric_directions={"loss": "lower", "bits_per_byte": "lower", "accuracy": "higher"},
        references={"gzip_bits_per_byte": 1.894},
        timings=Timings(startup_s=1.0, train_s=2.0),
        items_per_s=Quartiles(lower=103.25, median=103.5, upper=103.75),
        predicted=predicted,
        measured=measured,
        error={"parameters": 0.0, "peak_bytes": -0.05},
        sample="def f():\n    pass",
        data={"sha256": "0" * 64},
    )


@pytest.fixture
def make_run(
    tmp_path: Path, step_row: Callable[..., StepRow], environment: Environment, result: Result
) -> Callable[..., Path]:
    """Writes a run folder of so many steps, with an evaluation of two documents at every second."""

    def make(
        name: str,
        steps: int = 4,
        *,
        is_finished: bool = True,
        units: Sequence[int] = (1, 3),
        scale: float = 1,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        with RunWriter.create(folder, SeedOnly(), environment) as writer:
            for step in range(1, steps + 1):
                writer.step(step_row(step, **changes))
                if step % 2 == 0:
                    writer.evaluation(
                        [
                            EvalRow(
                                step=step,
                                split="validation",
                                unit=f"document-{n}",
                                loss_sum=scale * 10.0 * n / step,
                                count=n,
                                metrics={"bytes": 30.0 * n},
                            )
                            for n in units
                        ],
                        {"loss": scale * 10.0 / step, "bits_per_byte": scale * 7.0 / step, "accuracy": step / 10},
                    )
            if is_finished:
                writer.finish(result)
        return folder

    return make
