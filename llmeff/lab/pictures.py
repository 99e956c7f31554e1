"""Segments pictures with trained models. Writes masks, overlays, panels that compare models with the truth, and scores."""

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from llmeff.compare.ledger import spelled
from llmeff.compare.plots import class_bars
from llmeff.config.run import RunConfig
from llmeff.core import files
from llmeff.core.config import ConfigError, validate
from llmeff.core.heartbeat import beat
from llmeff.data import ImageData
from llmeff.data.image_cache import resized
from llmeff.data.image_files import FilePair, few, labelled, listed, raise_all, read_image
from llmeff.data.image_folder import IMAGE_ENDS, MASK_ENDS
from llmeff.data.image_source import ImageSourceConfig
from llmeff.data.images import normalised
from llmeff.data.pictures import Labels, Pixels, Shown, mask, overlay, panel, png
from llmeff.models.image_model import Preparation, load_image_model
from llmeff.record.reader import model_folder, read_run
from llmeff.tasks import Segmentation
from llmeff.tasks.image_metrics import image_counts, scores

# H height, W width, K classes

SCORES, BARS = "scores.json", "classes.png"
"""Files with the scores, as numbers and as a chart. They are written beside the pictures if masks are given."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A picture that is read only when it is needed."""

    name: str
    """Name of the picture, with which the names of its result files begin."""
    read: Callable[[], tuple[Pixels, Labels | None]]
    """Returns the pixels and the true mask, or None in place of the mask if there is none. Raises a ConfigError if a file cannot
    be read."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run that has ended, with its model."""

    name: str
    model: nn.Module
    preparation: Preparation
    data: ImageData
    task: Segmentation

    @torch.inference_mode()
    def predict(self, pixels: Pixels, device: torch.device) -> Labels:
        """Returns the class of each pixel, (H, W). The model's logits are interpolated bilinearly to the picture's size."""
        prepared = self.preparation
        mean, std = (np.array(values, dtype=np.float32) for values in (prepared.mean, prepared.std))
        given = torch.from_numpy(normalised(resized(pixels, prepared.size)[None], mean, std))
        return _highest(self.model(given.to(device))[0], pixels.shape[:2])


def _highest(logits: Tensor, size: tuple[int, ...]) -> Labels:
    """Returns the class with the highest logit at each pixel, (H, W), for logits of shape (K, h, w).

    To save memory, it resizes the logits of one class at a time.
    """
    best = torch.full(size, -math.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for label, class_logits in enumerate(logits.float()):
        resized_logits = F.interpolate(class_logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        is_higher = resized_logits > best
        best = torch.where(is_higher, resized_logits, best)
        found[is_higher] = label
    classes: NDArray[np.uint8] = found.cpu().numpy()
    return classes


def segment(
    run: Path, images: Sequence[Path], out: Path, *, masks: Path | None = None, beside: Sequence[Path] = ()
) -> str:
    """Segments pictures with the model of a run, and writes the results.

    Args:
        run: folder of the run.
        images: image files, and folders of image files.
        out: folder for the results, which must be absent or empty. For a picture NAME it gets NAME.mask.png with class
            numbers, NAME.overlay.png and, if there is a mask or another run, NAME.panel.png. If masks are given, it also
            gets the scores of all runs, as `SCORES` and `BARS`.
        masks: folder with the true mask of each picture, under the picture's name. Class numbers mean the same as in the
            run's data source.
        beside: folders of other runs, which are shown and scored too.

    Returns:
        Text for the terminal: the scores, if masks are given, then the number of pictures and the results folder.

    Raises:
        ConfigError: a run, a picture or a mask is missing or cannot be read, or `out` is not empty. Nothing is written.
    """
    out = _new_folder(out)
    runs = _opened([run, *beside])
    pictures = _found(images, masks, runs[0].data.source)
    raise_all(problem for picture in pictures for problem in _unreadable(picture))  # before anything is written
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for each in runs:
        each.model.to(device)
    counts: dict[str, list[dict[str, float]]] = {each.name: [] for each in runs}
    with files.reported(out), files.new_folder(out) as folder:
        for picture in pictures:
            beat()
            for name, picture_counts in _segmented(folder, picture, runs, device).items():
                counts[name].append(picture_counts)
        table = "" if masks is None else _scored(folder, counts, runs[0])
    return f"{table}{_number(pictures)} in {out}"


def _new_folder(out: Path) -> Path:
    """Returns the folder for the results. If `out` is a symbolic link, returns the folder that it points to.

    Raises:
        ConfigError: the path exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: already exists and is not an empty folder. Nothing is overwritten: give another folder"
        )
    return out.resolve() if out.is_symlink() else out


def _segmented(
    folder: Path, picture: _Picture, runs: Sequence[_Run], device: torch.device
) -> dict[str, dict[str, float]]:
    """Writes a picture's result files into a folder.

    Returns, for each run, the counts from which its scores are computed. The dict is empty if the picture has no mask.
    """
    pixels, truth = picture.read()
    classes, tolerance = runs[0].preparation.classes, runs[0].task.boundary_tolerance
    predicted = {run.name: run.predict(pixels, device) for run in runs}
    _draw(folder, picture.name, pixels, truth, predicted, classes)
    if truth is None:
        return {}
    return {name: image_counts(labels, truth, classes, tolerance) for name, labels in predicted.items()}


def _opened(folders: Sequence[Path]) -> list[_Run]:
    """Opens the runs.

    Raises:
        ConfigError: a folder does not contain a segmentation run, a run is given twice, or the runs have different classes.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    if len(set(names)) < len(names):
        raise ConfigError(f"the same run is given twice: {few(name for name in names if names.count(name) > 1)}")
    runs, problems = [], []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(_open(folder, name))
        except ConfigError as error:
            problems += error.problems
    raise_all(problems)
    first = runs[0].preparation.classes
    raise_all(
        f"{folder}: has the classes {', '.join(each.preparation.classes)}, but {folders[0]} has {', '.join(first)}"
        for folder, each in zip(folders, runs, strict=True)
        if each.preparation.classes != first
    )
    return runs


def _open(folder: Path, name: str) -> _Run:
    run = read_run(folder)
    config = validate(RunConfig, run.config)
    if not (isinstance(config.task, Segmentation) and isinstance(config.data, ImageData)):
        raise ConfigError(
            f"{folder}: this run's task is {config.task.name!r}, but this command needs a segmentation run"
        )
    model, preparation = load_image_model(model_folder(run))
    return _Run(name=name, model=model, preparation=preparation, data=config.data, task=config.task)


def _found(images: Iterable[Path], masks: Path | None, source: ImageSourceConfig) -> list[_Picture]:
    """Returns the pictures, with their masks if a folder of masks is given.

    Raises:
        ConfigError: a picture or a mask is missing or invalid, or two pictures have the same name.
    """
    paths = _image_paths(images)
    if masks is None:
        return [_Picture(name=name, read=partial(_alone, path)) for name, path in paths.items()]
    mask_paths = _mask_paths(paths, masks, source)
    pairs = [FilePair(unit=name, split=None, image=paths[name], mask=path) for name, path in mask_paths.items()]
    return [_Picture(name=image.unit, read=image.read) for image in labelled(pairs, source.labels())]


def _image_paths(images: Iterable[Path]) -> dict[str, Path]:
    """Returns image files by name, without the extension. In a folder, the name is the path relative to that folder.

    Raises:
        ConfigError: a file or folder is missing, a folder contains no image, or two images have the same name.
    """
    raise_all(f"IMAGES: {given} does not exist" for given in images if not given.exists())
    paths: dict[str, Path] = {}
    for given in images:
        below = listed(given, IMAGE_ENDS, "IMAGES") if given.is_dir() else {given.stem: given}
        for name, path in below.items():
            if name in paths:
                raise ConfigError(
                    f"{path}: has the same name as {paths[name]}, so their results would overwrite one another. "
                    "Rename one of the two files"
                )
            paths[name] = path
    return paths


def _mask_paths(images: Mapping[str, Path], masks: Path, source: ImageSourceConfig) -> dict[str, Path]:
    """Returns the mask file of each image. It is named like the image, or as the run's data source names masks.

    Raises:
        ConfigError: a mask is missing.
    """
    truths = listed(masks, MASK_ENDS, "--masks")
    paths: dict[str, Path] = {}
    for name in images:
        name_in_source = f"{name.removesuffix(source.image_end)}{source.mask_end}"
        path = truths.get(name) or truths.get(name_in_source)
        if path is not None:
            paths[name] = path
    missing = [str(path) for name, path in images.items() if name not in paths]
    if missing:
        raise ConfigError(
            f"--masks {masks}: there is no mask for {few(missing)}. A mask must have the name of its picture"
        )
    return paths


def _alone(path: Path) -> tuple[Pixels, None]:
    return read_image(path), None


def _unreadable(picture: _Picture) -> list[str]:
    """Reads a picture's files completely. Returns an error message for each problem."""
    try:
        picture.read()
    except ConfigError as error:
        return error.problems
    return []


def _draw(
    folder: Path,
    name: str,
    pixels: Pixels,
    truth: Labels | None,
    predicted: Mapping[str, Labels],
    classes: Sequence[str],
) -> None:
    """Writes the mask and the overlay of the first prediction, and a panel if there is a true mask or a second prediction."""
    first = next(iter(predicted.values()))
    known = {} if truth is None else {"truth": truth}
    pictures = {"mask": png(mask(first)), "overlay": png(overlay(pixels, first))}
    if len(known) + len(predicted) > 1:
        row = Shown(pixels=pixels, labels=[*known.values(), *predicted.values()])
        pictures["panel"] = png(panel([row], ["image", *known, *predicted], classes))
    for kind, content in pictures.items():
        path = folder / f"{name}.{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _scored(folder: Path, counts: Mapping[str, Sequence[Mapping[str, float]]], run: _Run) -> str:
    """Writes the scores of each run as JSON and as a bar chart. Returns them as a text table.

    Args:
        folder: folder for the files.
        counts: by run, the counts for each picture from which the scores are computed.
        run: the first run. Its classes and boundary tolerance apply to all runs.
    """
    classes = run.preparation.classes
    found = {name: scores(picture_counts, classes) for name, picture_counts in counts.items()}
    about = {
        "scored": f"{_number(next(iter(counts.values())))}, each at its own size",
        "boundary_tolerance": run.task.boundary_tolerance,
        "runs": {
            name: {metric: _finite(value) for metric, value in metrics.items()} for name, metrics in found.items()
        },
    }
    (folder / SCORES).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    bars = {name: [metrics[f"iou.{label}"] for label in classes] for name, metrics in found.items()}
    (folder / BARS).write_bytes(class_bars(bars, classes, "IoU", f"IoU by class, {about['scored']}"))
    return f"{about['scored']}\n{_table(found)}"


def _number(pictures: Sequence[object]) -> str:
    return "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"


def _finite(value: float) -> float | None:
    """Replaces NaN by None, because JSON has no NaN. A class that occurs nowhere has the score NaN."""
    return None if math.isnan(value) else value


def _table(found: Mapping[str, Mapping[str, float]]) -> str:
    table = Table("", *(Column(Text(name), justify="right") for name in found))
    for metric in next(iter(found.values())):
        kind, _, label = metric.partition(".")
        values = [metrics[metric] for metrics in found.values()]
        cells = ("-" if math.isnan(value) else f"{value:.4f}" for value in values)
        table.add_row(Text(f"{spelled(kind)} of {label}" if label else spelled(metric)), *cells)
    buffer = io.StringIO()
    Console(file=buffer, width=Console().width).print(table)
    return buffer.getvalue()
