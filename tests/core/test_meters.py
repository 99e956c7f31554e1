import gc
import sys
import types
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._C._profiler import _EventType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from llmeff.core import kernels, meters
from llmeff.core.meters import (
    EnergyMeter,
    PeakLiveBytes,
    WireMeter,
    _with_unseen,
    count_flops,
    count_step,
    metered_steps,
    peak_bytes,
    peak_resident_bytes,
    resident_bytes,
    saved_bytes,
)
from tests.ranks import ranks


def test_where_no_process_files_are_the_peak_stands_for_what_is_held(monkeypatch):
    def missing(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", missing)
    held = resident_bytes()
    monkeypatch.undo()
    assert 0 < held <= peak_resident_bytes()


# B rows, D width: x is (B, D), w is (D, D), in floats of 4 bytes
B, D = 8, 32
X, W = 4 * B * D, 4 * D * D


@pytest.fixture
def x():
    return torch.randn(B, D)


@pytest.fixture
def w():
    return nn.Parameter(torch.randn(D, D))


def test_a_forward_pass_without_gradients_holds_two_neighbours_at_most(x, w):
    with PeakLiveBytes([w], held=[x]) as meter, torch.no_grad():
        h = x
        for _ in range(5):
            h = h @ w
    assert meter.peak.total == W + 3 * X
    assert meter.peak.by_kind == {"parameters": W, "gradients": 0, "optimizer": 0, "other": 3 * X}


def test_channels_of_a_grouped_convolution_and_triangular_systems_are_counted():
    x, weight = torch.randn(2, D, 20, requires_grad=True), torch.randn(D, 1, 4, requires_grad=True)
    forward = 2 * 2 * D * 17 * 4
    assert count_flops(lambda: F.conv1d(x, weight, groups=D)) == forward
    assert count_flops(lambda: F.conv1d(x, weight, groups=D).sum().backward()) == 3 * forward
    matrix = torch.eye(D).expand(3, D, D)
    right = torch.randn(3, D, 5)
    assert count_flops(lambda: torch.linalg.solve_triangular(matrix, right, upper=False)) == 3 * D * D * 5


def test_a_chain_keeps_every_product_for_backward(x, w):
    weights = [w, nn.Parameter(torch.randn(D, D))]

    def forward():
        return x @ weights[0] @ weights[1]

    with PeakLiveBytes(weights, held=[x]) as meter:
        output = forward()
    assert meter.peak.by_kind == {"parameters": 2 * W, "gradients": 0, "optimizer": 0, "other": 3 * X}
    with PeakLiveBytes(weights, held=[x]) as meter:
        output = forward()
        ones = torch.ones_like(output)
        output.backward(ones)
    # When the last gradient is made: x, the output, its gradient, and that of x @ w, which is freed by then.
    assert meter.peak.by_kind == {"parameters": 2 * W, "gradients": 2 * W, "optimizer": 0, "other": 4 * X}


@pytest.mark.parametrize("step_before", [0, 1], ids=["makes its moments", "has its moments"])
def test_moments_are_the_optimizer_s(x, w, step_before):
    optimizer = torch.optim.AdamW([w], fused=True)

    def step():
        (x @ w).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(step_before):
        step()
    with PeakLiveBytes([w], optimizer, [x]) as meter:
        step()
    kinds = meter.peak.by_kind
    assert (kinds["parameters"], kinds["gradients"], kinds["optimizer"]) == (W, W, 2 * W + 4)
    assert meter.peak.total == sum(kinds.values())


def test_gradients_held_from_before_count(x, w):
    (x @ w).sum().backward()
    with PeakLiveBytes([w]) as meter:
        pass
    assert meter.peak.by_kind == {"parameters": W, "gradients": W, "optimizer": 0, "other": 0}


def test_a_shared_storage_counts_once(x, w):
    with PeakLiveBytes([w, w], held=[x, x.t(), x[:2]]) as meter:
        views = [x.view(-1), x[1:], x.t()]
    assert len(views) == 3
    assert meter.peak.total == W + X


def test_what_is_freed_while_metered_is_gone_and_what_is_freed_later_does_not_matter(x):
    with PeakLiveBytes([]) as meter:
        for _ in range(10):
            kept = x + 1
    del kept
    assert meter.peak.total == 2 * X


def test_the_meter_keeps_nothing_alive(x):
    w = nn.Parameter(torch.randn(D, D))
    storage = weakref.ref(w.untyped_storage())
    meter = PeakLiveBytes([w], held=[x])
    with meter:
        y = x @ w
    del w, y, meter
    gc.collect()
    assert storage() is None


def test_it_agrees_with_torch_s_tracker(x):
    from torch.distributed._tools.mem_tracker import MemTracker

    model = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.LayerNorm(4 * D), nn.Linear(4 * D, D))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    targets = torch.arange(B)
    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x, targets)
    with tracker:
        step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    with PeakLiveBytes(model.parameters(), optimizer, [x, targets]) as meter:
        step()
    assert meter.peak.total == theirs


def test_saved_for_backward(x, w):
    # x is the batch; x @ w is kept by the square and again by the product with w; w is a parameter.
    def forward():
        h = x @ w
        return (h.square() + h @ w).sum()

    assert saved_bytes(forward, [x, w]) == X
    assert saved_bytes(forward, [w]) == 2 * X
    assert saved_bytes(lambda: forward().detach(), []) == 2 * X


def test_nothing_is_saved_without_gradients(x, w):
    with torch.no_grad():
        assert saved_bytes(lambda: (x @ w).square(), []) == 0


def test_recomputed_layers_keep_their_input_alone(x, w):
    def layer(h):
        return (h @ w).exp() @ w

    def forward():
        h = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)
        return checkpoint(layer, h, use_reentrant=False).sum()

    assert saved_bytes(forward, [w]) == 2 * X


def test_matrix_products_are_counted_exactly(x, w):
    forward = 2 * B * D * D
    assert count_flops(lambda: x @ w) == forward
    # The gradient of w, and none of x, which needs none.
    assert count_flops(lambda: (x @ w).sum().backward()) == 2 * forward
    assert count_flops(lambda: F.gelu(x)) == 0


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_counted_in_full(kv_heads, is_causal):
    heads, queries, width = 4, 16, 8
    q = torch.randn(2, heads, queries, width, requires_grad=True)
    k = torch.randn(2, kv_heads, queries, width, requires_grad=True)
    product = 2 * 2 * heads * queries * queries * width

    def attend():
        return F.scaled_dot_product_attention(q, k, k, is_causal=is_causal, enable_gqa=True)

    assert count_flops(attend) == 2 * product
    # Backward makes the scores again: five products after the two of forward.
    assert count_flops(lambda: attend().sum().backward()) == 7 * product


def test_attention_over_more_keys_than_queries():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 11, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 2 * 3 * 11 * 8)


def test_the_kernel_that_torch_took_stands_in_the_stead_of_what_was_called():
    q = torch.randn(1, 2, 3, 8)

    def attend():
        kernels.ran(kernels.SDPA)
        kernels.ran("scan: torch")
        return F.scaled_dot_product_attention(q, q, q)

    fused = f"{kernels.SDPA}, scaled_dot_product_flash_attention_for_cpu"
    assert count_step(attend) == ({"executed_flops": 4.0 * 2 * 3 * 3 * 8}, (fused, "scan: torch"))


def test_without_a_fused_kernel_what_was_called_is_named():
    assert count_step(lambda: kernels.ran(kernels.SDPA)) == ({"executed_flops": 0.0}, (kernels.SDPA,))


def test_where_a_kernel_cannot_be_counted_nothing_is():
    counted, ran = count_step(lambda: [kernels.ran("b", is_counted=False), kernels.ran("a")])
    assert (counted, ran) == ({}, ("a", "b"))


def counted_in_a_sum():
    return count_step(lambda: dist.all_reduce(torch.ones(4)))


def test_what_a_step_sends_is_counted_beside_its_flops():
    assert ranks(2).run(counted_in_a_sum) == [({"executed_flops": 0.0, "wire_bytes": 16.0}, ())] * 2


def sent():
    """What each kind of collective counts for, over four floats a rank."""
    own, all_of_them = torch.ones(4), torch.ones(4 * dist.get_world_size())
    with WireMeter() as wire:
        dist.all_reduce(own)
        dist.broadcast(own, src=0)
        dist.reduce(own, dst=0)
        dist.all_gather_single(all_of_them, own)
        dist.reduce_scatter_single(own, all_of_them)
        dist.barrier()
    return dict(wire.num_bytes)


def test_collectives_count_with_their_full_payload():
    part, whole = 4 * 4, 2 * 4 * 4
    kinds = {"all_reduce": part, "broadcast": part, "reduce": part, "all_gather": whole, "reduce_scatter": whole}
    assert ranks(2).run(sent) == [kinds, kinds]


def sent_by_a_sharded_norm():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    with WireMeter() as wire:
        norm = rows.norm().full_tensor()
    return float(norm), dict(wire.num_bytes)


def test_what_a_sharded_tensor_sends_by_itself_counts():
    assert ranks(2).run(sent_by_a_sharded_norm) == [(pytest.approx(12**0.5), {"all_reduce": 4})] * 2


def test_the_peak_of_one_process_is_taken_without_anything_between_it_and_its_kernels(x, w):
    between = []

    def run():
        between.append(_get_current_dispatch_mode())
        for _ in range(3):
            x @ w.detach()

    assert peak_bytes(run, [x, w], torch.device("cpu")) == W + 2 * X
    assert between == [None]


def peak_of_a_scatter():
    own, whole = torch.ones(1000), torch.ones(1000 * dist.get_world_size())
    run = lambda: [dist.reduce_scatter_single(own, whole) for _ in range(5)]  # noqa: E731
    return peak_bytes(run, [own, whole], torch.device("cpu"))


def test_what_gloos_thread_frees_does_not_add_up():
    copy, given = 2 * 4000, 3 * 4000
    assert all(peak == pytest.approx(given + copy, abs=100) for peak in ranks(2).run(peak_of_a_scatter))


def pauses():
    """After which operations, counted from 1, gloo's thread is given time."""
    paused, done = [], []
    with pytest.MonkeyPatch.context() as patch, meters._Settled():
        patch.setattr(meters.time, "sleep", lambda seconds: paused.append(len(done)))
        for work in (lambda: torch.ones(4) + 1, lambda: dist.all_reduce(torch.ones(4)), lambda: torch.ones(4) * 2):
            done.append(work)
            work()
    return paused


def test_only_a_collective_is_waited_for():
    assert ranks(2).run(pauses) == [[2], [2]]


def test_what_nobody_is_seen_to_free_goes_with_its_collective():
    def event(name, start_ns, end_ns=0, place=0, num_bytes=0, children=()):
        tag = _EventType.Allocation if num_bytes else _EventType.TorchOp
        fields = types.SimpleNamespace(ptr=place, alloc_size=num_bytes)
        times = {"start_time_ns": start_ns, "end_time_ns": end_ns}
        return types.SimpleNamespace(name=name, tag=tag, extra_fields=fields, children=list(children), **times)

    copy = event("[memory]", 2, place=1, num_bytes=8)
    seen = [event("[memory]", 5, place=2, num_bytes=4), event("[memory]", 7, place=2, num_bytes=-4)]
    again = event("[memory]", 8, place=1, num_bytes=16)
    kept = event("[memory]", 9, place=3, num_bytes=2)
    tree = [event("c10d::allreduce_", 1, 4, children=[copy]), event("aten::mm", 4, 8, children=seen), again, kept]
    assert _with_unseen(tree) == [8, -8, 4, -4, 16, 2]


def test_the_process_holds_memory():
    assert 2**20 < resident_bytes() <= peak_resident_bytes() * 1.05


@pytest.mark.parametrize(("system", "num_bytes"), [("linux", 1_024_000), ("darwin", 1000)])
def test_the_peak_is_counted_in_bytes_by_one_system_and_in_kibibytes_by_another(monkeypatch, system, num_bytes):
    used = types.SimpleNamespace(ru_maxrss=1000)
    monkeypatch.setattr(meters.resource, "getrusage", {meters.resource.RUSAGE_SELF: used}.__getitem__)
    monkeypatch.setattr(sys, "platform", system)
    assert peak_resident_bytes() == num_bytes


def test_there_is_no_energy_on_a_cpu():
    assert EnergyMeter(torch.device("cpu")).energy_j() is None


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device by name, with its UUID; nothing is computed on it."""
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda")


def test_energy_is_the_counter_s_difference(gpu, monkeypatch):
    readings = iter([0, 5_000, 12_500])
    nvml = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-1234": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert EnergyMeter(gpu).energy_j() == 7.5


@pytest.mark.parametrize(
    ("before_j", "own_j", "total_j"), [(0.0, 5.0, 5.0), (2.5, 5.0, 7.5), (None, 5.0, None), (2.5, None, None)]
)
def test_energy_adds_to_what_was_drawn_before_where_all_of_it_is_known(monkeypatch, before_j, own_j, total_j):
    monkeypatch.setattr(EnergyMeter, "energy_j", lambda self: own_j)
    assert EnergyMeter(torch.device("cpu"), before_j).total_j() == total_j


def test_no_counter_no_energy(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(gpu).energy_j() is None


@pytest.mark.parametrize(
    ("num_steps", "interval", "chosen"),
    [(10, 0, (3, 4)), (10, 4, (3, 4)), (10, 3, (3, 5)), (10, 2, (4, 6)), (10, 1, (3, 4)), (5, 2, (3, 4))],
)
def test_no_metered_step_follows_an_evaluation_where_that_can_be(num_steps, interval, chosen):
    assert metered_steps(num_steps, interval) == chosen
