"""RunConfig: the complete config of a run, and the checks that its parts work together."""

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

import llmeff.models  # noqa: F401  registers the models
from llmeff.core.config import (
    Config,
    Count,
    CountOrZero,
    Flag,
    Integer,
    Positive,
    Share,
    Text,
)
from llmeff.core.precision import PrecisionName
from llmeff.data import DataConfig, TextData
from llmeff.models import DecoderConfig, ModelConfig, TransformConfig
from llmeff.optim import AdamW, Cosine, OptimizerConfig, ScheduleConfig
from llmeff.parallel import Single, StrategyConfig
from llmeff.tasks import CausalLM, TaskConfig


class TrainConfig(Config):
    """The number of steps, the batch sizes and gradient clipping."""

    steps: Count = 1000
    """Number of optimizer steps."""
    batch: Count = 16
    """Sequences (or images) per step, summed over all ranks and micro-batches."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Sequences (or images) in one forward pass on one rank. Must divide batch / ranks. auto: the largest size whose
    predicted peak memory fits."""
    clip_norm: Positive | None = 1.0
    """Largest norm of the gradients. A larger norm is scaled down to it. null: no clipping."""


class EvalConfig(Config):
    """Evaluation settings: how often to evaluate, and on which held-out data."""

    split: Literal["validation", "search", "test"] = "validation"
    """Split to evaluate on. `search` is for choosing settings; final runs are then judged on another split."""

    every: CountOrZero | Share = 250
    """Steps between evaluations, or, if below 1, a fraction of the run's steps. 0: only evaluate at the end."""
    max_units: Count | None = 64
    """Number of documents (or images) of the split to evaluate during training. null: all. The evaluation at the end
    always uses all."""
    sample_tokens: CountOrZero = 64
    """Tokens of the sample text that the model writes at the end. 0: no sample, and no sample picture for images."""

    def interval(self, steps: int) -> int:
        """Returns the number of steps between evaluations in a run of `steps` steps. 0 to evaluate only at the end."""
        return self.every if isinstance(self.every, int) else max(1, round(self.every * steps))


class CheckpointConfig(Config):
    """Checkpoint settings: how often to save, and how many checkpoints to keep."""

    every: CountOrZero = 500
    """Steps between checkpoints. 0: only save at the end."""
    keep: Count = 2
    """Number of checkpoints to keep. Older checkpoints are deleted."""


class RuntimeConfig(Config):
    """How the run uses the machine. These settings change results only by rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: CUDA if there is a CUDA device, else the CPU."""
    threads: Count | Literal["auto"] = "auto"
    """CPU threads per process. auto: the cores that this process may use, divided by the number of ranks."""
    compile: Literal["off", "layers", "model"] = "off"
    """What torch.compile compiles. off: nothing. layers: each layer, which starts faster. model: the whole model."""
    recompute: Flag = False
    """Save only each layer's input for backward and recompute the layer there (activation checkpointing)."""
    deterministic: Flag = False
    """Use only deterministic CUDA kernels. Runs on a CPU are always deterministic."""


class RunConfig(Config):
    """The config of a run: task, model, data, optimizer, strategy and machine."""

    name: Text = "run"
    """Name of the run in tables, and of its folder if no folder is given."""
    seed: Integer = 0
    """Seed of initialization and data order."""
    task: TaskConfig = CausalLM()
    """The task: the loss to train on, and the metrics."""
    model: ModelConfig = DecoderConfig()
    """The model to train."""
    transforms: tuple[TransformConfig, ...] = ()
    """Changes to the built model before training, such as LoRA. Applied in this order."""
    data: DataConfig = TextData()
    """The training and evaluation data."""
    optim: OptimizerConfig = AdamW()
    """The optimizer."""
    schedule: ScheduleConfig = Cosine(warmup_steps=100)
    """The learning-rate schedule."""
    precision: PrecisionName = "fp32"
    """The number formats of parameters, compute and gradients."""
    parallel: StrategyConfig = Single()
    """The strategy by which the processes of the run share a step."""
    train: TrainConfig = TrainConfig()
    """Number of steps, batch sizes and gradient clipping."""
    evaluation: EvalConfig = EvalConfig()
    """Evaluation on held-out data."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, threads, compilation and recomputation."""

    @model_validator(mode="after")
    def _works(self) -> "RunConfig":
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def optimizer_as_begun(self) -> OptimizerConfig:
        """Returns the optimizer of a run that was begun with this config.

        Older versions of llmeff saved `auto` for settings that depend on the device. This method replaces `auto` by the
        value that those versions used.
        """
        return self.optim.resolve(is_bfloat16_fast=self.runtime.device == "cuda")

    def _problems(self) -> Iterator[str]:
        yield from self._length_problems()
        yield from self._strategy_problems()
        if self.precision == "fp16" and self.runtime.device == "cpu":
            yield "precision 'fp16' needs a GPU. On a CPU, use 'fp32' or 'bf16'"
        yield from self.task.problems(self.model, self.data)

    def _length_problems(self) -> Iterator[str]:
        """Yields errors if the warm-up is longer than the run, or if ranks or micro-batches do not divide the batch."""
        train, ranks = self.train, self.parallel.ranks
        if self.schedule.warmup_steps > train.steps:
            yield (
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, but train.steps is only {train.steps}: "
                "the learning rate would never reach its peak. Use fewer warm-up steps"
            )
        if train.batch % ranks:
            yield f"train.batch is {train.batch}, which is not divisible by parallel.ranks {ranks}"
        elif train.micro_batch != "auto" and (train.batch // ranks) % train.micro_batch:
            share = f"train.batch {train.batch}" + (f" / parallel.ranks {ranks}" if ranks > 1 else "")
            allowed = [n for n in range(1, train.batch // ranks + 1) if (train.batch // ranks) % n == 0]
            yield (
                f"train.micro_batch is {train.micro_batch}, which does not divide {share}. "
                f"Allowed: {', '.join(map(str, allowed))}"
            )

    def _strategy_problems(self) -> Iterator[str]:
        """Yields errors about a strategy that does not work with the precision, the optimizer or the compiler."""
        if self.precision not in self.parallel.precisions:
            allowed_names = ", ".join(map(repr, self.parallel.precisions))
            yield (
                f"precision {self.precision!r} does not work with parallel {self.parallel.name!r}. "
                f"Allowed: {allowed_names}"
            )
        refusal = self.parallel.refusal(self.optim.sharding)
        if refusal is not None:
            yield f"optim {self.optim.name!r} does not work with parallel {self.parallel.name!r}: {refusal}"
        yield from self.parallel.clashes(self.precision, self.runtime.compile)
