"""Watchdog that ends a run on all ranks if a rank is lost or no rank makes progress, and reports each rank's state."""

import json
import os
import platform
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil

from llmeff.core import files, group, log
from llmeff.core.dist import world
from llmeff.core.heartbeat import HEARTBEAT, PARTS
from llmeff.core.units import show_seconds

FOLDER = ".beats"
"""Subfolder of a run's folder that each rank writes its heartbeat into."""

_EVERY_S = 1.0
"""Seconds between two checks."""
_GRACE_S = 5.0
"""Seconds that an interrupted rank has to end by itself.

One check adds at most this much idle time, so the time for which this process was itself stopped does not count."""
_DYING_S = 2.0
"""Longest wait, in seconds, for the process of a lost rank to end."""
_FAILED, _INTERRUPTED = 1, 130


@dataclass(frozen=True, kw_only=True)
class _Beat:
    """The heartbeat of a rank: its process, and the part of the run that it has reached."""

    rank: int
    node: str
    pid: int
    born_s: float
    """Start of its process, in seconds since the epoch. It detects a later process with the same pid."""
    step: int
    part: str
    waits: bool
    """Whether its main thread was waiting in torch.distributed for other ranks."""
    moved_s: float
    """Time of its last progress, in seconds since the epoch."""

    def state(self) -> str:
        """Returns the state of the rank's process: `gone`, `stopped` or `alive`. Always `alive` on another machine."""
        if self.node != platform.node():
            return "alive"
        try:
            process = psutil.Process(self.pid)
            status = process.status()
            is_same = abs(process.create_time() - self.born_s) < 1
        except psutil.NoSuchProcess:
            return "gone"
        if not is_same or status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "gone"
        return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"

    def show(self) -> str:
        """Returns a text that says when, and in which part of which step, the rank last made progress."""
        where = f"in {self.part} of step {self.step}" if self.step else f"in {self.part}"
        return f"rank {self.rank} last made progress {show_seconds(max(0.0, time.time() - self.moved_s))} ago, {where}"


class Watchdog:
    """A context around a run with several ranks. A thread in each rank writes its heartbeat and reads the other ranks'.

    If no rank makes progress for `timeout_s`, the run ends on all ranks. If a rank or the launcher is lost, the run
    ends at once. Call `settle` once the run's folder exists. Before that, waiting for other ranks does not end the run.

    Args:
        folder: the run's folder.
        timeout_s: the run ends if no rank makes progress for this many seconds.
    """

    def __init__(self, folder: Path, timeout_s: float):
        self._folder, self._timeout_s = folder, timeout_s
        self._rank, self._ranks = world().rank, world().ranks
        self._is_settled = self._is_over = False
        self._main = threading.main_thread().ident
        self._parent, self._born_s = os.getppid(), psutil.Process().create_time()
        self._count, self._idle_s, self._looked_s = HEARTBEAT.count, 0.0, time.monotonic()
        self._interrupted_s: float | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        HEARTBEAT.step, HEARTBEAT.part = 0, "start"
        if self._ranks > 1:
            self._ear, self._mouth = os.pipe()
            os.set_blocking(self._mouth, False)
            self._listen()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def _listen(self) -> None:
        """Forwards signals to the thread, because the main thread may be waiting inside an engine."""
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)

    def settle(self) -> None:
        """Starts to use the run's folder, which must exist, for heartbeats and engine logs. All ranks must call it."""
        log.settle(self._folder / f"engine-{self._rank:05d}.log")
        if self._thread is None:
            return
        with group.agreed():
            if world().is_main:
                files.refuse_links(self._folder / FOLDER, itself=True)
                _clear(self._folder / FOLDER)
                (self._folder / FOLDER).mkdir(exist_ok=True)
        self._write(self._beat())  # so that the other ranks know of this one even if it dies at once
        self._is_settled = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if group.is_loss(error):
            traceback.print_exception(kind, error, trace)
            self._await_death()
            self._end("a rank was lost")
        if self._handler is not None:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._handler)
        self._is_over = True
        os.write(self._mouth, b"\0")
        self._thread.join()
        os.close(self._ear)
        os.close(self._mouth)
        _clear(self._folder / FOLDER, self._rank)

    # -- the thread

    def _watch(self) -> None:
        while not self._is_over:
            heard = os.read(self._ear, 64) if select.select([self._ear], [], [], _EVERY_S)[0] else b""
            if signal.SIGTERM in heard:
                self._end("the launcher ended this run")
            if signal.SIGINT in heard:
                self._interrupted_s = time.monotonic()
            if not self._is_over:
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if self._interrupted_s is not None and now - self._interrupted_s > _GRACE_S:
            os._exit(_INTERRUPTED)
        elapsed, self._looked_s = now - self._looked_s, now
        self._idle_s += min(elapsed, _GRACE_S)
        if HEARTBEAT.count != self._count:
            self._count, self._idle_s = HEARTBEAT.count, 0.0
        beat = self._beat()
        if self._is_settled:
            self._write(beat)
        if os.getppid() != self._parent:
            self._end("the launcher is gone")
        is_waiting_for_data = beat.waits and not self._is_settled and group.is_joined()
        if self._idle_s > self._timeout_s and not is_waiting_for_data:
            moved_s = max(each.moved_s for each in (beat, *self._others()))
            if time.time() - moved_s > self._timeout_s:
                limit = f"parallel.timeout_s = {self._timeout_s:g}"
                self._end(f"no rank made progress for {show_seconds(self._idle_s)} ({limit})")

    def _beat(self) -> _Beat:
        return _Beat(
            rank=self._rank, node=platform.node(), pid=os.getpid(), born_s=self._born_s, step=HEARTBEAT.step,
            part=HEARTBEAT.part, waits=self._waits(), moved_s=time.time() - self._idle_s,
        )  # fmt: skip

    def _waits(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if frame.f_code.co_filename.endswith("distributed_c10d.py"):
                return True
            frame = frame.f_back
        return False

    def _write(self, beat: _Beat) -> None:
        """Replaces this rank's heartbeat file atomically, without flushing it: a machine crash makes it useless."""
        place = self._folder / FOLDER / f"rank-{self._rank:05d}.json"
        part = place.with_suffix(".part")
        try:
            part.write_text(json.dumps(vars(beat)), encoding="utf-8")
            part.replace(place)
        except OSError:  # if the disk is full, the run fails when it writes something that matters
            return

    def _others(self) -> list[_Beat]:
        if not self._is_settled:
            return []
        beats = [_read(path) for path in sorted((self._folder / FOLDER).glob("rank-*.json"))]
        return [beat for beat in beats if beat is not None and beat.rank != self._rank]

    def _await_death(self) -> None:
        """Waits a short time for a lost rank's process to end. Its connections close before the process ends."""
        deadline_s = time.monotonic() + _DYING_S
        while time.monotonic() < deadline_s and all(beat.state() == "alive" for beat in self._others()):
            time.sleep(_DYING_S / 40)

    def _end(self, reason: str) -> NoReturn:
        """Ends this process. Only the first rank that ends prints the reason."""
        text = self._diagnosis(reason)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._speaks():
            log.say_last(log.complaint([text]), _FAILED)
        os._exit(_FAILED)

    def _speaks(self) -> bool:
        if not self._is_settled:  # the folder belongs to an earlier start of the run
            return True
        try:
            os.close(os.open(self._folder / FOLDER / "told", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _diagnosis(self, reason: str) -> str:
        beats = sorted([self._beat(), *self._others()], key=lambda beat: beat.rank)
        states = {beat.rank: beat.state() for beat in beats}
        known = [f"rank {rank} is {state}" for rank, state in states.items() if state != "alive"]
        if not known:
            known = [f"rank {rank} is behind" for rank in _behind(beats)]
        shown = "; ".join([*known, *(beat.show() for beat in beats)])
        advice = f"To resume: {shlex.join(['llmeff', 'train', '--resume', '--out', str(self._folder)])}"
        return f"{reason}: {shown}. {advice if self._is_settled else 'The run had not begun.'}"


def _read(path: Path) -> _Beat | None:
    """Reads a heartbeat. Returns None if the file cannot be read, as on some file systems while it is replaced."""
    try:
        return _Beat(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _behind(beats: list[_Beat]) -> list[int]:
    """Returns the ranks that have made the least progress. The list is empty if all ranks are equally far."""

    def place(beat: _Beat) -> tuple[Any, ...]:
        return beat.step, PARTS.index(beat.part), beat.waits

    first = min(map(place, beats))
    found = [beat.rank for beat in beats if place(beat) == first]
    return found if len(found) < len(beats) else []


def _clear(folder: Path, rank: int | None = None) -> None:
    """Removes a rank's heartbeat, or all heartbeats if `rank` is None. Removes the folder too if it is then empty."""
    try:
        for path in folder.glob("*" if rank is None else f"rank-{rank:05d}.*"):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # it does not exist, or another rank has a heartbeat in it
        return
