import gzip

import pytest

from llmeff.data.baseline import Gzip


@pytest.mark.parametrize("parts", [[b"abc" * 100], [b"one ", b"two ", b"one two " * 50], [b"", b"x"]])
def test_equals_one_gzip_file(parts):
    meter = Gzip()
    for part in parts:
        meter.add(part)
    whole = b"".join(parts)
    assert meter.bits_per_byte() == 8 * len(gzip.compress(whole, 9)) / len(whole)
