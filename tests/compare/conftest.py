"""Entries of studies whose truth is known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmeff.compare.ledger import Entry

STEPS = tuple(range(0, 101, 10))


@pytest.fixture
def entry() -> Callable[..., Entry]:
    """A run whose loss falls as `floor + 3 exp(-step / tau)`, times what its seed does to it."""

    def make(
        arm: str, seed: int, *, floor: float = 1.5, tau: float = 20.0, factor: float = 1.0, **changes: Any
    ) -> Entry:
        losses = factor * (floor + 3 * np.exp(-np.array(STEPS) / tau))
        values: dict[str, Any] = {
            "name": f"{arm}/seed-{seed}",
            "arm": arm,
            "factors": {"optimizer": arm},
            "status": "finished",
            "seed": seed,
            "steps": 100,
            "items": 6400,
            "item": "token",
            "parameters": 1000,
            "data_sha256": "a" * 64,
            "split": "validation",
            "train_loss": float(losses[-1]) - 0.1,
            "loss": float(losses[-1]),
            "metrics": {"loss": float(losses[-1])},
            "curve_steps": STEPS,
            "curve_losses": tuple(map(float, losses)),
            "items_per_s": 1000.0,
            "peak_bytes": 2.0**20,
            "predicted": {"peak_bytes": 2.0**20, "executed_flops": 1e6},
            "measured": {"peak_bytes": 1.02 * 2.0**20, "executed_flops": 1e6, "optimizer_bytes": 8000.0},
            "device": "a CPU",
            "config": {"name": arm, "seed": seed, "optim": {"name": arm}, "train": {"steps": 100}},
        }
        return Entry(**values | changes)

    return make


@pytest.fixture
def study(entry: Callable[..., Entry]) -> list[Entry]:
    """Three arms, three seeds: `fast` reaches the baseline's loss in half of its steps, `same` does nothing to it."""
    noise = np.random.default_rng(0)
    found = []
    for seed in range(3):
        shared = float(np.exp(noise.normal(0, 0.01)))
        for arm, tau in (("base", 50.0), ("fast", 25.0), ("same", 50.0)):
            found.append(entry(arm, seed, tau=tau, factor=shared * float(np.exp(noise.normal(0, 0.001)))))
    return found


@pytest.fixture
def with_gain() -> Callable[[Entry], Entry]:
    """Adds a metric that is the inverse of the loss, of which more is better."""

    def add(entry: Entry) -> Entry:
        final = {} if entry.loss is None else {"gain": 1 / entry.loss}
        return replace(
            entry,
            metrics=entry.metrics | final,
            curves={"gain": tuple(1 / loss for loss in entry.curve_losses)},
            metric_directions={"loss": "lower", "gain": "higher"},
        )

    return add
