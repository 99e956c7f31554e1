"""Prepares a run from its config: opens the data, resolves `auto` values, sets up the device, builds the model."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmeff.config.run import RunConfig
from llmeff.core import files, group
from llmeff.core.config import ConfigError, read, validate
from llmeff.core.cpu import multiplies_bfloat16
from llmeff.core.dist import (
    ExternalSetting,
    is_cut_short,
    launcher_engine,
    launcher_settings,
    make_cublas_repeatable,
    world,
)
from llmeff.core.heartbeat import beat
from llmeff.core.precision import precision
from llmeff.core.seed import derive
from llmeff.core.tensors import copy_tensors, empty_on
from llmeff.parallel import Strategy, StrategyConfig, StrategyInputs
from llmeff.parallel.group_state import check_savable
from llmeff.plan.price import check_model, num_threads, resolve_micro_batch
from llmeff.record import schema
from llmeff.tasks.task import Task


def prepare(config: RunConfig) -> tuple[RunConfig, Task]:
    """Opens the data and resolves every `auto` value. Returns the resolved config and the task.

    Raises:
        ConfigError: the data are invalid, the model does not fit the data, or the device is missing.
    """
    check_world(config)
    device = config.runtime.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device is 'cuda', but torch sees no CUDA device; allowed here: 'cpu', 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.parallel.joins:
        # A long timeout, because ranks wait here while a text is tokenized for the first time. The watchdog reacts sooner.
        group.connect(_device(device), 10 * config.parallel.timeout_s)
    with group.agreed():
        task = config.task.open(
            config.data, config.seed, config.train.batch, is_main=world().is_main, wait=group.barrier
        )
    beat()
    config = config.model_copy(update={"model": task.resolve(config.model)})
    task.check_split(config.evaluation.split)
    check_model(config)
    runtime = config.runtime.model_copy(update={"device": device, "threads": num_threads(config)})
    config = config.model_copy(update={"runtime": runtime})
    # bfloat16 must be fast on every rank, since all ranks must make the same update
    is_fast = bool(group.least(int(multiplies_bfloat16(device))))
    config = config.model_copy(update={"optim": config.optim.resolve(is_bfloat16_fast=is_fast)})
    train_config = config.train.model_copy(update={"micro_batch": resolve_micro_batch(config)})
    config = config.model_copy(update={"train": train_config})
    check_world(config)
    return config, task


def _device(kind: str) -> torch.device:
    """Returns the device that this process computes on. The kind is `cuda` or `cpu`."""
    return torch.device("cuda", world().local_rank) if kind == "cuda" else torch.device("cpu")


def check_world(config: RunConfig, *, is_started: bool = True) -> None:
    """Checks that a DeepSpeed file, the launcher and its flags agree with the config.

    Args:
        config: config of the run. An `auto` value agrees with any other value.
        is_started: whether this process is one of the run's processes. If False, this process will start them later,
            and their number is not checked.

    Raises:
        ConfigError: values differ. The message names each of them, with its source.
    """
    stated = [*config.parallel.external_settings(), *launcher_settings()]
    problems = [
        f"{_named(config, one.key, _value(config, one.key))}, but {one.source} says {one.value!r}: {_advice(config, one)}"
        for one in stated
        if (is_started or one.key != "parallel.ranks") and not _agrees(_value(config, one.key), one)
    ]
    engine = launcher_engine()
    if engine is not None and engine not in config.parallel.launch_flags:
        problems.append(
            f"parallel is {config.parallel.name!r} in the config, but accelerate launch was given {engine}: leave the "
            "flag out, or set parallel to the strategy that the flag selects"
        )
    if is_cut_short():
        problems.append(
            "accelerate launch was given --num_processes above 1 but not --multi_gpu, so it started only one process "
            f"(parallel.ranks is {config.parallel.ranks} in the config): add --multi_gpu, which also works on a CPU"
        )
    if problems:
        raise ConfigError(problems)


def _agrees(value: Any, setting: ExternalSetting) -> bool:
    return value == "auto" or value in _MEANT.get((setting.key, setting.value), (setting.value,))


def _advice(config: RunConfig, setting: ExternalSetting) -> str:
    if setting.key == "accumulation":
        return "change one of these three values"
    value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
    if setting.key == "runtime.compile":
        return "leave the flag out"
    advice = f"use --set {setting.key}={value}"
    if setting.key == "parallel.ranks" and not config.parallel.joins:
        joining = [name for name in StrategyConfig.registry.names() if StrategyConfig.registry[name].joins]
        return f"{advice} and set parallel to one of {', '.join(joining)}"
    return advice


_MEANT = {("precision", "bf16"): ("bf16", "bf16_master")}
"""Config values that agree with an external value: DeepSpeed's bf16 may mean either of llmeff's bf16 precisions."""


def _value(config: RunConfig, key: str) -> Any:
    """Returns a config field by its dotted key, or None if the config has no such field."""
    if key == "accumulation":
        size = config.train.micro_batch
        return size if size == "auto" else config.train.batch // (config.parallel.ranks * size)
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def _named(config: RunConfig, key: str, value: Any) -> str:
    if key != "accumulation":
        return f"{key} is {value!r} in the config"
    return (
        f"train.batch {config.train.batch} / (parallel.ranks {config.parallel.ranks} x train.micro_batch "
        f"{config.train.micro_batch}) is {value} micro-batches per step in the config"
    )


def prepare_device(config: RunConfig) -> torch.device:
    """Sets the number of threads and, on a GPU, determinism. Returns the device that this process computes on.

    Raises:
        ConfigError: the device cannot compute in the run's precision.
    """
    assert isinstance(config.runtime.threads, int)
    torch.set_num_threads(config.runtime.threads)
    if config.runtime.device == "cuda":
        device = _device("cuda")
        torch.cuda.set_device(device)
        if config.runtime.deterministic:
            make_cublas_repeatable()
        torch.use_deterministic_algorithms(config.runtime.deterministic)
        return device
    if config.precision == "fp16":
        raise ConfigError("precision 'fp16' needs a GPU, but this run uses the CPU: use 'fp32' or 'bf16'")
    return _device("cpu")


def prepare_model(config: RunConfig, device: torch.device) -> nn.Module:
    """Builds the run's model on the device: initialized from the seed, transformed and compiled as configured.

    Raises:
        ConfigError: the model cannot be built, or does not support something that a training step needs.
    """
    torch.manual_seed(derive(config.seed, "init"))
    model = config.model.build()
    check_model(config, model)
    for transform in config.transforms:
        model = transform.apply(model)
    model = model.to(device)
    model.recompute = config.runtime.recompute  # type: ignore[assignment]  # an attribute of every model
    # All shapes of a step are fixed. dynamic=False keeps torch from making sizes symbolic, which would be slower.
    if config.runtime.compile == "model":
        model.compile(dynamic=False)
    elif config.runtime.compile == "layers":
        layers = getattr(model, "layers", None)
        if layers is None:
            raise ConfigError(
                f"runtime.compile is 'layers', but model {config.model.name!r} has no list of layers to compile: use 'model'"
            )
        # Layers of one class share its code. If the code had more compiled versions than this limit, further layers would
        # silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(layers))
        for layer in layers:
            layer.compile(dynamic=False)
    return model


def build_strategy(config: RunConfig, task: Task, device: torch.device) -> Strategy:
    """Builds the run's model and optimizer, and the strategy that distributes them over the ranks.

    Raises:
        ConfigError: the model cannot be built, or a checkpoint could not store the optimizer's state.
    """
    beat()
    shares = micro_batches(config, world().rank)
    model = prepare_model(config, device)
    check_savable(config.optim.name, config.optim.build, task.parameter_infos(model), config.parallel.miscounts)
    return config.parallel.build(
        StrategyInputs(
            model=model,
            parameter_infos=task.parameter_infos,
            optimizer=config.optim.build,
            device=device,
            precision=precision(config.precision),
            micro_batch=len(shares[0]),
            num_micro_batches=len(shares),
            clip_norm=config.train.clip_norm,
        )
    )


def whole_model(config: RunConfig, weights: dict[str, Tensor]) -> nn.Module:
    """Returns the run's unsharded model on the CPU with the trained weights. Its transforms are folded into the weights."""
    with torch.device("meta"):
        model = config.model.build()
        for transform in config.transforms:
            model = transform.apply(model)
    empty_on(model, "cpu")
    copy_tensors(model, weights)
    for transform in reversed(config.transforms):
        model = transform.fold(model)
    return model


def sharing(config: RunConfig) -> str:
    """Returns the strategy and the micro-batch as text. They determine what each rank stores, sends and computes."""
    return f"{config.parallel.model_dump_json()} {config.train.micro_batch}"


def micro_batches(config: RunConfig, rank: int) -> list[range]:
    """Returns the rows of the global batch that a rank reads, as one range per micro-batch."""
    share = config.train.batch // config.parallel.ranks
    size = config.train.micro_batch
    assert isinstance(size, int)
    return [range(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]


def begun_config(asked: RunConfig, folder: Path) -> RunConfig:
    """Returns the config with which the run in a folder continues.

    This is the saved config, except that settings that affect losses only by rounding come from the user's config.

    Args:
        asked: the user's config. Strategy, ranks, micro-batch and everything under `runtime` may differ from the saved
            config. Any other difference is an error, but an `auto` value agrees with any saved value.
        folder: folder of the run.

    Raises:
        ConfigError: the folder contains no run, or settings differ. The message names each difference.
    """
    path = folder / schema.CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder}: there is no run to resume; start it without --resume")
    files.refuse_links(folder)
    saved = read(path)
    saved["optim"] = validate(RunConfig, saved).optimizer_as_begun().model_dump(mode="json")
    changed = [
        f"{key}: the run in {folder} has {was!r}, but you asked for {now!r}"
        for key, was, now in _differences(saved, asked.model_dump(mode="json"))
        if not key.startswith(_FREE)
    ]
    if changed:
        raise ConfigError(["--resume continues a run with its own config, but these values differ:", *changed])
    merged = asked.model_dump(mode="json")
    _keep_statistics_scope(asked, merged, saved)
    if merged["parallel"] == saved["parallel"]:
        # With the same strategy and ranks, keep the resolved values. Free memory may have changed, so that `auto` could
        # now resolve to other values, and the run would no longer continue bit for bit.
        for table, field in (("train", "micro_batch"), ("runtime", "threads"), ("runtime", "device")):
            if merged[table][field] == "auto":
                merged[table][field] = saved[table][field]
    free = {"parallel": merged["parallel"], "runtime": merged["runtime"]}
    train = saved["train"] | {"micro_batch": merged["train"]["micro_batch"]}
    return validate(RunConfig, saved | free | {"train": train})


def _keep_statistics_scope(asked: RunConfig, merged: dict[str, Any], saved: dict[str, Any]) -> None:
    """Sets the micro-batch of a resumed run so that batch statistics cover as many rows as before.

    Does nothing for models without batch statistics.

    Raises:
        ConfigError: the new ranks do not allow the same number of rows, or the user asked for another micro-batch.
    """
    pools = validate(RunConfig, saved).model.statistics_scope()
    was, now = (config["parallel"].get("ranks", 1) for config in (saved, merged))
    if pools == "nothing" or "auto" in (was, now):
        return
    rows = saved["train"]["micro_batch"] * (was if pools == "ranks" else 1)
    size, rest = divmod(rows, now if pools == "ranks" else 1)
    given = merged["train"]["micro_batch"]
    changes_ranks = pools == "micro-batch" and was != now
    if rest or given not in ("auto", size) or changes_ranks:
        what = f"{now} ranks" if changes_ranks or rest else f"train.micro_batch {given}"
        raise ConfigError(
            f"--resume: model {asked.model.name!r} takes batch statistics over {rows} images, on {was} ranks"
            f"{'' if pools == 'ranks' else ' (each rank separately)'}. With {what} it would train differently. Resume with the "
            "old values, or start a new run with model.norm = 'group'"
            + ("" if pools == "ranks" else " or 'batch_sync'")
        )
    merged["train"]["micro_batch"] = size


_FREE = ("parallel", "runtime", "train.micro_batch")
"""Prefixes of the config fields that may change when a run is resumed."""


def _differences(saved: Any, asked: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        found = []
        for name in saved | asked:
            found += _differences(saved.get(name), asked.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if asked in (saved, "auto") else [(key, saved, asked)]
