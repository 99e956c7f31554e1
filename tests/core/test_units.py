"""Numbers for people: the unit that fits, at the edges between units too."""

import pytest

from llmeff.core.units import show_bytes, show_count, show_quantity, show_seconds


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (show_bytes, 0, "0 B"),
        (show_bytes, 1023, "1023 B"),
        (show_bytes, 1024, "1.00 KiB"),
        (show_bytes, -1536, "-1.50 KiB"),
        (show_bytes, 5 * 2**50, "5120.00 TiB"),
        (show_count, 999, "999"),
        (show_count, 1000, "1.0k"),
        (show_count, 1e21, "1.0Z"),
        (show_seconds, 0.9, "900.0 ms"),
        (show_seconds, 59.94, "59.9 s"),
        (show_seconds, 59.99, "1m 00s"),
        (show_seconds, 3599.9, "1h 00m"),
        (show_seconds, 7265, "2h 01m"),
    ],
)
def test_the_unit_fits(show, value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("peak_bytes", 2048, "2.00 KiB"),
        ("train_s", 75, "1m 15s"),
        ("energy_j", 2500, "2.5 kJ"),
        ("model_flops", 3e12, "3.0 TFLOP"),
        ("steps", 1234.0, "1,234"),
        ("loss", 1.23456, "1.235"),
    ],
)
def test_a_quantity_has_the_unit_of_its_name(name, value, text):
    assert show_quantity(name, value) == text
