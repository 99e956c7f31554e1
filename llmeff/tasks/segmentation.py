"""Image segmentation: predict the class of every pixel."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmeff.core import group
from llmeff.core.config import ConfigError, CountOrZero, NotNegative, Share
from llmeff.core.dist import World
from llmeff.core.heartbeat import beat
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.core.metric import Direction
from llmeff.core.parameters import ParameterInfo, parameter_infos
from llmeff.core.seed import derive
from llmeff.cost.workload import Workload
from llmeff.data import ImageCorpus, ImageData
from llmeff.data.images import ImageBatch
from llmeff.data.pictures import Shown, panel, png
from llmeff.data.splits import Split
from llmeff.models import ImageModelConfig
from llmeff.models.image_model import Preparation, save_image_model
from llmeff.models.image_norm import averaged
from llmeff.models.pixel_loss import pixel_losses, weighted_loss
from llmeff.tasks.image_metrics import confusion, image_counts, mean_iou, scores
from llmeff.tasks.task import Batch, Sample, Task, TaskConfig, UnitResult

_EVAL_PIXELS = 2**18
"""Maximum number of pixels whose logits are in memory at once in evaluation, unless a single image has more."""
_NUM_SHOWN = 4
"""Number of held-out images in the sample at the end of a run."""


class Segmentation(TaskConfig[ImageModelConfig, ImageData]):
    """Image segmentation. The loss is the cross-entropy of the class of every labelled pixel, in nats.

    Rare classes may have larger weights in training. The held-out loss is the unweighted cross-entropy per labelled
    pixel, so that runs with different weights are comparable.
    """

    metric_directions: ClassVar[dict[str, Direction]] = {
        "loss": "lower", "mean_iou": "higher", "class_accuracy": "higher", "global_accuracy": "higher",
        "boundary_f1": "higher",
    }  # fmt: skip
    needed_model: ClassVar[str] = "an image model"
    needed_data: ClassVar[str] = "images"

    name: Literal["segmentation"] = "segmentation"
    balance: NotNegative = 0.0
    """Exponent beta of the class weights (f_median / f)^beta, where f is the share of a class among the labelled pixels
    of the training images that contain it. 0: equal weights. 1: median-frequency balancing (Eigen and Fergus 2015)."""
    divisor: Literal["weights", "pixels"] = "weights"
    """Divisor of a step's weighted sum of losses. weights: the sum of the weights, so that gradients have the same
    scale for any beta. pixels: the number of labelled pixels."""
    recomputed_norms: CountOrZero = 0
    """Number of training images from which BatchNorm's statistics are recomputed before each evaluation, as for SegNet.
    0 to use the running averages."""
    boundary_tolerance: Share = 0.0075
    """Distance within which two boundaries match, as a share of the image's diagonal."""

    def model_problems(self, model: ImageModelConfig) -> Iterator[str]:
        """Yields a problem if `recomputed_norms` is set for a model without batch statistics."""
        if self.recomputed_norms and model.statistics_scope() == "nothing":
            norm = getattr(model, "norm", "none")
            yield (
                f"task.recomputed_norms is {self.recomputed_norms}, but model.norm {norm!r} has no statistics over "
                "images that could be recomputed. Set it to 0"
            )

    def infer_model(self, model: ImageModelConfig, data: ImageData) -> ImageModelConfig | None:
        """Returns the model with its number of classes, which the config of the source determines."""
        return _with_classes(model, len(data.classes()))

    def items(self, data: ImageData) -> int:
        """Returns the number of pixels in a training image."""
        return math.prod(_row_size(data))

    def workload(self, model: ImageModelConfig, data: ImageData) -> Workload:
        """Returns the workload of one image."""
        size = _row_size(data)
        return Workload(num_sequences=1, num_tokens=math.prod(size), image_size=size)

    def open(
        self, data: ImageData, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]
    ) -> "SegmentationTask":
        """Opens the images and returns the task."""
        return SegmentationTask(self, data, data.open(is_main=is_main, wait=wait), seed, batch_size)


def _row_size(data: ImageData) -> tuple[int, int]:
    size = data.row_size()
    if size is None:
        raise ConfigError(
            "data.size: the size of the images is unknown until they are read. Give (H, W) to plan without reading them"
        )
    return size


def _with_classes(model: ImageModelConfig, num_classes: int) -> ImageModelConfig:
    if model.num_classes == "auto":
        return model.model_copy(update={"num_classes": num_classes})
    if model.num_classes != num_classes:
        raise ConfigError(
            f"model.num_classes is {model.num_classes}, but the data have {num_classes} classes. Set it to 'auto'"
        )
    return model


def class_weights(pixels: NDArray[np.int64], present: NDArray[np.int64], balance: float) -> NDArray[np.float64]:
    """Returns (K,) weights (f_median / f)^balance, where f = pixels / present and f_median is the median of f.

    A class without pixels has weight 1 and does not count in the median.

    Args:
        pixels: (K,) number of labelled pixels of each class.
        present: (K,) number of all labelled pixels in the images that contain the class.
        balance: the exponent. 0 for equal weights, 1 for median-frequency balancing.
    """
    seen = pixels > 0
    frequency = frequencies(pixels, present)[seen]
    weights = np.ones(len(pixels))
    weights[seen] = (np.median(frequency) / frequency) ** balance
    return weights


def frequencies(pixels: NDArray[np.int64], present: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns (K,) f = pixels / present: each class's share of the labelled pixels of the images that contain it.

    0 if no image contains the class.
    """
    return pixels / np.maximum(present, 1)


class SegmentationTask(Task[ImageModelConfig]):
    """Segmentation of the images of a dataset that is already open."""

    item = "pixel"

    def __init__(self, config: Segmentation, data: ImageData, corpus: ImageCorpus, seed: int, batch_size: int):
        self.corpus = corpus
        self._config, self._data = config, data
        self._order_seed, self._batch_size = derive(seed, "data"), batch_size
        self.items_per_step = batch_size * config.items(data)
        self.weights = class_weights(corpus.pixels, corpus.present, config.balance)
        """(K,) weight of each class in the loss."""
        self._weights: dict[torch.device, Tensor] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._begun: dict[tuple[int, range], Future[ImageBatch]] = {}
        """Batches of later steps that the reader thread is making, by step and rows."""

    def resolve(self, model: ImageModelConfig) -> ImageModelConfig:
        """Returns the model with its number of classes."""
        return _with_classes(model, len(self.corpus.classes))

    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """Returns the parameters to train, with the roles that the model gives them."""
        return parameter_infos(model, model.roles())  # type: ignore[operator]  # a method of every image model

    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Returns (B, 3, H, W) images and (B, H, W) labels."""
        given = self._read(step, rows)
        pixels = np.bincount(given.labels.ravel(), minlength=IGNORED_PIXEL + 1)[: len(self.weights)]
        num_pixels = int(pixels.sum())
        divisor = float(pixels @ self.weights) if self._config.divisor == "weights" else num_pixels
        return Batch(
            inputs={"images": self._on(given.images, device)},
            targets=self._on(given.labels, device),
            counts={"loss": divisor},
            items=num_pixels,
        )

    def _read(self, step: int, rows: range) -> ImageBatch:
        """Returns a step's batch, which was made during the step before, and starts to make the next step's batch."""
        begun = self._begun.pop((step, rows), None)
        self._begun = {key: batch for key, batch in self._begun.items() if key[0] >= step}
        if (step + 1, rows) not in self._begun:
            self._begun[step + 1, rows] = self._reader.submit(self._make, step + 1, rows)
        return self._make(step, rows) if begun is None else begun.result()

    def _make(self, step: int, rows: range) -> ImageBatch:
        return self.corpus.batch(self._order_seed, step, rows, self._batch_size)

    @staticmethod
    def _on(values: NDArray[Any], device: torch.device) -> Tensor:
        given = torch.from_numpy(values)
        # copy on a CPU too, because torch does not count memory that numpy allocates
        return given.clone() if device.type == "cpu" else given.to(device, non_blocking=True)

    def unit_ids(self, step: int, rows: range) -> list[str]:
        """Returns the names of the images in the rows."""
        return self._make(step, rows).units

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted cross-entropy, summed over the batch's labelled pixels."""
        return {"loss": weighted_loss(model(**batch.inputs), batch.targets, self._weights_on(batch.targets.device))}

    def _weights_on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            self._weights[device] = torch.tensor(self.weights, dtype=torch.float32, device=device)
        return self._weights[device]

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """Yields each image's unweighted cross-entropy, pixel counts and boundary F1. The ranks share the images.

        BatchNorm uses the running statistics of the main rank or, with `recomputed_norms`, recomputed statistics.
        """
        self._settle_norms(model, device)
        split, classes = cast(Split, split), self.corpus.classes
        num_images = self.corpus.splits[split].num_images
        num_images = num_images if max_units is None else min(max_units, num_images)
        rows = max(1, _EVAL_PIXELS // math.prod(self.corpus.size))
        tolerance = self._config.boundary_tolerance
        nothing = np.full((1, 1), IGNORED_PIXEL)
        names = list(image_counts(nothing, nothing, classes, tolerance))
        found = np.zeros((num_images, 2 + len(names)))
        for start in range(0, num_images, rows * world.ranks):
            low = start + rows * world.rank
            mine = range(low, min(low + rows, num_images))
            beat()
            # a rank without images runs the model too, because other ranks may need its shard of the parameters
            given = self.corpus.held_out(split, mine or range(1))
            logits = model(self._on(given.images, device)).float()
            labels = self._on(given.labels, device)
            losses = pixel_losses(logits, labels).double().sum((1, 2))
            predicted = logits.argmax(1).cpu().numpy()
            for place, index in enumerate(mine):
                truth = given.labels[place]
                counts = image_counts(predicted[place], truth, classes, tolerance)
                found[index] = [float(losses[place]), (truth != IGNORED_PIXEL).sum(), *counts.values()]
        found = group.total(torch.from_numpy(found)).numpy()
        units = self.corpus.units(split)
        for unit, (loss_sum, count, *metrics) in zip(units, found.tolist(), strict=False):
            yield UnitResult(
                unit=unit, loss_sum=loss_sum, count=int(count), metrics=dict(zip(names, metrics, strict=True))
            )

    def _settle_norms(self, model: nn.Module, device: torch.device) -> None:
        if self._config.recomputed_norms:
            num_images, size = min(self._config.recomputed_norms, self._num_train), self._batch_size
            places = (range(start, min(start + size, num_images)) for start in range(0, num_images, size))
            averaged(model, (self._on(self.corpus.held_out("train", place).images, device) for place in places))
        elif group.is_shared():
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    @property
    def _num_train(self) -> int:
        return self.corpus.splits["train"].num_images

    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """Returns the loss in nats per labelled pixel, and the metrics of `scores`."""
        num_pixels = sum(result.count for result in results)
        loss = math.fsum(result.loss_sum for result in results) / num_pixels if num_pixels else math.nan
        return {"loss": loss, **scores((result.metrics for result in results), self.corpus.classes)}

    def check_split(self, split: str) -> None:
        """Raises an error if the split has no images or no labels."""
        self.corpus.check_split(cast(Split, split))

    def references(self, split: str) -> dict[str, float]:
        """Returns the mean IoU of the location prior: at each pixel, the class that is most frequent there in training.

        There are two such priors: from plain frequencies, and from frequencies weighted by median-frequency balancing.
        The higher mean IoU is returned. A model that is not clearly better has learned nothing worth comparing.
        """
        split = cast(Split, split)
        if split not in self.corpus.splits:
            return {}
        labels, frequent = self.corpus.labels(split), self.corpus.place_counts()
        balanced = class_weights(self.corpus.pixels, self.corpus.present, 1.0)[:, None, None] * frequent
        found = []
        for counts in (frequent, balanced):
            prior = counts.argmax(axis=0)
            found.append(mean_iou(np.sum([confusion(prior, truth, len(counts)) for truth in labels], axis=0)))
        return {"location_prior_mean_iou": max(found)}

    @torch.no_grad()
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """Returns a picture of a few evenly spaced images of the split, with their labels and predictions."""
        split = cast(Split, split)
        num_images = self.corpus.splits[split].num_images
        rows = []
        for place in range(min(_NUM_SHOWN, num_images)):
            index = place * num_images // min(_NUM_SHOWN, num_images)
            given = self.corpus.held_out(split, range(index, index + 1))
            predicted = model(self._on(given.images, device)).argmax(1).cpu().numpy().astype(np.uint8)
            labels = [given.labels[0].astype(np.uint8), predicted[0]]
            rows.append(Shown(pixels=self.corpus.as_stored(split)[index], labels=labels))
        return Sample(picture=png(panel(rows, ["image", "truth", "predicted"], self.corpus.classes)))

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes the weights as safetensors, and the preprocessing of input images."""
        corpus = self.corpus
        preparation = Preparation(
            classes=corpus.classes, mean=tuple(corpus.mean.tolist()), std=tuple(corpus.std.tolist()), size=corpus.size
        )
        save_image_model(model, folder, preparation)

    def facts(self) -> dict[str, Any]:
        """Returns the source and its fingerprint, split sizes, and the pixels, frequency and weight of each class."""
        corpus = self.corpus
        return {
            "source": corpus.name,
            "sha256": corpus.fingerprint,
            "splits": {split: asdict(facts) for split, facts in corpus.splits.items()},
            "class_pixels": dict(zip(corpus.classes, corpus.pixels.tolist(), strict=True)),
            "class_frequencies": dict(
                zip(corpus.classes, frequencies(corpus.pixels, corpus.present).tolist(), strict=True)
            ),
            "class_weights": dict(zip(corpus.classes, self.weights.tolist(), strict=True)),
        }
