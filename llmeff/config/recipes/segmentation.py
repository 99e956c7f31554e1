"""Segmentation: a first run on built-in street scenes, and studies of connections, class balance and optimizers."""

import itertools

from llmeff.config.recipes.contribution import FACTORS, factorial
from llmeff.config.recipes.optimizers import OPTIMIZERS
from llmeff.config.recipes.recipe import recipe, sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, Span, SweepConfig, TuningConfig
from llmeff.core.config import Text
from llmeff.data import AugmentConfig, CamVid, ImageData, Scenes
from llmeff.models import SegNetVGG
from llmeff.optim import AdamW, Cosine
from llmeff.tasks import Segmentation

FLIPPED = AugmentConfig(flip=0.5)
RATES = Span(low=1e-3, high=4e-2)
"""AdamW's learning rates to search for small SegNets."""
CAMVID_STEPS = 736
"""Slightly more than eight epochs of 367 images in batches of four."""


@recipe
def segmentation() -> RunConfig:
    """Trains a SegNet with residual connections on built-in street scenes, in under five minutes on two cores."""
    return RunConfig(
        name="segmentation",
        task=Segmentation(balance=0.5),
        model=SegNetVGG(width=8, connection="add"),
        data=ImageData(augment=FLIPPED),
        schedule=Cosine(warmup_steps=50),
        optim=AdamW(lr=5e-3),
        train=TrainConfig(steps=500, batch=8, micro_batch=8),
        evaluation=EvalConfig(every=100, max_units=32),
        checkpoint=CheckpointConfig(every=0),
    )


def _base(data: ImageData, steps: int, batch: int) -> RunConfig:
    return RunConfig(
        task=Segmentation(),
        model=SegNetVGG(width=8),
        data=data,
        schedule=Cosine(warmup_steps=steps // 10),
        optim=AdamW(lr=5e-3),
        train=TrainConfig(steps=steps, batch=batch, micro_batch=batch),
        evaluation=EvalConfig(split="test", every=0.1, max_units=None, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(threads=1),
    )


def _grid(connections: tuple[Text, ...], balances: tuple[float, ...]) -> dict[str, ArmConfig]:
    """Returns an arm for each combination of connection and class balance.

    The learning rate is tuned once per balance, with the first connection. The other connections reuse it.

    Args:
        connections: values of `model.connection`.
        balances: values of `task.balance` (beta).
    """
    arms: dict[str, ArmConfig] = {}
    for connection, balance in itertools.product(connections, balances):
        tuned_as = None if connection == connections[0] else f"{connections[0]}, beta {balance:g}"
        arms[f"{connection}, beta {balance:g}"] = ArmConfig(
            settings=(f"model.connection={connection}", f"task.balance={balance}"),
            search={"optim.lr": RATES} if tuned_as is None else {},
            tuned_as=tuned_as,
            factors={"connection": connection, "balance": f"beta {balance:g}"},
        )
    return arms


@sweep_recipe
def scenes() -> SweepConfig:
    """Compares SegNets with and without residual connections on built-in street scenes, at class balance beta 0 and 1.

    All arms have the same number of parameters. They are compared by mean IoU on the test scenes, over five seeds.
    """
    arms = _grid(("none", "add"), (0.0, 1.0))
    return SweepConfig(
        name="scenes",
        base=_base(ImageData(augment=FLIPPED), steps=400, batch=4),
        arms=arms,
        baseline=next(iter(arms)),
        metric="mean_iou",
        tuning=TuningConfig(trials=4),
        seeds=(0, 1, 2, 3, 4),
    )


@sweep_recipe
def camvid() -> SweepConfig:
    """Compares a SegNet's connections (none, addition, concatenation) on CamVid, with class balance beta 0, 0.5 and 1.

    The images have 240 x 180 pixels. They are read from the folder `camvid` in the working folder, which has the layout
    of SegNet's tutorial. Learning rates are chosen on the validation images, with half the steps. Arms are compared on
    the test images, over three seeds.
    """
    arms = _grid(("none", "add", "concat"), (0.0, 0.5, 1.0))
    base = _base(ImageData(source=CamVid(path="camvid"), size=(180, 240), augment=FLIPPED), steps=CAMVID_STEPS, batch=4)
    evaluation = base.evaluation.model_copy(update={"every": 0.125})
    return SweepConfig(
        name="camvid",
        base=base.model_copy(update={"evaluation": evaluation}),
        arms=arms,
        baseline=next(iter(arms)),
        metric="mean_iou",
        tuning=TuningConfig(trials=4, steps=CAMVID_STEPS // 2, split="validation"),
    )


@sweep_recipe
def scenes_optimizers() -> SweepConfig:
    """Compares the optimizers of the recipe `optimizers` on built-in street scenes: five rates each, eight seeds."""
    return SweepConfig(
        name="scenes-optimizers",
        base=_base(ImageData(augment=FLIPPED), steps=400, batch=4),
        arms=OPTIMIZERS,
        baseline="adamw",
        metric="mean_iou",
        seeds=tuple(range(8)),
    )


@sweep_recipe
def scenes_contribution() -> SweepConfig:
    """Measures the effects of the factors of `contribution` on small street scenes: 16 of 32 combinations, six seeds.

    The SegNet has group normalization, so that the number of ranks and the ZeRO stage do not change what it learns.
    """
    data = ImageData(source=Scenes(height=48, width=64), augment=FLIPPED)
    base = _base(data, steps=96, batch=4)
    base = base.model_copy(
        update={
            "model": SegNetVGG(width=8, connection="add", norm="group"),
            "train": base.train.model_copy(update={"micro_batch": 2}),
        }
    )
    return factorial("scenes-contribution", FACTORS, base, "mean_iou")
