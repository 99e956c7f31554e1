"""RunConfig: all that a run is, and the pairs in it that cannot work."""

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
    """How long a run is and what a step holds."""

    steps: Count = 1000
    """Optimizer steps."""
    batch: Count = 16
    """Sequences (or images) a step, over all ranks and micro-batches."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Sequences a forward pass on one rank; divides batch / ranks. auto: the most whose predicted peak fits."""
    clip_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm where they exceed it. null: never."""


class EvalConfig(Config):
    """When held-out loss is measured, and on what."""

    split: Literal["validation", "search", "test"] = "validation"
    """What is held out: `search` to choose settings by, which a final run is then not judged on."""

    every: CountOrZero | Share = 250
    """Steps between evaluations, or below 1 the share of the run that they are apart; 0: only at the end."""
    max_units: Count | None = 64
    """Documents (or images) of the validation split while training; null: all. At the end it is always all."""
    sample_tokens: CountOrZero = 64
    """Tokens of sample text at the end, where the model writes text; 0: no sample of any kind."""

    def interval(self, steps: int) -> int:
        """Steps between the evaluations of a run of so many; 0: only at the end."""
        return self.every if isinstance(self.every, int) else max(1, round(self.every * steps))


class CheckpointConfig(Config):
    """When the state is saved."""

    every: CountOrZero = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """How many of the newest are kept."""


class RuntimeConfig(Config):
    """How the machine is used; nothing here changes what is computed, beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device where there is one."""
    threads: Count | Literal["auto"] = "auto"
    """CPU threads of one process. auto: the cores that this process may use, shared among the ranks."""
    compile: Literal["off", "layers", "model"] = "off"
    """torch.compile of nothing, of each layer (a short start), or of the model as a whole."""
    recompute: Flag = False
    """Keep only each layer's input for backward and run the layer again (activation checkpointing)."""
    deterministic: Flag = False
    """Have CUDA use deterministic kernels only; CPU runs always are."""


class RunConfig(Config):
    """A run: what is trained, on what, how, and what is recorded."""

    name: Text = "run"
    """Names the run in tables, and its folder where none is given."""
    seed: Integer = 0
    """Of initialization and data order."""
    task: TaskConfig = CausalLM()
    """What is trained towards what."""
    model: ModelConfig = DecoderConfig()
    """The model."""
    transforms: tuple[TransformConfig, ...] = ()
    """What is changed in the built model before it is trained, in order."""
    data: DataConfig = TextData()
    """What it reads."""
    optim: OptimizerConfig = AdamW()
    """What updates it."""
    schedule: ScheduleConfig = Cosine(warmup_steps=100)
    """How the learning rate moves."""
    precision: PrecisionName = "fp32"
    """The number formats."""
    parallel: StrategyConfig = Single()
    """Processes, and what each holds."""
    train: TrainConfig = TrainConfig()
    """Length and batch."""
    evaluation: EvalConfig = EvalConfig()
    """Held-out loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saved states."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The machine."""

    @model_validator(mode="after")
    def _works(self) -> "RunConfig":
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def optimizer_as_begun(self) -> OptimizerConfig:
        """The optimizer of a begun run whose config this is: older ones left open what the kind of device decided."""
        return self.optim.resolve(is_bfloat16_fast=self.runtime.device == "cuda")

    def _problems(self) -> Iterator[str]:
        yield from self._length_problems()
        yield from self._strategy_problems()
        if self.precision == "fp16" and self.runtime.device == "cpu":
            yield "precision 'fp16' needs a GPU: on a CPU use 'fp32' or 'bf16'"
        yield from self.task.problems(self.model, self.data)

    def _length_problems(self) -> Iterator[str]:
        """A warmup that is too long, and a batch that cannot be divided among ranks and micro-batches."""
        train, ranks = self.train, self.parallel.ranks
        if self.schedule.warmup_steps > train.steps:
            yield (
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, but the run has train.steps = {train.steps}: "
                "the peak rate would never be reached"
            )
        if train.batch % ranks:
            yield f"train.batch {train.batch} is not divisible by parallel.ranks {ranks}"
        elif train.micro_batch != "auto" and (train.batch // ranks) % train.micro_batch:
            share = f"train.batch {train.batch}" + (f" / parallel.ranks {ranks}" if ranks > 1 else "")
            allowed = [n for n in range(1, train.batch // ranks + 1) if (train.batch // ranks) % n == 0]
            yield (
                f"train.micro_batch {train.micro_batch} does not divide {share}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )

    def _strategy_problems(self) -> Iterator[str]:
        """A strategy that does not work with the precision, the optimizer or the compiler."""
        if self.precision not in self.parallel.precisions:
            allowed_names = ", ".join(map(repr, self.parallel.precisions))
            yield f"precision {self.precision!r} is not for parallel {self.parallel.name!r}; allowed: {allowed_names}"
        refusal = self.parallel.refusal(self.optim.sharding)
        if refusal is not None:
            yield f"optim {self.optim.name!r} is not for parallel {self.parallel.name!r}: {refusal}"
        yield from self.parallel.clashes(self.precision, self.runtime.compile)
