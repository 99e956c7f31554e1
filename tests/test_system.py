"""What needs a real system service: a disk that is really full, and Slurm."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmeff.cli import main
from llmeff.compare.ledger import LEDGER, read_ledger
from llmeff.core.dist import free_port
from tests.lab.test_sweep import SMALL as SMALL_SWEEP
from tests.test_cli import SMALL

pytestmark = pytest.mark.system


@pytest.fixture(params=[64, 256, 700])
def small_disk(request, tmp_path):
    """A file system of so many KiB, in memory; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_error_and_what_was_saved_goes_on_elsewhere(small_disk, capsys):
    folder = small_disk / "run"
    code = main(["train", *SMALL, "--set=train.steps=40", "--set=checkpoint.every=1", "--quiet", "--out", str(folder)])
    error = capsys.readouterr().err
    assert code == 2
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert not list(small_disk.rglob(".partial-*"))


# -- Slurm (Debian: slurm-wlm, munge)

SLURM = """
ClusterName=here
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
NodeName={host} CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of this one node."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm needs root and Debian's slurm-wlm and munge; missing: {', '.join(missing) or 'root'}")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(SLURM.format(
        host=socket.gethostname().partition(".")[0], user=getpass.getuser(), folder=folder, cores=os.cpu_count(),
        controller_port=free_port(), node_port=free_port(),
    ))  # fmt: skip
    monkeypatch.setenv("SLURM_CONF", str(config))
    daemons = []
    for line in (
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ):  # fmt: skip
        daemons.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1)
    deadline = time.monotonic() + 60
    while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout:
        logs = "".join(path.read_text()[-800:] for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
    yield folder
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(timeout=30)


def wait_for_slurm(timeout_s):
    """Until no job is left."""
    deadline = time.monotonic() + timeout_s
    while (left := subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout).strip():
        assert time.monotonic() < deadline, left
        time.sleep(1)


@pytest.mark.timeout(900)
def test_a_sweep_under_slurm_comes_to_the_ledger_that_it_comes_to_here(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    (tmp_path / "small.json").write_text(json.dumps(SMALL_SWEEP))
    assert main(["sweep", "--config=small.json", "--out=here", "--quiet"]) == 0
    assert main(["sweep", "--config=small.json", "--out=there", "--slurm", "--sbatch=--time=30"]) == 0
    submit = capsys.readouterr().out.splitlines()[-1]
    assert "#SBATCH --array=0-3\n" in (tmp_path / "there" / "slurm" / "tuning.sbatch").read_text()
    subprocess.run(submit, shell=True, check=True)
    wait_for_slurm(600)
    found = [
        [
            (entry.name, entry.status, entry.trial, entry.loss, entry.curve_losses)
            for entry in read_ledger(path / LEDGER)
        ]
        for path in (tmp_path / "here", tmp_path / "there")
    ]
    assert found[0] == found[1]
    assert "Against adamw; seeds: 2" in (tmp_path / "there" / "slurm" / "ledger.log").read_text()


@pytest.mark.timeout(300)
def test_a_run_under_slurm(slurm, tmp_path, monkeypatch):
    job = Path(__file__).resolve().parent.parent / "jobs" / "train.sbatch"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run(["sbatch", "--cpus-per-task=1", str(job), *SMALL], check=True, capture_output=True)
    wait_for_slurm(200)
    assert list(tmp_path.glob("runs/slurm-*/result.json")), [path.read_text() for path in tmp_path.glob("*.log")]
