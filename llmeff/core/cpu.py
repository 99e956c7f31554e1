"""The instruction set that oneDNN uses on this CPU, and whether the CPU multiplies bfloat16 fast."""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Literal

from llmeff.core.dist import onednn_limit

InstructionSet = Literal[
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
]
"""oneDNN's names of its x86 instruction sets, oldest first.

oneDNN uses the newest set that the CPU supports and `ONEDNN_MAX_CPU_ISA` allows.
"""

_NEEDS: dict[InstructionSet, tuple[tuple[InstructionSet, ...], frozenset[str]]] = {
    "SSE41": ((), frozenset({"sse4_1"})),
    "AVX": (("SSE41",), frozenset({"avx"})),
    "AVX2": (("AVX",), frozenset({"avx2"})),
    "AVX2_VNNI": (("AVX2",), frozenset({"avx_vnni"})),
    "AVX2_VNNI_2": (("AVX2_VNNI",), frozenset({"avx_vnni_int8", "avx_ne_convert"})),
    "AVX512_CORE": (("AVX2",), frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})),
    "AVX512_CORE_VNNI": (("AVX512_CORE",), frozenset({"avx512_vnni"})),
    "AVX512_CORE_BF16": (("AVX512_CORE_VNNI",), frozenset({"avx512_bf16"})),
    "AVX512_CORE_FP16": (("AVX512_CORE_BF16", "AVX2_VNNI"), frozenset({"avx512_fp16"})),
    "AVX512_CORE_AMX": (("AVX512_CORE_FP16",), frozenset({"amx_tile", "amx_int8", "amx_bf16"})),
    "AVX512_CORE_AMX_FP16": (("AVX512_CORE_AMX",), frozenset({"amx_fp16"})),
}
"""For each set: the sets that it includes directly, and the flags in /proc/cpuinfo that it needs besides theirs."""
_ALIASES: dict[str, InstructionSet] = {
    "AVX10_1_512": "AVX512_CORE_FP16",
    "AVX10_1_512_AMX": "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16": "AVX512_CORE_AMX_FP16",
}
"""Other names that oneDNN accepts for some of its sets."""
INSTRUCTION_SETS: tuple[InstructionSet, ...] = tuple(_NEEDS)
"""All instruction sets, oldest first."""


def contained(name: InstructionSet) -> list[InstructionSet]:
    """Returns an instruction set and all sets that it includes, oldest first."""
    inner = [part for held in _NEEDS[name][0] for part in contained(held)]
    return [part for part in INSTRUCTION_SETS if part in (*inner, name)]


def effective(flags: Collection[str], limit: str = "") -> InstructionSet | None:
    """Returns the instruction set that oneDNN uses on a CPU, or None if the CPU supports no set that oneDNN knows.

    Args:
        flags: the CPU's flags, as /proc/cpuinfo names them.
        limit: the value of `ONEDNN_MAX_CPU_ISA`, in upper or lower case. An unknown value sets no limit, as in oneDNN.
    """
    named = limit.upper()
    highest = _ALIASES.get(named, named)
    allowed = contained(highest) if highest in INSTRUCTION_SETS else INSTRUCTION_SETS
    found = [name for name in allowed if all(_NEEDS[held][1] <= set(flags) for held in contained(name))]
    return found[-1] if found else None


def instruction_set() -> InstructionSet | None:
    """Returns the instruction set that oneDNN uses in this process, or None if unknown."""
    return effective(_flags(), onednn_limit())


@cache
def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def multiplies_bfloat16(device: str) -> bool:
    """Returns whether matrix products are faster in bfloat16 than in float32: True on a GPU, and on a CPU with AMX.

    Returns False on all other CPUs. On CPUs without AVX512_BF16, bfloat16 products are slow: with AVX2, many times
    slower than in float32.

    Args:
        device: `cpu`, or a type of accelerator such as `cuda`.
    """
    found = instruction_set()
    return device != "cpu" or (found is not None and "AVX512_CORE_AMX" in contained(found))
