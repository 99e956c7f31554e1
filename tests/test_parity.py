"""The parity gate: the same config gives the same losses, norms and updates under every strategy.

The bounds: losses and norms within 1e-5 relative over ten steps, and the difference of the updates at most 1e-4 of
their size, in fp32. Another split of the batch only adds the same numbers in another order.
"""

import functools
import itertools
import os
import tempfile
from pathlib import Path

import pytest

from llmeff.config.run import RunConfig
from llmeff.core import group
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import is_launched
from llmeff.optim import Muon, OptimizerConfig
from llmeff.run.loop import Trainer
from tests import mixers
from tests.ranks import ranks
from tests.run.test_loop import TINY
from tests.strategies import STEPS, STRATEGIES, Trajectory, by_hand, config, image_config, trained

RELATIVE, OF_THE_UPDATE = 1e-5, 1e-4
BF16_ROUNDOFF = 2**-8
"""Of a format of 8 significant bits, rounded to the nearest."""

MODELS = {
    "documents, tied": (),
    "documents, untied": ("model.tied_embeddings=false",),
    "documents, LoRA": ('transforms=[{name="lora", rank=2}]',),
    "plain, recomputed": ("data.packing=plain", "runtime.recompute=true", "task.loss_chunk=5"),
}

THIRDS = {f"third {start}": mixers.NAMES[start::3] for start in range(3)}
"""A layer of each: rounding grows with the depth, so that all in one model would need wider tolerances."""

IMAGES = {
    "groups": ("model.norm=group",),
    "frozen": ("model.norm=frozen",),
    # AdamW would move a bias before BatchNorm, whose gradient is nothing but rounding, as far as all else
    "synchronised": ("model.norm=batch_sync", "optim=sgd", "optim.lr=0.1"),
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


@pytest.mark.parametrize("stage", range(4))
def test_a_run_alone_after_one_with_an_engine_in_the_same_process_is_alone(tmp_path, stage):
    """DeepSpeed's process group stays; of a model alone it must not make replicas of one."""
    before = dict(os.environ)
    for name, settings in (("zero", ["parallel=deepspeed", f"parallel.stage={stage}"]), ("single", [])):
        given = validate(RunConfig, override(TINY, ["train.steps=1", "checkpoint.every=0", *settings]))
        with Trainer(given, tmp_path / name, resume=False, is_silent=True) as trainer:
            trainer.train_step()
            model = trainer._strategy.model
    assert group.is_joined()
    assert not is_launched(), "processes that this one starts would take themselves for ranks"
    assert {name for name in before.keys() ^ os.environ.keys() if "RANK" in name} == set()
    assert type(model).__name__ == "Decoder"


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


@functools.cache
def one_process_of_mixers(name: str, accumulation: int = 1) -> Trajectory:
    with tempfile.TemporaryDirectory() as folder:
        return trained(of_mixers(config(accumulation=accumulation), name), Path(folder) / "run")[0]


def of_mixers(plain: RunConfig, name: str) -> RunConfig:
    """The run with that mixer in every layer, or with a layer of each of a third.

    What a state says at a row's first tokens may be next to nothing, and a norm with a small eps makes rounding of it large.
    """
    raw = plain.model_dump(mode="json")
    own = mixers.fields_of_each(THIRDS[name]) if name in THIRDS else mixers.fields(name, num_kv_heads=1)
    return validate(RunConfig, raw | {"model": raw["model"] | own | {"norm_eps": 1e-3}})


@pytest.mark.parametrize(
    ("strategy", "name", "accumulation"),
    [
        pytest.param(strategy, name, accumulation, marks=() if is_fast else pytest.mark.slow)
        for strategy, name, accumulation in itertools.product(STRATEGIES, [*THIRDS, *mixers.NAMES], (1, 4))
        for is_fast in [(strategy, name, accumulation) in [("zero 2", third, 4) for third in THIRDS]]
    ],
)
def test_every_strategy_trains_every_mixer_as_one_process_does(tmp_path, strategy, name, accumulation):
    settings = of_mixers(config(*STRATEGIES[strategy], num_ranks=2, accumulation=accumulation), name)
    assert_the_same(trained(settings, tmp_path / "run")[0], one_process_of_mixers(name))


@pytest.mark.parametrize("name", [*THIRDS, *(pytest.param(own, marks=pytest.mark.slow) for own in mixers.NAMES)])
def test_one_process_accumulates_exactly_with_every_mixer(name):
    assert_the_same(one_process_of_mixers(name, accumulation=4), one_process_of_mixers(name))


@functools.cache
def one_process_on_images(*settings: str, accumulation: int = 1) -> Trajectory:
    with tempfile.TemporaryDirectory() as folder:
        return trained(image_config(*settings, accumulation=accumulation), Path(folder) / "run")[0]


def on_images(tmp_path, *settings, accumulation=1):
    return trained(image_config(*settings, num_ranks=2, accumulation=accumulation), tmp_path / "run")


@pytest.mark.parametrize(
    ("strategy", "norm", "accumulation"),
    [
        pytest.param(strategy, norm, accumulation, marks=() if is_fast else pytest.mark.slow)
        for strategy, norm, accumulation in itertools.product(STRATEGIES, IMAGES, (1, 2, 4))
        if norm != "synchronised" or accumulation == 1  # what ranks see at once is the whole batch
        for is_fast in [(norm, accumulation) == ("synchronised", 1) or (strategy, accumulation) == ("zero 2", 2)]
    ],
)
def test_every_strategy_trains_on_images_as_one_process_does(tmp_path, strategy, norm, accumulation):
    found = on_images(tmp_path, *IMAGES[norm], *STRATEGIES[strategy], accumulation=accumulation)
    assert_the_same(found[0], one_process_on_images(*IMAGES[norm]))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "norm"), list(itertools.product(STRATEGIES, IMAGES)))
def test_every_strategy_trains_the_large_segnet_as_one_process_does(tmp_path, strategy, norm):
    """A few small steps: rounding moves a maximum of its many poolings to another pixel sooner or later."""
    model = ("model.name=segnet", "model.width=4", "model.norm_groups=2", "model.residual_blocks=true")
    size = ("data.source.height=33", "data.source.width=37", "runtime.recompute=true")
    settings = (*IMAGES[norm], *model, *size, "optim.lr=3e-3", "train.steps=4")
    assert_the_same(on_images(tmp_path, *settings, *STRATEGIES[strategy])[0], one_process_on_images(*settings))


@pytest.mark.parametrize("norm", ["groups", "frozen"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_process_accumulates_images_exactly(norm, accumulation):
    settings = IMAGES[norm]
    assert_the_same(one_process_on_images(*settings, accumulation=accumulation), one_process_on_images(*settings))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_process_accumulates_exactly(accumulation):
    assert_the_same(one_process("documents, tied", accumulation=accumulation), one_process("documents, tied"))


def assert_alike_in_bf16(found: Trajectory, expected: Trajectory, in_fp32: Trajectory, within: float) -> None:
    for ours, theirs in ((found.losses, expected.losses), (found.norms, expected.norms)):
        assert ours[0] == pytest.approx(theirs[0], rel=RELATIVE)
        assert ours == pytest.approx(theirs, rel=within)
    assert expected.distance(found) <= expected.distance(in_fp32)


BF16 = [name for name in STRATEGIES if "offload" not in name]


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.slow) for name in BF16 if name != "zero 2"] + ["zero 2"]
)
def test_bf16_rounds_alike_under_every_strategy(tmp_path, strategy):
    """Micro-batches of the same size round alike, and what is summed over them is fp32: the first step is fp32's.

    From then on weights differ in their last fp32 digits, and bf16 takes some of them to its other neighbour: losses and
    norms, which are sums in fp32, are within half of bf16's unit roundoff, and the updates no further apart than bf16 is from fp32.
    """
    found = run(tmp_path, strategy, "documents, tied", 4, "precision=bf16")
    expected = one_process("documents, tied", "precision=bf16", accumulation=8)
    assert_alike_in_bf16(found, expected, one_process("documents, tied"), within=BF16_ROUNDOFF / 2)


MASTER = [name for name in STRATEGIES if name.startswith("zero") and name != "zero 0"]


@functools.cache
def master_by_hand(model: str, accumulation: int, is_reduced_first: bool) -> Trajectory:
    settings = config(*MODELS[model], accumulation=2 * accumulation)
    (found,) = ranks(1).run(by_hand, settings, 2, is_reduced_first)
    return found


@pytest.mark.parametrize(
    ("strategy", "accumulation"),
    [
        pytest.param(name, accumulation, marks=() if (name, accumulation) == ("zero 2", 4) else pytest.mark.slow)
        for name in MASTER
        for accumulation in (1, 4)
    ],
)
def test_bf16_master_is_bf16_weights_with_a_copy_in_fp32(tmp_path, strategy, accumulation):
    """Summed in the same order, the gradients round alike, and the first step is the same as in fp32.

    From then on copies differ in their last fp32 digits, and some round to the other bf16 neighbour, as above; gradients
    are bf16 too, each within a unit roundoff.
    """
    model = "documents, tied"
    found = run(tmp_path, strategy, model, accumulation, "precision=bf16_master")
    expected = master_by_hand(model, accumulation, strategy != "zero 1")
    assert_alike_in_bf16(found, expected, one_process(model), within=BF16_ROUNDOFF)


@pytest.mark.parametrize("shared_out", ["true", "false"])
def test_muon_sees_every_matrix_as_a_whole(tmp_path, shared_out):
    """Shared out over ranks, each matrix is made orthogonal by one of them, once a step; else by every one."""
    muon = (*itself("muon"), "optim.lr=3e-4")
    expected = one_process("documents, tied", *muon)
    settings = ("parallel=ddp", f"parallel.shard_optimizer={shared_out}", *muon)
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


OPTIMIZERS = OptimizerConfig.registry.names()
SPLIT = {"ddp": "none", "zero 0": "none", "ddp, optimizer shared out": "whole_tensor"}
"""What of the update a strategy splits; the others slice whatever they like."""
ORDER = ("elementwise", "whole_tensor", "none")
"""From what may be split most to what may be split least."""


def itself(name):
    """Settings under which an optimizer is itself on parameters so small, and computes in float32 on every CPU."""
    kind = OptimizerConfig.registry[name]
    decided = kind().resolve(is_bfloat16_fast=False).model_dump()
    settings = kind.whatever_size | {
        field: decided[field] for field, value in kind().model_dump().items() if value == "auto"
    }
    return (f"optim={name}", *(f"optim.{field}={value}" for field, value in settings.items()))


def of_the_update(name):
    """Of two moments in few bits that differ in the last digit, some round to different codes."""
    return 1e-3 if OptimizerConfig.registry[name].rounds_state else OF_THE_UPDATE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_itself_under_a_strategy_or_refused(tmp_path, name, strategy):
    """By what it declares: slices that cut through tensors, shares of whole tensors, or nothing."""
    settings = (*itself(name), "train.steps=4")
    declared = OptimizerConfig.registry[name].sharding
    if ORDER.index(declared) > ORDER.index(SPLIT.get(strategy, "elementwise")):
        with pytest.raises(
            ConfigError, match=f"optim '{name}' does not work with parallel '.*': it must see whole parameters"
        ):
            config(*settings, *STRATEGIES[strategy], num_ranks=2)
        return
    expected, found = (
        one_process("documents, tied", *settings),
        run(tmp_path, strategy, "documents, tied", 1, *settings),
    )
    assert expected.distance(found) <= of_the_update(name)
    assert found.losses == pytest.approx(expected.losses, rel=RELATIVE)
    assert found.norms == pytest.approx(expected.norms, rel=RELATIVE)


@functools.cache
def learned_on_images(name):
    """Settings with which one process learns in ten steps, and what it did: at the first of three rates about its own."""
    for factor in (10.0, 1.0, 0.5):
        settings = (*itself(name), f"optim.lr={factor * OptimizerConfig.registry[name]().lr}")
        expected = one_process_on_images(*settings)
        if expected.losses[-1] < 0.75 * expected.losses[0]:
            return settings, expected
    raise AssertionError(f"{name} learns at none of three rates")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_convolutions_and_shared_out_too(tmp_path, name):
    settings, expected = learned_on_images(name)
    kind = OptimizerConfig.registry[name]
    if kind.sharding == "none":
        return  # refused, as above
    found = on_images(tmp_path, *settings, *STRATEGIES["ddp, optimizer shared out"])
    assert expected.distance(found[0]) <= of_the_update(name)
    assert found[0].losses[0] == pytest.approx(expected.losses[0], rel=RELATIVE)
    # codes hang on the last digit of gradients, which is that of two ranks that share nothing out
    same = on_images(tmp_path / "kept", *settings, *STRATEGIES["ddp"])[0] if kind.rounds_state else expected
    assert found[0].losses == pytest.approx(same.losses, rel=RELATIVE)
    assert found[0].norms == pytest.approx(same.norms, rel=RELATIVE)
    every = [shape for rank in found for shape in rank.newton_schulz]
    # of width 6, with kernels of 7 x 7 on 3 or 6 channels, and of 1 x 1 on 12
    matrices = [(6, 3 * 49), *[(6, 6 * 49)] * 7, *[(6, 12)] * 4] if issubclass(kind, Muon) else []
    assert sorted(every) == sorted(expected.newton_schulz) == sorted(matrices * STEPS)
