"""The command line. Commands import what they need when they run, so that `--help` is quick."""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmeff import __version__
from llmeff.core import log
from llmeff.core.config import ConfigError
from llmeff.core.dist import is_launched, keep_folder_off_paths, world
from llmeff.core.files import refuse_links

if TYPE_CHECKING:
    from llmeff.runconfig import RunConfig
    from llmeff.sweepconfig import SweepConfig

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_MAIN_SPEAKS_S = 30.0
"""A rank that still lives after so long is alone with its error, and says it itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 where a run failed; 2 where the input is wrong, with one error and nothing touched; 130 on Ctrl-C.
    """
    if arguments is None:
        keep_folder_off_paths()
    options = _parser().parse_args(arguments)
    log.configure(quiet=getattr(options, "quiet", False))
    try:
        result: int = options.command(options)
    except ConfigError as error:
        return _fail(error.problems, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        if world().is_main:
            sys.stderr.write(log.complaint(["interrupted"]))
        return EXIT_INTERRUPTED
    return result


def _fail(problems: Sequence[str], code: int) -> int:
    """Says what is wrong, once: all ranks come here alike, and the launcher ends the others when the main one has."""
    if not world().is_main:
        time.sleep(_MAIN_SPEAKS_S)
    log.say_last(log.complaint(problems), code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmeff",
        description="A training harness and laboratory for the efficiency of large language models.",
    )
    parser.add_argument("--version", action="version", version=f"llmeff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model; record what it cost beside what was predicted")
    _add_config_options(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder; runs/NAME if left out")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    train.add_argument(
        "--restart-from-scratch", action="store_true", dest="anew",
        help="begin the unfinished run in --out anew, and keep what it recorded in DIR/discarded-N; with --resume, only "
        "where there is no whole checkpoint",
    )  # fmt: skip
    train.add_argument(
        "--restarts", type=int, default=0, metavar="N",
        help="go on by itself up to N times where the run ended abnormally",
    )  # fmt: skip
    train.add_argument("--print-config", action="store_true", help="print the config as JSON and stop")
    train.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    train.add_argument("--json", action="store_true", help="print the result as one JSON object")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="what a run will cost: parameters, memory by kind, FLOPs")
    _add_config_options(plan)
    plan.add_argument("--json", action="store_true", help="print the price as one JSON object")
    plan.set_defaults(command=_plan)

    sweep = commands.add_parser(
        "sweep", help="arms tuned with one budget, then run with fresh seeds; goes on by itself"
    )
    _add_config_options(sweep, kind="sweep")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder; sweeps/NAME if left out")
    sweep.add_argument("--cores", type=int, metavar="N", help="cores to use at a time; all if left out")
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print what will be run, and stop")
    instead.add_argument(
        "--timing", action="store_true",
        help="race the arms' final configs against one another for their step times, on a quiet machine",
    )  # fmt: skip
    instead.add_argument(
        "--slurm", action="store_true", help="write what submits the sweep to Slurm as arrays of jobs, and stop"
    )
    sweep.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="of --slurm: an option for every job, as in --sbatch=--time=2:00:00 (repeatable)",
    )  # fmt: skip
    instead.add_argument("--only", metavar="PHASE:N", help="one run of the sweep, as in tuning:3 or final:0")
    sweep.add_argument("--processes", type=int, metavar="N", help="of --timing: fresh processes of each arm (5)")
    sweep.add_argument("--rounds", type=int, metavar="N", help="of --timing: turns of each arm (30)")
    sweep.add_argument("--steps", type=int, metavar="N", help="of --timing: steps of a turn (10)")
    sweep.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    sweep.set_defaults(command=_sweep)

    compare = commands.add_parser("compare", help="runs side by side; arms against a baseline, with intervals")
    _add_compare_options(compare)
    compare.set_defaults(command=_compare)

    segment = commands.add_parser("segment", help="what a trained model makes of pictures: masks, overlays, scores")
    _add_segment_options(segment)
    segment.set_defaults(command=_segment)

    context = commands.add_parser(
        "context",
        help="language models on longer windows than their own: loss by position, of what stood before, speed",
    )
    _add_context_options(context)
    context.set_defaults(command=_context)

    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="step times of arms that take turns: ratios with intervals")
    _add_config_options(bench)
    bench.add_argument(
        "--arm", action="append", default=[], dest="arms", metavar="ARM",
        help="ours, bare, hf-trainer, or FILE.py:FUNCTION, with settings of its own as in 'ours runtime.compile=model' "
        "(repeatable; the first is set beside all others)",
    )  # fmt: skip
    bench.add_argument(
        "--processes", type=int, default=5, metavar="N",
        help="fresh processes of each arm, one after another; the intervals are over them",
    )  # fmt: skip
    bench.add_argument("--rounds", type=int, default=30, metavar="N", help="turns of each arm, over all its processes")
    bench.add_argument("--steps", type=int, default=10, metavar="N", help="steps of a turn")
    bench.add_argument("--warmup", type=int, default=10, metavar="N", help="steps of a process before its first round")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write all turns as JSON")
    bench.set_defaults(command=_bench)
    subjects = bench.add_subparsers(metavar="mixers", title="instead of arms")
    mixers = subjects.add_parser("mixers", help="what each mixer takes and keeps as sequences grow")
    _add_mixer_options(mixers)
    mixers.set_defaults(command=_bench_mixers)


def _add_context_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folders of runs that have ended")
    parser.add_argument("--times", type=int, default=4, metavar="N", help="the longest window, in training lengths (4)")
    parser.add_argument(
        "--gram", type=int, default=2, metavar="N", help="tokens of a run that counts as repeated (2: bigrams)"
    )
    parser.add_argument("--split", default="validation", help="whose text is read (validation)")
    parser.add_argument("--max-tokens", type=int, default=2**17, metavar="N", help="the split's first so many (131072)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all as JSON, and a picture of that name ending in .png"
    )
    _add_imports(parser)


def _add_mixer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixer", action="append", default=[], dest="mixers", metavar="MIXER",
        help="a mixer, with settings of its own as in 'sliding window=64' (repeatable; the first is set beside all others; "
        "softmax and all others if left out)",
    )  # fmt: skip
    parser.add_argument(
        "--length", action="append", type=int, default=[], dest="lengths", metavar="T",
        help="tokens (repeatable, ascending; 512 to 16384 by doubling if left out)",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=64, metavar="D", help="of the residual stream (64)")
    parser.add_argument("--heads", type=int, default=2, metavar="N", help="heads of D / N (2)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="number formats (fp32)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where it computes (cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU (1)")
    parser.add_argument(
        "--processes", type=int, default=3, metavar="N", help="one after another; intervals are over them (3)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each mixer in a process (3)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all times as JSON, and a picture of that name ending in .png"
    )
    _add_imports(parser)


def _add_config_options(parser: argparse.ArgumentParser, kind: str = "run") -> None:
    source = parser.add_mutually_exclusive_group()
    default = "; `default` if nothing is given" if kind == "run" else ""
    source.add_argument("--recipe", metavar="NAME", help=f"a named {kind}{default}")
    source.add_argument("--config", type=Path, metavar="FILE", help=f"a {kind}'s config, TOML or JSON")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change one value of the config (repeatable)",
    )
    _add_imports(parser)


def _add_segment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that has ended")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="pictures, and folders of them")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder for what is made")
    parser.add_argument("--masks", type=Path, metavar="MASKS", help="a folder with the truth, by the pictures' names")
    parser.add_argument(
        "--beside", type=Path, nargs="+", action="extend", default=[], metavar="RUN",
        help="other runs to set beside it",
    )  # fmt: skip
    _add_imports(parser)


def _add_imports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE",
        help="import a module that registers components of your own (repeatable)",
    )  # fmt: skip


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders, sweeps' folders, or ledger files"
    )
    parser.add_argument("--baseline", metavar="ARM", help="what the others are set beside; the sweep's, or the first")
    parser.add_argument("--metric", metavar="NAME", help="what decides, as in bits_per_byte; the sweep's, or the loss")
    parser.add_argument(
        "--target", type=float, metavar="VALUE", help="count steps, FLOPs and time to this value of the metric"
    )
    parser.add_argument("--timing", type=Path, metavar="FILE", help="step times, of `llmeff sweep --timing`")
    parser.add_argument("--mixed", action="store_true", help="compare runs of other data or budgets, and say so")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page that holds everything")
    parser.add_argument(
        "--format",
        choices=("terminal", "markdown", "csv", "json"),
        default="terminal",
        help="of the table",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of the metric as a PNG")


def _config(options: argparse.Namespace) -> "RunConfig":
    from llmeff.core.components import load_components
    from llmeff.core.config import override, read, validate
    from llmeff.launch import supplied
    from llmeff.recipes import RECIPES
    from llmeff.runconfig import RunConfig

    load_components(options.imports)
    if options.config is not None:
        data = read(options.config)
    else:
        name = options.recipe or "default"
        if name not in RECIPES:
            raise ConfigError(RECIPES.unknown(name))
        data = RECIPES[name]().model_dump(mode="json")
    return validate(RunConfig, supplied(override(data, options.set)))


def _go_on_from(options: argparse.Namespace) -> None:
    """Where a run is resumed or begun anew and no config is named, it is the run's own.

    Raises:
        ConfigError: there is no run, or something in its folder leads out of it.
    """
    flag = "--resume" if options.resume else "--restart-from-scratch"
    if options.out is None:
        raise ConfigError(f"{flag} needs --out DIR, the folder of the run to go on with")
    own = options.out / "config.json"
    if not own.is_file():
        raise ConfigError(f"{flag}: {options.out} holds no config.json, so there is no run to go on with")
    refuse_links(options.out)
    if options.recipe or options.config:
        return
    options.config = own
    if any(setting.split("=")[0].split(".")[0].strip() == "parallel" for setting in options.set):
        # what was resolved for the old ranks; a setting of the user's comes after and wins
        options.set = ["train.micro_batch=auto", "runtime.threads=auto", *options.set]


def _free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that is not there yet."""
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def _train(options: argparse.Namespace) -> int:
    if options.restarts < 0:
        raise ConfigError(f"--restarts {options.restarts}: how often a run may go on by itself is 0 or more")
    given = _arguments(options)
    if options.resume or options.anew:
        _go_on_from(options)
    config = _config(options)
    if options.print_config:
        sys.stdout.write(config.model_dump_json(indent=2) + "\n")
        return 0
    folder = options.out or _free_folder(config.name)
    if options.restarts and is_launched():
        raise ConfigError("--restarts is for llmeff train itself: where a launcher starts it, the launcher restarts")
    if not is_launched() and (config.parallel.ranks > 1 or options.restarts):
        return _start(options, config, folder, given)
    with log.engines_apart() if config.parallel.joins else contextlib.nullcontext():
        return _train_here(options, config, folder)


def _arguments(options: argparse.Namespace) -> list[str]:
    """What was given, for the processes that train: all but the folder, and whether they go on."""
    given = [f"--{name}={value}" for name in ("recipe", "config") if (value := getattr(options, name)) is not None]
    given += [f"--set={setting}" for setting in options.set] + [f"--import={module}" for module in options.imports]
    return given + [f"--{name}" for name in ("quiet", "json") if getattr(options, name)]


def _start(options: argparse.Namespace, config: "RunConfig", folder: Path, given: list[str]) -> int:
    """Trains in processes of its own."""
    from llmeff.launch import command, going_on, run
    from llmeff.prepare import check_world
    from llmeff.record.writer import check_free

    check_world(config, is_started=False)
    asked = [flag for flag, given in (("--resume", options.resume), ("--restart-from-scratch", options.anew)) if given]
    if not asked:
        check_free(folder)
    elif options.restarts and not options.anew:
        asked = [going_on(folder)]

    def start(how: Sequence[str]) -> list[str]:
        return command(config, [*given, f"--out={folder}", *(how or asked)])

    def tell(line: str) -> None:
        if not (options.quiet or options.json):
            sys.stderr.write(f"llmeff: starting {line}\n")

    return run(start, folder, restarts=options.restarts, tell=tell)


def _train_here(options: argparse.Namespace, config: "RunConfig", folder: Path) -> int:
    """Trains in this process: the only one of the run, or one that a launcher started."""
    from llmeff.core import group
    from llmeff.loop import DivergedError, train

    try:
        is_silent = options.quiet or options.json
        result = train(config, folder, resume=options.resume, anew=options.anew, is_silent=is_silent)
    except DivergedError as failure:
        return _fail([str(failure)], EXIT_FAILED)
    group.disconnect()
    if options.json and world().is_main:
        log.out().write(json.dumps(result.model_dump(mode="json")) + "\n")
        log.out().flush()
    return 0


def _plan(options: argparse.Namespace) -> int:
    from llmeff.predict import plan, show_plan

    planned = plan(_config(options))
    sys.stdout.write((json.dumps(planned.as_dict()) if options.json else show_plan(planned)) + "\n")
    return 0


def _sweep_config(options: argparse.Namespace) -> "SweepConfig":
    from llmeff.core.components import load_components
    from llmeff.core.config import override, read, validate
    from llmeff.recipes import SWEEPS
    from llmeff.sweepconfig import SweepConfig

    load_components(options.imports)
    if options.config is not None:
        data = read(options.config)
    elif options.recipe in SWEEPS:
        data = SWEEPS[options.recipe]().model_dump(mode="json")
    else:
        raise ConfigError(
            SWEEPS.unknown(options.recipe) if options.recipe else
            f"--recipe or --config names a sweep. Known: {', '.join(SWEEPS.names())}."
        )  # fmt: skip
    return validate(SweepConfig, override(data, options.set))


def _place(text: str) -> tuple[str, int]:
    phase, _, number = text.partition(":")
    if phase not in ("tuning", "final") or not number.isdecimal():
        raise ConfigError(f"--only {text!r}: give tuning:N or final:N, N counted from 0")
    return phase, int(number)


def _lane(options: argparse.Namespace) -> dict[str, int]:
    """What was asked of a timing lane; what belongs to a mode that is not asked for is refused."""
    given = {name: value for name in ("processes", "rounds", "steps") if (value := getattr(options, name)) is not None}
    if given and not options.timing:
        raise ConfigError(f"--{next(iter(given))} is of the timing lane: give --timing too")
    if options.sbatch and not options.slurm:
        raise ConfigError("--sbatch is for the jobs that --slurm writes: give both")
    return given


def _sweep(options: argparse.Namespace) -> int:
    from llmeff.compare.study import read_study
    from llmeff.compare.verdict_table import render_comparison
    from llmeff.core.dist import usable_cores
    from llmeff.sweep import Sweep, check_cores, plan_text, write_slurm, write_timing

    sweep = _sweep_config(options)
    cores = usable_cores() if options.cores is None else options.cores
    lane = _lane(options)
    if cores < 1:
        raise ConfigError(f"--cores {cores}: at least 1")
    if options.cores is not None:
        check_cores(sweep, cores)
    folder = options.out or Path("sweeps") / sweep.name
    if options.plan:
        sys.stdout.write(plan_text(sweep) + "\n")
        return 0

    if options.slurm:
        script = write_slurm(sweep, folder, modules=options.imports, more=options.sbatch)
        sys.stdout.write(f"bash {shlex.quote(str(script))}\n")
        return 0

    def tell(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"llmeff: {line}\n")

    command = shlex.join(["llmeff", *sys.argv[1:]])
    if options.only is not None:
        phase, number = _place(options.only)
        one = Sweep(sweep, folder, cores=cores, modules=options.imports, command=command, tell=tell)
        return 0 if one.run_one(phase, number) else EXIT_FAILED
    if options.timing:
        write_timing(sweep, folder, modules=options.imports, command=command, **lane)
    else:
        tell(plan_text(sweep))
        whole = Sweep(sweep, folder, cores=cores, modules=options.imports, command=command, tell=tell)
        whole.run()
        if failure := whole.failure():
            return _fail([failure], EXIT_FAILED)
    sys.stdout.write(render_comparison(read_study([folder]), "terminal") + "\n")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from llmeff.compare.ledger import read_entries
    from llmeff.compare.report import write_report
    from llmeff.compare.study import is_list, name_of, read_study, write_pictures
    from llmeff.compare.verdict_table import render_comparison

    entries = read_entries(options.runs)
    asked = (options.baseline, options.target, options.metric, options.timing, options.html)
    wants_arms = any(own is not None for own in asked)
    if is_list(options.runs, entries) and not (wants_arms or options.mixed):
        from llmeff.compare.table import compare, render
        from llmeff.compare.verdict import differences

        notes = [f"these runs are not of one kind: {text}" for text in differences(entries)]
        if options.format == "csv":
            for note in notes:
                log.logger.warning(note)
        sys.stdout.write(render(compare(options.runs), options.format, notes=notes) + "\n")
        if options.plot is not None:
            from llmeff.compare.plots import loss_curve
            from llmeff.record.reader import read_run

            loss_curve([read_run(folder) for folder in options.runs], options.plot)
        return 0
    comparison = read_study(
        options.runs, entries, baseline=options.baseline, target=options.target, metric=options.metric,
        timing=options.timing, mixed=options.mixed,
    )  # fmt: skip
    if options.html is not None:
        write_report(comparison, options.html, name_of(options.runs, entries))
    if options.plot is not None:
        write_pictures(comparison, options.plot)
    if options.format == "csv":
        for note in comparison.notes:
            log.logger.warning(note)
    sys.stdout.write(render_comparison(comparison, options.format) + "\n")
    return 0


def _segment(options: argparse.Namespace) -> int:
    from llmeff.core.components import load_components
    from llmeff.segment import segment

    load_components(options.imports)
    told = segment(options.run, options.images, options.out, masks=options.masks, beside=options.beside)
    sys.stdout.write(told + "\n")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from llmeff.bench import bench, show
    from llmeff.core.files import reported, write_text

    result = bench(
        _config(options),
        options.arms or ["ours", "bare"],
        rounds=options.rounds,
        steps=options.steps,
        warmup_steps=options.warmup,
        processes=options.processes,
        modules=options.imports,
    )
    sys.stdout.write(show(result) + "\n")
    if options.out is not None:
        command = shlex.join(["llmeff", *sys.argv[1:]])
        with reported(options.out):
            write_text(options.out, json.dumps({"command": command} | result))
    return 0


def _context(options: argparse.Namespace) -> int:
    from llmeff.compare.verdict_table import terminal
    from llmeff.core.components import load_components
    from llmeff.core.registry import nearest
    from llmeff.data.splits import SPLITS
    from llmeff.long_range import as_json, long_range, picture, tables

    load_components(options.imports)
    if options.split not in SPLITS:
        raise ConfigError(f"--split {options.split!r}: there is no such split.{nearest(options.split, SPLITS)}")
    _check_json(options.out)
    found = long_range(
        options.runs, times=options.times, gram=options.gram, split=options.split, max_tokens=options.max_tokens
    )
    sys.stdout.write(terminal(tables(found)))
    if options.out is not None:
        _write_with_picture(options.out, as_json(found), picture(found))
    return 0


def _check_json(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: is a file of JSON, and ends in .json")


def _write_with_picture(out: Path, result: dict[str, Any], png: bytes) -> None:
    from llmeff.core.files import reported, write_bytes, write_text

    command = shlex.join(["llmeff", *sys.argv[1:]])
    with reported(out):
        write_text(out, json.dumps({"command": command} | result, indent=1) + "\n")
        write_bytes(out.with_suffix(".png"), png)


def _bench_mixers(options: argparse.Namespace) -> int:
    from llmeff.compare.verdict_table import terminal
    from llmeff.core.components import load_components
    from llmeff.mixer_bench import MixerRace, bench_mixers, every_mixer, picture, tables

    load_components(options.imports)
    race = MixerRace(
        mixers=tuple(options.mixers) or every_mixer(),
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
    _check_json(options.out)
    result = bench_mixers(race)
    sys.stdout.write(terminal(tables(result)))
    if options.out is not None:
        _write_with_picture(options.out, result, picture(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
