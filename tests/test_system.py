"""What needs a real system service: a disk that is really full."""

import subprocess

import pytest

from llmeff.cli import main
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
