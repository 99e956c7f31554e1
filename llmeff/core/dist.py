"""The one place that reads the process environment: who this process is among the ranks, where caches lie, what it may use."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together."""

    rank: int
    """0 to ranks - 1."""
    local_rank: int
    """The rank on this machine."""
    ranks: int
    """How many processes train together."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes records, caches and the terminal."""
        return self.rank == 0


def world() -> World:
    """What the launcher said through RANK, LOCAL_RANK and WORLD_SIZE; one process alone without a launcher."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Makes this process one of several on this machine, as a launcher would; before any of them is connected."""
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in told.items()})


def onednn_limit() -> str:
    """The highest instruction set that oneDNN may take, as the user named it; empty where there is no limit.

    oneDNN reads it once, when it first computes: whoever sets it must do so before.
    """
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")


@dataclass(frozen=True, kw_only=True)
class ExternalSetting:
    """A value of the run that something beside its config states too."""

    key: str
    """The config's field ("train.clip_norm"); `accumulation` stands for batch / (ranks x micro-batch)."""
    value: Any
    """As the config would have it."""
    source: str
    """Who states it."""


def is_launched() -> bool:
    """Whether a launcher started this process: it alone, or among others."""
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
"""What `accelerate launch` hands on of its flags and of its own config file: the field, the flag, how it is read."""
_UNSAID = {
    ("ACCELERATE_MIXED_PRECISION", "no"),
    ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ("ACCELERATE_USE_CPU", "False"),
}
"""What it sets although nobody asked for it. (All of FSDP_* too, which is therefore not read.)"""


def launcher_settings() -> list[ExternalSetting]:
    """What the launcher was told of the run: the ranks, and flags that somebody gave."""
    found = [ExternalSetting(key="parallel.ranks", value=world().ranks, source="the launcher (WORLD_SIZE)")]
    for name, (key, flag, read) in _FLAGS.items():
        given = os.environ.get(name, "auto")
        if given != "auto" and (name, given) not in _UNSAID:
            found.append(ExternalSetting(key=key, value=_as_given(read, given), source=f"accelerate launch {flag}"))
    return found


def _as_given(read: Callable[[str], Any], given: str) -> Any:
    """Read, or where that cannot be as it stands, which then is like nothing in a config."""
    try:
        return read(given)
    except ValueError:
        return given


def launcher_engine() -> str | None:
    """The flag of `accelerate launch` that asked for an engine; None where none did."""
    for name in ("use_deepspeed", "use_fsdp", "use_megatron_lm"):
        if os.environ.get(f"ACCELERATE_{name.upper()}", "false") == "true":
            return f"--{name}"
    return None


def is_cut_short() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one: it then names a port, and no ranks."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and not is_launched()


def launcher_file() -> str | None:
    """What `accelerate launch --deepspeed_config_file` named; None where nothing did."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None


def ending_file() -> Path | None:
    """Where this process leaves its last word for the `llmeff train` that started it; None where none did."""
    named = os.environ.get("LLMEFF_ENDING")
    return Path(named) if named else None


_SAFE_PATH = "PYTHONSAFEPATH"
"""Set, Python puts neither the working folder nor a script's own on sys.path: a random.py there is not imported."""


def keep_folder_off_paths() -> None:
    """Has every Python process that this one starts from now on leave the working folder off its path.

    Libraries start some: multiprocessing's, torch's compile workers. A choice of the user's stays.
    """
    os.environ.setdefault(_SAFE_PATH, "1")


@contextlib.contextmanager
def folder_off_paths() -> Iterator[None]:
    """`keep_folder_off_paths` for a block, in whoever's process this is."""
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
    """The environment of a run of ours that this process starts: the working folder is on no path."""
    return dict(os.environ) | {_SAFE_PATH: "1"}


def launched_environment(ending: Path, *, on_gpu: bool) -> dict[str, str]:
    """The environment of processes that `llmeff train` starts; in a folder of ours, and the script goes back to this one.

    `accelerate launch` puts the folder that it is started in on its children's PYTHONPATH, before the standard library:
    what is there would be imported as Python starts (sitecustomize.py).
    """
    # torchrun warns that it sets the number of threads where nobody did; every rank sets its own from the config
    added = {"LLMEFF_ENDING": str(ending), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not on_gpu:
        added["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on standard output
    if paths := os.environ.get(
        "PYTHONPATH"
    ):  # what is relative in it is so to this folder, and what is empty names none
        added["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)
    return child_environment() | added | {"LLMEFF_FOLDER": os.getcwd()}


@contextlib.contextmanager
def in_a_world() -> Iterator[None]:
    """A block in which this process is a rank, of a world of its own where no launcher made one.

    Process groups and engines ask for it, and leave word of their own; afterwards the environment is as it was before, or runs
    after this one, and processes that this one starts, would take themselves for ranks.
    """
    before = dict(os.environ)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # what `accelerate config` wrote was compared before
    if not is_launched():
        become_rank(0, 1, free_port())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def local_rank_stated() -> Iterator[None]:
    """A block in which LOCAL_RANK is set, by the launcher or here: DeepSpeed's stage 3 reads it in its first forward pass."""
    is_ours = "LOCAL_RANK" not in os.environ
    if is_ours:
        os.environ["LOCAL_RANK"] = str(world().local_rank)
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop("LOCAL_RANK", None)


def cache_folder() -> Path:
    """Where caches lie: `LLMEFF_CACHE`, else `llmeff` in the user's cache folder."""
    given = os.environ.get("LLMEFF_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmeff"


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_cublas_repeatable() -> None:
    """What cuBLAS needs to give the same bits again; before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_deepspeed_on_cpu() -> None:
    """Has DeepSpeed compute on the CPU where a GPU is there too; before it is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def silence_profiler() -> None:
    """Keeps torch's profiler from writing its stages to standard error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
