"""What a run's config refuses: pairs that cannot work, each with its reason."""

from typing import ClassVar

import pytest

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.parameters import Sharding
from llmeff.optim import OptimizerConfig


class WholeTensor(OptimizerConfig):
    """An optimizer that must see a matrix as a whole."""

    sharding: ClassVar[Sharding] = "whole_tensor"


class Unsaid(OptimizerConfig):
    """An optimizer that does not say what may be split."""


def config(*settings, **fields):
    return validate(RunConfig, override({}, ["train.batch=8", *settings]) | fields)


def problems(*settings, **fields):
    with pytest.raises(ConfigError) as raised:
        config(*settings, **fields)
    return raised.value.problems


@pytest.mark.parametrize("optimizer", [WholeTensor(name="mine"), Unsaid(name="mine")], ids=["whole tensors", "unsaid"])
@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (["parallel=fsdp", "parallel.ranks=2"], "every rank has only some rows of each parameter"),
        (["parallel=deepspeed", "parallel.stage=1"], "at stage 1 DeepSpeed would silently give it flat slices"),
        (["parallel=deepspeed", "parallel.stage=3"], "at stage 3 DeepSpeed would silently give it flat slices"),
    ],
)
def test_an_optimizer_that_a_strategy_would_silently_change_is_refused(optimizer, strategy, reason):
    (problem,) = problems(*strategy, optim=optimizer)
    assert problem.startswith("optim 'mine' does not work with parallel")
    assert reason in problem


@pytest.mark.parametrize(
    "strategy",
    [["parallel=single"], ["parallel=ddp"], ["parallel=ddp", "parallel.shard_optimizer=true"], ["parallel.stage=0"]],
    ids=lambda strategy: strategy[-1],
)
def test_whole_tensors_are_left_whole_where_nothing_cuts_them(strategy):
    named = ["parallel=deepspeed", *strategy] if "stage" in strategy[-1] else strategy
    assert config(*named, optim=WholeTensor(name="mine")).optim.name == "mine"


def test_state_of_all_parameters_together_is_not_dealt_out():
    (problem,) = problems("parallel=ddp", "parallel.shard_optimizer=true", optim=Unsaid(name="mine"))
    assert "distributes the parameters over the ranks" in problem


def test_a_master_copy_needs_a_stage_that_splits_it():
    (problem,) = problems("parallel=deepspeed", "parallel.stage=0", "precision=bf16_master")
    assert "precision 'bf16_master' does not work with parallel.stage 0" in problem
    assert config("parallel=deepspeed", "parallel.stage=1", "precision=bf16_master").precision == "bf16_master"


@pytest.mark.parametrize("compiled", ["layers", "model"])
@pytest.mark.parametrize(
    ("strategy", "named"),
    [(["parallel=deepspeed", "parallel.stage=3"], "parallel.stage 3"), (["parallel=fsdp"], "parallel 'fsdp'")],
)
def test_what_gathers_parameters_is_not_compiled(strategy, named, compiled):
    (problem,) = problems(*strategy, f"runtime.compile={compiled}")
    assert problem == (
        f"runtime.compile '{compiled}' does not work with {named}: gathering parameters breaks the graph. Use 'off'"
    )


@pytest.mark.parametrize("strategy", [["parallel=ddp"], ["parallel=deepspeed", "parallel.stage=2"]])
def test_what_keeps_parameters_whole_may_be_compiled(strategy):
    assert config(*strategy, "runtime.compile=layers").runtime.compile == "layers"
