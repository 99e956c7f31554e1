"""llmeff: a distributed training harness and laboratory for the efficiency of large language models."""

import sys

# `python -m llmeff.cli` puts the working folder first on sys.path, where a random.py would be imported in place of the
# standard library's. As nothing is imported before, only what `python -m` itself needs can have come from there. A clone
# that is not installed is still found by the processes that this one starts, but only after all else.
_is_program = any(word.removeprefix("-m").startswith("llmeff.") for word in sys.orig_argv)
if _is_program and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    _folder = sys.path.pop(0)
    if __path__[0] == f"{_folder}/{__name__}" and _folder not in sys.path:
        sys.path.append(_folder)

__version__ = "0.1.0"
