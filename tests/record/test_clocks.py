import contextlib

import pytest
import torch

from llmeff.record import clocks
from llmeff.record.clocks import SYNCHRONISED_EVERY, Clocks, StepClock
from llmeff.record.schema import Timings

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch):
    """A clock that stands until it is moved: now[0] += seconds."""
    time = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: time[0])
    return time


def _step(clock, now, number):
    clock.begin(number)
    for seconds, part in [(1, "data"), (2, "forward"), (4, "backward"), (1, "data"), (2, "forward"), (4, "backward")]:
        now[0] += seconds
        clock.mark(part)
    now[0] += 8
    clock.mark("optimizer")
    return clock.end()


def test_parts_of_micro_batches_add_up(now):
    (times,) = _step(StepClock(CPU), now, SYNCHRONISED_EVERY)
    assert (times.step, times.step_s, times.data_s) == (SYNCHRONISED_EVERY, 22, 2)
    assert (times.forward_s, times.backward_s, times.optimizer_s) == (4, 8, 8)


def test_other_steps_have_no_breakdown(now):
    clock = StepClock(CPU)
    (times,) = _step(clock, now, SYNCHRONISED_EVERY + 1)
    assert (times.step_s, times.data_s) == (22, 2)
    assert (times.forward_s, times.backward_s, times.optimizer_s) == (None, None, None)
    assert clock.flush() == []


def test_the_first_steps_of_a_process_are_marked(now):
    clock = StepClock(CPU)
    marked = [_step(clock, now, step)[0].is_warmup for step in range(101, 111)]
    assert marked == [True] * 5 + [False] * 5


def test_one_step_in_fifty_has_a_breakdown(now):
    clock = StepClock(CPU)
    told = [_step(clock, now, step)[0] for step in range(1, 151)]
    assert [times.step for times in told if times.forward_s is not None] == [50, 100, 150]


def test_each_second_is_counted_once_and_goes_on_after_a_resume(now):
    sums = Clocks(CPU, Timings(eval_s=1000.0))
    with sums.hold("startup"):
        now[0] += 3
    sums.add_step(_step(StepClock(CPU), now, 1)[0])
    with contextlib.suppress(KeyError), sums.hold("eval"):
        now[0] += 5
        raise KeyError
    assert sums.timings() == Timings(startup_s=3, train_s=20, data_s=2, eval_s=1005)


@pytest.fixture
def waits(now, monkeypatch):
    """In the stead of a GPU's events, those of one whose clock runs three times as fast as the host's; what was waited for."""
    seen = []

    class Event:
        def __init__(self):
            self.at_s = 3 * now[0]

        def synchronize(self):
            seen.append("event")

        def elapsed_time(self, later):
            return 1000 * (later.at_s - self.at_s)

    monkeypatch.setattr(clocks, "_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(device.type))
    return seen


def test_a_gpus_step_lies_between_its_own_events_and_is_told_with_the_next(now, waits):
    clock = StepClock(torch.device("cuda"))
    assert _step(clock, now, SYNCHRONISED_EVERY - 1) == waits == []
    (before,) = _step(clock, now, SYNCHRONISED_EVERY)
    assert waits == ["cuda"] * 8 + ["event"]  # before the step and at each mark; then for the end of the step before
    assert (before.step, before.step_s, before.data_s) == (SYNCHRONISED_EVERY - 1, 3 * 22, 2)
    assert (before.forward_s, before.backward_s, before.optimizer_s) == (None, None, None)
    (broken_down,) = clock.flush()
    assert (broken_down.step, broken_down.step_s) == (SYNCHRONISED_EVERY, 3 * 22)
    assert (broken_down.forward_s, broken_down.backward_s, broken_down.optimizer_s) == (4, 8, 8)
    assert clock.flush() == []


def test_a_gpus_event_tells_its_time_once_it_is_recorded(monkeypatch):
    asked = []

    class Event:
        def __init__(self, **options):
            asked.append(options)

        def record(self):
            asked.append("recorded")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert isinstance(clocks._event(), Event)
    assert asked == [{"enable_timing": True}, "recorded"]


def test_a_gpu_has_done_its_work_before_and_after_an_evaluation(now, waits):
    sums = Clocks(torch.device("cuda"))
    with sums.hold("eval"):
        waits.append("work")
    assert waits == ["cuda", "work", "cuda"]


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_read_while_the_next_is_under_way():
    clock = StepClock(torch.device("cuda"))
    matrix = torch.ones(1024, 1024, device="cuda")
    seen = []
    for step in range(1, SYNCHRONISED_EVERY + 3):
        clock.begin(step)
        clock.mark("data")
        matrix = (matrix @ matrix).clamp(max=1)
        clock.mark("forward")
        ended = clock.end()
        assert [times.step for times in ended] == [step - 1] * (step > 1)
        seen += ended
    seen += clock.flush()
    assert [times.step for times in seen] == list(range(1, SYNCHRONISED_EVERY + 3))
    assert all(times.step_s > 0 for times in seen)
    assert [times.step for times in seen if times.forward_s is not None] == [SYNCHRONISED_EVERY]
