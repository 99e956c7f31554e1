"""Runs of a tiny model under every strategy: what a rank does, for the gates of parity, resume, world size and artefact."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmeff.config.run import RunConfig
from llmeff.core.config import override, validate
from llmeff.optim import newton_schulz
from llmeff.optim.newton_schulz import orthogonalize
from tests.ranks import ranks

BATCH, LENGTH, STEPS = 8, 16, 10

STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("parallel=ddp",),
    "ddp, optimizer shared out": ("parallel=ddp", "parallel.shard_optimizer=true"),
    "fsdp": ("parallel=fsdp",),
    "zero 0": ("parallel=deepspeed", "parallel.stage=0"),
    "zero 1": ("parallel=deepspeed", "parallel.stage=1"),
    "zero 2": ("parallel=deepspeed", "parallel.stage=2"),
    "zero 3": ("parallel=deepspeed", "parallel.stage=3"),
    "zero 2, offload": ("parallel=deepspeed", "parallel.stage=2", "parallel.offload_optimizer=true"),
    "zero 3, offload": (
        "parallel=deepspeed", "parallel.stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true",
    ),
}  # fmt: skip
"""Settings of each, for any number of ranks."""


def config(*settings: str, num_ranks: int = 1, accumulation: int = 1) -> RunConfig:
    """A small run with ragged documents, tied embeddings, grouped queries, and sizes that no number of ranks divides."""
    data = {
        "model": {"name": "decoder", "width": 18, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "mlp_width": 35},
        "data": {
            "name": "text",
            "source": {"name": "builtin", "max_bytes": 200_000},
            "splits": {"by": "span"},
            "sequence_length": LENGTH,
            "packing": "documents",
        },
    }
    return _config(data, settings, num_ranks, accumulation)


def image_config(*settings: str, num_ranks: int = 1, accumulation: int = 1) -> RunConfig:
    """The same on images, with flips, connections, weights of classes, and sizes that no number of ranks divides."""
    data = {
        "task": {"name": "segmentation", "balance": 0.5},
        "model": {"name": "segnet-basic", "width": 6, "connection": "concat1x1", "norm": "group", "norm_groups": 2},
        "data": {
            "name": "images",
            "source": {
                "name": "scenes", "height": 17, "width": LENGTH, "num_train": 20, "num_search": 0,
                "num_validation": 3, "num_test": 0,
            },
            "augment": {"flip": 0.5},
        },
    }  # fmt: skip
    return _config(data, settings, num_ranks, accumulation)


def _config(data: dict[str, Any], settings: tuple[str, ...], num_ranks: int, accumulation: int) -> RunConfig:
    rest = {
        "optim": {"name": "adamw", "lr": 3e-4},
        "schedule": {"name": "constant"},
        "train": {"steps": STEPS, "batch": BATCH, "micro_batch": BATCH // num_ranks // accumulation},
        "evaluation": {"every": 0, "max_units": 2, "sample_tokens": 8},
        "checkpoint": {"every": 0, "keep": 2},
        "runtime": {"device": "cpu", "threads": 1},
    }
    if num_ranks > 1:
        settings = (*settings, f"parallel.ranks={num_ranks}")
    return validate(RunConfig, override(data | rest, settings))


@contextlib.contextmanager
def ragged() -> Iterator[None]:
    """The rows of this process's batches have different numbers of targets; row 0 has none but one, or one column."""
    from llmeff.core.ignored import IGNORED_PIXEL
    from llmeff.data.images import ImageCorpus
    from llmeff.data.packing import MASKED, TrainWindows

    whole, whole_images = TrainWindows.batch, ImageCorpus.batch

    def batch(self: TrainWindows, seed: int, step: int, rows: range, global_batch: int) -> Any:
        packed = whole(self, seed, step, rows, global_batch)
        targets = packed.targets.copy()
        for place, row in enumerate(rows):
            targets[place, 1 + (row * 5) % LENGTH :] = MASKED
        return dataclasses.replace(packed, targets=targets)

    def image_batch(self: ImageCorpus, seed: int, step: int, rows: range, global_batch: int) -> Any:
        given = whole_images(self, seed, step, rows, global_batch)
        labels = given.labels.copy()
        for place, row in enumerate(rows):
            labels[place, :, 1 + (row * 5) % labels.shape[2] :] = IGNORED_PIXEL
        return dataclasses.replace(given, labels=labels)

    TrainWindows.batch, ImageCorpus.batch = batch, image_batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainWindows.batch, ImageCorpus.batch = whole, whole_images  # type: ignore[method-assign]


NEWTON_SCHULZ: list[tuple[int, ...]] = []
"""The shapes that this process's Muon has made orthogonal, in order."""


@contextlib.contextmanager
def counted_newton_schulz() -> Iterator[None]:
    """Muon's iterations are counted, and made in double precision.

    In float32 a difference of 1e-7 in the gradient grows by what the iterations stretch small singular values.
    """
    NEWTON_SCHULZ.clear()

    def iterate(x: Tensor, *settings: Any) -> Tensor:
        NEWTON_SCHULZ.append(tuple(x.shape))
        return orthogonalize(x.double(), *settings).to(x.dtype)

    newton_schulz.orthogonalize = iterate
    try:
        yield
    finally:
        newton_schulz.orthogonalize = orthogonalize


@dataclasses.dataclass
class Trajectory:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    begin: dict[str, Any]
    """The weights before the first step."""
    end: dict[str, Any]
    """The weights after the last, on the main rank."""
    newton_schulz: list[tuple[int, ...]]
    """The shapes that were made orthogonal on this rank."""

    def distance(self, other: "Trajectory") -> float:
        """How far the other's update is from this one, over the size of this one."""
        apart = sum(np.square(self.end[name] - other.end[name]).sum() for name in self.end)
        size = sum(np.square(self.end[name] - self.begin[name]).sum() for name in self.end)
        return float((apart / size) ** 0.5)


def numbers(strategy: Any) -> dict[str, Any]:
    """The whole model's weights, in double precision; empty but on the main rank."""
    whole = strategy.state_dict()
    return {name: tensor.detach().double().numpy() for name, tensor in whole.items()} if strategy.world.is_main else {}


@ragged()
@counted_newton_schulz()
def trajectory(settings: RunConfig, folder: Path) -> Trajectory:
    """Trains on this rank."""
    from llmeff.record.reader import read_run
    from llmeff.run.loop import Trainer

    with Trainer(settings, folder, resume=False, is_silent=True) as trainer:
        NEWTON_SCHULZ.clear()  # of an optimizer that is tried before the run begins
        begin = numbers(trainer._strategy)
        while trainer.step < settings.train.steps:
            trainer.train_step()
        end = numbers(trainer._strategy)
        steps = read_run(folder).steps
    return Trajectory(steps["loss"].tolist(), steps["grad_norm"].tolist(), begin, end, list(NEWTON_SCHULZ))


def trained(settings: RunConfig, folder: Path) -> list[Trajectory]:
    """Trains on as many ranks as the config says; what each saw, the main one first.

    One rank, too, is a process of its own: batches are masked in it.
    """
    return ranks(settings.parallel.ranks).run(trajectory, settings, folder)


@ragged()
def by_hand(settings: RunConfig, num_ranks: int, is_reduced_first: bool) -> Trajectory:
    """What `bf16_master` means, in plain PyTorch and one process: bfloat16 weights, and their copy in float32 that moves.

    Every micro-batch's gradient is bfloat16, and so are the sums of them.

    Args:
        settings: of a run by one process, whose micro-batches are those of all ranks, one rank's after the other's.
        num_ranks: that they belong to.
        is_reduced_first: each micro-batch's gradients are summed over ranks, and then these sums, as at stages 2 and 3;
            else each rank sums its own first, as at stage 1.
    """
    import torch

    from llmeff.core import group
    from llmeff.core.parameters import ParameterInfo
    from llmeff.run.prepare import micro_batches, prepare, prepare_device, prepare_model

    settings, task = prepare(settings)
    device = prepare_device(settings)
    model = prepare_model(settings, device).bfloat16()
    rows = task.parameter_infos(model)
    masters = [torch.nn.Parameter(row.parameter.detach().float()) for row in rows]
    own = [
        ParameterInfo(name=row.name, parameter=master, role=row.role) for row, master in zip(rows, masters, strict=True)
    ]
    optimizer = settings.optim.build(own)

    def weights() -> dict[str, Any]:
        return {row.name: row.parameter.detach().double().numpy() for row in rows}

    def summed(gradients: list[list[Tensor]]) -> list[Tensor]:
        total = gradients[0]
        for more in gradients[1:]:
            total = [one + other for one, other in zip(total, more, strict=True)]
        return total

    begin, losses, norms = weights(), [], []
    for step in range(settings.train.steps):
        batches = [task.batch(step, share, device) for share in micro_batches(settings, 0)]
        count = group.totals([batch.counts for batch in batches])["loss"]
        gradients, loss = [], 0.0
        for batch in batches:
            share = task.loss(model, batch)["loss"] / count
            gradients.append(list(torch.autograd.grad(share, [row.parameter for row in rows])))
            loss += float(share.detach())
        each = len(batches) // num_ranks
        by_rank = [gradients[start : start + each] for start in range(0, len(batches), each)]
        parts = [list(one) for one in zip(*by_rank, strict=True)] if is_reduced_first else by_rank
        for master, gradient in zip(masters, summed([summed(part) for part in parts]), strict=True):
            master.grad = gradient.float()
        assert settings.train.clip_norm is not None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, settings.train.clip_norm)))
        losses.append(loss)
        optimizer.step()
        for row, master in zip(rows, masters, strict=True):
            row.parameter.data.copy_(master)
    return Trajectory(losses, norms, begin, weights(), [])
