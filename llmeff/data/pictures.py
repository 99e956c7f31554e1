"""Display of labelled images: a colour for each class, masks, overlays, and panels with a legend."""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llmeff.core.ignored import IGNORED_PIXEL

# B batch, H height, W width, K classes

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Labels = NDArray[np.uint8]
"""(H, W): classes, or IGNORED_PIXEL."""

FIRST = ((86, 180, 233), (213, 94, 0), (0, 158, 115), (240, 228, 66), (85, 85, 85))
"""Colours of the first classes: four colours of Okabe and Ito (2008), and a grey."""
UNLABELLED = (0, 0, 0)
"""Colour of unlabelled pixels. The colours of all classes are lighter."""
OPACITY = 0.5
"""Opacity of the classes' colours in an overlay."""

# Matrices from linear RGB to the linear RGB that a person sees: with normal vision, then without the long, middle or
# short cones (Machado, Oliveira and Fernandes 2009, severity 1).
_SEEN = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
# Matrices from linear RGB to cone responses, and from their cube roots to Oklab. Distances in Oklab match human
# perception (Ottosson 2020).
_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip
_LEVELS = np.arange(0, 256, 15)
_LIGHTNESS, _CHROMA = (0.4, 0.95), 0.2
"""Bounds of candidate colours in Oklab, which exclude colours near black or white, and garish colours."""


def seen(colours: NDArray[np.integer]) -> NDArray[np.float64]:
    """Converts (N, 3) sRGB in 0..255 to the (N, 4, 3) Oklab colours that four kinds of people see.

    The kinds are people with normal vision, and people without the long, middle or short cones.
    """
    value = colours / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    cones = np.clip(np.einsum("vij,nj->nvi", _SEEN, light), 0, 1) @ _CONES.T
    return np.asarray(np.cbrt(cones) @ _OKLAB.T)


@functools.cache
def _colours() -> NDArray[np.uint8]:
    """Returns (255, 3) colours. The first are `FIRST`. Each further one is farthest from all earlier ones.

    Colours are chosen from a set of candidates. The distance of two colours is the smallest of their distances in the
    four kinds of vision.
    """
    candidates = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), -1).reshape(-1, 3)
    places = seen(candidates)
    lightness, chroma = places[:, 0, 0], np.hypot(places[:, 0, 1], places[:, 0, 2])
    usable = (lightness > _LIGHTNESS[0]) & (lightness < _LIGHTNESS[1]) & (chroma < _CHROMA)
    candidates, places = candidates[usable], places[usable]
    nearest = np.full(len(candidates), np.inf)
    chosen: list[NDArray[np.integer]] = []
    for number in range(IGNORED_PIXEL):
        colour = np.array(FIRST[number]) if number < len(FIRST) else candidates[nearest.argmax()]
        nearest = np.minimum(nearest, np.linalg.norm(places - seen(colour[None]), axis=-1).min(axis=1))
        chosen.append(colour)
    return np.array(chosen, dtype=np.uint8)


def palette() -> NDArray[np.uint8]:
    """Returns (256, 3) RGB: the colour of every label. It does not depend on the number of classes."""
    return np.concatenate([_colours(), np.array([UNLABELLED], dtype=np.uint8)])


def mask(labels: Labels) -> Image.Image:
    """Returns a palette image whose pixel values are the labels, shown in their colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    return image


def coloured(labels: Labels) -> Pixels:
    """Returns the (H, W, 3) colours of the labels."""
    return palette()[labels]


def overlay(pixels: Pixels, labels: Labels) -> Pixels:
    """Returns the (H, W, 3) image, blended with the colours of its labels."""
    return np.rint(pixels * (1 - OPACITY) + coloured(labels) * OPACITY).astype(np.uint8)


def png(image: Image.Image | Pixels) -> bytes:
    """Returns an image as the bytes of a PNG file."""
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, format="PNG")
    return content.getvalue()


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image with one or more label maps, such as the truth and a prediction."""

    pixels: Pixels
    labels: Sequence[Labels]


CELL = 480
"""Approximate length, in pixels, to which the longer side of a small image is enlarged in a panel. Larger images may
have up to twice this length."""
_TEXT, _LEAST_TEXT = 26, 20
"""Font size for images that are `CELL` pixels wide, and smallest font size, in pixels."""
_INK, _PAPER, _EDGE = (20, 20, 20), (255, 255, 255), (120, 120, 120)


def panel(rows: Sequence[Shown], captions: Sequence[str], classes: Sequence[str]) -> Image.Image:
    """Draws a panel: a row for each image with its label maps in colour, and a legend of the classes that occur.

    Args:
        rows: the images; all have the same number of label maps.
        captions: titles of the columns: the image, then each label map.
        classes: names of the classes in label order.
    """
    cells = [[_to_cell(values, is_image=not n) for n, values in enumerate((row.pixels, *row.labels))] for row in rows]
    width = max(row[0].width for row in cells)
    text = max(_LEAST_TEXT, width * _TEXT // CELL)
    font, space = _font(text), text // 2
    step, top = width + space, text + 2 * space
    across = len(captions) * step + space
    legend = _legend(rows, classes, across - 2 * space, font)
    down = top + sum(row[0].height + space for row in cells)
    sheet = Image.new("RGB", (across, down + legend.height + space), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        middle = space + column * step + width // 2
        draw.text((middle, space), _fitted(caption, width, font), fill=_INK, font=font, anchor="ma")
    for row in cells:
        for column, cell in enumerate(row):
            sheet.paste(cell, (space + column * step + (width - cell.width) // 2, top))
        top += row[0].height + space
    sheet.paste(legend, (space, down))
    return sheet


def _to_cell(values: Pixels | Labels, *, is_image: bool) -> Image.Image:
    """Scales an image or a label map for a panel.

    A small image is enlarged by a whole factor to about `CELL` pixels, so that its pixels stay visible. If an image is
    longer than twice `CELL` pixels, it is shrunk until its longer side has twice `CELL` pixels.
    """
    image = Image.fromarray(values) if is_image else mask(values)
    longer = max(image.size)
    factor = 2 * CELL / longer if longer > 2 * CELL else max(1, round(CELL / longer))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    resampling = Image.Resampling.BOX if is_image and factor < 1 else Image.Resampling.NEAREST
    return image.resize(size, resampling).convert("RGB")


def _legend(rows: Sequence[Shown], classes: Sequence[str], width: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws the legend: a colour swatch and a name for each label, in evenly filled lines."""
    there = np.unique(np.concatenate([np.unique(labels) for row in rows for labels in row.labels]))
    text = int(font.size)
    space = text // 2
    names = ["no label" if label == IGNORED_PIXEL else classes[label] for label in there.tolist()]
    names = [_fitted(name, width - text - 3 * space, font) for name in names]
    entry = text + 3 * space + max(int(font.getlength(name)) for name in names)
    lines = -(-len(names) // max(1, width // entry))
    beside = -(-len(names) // lines)
    legend = Image.new("RGB", (width, lines * (text + space)), _PAPER)
    draw = ImageDraw.Draw(legend)
    for number, (colour, name) in enumerate(zip(palette()[there].tolist(), names, strict=True)):
        left, top = number % beside * (width // beside), number // beside * (text + space)
        draw.rectangle((left, top, left + text, top + text), fill=tuple(colour), outline=_EDGE)
        draw.text((left + text + space, top + text // 2), name, fill=_INK, font=font, anchor="lm")
    return legend


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font that matplotlib's plots use."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _fitted(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Truncates text to a width in pixels, with an ellipsis at the end."""
    if font.getlength(text) <= width:
        return text
    kept = text
    while kept and font.getlength(f"{kept}…") > width:
        kept = kept[:-1]
    return f"{kept}…"
