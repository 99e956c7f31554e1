"""Timing runs: arms take turns in random order, each in a process of its own; speed is a ratio within rounds."""

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
"""An arm calls it after every step. It returns when the next step may begin."""
Arm = Callable[[RunConfig, Tick], None]
"""Trains by the config until a tick ends the process."""

NOISE = 0.1
"""A round in which other processes used more cores than this, on average, is noisy."""
_MANY_STEPS = 1_000_000
"""More than any race has, so that the loop does not reach the end of its run."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One arm's part of a round."""

    step_s: float
    """Wall time a step, in seconds."""
    cpu_s: float
    """CPU time a step of all threads of the arm's processes, in seconds."""
    others: float
    """Cores that other processes used in the meantime, on average."""


def ours(config: RunConfig, tick: Tick) -> None:
    """The loop of `llmeff train`, with records and display, without evaluations and checkpoints."""
    from llmeff.run.loop import Trainer

    # a turn may have any number of steps: the run must not end, nor its schedule
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
    """Refuses a config that asks for what an arm does not do.

    Args:
        arm: its name.
        config: what it is to train.
        recompute: whether the arm can recompute activations.

    Raises:
        ConfigError: it names every such setting.
    """
    problems = []
    if config.parallel.joins:
        problems.append(f"arm {arm!r} is one process: parallel is {config.parallel.name!r}")
    if config.transforms:
        problems.append(f"arm {arm!r} changes no model: transforms is {[each.name for each in config.transforms]}")
    if config.precision != "fp32":
        problems.append(f"arm {arm!r} trains in fp32: precision is {config.precision!r}")
    if config.train.micro_batch != config.train.batch:
        problems.append(
            f"arm {arm!r} makes a step of one micro-batch: train.micro_batch is {config.train.micro_batch}, "
            f"train.batch {config.train.batch}"
        )
    if config.runtime.recompute and not recompute:
        problems.append(f"arm {arm!r} does not recompute: runtime.recompute is true")
    if problems:
        raise ConfigError(problems)


def bare(config: RunConfig, tick: Tick) -> None:
    """The same model, batches and optimizer as `ours`, in the shortest loop that trains.

    Raises:
        ConfigError: the config asks for what the arm does not do.
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
    """Hugging Face's Trainer, with the same model in its Hugging Face form and the same batches.

    Raises:
        ConfigError: the model is no decoder of llmeff's own, or the config asks for what the arm does not do.
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
"""Arms by name. A user's own is given as `FILE.py:FUNCTION`."""


def find_arm(name: str) -> Arm:
    """Returns an arm by its name, or from a file.

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
        config: what every arm trains.
        arms: their names, each optionally followed by settings, as in "ours runtime.compile=model". The others are compared
            with the first.
        rounds: turns of every arm, over all generations.
        steps: steps of a turn.
        warmup_steps: steps of each process before its first round.
        processes: of each arm, one after another: the number of generations.
        modules: imported in every process, for the components that they register.

    Returns:
        for JSON: by arm the median step time and its quartiles over rounds; by pair with the first arm the ratio of step
        times (theirs / the first's: above 1, the first is faster) with a 95 % interval over generations; the rounds of
        each generation. Times are in seconds. Measurements have six significant digits.

    Raises:
        ConfigError: an arm is unknown, its process ended, or there are too few rounds for an interval.
    """
    if len(set(arms)) < max(2, len(arms)):
        raise ConfigError(f"--arm: give at least two different arms, given: {', '.join(arms)}")
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
    """Splits an arm with settings into the config that it trains and its name.

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
    """Times runs of any configs against one another.

    Args:
        runs: by name, a config and the arm that trains it. The others are compared with the first.
        seed: of the order of turns.
        rounds: as in `bench`.
        steps: as in `bench`.
        warmup_steps: as in `bench`.
        processes: as in `bench`.
        modules: as in `bench`.

    Returns:
        as `bench`, without the config.

    Raises:
        ConfigError: an arm's process ended, or there are too few rounds for an interval.
    """
    if processes < 3 or rounds < processes or min(steps, warmup_steps) < 1:
        raise ConfigError(
            f"--processes {processes} --rounds {rounds} --steps {steps} --warmup {warmup_steps}: at least 3 processes of "
            "each arm, a round in each, 1 step and 1 warm-up step"
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
    """Rounds of generation `number`, if `rounds` are divided evenly over `processes`."""
    return len(range(number, rounds, processes))


def _start(
    generation: Generation, arguments: Mapping[str, tuple[Any, ...]], warmup_steps: int, order: random.Random
) -> dict[str, Racer]:
    """Starts a process for each name, in random order, and warms each up before the next starts.

    Args:
        generation: gets the processes.
        arguments: by name, those of `_work` before the pipe.
        warmup_steps: of each process.
        order: draws the order.

    Raises:
        ConfigError: a process ended.
    """
    racers = {}
    for name in order.sample(list(arguments), len(arguments)):
        racers[name] = generation.start(_work, *arguments[name], early_end=f"arm {name!r} ended before its turn did")
        racers[name].ask(warmup_steps)
    return racers


class _Turns:
    """The turns of an arm, seen from its process.

    A question is a number of steps. The answer is the `Turn` that they made. None ends the process.

    Args:
        pipe: to the process of the race.
        ranks: the other processes of the arm.
    """

    def __init__(self, pipe: Connection, ranks: Sequence[psutil.Process]):
        self._pipe, self._ranks = pipe, ranks
        self._begin()

    def tick(self) -> None:
        """Counts a step. After the last of a turn it answers, and waits for the next turn."""
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
            sys.exit()  # through the arm, which removes its folders
        self._left = self._steps = steps
        self._cpu_began, self._began = self._cpu_times(), time.perf_counter()

    def _cpu_times(self) -> tuple[float, float]:
        """CPU seconds so far: of the arm's processes, and of the machine."""
        machine = psutil.cpu_times()
        ranks_s = sum(sum(rank.cpu_times()[:2]) for rank in self._ranks)
        return time.process_time() + ranks_s, machine.user + machine.system + machine.nice


def _work(config: dict[str, Any], arm: str, modules: Sequence[str], pipe: Connection) -> None:
    """Runs in an arm's process."""
    _silence(1)
    load_components(modules)
    ranks = _lead(config, arm, modules) if config.get("parallel", {}).get("ranks", 1) > 1 else []
    turns = _Turns(pipe, ranks)
    find_arm(arm)(validate(RunConfig, config), turns.tick)


def _silence(*streams: int) -> None:
    """Sends the output on these file descriptors nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        for stream in streams:
            os.dup2(nothing.fileno(), stream)


def _lead(config: dict[str, Any], arm: str, modules: Sequence[str]) -> list[psutil.Process]:
    """Makes this process rank 0 of the run, and starts the other ranks. They wait for it in every step."""
    num_ranks, port = config["parallel"]["ranks"], free_port()
    others = [spawn(_follow, config, arm, modules, rank, port, daemon=True) for rank in range(1, num_ranks)]
    become_rank(0, num_ranks, port)
    return [psutil.Process(other.pid) for other in others]


def _follow(config: dict[str, Any], arm: str, modules: Sequence[str], rank: int, port: int) -> None:
    """Runs in the process of another rank. It ends with rank 0."""
    _silence(1, 2)
    become_rank(rank, config["parallel"]["ranks"], port)
    load_components(modules)
    find_arm(arm)(validate(RunConfig, config), lambda: None)


def _geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; the ratio of two arms' is the geometric mean of their ratios within rounds."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _quiet(rounds: Sequence[dict[str, Turn]]) -> list[dict[str, Turn]]:
    """The rounds of a generation in which other processes used at most `NOISE` cores in every turn."""
    return [turns for turns in rounds if max(turn.others for turn in turns.values()) <= NOISE]


def _used(rounds: list[dict[str, Turn]]) -> list[dict[str, Turn]]:
    """The quiet rounds of a generation; all rounds, if fewer than 3 or fewer than a third are quiet."""
    quiet = _quiet(rounds)
    return quiet if len(quiet) >= max(3, len(rounds) // 3) else rounds


def _is_busy(rounds: list[dict[str, Turn]]) -> bool:
    """Whether noisy rounds of a generation are used."""
    return len(_quiet(rounds)) < len(_used(rounds))


def _values(
    generations: Sequence[Sequence[dict[str, Turn]]], names: Sequence[str], value: Callable[[Turn], float]
) -> dict[str, list[list[float]]]:
    """One number per turn: by arm, a list for each generation, with a number for each round."""
    return {name: [[value(turns[name]) for turns in rounds] for rounds in generations] for name in names}


def _against_first(
    values: Mapping[str, list[list[float]]],
    sign: str,
    compare: Callable[[list[list[float]], list[list[float]]], Estimate],
) -> dict[str, dict[str, float]]:
    """Compares the values of the other names with those of the first; a pair is called NAME, sign, FIRST."""
    first, *others = values
    return {f"{name} {sign} {first}": _plain(compare(values[name], values[first])) for name in others}


def _summarize(names: Sequence[str], generations: list[list[dict[str, Turn]]]) -> dict[str, Any]:
    """What `bench` returns of the turns, not rounded; the others are compared with the first of the names."""
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
    """The same lists and dicts, with six significant digits of every float."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(result: dict[str, Any]) -> str:
    """The result of `bench` as lines of text."""
    width = max(24, *map(len, [*result["arms"], *result["ratios"]]))
    lines = [
        f"{name:<{width}} {1e3 * arm['median_step_s']:.2f} ms a step (half of the rounds between "
        f"{1e3 * arm['lower_quartile_s']:.2f} and {1e3 * arm['upper_quartile_s']:.2f})"
        for name, arm in result["arms"].items()
    ]
    for pair, value in result["ratios"].items():
        lines.append(
            f"{pair:<{width}} {value['mean']:.3f} (95 %: {value['lower']:.3f} to {value['upper']:.3f}, "
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
            "the machine was busy: generations with too few quiet rounds, of which all are used: "
            f"{', '.join(map(str, result['busy_generations']))}"
        )
    return "\n".join(lines)
