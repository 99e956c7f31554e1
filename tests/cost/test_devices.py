import pytest

from llmeff.cost.devices import DEVICES, mfu, peak_flops_per_s

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


def test_more_than_the_peak_is_a_warning_and_no_figure(caplog):
    assert mfu(130e12, "Tesla T4", "float16") is None
    assert "no MFU is recorded: it would be 200.0 % on Tesla T4" in caplog.text


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_half_formats_are_faster_than_float32(device):
    assert 1 < device.half_flops_per_s / device.single_flops_per_s < 40
    assert 0.1e12 < device.memory_bytes_per_s < 10e12
