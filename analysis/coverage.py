"""Checks the statistics on studies with known truth: `python analysis/coverage.py` writes results/coverage.json.

The simulated studies are judged by the code that judges real ones: `judge`, `effects`, and `many_to_one`, which `judge`
calls for arms. Losses are log-normal around a value that arm, factors and seed determine. All random draws have fixed
seeds, so the results are reproducible.
"""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  the path above must come first
import numpy.typing as npt  # noqa: E402

from llmeff.compare.effects import effects  # noqa: E402
from llmeff.compare.intervals import many_to_one  # noqa: E402
from llmeff.compare.ledger import Entry  # noqa: E402
from llmeff.compare.row import ALPHA  # noqa: E402
from llmeff.compare.verdict import Comparison, judge  # noqa: E402
from llmeff.core.files import write_text  # noqa: E402

SD = 0.0075
"""Standard deviation of the log loss over seeds, typical of small models on text."""
BETTER = 0.985
"""Loss of an arm that is 1.5 % better, divided by the baseline's loss."""
FACTORS: dict[str, tuple[float, float]] = {
    "noisy": (-0.07, 0.02),
    "noisy, does nothing": (0.0, 0.02),
    "quiet": (0.001, 2e-4),
    "neutral": (0.0, 1e-5),
    "neutral too": (0.0, 1e-4),
}
"""True effect of each factor on the log loss, and the standard deviation of this effect over seeds."""


def run_of(arm: str, seed: int, log_loss: float, **more: Any) -> Entry:
    """Builds the ledger entry of a finished run with this log loss."""
    return Entry(
        name=f"{arm}/seed-{seed}", arm=arm, status="finished", seed=seed, steps=1, items=1, device="none",
        loss=math.exp(log_loss), **more,
    )  # fmt: skip


def factorial(generator: np.random.Generator, num_seeds: int, run_sd: float = 1e-5) -> list[Entry]:
    """Simulates half of all combinations of the factors, for each seed. No main effects or pairs are confounded."""
    found = []
    for seed in range(num_seeds):
        shared = generator.normal(0, 0.02)
        own = [generator.normal(*what) for what in FACTORS.values()]
        together = {pair: generator.normal(0, 1e-4) for pair in itertools.combinations(range(len(own)), 2)}
        for codes in itertools.product((-1, 1), repeat=len(own)):
            if math.prod(codes) < 0:
                continue
            log_loss = shared + sum(code / 2 * effect for code, effect in zip(codes, own, strict=True))
            log_loss += sum(codes[one] * codes[two] / 4 * effect for (one, two), effect in together.items())
            levels = {name: "high" if code > 0 else "low" for name, code in zip(FACTORS, codes, strict=True)}
            arm = "".join(map(str, codes))
            found.append(run_of(arm, seed, log_loss + generator.normal(0, run_sd), factors=levels))
    return found


def effect_coverage(num_studies: int, num_seeds: int = 6, seed: int = 0) -> dict[str, float]:
    """Returns how often the interval of each effect contains the truth. Pairs, without true effect, count together."""
    generator, covered = np.random.default_rng(seed), Counter[str]()
    for _ in range(num_studies):
        for effect in effects(factorial(generator, num_seeds), lambda run: run.loss).effects:
            is_pair = len(effect.factors) > 1
            truth = 1.0 if is_pair else math.exp(FACTORS[effect.factors[0]][0])
            is_covered = effect.ratio.lower <= truth <= effect.ratio.upper
            covered["pairs" if is_pair else effect.factors[0]] += is_covered
    counts = dict.fromkeys(FACTORS, num_studies) | {"pairs": num_studies * math.comb(len(FACTORS), 2)}
    return {name: covered[name] / count for name, count in counts.items()}


Logs = list[npt.NDArray[np.float64]]
"""Log losses: an array with the baseline's runs, then one for each arm."""


def drawn(
    generator: np.random.Generator, spreads: Sequence[float], runs: int, baseline_runs: int, ratio: float = 1.0
) -> Logs:
    """Draws the log losses of a baseline and of arms.

    Args:
        generator: the source of random numbers.
        spreads: standard deviation of each arm, as a multiple of the baseline's.
        runs: number of runs of each arm.
        baseline_runs: number of runs of the baseline.
        ratio: true loss of each arm, divided by the baseline's.
    """
    return [
        generator.normal(0, SD, baseline_runs),
        *(generator.normal(math.log(ratio), SD * spread, runs) for spread in spreads),
    ]


def study(logs: Logs, again: Sequence[float] = ()) -> Comparison:
    """Judges a simulated sweep with these log losses, and with an A/A arm if `again` has its log losses."""
    names = ["baseline", *(f"arm {place}" for place in range(len(logs) - 1))]
    entries = [run_of(name, seed, log) for name, own in zip(names, logs, strict=True) for seed, log in enumerate(own)]
    entries += [run_of("baseline (A/A)", 1000 + seed, log, repeats="baseline") for seed, log in enumerate(again)]
    return judge(entries, baseline="baseline")


def calls(comparison: Comparison) -> dict[str, bool]:
    """Returns for each arm whether the verdict is "better" or "worse"."""
    return {name: cell.call in ("better", "worse") for name, cell in comparison.groups[0].table["loss"].items()}


def family_error(
    num_studies: int, spreads: Sequence[float], runs: int, baseline_runs: int, seed: int
) -> tuple[float, float]:
    """Simulates studies of equal arms.

    Returns:
        the fraction of studies in which at least one arm is called different, and the fraction of arms that Dunnett's
        procedure judged.
    """
    generator, wrong, pooled = np.random.default_rng(seed), 0, 0
    for _ in range(num_studies):
        baseline, *arms = drawn(generator, spreads, runs, baseline_runs)
        found = many_to_one(baseline, arms)
        wrong += min(own.p_family for own in found) < ALPHA
        pooled += sum(own.method == "Dunnett" for own in found)
    return wrong / num_studies, pooled / num_studies / len(spreads)


def power(num_studies: int, arms: int, runs: int, baseline_runs: int, ratio: float, seed: int) -> float:
    """Returns how often an arm that truly differs is called different.

    All arms of a study differ, and each one counts, because the mean of one arm does not affect the verdict on another.
    """
    generator, found = np.random.default_rng(seed), 0
    for _ in range(num_studies):
        baseline, *others = drawn(generator, [1] * arms, runs, baseline_runs, ratio)
        found += sum(own.p_family < ALPHA for own in many_to_one(baseline, others))
    return found / num_studies / arms


def aa_error(num_studies: int, arms: int, runs: int, baseline_runs: int, seed: int) -> float:
    """Returns how often an A/A arm is called different from the baseline that it repeats."""
    generator, wrong = np.random.default_rng(seed), 0
    for _ in range(num_studies):
        found = study(drawn(generator, [1] * arms, runs, baseline_runs), generator.normal(0, SD, runs).tolist())
        wrong += calls(found)["baseline (A/A)"]
    return wrong / num_studies


FIRST = (13, 5, 15)
"""Number of arms, runs per arm and runs of the baseline in the design whose error rates are documented."""
OTHERS = ((4, 8, 16), (4, 3, 3))
"""Further designs that are measured."""


SHARD = 10_000
"""Number of studies that are drawn with one seed."""


def _shards(work: Callable[..., Any], pool: Executor, count: int, seed: int, *given: Any) -> list[Future[Any]]:
    """Starts `work` for `count` studies, divided into shards with a seed each."""
    each = min(count, SHARD)
    return [pool.submit(work, each, *given, seed=seed + shard) for shard in range(count // each)]


def measured() -> dict[str, dict[str, Any]]:
    """Measures everything on all cores. Simulates more studies where an error rate is close to its bound."""
    with ProcessPoolExecutor() as pool:
        asked: dict[str, dict[str, tuple[int, list[Future[tuple[float, float]]]]]] = {}
        for design, even, uneven in ((FIRST, 40_000, 120_000), *((own, 4_000, 4_000) for own in OTHERS)):
            arms, runs, baseline_runs = design
            asked[f"equal arms, {_called(design)}"] = {
                what: (count, _shards(family_error, pool, count, 10, spreads, runs, baseline_runs))
                for what, spreads, count in (
                    ("equal spreads", [1.0] * arms, even),
                    ("one arm of three times the spread", [3.0] + [1.0] * (arms - 1), uneven),
                )
            }
        powers = {ratio: _shards(power, pool, 40_000, 20, *FIRST, ratio) for ratio in (BETTER, 1.015)}
        others: dict[str, dict[str, Future[Any]]] = {
            "A/A called different, 4 arms x 8, baseline 16": {
                f"{count} sweeps": pool.submit(aa_error, count, 4, 8, 16, seed=30) for count in (500, 2_000)
            },
            "intervals of effects that hold the truth, 1000 factorials": {
                f"{num_seeds} seeds": pool.submit(effect_coverage, 1_000, num_seeds) for num_seeds in (3, 6)
            },
        }
        families = {
            what: {name: _shares(count, [own.result() for own in shards]) for name, (count, shards) in those.items()}
            for what, those in asked.items()
        }
        found = {
            f"ratio {ratio:.3f}": float(np.mean([own.result() for own in shards])) for ratio, shards in powers.items()
        }
        rest = {what: {name: own.result() for name, own in those.items()} for what, those in others.items()}
        return families | {f"power, {_called(FIRST)}, 40000 studies": found} | rest


def _shares(count: int, shards: Sequence[tuple[float, float]]) -> dict[str, float]:
    wrong, pooled = (sum(own) / len(shards) for own in zip(*shards, strict=True))
    return {"studies": count, "family_error": wrong, "judged by Dunnett's pooled procedure": pooled}


def _called(design: tuple[int, int, int]) -> str:
    return f"{design[0]} arms x {design[1]}, baseline {design[2]}"


if __name__ == "__main__":
    found = {"command": "python analysis/coverage.py", "sd_log_loss": SD} | measured()
    text = json.dumps(found, indent=1) + "\n"
    write_text(ROOT / "analysis" / "results" / "coverage.json", text)
    sys.stdout.write(text)
