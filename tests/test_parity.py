"""The parity gate: the same config gives the same losses, norms and updates under every strategy.

The bounds: losses and norms within 1e-5 relative over ten steps, and the difference of the updates at most 1e-4 of
their size, in fp32. Another split of the batch only adds the same numbers in another order.
"""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest

from tests.strategies import STEPS, STRATEGIES, Trajectory, config, trained

RELATIVE, OF_THE_UPDATE = 1e-5, 1e-4

MODELS = {
    "documents, tied": (),
    "documents, untied": ("model.tied_embeddings=false",),
    "documents, LoRA": ('transforms=[{name="lora", rank=2}]',),
    "plain, recomputed": ("data.packing=plain", "runtime.recompute=true", "task.loss_chunk=5"),
}


@functools.cache
def one_process(model: str, *settings: str, accumulation: int = 1) -> Trajectory:
    with tempfile.TemporaryDirectory() as folder:
        return trained(config(*MODELS[model], *settings, accumulation=accumulation), Path(folder) / "run")[0]


def assert_the_same(found: Trajectory, expected: Trajectory) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=RELATIVE)
    assert found.norms == pytest.approx(expected.norms, rel=RELATIVE)
    assert found.begin.keys() == expected.begin.keys()
    assert expected.distance(found) <= OF_THE_UPDATE


def run(tmp_path, strategy, model, accumulation, *settings):
    settings = config(*MODELS[model], *STRATEGIES[strategy], *settings, num_ranks=2, accumulation=accumulation)
    return trained(settings, tmp_path / "run")[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process_does(tmp_path, strategy):
    found = run(tmp_path, strategy, "documents, tied", 4)
    assert_the_same(found, one_process("documents, tied"))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "model", "accumulation"), list(itertools.product(STRATEGIES, MODELS, (1, 4))))
def test_every_strategy_trains_as_one_process_does_in_every_way(tmp_path, strategy, model, accumulation):
    assert_the_same(run(tmp_path, strategy, model, accumulation), one_process(model))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_process_accumulates_exactly(accumulation):
    assert_the_same(one_process("documents, tied", accumulation=accumulation), one_process("documents, tied"))


BF16 = [name for name in STRATEGIES if "offload" not in name]


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.slow) for name in BF16 if name != "zero 2"] + ["zero 2"]
)
def test_bf16_rounds_alike_under_every_strategy(tmp_path, strategy):
    """Micro-batches of the same size round alike, and what is summed over them is fp32: the first step is fp32's.

    From then on weights differ in their last fp32 digits, and bf16 takes some of them to its other neighbour: losses and
    norms are within bf16's unit of rounding, 2^-9, and the updates no further apart than bf16 is from fp32.
    """
    found = run(tmp_path, strategy, "documents, tied", 4, "precision=bf16")
    expected = one_process("documents, tied", "precision=bf16", accumulation=8)
    for ours, theirs in ((found.losses, expected.losses), (found.norms, expected.norms)):
        assert ours[0] == pytest.approx(theirs[0], rel=RELATIVE)
        assert ours == pytest.approx(theirs, rel=2**-9)
    assert expected.distance(found) <= expected.distance(one_process("documents, tied"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero 2", "zero 3", "zero 2, offload", "zero 3, offload"])
def test_bf16_master_is_the_same_at_every_stage(tmp_path, strategy):
    """Of two ranks' gradients there is one sum, rounded once whoever makes it, and the update is fp32."""
    expected = run(tmp_path / "1", "zero 1", "documents, tied", 1, "precision=bf16_master")
    found = run(tmp_path / "2", strategy, "documents, tied", 1, "precision=bf16_master")
    assert found.losses == expected.losses
    assert found.norms == pytest.approx(expected.norms, rel=RELATIVE)
    assert expected.distance(found) <= OF_THE_UPDATE


MUON = ("optim=muon", "optim.lr=3e-4")


@pytest.mark.parametrize("shared_out", ["true", "false"])
def test_muon_sees_every_matrix_as_a_whole(tmp_path, shared_out):
    """Shared out over ranks, each matrix is made orthogonal by one of them, once a step; else by every one."""
    expected = one_process("documents, tied", *MUON)
    settings = ("parallel=ddp", f"parallel.shard_optimizer={shared_out}", *MUON)
    found = trained(config(*settings, num_ranks=2, accumulation=2), tmp_path / "run")
    assert_the_same(found[0], expected)
    matrices = expected.newton_schulz[: len(expected.newton_schulz) // STEPS]
    assert len(matrices) == 2 * 7  # of two layers
    own = [rank.newton_schulz for rank in found]
    if shared_out == "true":
        assert all(shapes for shapes in own)
        assert sorted(own[0] + own[1]) == sorted(matrices * STEPS)
    else:
        assert own[0] == own[1] == matrices * STEPS
