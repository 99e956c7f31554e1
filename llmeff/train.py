"""The script for `accelerate launch llmeff/train.py`. It does the same as `llmeff train`."""

import os
import sys

# Python itself has already imported these two modules. Nothing else is imported until sys.path is correct.
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

# A script's own folder comes first on sys.path, where llmeff/data would hide another package called data.
if os.path.realpath(sys.path[0]) == os.path.join(ROOT, "llmeff"):
    del sys.path[0]

# `accelerate launch --use_deepspeed` appends its working folder to the user's PYTHONPATH. Remove the folder again, unless
# the user named it.
given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and given[-1] == os.getcwd():
    os.environ["PYTHONPATH"] = os.pathsep.join(given[:-1])
    if os.getcwd() in sys.path and os.getcwd() not in map(os.path.abspath, given[:-1]):
        sys.path.remove(os.getcwd())

# `llmeff train` starts launchers in a temporary folder (see `launched_environment`). Return to the user's folder.
os.chdir(os.environ.pop("LLMEFF_FOLDER", "."))
os.environ.setdefault("PYTHONSAFEPATH", "1")
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from llmeff.cli import main  # noqa: E402  the paths above must come first

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
