"""Compression of text by gzip: the baseline for a model's bits per byte."""

import zlib


class Gzip:
    """Measures the compressed size of concatenated texts under `gzip -9`."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(level=9, wbits=31)
        self._num_compressed = 0
        self._num_bytes = 0

    def add(self, content: bytes) -> None:
        """Appends a text to the compressed stream."""
        self._num_bytes += len(content)
        self._num_compressed += len(self._compressor.compress(content))

    def bits_per_byte(self) -> float:
        """Ends the stream and returns its compressed bits per byte of text. No text can be added afterwards."""
        self._num_compressed += len(self._compressor.flush())
        return 8 * self._num_compressed / self._num_bytes
