"""Measures the time until a run's first step ends: `python analysis/startup.py` writes results/startup.json.

Each measurement is a fresh process on one thread with a warm token cache. The time of importing other packages is
separated from llmeff's own part: importing llmeff, reading the config, opening the data, building the model, creating
the run's folder, and the first step itself. torch imports one of its parts (`torch._dynamo`) only when an optimizer is
built; the time of that part counts as import time.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = ("debug", "default")
NUM_PROCESSES = 5


def seconds() -> dict[str, float]:
    """Returns the current wall and CPU clocks of this process, in seconds."""
    return {"wall_s": time.perf_counter(), "cpu_s": time.process_time()}


def since(began: dict[str, float]) -> dict[str, float]:
    """Returns the seconds that passed since `began`, a value of `seconds`."""
    now = seconds()
    return {name: now[name] - began[name] for name in began}


class FirstStepError(Exception):
    """Raised after a run's first step, to end the run."""


def first_step(recipe: str) -> None:
    """Runs `llmeff train` until the end of the first step."""
    from llmeff.cli import main
    from llmeff.run.loop import Trainer

    train_step = Trainer.train_step

    def step(trainer: Trainer) -> None:
        train_step(trainer)
        raise FirstStepError

    Trainer.train_step = step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FirstStepError):
        main(["train", "--recipe", recipe, "--set", "runtime.threads=1", "--out", f"{folder}/run"])


def modules(recipe: str) -> list[str]:
    """Returns the modules of other packages that are imported when the first step ends, in order of import."""
    first_step(recipe)
    ours = {"llmeff", "__main__"}
    return [name for name in sys.modules if name.split(".")[0] not in sys.stdlib_module_names | ours]


def measure(recipe: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Measures this process: seconds for importing the named modules, then for llmeff's own part."""
    began = seconds()
    for name in names:
        with contextlib.suppress(ImportError):  # some modules are created at run time and cannot be imported
            __import__(name)
    imports = since(began)
    began = seconds()
    first_step(recipe)
    return {"imports": imports, "ours": since(began)}


def run(*arguments: str, given: str = "") -> str:
    """Runs a fresh Python and returns its last line of output. Bytecode caching is enabled, as it is for users."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, input=given, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout.splitlines()[-1]


def show_help() -> dict[str, float]:
    """Returns the seconds of a whole process that prints the help."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run("-m", "llmeff.cli", "--help")
    wall_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main(path: Path, num_processes: int = NUM_PROCESSES) -> None:
    """Measures the recipes in turns, prints the medians, and writes all values."""
    import torch

    from llmeff.core.files import write_text
    from llmeff.record.environment import environment

    torch.set_num_threads(1)
    # The first run of each recipe also creates its token cache.
    names = {recipe: run(__file__, "modules", recipe) for recipe in RECIPES}
    turns = []
    for _ in range(num_processes):
        turn = {recipe: json.loads(run(__file__, "measure", recipe, given=names[recipe])) for recipe in RECIPES}
        turns.append(turn | {"help": {"all": show_help()}})
    medians = {
        what: {
            part: {clock: statistics.median(turn[what][part][clock] for turn in turns) for clock in clocks}
            for part, clocks in parts.items()
        }
        for what, parts in turns[0].items()
    }
    print(f"{'median of ' + str(num_processes):<20}{'wall':>10}{'CPU':>10}")
    for what, parts in medians.items():
        for part, clocks in parts.items():
            print(f"{what + ': ' + part:<20}{clocks['wall_s']:>8.2f} s{clocks['cpu_s']:>8.2f} s")
    facts = {"environment": environment(torch.device("cpu")).model_dump(mode="json"), "medians": medians}
    write_text(path, json.dumps(facts | {"turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["modules", recipe]:
            print(json.dumps(modules(recipe)))
        case ["measure", recipe]:
            print(json.dumps(measure(recipe, json.load(sys.stdin))))
        case [path]:
            main(Path(path))
        case _:
            main(Path(__file__).parent / "results" / "startup.json")
