"""The figures of a run's rows and result, against the arithmetic of a person: rates, losses, norms, speeds and MFU."""

import dataclasses
import json
import math

import pytest
import torch

from llmeff.core.config import override, validate
from llmeff.cost.devices import DEVICES, Device
from llmeff.data.packing import MASKED, TrainWindows
from llmeff.loop import Trainer, train
from llmeff.record import clocks, schema
from llmeff.runconfig import RunConfig
from tests.test_loop import TINY

QUICK = ["evaluation.every=0", "evaluation.sample_tokens=0", "checkpoint.every=0"]


def quick(*settings):
    return validate(RunConfig, override(TINY, [*QUICK, *settings]))


def rows_of(folder):
    """The lines of a run's metrics as anyone reads them."""
    return [json.loads(line) for line in (folder / schema.METRICS).read_text().splitlines()]


def distance_of_a_step(trainer):
    """How far all parameters together go in the next step."""
    before = {name: tensor.detach().clone() for name, tensor in trainer._strategy.state_dict().items()}
    trainer.train_step()
    after = {name: tensor.detach() for name, tensor in trainer._strategy.state_dict().items()}
    return math.hypot(*(float((after[name] - before[name]).norm()) for name in before))


# -- the learning rate


def half_cosine(part):
    """From 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * part)


RATES = {
    "constant": (["schedule=constant", "schedule.warmup_steps=4"], [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
    "linear": (["schedule=linear", "schedule.warmup_steps=2", "schedule.final=0.4"],
               [1 / 2, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
    "cosine": (["schedule=cosine", "schedule.warmup_steps=4", "schedule.final=0.1"],
               [1 / 4, 2 / 4, 3 / 4, 1, *(0.1 + 0.9 * half_cosine(part) for part in (1 / 4, 2 / 4, 3 / 4, 1))]),
    "cosine alone": (["schedule=cosine", "schedule.final=0.0"], [half_cosine(step / 8) for step in range(1, 9)]),
    "wsd": (["schedule=wsd", "schedule.warmup_steps=3", "schedule.decay=0.4", "schedule.final=0.2"],
            [1 / 3, 2 / 3, 1, 1, 1, 1, 0.6, 0.2]),
}  # fmt: skip
"""Of the peak, at each of eight steps."""


@pytest.mark.parametrize("name", RATES)
def test_a_row_has_the_rate_that_its_step_was_made_with(tmp_path, name):
    """By the schedule's formula, and by how far plain gradient descent went: the rate times the gradient's norm."""
    settings, factors = RATES[name]
    config = quick(
        "train.steps=8", "optim=sgd", "optim.momentum=0.0", "optim.lr=0.05", "train.clip_norm=null", *settings
    )
    with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
        moved = [distance_of_a_step(trainer) for _ in range(8)]
    rows = rows_of(tmp_path / "run")
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05 * factor for factor in factors], abs=1e-12)
    assert moved == pytest.approx([row["learning_rate"] * row["grad_norm"] for row in rows], rel=1e-4, abs=1e-9)


def test_a_run_that_goes_on_has_the_rates_of_one_that_never_stopped(tmp_path):
    settings, factors = RATES["cosine"]
    config = quick("train.steps=8", "optim.lr=0.05", "checkpoint.every=3", *settings)
    with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
        for _ in range(3):
            trainer.train_step()
            trainer.save_if_due()
    train(config, tmp_path / "run", resume=True)
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run")]
    assert rates == pytest.approx([0.05 * factor for factor in factors], abs=1e-12)


# -- the loss and the gradient's norm


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
@pytest.mark.parametrize("packing", ["plain", "documents"])
def test_the_loss_is_the_mean_over_tokens_and_the_norm_is_of_its_gradient(tmp_path, monkeypatch, packing, micro_batch):
    """Rows count 32, 24, 16 and 8 targets: a mean of micro-batches' means would be another number."""
    whole = TrainWindows.batch

    def ragged(self, seed, step, rows, global_batch):
        packed = whole(self, seed, step, rows, global_batch)
        targets = packed.targets.copy()
        for place, row in enumerate(rows):
            targets[place, 32 - 8 * row :] = MASKED
        return dataclasses.replace(packed, targets=targets)

    monkeypatch.setattr(TrainWindows, "batch", ragged)
    config = quick(f"data.packing={packing}", f"train.micro_batch={micro_batch}", "train.clip_norm=0.01")
    with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
        model, expected = trainer._strategy.model, []
        for step in range(3):
            batch = trainer._task.batch(step, range(4), torch.device("cpu")).inputs
            logits = model(batch["tokens"], batch["layout"])
            logs = torch.log_softmax(logits.double(), dim=-1)
            picked = [
                logs[row, place, target]
                for row, targets in enumerate(batch["targets"].tolist())
                for place, target in enumerate(targets)
                if target >= 0
            ]
            assert len(picked) == 32 + 24 + 16 + 8
            loss = -torch.stack(picked).sum() / 80
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            squares = sum(float((gradient.double() ** 2).sum()) for gradient in gradients)
            expected.append((float(loss.detach()), squares**0.5))  # of what is yet to be clipped
            trainer.train_step()
    rows = rows_of(tmp_path / "run")
    assert [row["items"] for row in rows] == [80, 80, 80]
    assert [row["items_seen"] for row in rows] == [80, 160, 240]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in expected], rel=1e-4)


def test_a_clipped_step_goes_as_far_as_the_bound_and_one_within_it_as_far_as_its_gradient(tmp_path):
    for bound, is_clipped in ((0.01, True), (1e6, False)):
        config = quick("optim=sgd", "optim.momentum=0.0", "optim.lr=0.5", f"train.clip_norm={bound}")
        folder = tmp_path / str(bound)
        with Trainer(config, folder, resume=False, is_silent=True) as trainer:
            moved = distance_of_a_step(trainer)
        (row,) = rows_of(folder)
        assert row["grad_norm"] > 0.1
        assert moved == pytest.approx(0.5 * (bound if is_clipped else row["grad_norm"]), rel=1e-3)


# -- speed


STEP_FLOPS = 3 * 4 * (  # backward is twice forward; four sequences of 32 tokens
    32 * 2 * (2 * (4 * 16 * 16 + 3 * 16 * 32) + 16 * 257)  # two layers' projections and MLP, and the logits
    + 2 * 2 * 2 * 16 * (32 * 33 // 2)  # of each layer scores and mixing, over the pairs that are seen
)  # fmt: skip
"""By hand: width 16, two heads of 8, an MLP of 32, 257 tokens."""


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A run of ten steps whose batches take 1 s each, losses 2 s, and updates as told; on a device of known peak."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def after(seconds, call):
        def timed_call(*given, **named):
            now[0] += seconds() if callable(seconds) else seconds
            return call(*given, **named)

        return timed_call

    def make(update_s, *settings, peak=1.0):
        monkeypatch.setitem(
            DEVICES, "cpu", Device(half_flops_per_s=1e30, single_flops_per_s=peak, memory_bytes_per_s=1.0)
        )
        config = quick("train.steps=10", "train.micro_batch=2", *settings)
        with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
            task, strategy = trainer._task, trainer._strategy
            monkeypatch.setattr(task, "batch", after(1, task.batch))
            monkeypatch.setattr(task, "loss", after(2, task.loss))
            monkeypatch.setattr(strategy, "step", after(lambda: update_s[trainer.step], strategy.step))
            for _ in range(10):
                trainer.train_step()
            return trainer.finish(), rows_of(tmp_path / "run")

    return make


def test_tokens_a_second_are_the_steps_tokens_over_its_wall_time(timed):
    """Two micro-batches take 2 s and 4 s, then the update. The first five steps of a process count in no median."""
    updates = [94, 94, 94, 94, 94, 2, 10, 4, 6, 8]
    result, rows = timed(updates)
    assert [row["step_s"] for row in rows] == [6 + update for update in updates]
    assert [row["data_s"] for row in rows] == [2] * 10
    assert [row["items"] for row in rows] == [4 * 32] * 10
    assert [row["items_per_s"] for row in rows] == pytest.approx([128 / (6 + update) for update in updates])
    assert [row["is_warmup"] for row in rows] == [True] * 5 + [False] * 5
    # sorted, the last five are 8, 128/14, 128/12, 12.8 and 16
    speed = result.items_per_s
    assert (speed.lower, speed.median, speed.upper) == pytest.approx((128 / 14, 128 / 12, 128 / 10))
    assert result.timings.data_s == pytest.approx(20)
    assert result.timings.train_s == pytest.approx(10 * 4 + sum(updates))


def test_mfu_is_the_models_flops_a_second_of_the_peak(timed):
    result, _ = timed([4] * 10, peak=STEP_FLOPS)  # ten seconds a step, on what could do one a second
    assert result.predicted["model_flops"] == STEP_FLOPS
    assert result.model_flops_per_s == pytest.approx(STEP_FLOPS / 10)
    assert result.mfu == pytest.approx(0.1)


def test_mfu_is_of_the_peak_in_what_the_products_are_computed_in(timed):
    result, _ = timed([4] * 10, "precision=bf16", peak=1.0)
    assert result.mfu == pytest.approx(STEP_FLOPS / 10 / 1e30)


def test_the_final_training_loss_is_the_mean_of_the_last_fifty_steps(tmp_path):
    result = train(quick("train.steps=53", "train.batch=1", "data.sequence_length=4"), tmp_path / "run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert len(losses) == 53
    assert result.train_loss == pytest.approx(sum(losses[3:]) / 50, rel=1e-12)
    assert result.items_seen == 53 * 4
