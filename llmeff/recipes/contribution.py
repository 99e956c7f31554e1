"""What each efficiency technique contributes, alone and together with others: fractional factorials over one recipe."""

import itertools
from collections.abc import Sequence
from math import prod

from llmeff.core.config import override, validate
from llmeff.data import Characters, SplitConfig, TextData, TextFiles
from llmeff.optim import AdamW, Cosine
from llmeff.recipes.recipe import sweep_recipe
from llmeff.runconfig import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.sweepconfig import ArmConfig, SweepConfig

Level = tuple[str, tuple[str, ...]]
"""A level's name, and the settings that make it."""

SGD: Level = ("sgd", ("optim=sgd", "optim.lr=0.3"))
ADAMW: Level = ("adamw", ("optim=adamw", "optim.lr=3e-3"))
ADAMW_8BIT: Level = ("adamw8bit", ("optim=adamw8bit", "optim.lr=3e-3"))
PRECISION: tuple[Level, Level] = (("fp32", ("precision=fp32",)), ("bf16", ("precision=bf16",)))
RECOMPUTE: tuple[Level, Level] = (("keep", ("runtime.recompute=false",)), ("recompute", ("runtime.recompute=true",)))
RANKS: tuple[Level, Level] = (("1 rank", ("parallel.ranks=1",)), ("2 ranks", ("parallel.ranks=2",)))
STAGE: tuple[Level, Level] = (("zero 0", ("parallel.stage=0",)), ("zero 3", ("parallel.stage=3",)))


def half_fraction(factors: dict[str, tuple[Level, Level]]) -> dict[str, ArmConfig]:
    """Half of all combinations of two-level factors: those in which an even number is at its second level.

    Of five factors it is of resolution V: no main effect and no pair is mistaken for another (Box, Hunter and Hunter
    2005, chapter 6). The arm with all factors at their first level is in it, and is the first.
    """
    arms = {}
    for places in itertools.product((0, 1), repeat=len(factors)):
        if prod(1 - 2 * place for place in places) == 1:
            chosen = [levels[place] for place, levels in zip(places, factors.values(), strict=True)]
            arms[", ".join(name for name, _ in chosen)] = ArmConfig(
                settings=tuple(setting for _, settings in chosen for setting in settings),
                factors={factor: name for factor, (name, _) in zip(factors, chosen, strict=True)},
            )
    return arms


def _study(name: str, factors: dict[str, tuple[Level, Level]], sizes: Sequence[str]) -> SweepConfig:
    arms = half_fraction(factors)
    base = RunConfig(
        data=TextData(
            source=TextFiles(path=("input.txt",)),
            tokenizer=Characters(),
            splits=SplitConfig(by="span", validation=0.1, test=0.0, search=0.05, calibration=0.0),
            sequence_length=64,
        ),
        optim=AdamW(),
        schedule=Cosine(warmup_steps=10),
        train=TrainConfig(steps=100, batch=4, micro_batch=2),
        evaluation=EvalConfig(every=10, max_units=None, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(threads=1),
    )
    shared = override(base.model_dump(mode="json"), ["parallel=deepspeed", "parallel.stage=0"])
    return SweepConfig(
        name=name, base=validate(RunConfig, shared), arms=arms, baseline=next(iter(arms)), axes={"model": tuple(sizes)}
    )


@sweep_recipe
def contribution() -> SweepConfig:
    """Adaptive optimization, mixed precision, recomputation, ranks and ZeRO stages: 16 of 32 combinations, three seeds.

    Give the corpus: `--set 'base.data.source.path=["input.txt"]'` (tinyshakespeare); sizes by `--set axes.model=[...]`.
    """
    factors = {
        "optimizer": (SGD, ADAMW), "precision": PRECISION, "recompute": RECOMPUTE, "ranks": RANKS, "stage": STAGE,
    }  # fmt: skip
    return _study("contribution", factors, ("llama-1m", "llama-10m"))


@sweep_recipe
def contribution_8bit() -> SweepConfig:
    """8-bit optimizer state, beside precision, recomputation and ranks: 8 of 16 combinations, at stage 0.

    From stage 1 on DeepSpeed hands an optimizer slices of many parameters, and the blocks of 8 bits would be others.
    """
    factors = {"optimizer": (ADAMW, ADAMW_8BIT), "precision": PRECISION, "recompute": RECOMPUTE, "ranks": RANKS}
    return _study("contribution-8bit", factors, ("llama-1m", "llama-10m"))
