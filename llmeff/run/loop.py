"""The training loop, top to bottom: set up, step, evaluate, save, finish."""

import math
import operator
import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel

from llmeff.config.run import RunConfig
from llmeff.core import files, group, meters
from llmeff.core.dist import world
from llmeff.core.heartbeat import beat
from llmeff.core.memory import keep_freed_memory
from llmeff.core.optimizer_state import set_learning_rate, state_bytes
from llmeff.core.precision import precision
from llmeff.core.seed import derive
from llmeff.core.tensors import unmoved_buffers
from llmeff.core.units import show_names
from llmeff.parallel.watchdog import Watchdog
from llmeff.plan.price import predict
from llmeff.record import schema
from llmeff.record.clocks import Clocks, StepClock, StepTimes
from llmeff.record.devices import mfu, peak_flops_per_s
from llmeff.record.environment import environment
from llmeff.record.loss_curve import loss_curve
from llmeff.record.progress import Shown, open_display
from llmeff.record.reader import final_loss, read_run, throughput
from llmeff.record.schema import EvalRow, Result, StepRow, Timings, relative_errors
from llmeff.record.writer import check_free, writer_of
from llmeff.run import prepare
from llmeff.run.checkpoint import Checkpoint, Checkpoints, restore_random_states
from llmeff.tasks.task import ITEMS, Sample


class DivergedError(Exception):
    """Raised if a loss or gradient norm is not finite, so that the run cannot continue. The run's files are intact."""


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, anew: bool = False, is_silent: bool = True
) -> Result:
    """Trains a run to its end and returns the result. Starts at the first step or at the newest complete checkpoint.

    Args:
        config: config of the run. `auto` values are resolved before anything is written.
        folder: folder of the run. It must be absent or empty, unless the run is resumed or begun anew.
        resume: continue the run in the folder from its newest checkpoint. With `anew`, the run may also start at the first
            step if there is no checkpoint.
        anew: begin the unfinished run in the folder anew, and move its old records to a subfolder.
        is_silent: show nothing at the terminal.

    Raises:
        ConfigError: the config, the data or the folder is invalid.
        DivergedError: a loss or gradient norm was not finite.
    """
    with (
        Watchdog(folder, config.parallel.timeout_s) as watchdog,
        Trainer(config, folder, resume=resume, anew=anew, is_silent=is_silent) as trainer,
    ):
        watchdog.settle()
        while trainer.step < trainer.config.train.steps:
            trainer.train_step()
            trainer.evaluate_if_due()
            trainer.save_if_due()
        return trainer.finish()


class _State(BaseModel):
    """Loop state saved in a checkpoint, apart from the model and the optimizer."""

    sharing: str
    """Strategy and micro-batch as text (see `prepare.sharing`). `measured` and `kernels` are valid only for these."""
    data: str = ""
    items_seen: int = 0
    measured: dict[str, float] = {}
    metrics: dict[str, dict[str, float]] = {}
    timings: Timings = Timings()
    energy_j: float | None = 0.0
    kernels: tuple[str, ...] = ()


class Trainer:
    """A run in progress. `train` calls its methods in order; benchmarks call `train_step` repeatedly."""

    def __init__(self, config: RunConfig, folder: Path, *, resume: bool, is_silent: bool, anew: bool = False):
        self._closing = ExitStack()
        start_s = time.perf_counter()
        if resume or anew:
            config = prepare.begun_config(config, folder)
        else:
            check_free(folder)
        self.config, self._task = prepare.prepare(config)
        self.device = prepare.prepare_device(self.config)
        keep_freed_memory()
        self._environment = environment(self.device)
        self._precision = precision(self.config.precision)
        self._shares = prepare.micro_batches(self.config, world().rank)
        self.price = predict(self.config, world().rank)
        self._strategy = self._closing.enter_context(
            closing(prepare.build_strategy(self.config, self._task, self.device))
        )
        self._is_main = self._strategy.world.is_main
        torch.manual_seed(derive(self.config.seed, "train", self._strategy.world.rank))

        # All checks of the input have passed. The run's folder is written to only from here on.
        self._checkpoints = Checkpoints(folder / schema.CHECKPOINTS, self.config.checkpoint.keep)
        self.step = 0
        self._state = _State(sharing=prepare.sharing(self.config), data=self._task.facts()["sha256"])
        checkpoint = self._checkpoints.resume_point(self._state.data, or_anew=anew) if resume else None
        with group.agreed():
            begin = writer_of(is_main=self._is_main, resume=resume, anew=anew and checkpoint is None)
            self._writer = self._closing.enter_context(begin(folder, self.config, self._environment))
        if resume or anew:
            self._go_back(checkpoint)
        self._clock = StepClock(self.device)
        self._energy = meters.EnergyMeter(self.device, self._state.energy_j)
        interval = self.config.evaluation.interval(self.config.train.steps)
        self._counted, self._metered = meters.metered_steps(self.config.train.steps, interval)
        self._pending: dict[int, dict[str, Any]] = {}
        self._display = open_display(self._shown(), is_silent=is_silent or not self._is_main)
        startup_s = self._state.timings.startup_s + time.perf_counter() - start_s
        self._clocks = Clocks(self.device, self._state.timings.model_copy(update={"startup_s": startup_s}))

    def _go_back(self, checkpoint: Checkpoint | None) -> None:
        """Restores the checkpoint and drops later records. Without a checkpoint, drops all records and starts at step 0."""
        if checkpoint is not None:
            with group.agreed():
                self._strategy.load(checkpoint.folder)
            restore_random_states(checkpoint)
            now, self.step, self._state = self._state.sharing, checkpoint.step, _State.model_validate(checkpoint.state)
            if self._state.sharing != now:  # saved measurements were made with another strategy or micro-batch
                self._state = self._state.model_copy(update={"sharing": now, "measured": {}, "kernels": ()})
        self._writer.truncate_after(self.step)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._display.close()
        self._closing.close()

    def _shown(self) -> Shown:
        return Shown(
            total_steps=self.config.train.steps,
            item=self._task.item,
            model_flops_per_item=self.price.total("model_flops") / self._task.items_per_step,
            peak_flops_per_s=peak_flops_per_s(self._environment.device, self._precision.compute),
            memory_bytes=lambda: meters.bytes_now(self.device),
        )

    # -- a step

    def train_step(self) -> None:
        """Runs one optimizer step: batch, forward, backward, clip, update, record."""
        number = self.step + 1
        if number == self._counted:
            # While FLOPs are counted, autograd accumulates gradients out of place, so memory is measured in another step.
            with self._eagerly():
                measured, self._state.kernels = meters.count_step(self._update)
            self._state.measured |= measured
        elif number == self._metered:
            self._state.measured["peak_bytes"] = meters.peak_bytes(self._update, self._strategy.resident(), self.device)
            # after the update, because strategies that gather parameters treat a forward pass without backward differently
            if self.config.runtime.compile == "off":  # tensors that compiled code saves for backward are not visible
                with self._clocks.hold("record"):
                    self._state.measured["saved_bytes"] = self._saved_bytes()
        else:
            self._update()

    def _saved_bytes(self) -> int:
        """Returns the bytes that a forward pass of one micro-batch saves for backward."""
        batch = self._task.batch(self.step, self._shares[0], self.device)
        given = [value for value in (*batch.inputs.values(), batch.targets) if isinstance(value, torch.Tensor)]
        held = [*self._strategy.resident(), *given]
        model = self._strategy.model
        with torch.random.fork_rng(), unmoved_buffers(model), self._strategy.accumulate(is_last=False):
            return meters.saved_bytes(lambda: self._task.loss(model, batch), held)

    def _update(self) -> None:
        clock, strategy, number = self._clock, self._strategy, self.step + 1
        clock.begin(number)
        batches = [self._task.batch(self.step, rows, self.device) for rows in self._shares]
        totals = group.totals([batch.totals() for batch in batches])
        clock.mark("data")

        losses = []
        while batches:
            batch = batches.pop(0)  # removed from the list, so that its masks and tables are freed after use
            beat("forward")
            with strategy.accumulate(is_last=not batches):
                sums = self._task.loss(strategy.model, batch)
                share = reduce(operator.add, (sums[name] / totals[name] for name in sums))
                clock.mark("forward")
                strategy.backward(share)
                clock.mark("backward")
            losses.append(share.detach())

        grad_norm = strategy.clip(self.config.train.clip_norm)
        loss, norm = float(strategy.reduce_sum(reduce(operator.add, losses))), float(grad_norm)
        if not (math.isfinite(loss) and (math.isfinite(norm) or strategy.may_overflow)):
            strategy.skip()
            self._fail(loss, norm)
        rate = set_learning_rate(strategy.optimizer, self.config.schedule.factor(self.step, self.config.train.steps))
        strategy.step()
        clock.mark("optimizer")

        self.step, items = number, int(totals[ITEMS])
        self._state.items_seen += items
        self._pending[number] = {
            "loss": loss, "grad_norm": norm, "learning_rate": rate, "items": items, "items_seen": self._state.items_seen,
            "peak_allocated_bytes": meters.peak_allocated_bytes(self.device), "loss_scale": strategy.loss_scale,
        }  # fmt: skip
        self._record(clock.end())

    def _record(self, finished: list[StepTimes]) -> None:
        for times in finished:
            start = time.perf_counter()
            known = self._pending.pop(times.step)
            row = StepRow(**known, items_per_s=known["items"] / times.step_s, **vars(times))
            self._writer.step(row)
            self._display.step(row)
            self._clocks.add_step(times)
            self._clocks.add("record", start)  # not `hold`, which would wait for the device

    def _fail(self, loss: float, norm: float) -> None:
        shown = show_names(self._task.unit_ids(self.step, range(self.config.train.batch)))
        saved = self._checkpoints.newest()
        kept = "no checkpoint was saved yet" if saved is None else f"the checkpoint of step {saved.step} is kept"
        diagnosis = (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}. The update was not made, and {kept}. "
            f"Data of this step: {shown}"
        )
        self._record(self._clock.flush())
        energy_j = self._energy.total_j()
        if self._is_main:
            self._writer.finish(self._result("diverged", diagnosis, None, energy_j))
        raise DivergedError(diagnosis)

    # -- evaluations and checkpoints

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.train.steps

    def evaluate_if_due(self) -> None:
        """Evaluates on at most `evaluation.max_units` held-out units, if an evaluation is due."""
        if self._is_due(self.config.evaluation.interval(self.config.train.steps)):
            self._evaluate(self.config.evaluation.max_units)

    def save_if_due(self) -> None:
        """Saves a checkpoint if one is due."""
        if self._is_due(self.config.checkpoint.every):
            self._save()

    def _evaluate(self, max_units: int | None) -> None:
        self._record(self._clock.flush())
        split = self.config.evaluation.split
        with self._clocks.hold("eval"), self._eagerly(), self._strategy.evaluating() as model:
            results = list(self._task.evaluate(model, split, max_units, self.device, self._strategy.world))
        self._state.metrics[split] = metrics = self._task.summary(results)
        self._writer.evaluation([EvalRow(step=self.step, split=split, **vars(result)) for result in results], metrics)
        shown = ", ".join(
            f"{name} {value:.4f}" for name, value in metrics.items() if name in self.config.task.metric_directions
        )
        self._display.note(f"step {self.step}, {split}: {shown}")

    def _eagerly(self) -> AbstractContextManager[object]:
        """Returns a context in which compiled code runs eagerly. New shapes would otherwise trigger a recompilation."""
        return nullcontext() if self.config.runtime.compile == "off" else torch.compiler.set_stance("force_eager")

    def _save(self) -> None:
        self._record(self._clock.flush())
        self._writer.sync()
        with self._clocks.hold("checkpoint"):
            now = self._state.model_copy(update={"timings": self._clocks.timings(), "energy_j": self._energy.total_j()})
            self._checkpoints.save(self.step, now.model_dump(), self._strategy.save)

    # -- the end

    def finish(self) -> Result:
        """Runs the last evaluation; saves checkpoint, model, sample, loss curve and result. Returns the result on every rank."""
        self._record(self._clock.flush())
        self._evaluate(max_units=None)
        self._save()
        split, tokens = self.config.evaluation.split, self.config.evaluation.sample_tokens
        with self._clocks.hold("eval"), self._eagerly(), self._strategy.evaluating() as model:
            sample = self._task.sample(model, split, tokens, self.device) if tokens else Sample()
        with self._clocks.hold("checkpoint"):
            weights = self._strategy.state_dict()
        energy_j = self._energy.total_j()
        with group.agreed():
            if self._is_main:
                self._finish(weights, sample, energy_j)
        return cast(Result, read_run(self._writer.folder).result)

    def _finish(self, weights: dict[str, torch.Tensor], sample: Sample, energy_j: float | None) -> None:
        folder = self._writer.folder
        pictures = {"loss curve": folder / schema.LOSS_CURVE}
        with self._clocks.hold("checkpoint"), files.reported(folder / schema.MODEL):
            self._task.save_model(prepare.whole_model(self.config, weights), folder / schema.MODEL)
        with self._clocks.hold("record"), files.reported(folder):
            loss_curve([read_run(folder)], pictures["loss curve"])
            if sample.picture is not None:
                pictures["samples"] = folder / schema.SAMPLES
                files.write_bytes(pictures["samples"], sample.picture)
        result = self._result("finished", None, sample.text, energy_j)
        self._writer.finish(result)
        self._display.summary(result, folder, pictures)

    def _result(self, status: Any, diagnosis: str | None, sample: str | None, energy_j: float | None) -> Result:
        steps = read_run(self._writer.folder).steps
        speed, loss = throughput(steps), final_loss(steps)
        predicted = self.price.reported()
        measured = self._state.measured | {"parameters": self._strategy.num_trained}
        if self.step:
            measured["optimizer_bytes"] = state_bytes(self._strategy.optimizer)
        rate = None if speed is None else predicted["model_flops"] * speed.median * self.step / self._state.items_seen
        return Result(
            status=status,
            diagnosis=diagnosis,
            steps=self.step,
            item=self._task.item,
            items_seen=self._state.items_seen,
            parameters=self._strategy.num_parameters,
            train_loss=math.nan if loss is None else loss,
            metrics=self._state.metrics,
            metric_directions=self.config.task.metric_directions,
            references=self._task.references(self.config.evaluation.split),
            timings=self._clocks.timings(),
            items_per_s=speed,
            model_flops_per_s=rate,
            mfu=None if rate is None else mfu(rate, self._environment.device, self._precision.compute),
            energy_j=energy_j,
            prediction=self.price.source,
            predicted=predicted,
            measured=measured,
            error=relative_errors(predicted, measured),
            sample=sample,
            data=self._task.facts(),
            kernels=self._state.kernels,
        )
