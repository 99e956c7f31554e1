import pytest

from llmeff.record.devices import DEVICES, mfu, peak_flops_per_s

H100 = "NVIDIA H100 80GB HBM3"


def test_peaks_are_dense_and_by_format():
    assert peak_flops_per_s(H100, "bfloat16") == 989.5e12
    assert peak_flops_per_s(H100, "float32") == 67e12


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40"])
def test_an_unknown_device_has_no_number(name):
    assert peak_flops_per_s(name, "bfloat16") is None
    assert mfu(1e12, name, "bfloat16") is None


def test_no_number_for_a_format_without_units():
    assert peak_flops_per_s("Tesla T4", "bfloat16") is None
    assert peak_flops_per_s("Tesla T4", "float16") == 65e12


def test_mfu():
    assert mfu(494.75e12, H100, "bfloat16") == 0.5


def test_all_of_the_peak_is_a_figure_too():
    assert mfu(65e12, "Tesla T4", "float16") == 1.0


def test_more_than_the_peak_is_a_warning_and_no_figure(caplog):
    assert mfu(130e12, "Tesla T4", "float16") is None
    assert "no MFU is recorded: it would be 200.0 % on Tesla T4" in caplog.text


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_half_formats_are_faster_than_float32(device):
    assert 1 < device.half_flops_per_s / device.single_flops_per_s < 40
    assert 0.1e12 < device.memory_bytes_per_s < 10e12


SHEETS = {
    # TFLOP/s in half formats, with sparsity where the sheet gives it so (x2); in float32; GB/s of memory; has bfloat16
    "NVIDIA B200": (2 * 2250, 2, 75, 8000, True),
    "NVIDIA H200": (1979, 2, 67, 4800, True),
    "NVIDIA H200 NVL": (1671, 2, 60, 4800, True),
    "NVIDIA H100 80GB HBM3": (1979, 2, 67, 3350, True),
    "NVIDIA H100 NVL": (1671, 2, 60, 3900, True),
    "NVIDIA H100 PCIe": (1513, 2, 51, 2000, True),
    "NVIDIA A100-SXM4-80GB": (312, 1, 19.5, 2039, True),
    "NVIDIA A100 80GB PCIe": (312, 1, 19.5, 1935, True),
    "NVIDIA A100-SXM4-40GB": (312, 1, 19.5, 1555, True),
    "NVIDIA A100-PCIE-40GB": (312, 1, 19.5, 1555, True),
    "Tesla V100-SXM2-16GB": (125, 1, 15.7, 900, False),
    "Tesla V100-SXM2-32GB": (125, 1, 15.7, 900, False),
    "Tesla V100-PCIE-16GB": (112, 1, 14, 900, False),
    "Tesla V100-PCIE-32GB": (112, 1, 14, 900, False),
    "NVIDIA L40S": (362.05, 1, 91.6, 864, True),
    "NVIDIA L4": (242, 2, 30.3, 300, True),
    "Tesla T4": (65, 1, 8.1, 320, False),
    "NVIDIA GeForce RTX 4090": (165.2, 1, 82.6, 1008, True),
    "NVIDIA GeForce RTX 3090": (71, 1, 35.6, 936, True),
}
"""As the makers print them."""


def test_the_table_is_that_of_the_sheets():
    assert DEVICES.keys() == SHEETS.keys()
    for name, (half, sparse, single, memory, has_bfloat16) in SHEETS.items():
        own = DEVICES[name]
        assert (own.half_flops_per_s, own.single_flops_per_s, own.memory_bytes_per_s, own.has_bfloat16) == (
            round(half * 1e3) * 10**9 / sparse, round(single * 1e3) * 10**9, memory * 10**9, has_bfloat16,
        ), name  # fmt: skip
