import pytest

from llmeff.core.config import ConfigError
from llmeff.data import verified_cache


def write(part):
    (part / "meta.json").write_text('{"size": 3}')
    (part / "tokens").write_bytes(b"abc")


def test_one_process_makes_it_while_the_others_wait(tmp_path):
    folder, waits = tmp_path / "cache", []

    def main():
        verified_cache.ensure_by_one(
            folder, write, "token cache", is_main=True, wait=lambda: waits.append(folder.exists())
        )

    verified_cache.ensure_by_one(folder, None, "token cache", is_main=False, wait=main)
    assert waits == [True]
    assert (folder / "tokens").read_bytes() == b"abc"
    meta, _ = verified_cache.read_meta(folder)
    assert (meta["size"], list(meta["files"])) == (3, ["tokens"])


def test_where_it_was_not_made_the_others_say_so(tmp_path):
    with pytest.raises(ConfigError, match=r"^the token cache could not be made: see the error of the main process$"):
        verified_cache.ensure_by_one(tmp_path / "cache", write, "token cache", is_main=False, wait=lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_made_the_others_wait_no_longer(tmp_path):
    def full(part):
        raise OSError(28, "No space left on device")

    waits = []
    with pytest.raises(
        ConfigError, match=r"the token cache .* cannot be written \(No space left on device\): free some space"
    ):
        verified_cache.ensure_by_one(
            tmp_path / "cache", full, "token cache", is_main=True, wait=lambda: waits.append(True)
        )
    assert waits == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bit_of_a_large_file_is_seen_where_it_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_cache, "SAMPLE_BLOCK_BYTES", 16)
    monkeypatch.setattr(verified_cache, "SAMPLE_BLOCKS", 4)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    whole = verified_cache._sample(file)
    seen = []
    for place in range(1000):
        content = bytearray(1000)
        content[place] = 1
        file.write_bytes(content)
        seen.append(verified_cache._sample(file) != whole)
    assert 48 <= sum(seen) <= 64
    assert seen[0]
    assert seen[-1]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64])
def test_every_bit_of_a_small_file_is_seen(tmp_path, monkeypatch, size):
    monkeypatch.setattr(verified_cache, "SAMPLE_BLOCK_BYTES", 16)
    monkeypatch.setattr(verified_cache, "SAMPLE_BLOCKS", 4)
    file = tmp_path / "file"
    seen = set()
    for place in range(size + 1):
        file.write_bytes(bytes(place == i for i in range(size)))
        seen.add(verified_cache._sample(file))
    assert len(seen) == size + 1
