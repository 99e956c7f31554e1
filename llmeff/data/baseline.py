"""What a general-purpose compressor needs for the same text: the baseline for a model's bits per byte."""

import zlib


class Gzip:
    """The size of concatenated texts as one `gzip -9` file."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(level=9, wbits=31)
        self._num_compressed = 0
        self._num_bytes = 0

    def add(self, content: bytes) -> None:
        """Appends a text."""
        self._num_bytes += len(content)
        self._num_compressed += len(self._compressor.compress(content))

    def bits_per_byte(self) -> float:
        """Returns the compressed bits per byte of input; closes the file."""
        self._num_compressed += len(self._compressor.flush())
        return 8 * self._num_compressed / self._num_bytes
