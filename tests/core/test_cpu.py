"""Which instruction set oneDNN takes, over what CPUs have and what the environment allows."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from llmeff.core import cpu
from llmeff.core.cpu import INSTRUCTION_SETS, contained, effective, instruction_set, multiplies_bfloat16

ZEN3 = {"sse4_1", "avx", "avx2"}
ALDER_LAKE = ZEN3 | {"avx_vnni"}
SIERRA_FOREST = ALDER_LAKE | {"avx_vnni_int8", "avx_ne_convert"}
SKYLAKE = ZEN3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
CASCADE_LAKE = SKYLAKE | {"avx512_vnni"}
ZEN4 = CASCADE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN4 | {"avx_vnni", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
NO_TILES = SAPPHIRE_RAPIDS - {"amx_tile"}
GRANITE_RAPIDS = SAPPHIRE_RAPIDS | {"amx_fp16"}
CPUS = {
    "SSE41": {"sse4_1"},
    "AVX": {"sse4_1", "avx"},
    "AVX2": ZEN3,
    "AVX2_VNNI": ALDER_LAKE,
    "AVX2_VNNI_2": SIERRA_FOREST,
    "AVX512_CORE": SKYLAKE,
    "AVX512_CORE_VNNI": CASCADE_LAKE,
    "AVX512_CORE_BF16": ZEN4,
    "AVX512_CORE_FP16": NO_TILES,
    "AVX512_CORE_AMX": SAPPHIRE_RAPIDS,
    "AVX512_CORE_AMX_FP16": GRANITE_RAPIDS,
}


def test_every_set_is_that_of_a_cpu():
    assert tuple(CPUS) == INSTRUCTION_SETS
    assert {name: effective(flags) for name, flags in CPUS.items()} == {name: name for name in CPUS}
    assert effective(set()) is None
    assert effective({"fp", "asimd", "sve"}) is None  # of an ARM


@pytest.mark.parametrize(("name", "limit"), [*itertools.product(CPUS, INSTRUCTION_SETS)])
def test_a_limit_lowers_it_to_the_last_set_that_both_hold(name, limit):
    found = effective(CPUS[name], limit.lower())
    both = [own for own in INSTRUCTION_SETS if own in contained(name) and own in contained(limit)]
    assert found == both[-1]


@pytest.mark.parametrize(
    ("flags", "limit", "expected"),
    [
        (SAPPHIRE_RAPIDS, "AVX2", "AVX2"),
        (SAPPHIRE_RAPIDS, "AVX512_CORE", "AVX512_CORE"),
        (SAPPHIRE_RAPIDS, "AVX2_VNNI_2", "AVX2_VNNI"),
        (ZEN4, "AVX2_VNNI", "AVX2"),
        (ZEN4, "AVX512_CORE_AMX", "AVX512_CORE_BF16"),
        (GRANITE_RAPIDS, "avx10_1_512_amx", "AVX512_CORE_AMX"),
        (GRANITE_RAPIDS, "AVX10_1_512", "AVX512_CORE_FP16"),
        (SAPPHIRE_RAPIDS, "ALL", "AVX512_CORE_AMX"),
        (SAPPHIRE_RAPIDS, "DEFAULT", "AVX512_CORE_AMX"),
        (SAPPHIRE_RAPIDS, "nothing that oneDNN knows", "AVX512_CORE_AMX"),
    ],
)
def test_limits_as_onednn_reads_them(flags, limit, expected):
    assert effective(flags, limit) == expected


def test_the_environment_limits_this_process(monkeypatch):
    monkeypatch.setattr(cpu, "_flags", lambda: frozenset(SAPPHIRE_RAPIDS))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert instruction_set() == "AVX512_CORE_AMX"
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX")  # its older name, where the other says nothing
    assert instruction_set() == "AVX"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    assert instruction_set() == "AVX"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert instruction_set() == "AVX2"


def test_onednn_agrees_whether_it_takes_bfloat16():
    found = instruction_set()
    takes = found is not None and {"AVX512_CORE", "AVX2_VNNI_2"} & set(contained(found))
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() == bool(takes)


@pytest.mark.parametrize(("name", "said"), [("SSE41", "Intel SSE4.1"), ("AVX", "Intel AVX"), ("AVX2", "Intel AVX2")])
def test_onednn_says_the_same(name, said):
    if name not in contained(instruction_set() or "SSE41"):
        pytest.skip(f"this CPU has no {name}")
    code = (
        "import torch; from llmeff.core.cpu import instruction_set; print('ours:', instruction_set());"
        "torch.nn.functional.conv2d(torch.zeros(2, 8, 32, 32), torch.zeros(8, 8, 3, 3))"
    )
    told = os.environ | {"ONEDNN_MAX_CPU_ISA": name, "ONEDNN_VERBOSE": "1"}
    lines = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True).stdout.splitlines()
    assert f"ours: {name}" in lines
    assert any(line.endswith(f"cpu,isa:{said}") for line in lines)


@pytest.mark.parametrize("name", CPUS)
def test_bfloat16_is_fast_on_gpus_and_on_cpus_with_amx(name, monkeypatch):
    monkeypatch.setattr(cpu, "_flags", lambda: frozenset(CPUS[name]))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert multiplies_bfloat16("cpu") == ("AMX" in name)
    assert multiplies_bfloat16("cuda")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not multiplies_bfloat16("cpu")
