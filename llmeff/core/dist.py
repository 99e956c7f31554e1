"""All access to environment variables, except in the script train.py: ranks, launcher settings, paths, caches."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class World:
    """The rank of this process, and the number of processes that train together."""

    rank: int
    """Rank of this process, from 0 to ranks - 1."""
    local_rank: int
    """Rank among the processes on this machine, from 0."""
    ranks: int
    """Number of processes that train together."""

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes records and caches and prints to the terminal."""
        return self.rank == 0


def world() -> World:
    """Returns the world that the launcher set in RANK, LOCAL_RANK and WORLD_SIZE, or else a world of one process."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def free_port() -> int:
    """Returns the number of a free TCP port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Sets the variables that a launcher would set, so that this process is one of several ranks on this machine.

    Call this before any rank connects.

    Args:
        rank: rank of this process.
        ranks: number of ranks.
        port: port on which rank 0 listens.
    """
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in told.items()})


def onednn_limit() -> str:
    """Returns the highest instruction set that oneDNN may use, as the user gave it. Empty if there is no limit.

    oneDNN reads the variable (ONEDNN_MAX_CPU_ISA or DNNL_MAX_CPU_ISA) only once, at its first computation.
    """
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")


@dataclass(frozen=True, kw_only=True)
class ExternalSetting:
    """A setting of the run that is also given outside its config, for example to the launcher."""

    key: str
    """Field of the config ("train.clip_norm"), or `accumulation` for batch / (ranks x micro-batch)."""
    value: Any
    """The value, in the form that the config uses."""
    source: str
    """Where the value was given, as errors name it ("accelerate launch --mixed_precision")."""


def is_launched() -> bool:
    """Returns whether a launcher started this process, alone or with others."""
    return "WORLD_SIZE" in os.environ


_FLAGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "ACCELERATE_MIXED_PRECISION": ("precision", "--mixed_precision", str),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("accumulation", "--gradient_accumulation_steps", int),
    "ACCELERATE_GRADIENT_CLIPPING": ("train.clip_norm", "--gradient_clipping", lambda norm: float(norm) or None),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("parallel.stage", "--zero_stage", int),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "parallel.offload_optimizer", "--offload_optimizer_device", lambda device: device != "none",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
        "parallel.offload_parameters", "--offload_param_device", lambda device: device != "none",
    ),
    "ACCELERATE_USE_CPU": ("runtime.device", "--cpu", lambda _: "cpu"),
    "ACCELERATE_DYNAMO_BACKEND": ("runtime.compile", "--dynamo_backend", str),
}  # fmt: skip
"""Variables by which `accelerate launch` passes on its flags and config file.

Each has the field of our config, the flag, and a function that parses the value.
"""
_UNSAID = {
    ("ACCELERATE_MIXED_PRECISION", "no"),
    ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ("ACCELERATE_USE_CPU", "False"),
}
"""Values that `accelerate launch` sets by default. It also sets all FSDP_* by default, so llmeff never reads those."""


def launcher_settings() -> list[ExternalSetting]:
    """Returns the launcher's settings: the number of ranks, and each flag that differs from the launcher's default."""
    found = [ExternalSetting(key="parallel.ranks", value=world().ranks, source="the launcher (WORLD_SIZE)")]
    for name, (key, flag, read) in _FLAGS.items():
        given = os.environ.get(name, "auto")
        if given != "auto" and (name, given) not in _UNSAID:
            found.append(ExternalSetting(key=key, value=_as_given(read, given), source=f"accelerate launch {flag}"))
    return found


def _as_given(read: Callable[[str], Any], given: str) -> Any:
    """Returns the parsed value. If it cannot be parsed, returns the text itself, which then equals no config value."""
    try:
        return read(given)
    except ValueError:
        return given


def launcher_engine() -> str | None:
    """Returns the flag of `accelerate launch` that chose an engine, such as `--use_deepspeed`, or None."""
    for name in ("use_deepspeed", "use_fsdp", "use_megatron_lm"):
        if os.environ.get(f"ACCELERATE_{name.upper()}", "false") == "true":
            return f"--{name}"
    return None


def is_cut_short() -> bool:
    """Returns whether `accelerate launch` was asked for several processes but started only this one.

    In this case `accelerate launch` sets MASTER_PORT but not WORLD_SIZE.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and not is_launched()


def launcher_file() -> str | None:
    """Returns the path given to `accelerate launch --deepspeed_config_file`, or None."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None


def ending_file() -> Path | None:
    """Returns the file in which this process reports its end to the `llmeff train` that started it, or None."""
    named = os.environ.get("LLMEFF_ENDING")
    return Path(named) if named else None


_SAFE_PATH = "PYTHONSAFEPATH"
"""If set, Python adds neither the working folder nor the script's folder to sys.path.

Then a file there, such as random.py, hides no module of the standard library.
"""


def keep_folder_off_paths() -> None:
    """Keeps the working folder off `sys.path` in all Python processes that this process starts from now on.

    Libraries start such processes too: multiprocessing, torch's compile workers. A value set by the user is kept.
    """
    os.environ.setdefault(_SAFE_PATH, "1")


@contextlib.contextmanager
def folder_off_paths() -> Iterator[None]:
    """Context manager that keeps the working folder off `sys.path` in Python processes started inside the block.

    The old setting is restored at the end.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


def child_environment() -> dict[str, str]:
    """Returns the environment for a run that this process starts, with the working folder kept off `sys.path`."""
    return dict(os.environ) | {_SAFE_PATH: "1"}


def launched_environment(ending: Path, *, on_gpu: bool) -> dict[str, str]:
    """Returns the environment for the launcher that `llmeff train` starts.

    The launcher runs in a temporary folder, and `llmeff/train.py` returns to the user's folder (LLMEFF_FOLDER). This is
    because `accelerate launch` puts its working folder on the PYTHONPATH of the ranks, before the standard library, and
    Python would import files such as sitecustomize.py from there.

    Args:
        ending: file in which a rank reports how the run ended.
        on_gpu: whether the machine has a GPU.
    """
    # torchrun warns if OMP_NUM_THREADS is not set. Each rank later sets its number of threads from the config.
    added = {"LLMEFF_ENDING": str(ending), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not on_gpu:
        # without this, DeepSpeed prints a warning to standard output
        added["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    if paths := os.environ.get("PYTHONPATH"):
        # relative entries refer to the current folder, which the launcher leaves; empty entries are dropped
        added["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)
    return child_environment() | added | {"LLMEFF_FOLDER": os.getcwd()}


@contextlib.contextmanager
def in_a_world() -> Iterator[None]:
    """Context manager in which the environment declares this process a rank: the only rank if there is no launcher.

    Process groups and engines need these variables, and set others. The end of the block restores the old environment.
    Otherwise, later runs in this process, and processes that it starts, would act as ranks.
    """
    before = dict(os.environ)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # `check_world` has compared these settings with the config
    if not is_launched():
        become_rank(0, 1, free_port())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def local_rank_stated() -> Iterator[None]:
    """Context manager in which LOCAL_RANK is set, by the launcher or by this function.

    DeepSpeed's ZeRO stage 3 reads it in its first forward pass.
    """
    is_ours = "LOCAL_RANK" not in os.environ
    if is_ours:
        os.environ["LOCAL_RANK"] = str(world().local_rank)
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop("LOCAL_RANK", None)


def cache_folder() -> Path:
    """Returns the folder of llmeff's caches: `LLMEFF_CACHE` if set, else `llmeff` in the user's cache folder."""
    given = os.environ.get("LLMEFF_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmeff"


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_cublas_repeatable() -> None:
    """Makes cuBLAS deterministic. Call this before CUDA is initialized. A value set by the user is kept."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_deepspeed_on_cpu() -> None:
    """Makes DeepSpeed compute on the CPU even if there is a GPU. Call this before DeepSpeed is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def silence_profiler() -> None:
    """Stops torch's profiler from printing progress messages to standard error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
