"""What this CPU is good at: the instruction set that oneDNN takes of it, and whether it multiplies bfloat16 fast."""

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
"""By oneDNN's names. It computes by the last of them that the CPU has and `ONEDNN_MAX_CPU_ISA` allows."""

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
"""What each set holds within it, and by which flags of /proc/cpuinfo it is known beyond that."""
_ALIASES: dict[str, InstructionSet] = {
    "AVX10_1_512": "AVX512_CORE_FP16",
    "AVX10_1_512_AMX": "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16": "AVX512_CORE_AMX_FP16",
}
INSTRUCTION_SETS: tuple[InstructionSet, ...] = tuple(_NEEDS)
"""From the oldest on."""


def contained(name: InstructionSet) -> list[InstructionSet]:
    """The sets within one, and itself."""
    inner = [own for held in _NEEDS[name][0] for own in contained(held)]
    return [own for own in INSTRUCTION_SETS if own in (*inner, name)]


def effective(flags: Collection[str], limit: str = "") -> InstructionSet | None:
    """What oneDNN takes of a CPU; None where it is none of its sets for x86.

    Args:
        flags: of the CPU, as /proc/cpuinfo names them.
        limit: as `ONEDNN_MAX_CPU_ISA` has it, in any case; what oneDNN does not know is no limit.
    """
    named = limit.upper()
    highest = _ALIASES.get(named, named)
    allowed = contained(highest) if highest in INSTRUCTION_SETS else INSTRUCTION_SETS
    found = [name for name in allowed if all(_NEEDS[held][1] <= set(flags) for held in contained(name))]
    return found[-1] if found else None


def instruction_set() -> InstructionSet | None:
    """What oneDNN takes of this CPU in this process; None where it is not known."""
    return effective(_flags(), onednn_limit())


@cache
def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def multiplies_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32: on a GPU, and on a CPU with units for them (AMX).

    Without these, or those of AVX512_BF16, it is slow at them: on AVX2 many times slower than in float32.

    Args:
        device: `cpu`, or a kind of accelerator.
    """
    found = instruction_set()
    return device != "cpu" or (found is not None and "AVX512_CORE_AMX" in contained(found))
