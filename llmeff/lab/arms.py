"""The timing lane: arms take turns in random order, each in a process of its own; speed is a ratio within a round."""

import contextlib
import importlib
import importlib.util
import itertools
import math
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from llmeff.compare.intervals import Estimate, mean_interval, ratio_interval
from llmeff.config.run import RunConfig
from llmeff.core.components import load_components
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import become_rank, folder_off_paths, free_port
from llmeff.record.environment import environment

Tick = Callable[[], None]
"""An arm calls it after every step; it returns when the next step may begin."""
Arm = Callable[[RunConfig, Tick], None]
"""Trains as the config says, for as many steps as it is let."""

NOISE = 0.1
"""Cores that other processes may use in a round before it is dropped."""
_MANY_STEPS = 1_000_000
"""More than any race has, so that the loop does not come to a run's end."""
END_S = 30.0
"""How long an arm's process may take to end before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One arm's part of a round."""

    step_s: float
    """Wall time a step."""
    cpu_s: float
    """CPU time of the arm's processes a step, all threads."""
    others: float
    """Cores that other processes used meanwhile, on average."""


def ours(config: RunConfig, tick: Tick) -> None:
    """The loop of `llmeff train`, records and display included, without evaluations and checkpoints."""
    from llmeff.run.loop import Trainer

    # as many steps as are asked for: the schedule does not come to its end, and then go on beyond it
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
    """An arm that would train otherwise than it is told to is not raced.

    Raises:
        ConfigError: the config asks for what the arm does not do; `recompute` says whether it recomputes.
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
    """The same model, batches and optimizer in the shortest loop that trains."""
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
    """Hugging Face's Trainer over the same model, by its Hugging Face face, and batches of the same size."""
    from torch.utils.data import Dataset
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    from llmeff.models import DecoderConfig
    from llmeff.models.pretrained import LlmeffForCausalLM
    from llmeff.run.prepare import prepare, prepare_device

    config, task = prepare(config)
    if not isinstance(config.model, DecoderConfig):
        raise ConfigError(f"arm 'hf-trainer' trains decoders of llmeff's own: model is {config.model.name!r}")
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
"""Arms by name; another is given as `FILE.py:FUNCTION`."""


def find_arm(name: str) -> Arm:
    """An arm by its name, or from a file.

    Raises:
        ConfigError: there is none.
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

    Processes of one and the same arm differ for as long as they live, by a few per cent, with where their memory lies:
    the rounds of one process are not independent. So the rounds are divided over generations, in each of which every
    arm has a fresh process; a generation gives one value, and the intervals are over generations.

    Args:
        config: what every arm trains.
        arms: their names, each with settings of its own where they follow, as in "ours runtime.compile=model"; the first
            is what the others are set beside.
        rounds: how often every arm has its turn, over all generations.
        steps: steps of a turn.
        warmup_steps: steps of each process before its first round.
        processes: of each arm, one after another: the number of generations.
        modules: imported in every process, for the components that they register.

    Returns:
        for JSON: by arm the median step time and its quartiles over rounds; by pair with the first arm the ratio of step
        times (theirs / the first's: above 1, the first is faster) with a 95 % interval over generations; the rounds of
        each generation. Measurements have six significant digits.

    Raises:
        ConfigError: an arm is unknown or ended, or there is too little to make an interval of.
    """
    if len(set(arms)) < max(2, len(arms)):
        raise ConfigError(f"--arm: give at least two different arms, given: {', '.join(arms)}")
    raced = race(
        {arm: _lane(config, arm) for arm in arms},
        seed=config.seed,
        rounds=rounds,
        steps=steps,
        warmup_steps=warmup_steps,
        processes=processes,
        modules=modules,
    )
    return raced | {"config": config.model_dump(mode="json")}


def _lane(config: RunConfig, arm: str) -> tuple[RunConfig, str]:
    """What an arm trains, and its name."""
    try:
        name, *settings = shlex.split(arm) or [""]
    except ValueError as error:
        raise ConfigError(f"--arm {arm!r}: cannot be read ({error})") from None
    find_arm(name)
    try:
        return validate(RunConfig, override(config.model_dump(mode="json"), settings)), name
    except ConfigError as error:
        raise ConfigError([f"--arm {arm!r}: {problem}" for problem in error.problems]) from None


def race(
    lanes: Mapping[str, tuple[RunConfig, str]],
    *,
    seed: int,
    rounds: int,
    steps: int,
    warmup_steps: int,
    processes: int,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Times runs of any configs against one another: `bench`, where each name has a config and an arm of its own.

    Args:
        lanes: by name, the config and the arm that trains it; the first is what the others are set beside.
        seed: of the order of turns.
        rounds: as in `bench`, and so on.
        steps: as in `bench`.
        warmup_steps: as in `bench`.
        processes: as in `bench`.
        modules: as in `bench`.

    Raises:
        ConfigError: an arm ended, or there is too little to make an interval of.
    """
    if processes < 3 or rounds < processes or min(steps, warmup_steps) < 1:
        raise ConfigError(
            f"--processes {processes} --rounds {rounds} --steps {steps} --warmup {warmup_steps}: at least 3 processes of "
            "each arm, a round in each, 1 step and 1 warm-up step"
        )
    order, names = random.Random(seed), list(lanes)
    shares = [len(range(number, rounds, processes)) for number in range(processes)]
    told = {name: (config.model_dump(mode="json"), arm) for name, (config, arm) in lanes.items()}
    start = partial(_start, told, list(modules))
    generations = [_generation(start, names, share, steps, warmup_steps, order) for share in shares]
    is_gpu = any(config.runtime.device != "cpu" for config, _ in lanes.values()) and torch.cuda.is_available()
    where = environment(torch.device("cuda" if is_gpu else "cpu"))
    measured: dict[str, Any] = _rounded(_summarize(names, generations))
    return {"environment": where.model_dump(mode="json")} | measured


def _generation(
    start: Callable[[str], tuple[BaseProcess, Connection]],
    arms: Sequence[str],
    rounds: int,
    steps: int,
    warmup_steps: int,
    order: random.Random,
) -> list[dict[str, Turn]]:
    """The rounds of one fresh process of each arm; `start` starts an arm's."""
    lanes: dict[str, Connection] = {}
    processes = []
    try:
        for name in order.sample(arms, len(arms)):
            process, lanes[name] = start(name)
            processes.append(process)
            _turn(name, lanes[name], warmup_steps)
        results = [
            {name: _turn(name, lanes[name], steps) for name in order.sample(arms, len(arms))} for _ in range(rounds)
        ]
        for lane in lanes.values():
            with contextlib.suppress(OSError):
                lane.send(None)
        for process in processes:
            process.join(END_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for lane in lanes.values():
            lane.close()
    return results


def _start(
    told: Mapping[str, tuple[dict[str, Any], str]], modules: Sequence[str], name: str
) -> tuple[BaseProcess, Connection]:
    """A lane's process, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    lane, end = context.Pipe()
    process = context.Process(target=_work, args=(*told[name], modules, end))  # no daemon: it may start ranks
    with folder_off_paths():
        process.start()
    end.close()
    return process, lane


def _turn(name: str, lane: Connection, steps: int) -> Turn:
    try:
        lane.send(steps)
        turn: Turn = lane.recv()
    except (EOFError, OSError):
        raise ConfigError(f"arm {name!r} ended before its turn did: its error stands above") from None
    return turn


def _work(config: dict[str, Any], arm: str, modules: Sequence[str], lane: Connection) -> None:
    """An arm's process: lets it go for as many steps as it is told to, and answers how long they took; None ends it."""
    left = 0
    steps = 0
    began, cpu_began = 0.0, (0.0, 0.0)

    def cpu_times() -> tuple[float, float]:
        machine = psutil.cpu_times()
        ranks = sum(sum(rank.cpu_times()[:2]) for rank in others)
        return time.process_time() + ranks, machine.user + machine.system + machine.nice

    def tick() -> None:
        nonlocal left, steps, began, cpu_began
        left -= 1
        if left > 0:
            return
        if steps:
            wall = time.perf_counter() - began
            own, machine = (now - then for now, then in zip(cpu_times(), cpu_began, strict=True))
            lane.send(Turn(step_s=wall / steps, cpu_s=own / steps, others=max(0.0, machine - own) / wall))
        told = lane.recv()
        if told is None:
            sys.exit()  # through the arm, which takes its folders away
        left = steps = told
        cpu_began, began = cpu_times(), time.perf_counter()

    _be_silent(1)
    load_components(modules)
    others = _lead(config, arm, modules) if config.get("parallel", {}).get("ranks", 1) > 1 else []
    left = steps = lane.recv()
    cpu_began, began = cpu_times(), time.perf_counter()
    find_arm(arm)(validate(RunConfig, config), tick)


def _be_silent(*streams: int) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        for stream in streams:
            os.dup2(nothing.fileno(), stream)


def _lead(config: dict[str, Any], arm: str, modules: Sequence[str]) -> list[psutil.Process]:
    """Makes this process the main rank of a run of several, and starts the others, which wait where it waits."""
    ranks, port = config["parallel"]["ranks"], free_port()
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_follow, args=(config, arm, modules, rank, port), daemon=True)
        for rank in range(1, ranks)
    ]
    with folder_off_paths():
        for other in others:
            other.start()
    become_rank(0, ranks, port)
    return [psutil.Process(other.pid) for other in others]


def _follow(config: dict[str, Any], arm: str, modules: Sequence[str], rank: int, port: int) -> None:
    """Another rank of an arm's run; it ends when the main one is gone."""
    _be_silent(1, 2)
    become_rank(rank, config["parallel"]["ranks"], port)
    load_components(modules)
    find_arm(arm)(validate(RunConfig, config), lambda: None)


def _geometric_mean(values: Iterable[float]) -> float:
    """Its ratio of two arms is the mean of the ratios within their rounds."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _summarize(names: Sequence[str], generations: list[list[dict[str, Turn]]]) -> dict[str, Any]:
    quiet = [[each for each in rounds if max(turn.others for turn in each.values()) <= NOISE] for rounds in generations]
    used = [
        few if len(few) >= max(3, len(rounds) // 3) else rounds for few, rounds in zip(quiet, generations, strict=True)
    ]
    num_rounds, num_used = (sum(map(len, parts)) for parts in (generations, used))
    busy = [number for number, (few, some) in enumerate(zip(quiet, used, strict=True), start=1) if len(few) < len(some)]
    first = names[0]

    def over_generations(value: Callable[[Turn, Turn], float], name: str) -> list[float]:
        return [statistics.fmean(value(each[name], each[first]) for each in rounds) for rounds in used]

    def log_step_ratio(theirs: Turn, firsts: Turn) -> float:
        return math.log(theirs.step_s / firsts.step_s)

    def log_cpu_ratio(theirs: Turn, firsts: Turn) -> float:
        return math.log(theirs.cpu_s / firsts.cpu_s)

    def step_difference(theirs: Turn, firsts: Turn) -> float:
        return theirs.step_s - firsts.step_s

    return {
        "step_s": {name: [_geometric_mean(each[name].step_s for each in rounds) for rounds in used] for name in names},
        "rounds": num_rounds,
        "rounds_used": num_used,
        "noisy_rounds_dropped": num_rounds - num_used,
        "busy_generations": busy,
        "arms": {name: _spread([each[name].step_s for rounds in used for each in rounds]) for name in names},
        "ratios": {
            f"{name} / {first}": _plain(ratio_interval(over_generations(log_step_ratio, name))) for name in names[1:]
        },
        "differences_s": {
            f"{name} - {first}": _plain(mean_interval(over_generations(step_difference, name))) for name in names[1:]
        },
        "cpu_ratios": {
            f"{name} / {first}": _plain(ratio_interval(over_generations(log_cpu_ratio, name))) for name in names[1:]
        },
        "generations": [
            [{name: vars(turn) for name, turn in each.items()} for each in rounds] for rounds in generations
        ],
    }


def _spread(values: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median_step_s": median, "lower_quartile_s": lower, "upper_quartile_s": upper}


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "n": estimate.n}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(result: dict[str, Any]) -> str:
    """The result for people."""
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
