"""The figures of a run's rows and result, against the arithmetic of a person: rates, losses, norms, speeds and MFU."""

import dataclasses
import json
import math

import pytest
import torch

from llmeff.config.run import RunConfig
from llmeff.core import meters
from llmeff.core.config import override, validate
from llmeff.core.heartbeat import HEARTBEAT
from llmeff.core.seed import derive
from llmeff.data.packing import MASKED, TrainWindows
from llmeff.record import clocks, schema
from llmeff.record.devices import DEVICES, Device
from llmeff.record.progress import Silent
from llmeff.record.reader import read_run
from llmeff.run import loop
from llmeff.run.loop import DivergedError, Trainer, train
from llmeff.tasks.causal_lm import CausalLMTask
from tests.run.test_loop import TINY

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


def by_hand(monkeypatch):
    """Stops the clock: from now on time passes in calls that are made to take so many seconds."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def after(seconds, call):
        def timed_call(*given, **named):
            now[0] += seconds() if callable(seconds) else seconds
            return call(*given, **named)

        return timed_call

    return after


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A run of ten steps whose batches take 1 s each, losses 2 s, and updates as told; on a device of known peak."""
    after = by_hand(monkeypatch)

    def make(update_s, *settings, peak=1.0, backward_s=0):
        monkeypatch.setitem(
            DEVICES, "cpu", Device(half_flops_per_s=1e30, single_flops_per_s=peak, memory_bytes_per_s=1.0)
        )
        config = quick("train.steps=10", "train.micro_batch=2", *settings)
        with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
            task, strategy = trainer._task, trainer._strategy
            monkeypatch.setattr(task, "batch", after(1, task.batch))
            monkeypatch.setattr(task, "loss", after(2, task.loss))
            monkeypatch.setattr(strategy, "backward", after(backward_s, strategy.backward))
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


def test_a_step_that_is_waited_for_says_what_its_parts_took(timed, monkeypatch):
    """Of two micro-batches each, whose losses take 2 s and whose gradients 3 s."""
    monkeypatch.setattr(clocks, "SYNCHRONISED_EVERY", 5)
    updates = [1, 1, 1, 1, 7, 1, 1, 1, 1, 8]
    _, rows = timed(updates, backward_s=3)
    parts = [(row["data_s"], row["forward_s"], row["backward_s"], row["optimizer_s"]) for row in rows]
    for step, (found, update) in enumerate(zip(parts, updates, strict=True), 1):
        assert found == ((2, 4, 6, update) if step % 5 == 0 else (2, None, None, None))
    assert [row["step_s"] for row in rows] == [12 + update for update in updates]


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


# -- the result


PARAMETERS = 257 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
"""By hand: embeddings that are the head's too, two layers with two norms each, and the norm at the end."""


def test_the_result_says_what_the_run_was_and_came_to(tmp_path):
    config = quick("evaluation.sample_tokens=5", "evaluation.max_units=1", "train.steps=4")
    result, folder = train(config, tmp_path / "run"), tmp_path / "run"
    rows = rows_of(folder)
    assert (result.status, result.diagnosis, result.steps, result.item) == ("finished", None, 4, "token")
    assert (result.items_seen, result.parameters) == (4 * 4 * 32, PARAMETERS)
    assert result.train_loss == pytest.approx(sum(row["loss"] for row in rows) / 4, rel=1e-12)
    assert (result.items_per_s, result.mfu, result.energy_j) == (None, None, None)  # all steps are warm-up
    assert result.metric_directions == {"loss": "lower", "bits_per_byte": "lower"}
    assert (result.data["name"], len(result.data["sha256"])) == ("builtin", 64)
    assert result.references == {"gzip_bits_per_byte": result.data["splits"]["validation"]["gzip_bits_per_byte"]}
    assert 1 < result.references["gzip_bits_per_byte"] < 4
    assert 0 < len(result.sample.encode()) <= 5 * 3  # what is no text is shown as a mark of three bytes
    assert len(result.kernels) == 1
    assert result.kernels[0].startswith("attention: torch sdpa, ")
    assert len(read_run(folder).evals) == result.data["splits"]["validation"]["num_documents"] > 1


def test_what_a_result_predicts_stands_beside_what_was_measured(tmp_path):
    result = train(quick("train.steps=4"), tmp_path / "run")
    assert result.prediction == "law"
    assert set(result.measured) == {"parameters", "executed_flops", "saved_bytes", "optimizer_bytes", "peak_bytes"}
    assert set(result.predicted) == {"model_flops", *result.measured}  # one process sends nothing
    assert set(result.error) == set(result.measured)
    for quantity, error in result.error.items():
        assert error == result.predicted[quantity] / result.measured[quantity] - 1
    assert (result.predicted["parameters"], result.measured["parameters"]) == (PARAMETERS, PARAMETERS)
    assert result.predicted["model_flops"] == STEP_FLOPS
    assert result.measured["optimizer_bytes"] == pytest.approx(2 * 4 * PARAMETERS, rel=0.01)  # two moments in fp32
    assert result.measured["peak_bytes"] > 4 * 4 * PARAMETERS  # weights, gradients and moments


def test_a_run_that_diverges_at_once_has_done_nothing(tmp_path, monkeypatch):
    with Trainer(quick(), tmp_path / "run", resume=False, is_silent=True) as trainer:
        whole = trainer._task.loss
        monkeypatch.setattr(trainer._task, "loss", lambda *given: {"loss": whole(*given)["loss"] + math.inf})
        with pytest.raises(
            DivergedError, match=r"step 1: loss inf, .* no checkpoint was saved yet\. Data of this step: "
        ):
            trainer.train_step()
    result = read_run(tmp_path / "run").result
    assert (result.status, result.steps, result.items_seen) == ("diverged", 0, 0)
    assert result.diagnosis.startswith("step 1: loss inf")
    assert math.isnan(result.train_loss)
    assert "optimizer_bytes" not in result.measured
    assert (result.metrics, result.sample) == ({}, None)


# -- a run's clocks and meters


def test_energy_and_startup_are_of_all_processes_of_a_run(tmp_path, monkeypatch):
    """Each takes 30 s to begin, and draws 7 J until it is asked."""
    before = []

    class Meter(meters.EnergyMeter):
        def __init__(self, device, before_j):
            super().__init__(device, before_j)
            before.append(before_j)

        def energy_j(self):
            return 7.0

    after = by_hand(monkeypatch)
    monkeypatch.setattr(loop, "predict", after(30, loop.predict))
    monkeypatch.setattr(CausalLMTask, "batch", after(1, CausalLMTask.batch))
    monkeypatch.setattr(meters, "EnergyMeter", Meter)
    config = quick("train.steps=2", "checkpoint.every=1")
    with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
        trainer.train_step()
        trainer.save_if_due()
    result = train(config, tmp_path / "run", resume=True)
    assert before == [0.0, 7.0]
    assert result.energy_j == 14.0
    assert result.timings.startup_s == 60


def test_each_clock_counts_what_its_name_says(tmp_path, monkeypatch):
    """A batch takes 1 s and a loss 2 s, an evaluation 100 s and a sample 10 s, a checkpoint or model 1000 s, a curve 3 s."""
    after = by_hand(monkeypatch)
    monkeypatch.setattr(loop, "loss_curve", after(3, loop.loss_curve))
    with Trainer(
        quick("train.steps=2", "evaluation.sample_tokens=2"), tmp_path / "run", resume=False, is_silent=True
    ) as trainer:
        task = trainer._task
        monkeypatch.setattr(task, "batch", after(1, task.batch))
        monkeypatch.setattr(task, "loss", after(2, task.loss))
        monkeypatch.setattr(task, "evaluate", after(100, task.evaluate))
        monkeypatch.setattr(task, "sample", after(10, task.sample))
        monkeypatch.setattr(task, "save_model", after(1000, task.save_model))
        monkeypatch.setattr(trainer._checkpoints, "save", after(1000, trainer._checkpoints.save))
        for _ in range(2):
            trainer.train_step()
        timings = trainer.finish().timings
    assert (timings.eval_s, timings.checkpoint_s, timings.record_s) == (110, 2000, 3)
    assert (timings.train_s, timings.data_s, timings.startup_s) == (2 * 2, 2 * 1, 0)


def test_micro_batches_are_trained_on_in_their_order(tmp_path, monkeypatch):
    """Sums, and what a step draws by chance, are then the same bits again."""
    with Trainer(quick("train.micro_batch=1"), tmp_path / "run", resume=False, is_silent=True) as trainer:
        task, made, taken = trainer._task, [], []
        batch, loss = task.batch, task.loss
        monkeypatch.setattr(task, "batch", lambda *given: made.append((given[:2], batch(*given))) or made[-1][1])
        monkeypatch.setattr(task, "loss", lambda model, given: taken.append(given) or loss(model, given))
        trainer.train_step()
    assert [asked for asked, _ in made] == [(0, range(row, row + 1)) for row in range(4)]
    assert all(one is other for (_, one), other in zip(made, taken, strict=True))


def test_a_run_says_what_it_is_in(tmp_path, monkeypatch):
    """By the second micro-batch of a step the first one's backward is done, which is not yet the update."""
    seen = []

    def told(call):
        return lambda *given, **named: seen.append((HEARTBEAT.step, HEARTBEAT.part)) or call(*given, **named)

    config = quick("train.steps=2", "train.micro_batch=2", "evaluation.sample_tokens=1")
    with Trainer(config, tmp_path / "run", resume=False, is_silent=True) as trainer:
        task, strategy, checkpoints = trainer._task, trainer._strategy, trainer._checkpoints
        monkeypatch.setattr(checkpoints, "save", told(checkpoints.save))
        for name in ("batch", "loss", "evaluate", "sample", "save_model"):
            monkeypatch.setattr(task, name, told(getattr(task, name)))
        for name in ("backward", "clip", "step"):
            monkeypatch.setattr(strategy, name, told(getattr(strategy, name)))
        trainer.train_step()
        trainer.train_step()
        trainer.finish()
    a_step = ["data", "data", "forward", "backward", "forward", "backward", "update", "update"]
    the_end = ["evaluation", "checkpoint", "evaluation", "checkpoint"]
    assert seen == [(1, part) for part in a_step] + [(2, part) for part in a_step + the_end]


def test_only_a_steps_last_micro_batch_ends_it_and_metering_ends_none(tmp_path):
    """The third step is counted, and the fourth metered; after it one more forward pass is, which no backward follows."""
    with Trainer(quick("train.micro_batch=2"), tmp_path / "run", resume=False, is_silent=True) as trainer:
        told, whole = [], trainer._strategy.accumulate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer._strategy, "accumulate", lambda is_last: told.append(is_last) or whole(is_last))
            for _ in range(5):
                trainer.train_step()
    assert told == [False, True] * 4 + [False] + [False, True]


def test_nothing_is_due_past_the_end_of_a_run(tmp_path):
    """Its last evaluation and checkpoint are of the end."""
    config, folder = quick("train.steps=4", "evaluation.every=2", "checkpoint.every=2"), tmp_path / "run"
    with Trainer(config, folder, resume=False, is_silent=True) as trainer:
        for _ in range(6):
            trainer.train_step()
            trainer.evaluate_if_due()
            trainer.save_if_due()
    assert [row.step for row in read_run(folder).evaluations] == [2]
    assert [path.name for path in (folder / schema.CHECKPOINTS).iterdir()] == ["step-00000002"]


def test_what_was_measured_is_forgotten_where_ranks_share_steps_otherwise(tmp_path):
    config, changed = (quick("checkpoint.every=4", f"train.micro_batch={size}") for size in (4, 2))
    for name in ("same", "other"):
        with Trainer(config, tmp_path / name, resume=False, is_silent=True) as trainer:
            for _ in range(5):
                trainer.train_step()
                trainer.save_if_due()
    same = train(config, tmp_path / "same", resume=True)
    assert {"executed_flops", "peak_bytes", "saved_bytes"} < set(same.measured)
    other = train(changed, tmp_path / "other", resume=True)
    assert set(other.measured) == {"parameters", "optimizer_bytes"}
    assert (len(same.kernels), len(other.kernels)) == (1, 0)
    assert same.items_seen == other.items_seen == 6 * 4 * 32


# -- what chance decides, and what people see


def test_what_is_drawn_in_steps_is_of_the_runs_seed_and_the_rank(tmp_path):
    for seed in (0, 3):
        with Trainer(quick(f"seed={seed}"), tmp_path / str(seed), resume=False, is_silent=True):
            assert torch.initial_seed() == derive(seed, "train", 0)


class Seen(Silent):
    """Keeps what a run shows."""

    def __init__(self):
        self.shown, self.silent, self.steps, self.notes, self.end = None, None, [], [], None

    def step(self, row):
        self.steps.append(row.step)

    def note(self, text):
        self.notes.append(text)

    def summary(self, result, folder, pictures=None):
        self.end = (result, folder, pictures)


def test_what_people_see_of_a_run(tmp_path, monkeypatch):
    display = Seen()

    def opened(shown, *, is_silent):
        display.shown, display.silent = shown, is_silent
        return display

    monkeypatch.setattr(loop, "open_display", opened)
    monkeypatch.setitem(DEVICES, "cpu", Device(half_flops_per_s=2e30, single_flops_per_s=1e30, memory_bytes_per_s=1.0))
    config, folder = quick("evaluation.every=2", "train.steps=4"), tmp_path / "run"
    result = train(config, folder, is_silent=False)
    shown = display.shown
    assert (shown.total_steps, shown.item, display.silent) == (4, "token", False)
    assert shown.model_flops_per_item == pytest.approx(STEP_FLOPS / (4 * 32))
    assert shown.peak_flops_per_s == 1e30
    assert shown.memory_bytes() > 2**20
    assert display.steps == [1, 2, 3, 4]
    first, last = display.notes
    assert first.startswith("step 2, validation: loss ")
    found = result.metrics["validation"]
    assert last == f"step 4, validation: loss {found['loss']:.4f}, bits_per_byte {found['bits_per_byte']:.4f}"
    assert display.end == (result, folder, {"loss curve": folder / "loss.png"})
    train(config, tmp_path / "silent")
    assert display.silent is True


def test_a_run_that_is_begun_anew_has_no_step_of_what_was_before(tmp_path):
    config, folder = quick("train.steps=3", "checkpoint.every=1"), tmp_path / "run"
    with Trainer(config, folder, resume=False, is_silent=True) as trainer:
        for _ in range(2):
            trainer.train_step()
            trainer.save_if_due()
    before = [row["loss"] for row in rows_of(folder)]
    result = train(config, folder, anew=True)
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows[:2]] == before
    assert result.items_seen == 3 * 4 * 32
