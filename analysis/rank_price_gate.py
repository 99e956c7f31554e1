"""Compares the price of every rank under every strategy with measurements: `python -m analysis.rank_price_gate`.

Run it from the repository's root. It writes results/rank_price_gate.json.
"""

import gc
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmeff.attention import MixerConfig
from llmeff.config.run import RunConfig
from llmeff.core.config import validate
from llmeff.core.dist import world
from llmeff.core.files import write_text
from llmeff.core.meters import WireMeter, count_flops, peak_bytes
from llmeff.core.optimizer_state import set_learning_rate
from llmeff.core.parameters import parameter_infos
from llmeff.cost.price import Kind, Price
from llmeff.cost.workload import Workload
from llmeff.parallel import Strategy
from llmeff.plan.price import price_step, workload
from llmeff.record.environment import environment
from llmeff.run.prepare import build_strategy, micro_batches

COMMAND = "python -m analysis.rank_price_gate"
EXACT: tuple[Kind, ...] = (
    "executed_flops",
    "parameter_bytes",
    "frozen_bytes",
    "master_bytes",
    "gradient_bytes",
    "optimizer_bytes",
)
SHOWN: tuple[Kind, ...] = (*EXACT, "gathered_bytes", "bucket_bytes", "peak_bytes", "wire_bytes")
CPU = torch.device("cpu")
SLACK_BYTES = 4096
"""Allowed bytes of live tensors that a strategy does not report as resident: norms, counters, lists of offsets."""

PLAIN = {"vocab_size": 301, "width": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 130}
ODD = {"vocab_size": 211, "width": 44, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 85}
WIDE = {"vocab_size": 1009, "width": 96, "num_layers": 2, "num_heads": 4, "mlp_width": 200}
MIXERS = MixerConfig.registry.names()
MIXED = {"vocab_size": 211, "width": 32, "num_layers": len(MIXERS), "num_heads": 2, "pattern": "+".join(MIXERS)}
"""A layer of each mixer."""


def case(name: str, parallel: dict[str, Any], ranks: int = 2, model: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds the name and the config of a run. `more` sets the options that are read below, such as `precision`."""
    num, rows = more.get("num_micro_batches", 1), more.get("micro_batch", 2)
    texts = {
        "model": {"name": "decoder", "tied_embeddings": more.get("tied", False), **model},
        "data": {"name": "text", "sequence_length": more.get("tokens", 32)},
    }
    images = {"task": {"name": "segmentation"}, "model": model, "data": {"name": "images", "size": more.get("size")}}
    return name, {
        **(images if "size" in more else texts),
        "precision": more.get("precision", "fp32"),
        "optim": more.get("optim", {"name": "adamw"}),
        "transforms": more.get("transforms", []),
        "parallel": parallel if parallel["name"] == "single" else parallel | {"ranks": ranks},
        "train": {"batch": num * rows * ranks, "micro_batch": rows, "clip_norm": 0.5},
        "runtime": {"device": "cpu", "threads": 1, "recompute": more.get("recompute", False)},
    }


SINGLE, DDP, FSDP = {"name": "single"}, {"name": "ddp"}, {"name": "fsdp"}
SHARING, KEEPING = DDP | {"shard_optimizer": True}, FSDP | {"reshard_after_forward": False}


def zero(stage: int, **fields: Any) -> dict[str, Any]:
    """Returns the `parallel` config of a ZeRO stage of DeepSpeed."""
    return {"name": "deepspeed", "stage": stage} | fields


LEAST = {"prefetch_bucket_size": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
OFFLOAD = {"offload_optimizer": True}
ALL_OFF = OFFLOAD | {"offload_parameters": True}
SMALL = {"reduce_bucket_size": 15_000}
LORA = [{"name": "lora", "rank": 3}]
MUON = {"name": "muon"}


def segnet(name: str, parallel: dict[str, Any], ranks: int = 2, *, basic: bool = False, **more: Any) -> Any:
    """Builds the name and the config of a SegNet run. In `more`, all keys but those of the run set the model."""
    run = {key: more.pop(key) for key in ("num_micro_batches", "precision", "optim", "recompute") if key in more}
    model = {"name": "segnet-basic" if basic else "segnet", "width": 16, "num_classes": 5, **more}
    return case(f"SegNet, {name}", parallel, ranks, model, size=[48, 70], **run)


FAST = dict(
    [
        case("single", SINGLE, 1),
        case("ddp, accumulated", DDP, num_micro_batches=3),
        case("fsdp", FSDP, tied=True),
        case("fsdp, kept, accumulated", KEEPING, model=ODD, num_micro_batches=2),
        case("stage 0", zero(0)),
        case("stage 1, accumulated", zero(1), model=ODD, num_micro_batches=2),
        case("stage 2, small buckets", zero(2, **SMALL), tied=True),
        case("stage 2, offloaded", zero(2, **OFFLOAD), precision="bf16_master"),
        case("stage 3", zero(3), model=ODD),
        case("stage 3, LoRA", zero(3), transforms=LORA),
        segnet("ddp, synchronised, accumulated", DDP, norm="batch_sync", connection="add", num_micro_batches=2),
        segnet("fsdp, synchronised", FSDP, norm="batch_sync", connection="concat"),
        case("ddp, mixers", DDP, model=MIXED),
        case("stage 3, mixers", zero(3), model=MIXED, num_micro_batches=2),
        segnet("stage 3, groups", zero(3), norm="group", connection="concat1x1"),
    ]
)
SLOW = dict(
    [
        case("single, accumulated", SINGLE, 1, num_micro_batches=3),
        case("single, tied, recomputed", SINGLE, 1, tied=True, recompute=True),
        case("ddp, shared optimizer, mixers", SHARING, model=MIXED, tokens=70, optim=MUON),
        case("fsdp, mixers, recomputed", FSDP, model=MIXED, tokens=70, recompute=True),
        case("stage 1, mixers, bf16", zero(1), model=MIXED, precision="bf16"),
        case("stage 2, mixers, offloaded", zero(2, **OFFLOAD), model=MIXED),
        case("stage 3, mixers, three ranks", zero(3), 3, model=MIXED),
        case("ddp", DDP),
        case("ddp, one rank", DDP, 1),
        case("ddp, three ranks, tied", DDP, 3, model=ODD, tied=True),
        case("ddp, shared optimizer", SHARING),
        case("ddp, shared optimizer, three ranks, accumulated", SHARING, 3, model=ODD, num_micro_batches=2),
        case("ddp, bf16", DDP, precision="bf16", tokens=16),
        case("ddp, wide, recomputed", DDP, model=WIDE, recompute=True, tokens=64),
        case("fsdp, accumulated", FSDP, num_micro_batches=3),
        case("fsdp, one rank", FSDP, 1),
        case("fsdp, three ranks", FSDP, 3, model=ODD),
        case("fsdp, recomputed", FSDP, recompute=True),
        case("fsdp, wide, tied", FSDP, model=WIDE, tied=True, tokens=64),
        case("fsdp, bf16", FSDP, precision="bf16", tokens=16),
        case("stage 0, accumulated", zero(0), num_micro_batches=3),
        case("stage 0, three ranks, tied", zero(0), 3, model=ODD, tied=True),
        case("stage 1", zero(1)),
        case("stage 1, one rank", zero(1), 1),
        case("stage 1, three ranks, overlapped", zero(1, overlap_comm=True), 3, model=ODD),
        case("stage 1, offloaded", zero(1, **OFFLOAD)),
        case("stage 1, bf16_master", zero(1), precision="bf16_master", num_micro_batches=2),
        case("stage 2", zero(2)),
        case("stage 2, accumulated", zero(2), num_micro_batches=3),
        case("stage 2, three ranks, tied", zero(2), 3, model=ODD, tied=True),
        case("stage 2, overlapped, small buckets", zero(2, overlap_comm=True, **SMALL)),
        case("stage 2, bf16_master", zero(2), precision="bf16_master"),
        case("stage 2, bf16", zero(2), precision="bf16", tokens=16),
        case("stage 2, recomputed", zero(2), model=WIDE, recompute=True, tokens=64),
        case("stage 2, offloaded, accumulated", zero(2, **OFFLOAD), num_micro_batches=3),
        case("stage 3, accumulated", zero(3), num_micro_batches=3),
        case("stage 3, one rank", zero(3), 1),
        case("stage 3, three ranks, tied", zero(3), 3, model=ODD, tied=True),
        case("stage 3, small buckets", zero(3, **SMALL)),
        case("stage 3, least gathered", zero(3, **LEAST)),
        case(
            "stage 3, some gathered", zero(3, **LEAST | {"prefetch_bucket_size": 20_000, "max_live_parameters": 60_000})
        ),
        case("stage 3, norms stay", zero(3, persistence_threshold=100), num_micro_batches=2),
        case("stage 3, bf16_master", zero(3), precision="bf16_master"),
        case("stage 3, offloaded optimizer", zero(3, **OFFLOAD)),
        case("stage 3, all offloaded, accumulated", zero(3, **ALL_OFF), num_micro_batches=2),
        case("stage 3, wide, recomputed", zero(3), model=WIDE, recompute=True, tokens=64),
        case("stage 3, bf16", zero(3), precision="bf16"),
        case("stage 3, bf16, recomputed", zero(3), precision="bf16", model=ODD, recompute=True, num_micro_batches=2),
        case("stage 3, one rank, bf16", zero(3), 1, precision="bf16", tokens=64),
        case("single, LoRA", SINGLE, 1, transforms=LORA),
        case("ddp, LoRA", DDP, transforms=LORA, num_micro_batches=2),
        case("fsdp, LoRA", FSDP, transforms=LORA, model=ODD),
        case("stage 0, LoRA", zero(0), transforms=LORA),
        case("stage 1, LoRA", zero(1), transforms=LORA, tied=True),
        case("stage 2, LoRA, accumulated", zero(2), transforms=LORA, model=ODD, num_micro_batches=2),
        case("stage 3, LoRA, all offloaded", zero(3, **ALL_OFF), transforms=LORA, model=ODD),
        case("stage 3, LoRA, bf16_master", zero(3), transforms=LORA, precision="bf16_master"),
        case("single, Muon", SINGLE, 1, optim=MUON),
        case("ddp, Muon", DDP, optim=MUON),
        case("ddp, shared optimizer, Muon", SHARING, optim=MUON, model=ODD),
        case("stage 0, Muon", zero(0), optim=MUON),
        segnet("single, accumulated", SINGLE, 1, num_micro_batches=3),
        segnet("single, bf16, recomputed", SINGLE, 1, connection="concat1x1", precision="bf16", recompute=True),
        segnet("ddp, basic, bf16", DDP, basic=True, connection="add", precision="bf16"),
        segnet("ddp, synchronised, recomputed", DDP, norm="batch_sync", residual_blocks=True, recompute=True),
        segnet("ddp, shared optimizer, Muon", SHARING, connection="add", optim=MUON),
        segnet("ddp, three ranks, synchronised", DDP, 3, norm="batch_sync"),
        segnet("fsdp, kept, accumulated", KEEPING, norm="frozen", connection="add", num_micro_batches=2),
        segnet("fsdp, recomputed", FSDP, norm="batch_sync", connection="add", recompute=True),
        segnet("fsdp, basic, bf16", FSDP, basic=True, norm="group", connection="concat", precision="bf16"),
        segnet("stage 0, synchronised", zero(0), norm="batch_sync"),
        segnet("stage 1, accumulated", zero(1), norm="frozen", connection="add", num_micro_batches=2),
        segnet("stage 2, small buckets", zero(2, **SMALL), norm="batch_sync", connection="add"),
        segnet("stage 2, offloaded", zero(2, **OFFLOAD), norm="group"),
        segnet("stage 3, synchronised", zero(3), norm="batch_sync", connection="add"),
        segnet("stage 3, basic, recomputed", zero(3), basic=True, norm="frozen", recompute=True),
        segnet("stage 3, bf16, all offloaded", zero(3, **ALL_OFF), connection="concat", precision="bf16"),
    ]
)


def work_of(config: RunConfig) -> Workload:
    """Returns the workload of a rank's step, without chunks in the loss."""
    assert isinstance(config.train.micro_batch, int)
    return replace(workload(config, config.train.micro_batch), loss_chunk=None)


def predict(raw: dict[str, Any], rank: int) -> Price:
    """Predicts what a step takes on a rank."""
    config = validate(RunConfig, raw)
    return price_step(config, work_of(config), rank)


class Steps:
    """The training loop's step alone, on batches of the right shape without real data."""

    def __init__(self, raw: dict[str, Any]):
        torch.set_num_threads(1)
        self.config = validate(RunConfig, raw)
        self.work = work_of(self.config)
        task: Any = SimpleNamespace(parameter_infos=lambda model: parameter_infos(model, model.roles()))
        self.strategy = build_strategy(self.config, task, CPU)
        self.num_shares = len(micro_batches(self.config, world().rank))
        self.gradient_bytes = 0

    def _loss(self) -> Tensor:
        model = self.config.model
        return model.loss(self.strategy.model, model.example(self.work))

    def run(self) -> None:
        """Runs one optimizer step."""
        strategy = self.strategy
        count, _ = strategy.reduce_sum(torch.tensor([self.work.num_tokens] * 2, dtype=torch.float64)).tolist()
        total = torch.zeros(())
        for index in range(self.num_shares):
            with strategy.accumulate(is_last=index == self.num_shares - 1):
                loss = self._loss() / count
                strategy.backward(loss)
            total += loss.detach()
            del loss
        norm = strategy.clip(self.config.train.clip_norm)
        torch.stack((strategy.reduce_sum(total), norm.float())).tolist()
        set_learning_rate(strategy.optimizer, 1.0)
        strategy.step()

    def count_gradients(self) -> None:
        """Runs another step, and measures the bytes of the gradients just before the update."""
        clip = self.strategy.clip

        def weighed(max_norm: float | None) -> Tensor:
            self.gradient_bytes = _sum_bytes(_gradients(self.strategy))
            return clip(max_norm)

        self.strategy.clip = weighed  # type: ignore[method-assign]
        self.run()
        del self.strategy.clip


def measure(raw: dict[str, Any]) -> dict[str, Any]:
    """Measures what a step takes on this rank."""
    known = {key for key, _ in _all_storages()}
    steps = Steps(raw)
    try:
        for _ in range(3):  # these steps create optimizer state, DDP's buckets and DeepSpeed's trace
            steps.run()
        steps.count_gradients()
        with WireMeter() as wire:
            flops = count_flops(steps.run)
        held = _storages(steps.strategy.resident())
        unheld = sum(num_bytes for key, num_bytes in _all_storages() if key not in known and key not in held)
        return {
            "executed_flops": flops,
            "parameter_bytes": _sum_bytes(_parameters(steps.strategy)),
            "frozen_bytes": _sum_bytes(_frozen(steps.strategy)),
            "master_bytes": _sum_bytes(_masters(steps.strategy)),
            "gradient_bytes": steps.gradient_bytes,
            "optimizer_bytes": _sum_bytes(
                value for state in steps.strategy.optimizer.state.values() for value in state.values()
            ),
            "wire_bytes": dict(wire.num_bytes),
            "peak_bytes": peak_bytes(steps.run, steps.strategy.resident(), CPU),
            "held_bytes": sum(held.values()),
            "unheld_bytes": unheld,
        }
    finally:
        steps.strategy.close()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (_local(tensor).untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _all_storages() -> Iterator[tuple[int, int]]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor) and tensor.device.type == "cpu"]
    yield from _storages(plain).items()


def _zero(strategy: Strategy) -> Any:
    return getattr(strategy, "_zero", None)


def _parameters(strategy: Strategy) -> Iterable[Tensor]:
    zero, rows = _zero(strategy), strategy._rows  # type: ignore[attr-defined]
    if hasattr(zero, "bit16_groups_flat"):
        return list(zero.bit16_groups_flat)
    return [getattr(row.parameter, "ds_tensor", row.parameter) for row in rows]


def _frozen(strategy: Strategy) -> list[Tensor]:
    frozen = [parameter for parameter in strategy._plain.parameters() if not parameter.requires_grad]
    return [*(getattr(parameter, "ds_tensor", parameter) for parameter in frozen), *strategy._plain.buffers()]


def _masters(strategy: Strategy) -> Iterable[Tensor]:
    zero = _zero(strategy)
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(zero.single_partition_of_fp32_groups)
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(chain.from_iterable(getattr(zero, "fp32_groups", ())))


def _gradients(strategy: Strategy) -> Iterator[Tensor]:
    zero = _zero(strategy)
    yield from (p.grad for p in strategy._plain.parameters() if p.grad is not None)
    if hasattr(zero, "averaged_gradients"):
        groups = [group for group in zero.averaged_gradients.values() if group is not None]
        if not hasattr(zero, "grad_partitions_flat_buffer"):
            yield from chain.from_iterable(groups)
        else:
            yield zero.grad_partitions_flat_buffer
    yield from (flat.grad for flat in _masters(strategy) if flat.grad is not None)
    yield from getattr(zero, "accumulated_grads_in_cpu", {}).values()


def error(predicted: int, measured: int) -> float:
    """Returns the relative error. If the measured value is 0, returns 0 if the prediction is 0 too, otherwise 1."""
    return predicted / measured - 1 if measured else float(predicted != 0)


def errors(predicted: Price, measured: dict[str, Any]) -> dict[str, float]:
    """Returns the relative error of each kind. Wire bytes have one error per collective."""
    found = {kind: error(predicted.total(kind), measured[kind]) for kind in EXACT}
    if (peak := predicted.known("peak_bytes")) is not None:
        found["peak_bytes"] = error(peak, measured["peak_bytes"])
    wire = predicted.parts("wire_bytes")
    for name in sorted(wire.keys() | measured["wire_bytes"].keys()):
        found[f"wire_bytes: {name}"] = error(wire.get(name, 0), measured["wire_bytes"].get(name, 0))
    return found


def measure_all(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures what a step takes, for every rank in order."""
    if raw["parallel"]["name"] == "single":
        return [measure(raw)]
    from analysis import rank_price_gate
    from tests.ranks import ranks

    return ranks(raw["parallel"]["ranks"]).run(rank_price_gate.measure, raw)


def _strategy(raw: dict[str, Any]) -> str:
    parallel = raw["parallel"]
    return parallel["name"] + (f" stage {parallel['stage']}" if "stage" in parallel else "")


def main(path: Path) -> None:
    """Measures all cases, prints a table of errors, and writes all values."""
    rows = []
    by_strategy = defaultdict(list)
    for name, raw in (FAST | SLOW).items():
        by_rank = []
        for rank, measured in enumerate(measure_all(raw)):
            predicted = predict(raw, rank)
            own = errors(predicted, measured)
            by_rank.append({"predicted": predicted.only(SHOWN).as_dict(), "measured": measured, "error": own})
            peak = own.get("peak_bytes")
            by_strategy[_strategy(raw)] += [] if peak is None else [abs(peak)]
            wrong = {kind: f"{size:+.2%}" for kind, size in own.items() if size and kind != "peak_bytes"}
            shown = "unknown" if peak is None else f"{peak:+.3%}"
            print(f"{name:<50} {rank}  peak {shown}  {wrong or ''}", flush=True)
        rows.append({"name": name, "config": raw, "ranks": by_rank})
    print(f"\n{'peak_bytes, relative error':<34}{'ranks':>6}{'median':>12}{'worst':>12}")
    by_strategy["all"] = list(chain.from_iterable(by_strategy.values()))
    by_strategy = {strategy: sizes for strategy, sizes in by_strategy.items() if sizes}
    for strategy, sizes in by_strategy.items():
        print(f"{strategy:<34}{len(sizes):>6}{statistics.median(sizes):>12.3%}{max(sizes):>12.3%}")
    worst = {name: {"median": statistics.median(sizes), "worst": max(sizes)} for name, sizes in by_strategy.items()}
    facts = {"command": COMMAND, "environment": environment(CPU).model_dump(mode="json")}
    write_text(path, json.dumps(facts | {"peak_error": worst, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "rank_price_gate.json")
