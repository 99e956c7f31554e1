"""Times mixers beside the layers of flash-linear-attention (fla) on a GPU: `python analysis/fla_layers.py`.

Writes results/fla_layers.json. A step is forward and backward of a single layer in bfloat16 by autocast. All layers
have the same width and number of heads. The forms of a mixer take turns in one process: llmeff's layer with fla's
kernels, the same compiled, llmeff's layer with torch only, and fla's own layer. Times are ratios to fla's own layer;
above 1 is slower. The outputs and gradients of llmeff's layer with fla's kernels are compared with those of torch.
fla's Mamba-2 is left out, because it needs further packages.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmeff.attention.mixer import Mixer
from llmeff.compare.intervals import ratio_interval
from llmeff.core import kernels
from llmeff.core.config import validate
from llmeff.core.layout import Layout
from llmeff.cost.workload import Workload
from llmeff.models import DecoderConfig
from llmeff.models.transformer import Layer
from llmeff.record.environment import environment

LAYERS = {
    "retention": "MultiScaleRetention", "gla": "GatedLinearAttention", "deltanet": "DeltaNet",
    "gated-deltanet": "GatedDeltaNet", "kda": "KimiDeltaAttention",
}  # fmt: skip
"""Names of mixers, with the class of the corresponding fla layer."""
TURN_S = 0.03
"""Minimum duration of a turn, in seconds. A turn repeats its step until then."""


def theirs(name: str, width: int, heads: int) -> nn.Module:
    """Builds fla's layer of a mixer."""
    from fla import layers

    given: dict[str, Any] = {"hidden_size": width, "num_heads": heads}
    if name in ("gated-deltanet", "kda"):
        given |= {"head_dim": width // heads, "expand_v": 1}
    layer: nn.Module = getattr(layers, LAYERS[name])(**given)
    return layer


def config_of(name: str, width: int, heads: int, kernel: str) -> DecoderConfig:
    """Returns the config of a model with one layer, the mixer, and no MLP."""
    given = {"width": width, "num_heads": heads, "num_layers": 1, "vocab_size": 8, "layers": [{"has_mlp": False}]}
    return validate(DecoderConfig, given | {"mixer": {"name": name, "kernel": kernel}})


def ours(name: str, width: int, heads: int, kernel: str) -> Mixer:
    """Builds llmeff's layer of a mixer with initial weights."""
    layer = cast(Layer, config_of(name, width, heads, kernel).build().layers[0])
    return layer.self_attn


def forms(name: str, width: int, heads: int, length: int, device: torch.device) -> dict[str, tuple[nn.Module, Any]]:
    """Returns each form of a mixer by name: its module, and a function that maps (B, T, D) to (B, T, D)."""
    layout = Layout.plain(length, device)
    found: dict[str, tuple[nn.Module, Any]] = {}
    weights = ours(name, width, heads, "torch").state_dict()
    for form, kernel in (("their kernels", "fla"), ("their kernels, compiled", "fla"), ("torch", "torch")):
        mixer = ours(name, width, heads, kernel)
        mixer.load_state_dict(weights)
        mixer.to(device)
        mixer.prepare(layout, 1, torch.bfloat16)
        call: Any = torch.compile(mixer) if form.endswith("compiled") else mixer
        found[form] = mixer, lambda x, call=call: call(x, layout)
    layer = theirs(name, width, heads).to(device)
    return found | {"their layer": (layer, lambda x: layer(x)[0])}


def stepper(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Returns a function that runs one step: forward, and the gradients of the weights and the input."""
    leaves = [x, *module.parameters()]

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = run(x)
        torch.autograd.grad(out, leaves, out.detach())

    return step


def differences(found: dict[str, tuple[nn.Module, Any]], x: Tensor) -> dict[str, float]:
    """Compares fla's kernels with torch: relative differences (by norm) of the output and of the worst gradient."""
    given = []
    for form in ("their kernels", "torch"):
        module, run = found[form]
        with torch.autocast(x.device.type, torch.bfloat16):
            out = run(x)
        given.append([out, *torch.autograd.grad(out, [x, *module.parameters()], out.detach())])
    errors = [((own - other).float().norm() / other.float().norm()).item() for own, other in zip(*given, strict=True)]
    return {"output": errors[0], "worst_gradient": max(errors[1:])}


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Returns the mean seconds of a step over `repeats` steps, measured by device events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def race(name: str, options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Measures the forms of a mixer at a length: seconds of a step, and peak bytes in addition to the weights."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    x = torch.randn(options.tokens // length, length, options.width, device=device, requires_grad=True)
    all_forms = forms(name, options.width, options.heads, length, device)
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, Any] = {"differences": differences(all_forms, x), "forms": {}}
    for form, (module, run) in all_forms.items():
        step = stepper(module, run, x)
        with kernels.noted() as ran:
            step()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        steps[form] = step
        found["forms"][form] = {
            "kernels": list(ran),
            "parameters": sum(weight.numel() for weight in module.parameters()),
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
        }
    repeats = {form: max(3, math.ceil(TURN_S / seconds(step, 3))) for form, step in steps.items()}
    turns: dict[str, list[float]] = {form: [] for form in steps}
    for number in range(options.rounds):
        order = list(steps)
        for form in order[number % len(order) :] + order[: number % len(order)]:
            turns[form].append(seconds(steps[form], repeats[form]))
    reference = turns["their layer"]
    for form, own in turns.items():
        logs = [math.log(value / other) for value, other in zip(own, reference, strict=True)]
        found["forms"][form] |= {"seconds": own, "ratio": asdict(ratio_interval(logs))}
    return found


def main() -> None:
    """Times every mixer at every length and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[2048, 16384], help="tokens in a row, one or more lengths"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fla_layers.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.name:
        work = Workload(num_sequences=1, num_tokens=1, precision_name="bf16", num_threads=1, on_cpu=False)
        if lacking := [*config_of(name, options.width, options.heads, "fla").problems(work)]:
            sys.stdout.write(f"{'; '.join(lacking)}\n")
            continue
        for length in options.length:
            torch.compiler.reset()
            found.setdefault(name, {})[str(length)] = raced = race(name, options, length)
            shown = (f"{form} {1e3 * statistics.median(own['seconds']):.2f} ms ({own['ratio']['value']:.2f})"
                     for form, own in raced["forms"].items())  # fmt: skip
            sys.stdout.write(f"{name} at {length}: {', '.join(shown)}; {raced['differences']}\n")
            sys.stdout.flush()
            write(options, found)


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes the results so far."""
    result = {
        "command": shlex.join(["python", "analysis/fla_layers.py", *sys.argv[1:]]),
        "width": options.width,
        "num_heads": options.heads,
        "tokens": options.tokens,
        "environment": environment(torch.device("cuda")).model_dump(mode="json"),
        "layers": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
