"""The script that `accelerate launch llmeff/train.py` runs; the same as `llmeff train`."""

import sys
from pathlib import Path

# A script's own folder comes first on sys.path, where llmeff/data would hide another package called data.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from llmeff.cli import main  # noqa: E402  the path above must come first

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
