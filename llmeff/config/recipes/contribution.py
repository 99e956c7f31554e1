"""Sweeps that measure the effect of each efficiency technique and of pairs of them: fractional factorial designs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.optimizers import ADAMW_RATES, SGD_RATES
from llmeff.config.recipes.recipe import sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, Search, SweepConfig
from llmeff.core.config import override, validate
from llmeff.models.transformer import PRESETS
from llmeff.optim import Cosine


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a factor."""

    name: str
    """Name of the level."""
    settings: tuple[str, ...]
    """Settings of this level, in the form of `--set`."""
    search: Mapping[str, Search] = field(default_factory=dict)
    """Fields to tune at this level, with the values to try for each."""
    tuned_as: str | None = None
    """Another level of the same factor, whose tuned settings this level reuses. None if it reuses none."""

    @property
    def tuned_name(self) -> str | None:
        """Name of the level whose tuned settings this level uses: `tuned_as` or its own. None if nothing is tuned."""
        return self.tuned_as or (self.name if self.search else None)


SGD = Level(name="sgd", settings=("optim=sgd",), search={"optim.lr": SGD_RATES})
ADAMW = Level(name="adamw", settings=("optim=adamw",), search={"optim.lr": ADAMW_RATES})
ADAMW_8BIT = Level(name="adamw8bit", settings=("optim=adamw8bit",), tuned_as="adamw")


def _pair(key: str, first: tuple[str, str], second: tuple[str, str]) -> tuple[Level, Level]:
    return (
        Level(name=first[0], settings=(f"{key}={first[1]}",)),
        Level(name=second[0], settings=(f"{key}={second[1]}",)),
    )


PRECISION = _pair("precision", ("fp32", "fp32"), ("bf16", "bf16"))
RECOMPUTE = _pair("runtime.recompute", ("keep", "false"), ("recompute", "true"))
RANKS = _pair("parallel.ranks", ("1 rank", "1"), ("2 ranks", "2"))
STAGE = _pair("parallel.stage", ("zero 0", "0"), ("zero 3", "3"))


def half_fraction(factors: Mapping[str, tuple[Level, Level]]) -> dict[str, ArmConfig]:
    """Returns arms for half of all combinations of two-level factors, a half-fraction factorial design.

    These are the combinations with an even number of factors at their second level. With five factors, the design has
    resolution V: main effects and pairs are not confounded with one another (Box, Hunter and Hunter 2005, chapter 6).

    The first arm has all factors at their first level. Each combination of levels with a
    search is tuned in the first arm that has it. The other arms with this combination reuse the tuned settings, so that
    they differ only in their factors.
    """
    arms: dict[str, ArmConfig] = {}
    tuners: dict[tuple[str, ...], str] = {}
    for levels in _half_of_combinations(factors):
        name = ", ".join(level.name for level in levels.values())
        tuned_levels = tuple(level.tuned_name for level in levels.values() if level.tuned_name is not None)
        tuner = tuners.setdefault(tuned_levels, name)
        is_tuner = tuner == name
        arms[name] = ArmConfig(
            settings=tuple(setting for level in levels.values() for setting in level.settings),
            search=_joint_search(levels.values()) if is_tuner else {},
            tuned_as=tuner if tuned_levels and not is_tuner else None,
            factors={factor: level.name for factor, level in levels.items()},
        )
    return arms


def _half_of_combinations(factors: Mapping[str, tuple[Level, Level]]) -> Iterator[dict[str, Level]]:
    """Yields each combination with an even number of factors at their second level, as the level of each factor."""
    for places in itertools.product((0, 1), repeat=len(factors)):
        if sum(places) % 2 == 0:
            yield {factor: levels[place] for (factor, levels), place in zip(factors.items(), places, strict=True)}


def _joint_search(levels: Iterable[Level]) -> dict[str, Search]:
    return {key: tried for level in levels for key, tried in level.search.items()}


def factorial(
    name: str,
    factors: Mapping[str, tuple[Level, Level]],
    base: RunConfig,
    metric: str,
    seeds: tuple[int, ...] = tuple(range(6)),
) -> SweepConfig:
    """Returns a sweep over half of the combinations of factors. All runs use DeepSpeed, which supports every level.

    Args:
        name: name of the study.
        factors: the two levels of each factor, by the factor's name.
        base: the config that all runs start from. Few steps and little held-out text keep a study short on CPUs without
            AMX or AVX512_BF16, where bf16 products are slow.
        metric: the metric that chooses trials and compares arms.
        seeds: seeds of the final runs. The variation over seeds shows whether an effect on quality is real.
    """
    arms = half_fraction(factors)
    shared = validate(RunConfig, override(base.model_dump(mode="json"), ["parallel=deepspeed", "parallel.stage=0"]))
    return SweepConfig(name=name, base=shared, arms=arms, baseline=next(iter(arms)), metric=metric, seeds=seeds)


def _study(
    name: str,
    factors: Mapping[str, tuple[Level, Level]],
    model: str,
    steps: int,
    num_evaluations: int = 16,
    seeds: tuple[int, ...] = tuple(range(6)),
) -> SweepConfig:
    base = RunConfig(
        model=PRESETS[model](),
        data=one_text(validation=0.002, search=0.02),
        schedule=Cosine(warmup_steps=steps // 8),
        train=TrainConfig(steps=steps, batch=4, micro_batch=2),
        evaluation=EvalConfig(every=1 / num_evaluations, max_units=None, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(threads=1),
    )
    return factorial(name, factors, base, "loss", seeds)


FACTORS = {
    "optimizer": (SGD, ADAMW), "precision": PRECISION, "recompute": RECOMPUTE, "ranks": RANKS, "stage": STAGE,
}  # fmt: skip


@sweep_recipe
def contribution() -> SweepConfig:
    """Measures the effects of optimizer, precision, recomputation, ranks and ZeRO stage on a model of 1M parameters.

    Runs 16 of the 32 combinations, with six seeds each. On a faster machine, use more steps and a larger model: `--set
    base.train.steps=2000 --set base.model=llama-125m`.
    """
    return _study("contribution", FACTORS, "llama-1m", steps=96)


@sweep_recipe
def contribution_10m() -> SweepConfig:
    """Measures the effects of the same factors as `contribution` on the cost of a model of 10M parameters.

    Do not compare losses: with 12 steps, they only reflect the start of training.
    """
    return _study("contribution-10m", FACTORS, "llama-10m", steps=12, num_evaluations=4, seeds=(0, 1))


@sweep_recipe
def contribution_8bit() -> SweepConfig:
    """Measures the effects of 8-bit optimizer state, precision, recomputation and ranks: 8 of 16 combinations.

    All runs use ZeRO stage 0. From stage 1 on, DeepSpeed gives the optimizer slices that contain several parameters,
    which would change the blocks of 8-bit state.
    """
    factors = {"optimizer": (ADAMW, ADAMW_8BIT), "precision": PRECISION, "recompute": RECOMPUTE, "ranks": RANKS}
    return _study("contribution-8bit", factors, "llama-1m", steps=96)
