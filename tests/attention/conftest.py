"""Triton's kernels without a GPU: its interpreter runs them on the CPU."""

import builtins
import importlib
import os
import sys
import warnings

import pytest


class _Number(int):
    """What counts a loop in a kernel, and can be asked for another width, which a plain number cannot."""

    def to(self, *_):
        return self


def _range(*bounds):
    return map(
        _Number, builtins.range(*(int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds))
    )


@pytest.fixture
def interpreted(request, monkeypatch):
    """Lets flash-linear-attention run wherever the test's `device` is."""
    if request.getfixturevalue("device") != "cpu":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton interprets its kernels where TRITON_INTERPRET=1 was set before")
    autotuner = importlib.import_module("triton.runtime.autotuner")

    def run(self, *arguments, **named):
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        return self.fn.run(*arguments, **{**named, **self.prune_configs(named)[0].all_kwargs()})

    # without a GPU nothing can be timed, so the first of each kernel's settings is taken
    monkeypatch.setattr(autotuner.Autotuner, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("gated_delta_rule", "kda", "gla", "simple_gla"):
            importlib.import_module(f"fla.ops.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            monkeypatch.setitem(vars(module), "range", _range)
