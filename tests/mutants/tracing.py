"""Plugins of pytest: one notes which functions of the package each test reaches, one runs tests in a given order."""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest


def plain_name(qualified: str) -> str:
    """A function's name as the mutants' are: a lambda or comprehension is part of the function around it."""
    return qualified.replace("<locals>.", "").partition(".<")[0]


class Reach:
    """By test: its CPU seconds, and the functions that it and the fixtures that it uses call in this process."""

    def __init__(self, package: Path):
        self.seconds: dict[str, float] = defaultdict(float)
        self.reached: dict[str, set[str]] = defaultdict(set)
        self.failed: list[str] = []
        self._package = str(package)
        self._names: dict[Any, str | None] = {}
        self._now: set[str] = set()
        self._of_fixtures: dict[str, set[str]] = defaultdict(set)
        sys.setprofile(self._see)
        threading.setprofile(self._see)

    def _see(self, frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self._names:
            self._names[code] = self._name(code)
        name = self._names[code]
        if name is not None:
            self._now.add(name)

    def _name(self, code: Any) -> str | None:
        if not code.co_filename.startswith(self._package):
            return None
        parts = Path(code.co_filename).relative_to(Path(self._package).parent).with_suffix("").parts
        return f"{'.'.join(parts)}:{plain_name(code.co_qualname)}"

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
        """What a fixture calls counts for all tests that use it."""
        outer, self._now = self._now, set()
        try:
            return (yield)
        finally:
            self._of_fixtures[f"{fixturedef.baseid}::{fixturedef.argname}"] |= self._now
            self._now |= outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        """A test, from its fixtures to their end."""
        self._now, start_s = set(), time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] += time.process_time() - start_s
            self.reached[item.nodeid] |= self._now

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: Any) -> Generator[None, Any, Any]:
        """While it still knows its fixtures."""
        for name, definitions in item._fixtureinfo.name2fixturedefs.items():
            for definition in definitions:
                self.reached[item.nodeid] |= self._of_fixtures[f"{definition.baseid}::{name}"]
        return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that fails without a change judges none."""
        if report.failed:
            self.failed.append(report.nodeid)


class Order:
    """Runs these tests alone, in this order."""

    def __init__(self, wanted: Sequence[str]):
        self._places = {name: place for place, name in enumerate(wanted)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Where pytest lets plugins sort."""
        kept: Iterable[Any] = (item for item in items if item.nodeid in self._places)
        items[:] = sorted(kept, key=lambda item: self._places[item.nodeid])
