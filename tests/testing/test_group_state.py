"""What an optimizer counts in its groups goes into checkpoints and comes back, or the run is refused before it begins."""

import pytest
import torch
from torch import nn

from llmeff.core.config import ConfigError
from llmeff.core.parameters import ParameterInfo
from llmeff.parallel.group_state import changed_entries, check_savable, group_entries, put_back
from llmeff.parallel.sharded_checkpoint import save
from llmeff.run.loop import Trainer
from llmeff.testing import CheckFailed, check_optimizer, optimizers
from tests.ranks import ranks
from tests.strategies import STRATEGIES, config
from tests.test_strategies import losses, train_until

ROWS = [ParameterInfo(name="weight", parameter=nn.Parameter(torch.ones(2, 2)), role="matrix")]
VALUES = {
    "step": 7, "sum": 0.1, "is_on": True, "mode": "train", "none": None, "pair": (1, 2.5), "infinite": -float("inf"),
    "tensor": torch.tensor(1 / 3), "double": torch.tensor([1 / 3], dtype=torch.float64), "count": torch.tensor(2**40),
}  # fmt: skip


def with_group(**entries):
    optimizer = torch.optim.SGD([ROWS[0].parameter], lr=0.5)
    optimizer.param_groups[0].update(entries)
    return optimizer


def test_what_changed_comes_back_and_nothing_else():
    optimizer = with_group(**dict.fromkeys(VALUES), same=3, nan=float("nan"))
    begun = group_entries(optimizer)
    optimizer.param_groups[0].update(VALUES, lr=0.1, peak_lr=0.5)
    (changed,) = changed_entries(optimizer, begun)
    assert changed.keys() == VALUES.keys() - {"none"}
    group = {"lr": 0.5}
    put_back(group, changed, torch.device("cpu"))
    assert group.pop("lr") == 0.5
    for name, value in group.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, VALUES[name])
            assert value.dtype == VALUES[name].dtype
        else:
            assert value == VALUES[name]


def test_a_tensor_that_is_changed_in_place_is_seen():
    optimizer = with_group(step=torch.tensor(0.0), list=[1])
    begun = group_entries(optimizer)
    optimizer.param_groups[0]["step"] += 1
    optimizer.param_groups[0]["list"].append(2)
    assert changed_entries(optimizer, begun)[0].keys() == {"step", "list"}


@pytest.mark.parametrize(
    ("value", "kind"),
    [(object(), "a object"), ({"a": 1}, "a dict"), (torch.zeros(2), r"a tensor of shape \(2,\)"), ([{1}], "a set")],
    ids=["object", "dict", "tensor", "set"],
)
def test_what_a_checkpoint_cannot_hold_is_refused(value, kind):
    said = f"optim 'own': 'history' in its groups is {kind}, which a checkpoint cannot store. Allowed are numbers, "
    with pytest.raises(ConfigError, match=said):
        check_savable("own", lambda rows: with_group(history=value), ROWS)


def test_lists_of_tensors_in_the_state_are_refused():
    optimizer = with_group()
    optimizer.state[ROWS[0].parameter]["bases"] = [torch.eye(2)]
    with pytest.raises(ConfigError, match=r"optim 'own': 'bases' in its state is a tensor of shape \(2, 2\)"):
        check_savable("own", lambda rows: optimizer, ROWS)


class Slowed(torch.optim.SGD):
    """Counts in its groups, and takes smaller steps after the tenth, or after none."""

    last = 10

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.05 if group["count"] > self.last else 0.5
        super().step()


class Idle(Slowed):
    last = 10**9


def test_a_count_that_matters_late_is_refused_where_it_would_go_too_far():
    def built(kind):
        return lambda rows: kind([row.parameter for row in rows], lr=0.5)

    check_savable("idle", built(Idle), ROWS, miscounts="it would count too far")
    with pytest.raises(
        ConfigError, match=r"optim 'slowed' keeps step counts in its param_groups \(count\): it would count too far"
    ):
        check_savable("slowed", built(Slowed), ROWS, miscounts="it would count too far")


def test_the_check_moves_no_parameter():
    check_savable("own", lambda rows: torch.optim.SGD([row.parameter for row in rows], lr=1.0), ROWS)
    assert torch.equal(ROWS[0].parameter, torch.ones(2, 2))
    assert ROWS[0].parameter.grad is None


def test_check_optimizer_sees_it(outside, monkeypatch):
    own = outside("counting")
    check_optimizer(own.Counting())
    with pytest.raises(CheckFailed, match=r"optim 'outside-counting': 'history' in its groups is a dict"):
        check_optimizer(own.Counting(keeps_object=True))
    monkeypatch.setattr(optimizers, "save", lambda *given: save(*given[:4], group_entries(given[3]), *given[5:]))
    with pytest.raises(
        CheckFailed, match=r"optimizer 'outside-counting', saved and restored, moves 'embedding' differently"
    ):
        check_optimizer(own.Counting())


def test_it_is_refused_before_a_file_is_touched(outside, tmp_path):
    outside("counting")
    settings = config("optim=outside-counting", "optim.keeps_object=true")
    with pytest.raises(ConfigError, match="optim 'outside-counting': 'history' in its groups is a dict"):
        Trainer(settings, tmp_path / "run", resume=False, is_silent=True)
    assert not (tmp_path / "run").exists()


def run(folder, resume, until, *settings, number=2):
    """Four steps' run, up to one of them; by one process here, by several in theirs."""
    settings = config("optim=outside-counting", "checkpoint.every=2", "train.steps=4", *settings, num_ranks=number)
    if number == 1:
        train_until(settings, folder, resume, until)
    else:
        ranks(number).run(train_until, settings, folder, resume, until)
    return losses(folder)


def test_ended_and_resumed_one_process_is_the_run_that_was_not(outside, tmp_path):
    outside("counting")
    whole = run(tmp_path / "whole", False, 4, number=1)
    run(tmp_path / "cut", False, 2, number=1)
    assert run(tmp_path / "cut", True, 4, number=1) == whole


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp, optimizer shared out",
        "zero 2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero 1")),
    ],
)
def test_ended_and_resumed_ranks_are_the_run_that_was_not(outside, tmp_path, strategy):
    outside("counting")
    whole = run(tmp_path / "whole", False, 4, *STRATEGIES[strategy])
    run(tmp_path / "cut", False, 2, *STRATEGIES[strategy])
    assert run(tmp_path / "cut", True, 4, *STRATEGIES[strategy]) == whole
    assert whole == pytest.approx(run(tmp_path / "alone", False, 4, number=1), rel=1e-5)


def test_it_is_refused_where_it_would_count_too_far(outside, tmp_path):
    outside("counting")
    settings = config("optim=outside-counting", *STRATEGIES["zero 3"])
    said = (
        r"optim 'outside-counting' keeps step counts in its param_groups \(largest, step, weight_sum\): at stage 3, parallel 'deepspeed' "
        "steps the optimizer once"
    )
    with pytest.raises(ConfigError, match=said):
        Trainer(settings, tmp_path / "run", resume=False, is_silent=True)
