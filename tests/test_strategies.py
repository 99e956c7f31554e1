"""What every strategy must keep: a run goes on after any death and at any number of ranks, and its model is whole."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmeff.config.run import RunConfig
from llmeff.record import schema
from llmeff.record.reader import read_run
from llmeff.run.loop import DivergedError, Trainer, train
from tests.ranks import Ranks, ranks
from tests.strategies import STRATEGIES, config, image_config, numbers, ragged

ZERO = ("zero 1", "zero 2", "zero 3")


@ragged()
def train_on(settings: RunConfig, folder: Path, resume: bool) -> dict[str, dict[str, float]]:
    """Trains to the end on this rank; its final metrics."""
    return train(settings, folder, resume=resume).metrics


@ragged()
def train_until(settings: RunConfig, folder: Path, resume: bool, until: int) -> None:
    """Trains up to a step's checkpoint, and stops there as a killed process would."""
    with Trainer(settings, folder, resume=resume, is_silent=True) as trainer:
        while trainer.step < until:
            trainer.train_step()
            trainer.evaluate_if_due()
            trainer.save_if_due()


def losses(folder: Path) -> list[float]:
    return [float(loss) for loss in read_run(folder).steps["loss"]]


# -- a step that is not finite


def spoiled(settings: RunConfig, folder: Path) -> tuple[str, bool]:
    """What a run says whose last loss on rank 1 is not a number, and whether that step left the weights alone."""
    with Trainer(settings, folder, resume=False, is_silent=True) as trainer:
        for _ in range(2):
            trainer.train_step()
            trainer.save_if_due()
        before = numbers(trainer._strategy)
        loss = trainer._task.loss
        factor = math.nan if trainer._strategy.world.rank == 1 else 1.0
        trainer._task.loss = lambda *given: {"loss": loss(*given)["loss"] * factor}
        with pytest.raises(DivergedError) as raised:
            trainer.train_step()
        after = numbers(trainer._strategy)
    return str(raised.value), all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_not_finite_on_one_rank_is_made_on_none(tmp_path, strategy):
    settings = config(*STRATEGIES[strategy], "checkpoint.every=1", num_ranks=2, accumulation=2)
    for text, is_untouched in ranks(2).run(spoiled, settings, tmp_path / "run"):
        assert "step 3: loss nan" in text
        assert "the checkpoint of step 2 is kept" in text
        assert is_untouched


def powered(settings: RunConfig, folder: Path) -> float | None:
    """The energy of a run whose GPUs each draw 10 joules, and one more for each rank before it."""
    from llmeff.core.dist import world
    from llmeff.core.meters import EnergyMeter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnergyMeter, "energy_j", lambda self: 10.0 + world().rank)
        return train(settings, folder).energy_j


def test_the_energy_of_a_run_is_that_of_all_ranks(tmp_path):
    settings = config(*STRATEGIES["ddp"], "train.steps=2", num_ranks=2)
    assert ranks(2).run(powered, settings, tmp_path / "run") == [21.0, 21.0]


# -- other numbers of ranks


def schedule(strategy: str, num_ranks: int, *more: str, steps: int) -> RunConfig:
    """A run whose rate rises and falls, with two groups of parameters and a checkpoint every ten steps."""
    settings = (f"train.steps={steps}", "schedule=cosine", "schedule.warmup_steps=5", "checkpoint.every=10")
    sharing = STRATEGIES[strategy] if num_ranks > 1 or "deepspeed" in STRATEGIES[strategy][0] else ()
    return config(*sharing, *settings, *more, num_ranks=num_ranks, accumulation=2)


def at_ranks(path: tuple[int, ...], strategy: str, folder: Path, steps: int) -> list[float]:
    """The losses of a run that goes on at one number of ranks after the other, for an equal part of its steps each."""
    each = steps // len(path)
    for place, number in enumerate(path):
        settings = schedule(strategy, number, steps=steps)
        until = (place + 1) * each
        if until < steps:
            ranks(number).run(train_until, settings, folder, place > 0, until)
        else:
            ranks(number).run(train_on, settings, folder, place > 0)
    return losses(folder)


@pytest.mark.parametrize(
    "strategy", ["zero 2", *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "zero 2")]
)
@pytest.mark.parametrize("path", [(2, 1), pytest.param((1, 4), marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_at_another_number_of_ranks(tmp_path, strategy, path):
    unchanged = at_ranks((2,), strategy, tmp_path / "unchanged", 20)
    assert at_ranks(path, strategy, tmp_path / "changed", 20) == pytest.approx(unchanged, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("path", [(2, 1, 2, 2, 2), (1, 4, 4, 4, 4)], ids=str)
def test_fifty_steps_over_other_numbers_of_ranks(tmp_path, strategy, path):
    unchanged = at_ranks((2,), strategy, tmp_path / "unchanged", 50)
    assert at_ranks(path, strategy, tmp_path / "changed", 50) == pytest.approx(unchanged, rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy(tmp_path):
    unchanged = at_ranks((2,), "ddp", tmp_path / "unchanged", 20)
    folder = tmp_path / "changed"
    ranks(2).run(train_until, schedule("zero 3, offload", 2, steps=20), folder, False, 10)
    ranks(2).run(train_on, schedule("fsdp", 2, steps=20), folder, True)
    assert losses(folder) == pytest.approx(unchanged, rel=1e-5)


# -- deaths


def long_run(strategy: str) -> RunConfig:
    return config(
        *STRATEGIES[strategy],
        "train.steps=40",
        "checkpoint.every=3",
        "evaluation.every=10",
        num_ranks=2,
        accumulation=2,
    )


def killed(settings: RunConfig, folder: Path, victims: tuple[int, ...], resume: bool, dice: random.Random) -> None:
    """A run whose ranks are killed at a random moment, in a step or in a checkpoint, without a word."""
    job = Ranks(2)
    job.start(train_on, settings, folder, resume)
    metrics, steps = folder / schema.METRICS, settings.train.steps
    before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    moment = before + dice.uniform(1, steps - before - 1)
    while metrics.read_bytes().count(b"\n") < moment if metrics.exists() else True:
        assert all(process.is_alive() for process in job.processes)
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.05))
    for rank in victims:
        os.kill(job.processes[rank].pid, signal.SIGKILL)
    time.sleep(0.2)
    job.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / schema.MODEL / "model.safetensors")


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)], ids=["one rank", "all ranks"])
@pytest.mark.parametrize(
    "strategy", ["zero 2", *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "zero 2")]
)
def test_a_run_that_was_killed_goes_on_to_the_last_bit(tmp_path, strategy, victims):
    settings, dice = long_run(strategy), random.Random(f"{strategy} {victims}")
    ranks(2).run(train_on, settings, tmp_path / "whole", False)
    killed(settings, tmp_path / "killed", victims, False, dice)
    ranks(2).run(train_on, settings, tmp_path / "killed", True)
    assert_the_same_to_the_last_bit(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("strategy", "norm"),
    [
        pytest.param(strategy, norm, marks=() if (strategy, norm) == ("ddp", "batch") else pytest.mark.slow)
        for strategy in STRATEGIES
        for norm in ("batch", "batch_sync", "group")
    ],
)
def test_so_does_one_on_images_that_is_broken_off_with_its_running_statistics(tmp_path, strategy, norm):
    """Where every rank has statistics of its own, the main one's are evaluated, saved and gone on with."""
    more = ("checkpoint.every=3", "evaluation.every=4", f"model.norm={norm}")
    settings = image_config(*STRATEGIES[strategy], *more, num_ranks=2, accumulation=2)
    ranks(2).run(train_on, settings, tmp_path / "whole", False)
    ranks(2).run(train_until, settings, tmp_path / "broken", False, 8)
    ranks(2).run(train_on, settings, tmp_path / "broken", True)
    assert_the_same_to_the_last_bit(tmp_path / "broken", tmp_path / "whole")


def assert_the_same_to_the_last_bit(folder: Path, unbroken: Path) -> None:
    again, whole = read_run(folder), read_run(unbroken)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert again.steps[name].tolist() == whole.steps[name].tolist()
    assert repr(again.result.metrics) == repr(whole.result.metrics)  # in which a value that is not known is itself
    ours, theirs = weights(folder), weights(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- foreign models


def foreign(settings: RunConfig, folder: Path) -> list[float]:
    """Trains a transformers model on this rank; its losses."""
    train(settings, folder)
    return [float(loss) for loss in read_run(folder).steps["loss"]]


@pytest.mark.parametrize(
    "strategy", ["zero 3", *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "zero 3")]
)
def test_a_foreign_model_trains_and_is_written_whole(tmp_path, strategy):
    shape = LlamaConfig(
        vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "foreign")
    path = json.dumps(str(tmp_path / "foreign"))
    model = ("model=hf", f"model.path={path}", "data.packing=plain", "task.loss_chunk=5")
    (expected,) = ranks(1).run(foreign, config(*model), tmp_path / "alone")
    found = ranks(2).run(foreign, config(*STRATEGIES[strategy], *model, num_ranks=2), tmp_path / "run")
    assert found[0] == pytest.approx(expected, rel=1e-5)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


# -- the model


@pytest.mark.parametrize(
    "strategy",
    [
        "zero 3, offload",
        *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "zero 3, offload"),
    ],
)
def test_the_model_opens_in_plain_transformers_and_scores_the_runs_own_loss(tmp_path, strategy):
    settings = config(*STRATEGIES[strategy], "data.packing=plain", num_ranks=2)
    metrics = ranks(2).run(train_on, settings, tmp_path / "run", False)
    assert metrics[0] == metrics[1]
    corpus = settings.data.open()
    windows = corpus.eval_windows("validation")
    tokens = torch.cat([torch.from_numpy(windows.batch(range(n, n + 1)).tokens) for n in range(windows.num_windows)])
    targets = torch.cat([torch.from_numpy(windows.batch(range(n, n + 1)).targets) for n in range(windows.num_windows)])
    torch.save((tokens, targets), tmp_path / "windows.pt")
    script = (
        "import sys, torch, transformers\n"
        "tokens, targets = torch.load(sys.argv[2])\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "with torch.no_grad():\n"
        "    logits = torch.cat([model(part).logits for part in tokens.split(64)]).double()\n"
        "print(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).item())\n"
        "assert 'llmeff' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, tmp_path / "run" / schema.MODEL, tmp_path / "windows.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(done.stdout) == pytest.approx(metrics[0]["validation"]["loss"], rel=1e-6)
