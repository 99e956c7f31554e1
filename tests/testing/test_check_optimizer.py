"""`check_optimizer` passes an optimizer that is no part of the package, and says of a broken one what differs."""

from pathlib import Path

import pytest
import torch

import llmeff.testing
from llmeff.testing import CheckFailed, apart, check_optimizer


def test_one_that_is_right_passes(outside):
    own = outside("signum")
    check_optimizer(own.Signum(), apart(own.formula), within=1e-12)


def test_what_a_formula_needs_not_be_given_is_not_asked_for(outside):
    check_optimizer(outside("signum").Signum(weight_decay=0.0))


def swapped(parameter, momentum, group):
    momentum.lerp_(parameter.grad, group["beta"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum.sign(), alpha=group["lr"])


def undecayed(parameter, momentum, group):
    momentum.lerp_(parameter.grad, 1 - group["beta"])
    parameter.sub_(momentum.sign(), alpha=group["lr"])


def decays_all(parameter, momentum, group):
    momentum.lerp_(parameter.grad, 1 - group["beta"])
    parameter.mul_(1 - group["lr"] * 0.1).sub_(momentum.sign(), alpha=group["lr"])


def ascends(parameter, momentum, group):
    momentum.lerp_(parameter.grad, 1 - group["beta"])
    parameter.add_(momentum.sign(), alpha=group["lr"])


def goes_by_the_peak(parameter, momentum, group):
    momentum.lerp_(parameter.grad, 1 - group["beta"])
    parameter.sub_(momentum.sign(), alpha=group.get("peak_lr", group["lr"]))


def normed(parameter, momentum, group):
    momentum.lerp_(parameter.grad, 1 - group["beta"])
    parameter.sub_(momentum / momentum.norm().clamp(min=1e-9), alpha=group["lr"] * 10)


def chance(parameter, momentum, group):
    momentum.lerp_(parameter.grad + 1e-3 * torch.randn_like(parameter), 1 - group["beta"])
    parameter.sub_(momentum.sign(), alpha=group["lr"])


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (
            swapped,
            r"optimizer 'outside-signum' with weight_decay 0.0: after 20 steps '[\w.]+' differs from the formula by .* of its "
            "movement",
        ),
        (
            undecayed,
            r"optimizer 'outside-signum' with weight_decay 0.1: after 20 steps 'embedding' differs from the formula by",
        ),
        (
            decays_all,
            r"optimizer 'outside-signum' moves \[.*\] at a learning rate|with weight_decay 0.0: .* from the formula",
        ),
        (ascends, r"leaves .* of a quadratic loss after 100 steps"),
        (goes_by_the_peak, r"moves \['embedding', .*\] at a learning rate of 0: it does not read its groups' `lr`"),
        (normed, r"declares sharding 'elementwise', but a slice that ends within tensors .*: declare 'whole_tensor'"),
        (chance, r"moves '\S+' differently in two runs with the same gradients"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_a_broken_update_is_named(outside, monkeypatch, update, said):
    own = outside("signum")
    monkeypatch.setattr(own.SignOfMomentum, "update", staticmethod(update))
    with pytest.raises(CheckFailed, match=said):
        check_optimizer(own.Signum(), apart(own.formula))


def test_a_wrong_price_is_named(outside, monkeypatch):
    own = outside("signum")
    monkeypatch.setattr(
        own.Signum, "price", lambda self, weights, precision: own.state_price(weights, lambda weight: 1)
    )
    with pytest.raises(CheckFailed, match=r"is priced at 9 optimizer_bytes, but keeps 2"):
        check_optimizer(own.Signum())


def test_wrong_groups_are_named(outside, monkeypatch):
    own = outside("signum")
    monkeypatch.setattr(own.Signum, "groups", lambda self, roles: [list(roles)])
    monkeypatch.setattr(own.Signum, "parameter_groups", lambda self, rows: [{"params": [rows[0].parameter]}])
    with pytest.raises(CheckFailed, match=r"states the groups \[\['embedding', .* but builds \[\['embedding'\]\]"):
        check_optimizer(own.Signum())


def test_a_state_that_is_lost_is_named(outside, monkeypatch):
    own = outside("signum")
    step = own.SignOfMomentum.step

    def forgetful(self):
        step(self)
        self.state.clear()

    monkeypatch.setattr(own.SignOfMomentum, "step", forgetful)
    with pytest.raises(CheckFailed, match="keeps 0"):
        check_optimizer(own.Signum())


def test_one_that_is_not_registered_is_named(outside):
    own = outside("signum")

    class Other(own.Signum):
        name: str = "outside-signum"

    with pytest.raises(CheckFailed, match="optimizer 'outside-signum' is not registered under that name"):
        check_optimizer(Other())


def test_it_needs_no_pytest():
    files = list(Path(llmeff.testing.__file__).parent.glob("*.py"))
    assert len(files) >= 3
    assert not [file.name for file in files if "pytest" in file.read_text()]
