"""What trained models make of pictures: masks, overlays, panels beside the truth and one another, and how good they are."""

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
"""What is written beside the pictures where the truth is given."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A picture, not read yet."""

    name: str
    """What its results are called."""
    read: Callable[[], tuple[Pixels, Labels | None]]
    """Gives it, with the truth where that is known; raises ConfigError, naming the file."""


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
        """The class of each pixel: logits at the model's size are brought back to the picture's bilinearly."""
        prepared = self.preparation
        mean, std = (np.array(values, dtype=np.float32) for values in (prepared.mean, prepared.std))
        given = torch.from_numpy(normalised(resized(pixels, prepared.size)[None], mean, std))
        return _highest(self.model(given.to(device))[0], pixels.shape[:2])


def _highest(logits: Tensor, size: tuple[int, ...]) -> Labels:
    """(K, h, w) to the highest class of each pixel of (H, W), with one class's numbers in memory at a time."""
    best = torch.full(size, -math.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for label, own in enumerate(logits.float()):
        brought = F.interpolate(own[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        is_higher = brought > best
        best = torch.where(is_higher, brought, best)
        found[is_higher] = label
    classes: NDArray[np.uint8] = found.cpu().numpy()
    return classes


def segment(
    run: Path, images: Sequence[Path], out: Path, *, masks: Path | None = None, beside: Sequence[Path] = ()
) -> str:
    """Writes what the model of a run makes of pictures.

    Args:
        run: its folder.
        images: files, and folders of them.
        out: a folder that does not exist yet, or is empty. For a picture NAME it gets NAME.mask.png, with the classes'
            numbers, NAME.overlay.png and, where there is something to set beside it, NAME.panel.png; with masks the scores
            of all runs too, as `SCORES` and `BARS`.
        masks: a folder with the truth for each picture, of its name; its numbers mean what they mean in the run's source.
        beside: other runs, shown and scored too.

    Returns:
        what there is to say, for the terminal.

    Raises:
        ConfigError: something that is given is not what it should be; nothing is written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: is there and not empty; nothing is overwritten: give another folder")
    out = out.resolve() if out.is_symlink() else out  # a link that the user made: what is made goes where it leads to
    runs = _opened([run, *beside])
    pictures = _found(images, masks, runs[0].data.source)
    raise_all(problem for picture in pictures for problem in _unreadable(picture))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for each in runs:
        each.model.to(device)
    counts: dict[str, list[dict[str, float]]] = {each.name: [] for each in runs}
    with files.reported(out), files.new_folder(out) as folder:
        for picture in pictures:
            beat()
            pixels, truth = picture.read()
            predicted = {each.name: each.predict(pixels, device) for each in runs}
            _draw(folder, picture.name, pixels, truth, predicted, runs[0].preparation.classes)
            if truth is not None:
                for name, labels in predicted.items():
                    own = image_counts(labels, truth, runs[0].preparation.classes, runs[0].task.boundary_tolerance)
                    counts[name].append(own)
        table = "" if masks is None else _scored(folder, counts, runs[0])
    return f"{table}{_number(pictures)} in {out}"


def _opened(folders: Sequence[Path]) -> list[_Run]:
    """The runs, which must know the same classes."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    if len(set(names)) < len(names):
        raise ConfigError(f"a run is given twice: {few(name for name in names if names.count(name) > 1)}")
    runs, problems = [], []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(_open(folder, name))
        except ConfigError as error:
            problems += error.problems
    raise_all(problems)
    first = runs[0].preparation.classes
    raise_all(
        f"{folder}: knows the classes {', '.join(each.preparation.classes)}, but {folders[0]} {', '.join(first)}"
        for folder, each in zip(folders, runs, strict=True)
        if each.preparation.classes != first
    )
    return runs


def _open(folder: Path, name: str) -> _Run:
    run = read_run(folder)
    config = validate(RunConfig, run.config)
    if not (isinstance(config.task, Segmentation) and isinstance(config.data, ImageData)):
        raise ConfigError(f"{folder}: is a run of the task {config.task.name!r}, whose model knows nothing of pictures")
    model, preparation = load_image_model(model_folder(run))
    return _Run(name=name, model=model, preparation=preparation, data=config.data, task=config.task)


def _found(images: Iterable[Path], masks: Path | None, source: ImageSourceConfig) -> list[_Picture]:
    """The pictures by their names; in a folder these are from there on, without the end.

    A mask has its picture's name, or the one that it has in the run's source.
    """
    raise_all(f"IMAGES: there is no {given}" for given in images if not given.exists())
    paths: dict[str, Path] = {}
    for given in images:
        below = listed(given, IMAGE_ENDS, "IMAGES") if given.is_dir() else {given.stem: given}
        for name, path in below.items():
            if name in paths:
                raise ConfigError(f"{path}: there is also {paths[name]}, and their results would have one name")
            paths[name] = path
    if masks is None:
        return [_Picture(name=name, read=partial(_alone, path)) for name, path in paths.items()]
    truths = listed(masks, MASK_ENDS, "--masks")
    named = {name: (name, f"{name.removesuffix(source.image_end)}{source.mask_end}") for name in paths}
    own = {name: next((truths[mask] for mask in named[name] if mask in truths), None) for name in paths}
    missing = [str(paths[name]) for name, mask in own.items() if mask is None]
    if missing:
        raise ConfigError(f"--masks {masks}: there is no mask with the name of {few(missing)}")
    pairs = [FilePair(unit=name, split=None, image=paths[name], mask=mask) for name, mask in own.items() if mask]
    return [_Picture(name=image.unit, read=image.read) for image in labelled(pairs, source.labels())]


def _alone(path: Path) -> tuple[Pixels, None]:
    return read_image(path), None


def _unreadable(picture: _Picture) -> list[str]:
    """What is wrong with its files: they are read to their ends, before anything is written."""
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
    """Writes the scores of each run and their picture; returns them as a table."""
    classes = run.preparation.classes
    found = {name: scores(own, classes) for name, own in counts.items()}
    about = {
        "scored": f"{_number(next(iter(counts.values())))}, each at its own size",
        "boundary_tolerance": run.task.boundary_tolerance,
        "runs": {name: {metric: _finite(value) for metric, value in own.items()} for name, own in found.items()},
    }
    (folder / SCORES).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    bars = {name: [own[f"iou.{label}"] for label in classes] for name, own in found.items()}
    (folder / BARS).write_bytes(class_bars(bars, classes, "IoU", f"IoU by class, {about['scored']}"))
    return f"{about['scored']}\n{_table(found)}"


def _number(pictures: Sequence[object]) -> str:
    return "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"


def _finite(value: float) -> float | None:
    """JSON has no NaN: of what is nowhere to be scored."""
    return None if math.isnan(value) else value


def _table(found: Mapping[str, Mapping[str, float]]) -> str:
    table = Table("", *(Column(Text(name), justify="right") for name in found))
    for metric in next(iter(found.values())):
        kind, _, label = metric.partition(".")
        cells = ("-" if math.isnan(own[metric]) else f"{own[metric]:.4f}" for own in found.values())
        table.add_row(Text(f"{spelled(kind)} of {label}" if label else spelled(metric)), *cells)
    buffer = io.StringIO()
    Console(file=buffer, width=Console().width).print(table)
    return buffer.getvalue()
