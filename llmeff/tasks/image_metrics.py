"""Metrics of segmentation: scores from the counts of a confusion matrix, and the boundary F1."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmeff.core.ignored import IGNORED_PIXEL

# H height, W width, K classes

CORRECT, LABELLED, PREDICTED, BOUNDARY = "correct", "labelled", "predicted", "boundary_f1"
"""Names of the metrics of an image: pixel counts of each class (`correct.road`), and the boundary F1."""

Labels = NDArray[np.integer]
Mask = NDArray[np.bool_]
Counts = NDArray[np.integer] | NDArray[np.floating]


def confusion(predicted: Labels, truth: Labels, num_classes: int) -> NDArray[np.int64]:
    """Returns (K, K) counts of pixels by true class (row) and predicted class (column), without ignored pixels.

    Args:
        predicted: classes in range(K), any shape.
        truth: classes or IGNORED_PIXEL, of the same shape.
        num_classes: K.
    """
    counted = truth != IGNORED_PIXEL
    places = truth[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def counts_of(matrix: NDArray[np.int64], classes: Sequence[str]) -> dict[str, float]:
    """Returns the numbers of correct, labelled and predicted pixels of each class, which can be summed over images."""
    kinds = {CORRECT: matrix.diagonal(), LABELLED: matrix.sum(1), PREDICTED: matrix.sum(0)}
    return {
        f"{kind}.{name}": float(count)
        for kind, counts in kinds.items()
        for name, count in zip(classes, counts, strict=True)
    }


def scores(images: Iterable[Mapping[str, float]], classes: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of a set of images, from their summed counts.

    - `global_accuracy`: the share of correct pixels.
    - `class_accuracy`: the mean recall of the classes with labelled pixels.
    - `iou.<class>`: the IoU (Jaccard index) of the class, correct / (labelled + predicted - correct).
    - `mean_iou`: the mean IoU of the classes with labelled or predicted pixels.
    - `boundary_f1`: the mean boundary F1 of the images for which it is not NaN.

    A metric is NaN if there are no such pixels, classes or images.
    """
    given = list(images)

    def total(kind: str) -> NDArray[np.float64]:
        return np.array([math.fsum(image[f"{kind}.{name}"] for image in given) for name in classes])

    correct, labelled, predicted = total(CORRECT), total(LABELLED), total(PREDICTED)
    iou = _iou(correct, labelled, predicted)
    recall = np.divide(correct, labelled, out=np.full(len(classes), np.nan), where=labelled > 0)
    boundaries = [image[BOUNDARY] for image in given if not math.isnan(image[BOUNDARY])]
    return {
        "mean_iou": _mean(iou),
        "class_accuracy": _mean(recall),
        "global_accuracy": float(correct.sum() / labelled.sum()) if labelled.any() else math.nan,
        "boundary_f1": math.fsum(boundaries) / len(boundaries) if boundaries else math.nan,
        **{f"iou.{name}": float(value) for name, value in zip(classes, iou, strict=True)},
    }


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Returns the mean IoU of a (K, K) confusion matrix, as in `scores`."""
    return _mean(_iou(matrix.diagonal(), matrix.sum(1), matrix.sum(0)))


def _iou(correct: Counts, labelled: Counts, predicted: Counts) -> NDArray[np.float64]:
    """Returns the (K,) IoU of each class, which is NaN for a class with neither labelled nor predicted pixels."""
    union = labelled + predicted - correct
    iou: NDArray[np.float64] = np.divide(correct, union, out=np.full(len(union), np.nan), where=union > 0)
    return iou


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def image_counts(predicted: Labels, truth: Labels, classes: Sequence[str], tolerance: float) -> dict[str, float]:
    """Returns the pixel counts of each class and the boundary F1 of one image, in the form that `scores` takes.

    Args:
        predicted: (H, W) classes.
        truth: (H, W) classes, or IGNORED_PIXEL.
        classes: K names.
        tolerance: distance within which boundaries match, as a share of the image's diagonal.
    """
    outline = boundary_f1(predicted, truth, len(classes), tolerance * math.hypot(*truth.shape))
    return {**counts_of(confusion(predicted, truth, len(classes)), classes), BOUNDARY: outline}


def boundary_f1(predicted: Labels, truth: Labels, num_classes: int, tolerance: float) -> float:
    """Returns the boundary F1 (Csurka et al. 2013): the mean over the classes with a boundary in the truth.

    A pixel is on the boundary of its class if one of its four neighbours has another class and is not ignored.
    Precision is the share of predicted boundary pixels within the tolerance of a true boundary pixel of the class.
    Recall is the share of true boundary pixels within the tolerance of a predicted boundary pixel. Predictions on
    ignored pixels do not count.

    Args:
        predicted: (H, W) classes.
        truth: (H, W) classes, or IGNORED_PIXEL.
        num_classes: K.
        tolerance: distance between the centres of pixels, in pixels.

    Returns:
        The boundary F1, or NaN if no class has a boundary in the truth.
    """
    counted = truth != IGNORED_PIXEL
    found = []
    for label in np.flatnonzero(np.bincount(truth[counted], minlength=num_classes)):
        theirs = _outline((truth == label) & counted, counted)
        if theirs.any():
            ours = _outline((predicted == label) & counted, counted)
            found.append(_f1(ours, theirs, tolerance))
    return math.fsum(found) / len(found) if found else math.nan


def _f1(ours: Mask, theirs: Mask, tolerance: float) -> float:
    hits, met = (ours & _widened(theirs, tolerance)).sum(), (theirs & _widened(ours, tolerance)).sum()
    precision, recall = hits / max(1, ours.sum()), met / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _outline(mask: Mask, counted: Mask) -> Mask:
    """Returns the (H, W) pixels of `mask` that have one of their four neighbours in `counted` but not in `mask`."""
    others = counted & ~mask
    beside = np.zeros_like(mask)
    beside[1:] |= others[:-1]
    beside[:-1] |= others[1:]
    beside[:, 1:] |= others[:, :-1]
    beside[:, :-1] |= others[:, 1:]
    return mask & beside


def _widened(mask: Mask, radius: float) -> Mask:
    """Returns the (H, W) pixels that are at most `radius` away from a pixel of the mask."""
    reach = int(radius)
    height, width = mask.shape
    # cumulative counts of mask pixels along each row: a span contains a mask pixel if the counts at its ends differ
    counts = np.cumsum(np.pad(mask, ((0, 0), (reach + 1, reach))), axis=1, dtype=np.int32)
    found = np.zeros_like(mask)
    for down in range(min(reach, height - 1) + 1):
        across = int(math.sqrt(radius**2 - down**2))
        left, right = reach - across, reach + across + 1
        near = counts[:, right : right + width] > counts[:, left : left + width]
        found[down:] |= near[: height - down]
        found[: height - down] |= near[down:]
    return found
