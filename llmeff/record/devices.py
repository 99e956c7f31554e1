"""Peak rates of GPUs from the manufacturers' data sheets. The peak of a device that is not listed is unknown."""

from dataclasses import dataclass

from llmeff.core.log import logger


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates of one kind of device, for dense products. With 2:4 sparsity, data sheets list twice as much."""

    half_flops_per_s: float
    """FLOP/s of matrix products in float16 or bfloat16 with float32 accumulation."""
    single_flops_per_s: float
    """FLOP/s of matrix products in float32 without TF32, which torch does not use by default."""
    memory_bytes_per_s: float
    """Memory bandwidth, in bytes per second."""
    has_bfloat16: bool = True
    """Whether its matrix units support bfloat16."""


_V100_SXM = Device(  # NVIDIA V100 data sheet
    half_flops_per_s=125e12, single_flops_per_s=15.7e12, memory_bytes_per_s=0.9e12, has_bfloat16=False
)
_V100_PCIE = Device(  # NVIDIA V100 data sheet
    half_flops_per_s=112e12, single_flops_per_s=14e12, memory_bytes_per_s=0.9e12, has_bfloat16=False
)
_A100_40 = Device(  # NVIDIA A100 data sheet
    half_flops_per_s=312e12, single_flops_per_s=19.5e12, memory_bytes_per_s=1.555e12
)

DEVICES = {
    "NVIDIA B200": Device(  # NVIDIA HGX B200 data sheet, one of eight GPUs: 4.5 PFLOP/s with sparsity
        half_flops_per_s=2250e12, single_flops_per_s=75e12, memory_bytes_per_s=8e12
    ),
    "NVIDIA H200": Device(  # NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity
        half_flops_per_s=989.5e12, single_flops_per_s=67e12, memory_bytes_per_s=4.8e12
    ),
    "NVIDIA H200 NVL": Device(  # NVIDIA H200 data sheet, NVL: 1,671 with sparsity
        half_flops_per_s=835.5e12, single_flops_per_s=60e12, memory_bytes_per_s=4.8e12
    ),
    "NVIDIA H100 80GB HBM3": Device(  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
        half_flops_per_s=989.5e12, single_flops_per_s=67e12, memory_bytes_per_s=3.35e12
    ),
    "NVIDIA H100 NVL": Device(  # NVIDIA H100 data sheet, NVL: 1,671 with sparsity
        half_flops_per_s=835.5e12, single_flops_per_s=60e12, memory_bytes_per_s=3.9e12
    ),
    "NVIDIA H100 PCIe": Device(  # NVIDIA H100 PCIe product brief: 1,513 with sparsity
        half_flops_per_s=756.5e12, single_flops_per_s=51e12, memory_bytes_per_s=2e12
    ),
    "NVIDIA A100-SXM4-80GB": Device(  # NVIDIA A100 data sheet
        half_flops_per_s=312e12, single_flops_per_s=19.5e12, memory_bytes_per_s=2.039e12
    ),
    "NVIDIA A100 80GB PCIe": Device(  # NVIDIA A100 data sheet
        half_flops_per_s=312e12, single_flops_per_s=19.5e12, memory_bytes_per_s=1.935e12
    ),
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "NVIDIA L40S": Device(  # NVIDIA L40S data sheet: 733 with sparsity
        half_flops_per_s=362.05e12, single_flops_per_s=91.6e12, memory_bytes_per_s=0.864e12
    ),
    "NVIDIA L4": Device(  # NVIDIA L4 data sheet: 242 with sparsity
        half_flops_per_s=121e12, single_flops_per_s=30.3e12, memory_bytes_per_s=0.3e12
    ),
    "Tesla T4": Device(  # NVIDIA T4 data sheet
        half_flops_per_s=65e12, single_flops_per_s=8.1e12, memory_bytes_per_s=0.32e12, has_bfloat16=False
    ),
    "NVIDIA GeForce RTX 4090": Device(  # NVIDIA Ada GPU architecture paper, appendix A
        half_flops_per_s=165.2e12, single_flops_per_s=82.6e12, memory_bytes_per_s=1.008e12
    ),
    "NVIDIA GeForce RTX 3090": Device(  # NVIDIA Ampere GA102 GPU architecture paper, appendix A
        half_flops_per_s=71e12, single_flops_per_s=35.6e12, memory_bytes_per_s=0.936e12
    ),
}
"""Devices by CUDA's name. Names must match exactly: a MIG slice or laptop GPU with a similar name is another device."""


def peak_flops_per_s(device_name: str, dtype: str) -> float | None:
    """Returns the peak rate of contractions on a device, in FLOP/s.

    Args:
        device_name: CUDA's name of the device. A CPU ("cpu") is not in the table.
        dtype: format of the operands, such as "bfloat16".

    Returns:
        None if the device is not in the table or has no units for the format.
    """
    device = DEVICES.get(device_name)
    if device is None or (dtype == "bfloat16" and not device.has_bfloat16):
        return None
    return device.single_flops_per_s if dtype == "float32" else device.half_flops_per_s


def mfu(model_flops_per_s: float, device_name: str, dtype: str) -> float | None:
    """Returns the model FLOPs utilization (Chowdhery et al. 2022, appendix B). Causal attention counts T(T+1)/2 pairs.

    Args:
        model_flops_per_s: the achieved rate, computed from the price's `model_flops`.
        device_name: CUDA's name of the device.
        dtype: format of the operands.

    Returns:
        the fraction of the device's peak, 0 to 1. None if the peak is unknown. Also None, with a warning, if the rate
        exceeds the peak: then a FLOP count, a clock or the table must be wrong.
    """
    peak = peak_flops_per_s(device_name, dtype)
    if peak is None:
        return None
    share = model_flops_per_s / peak
    if share > 1:
        logger.warning(
            "no MFU is recorded: it would be %.1f %% on %s, because %.4g FLOP/s exceed its peak of %.4g in %s",
            100 * share, device_name, model_flops_per_s, peak, dtype,
        )  # fmt: skip
        return None
    return share
