import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import llmeff
from llmeff.core.cpu import instruction_set
from llmeff.record import environment as module
from llmeff.record.environment import environment
from llmeff.record.schema import Environment

CPU = torch.device("cpu")


def test_it_says_what_runs_here():
    here = environment(CPU)
    assert here.device == "cpu"
    assert here.packages["torch"] == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert here.cores >= 1
    assert here.instruction_set == instruction_set()
    assert here.memory_bytes > 2**28
    assert Environment.model_validate_json(here.model_dump_json()) == here


def test_the_system_is_called_as_it_calls_itself():
    here = environment(CPU)
    assert here.system == subprocess.run(["uname", "-sm"], capture_output=True, text=True, check=True).stdout.strip()
    assert here.python == sys.version.split()[0]


def test_memory_is_so_many_pages(monkeypatch):
    asked, pages = os.sysconf, {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", lambda name: pages.get(name) or asked(name))
    assert environment(CPU).memory_bytes == 4_096_000


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("numpy", "torch", "no-such-package"))
    assert environment(CPU).packages.keys() == {"numpy", "torch"}


@pytest.fixture
def kernel(monkeypatch):
    """What the kernel's files say, by path; no other is there."""
    said, read = {}, Path.read_text

    def read_text(path, **options):
        if not path.is_relative_to("/proc"):
            return read(path, **options)
        if str(path) not in said:
            raise FileNotFoundError(path)
        return said[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return said


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "cpu"),
    [
        ("processor\t: 0\nmodel\t\t: 85\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n", "p", "A CPU @ 2 GHz"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "p", "p"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "", "aarch64"),
        (None, "", "aarch64"),
    ],
)
def test_a_cpu_is_named_by_its_model_or_else_its_kind(kernel, monkeypatch, cpuinfo, processor, cpu):
    kernel |= {} if cpuinfo is None else {"/proc/cpuinfo": cpuinfo}
    monkeypatch.setattr(module.platform, "processor", lambda: processor)
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert environment(CPU).cpu == cpu


@pytest.mark.parametrize(
    ("said", "driver"),
    [
        (
            {"/proc/driver/nvidia/version": "NVRM version: NVIDIA x86_64 Module  550.54.15  Tue 22:23:56\nGCC 12.3"},
            "550.54.15",
        ),
        ({"/proc/driver/nvidia/version": "NVRM version: unknown"}, None),
        ({}, None),
    ],
)
def test_a_gpu_is_told_with_its_memory_and_driver(kernel, monkeypatch, said, driver):
    kernel |= said
    properties = types.SimpleNamespace(name="A GPU", total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    here = environment(torch.device("cuda"))
    assert (here.device, here.device_memory_bytes, here.cuda, here.driver) == ("A GPU", 2**37, "13.0", driver)


def test_that_of_an_older_run_knows_no_instruction_set():
    here = environment(CPU)
    older = {name: value for name, value in here.model_dump(mode="json").items() if name != "instruction_set"}
    assert Environment.model_validate(older) == here.model_copy(update={"instruction_set": None})


def test_torch_is_named_with_its_build_where_its_metadata_leaves_that_out(monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "version", lambda package: "2.14.1")
    monkeypatch.setattr(module.torch, "__version__", "2.14.1+cu130")
    packages = environment(CPU).packages
    assert (packages["torch"], packages["numpy"]) == ("2.14.1+cu130", "2.14.1")


def test_it_tells_nobody_whose_machine_it_is(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-in-the-environment")
    written = environment(CPU).model_dump_json()
    private = [str(Path.home()), str(Path(llmeff.__file__).parent), "hunter2", os.getcwd()]
    if len(socket.gethostname()) > 3:
        private.append(socket.gethostname())
    assert [text for text in private if text in written and text != "/"] == []


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout whose package is taken for llmeff."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "First"], check=True)
    monkeypatch.setattr(module.llmeff, "__file__", str(package / "__init__.py"))
    return package


def test_every_uncommitted_change_has_its_hash(checkout):
    clean = environment(CPU)
    assert len(clean.commit) == 40
    assert clean.diff_sha256 is None
    (checkout / "__init__.pyc").write_text("ignored")
    assert environment(CPU).diff_sha256 is None

    (checkout / "__init__.py").write_text("one = 2\n")
    changed = environment(CPU)
    (checkout / "new.py").write_text("two = 2\n")
    added = environment(CPU)
    (checkout / "new.py").write_text("two = 3\n")
    edited = environment(CPU)
    assert len({here.diff_sha256 for here in (clean, changed, added, edited)}) == 4
    assert {here.commit for here in (changed, added, edited)} == {clean.commit}


def test_a_package_in_someone_else_s_checkout_has_no_commit(checkout, monkeypatch):
    foreign = checkout / "installed"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    monkeypatch.setattr(module.llmeff, "__file__", str(foreign / "__init__.py"))
    here = environment(CPU)
    assert (here.commit, here.diff_sha256) == (None, None)


def test_there_may_be_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment(CPU).commit is None
