"""The one place that reads the process environment: who this process is among the ranks, and where caches lie."""

import os
from dataclasses import dataclass
from pathlib import Path


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


def stand_alone(port: int) -> None:
    """Makes this process a world of its own, where no launcher made one: what a process group asks for."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update({name: str(value) for name, value in alone.items()})


def launched_precision() -> str | None:
    """What `accelerate launch --mixed_precision` asked for ("bf16"); None where it asked for nothing."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return None if asked == "no" else asked


def cache_folder() -> Path:
    """Where token caches lie: `LLMEFF_CACHE`, else `llmeff` in the user's cache folder."""
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


def silence_profiler() -> None:
    """Keeps torch's profiler from writing its stages to standard error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
