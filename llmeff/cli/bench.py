"""`llmeff bench` compares step times of training loops; `llmeff bench mixers` measures mixers by sequence length."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_config, add_imports, check_json, run_config, write_with_picture


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser("bench", help="compare the step times of arms that take turns")
    add_config(parser)
    parser.add_argument(
        "--arm", action="append", default=[], dest="arms", metavar="ARM",
        help="a training loop to time: ours, bare, hf-trainer or FILE.py:FUNCTION; settings for this arm may follow, "
        "as in 'ours runtime.compile=model' (repeatable; each arm is compared with the first; default: ours and bare)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=5, metavar="N",
        help="fresh processes per arm, started one after another; confidence intervals are over processes (5)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="turns per arm, divided over its processes (30)"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps per turn (10)")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="warm-up steps of each process (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result and all turns to FILE as JSON")
    parser.set_defaults(command=run)
    subjects = parser.add_subparsers(metavar="mixers", title="benchmark mixers instead of arms")
    mixers = subjects.add_parser("mixers", help="measure the time and memory of mixers by sequence length")
    _add_mixers(mixers)
    mixers.set_defaults(command=run_mixers)


def _add_mixers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixer", action="append", default=[], dest="mixers", metavar="MIXER",
        help="a mixer; its settings may follow, as in 'sliding window=64' (repeatable; each mixer is compared with the "
        "first; default: all mixers, softmax first)",
    )  # fmt: skip
    parser.add_argument(
        "--length", action="append", type=int, default=[], dest="lengths", metavar="T",
        help="sequence length in tokens (repeatable, ascending; default: 512 to 16384 by doubling)",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=64, metavar="D", help="width of the residual stream (64)")
    parser.add_argument("--heads", type=int, default=2, metavar="N", help="number of heads, each D / N wide (2)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="number format (fp32)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device to compute on (cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (1)")
    parser.add_argument(
        "--processes",
        type=int,
        default=3,
        metavar="N",
        help="fresh processes, started one after another; confidence intervals are over processes (3)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each mixer per process (3)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all results to FILE as JSON, and a plot next to it as .png"
    )
    add_imports(parser)


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.core.files import reported, write_text
    from llmeff.lab.arms import bench, show

    result = bench(
        run_config(options),
        options.arms or ["ours", "bare"],
        rounds=options.rounds,
        steps=options.steps,
        warmup_steps=options.warmup,
        processes=options.processes,
        modules=options.imports,
    )
    sys.stdout.write(show(result) + "\n")
    if options.out is not None:
        with reported(options.out):
            write_text(options.out, json.dumps({"command": options.command_line} | result))
    return 0


def run_mixers(options: argparse.Namespace) -> int:
    """Runs `llmeff bench mixers`. Returns the exit code."""
    from llmeff.compare.verdict_table import terminal
    from llmeff.core.components import load_components
    from llmeff.lab.mixers import MixerRace, bench_mixers, picture, tables

    load_components(options.imports)
    race = MixerRace(
        mixers=tuple(options.mixers),
        lengths=tuple(options.lengths) or (512, 1024, 2048, 4096, 8192, 16384),
        width=options.width,
        num_heads=options.heads,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
        processes=options.processes,
        rounds=options.rounds,
        modules=tuple(options.imports),
    )
    check_json(options.out)
    result = bench_mixers(race)
    sys.stdout.write(terminal(tables(result)))
    if options.out is not None:
        write_with_picture(options.out, options.command_line, result, picture(result))
    return 0
