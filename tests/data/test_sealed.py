import pytest

from llmeff.data import sealed


def test_a_changed_bit_of_a_large_file_is_seen_where_it_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "SAMPLE_BLOCK_BYTES", 16)
    monkeypatch.setattr(sealed, "SAMPLE_BLOCKS", 4)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    whole = sealed._sample(file)
    seen = []
    for place in range(1000):
        content = bytearray(1000)
        content[place] = 1
        file.write_bytes(content)
        seen.append(sealed._sample(file) != whole)
    assert 48 <= sum(seen) <= 64
    assert seen[0]
    assert seen[-1]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64])
def test_every_bit_of_a_small_file_is_seen(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sealed, "SAMPLE_BLOCK_BYTES", 16)
    monkeypatch.setattr(sealed, "SAMPLE_BLOCKS", 4)
    file = tmp_path / "file"
    seen = set()
    for place in range(size + 1):
        file.write_bytes(bytes(place == i for i in range(size)))
        seen.add(sealed._sample(file))
    assert len(seen) == size + 1
