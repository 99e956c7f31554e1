"""llmeff: a distributed training harness and laboratory for the efficiency of large language models."""

import sys

# `python -m llmeff.cli` puts the working folder first on sys.path. A random.py there would be imported in place of the
# standard library's, so the folder is removed before anything else is imported (only `python -m` itself has imported
# modules so far). If llmeff is in that folder, as in a clone that is not installed, the folder goes to the end of sys.path,
# so that processes started by this one can import llmeff.
_is_program = any(word.removeprefix("-m").startswith("llmeff.") for word in sys.orig_argv)
if _is_program and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    _folder = sys.path.pop(0)
    if __path__[0] == f"{_folder}/{__name__}" and _folder not in sys.path:
        sys.path.append(_folder)

__version__ = "0.1.0"
