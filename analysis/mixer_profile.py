"""Profiles a step of each mixer on a CPU: `python analysis/mixer_profile.py` writes results/mixer_profile.json.

The layers are those of `llmeff bench mixers`. The time of a torch operation excludes operations that it calls; the
remaining time is Python and autograd. Everything runs in one process on one thread. The rates of products can be
compared with the reference rate of `llmeff bench mixers`: a batched product of 64 rows by 64 columns over the width of
a head. The profiler adds overhead, so the script reports shares of time instead of absolute times.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmeff.lab.mixers import MixerRace, matmul_rate
from llmeff.models.single_layer import VOCABULARY, mixer_names
from llmeff.record.environment import environment

KINDS = {
    "batched products": ("bmm", "baddbmm"),
    "products with weights": ("mm", "addmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "solves": ("linalg_solve_triangular",),
    "convolutions": ("mkldnn_convolution", "convolution"),
    "exponentials": ("exp", "softplus", "sigmoid", "silu", "elu", "_log_softmax", "log_sigmoid", "logsumexp"),
    "copies": ("copy", "cat", "clone", "fill", "zero", "constant_pad_nd", "index_select", "gather", "scatter", "index",
               "repeat_interleave", "embedding", "embedding_dense"),
    "elementwise": ("mul", "add", "sub", "div", "neg", "masked_fill", "tril", "where", "sum", "pow", "rsqrt", "clamp",
                    "clamp_min", "mean", "max", "amax", "cumsum", "flip", "addcmul", "square", "ge", "le", "reciprocal",
                    "log", "maximum", "cummax", "threshold", "nll_loss"),
}  # fmt: skip
"""Names of torch operations by kind, without suffixes such as `_backward` and the `_` of in-place operations."""
ROUNDS = 3


def kind_of(operation: str) -> str:
    """Returns the kind of a profiled operation."""
    if not operation.startswith("aten::"):
        return "Python and autograd"
    name = operation.removeprefix("aten::")
    for ending in ("_overrideable", "_forward", "_backward", "_data"):
        name = name.removesuffix(ending)
    name = name if name in KINDS["attention"] else name.removesuffix("_")
    return next((kind for kind, names in KINDS.items() if name in names), "views and other")


def shares(step: Any) -> dict[str, Any]:
    """Returns the shares of a step's time by kind, and the rates of both kinds of products in FLOP/s."""
    step()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        for _ in range(ROUNDS):
            step()
    seconds: dict[str, float] = {}
    unknown: dict[str, float] = {}
    flops: dict[str, float] = {}
    for row in found.key_averages():
        kind = kind_of(row.key)
        if kind == "views and other":
            unknown[row.key] = row.self_cpu_time_total / 1e6
        seconds[kind] = seconds.get(kind, 0.0) + row.self_cpu_time_total / 1e6
        flops[kind] = flops.get(kind, 0.0) + (row.flops or 0)
    total = sum(seconds.values())
    return {
        "shares": {kind: passed / total for kind, passed in sorted(seconds.items(), key=lambda item: -item[1])},
        "other": {name: passed / total for name, passed in unknown.items() if passed >= 0.01 * total},
        "flops_per_s": {kind: flops[kind] / seconds[kind] for kind in list(KINDS)[:2] if seconds.get(kind)},
    }


def main() -> None:
    """Profiles every mixer and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixer_profile.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    race = MixerRace(mixers=mixer_names(), lengths=(options.length, 2 * options.length, 4 * options.length))
    tokens = torch.randint(VOCABULARY, (1, options.length))
    mixers = {}
    for name, config in race.configs().items():
        model = config.build()

        def step(model: Any = model) -> None:
            model(tokens, targets=tokens).backward()
            model.zero_grad(set_to_none=True)

        mixers[name] = shares(step)
        shown = ", ".join(f"{kind} {share:.0%}" for kind, share in mixers[name]["shares"].items() if share >= 0.01)
        sys.stdout.write(f"{name}: {shown}\n")
    result = {
        "command": "python analysis/mixer_profile.py",
        "length": options.length,
        "width": race.width,
        "num_heads": race.num_heads,
        "product_flops_per_s": matmul_rate(race, torch.device("cpu")),
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
        "mixers": mixers,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
