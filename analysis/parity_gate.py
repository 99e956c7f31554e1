"""Compares every strategy with one process: `python analysis/parity_gate.py` writes results/parity.json.

A run has two gloo ranks on a CPU and ten steps, in every combination of `tests/test_parity.py`. A second table lists
each optimizer under each strategy: the difference of the update, or the reason why the combination is refused.
`bf16_master` is compared with the same computation by hand in plain PyTorch. Muon iterates in float32 in this script:
its iterations amplify small singular values, and in bfloat16 a difference of 1e-7 in the gradient changes the update by
a hundredth of its size, also on one process.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  the path above must come first

from llmeff.core.config import ConfigError  # noqa: E402
from llmeff.core.files import write_text  # noqa: E402
from llmeff.optim import OptimizerConfig  # noqa: E402
from llmeff.record.environment import environment  # noqa: E402
from tests.strategies import STRATEGIES, Trajectory, config, trained  # noqa: E402
from tests.test_parity import MASTER, MODELS, itself, master_by_hand  # noqa: E402

PRECISIONS = ("fp32", "bf16")


def run(*settings: str, num_ranks: int, accumulation: int) -> Trajectory:
    """Trains a config and returns the trajectory of the main rank."""
    with tempfile.TemporaryDirectory() as folder:
        return trained(config(*settings, num_ranks=num_ranks, accumulation=accumulation), Path(folder) / "run")[0]


def apart(found: Trajectory, expected: Trajectory) -> dict[str, float]:
    """Returns the largest relative differences of losses and norms, and the relative difference of the updates."""

    def relative(ours: list[float], theirs: list[float]) -> float:
        return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))

    return {
        "loss": relative(found.losses, expected.losses),
        "norm": relative(found.norms, expected.norms),
        "update": expected.distance(found),
    }


def parity() -> list[dict[str, Any]]:
    """Compares every strategy with one process, for each model, precision and accumulation.

    Under bf16, one process uses the same micro-batches as two ranks, because bf16 rounds the result of each one.
    """
    rows = []
    for model, precision, accumulation in itertools.product(MODELS, PRECISIONS, (1, 4)):
        settings = (*MODELS[model], f"precision={precision}")
        alone = 1 if precision == "fp32" else 2 * accumulation
        expected = run(*settings, num_ranks=1, accumulation=alone)
        for strategy, own in STRATEGIES.items():
            found = run(*settings, *own, num_ranks=2, accumulation=accumulation)
            case = {"strategy": strategy, "model": model, "precision": precision, "accumulation": accumulation}
            rows.append(case | apart(found, expected))
            print(rows[-1], flush=True)
    return rows


def masters() -> list[dict[str, Any]]:
    """Compares `bf16_master` with a computation by hand, for strategies that keep a float32 copy of the weights."""
    rows = []
    for model, accumulation, strategy in itertools.product(MODELS, (1, 4), MASTER):
        settings = (*MODELS[model], *STRATEGIES[strategy], "precision=bf16_master")
        found = run(*settings, num_ranks=2, accumulation=accumulation)
        case = {"strategy": strategy, "model": model, "precision": "bf16_master", "accumulation": accumulation}
        rows.append(case | apart(found, master_by_hand(model, accumulation, strategy != "zero 1")))
        print(rows[-1], flush=True)
    return rows


def truth() -> list[dict[str, Any]]:
    """Compares every optimizer under every strategy with one process, or gives the reason for a refusal."""
    rows: list[dict[str, Any]] = []
    for optimizer in OptimizerConfig.registry.names():
        settings = (*itself(optimizer), "optim.lr=3e-4")
        expected = run(*settings, num_ranks=1, accumulation=1)
        for strategy, own in STRATEGIES.items():
            case = {"optimizer": optimizer, "strategy": strategy}
            try:
                rows.append(case | apart(run(*settings, *own, num_ranks=2, accumulation=1), expected))
            except ConfigError as refusal:
                rows.append(case | {"refused": str(refusal)})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    facts = environment(torch.device("cpu")).model_dump(mode="json")
    content = {
        "command": "python analysis/parity_gate.py",
        "environment": facts,
        "truth": truth(),
        "parity": parity() + masters(),
    }
    write_text(ROOT / "analysis" / "results" / "parity.json", json.dumps(content, indent=1) + "\n")
