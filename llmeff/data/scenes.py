"""The built-in labelled images: street scenes that are drawn, not photographed."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import Count, CountOrZero, Fraction, Integer
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data.camvid import CLASSES
from llmeff.data.image_source import ImageSourceConfig, LabelledImage, Pair
from llmeff.data.source import fingerprint_of
from llmeff.data.splits import SPLITS

EDITION = 1
"""Version of the drawing. Increase it if any pixel changes, because fingerprints hash only this and the settings."""

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CLASSES))

FAR_M = 75.0
"""Distance from the camera to the end of the street, in metres."""

# The pixels must be the same on every machine. So each value is computed from the bits of a counter-based generator by
# single operations +, -, *, / and floor, which IEEE 754 rounds correctly. Do not use Generator.uniform, .normal and the
# like, which may fuse operations or call libm.
Array = NDArray[np.float64]
Colour = Array  # RGB in 0..1: one colour (3, 1, 1), or one per pixel (3, h, w), row (3, h, 1) or column (3, 1, w)
Point = tuple[float, float]
T = TypeVar("T")


class Scenes(ImageSourceConfig):
    """Street scenes in perspective with the classes of CamVid, so that a first segmentation run needs no download.

    The street runs to a vanishing point between house fronts, trees and fences. It contains cars, pedestrians,
    bicyclists, poles and signs, and near objects cover far ones. The colour of a pixel says little about its class:
    road, pavement, walls and clouds have similar greys, cars and clothes have any colour, and there are shadows, haze
    and noise. Poles and pedestrians are one to a few pixels wide. Class frequencies are close to CamVid's. The table
    gives the percentages of labelled pixels, first in the default training split, then in CamVid's training split (367
    images of 240 x 180):

    | sky | building | pole | road | pavement | tree | signsymbol | fence | car | pedestrian | bicyclist |
    |---|---|---|---|---|---|---|---|---|---|---|
    | 18.2 | 25.3 | 1.0 | 31.3 | 5.2 | 10.9 | 1.0 | 0.8 | 4.9 | 0.9 | 0.4 |
    | 17.4 | 24.2 | 1.0 | 33.1 | 4.7 | 10.1 | 1.2 | 1.2 | 6.1 | 0.7 | 0.3 |

    An image depends only on the seed, its split, its number, the size and `void`. The scene is the same at any height:
    an image of 192 x 256 shows the scene of the image of 96 x 128 in more detail.
    """

    name: Literal["scenes"] = "scenes"
    height: Count = 96
    """Height of an image in pixels."""
    width: Count = 128
    """Width of an image in pixels. Objects scale with the height, so a wider image shows more of the scene."""
    num_train: Count = 400
    """Images in the training split."""
    num_search: CountOrZero = 100
    """Images in the search split, which serves to choose settings."""
    num_validation: CountOrZero = 100
    """Images in the validation split."""
    num_test: CountOrZero = 100
    """Images in the test split."""
    void: Fraction = 0.2
    """Share of the pixels at class borders that are left unlabelled, as if annotators disagreed there."""
    seed: Integer = 0
    """Seed of the images."""

    def classes(self) -> tuple[str, ...]:
        """Returns the eleven classes on which CamVid results are reported, in their usual order."""
        return CLASSES

    def images(self) -> Iterator[LabelledImage]:
        """Yields the images split by split, in the order of their numbers."""
        counts = {"train": self.num_train, "search": self.num_search}
        counts |= {"validation": self.num_validation, "test": self.num_test}
        for split in SPLITS:
            for number in range(counts.get(split, 0)):
                unit = f"{split}/{number:05}"
                yield LabelledImage(unit=unit, split=split, read=partial(self._read, unit))

    def image_size(self) -> tuple[int, int]:
        """Returns the configured height and width."""
        return self.height, self.width

    def fingerprint(self) -> str:
        """Returns a hash of the settings and `EDITION`, which determine the images."""
        return fingerprint_of([EDITION, self.model_dump(mode="json")])

    def _read(self, unit: str) -> Pair:
        scene, pixels = (_generator(self.seed, unit, part) for part in ("scene", "pixels"))
        return _draw(scene, pixels, self.height, self.width, self.void)


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _rgb(red: float, green: float, blue: float) -> Colour:
    return np.array([red, green, blue])[:, None, None]


def _tint(rng: np.random.Generator, strength: float) -> Colour:
    return strength * (rng.random((3, 1, 1)) - 0.5)


def _grey(rng: np.random.Generator, low: float, high: float, tint: float = 0.08) -> Colour:
    return _between(rng, low, high) + _tint(rng, tint)


def _any_colour(rng: np.random.Generator) -> Colour:
    return _grey(rng, 0.08, 0.9) if rng.random() < 0.5 else 0.08 + 0.75 * rng.random((3, 1, 1))


def _steps(start: float, stop: float, step: float) -> Iterator[float]:
    while start < stop:
        yield start
        start += step


def _part(x: Array) -> Array:
    """Returns the fractional part."""
    return x - np.floor(x)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Returns white noise, uniform in [-1, 1)."""
    return rng.integers(0, 2**16, shape, np.uint16) / 2.0**15 - 1


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Returns (H, W) noise in [-1, 1): random values on a grid with cells of `cell` pixels, interpolated bilinearly."""
    y, x = np.arange(height) / cell, np.arange(width) / cell
    row, column = y.astype(int), x.astype(int)
    grid = _noise(rng, (row[-1] + 2, column[-1] + 2))
    down, right = (y - row)[:, None], x - column
    rows = grid[row] * (1 - down) + grid[row + 1] * down
    smooth: Array = rows[:, column] * (1 - right) + rows[:, column + 1] * right
    return smooth


class _Region(NamedTuple):
    """A box of rows and columns, and the pixels in it to paint."""

    place: tuple[slice, slice]
    """Rows and columns of the box."""
    x: Array
    """(w,): centres of the columns, in pixels."""
    y: Array
    """(h, 1): centres of the rows, in pixels."""
    z: Array
    """Distance from the camera in metres: () for the whole box, (w,) per column, or (h, 1) per row."""
    mask: NDArray[np.bool_] = np.array(True)
    """Whether to paint each pixel: (h, w), or () for the whole box."""


class _Canvas:
    """The image being painted. Coordinates are in pixels from the upper left corner: x points right and y down."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.height, self.width = height, width
        self.colour = np.zeros((3, height, width))
        self.label = np.zeros((height, width), np.uint8)
        self.depth = np.zeros((height, width))  # m
        self.grain = _noise(rng, (height, width))
        self.blobs = _smooth_noise(rng, height, width, max(height / 28, 1.0))
        self.clouds = 0.7 * _smooth_noise(rng, height, width, max(height / 4, 1.0)) + 0.3 * self.blobs
        self._x = np.arange(width, dtype=np.float64) + 0.5
        self._y = np.arange(height, dtype=np.float64)[:, None] + 0.5

    def box(self, *points: Point, z: float) -> _Region:
        """Returns the pixels whose centres are in the bounding box of the points, at least one column and one row.

        Pixels left of or above the image are cut off.
        """
        across, down = zip(*points, strict=True)
        x0, y0 = math.floor(min(across) + 0.5), math.floor(min(down) + 0.5)
        x1, y1 = max(math.floor(max(across) + 0.5), x0 + 1), max(math.floor(max(down) + 0.5), y0 + 1)
        rows, columns = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
        return _Region((rows, columns), self._x[columns], self._y[rows], np.array(z))

    def ellipse(self, x: float, y: float, across: float, down: float, z: float, ragged: float = 0.0) -> _Region:
        """Returns the pixels in an ellipse with half axes `across` and `down`.

        Noise of strength `ragged` makes the border irregular.
        """
        across, down = max(across, 0.75), max(down, 0.75)
        region = self.box((x - across, y - down), (x + across, y + down), z=z)
        inside = np.square((region.x - x) / across) + np.square((region.y - y) / down)
        if ragged:
            inside += ragged * (self.blobs[region.place] + 0.25 * self.grain[region.place])
        return region._replace(mask=inside <= 1)

    def paint(self, region: _Region, label: int, colour: Colour, grain: float = 0.07, blobs: float = 0.0) -> None:
        """Paints a region. `grain` and `blobs` are the strengths of fine and of smooth noise in its colour."""
        uneven = 1 + grain * self.grain[region.place]
        if blobs:
            uneven += blobs * self.blobs[region.place]
        np.copyto(self.colour[:, *region.place], colour * uneven, where=region.mask)
        np.copyto(self.label[region.place], label, where=region.mask)
        np.copyto(self.depth[region.place], region.z, where=region.mask)

    def shade(self, region: _Region, light: float) -> None:
        """Multiplies the colours of a region by `light`. Its labels and depths stay unchanged."""
        seen = self.colour[:, *region.place]
        np.multiply(seen, light, out=seen, where=region.mask)


class _Street(_Canvas):
    """A street seen along its length.

    Coordinates are in metres: x to the right of the camera, y up from the ground, z ahead of the camera. Pairs of
    values are for the left side, then the right side.
    """

    def __init__(self, rng: np.random.Generator, pixels: np.random.Generator, height: int, width: int):
        super().__init__(pixels, height, width)
        self.rng = rng
        self.focal, self.eye_m = height * _between(rng, 0.95, 1.3), _between(rng, 1.3, 1.9)
        self.horizon, self.vanishing = height * _between(rng, 0.44, 0.6), width * _between(rng, 0.32, 0.68)
        self.curbs = (-_between(rng, 2.5, 5), _between(rng, 2.5, 5))
        self.walls = (self.curbs[0] - _between(rng, 1.5, 5), self.curbs[1] + _between(rng, 1.5, 5))
        self.light = _one_of(rng, [(1.0, 0.6), (0.6, 1.0), (0.85, 0.85)])

    def at(self, x: float, y: float, z: float) -> Point:
        """Projects a point to pixel coordinates."""
        return self.vanishing + self.focal * x / z, self.horizon + self.focal * (self.eye_m - y) / z

    def front(self, x0: float, x1: float, y0: float, y1: float, z: float) -> _Region:
        """Returns the pixels of an upright rectangle that faces the camera."""
        return self.box(self.at(x0, y0, z), self.at(x1, y1, z), z=z)

    def side(self, x: float, y0: float, y1: float, z0: float, z1: float) -> _Region:
        """Returns the pixels of an upright rectangle along the street."""
        region = self.box(*(self.at(x, y, z) for y in (y0, y1) for z in (z0, z1)), z=z0)
        scale = np.clip((region.x - self.vanishing) / x, self.focal / z1, self.focal / z0)
        top, bottom = (self.horizon + (self.eye_m - y) * scale for y in (y1, y0))
        return region._replace(z=self.focal / scale, mask=(region.y >= top) & (region.y < bottom))

    def ground(self, x0: float, x1: float, z0: float, z1: float) -> _Region:
        """Returns the pixels of a rectangle on the ground."""
        region = self.box(*(self.at(x, 0, z) for x in (x0, x1) for z in (z0, z1)), z=z0)
        scale = np.clip((region.y - self.horizon) / self.eye_m, self.focal / z1, self.focal / z0)
        left, right = (self.vanishing + x * scale for x in (x0, x1))
        return region._replace(z=self.focal / scale, mask=(region.x >= left) & (region.x < right))

    def disc(self, x: float, y: float, z: float, across: float, down: float, ragged: float = 0.0) -> _Region:
        """Returns the pixels of an upright ellipse that faces the camera. Its half axes are in metres."""
        return self.ellipse(*self.at(x, y, z), across * self.focal / z, down * self.focal / z, z, ragged)


def _sky(street: _Street) -> None:
    rng = street.rng
    region = street.box((0, 0), (street.width, street.horizon + 1), z=FAR_M)
    low = region.y / (street.horizon + 1)
    zenith = _rgb(0.25, 0.45, 0.85) if rng.random() < 0.5 else _grey(rng, 0.4, 0.9)
    clear = _grey(rng, 0.6, 0.95) * low + zenith * (1 - low)
    cloudy = np.clip(_between(rng, -1, 1) + 2 * street.clouds[region.place], 0, 1)
    street.paint(region, SKY, clear * (1 - cloudy) + _grey(rng, 0.6, 1.0) * cloudy, grain=0.01)
    for x in _steps(-48, 48, 12):  # trees and houses that close the street at its far end
        label, colour = (TREE, _leaves(rng)) if rng.random() < 0.4 else (BUILDING, _grey(rng, 0.2, 0.7))
        street.paint(street.front(x, x + 12, 0, _between(rng, 3, 12), FAR_M), label, colour, blobs=0.2)


def _ground(street: _Street) -> None:
    rng, (left, right) = street.rng, street.curbs
    tarmac, white = _grey(rng, 0.2, 0.5), _grey(rng, 0.6, 0.95)
    paving = tarmac * _between(rng, 0.8, 1.5) + _tint(rng, 0.1)
    region = street.ground(-FAR_M, FAR_M, 1, FAR_M)
    slabs = np.where(_part(region.z / 1.5) < 0.12, 0.8, 1.0)
    street.paint(region, PAVEMENT, paving * slabs, blobs=0.1)

    def paint(label: int, x: float, width: float, z0: float, z1: float, colour: Colour) -> None:
        street.paint(street.ground(x, x + width, z0, z1), label, colour, grain=0.11, blobs=0.1)

    paint(PAVEMENT, left - 0.15, right - left + 0.3, 1, FAR_M, paving * 1.2)  # curbs
    paint(ROAD, left, right - left, 1, FAR_M, tarmac)
    for _ in range(int(_between(rng, 0, 5))):  # patches of repaired tarmac
        x, z0 = _between(rng, left, right - 1), _between(rng, 2, 30)
        paint(ROAD, x, 1, z0, z0 + _between(rng, 0.5, 9), tarmac * _between(rng, 0.7, 1.15))
    for z0 in _steps(1 + 6 * rng.random(), 50, 6):
        paint(ROAD, (left + right) / 2 - 0.08, 0.16, z0, z0 + 3, white)
    for x in (left + 0.3, right - 0.42) if rng.random() < 0.3 else ():
        paint(ROAD, x, 0.12, 1, 60, white)
    if rng.random() < 0.2:  # a crossing
        z0 = _between(rng, 6, 25)
        for x in _steps(left + 0.3, right - 0.5, 1):
            paint(ROAD, x, 0.5, z0, z0 + 3, white)
    if street.light[0] != street.light[1]:  # the houses on the darker side cast a shadow on the ground
        edge = street.walls[street.light.index(0.6)]
        x0, x1 = sorted((edge * 4, edge * _between(rng, -0.2, 0.9)))
        street.shade(street.ground(x0, x1, 1, FAR_M), 0.6)


def _building(street: _Street, hand: int, z0: float, z1: float) -> None:
    rng, out = street.rng, 1 if hand else -1
    x = street.walls[hand] + out * _one_of(rng, [0.0, 0.0, 1.5])
    up, storey, pitch = _between(rng, 5, 15), _between(rng, 2.7, 3.6), _between(rng, 1.8, 3.5)
    brick, painted = _rgb(0.5, 0.3, 0.24) * _between(rng, 0.6, 1.3), 0.5 * _any_colour(rng) + _grey(rng, 0.15, 0.45)
    wall = _one_of(rng, [_grey(rng, 0.25, 0.85, 0.12), _grey(rng, 0.25, 0.6), brick, painted])
    palette = np.concatenate([wall, _grey(rng, 0.1, 0.6, 0.15), 0.7 * wall, _any_colour(rng)], axis=1)[..., 0]
    shop_m = storey if rng.random() < 0.4 else 0.0

    def paint(region: _Region, along: Array, light: float) -> None:
        """Paints a wall with windows, eaves and a shop front. `along` is the position along the wall in metres."""
        y = street.eye_m - (region.y - street.horizon) * region.z / street.focal
        column, row = _part(along / pitch), _part(y / storey)
        is_pane = (column > 0.3) & (column < 0.75) & (row > 0.3) & (row < 0.8) & (y < up - 0.7)
        part = np.where(y > up - 0.5, 2, np.where((y < shop_m) & (row > 0.75), 3, is_pane))
        street.paint(region, BUILDING, (palette * light)[:, part], grain=0.1, blobs=0.06)

    region = street.front(x, x + out * 12, 0, up, z0)
    paint(region, (region.x - street.vanishing) * z0 / street.focal, 0.75)
    region = street.side(x, 0, up, z0, z1)
    paint(region, region.z, street.light[hand])


def _leaves(rng: np.random.Generator) -> Colour:
    colour = _rgb(0.22, 0.36, 0.14) if rng.random() < 0.8 else _rgb(0.42, 0.33, 0.2)
    return colour * _between(rng, 0.5, 1.3) + _tint(rng, 0.12)


def _fence(street: _Street, hand: int, z0: float, z1: float) -> None:
    """Paints a fence or a hedge."""
    rng, light = street.rng, street.light[hand]
    region = street.side(street.walls[hand], 0, _between(rng, 0.9, 2), z0, z1)
    if rng.random() < 0.4:
        street.paint(region, TREE, _leaves(rng), grain=0.25, blobs=0.5)
    else:
        colour = _one_of(rng, [_any_colour(rng), _rgb(0.45, 0.32, 0.2), _grey(rng, 0.15, 0.8)])
        street.paint(region, FENCE, colour * light * np.where(_part(region.z / 0.4) < 0.4, 0.6, 1.0), grain=0.1)


def _tree(street: _Street, x: float, z: float) -> None:
    rng = street.rng
    leaves, crown, wide, trunk = _leaves(rng), _between(rng, 3, 6), _between(rng, 1, 2.5), _between(rng, 0.12, 0.25)
    street.paint(street.front(x - trunk, x + trunk, 0, crown, z), TREE, _grey(rng, 0.15, 0.35), grain=0.2)
    for _ in range(3 if z < 30 else 1):
        place = x + wide * 0.5 * (rng.random() - 0.5), crown + wide * (rng.random() - 0.5), z
        region = street.disc(*place, wide, wide * _between(rng, 0.7, 1.2), ragged=0.5)
        street.paint(region, TREE, leaves * _between(rng, 0.75, 1.25), grain=0.25, blobs=0.5)


def _car(street: _Street, x: float, z: float) -> None:
    rng = street.rng
    body, glass, black = _any_colour(rng), _grey(rng, 0.08, 0.35), _rgb(0.06, 0.06, 0.06)
    half, waist, roof, slope, long = _between(rng, 0.8, 0.95), 0.9, _between(rng, 1.35, 1.6), 0.55, 4.1
    if rng.random() < 0.2:  # a van or bus
        half, waist, roof, slope, long = 1.0, 1.2, _between(rng, 2, 2.9), 0.1, _between(rng, 4.5, 8)
    lamp = _rgb(0.75, 0.1, 0.08) if rng.random() < 0.6 else _rgb(0.95, 0.95, 0.85)
    top, far, out = half - 0.12, z + long, math.copysign(1, x)
    flank, pillar = x - out * half, x - out * top

    def paint(region: _Region, colour: Colour) -> None:
        street.paint(region, CAR, colour, grain=0.04)

    street.shade(street.ground(x - half - 0.15, x + half + 0.15, z - 0.2, far), 0.4)
    paint(street.side(pillar, waist - 0.3, roof, z + slope, far - 2 * slope), body * 0.75)
    paint(street.side(flank, 0.25, waist, z, far), body * 0.75)
    paint(street.front(x - top, x + top, waist - 0.3, roof, z + slope), body)
    paint(street.front(x - top + 0.1, x + top - 0.1, waist, roof - 0.12, z + slope), glass)
    paint(street.front(x - half, x + half, 0.25, waist, z), body)
    if z > 30:  # details would be too small to see
        return
    paint(street.side(pillar, waist, roof - 0.12, z + slope + 0.3, far - 2.6 * slope), glass)
    for ahead in (z + 0.75, far - 0.8):  # wheels, seen at an angle
        paint(street.disc(flank, 0.33, ahead, 0.33 * abs(flank) / ahead, 0.33), black)
    for end in (x - half + 0.15, x + half - 0.15):
        paint(street.front(end - 0.12, end + 0.12, 0, 0.25, z), black)
        paint(street.front(end - 0.12, end + 0.12, 0.6, 0.78, z), lamp)


def _pole(street: _Street, x: float, z: float) -> None:
    rng = street.rng
    kind, colour, up = _one_of(rng, ["lamp", "lamp", "board", "disc", "lights"]), _grey(rng, 0.1, 0.7), 3.0
    if kind == "lamp":
        up, end = _between(rng, 5, 9), x - math.copysign(_between(rng, 0.5, 1.8), x)
        street.paint(street.front(x, end, up - 0.12, up, z), POLE, colour)
    street.paint(street.front(x - 0.075, x + 0.075, 0, up, z), POLE, colour)
    if kind == "lights":
        street.paint(street.front(x - 0.2, x + 0.2, up - 1, up, z), SIGN, _rgb(0.08, 0.08, 0.08))
        lamp, y = _one_of(rng, [(_rgb(0.9, 0.1, 0.1), up - 0.2), (_rgb(0.1, 0.8, 0.3), up - 0.8)])
        street.paint(street.disc(x, y, z, 0.12, 0.12), SIGN, lamp)
    wide, tall = _between(rng, 0.4, 1.1), 0.45
    for share, paint in ((1.0, _any_colour(rng)), (0.6, _grey(rng, 0.6, 1))):
        if kind == "disc":
            street.paint(street.disc(x, up - tall, z, share * tall, share * tall), SIGN, paint)
        elif kind == "board":
            across, middle = share * wide, up - tall
            region = street.front(x - across, x + across, middle - share * tall, middle + share * tall, z)
            street.paint(region, SIGN, paint)


def _person(street: _Street, label: int, x: float, z: float, feet: float) -> None:
    """Paints a person whose feet are `feet` metres above the ground."""
    rng, size = street.rng, _between(street.rng, 0.85, 1.05)
    half, hips, neck = 0.22 * size, feet + 0.8 * size, feet + 1.45 * size
    legs, coat, skin = _any_colour(rng), _any_colour(rng), _rgb(0.85, 0.62, 0.5) * _between(rng, 0.4, 1.1)
    stride = half * _between(rng, 0.3, 0.8)
    street.shade(street.disc(x, 0, z, 0.35, 0.08), 0.5)
    for foot in (x - stride, x + stride):
        street.paint(street.front(foot - 0.08, foot + 0.08, feet, hips, z), label, legs)
    street.paint(street.front(x - half, x + half, hips, neck, z), label, coat)
    street.paint(street.disc(x, neck + 0.14 * size, z, 0.11, 0.15), label, skin)


def _bicyclist(street: _Street, x: float, z: float) -> None:
    colour, turned = _any_colour(street.rng) * 0.5, _between(street.rng, 0.1, 1)
    for wheel in (x - 0.5 * turned, x + 0.5 * turned):
        street.paint(street.disc(wheel, 0.34, z, 0.05 + 0.29 * turned, 0.34), BICYCLIST, colour)
    street.paint(street.front(x - 0.5 * turned, x + 0.5 * turned, 0.5, 0.62, z), BICYCLIST, colour)
    _person(street, BICYCLIST, x, z, 0.25)


_Thing = tuple[float, Callable[[], None]]
"""An object: its distance from the camera in metres (to the far end of a house or fence), and the function that draws
it."""


def _paint(things: Iterable[_Thing]) -> None:
    """Draws the objects from far to near, so that near objects cover far ones."""
    for _, draw in sorted(things, key=lambda thing: -thing[0]):
        draw()


def _edge(street: _Street, hand: int) -> Iterator[_Thing]:
    """Yields the houses, trees, fences and hedges along one side of the street, plot by plot."""
    rng, z1, wall = street.rng, _between(street.rng, 1.5, 8), street.walls[hand]
    z0 = 1.0
    while z0 < FAR_M:
        kind = rng.random()
        if kind < 0.75:
            yield z1, partial(_building, street, hand, z0, z1)
        else:
            for z in (_between(rng, z0, z1) + 1.5, _between(rng, z0, z1) + 1.5):
                yield z, partial(_tree, street, wall, z)
        if kind > 0.65:
            yield z1, partial(_fence, street, hand, z0, z1)
        z0, z1 = z1, z1 * _between(rng, 1.1, 1.3) + _between(rng, 5, 14)


def _traffic(street: _Street, hand: int) -> Iterator[_Thing]:
    """Yields the objects on one side of the street: cars, poles with signs, pedestrians, bicyclists and trees."""
    rng, curb, wall, out = street.rng, street.curbs[hand], street.walls[hand], 1 if hand else -1
    parked = _one_of(rng, [0.0, 0.3, 0.8])
    for slot in _steps(_between(rng, 4, 14), 45, 7.5):
        if rng.random() < parked:
            z = slot + _between(rng, -1, 1)
            yield z, partial(_car, street, curb - out * 1.1, z)
    if rng.random() < 0.35:
        z = _between(rng, 6, 30)
        yield z, partial(_car, street, curb * 0.4, z)
    for _ in range(int(_between(rng, 1, 5))):
        z = 4 + 40 * rng.random() * rng.random()
        yield z, partial(_pole, street, curb + out * 0.4, z)
    for _ in range(int(_between(rng, 0, 5))):
        z = 5 + 30 * rng.random() * rng.random()
        x = _between(rng, curb, wall) if rng.random() < 0.8 else _between(rng, 0, curb)
        yield z, partial(_person, street, PEDESTRIAN, x, z, 0)
    if rng.random() < 0.4:
        z = _between(rng, 6, 22)
        yield z, partial(_bicyclist, street, curb * _between(rng, 0.5, 0.9), z)
    if rng.random() < 0.2:
        for z in _steps(_between(rng, 6, 14), 60, 9):
            yield z, partial(_tree, street, curb + out * 0.8, z)


def _photograph(street: _Street, pixels: np.random.Generator) -> NDArray[np.uint8]:
    """Returns the street's image with haze, lens blur, random exposure and white balance, and sensor noise."""
    rng, clear_m = street.rng, _between(street.rng, 100, 400)
    through = clear_m / (clear_m + street.depth)
    colour = street.colour * through + _grey(rng, 0.55, 0.95, 0.12) * (1 - through)
    colour = np.pad(colour, ((0, 0), (1, 1), (1, 1)), mode="edge")
    colour = colour[:, :-2] + 6 * colour[:, 1:-1] + colour[:, 2:]
    colour = colour[..., :-2] + 6 * colour[..., 1:-1] + colour[..., 2:]
    colour *= _between(rng, 0.75, 1.25) / 64 * (1 + _tint(rng, 0.2))
    colour += _between(rng, 0.02, 0.07) * _noise(pixels, colour.shape)
    return np.ascontiguousarray((np.clip(colour, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def _beside_another(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns whether the label of each pixel differs from the label of any of its four neighbours."""
    found = np.zeros(labels.shape, np.bool_)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = labels[here] != labels[there]
        found[here] |= differs
        found[there] |= differs
    return found


def _draw(rng: np.random.Generator, pixels: np.random.Generator, height: int, width: int, void: float) -> Pair:
    """Draws a street.

    `rng` determines the scene, and `pixels` draws the noise. They are separate, so that images of any size show the
    same scene.
    """
    street = _Street(rng, pixels, height, width)
    _sky(street)
    _ground(street)
    _paint(thing for hand in (0, 1) for part in (_edge, _traffic) for thing in part(street, hand))
    image = _photograph(street, pixels)
    is_void = _beside_another(street.label) & (_noise(pixels, street.label.shape) < 2 * void - 1)
    return image, np.where(is_void, np.uint8(IGNORED_PIXEL), street.label)
