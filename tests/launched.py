"""`llmeff train` as a user starts it, with ranks that die, stop or sleep where a module of the user's tells them to."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 14
SETTINGS = (
    "train.steps=14", "train.batch=4", "data.source.max_bytes=300000", "data.splits.by=span",
    "data.sequence_length=16", "model.width=16", "model.mlp_width=32", "schedule.warmup_steps=3",
    "checkpoint.every=3", "evaluation.every=5", "evaluation.max_units=2", "evaluation.sample_tokens=4",
    "parallel.ranks=2",
)  # fmt: skip

FAULT = """
import os, signal, time
from pathlib import Path
from llmeff.core.heartbeat import beat
from llmeff.tasks.causal_lm import CausalLMTask

batch, marker = CausalLMTask.batch, Path(os.environ.get("FAULT_ONCE", "none"))

def faulty(self, step, rows, device):
    if os.environ.get("RANK", "0") == os.environ["FAULT_RANK"] and step == int(os.environ["FAULT_STEP"]):
        if marker.name == "none" or not marker.exists():
            if marker.name != "none":
                marker.touch()
            ACT
    return batch(self, step, rows, device)

CausalLMTask.batch = faulty
"""
ACTS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "asleep": "time.sleep(1000)",
    "busy": "[(time.sleep(1), beat()) for _ in range(18)]",
    "wrong": "raise RuntimeError('a component of the user is wrong')",
}


def start(*arguments: object, fault: str | None = None, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The command, in a folder; the fault comes to rank 1 at the eighth step unless the environment says otherwise."""
    given = [str(argument) for argument in arguments]
    if fault is not None:
        (folder / "fault.py").write_text(FAULT.replace("ACT", ACTS[fault]), encoding="utf-8")
        given.append("--import=fault")
    told = {"OMP_NUM_THREADS": "1", "FAULT_RANK": "1", "FAULT_STEP": "7", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "llmeff.cli", "train", *given], cwd=folder, env=os.environ | told,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*arguments: object, fault: str | None = None, folder: Path, **environment: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of the command."""
    process = start(*arguments, fault=fault, folder=folder, **environment)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def small(*settings: str) -> list[str]:
    """A small run's arguments."""
    return ["--recipe=debug", *(f"--set={setting}" for setting in (*SETTINGS, *settings))]
