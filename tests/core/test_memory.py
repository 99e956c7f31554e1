import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from llmeff.core.memory import keep_freed_memory

torch.set_num_threads(1)
assert sys.argv[1] == "off" or keep_freed_memory()

number, size = map(int, sys.argv[2:])

def step():
    tensors = [torch.ones(size) for _ in range(number)]
    del tensors

for _ in range(30):  # until the heap has found its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("number", [8, 1])
def test_what_is_freed_is_used_again_without_page_faults(number):
    """Ten steps of 40 MiB are 102,400 pages, where the C library was told before to give all back; a block as large always."""
    given_back = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def faults(told):
        command = [sys.executable, "-c", SCRIPT, told, str(number), str(10 * 2**20 // number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | given_back)
        return int(done.stdout)

    assert faults("on") < 1000
    assert faults("off") > 100_000
