"""Libraries whose internals llmeff mirrors, and their tested versions. llmeff warns about newer versions."""

import functools
import importlib.metadata

from llmeff.core.log import logger

TESTED = {
    "accelerate": ("1.10", "1.15.0"),
    "bitsandbytes": ("0.50", "0.50.2"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "torch": ("2.13", "2.14.1"),
    "transformers": ("5.23", "5.24.0"),
}
"""The lowest and the highest tested version of each library. The lowest is also the lowest that pyproject.toml allows.

llmeff mirrors accelerate's process state, bitsandbytes's layout of 8-bit moments, the order in which DeepSpeed fills
and frees its buckets, the buffers of torch's DDP and FSDP2, and how transformers passes caches and masks to a model.
"""


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version, without suffixes such as `+cu130` and `.dev0`."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


@functools.cache
def check_tested(library: str) -> None:
    """Warns once per process if a library is newer than its tested versions. Does nothing if it is not installed."""
    lowest, highest = TESTED[library]
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return
    if release(version) > release(highest):
        logger.warning(
            "%s %s is newer than the versions that llmeff was tested with (%s to %s). llmeff mirrors its internals. If "
            "results or prices look wrong, install %s==%s",
            library, version, lowest, highest, library, highest,
        )  # fmt: skip
