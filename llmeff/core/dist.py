"""The only place that reads the process environment: this process's rank, where caches are, what it may use."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among those that train together."""

    rank: int
    """0 to ranks - 1."""
    local_rank: int
    """The rank on this machine, from 0."""
    ranks: int
    """How many processes train together."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes records, caches and the terminal."""
        return self.rank == 0


def world() -> World:
    """What the launcher set in RANK, LOCAL_RANK and WORLD_SIZE; without a launcher, one process alone."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Makes this process one of several on this machine, as a launcher would. Call it before any of them connects."""
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in told.items()})


def onednn_limit() -> str:
    """The highest instruction set that oneDNN may use, as the user named it; empty if there is no limit.

    oneDNN reads it once, at its first computation. Set it before then.
    """
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")


@dataclass(frozen=True, kw_only=True)
class ExternalSetting:
    """A value of the run that is also stated outside its config."""

    key: str
    """The config's field ("train.clip_norm"); `accumulation` stands for batch / (ranks x micro-batch)."""
    value: Any
    """The value in the config's form."""
    source: str
    """What states it, as errors name it."""


def is_launched() -> bool:
    """Whether a launcher started this process, alone or among others."""
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
"""What `accelerate launch` passes on of its flags and its config file: the field, the flag, how to read the value."""
_UNSAID = {
    ("ACCELERATE_MIXED_PRECISION", "no"),
    ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ("ACCELERATE_USE_CPU", "False"),
}
"""What it sets unasked. (It also sets all of FSDP_* unasked, so those are not read.)"""


def launcher_settings() -> list[ExternalSetting]:
    """What the launcher was told about the run: the number of ranks, and the flags that somebody gave."""
    found = [ExternalSetting(key="parallel.ranks", value=world().ranks, source="the launcher (WORLD_SIZE)")]
    for name, (key, flag, read) in _FLAGS.items():
        given = os.environ.get(name, "auto")
        if given != "auto" and (name, given) not in _UNSAID:
            found.append(ExternalSetting(key=key, value=_as_given(read, given), source=f"accelerate launch {flag}"))
    return found


def _as_given(read: Callable[[str], Any], given: str) -> Any:
    """The value as read, or the text itself if it cannot be read; that text equals no value of a config."""
    try:
        return read(given)
    except ValueError:
        return given


def launcher_engine() -> str | None:
    """The flag of `accelerate launch` that asked for an engine; None if none did."""
    for name in ("use_deepspeed", "use_fsdp", "use_megatron_lm"):
        if os.environ.get(f"ACCELERATE_{name.upper()}", "false") == "true":
            return f"--{name}"
    return None


def is_cut_short() -> bool:
    """Whether `accelerate launch` was asked for several processes but started one: it then sets a port but no ranks."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and not is_launched()


def launcher_file() -> str | None:
    """The file given to `accelerate launch --deepspeed_config_file`; None if none was."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None


def ending_file() -> Path | None:
    """Where this process leaves its last words for the `llmeff train` that started it; None if none did."""
    named = os.environ.get("LLMEFF_ENDING")
    return Path(named) if named else None


_SAFE_PATH = "PYTHONSAFEPATH"
"""If set, Python puts neither the working folder nor a script's folder on sys.path: a random.py there is not imported."""


def keep_folder_off_paths() -> None:
    """Keeps the working folder off the path of every Python process that this one starts from now on.

    Libraries start some: multiprocessing, torch's compile workers. A value that the user set stays.
    """
    os.environ.setdefault(_SAFE_PATH, "1")


@contextlib.contextmanager
def folder_off_paths() -> Iterator[None]:
    """Like `keep_folder_off_paths`, but for one block: the old value is restored after it."""
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
    """The environment for a run that this process starts: the working folder is on no path."""
    return dict(os.environ) | {_SAFE_PATH: "1"}


def launched_environment(ending: Path, *, on_gpu: bool) -> dict[str, str]:
    """The environment of processes that `llmeff train` starts. They start in a folder of ours; the script returns to this one.

    `accelerate launch` puts the folder that it starts in on its children's PYTHONPATH, before the standard library.
    Python would import some files there as it starts (sitecustomize.py).
    """
    # torchrun warns if it sets the number of threads itself; every rank sets its own from the config
    added = {"LLMEFF_ENDING": str(ending), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not on_gpu:
        # otherwise DeepSpeed warns on standard output
        added["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    if paths := os.environ.get("PYTHONPATH"):
        # relative entries are relative to this folder, and empty ones name none
        added["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)
    return child_environment() | added | {"LLMEFF_FOLDER": os.getcwd()}


@contextlib.contextmanager
def in_a_world() -> Iterator[None]:
    """A block in which this process is a rank. Without a launcher, it is the only rank of a world of its own.

    Process groups and engines need this, and set variables of their own. The environment is restored after the block:
    otherwise later runs, and processes that this one starts, would take themselves for ranks.
    """
    before = dict(os.environ)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # what `accelerate config` wrote was compared earlier
    if not is_launched():
        become_rank(0, 1, free_port())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def local_rank_stated() -> Iterator[None]:
    """A block in which LOCAL_RANK is set, by the launcher or here. DeepSpeed's stage 3 reads it in its first forward pass."""
    is_ours = "LOCAL_RANK" not in os.environ
    if is_ours:
        os.environ["LOCAL_RANK"] = str(world().local_rank)
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop("LOCAL_RANK", None)


def cache_folder() -> Path:
    """The folder of caches: `LLMEFF_CACHE`, else `llmeff` in the user's cache folder."""
    given = os.environ.get("LLMEFF_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmeff"


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_cublas_repeatable() -> None:
    """Makes cuBLAS give the same bits every time. Call it before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_deepspeed_on_cpu() -> None:
    """Makes DeepSpeed compute on the CPU even if there is a GPU. Call it before DeepSpeed is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def silence_profiler() -> None:
    """Keeps torch's profiler from writing its stages to standard error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
