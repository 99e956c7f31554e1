"""A state on disk: put back, training goes on to the last bit, whatever slices it was written and is read in."""

import copy

import pytest
import torch
from torch import nn

from llmeff.core.optimizer_state import state_bytes
from llmeff.core.parameters import ParameterInfo
from llmeff.core.shard import Slice, replicated, split_each, split_group, split_rows, whole_tensors
from llmeff.optim import AdamW8bit
from llmeff.parallel.group_state import group_entries
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, check_fit, save, whole

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "factored": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "empty": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "numbers": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
}


def rows_of(model: nn.Module) -> list[ParameterInfo]:
    return [
        ParameterInfo(name=name, parameter=parameter, role="matrix") for name, parameter in model.named_parameters()
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    optimizer.step()


def trained(build):
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    optimizer = build(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_put_back_goes_on_to_the_last_bit(build, tmp_path):
    model, optimizer = trained(build)
    save(tmp_path, 0, map(whole, rows_of(model)), optimizer, group_entries(optimizer), {}, {})

    again = copy.deepcopy(model)
    nn.init.zeros_(again.weight)
    resumed = build(reversed(list(again.parameters())))
    ShardedCheckpoint(tmp_path).load(map(whole, rows_of(again)), resumed)
    step(model, optimizer)
    step(again, resumed)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_table_that_parameters_have_in_common_stays_one(tmp_path):
    """The codes of 8-bit moments; with a state of other shapes than the parameter's."""
    config = AdamW8bit(lr=0.1, min_8bit_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 50))
    optimizer = config.build(rows_of(model))
    step(model, optimizer)
    save(tmp_path, 0, map(whole, rows_of(model)), optimizer, group_entries(optimizer), {}, {})

    again = copy.deepcopy(model)
    resumed = config.build(rows_of(again))
    ShardedCheckpoint(tmp_path).load(map(whole, rows_of(again)), resumed)
    codes = {state["qmap1"].data_ptr() for state in resumed.state.values()}
    assert len(codes) == 1
    assert state_bytes(resumed) == state_bytes(optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(again, resumed)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


CUTS = {
    "groups": lambda sizes, ranks: split_group(sizes, ranks, 2 * ranks),
    "each": split_each,
    "whole": whole_tensors,
}


def flats(model, optimizer, cut, ranks):
    """What each rank would hold: flat copies of its slices and of their moments, under an optimizer of its own."""
    rows = {row.name: row.parameter for row in rows_of(model)}
    sizes = {name: parameter.numel() for name, parameter in rows.items()}
    for shard in CUTS[cut](sizes, ranks):
        parts, at = [], 0
        for part in shard:
            parts.append((part, at))
            at += part.size
        key = torch.cat([rows[part.name].detach().view(-1)[part.start : part.stop] for part in shard])
        own = torch.optim.AdamW([key], lr=0.1)
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = [optimizer.state[rows[part.name]][kind].view(-1)[part.start : part.stop] for part in shard]
            own.state[key][kind] = torch.cat(moments)
        own.state[key]["step"] = optimizer.state[next(iter(rows.values()))]["step"].clone()
        yield ShardOwner(key=key, parts=tuple(parts)), own


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_slices_of_any_number_of_ranks_make_the_whole_again_and_are_made_of_it(cut, ranks, tmp_path):
    if cut == "whole" and ranks > 2:
        return  # there are two parameters
    model, optimizer = trained(OPTIMIZERS["adamw"])
    (tmp_path / "slices").mkdir()
    (tmp_path / "whole").mkdir()
    for rank, (owner, own) in enumerate(flats(model, optimizer, cut, ranks)):
        save(tmp_path / "slices", rank, [owner], own, group_entries(own), {}, {})
    again = copy.deepcopy(model)
    resumed = torch.optim.AdamW(again.parameters(), lr=0.1)
    ShardedCheckpoint(tmp_path / "slices").load(map(whole, rows_of(again)), resumed)
    save(tmp_path / "whole", 0, map(whole, rows_of(again)), resumed, group_entries(resumed), {}, {})
    for owner, own in flats(model, optimizer, cut, ranks):
        blank = ShardOwner(key=torch.zeros_like(owner.key), parts=owner.parts)
        empty = torch.optim.AdamW([blank.key], lr=0.1)
        ShardedCheckpoint(tmp_path / "whole").load([blank], empty)
        assert torch.equal(blank.key, owner.key)
        assert own.state[owner.key].keys() == empty.state[blank.key].keys()
        assert all(torch.equal(value, empty.state[blank.key][kind]) for kind, value in own.state[owner.key].items())
    step(model, optimizer)
    step(again, resumed)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_state_that_is_not_number_by_number_is_not_cut(tmp_path):
    model, optimizer = trained(OPTIMIZERS["factored"])
    save(tmp_path, 0, map(whole, rows_of(model)), optimizer, group_entries(optimizer), {}, {})
    part = Slice(name="weight", start=0, stop=6)
    with pytest.raises(
        ValueError, match=r"weight: its state tensor .* belongs to the whole parameter and cannot be split"
    ):
        ShardedCheckpoint(tmp_path).load([ShardOwner(key=torch.zeros(6), parts=((part, 0),))], optimizer)


def test_a_missing_rank_is_said(tmp_path):
    model, optimizer = trained(OPTIMIZERS["adamw"])
    (owner, own), _ = flats(model, optimizer, "groups", 2)
    save(tmp_path, 0, [owner], own, group_entries(own), {}, {})
    with pytest.raises(ValueError, match=r"weight: elements 10 to 15 are missing in the checkpoint"):
        ShardedCheckpoint(tmp_path).read(Slice(name="weight", start=0, stop=15))


def test_another_models_weights_are_refused(tmp_path):
    model, optimizer = trained(OPTIMIZERS["adamw"])
    save(tmp_path, 0, map(whole, rows_of(model)), optimizer, group_entries(optimizer), {}, {})
    other = rows_of(nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(ValueError, match=r"missing \['0.bias', '0.weight'\], unexpected \['bias', 'weight'\]"):
        check_fit(other, ShardedCheckpoint(tmp_path))


@pytest.mark.parametrize("ranks", range(1, 8))
@pytest.mark.parametrize("deal", [whole_tensors, split_group, split_each])
def test_everything_has_one_owner(deal, ranks):
    sizes = {"a": 13, "b": 5, "c": 1, "d": 64, "e": 7}
    owned = [part for shard in deal(sizes, ranks) for part in shard]
    for name, size in sizes.items():
        numbers = [number for part in owned if part.name == name for number in range(part.start, part.stop)]
        assert sorted(numbers) == list(range(size))


@pytest.mark.parametrize("ranks", range(1, 6))
def test_rows_are_never_cut(ranks):
    shapes = {"a": (13, 4), "b": (5,), "c": (1, 3)}
    owned = [part for shard in split_rows(shapes, ranks) for part in shard]
    assert sum(part.size for part in owned) == 13 * 4 + 5 + 3
    assert all(part.start % 4 == 0 and part.stop % 4 == 0 for part in owned if part.name == "a")


def test_replicas_own_everything_each():
    assert replicated({"a": 3}, 2) == [(Slice(name="a", start=0, stop=3),)] * 2
