"""Collects the versions and the hardware of a run. Records no environment variables, paths or host names."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import llmeff
from llmeff.core.cpu import instruction_set
from llmeff.core.dist import usable_cores
from llmeff.record.schema import Environment

_PACKAGES = (
    "torch", "accelerate", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "datasets", "peft",
    "triton", "flash-linear-attention",
)  # fmt: skip


def environment(device: torch.device) -> Environment:
    """Returns the environment of this process, which computes on `device`."""
    package = Path(llmeff.__file__).parent
    commit = _commit(package)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Environment(
        llmeff=importlib.metadata.version("llmeff"),
        commit=commit,
        diff_sha256=None if commit is None else _diff_sha256(package),
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None}
        | {
            "torch": str(torch.__version__)
        },  # with the build, such as "+cpu", which the package's metadata may leave out
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        instruction_set=instruction_set(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device="cpu" if gpu is None else gpu.name,
        device_memory_bytes=None if gpu is None else gpu.total_memory,
        cuda=None if gpu is None else torch.version.cuda,
        driver=None if gpu is None else _driver(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Returns the output of a git command in a folder, or None if git is missing or fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _commit(package: Path) -> str | None:
    # llmeff may be installed inside another project's checkout. Its commit does not describe llmeff then.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git(package, "rev-parse", "HEAD")
    return None if head is None else head.decode().strip()


def _diff_sha256(package: Path) -> str | None:
    diff = _git(package, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", ".")
    new = _git(package, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    if not diff and not new:
        return None
    digest = hashlib.sha256(diff or b"")
    for name in sorted((new or b"").split(b"\0")[:-1]):
        file = package / os.fsdecode(name)
        digest.update(name + b"\0" + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str | None:
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    return next((word for word in first.split() if word[0].isdigit() and "." in word), None)
