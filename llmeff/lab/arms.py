"""Timing runs. Arms take turns in random order, each in its own process. Step times are compared within rounds."""

import importlib
import importlib.util
import itertools
import math
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from llmeff.compare.intervals import Estimate
from llmeff.config.run import RunConfig
from llmeff.core.components import load_components
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import become_rank, free_port
from llmeff.lab.race import Generation, Racer, difference, ratio, run_generations, spawn, take_turns
from llmeff.record.environment import environment

Tick = Callable[[], None]
"""A function that an arm calls after every step. It returns when the next step may begin."""
Arm = Callable[[RunConfig, Tick], None]
"""A function that trains with a config. It runs until a tick ends the process."""

NOISE = 0.1
"""A round is noisy if other processes used more than this many cores, on average, during one of its turns."""
_MANY_STEPS = 1_000_000
"""More steps than any race has, so that the training loop never reaches the end of its run."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One arm's part of a round."""

    step_s: float
    """Wall time per step, in seconds."""
    cpu_s: float
    """CPU time per step of all the arm's processes, in seconds."""
    others: float
    """Average number of cores that other processes used during the turn."""


def ours(config: RunConfig, tick: Tick) -> None:
    """Trains with the loop of `llmeff train`, including records and display but not evaluations and checkpoints."""
    from llmeff.run.loop import Trainer

    # the race may take any number of steps, so neither the run nor its schedule may end
    train = config.train.model_copy(update={"steps": max(config.train.steps, _MANY_STEPS)})
    config = config.model_copy(update={"train": train})
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(config, Path(folder) / "run", resume=False, is_silent=False) as trainer,
    ):
        while True:
            trainer.train_step()
            tick()


def _refuse_unlike(arm: str, config: RunConfig, *, recompute: bool) -> None:
    """Raises an error if a config has settings that an arm does not support.

    Args:
        arm: name of the arm.
        config: the config that the arm is to train.
        recompute: whether the arm can recompute activations.

    Raises:
        ConfigError: the arm does not support some settings. The message names all of them.
    """
    problems = []
    if config.parallel.joins:
        problems.append(f"arm {arm!r} runs as one process, but parallel is {config.parallel.name!r}")
    if config.transforms:
        problems.append(
            f"arm {arm!r} does not transform models, but transforms is {[each.name for each in config.transforms]}"
        )
    if config.precision != "fp32":
        problems.append(f"arm {arm!r} trains only in fp32, but precision is {config.precision!r}")
    if config.train.micro_batch != config.train.batch:
        problems.append(
            f"arm {arm!r} trains with one micro-batch per step, but train.micro_batch is {config.train.micro_batch} and "
            f"train.batch is {config.train.batch}"
        )
    if config.runtime.recompute and not recompute:
        problems.append(f"arm {arm!r} does not recompute activations, but runtime.recompute is true")
    if problems:
        raise ConfigError(problems)


def bare(config: RunConfig, tick: Tick) -> None:
    """Trains the same model with the same batches and optimizer as `ours`, but in a minimal loop.

    Raises:
        ConfigError: the config has settings that this arm does not support.
    """
    from llmeff.run.prepare import prepare, prepare_device, prepare_model

    config, task = prepare(config)
    _refuse_unlike("bare", config, recompute=True)
    device = prepare_device(config)
    model = prepare_model(config, device)
    optimizer = config.optim.build(task.parameter_infos(model))
    parameters = list(model.parameters())
    for step in itertools.count():
        batch = task.batch(step, range(config.train.batch), device)
        loss = task.loss(model, batch)["loss"] / batch.counts["loss"]
        loss.backward()
        if config.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * config.schedule.factor(step % config.train.steps, config.train.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()


def hf_trainer(config: RunConfig, tick: Tick) -> None:
    """Trains the same model on the same batches as `ours`, but as a transformers model, with Hugging Face's Trainer.

    Raises:
        ConfigError: the model is not one of llmeff's own decoders, or the config has settings that this arm does not
            support.
    """
    from torch.utils.data import Dataset
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    from llmeff.models import DecoderConfig
    from llmeff.models.pretrained import LlmeffForCausalLM
    from llmeff.run.prepare import prepare, prepare_device

    config, task = prepare(config)
    if not isinstance(config.model, DecoderConfig):
        raise ConfigError(
            f"arm 'hf-trainer' can train only llmeff's own decoders, but the model is {config.model.name!r}"
        )
    _refuse_unlike("hf-trainer", config, recompute=False)
    device = prepare_device(config)
    batch_size = config.train.batch

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return batch_size * 1_000_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            step, row = divmod(index, batch_size)
            tokens = task.batch(step, range(row, row + 1), device).inputs["tokens"][0]
            return {"input_ids": tokens, "labels": tokens}

    class Ticker(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            max_steps=1_000_000,
            learning_rate=config.optim.lr,
            optim="adamw_torch_fused",
            max_grad_norm=config.train.clip_norm or 0.0,
            use_cpu=device.type == "cpu",
            torch_compile=config.runtime.compile == "model",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        model = LlmeffForCausalLM.from_decoder(config.model.build())
        HFTrainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Ticker()]).train()


ARMS: dict[str, Arm] = {"ours": ours, "bare": bare, "hf-trainer": hf_trainer}
"""Built-in arms by name. Users give their own arms as `FILE.py:FUNCTION`."""


def find_arm(name: str) -> Arm:
    """Returns a built-in arm, or loads an arm from a file.

    Args:
        name: a key of `ARMS`, or `FILE.py:FUNCTION`.

    Raises:
        ConfigError: there is no such arm, file or function.
    """
    if name in ARMS:
        return ARMS[name]
    path, _, function = name.partition(":")
    if not function or not Path(path).is_file():
        raise ConfigError(f"unknown arm {name!r}: give one of {', '.join(ARMS)}, or FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arm = getattr(module, function, None)
    if arm is None:
        raise ConfigError(f"arm {name!r}: {path} has no function {function!r}")
    return arm  # type: ignore[no-any-return]


def bench(
    config: RunConfig,
    arms: Sequence[str],
    *,
    rounds: int,
    steps: int,
    warmup_steps: int,
    processes: int,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Times arms against one another.

    The rounds are divided over generations of processes (see `lab.race`).

    Args:
        config: the config that every arm trains.
        arms: names of the arms, each optionally followed by settings, as in "ours runtime.compile=model". Every other arm
            is compared with the first.
        rounds: number of turns of every arm, over all generations.
        steps: number of steps per turn.
        warmup_steps: number of steps that each process takes before its first round.
        processes: number of generations. Each generation has a fresh process for every arm.
        modules: names of modules that every process imports, for the components that they register.

    Returns:
        A dict for JSON. For each arm, it has the median and the quartiles of the step time over rounds. For each other arm,
        it has the ratio of its step time to the first arm's, with a 95 % interval over generations. A ratio above 1
        means that the first arm is faster. The dict also has the rounds of each generation. Times are in seconds.
        Measurements have six significant digits.

    Raises:
        ConfigError: an arm is unknown, a process of an arm ended early, or there are too few rounds for an interval.
    """
    if len(set(arms)) < max(2, len(arms)):
        raise ConfigError(f"--arm: give at least two different arms. Given: {', '.join(arms)}")
    raced = race_runs(
        {arm: _read_arm(config, arm) for arm in arms},
        seed=config.seed,
        rounds=rounds,
        steps=steps,
        warmup_steps=warmup_steps,
        processes=processes,
        modules=modules,
    )
    return raced | {"config": config.model_dump(mode="json")}


def _read_arm(config: RunConfig, arm: str) -> tuple[RunConfig, str]:
    """Parses an arm with settings. Returns the config that the arm trains, and the arm's name.

    Raises:
        ConfigError: the arm is unknown, or a setting is wrong.
    """
    try:
        name, *settings = shlex.split(arm) or [""]
    except ValueError as error:
        raise ConfigError(f"--arm {arm!r}: cannot be read ({error})") from None
    find_arm(name)
    try:
        return validate(RunConfig, override(config.model_dump(mode="json"), settings)), name
    except ConfigError as error:
        raise ConfigError([f"--arm {arm!r}: {problem}" for problem in error.problems]) from None


def race_runs(
    runs: Mapping[str, tuple[RunConfig, str]],
    *,
    seed: int,
    rounds: int,
    steps: int,
    warmup_steps: int,
    processes: int,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Times runs with any configs against one another.

    Args:
        runs: by name, a config and the name of the arm that trains it. Every other run is compared with the first.
        seed: seed for the order of turns.
        rounds: as in `bench`.
        steps: as in `bench`.
        warmup_steps: as in `bench`.
        processes: as in `bench`.
        modules: as in `bench`.

    Returns:
        The same dict as `bench`, without the config.

    Raises:
        ConfigError: a process of an arm ended early, or there are too few rounds for an interval.
    """
    if processes < 3 or rounds < processes or min(steps, warmup_steps) < 1:
        raise ConfigError(
            f"--processes {processes} --rounds {rounds} --steps {steps} --warmup {warmup_steps}: some "
            "values are too small. Give at least 3 processes, as many rounds as processes, 1 step and 1 warm-up step"
        )
    order, names = random.Random(seed), list(runs)
    arguments = {name: (config.model_dump(mode="json"), arm, list(modules)) for name, (config, arm) in runs.items()}

    def run(generation: Generation, number: int) -> list[dict[str, Turn]]:
        racers = _start(generation, arguments, warmup_steps, order)
        return take_turns(names, _share(rounds, processes, number), order, lambda name: racers[name].ask(steps))

    generations = run_generations(processes, run)
    is_gpu = any(config.runtime.device != "cpu" for config, _ in runs.values()) and torch.cuda.is_available()
    where = environment(torch.device("cuda" if is_gpu else "cpu"))
    measured: dict[str, Any] = _rounded(_summarize(names, generations))
    return {"environment": where.model_dump(mode="json")} | measured


def _share(rounds: int, processes: int, number: int) -> int:
    """Returns the number of rounds of generation `number` if `rounds` are divided evenly over `processes`."""
    return len(range(number, rounds, processes))


def _start(
    generation: Generation, arguments: Mapping[str, tuple[Any, ...]], warmup_steps: int, order: random.Random
) -> dict[str, Racer]:
    """Starts a process for each name, in random order. Each process warms up before the next one starts.

    Args:
        generation: the generation to which the processes are added.
        arguments: by name, the arguments of `_work` before the pipe.
        warmup_steps: number of warm-up steps of each process.
        order: random generator that draws the order.

    Raises:
        ConfigError: a process ended early.
    """
    racers = {}
    for name in order.sample(list(arguments), len(arguments)):
        racers[name] = generation.start(
            _work, *arguments[name], early_end=f"arm {name!r} ended before its turn was over"
        )
        racers[name].ask(warmup_steps)
    return racers


class _Turns:
    """Runs and measures the turns of an arm, within the arm's process.

    The race sends a number of steps through the pipe, and gets back a `Turn` once these steps are done. If it
    sends None, the process ends.

    Args:
        pipe: the pipe to the process that runs the race.
        ranks: the other processes of the arm.
    """

    def __init__(self, pipe: Connection, ranks: Sequence[psutil.Process]):
        self._pipe, self._ranks = pipe, ranks
        self._begin()

    def tick(self) -> None:
        """Counts a step. After the last step of a turn, sends the `Turn` and waits for the next one to begin."""
        self._left -= 1
        if self._left > 0:
            return
        wall_s = time.perf_counter() - self._began
        arm_s, machine_s = (now - then for now, then in zip(self._cpu_times(), self._cpu_began, strict=True))
        others = max(0.0, machine_s - arm_s) / wall_s
        self._pipe.send(Turn(step_s=wall_s / self._steps, cpu_s=arm_s / self._steps, others=others))
        self._begin()

    def _begin(self) -> None:
        steps = self._pipe.recv()
        if steps is None:
            sys.exit()  # raises SystemExit in the arm, which then removes its temporary folders
        self._left = self._steps = steps
        self._cpu_began, self._began = self._cpu_times(), time.perf_counter()

    def _cpu_times(self) -> tuple[float, float]:
        """Returns the CPU seconds used so far by the arm's processes, and by the whole machine."""
        machine = psutil.cpu_times()
        ranks_s = sum(sum(rank.cpu_times()[:2]) for rank in self._ranks)
        return time.process_time() + ranks_s, machine.user + machine.system + machine.nice


def _work(config: dict[str, Any], arm: str, modules: Sequence[str], pipe: Connection) -> None:
    """The main function of an arm's process: trains with the arm, turn by turn."""
    _silence(1)
    load_components(modules)
    ranks = _lead(config, arm, modules) if config.get("parallel", {}).get("ranks", 1) > 1 else []
    turns = _Turns(pipe, ranks)
    find_arm(arm)(validate(RunConfig, config), turns.tick)


def _silence(*streams: int) -> None:
    """Discards all output to these file descriptors."""
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        for stream in streams:
            os.dup2(nothing.fileno(), stream)


def _lead(config: dict[str, Any], arm: str, modules: Sequence[str]) -> list[psutil.Process]:
    """Makes this process rank 0 of the run, and starts the other ranks. Returns the processes of the other ranks.

    Only rank 0 counts steps and takes turns. The other ranks wait for it in every step.
    """
    num_ranks, port = config["parallel"]["ranks"], free_port()
    others = [spawn(_follow, config, arm, modules, rank, port, daemon=True) for rank in range(1, num_ranks)]
    become_rank(0, num_ranks, port)
    return [psutil.Process(other.pid) for other in others]


def _follow(config: dict[str, Any], arm: str, modules: Sequence[str], rank: int, port: int) -> None:
    """The main function of the process of any rank except 0. The process ends when rank 0 ends."""
    _silence(1, 2)
    become_rank(rank, config["parallel"]["ranks"], port)
    load_components(modules)
    find_arm(arm)(validate(RunConfig, config), lambda: None)


def _geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean of positive values.

    The ratio of two arms' means equals the geometric mean of the ratios within rounds.
    """
    return math.exp(statistics.fmean(map(math.log, values)))


def _quiet(rounds: Sequence[dict[str, Turn]]) -> list[dict[str, Turn]]:
    """Returns the rounds in which other processes used at most `NOISE` cores during every turn."""
    return [turns for turns in rounds if max(turn.others for turn in turns.values()) <= NOISE]


def _used(rounds: list[dict[str, Turn]]) -> list[dict[str, Turn]]:
    """Returns the quiet rounds of a generation, or all its rounds if fewer than 3 or fewer than a third are quiet."""
    quiet = _quiet(rounds)
    return quiet if len(quiet) >= max(3, len(rounds) // 3) else rounds


def _is_busy(rounds: list[dict[str, Turn]]) -> bool:
    """Returns whether noisy rounds of a generation are used, because too few are quiet."""
    return len(_quiet(rounds)) < len(_used(rounds))


def _values(
    generations: Sequence[Sequence[dict[str, Turn]]], names: Sequence[str], value: Callable[[Turn], float]
) -> dict[str, list[list[float]]]:
    """Returns `value` of every turn: for each arm, a list of generations, each a list with one number per round."""
    return {name: [[value(turns[name]) for turns in rounds] for rounds in generations] for name in names}


def _against_first(
    values: Mapping[str, list[list[float]]],
    sign: str,
    compare: Callable[[list[list[float]], list[list[float]]], Estimate],
) -> dict[str, dict[str, float]]:
    """Compares the values of every name except the first with the values of the first name.

    Returns one entry per comparison. Its key is, for example, "NAME / FIRST", where "/" is `sign`.
    """
    first, *others = values
    return {f"{name} {sign} {first}": _plain(compare(values[name], values[first])) for name in others}


def _summarize(names: Sequence[str], generations: list[list[dict[str, Turn]]]) -> dict[str, Any]:
    """Computes the measurements that `bench` returns, before rounding. Every other arm is compared with the first."""
    used = [_used(rounds) for rounds in generations]
    num_rounds, num_used = (sum(map(len, each)) for each in (generations, used))
    step_s = _values(used, names, lambda turn: turn.step_s)
    cpu_s = _values(used, names, lambda turn: turn.cpu_s)
    return {
        "step_s": {name: list(map(_geometric_mean, values)) for name, values in step_s.items()},
        "rounds": num_rounds,
        "rounds_used": num_used,
        "noisy_rounds_dropped": num_rounds - num_used,
        "busy_generations": [number for number, rounds in enumerate(generations, start=1) if _is_busy(rounds)],
        "arms": {name: _quartiles([*itertools.chain.from_iterable(values)]) for name, values in step_s.items()},
        "ratios": _against_first(step_s, "/", ratio),
        "differences_s": _against_first(step_s, "-", difference),
        "cpu_ratios": _against_first(cpu_s, "/", ratio),
        "generations": [
            [{name: vars(turn) for name, turn in turns.items()} for turns in rounds] for rounds in generations
        ],
    }


def _quartiles(step_s: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(step_s, n=4)
    return {"median_step_s": median, "lower_quartile_s": lower, "upper_quartile_s": upper}


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "n": estimate.n}


def _rounded(value: Any) -> Any:
    """Rounds every float in nested lists and dicts to six significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(result: dict[str, Any]) -> str:
    """Formats the result of `bench` as lines of text."""
    width = max(24, *map(len, [*result["arms"], *result["ratios"]]))
    lines = [
        f"{name:<{width}} {1e3 * arm['median_step_s']:.2f} ms per step (median; quartiles "
        f"{1e3 * arm['lower_quartile_s']:.2f} and {1e3 * arm['upper_quartile_s']:.2f})"
        for name, arm in result["arms"].items()
    ]
    for pair, value in result["ratios"].items():
        lines.append(
            f"{pair:<{width}} {value['mean']:.3f} (95 % interval {value['lower']:.3f} to {value['upper']:.3f}, "
            f"n = {value['n']} generations, {result['rounds_used']} rounds)"
        )
    for pair, value in result["differences_s"].items():
        lines.append(
            f"{pair:<{width}} {1e3 * value['mean']:.2f} ms ({1e3 * value['lower']:.2f} to {1e3 * value['upper']:.2f})"
        )
    if result["noisy_rounds_dropped"]:
        lines.append(f"{result['noisy_rounds_dropped']} of {result['rounds']} rounds were noisy and are left out")
    if result["busy_generations"]:
        lines.append(
            "the machine was busy: generations in which too few rounds were quiet, so that all rounds are used: "
            f"{', '.join(map(str, result['busy_generations']))}"
        )
    return "\n".join(lines)
