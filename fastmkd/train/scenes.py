"""The made set, one picture at a time: small pictures of things placed on a canvas, with the truth of each pixel.

Every picture is a function of (seed, part, number) alone, so a larger set begins with the smaller one. Pixels are mixed
in integers and the random numbers come from NumPy's legacy generator, whose stream never changes: a seed means the same
pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .pictures import TensorPictures
from .seeds import counter_seed

__all__ = ["STYLES", "Scene", "SceneObject", "SceneStyle", "make_scene"]

Array = np.ndarray[Any, Any]

UNIT = 28 / 128  # share of the canvas that an object's whole picture takes at scale 1
SOLID = 12  # grey value from which a pixel of a source picture belongs to the thing; below it is background
CLOSED = 16  # side from which dark specks in a thing are closed; in smaller pictures they are its holes
SHADES = 90 + np.arange(256)[:, None] * 165 // 255  # of each grey value: dark cloth must show on a dark ground
LEAST_VISIBLE = 0.25  # of an object; one that would hide more of another is put elsewhere or left out
TRIES = 20  # to find a place for an object


@dataclass(frozen=True)
class SceneStyle:
    """What the pictures of a split look like.

    Attributes:
        objects: fewest and most in a picture.
        scales: smallest and largest, drawn evenly in the logarithm; at 1 a source picture is 28 pixels wide on a canvas
            of 128.
        sides: height and width of a canvas are drawn from these, as parts of the nominal side.
        cluttered: objects overlap each other and the border, on textures, among and under fragments of other pictures.
        crowd_every: one picture in so many holds a crowd; 0 for none.
        empty_every: one picture in so many holds no object.
    """

    objects: tuple[int, int]
    scales: tuple[float, float]
    sides: tuple[float, ...] = (1.0,)
    cluttered: bool = False
    crowd_every: int = 0
    empty_every: int = 16


STYLES = {
    "easy": SceneStyle(objects=(1, 3), scales=(1.5, 2.25)),
    "hard": SceneStyle(
        objects=(4, 10), scales=(0.5, 3.0), sides=(0.75, 1.0, 1.25), cluttered=True, crowd_every=8, empty_every=16
    ),
}


class SceneObject(NamedTuple):
    """One thing in a picture, or a crowd of one class.

    Attributes:
        category: class from 1; 0 is the background.
        mask: ``(H, W)`` bool, the pixels that show it; what lies behind another thing or outside is not among them.
        sources: which source pictures it was made from.
        crowd: several things that no box tells apart.
    """

    category: int
    mask: Array
    sources: tuple[int, ...]
    crowd: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x, y, width, height)`` in pixels, the smallest box around the visible pixels."""
        rows, columns = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


class Scene(NamedTuple):
    """A picture and its truth.

    Attributes:
        image: ``(H, W, 3)`` uint8.
        classes: ``(H, W)`` uint8, the class of each pixel, 0 for the background.
        objects: from the first placed to the last.
    """

    image: Array
    classes: Array
    objects: list[SceneObject]


def make_scene(source: TensorPictures, style: SceneStyle, size: int, seed: int, part: str, number: int) -> Scene:
    """Makes picture `number` of a part of the set.

    Args:
        source: grey pictures on black, with labels from 0.
        style: of the split.
        size: nominal side of the canvas in pixels.
        seed: of the set.
        part: "train" or "val".
        number: from 0.

    Example:
        >>> from fastmkd.train.data import load_data
        >>> from fastmkd.train.schema import DataRecipe
        >>> digits = load_data(DataRecipe(name="digits")).train
        >>> scene = make_scene(digits, STYLES["easy"], size=64, seed=0, part="train", number=0)
        >>> scene.image.shape, scene.classes.shape, 1 <= len(scene.objects) <= 3
        ((64, 64, 3), (64, 64), True)
    """
    rng = np.random.RandomState(counter_seed(seed, f"scene {part}", number) % 2**32)
    height, width = (round(size * style.sides[rng.randint(len(style.sides))]) for _ in range(2))
    canvas = _Canvas(_background(rng, height, width, style.cluttered))
    stamps = _Stamps(source, round(size * UNIT), rng)
    if style.cluttered:
        for _ in range(rng.randint(4, 11)):
            canvas.place(stamps.fragment(), rng)
    if number % style.empty_every != style.empty_every - 1:
        if style.crowd_every and number % style.crowd_every == style.crowd_every // 2:
            _place_crowd(canvas, stamps, rng)
        low, high = np.log(style.scales)
        for _ in range(rng.randint(style.objects[0], style.objects[1] + 1)):
            picture = rng.randint(len(stamps.labels))
            stamp = stamps.whole(picture, float(np.exp(rng.uniform(low, high))))
            category = int(stamps.labels[picture]) + 1
            canvas.place(stamp, rng, category, (picture,), apart=not style.cluttered)
    if style.cluttered:
        for _ in range(rng.randint(0, 5)):
            canvas.place(stamps.fragment(), rng)
        grain = rng.randint(-10, 11, (height, width, 1), np.int16)  # of the camera: over everything
        canvas.image = (canvas.image.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
    return canvas.scene()


class _Stamp(NamedTuple):
    """What is pasted: ``(h, w, 3)`` uint8 colours, and ``(h, w)`` uint8 how much of them covers what is below."""

    colour: Array
    alpha: Array


class _Stamps:
    """Cuts tinted stamps from source pictures.

    Args:
        source: grey pictures.
        unit: side in pixels at scale 1.
        rng: draws tints and fragments.
    """

    def __init__(self, source: TensorPictures, unit: int, rng: np.random.RandomState) -> None:
        self.pictures: Array = source.images[:, 0].numpy()  # (N, h, w)
        self.labels: Array = source.labels.numpy()
        self.unit, self.rng = unit, rng

    def whole(self, picture: int, scale: float) -> _Stamp:
        return self._stamp(self.pictures[picture], max(4, round(self.unit * scale)))

    def fragment(self) -> _Stamp:
        """Part of a random picture, of the size of a small object."""
        picture = self.pictures[self.rng.randint(len(self.pictures))]
        side = max(2, picture.shape[0] * 2 // 5)
        top, left = self.rng.randint(picture.shape[0] - side + 1, size=2)
        return self._stamp(picture[top : top + side, left : left + side], self.rng.randint(6, 15) * self.unit // 28)

    def _stamp(self, picture: Array, side: int) -> _Stamp:
        side = max(side, 2)
        solid = Image.fromarray(np.where(picture >= SOLID, 255, 0).astype(np.uint8))
        if min(solid.size) >= CLOSED:
            solid = solid.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MinFilter(3))
        alpha = _resized(solid, side)
        tint = self.rng.randint(110, 256, 3)
        colour = (SHADES * tint // 255).astype(np.uint8)[_resized(Image.fromarray(picture), side)]
        rows, columns = (np.flatnonzero((alpha > 127).any(axis)) for axis in (1, 0))
        if not len(rows):
            return _Stamp(colour[:0, :0], alpha[:0, :0])
        inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        return _Stamp(colour[inside], alpha[inside])


class _Canvas:
    """A picture under construction; `owner` says for each pixel which object it shows, 0 for none."""

    def __init__(self, image: Array) -> None:
        self.image = image
        self.owner = np.zeros(image.shape[:2], np.int16)
        self.visible = np.zeros(1, np.int64)  # pixels of each object that can be seen, by owner
        self.areas = np.zeros(1, np.int64)  # and those it would have alone and whole
        self.facts: list[tuple[int, tuple[int, ...], bool]] = []  # category, sources, crowd

    def place(
        self,
        stamp: _Stamp,
        rng: np.random.RandomState,
        category: int = 0,
        sources: tuple[int, ...] = (),
        apart: bool = False,
    ) -> None:
        """Pastes a stamp where it hides nothing too much; leaves it out if there is no such place.

        Args:
            stamp: what.
            rng: draws the place.
            category: 0 for clutter, which is background.
            sources: see `SceneObject`.
            apart: keep the whole of it inside, and its box off those of the others.
        """
        (height, width), (h, w) = self.owner.shape, stamp.alpha.shape
        if h == 0 or h > height or w > width:
            return
        margin = (0, 0) if apart else (h // 3, w // 3)
        for _ in range(TRIES):
            top = rng.randint(-margin[0], height - h + margin[0] + 1)
            left = rng.randint(-margin[1], width - w + margin[1] + 1)
            if apart and self.owner[top : top + h, left : left + w].any():
                continue
            if self.paste(stamp, top, left, len(self.facts) + 1 if category else 0):
                if category:
                    self.facts.append((category, sources, False))
                return

    def paste(self, stamp: _Stamp, top: int, left: int, owner: int) -> bool:
        """Pastes a stamp at a place unless an object would be hidden too much; says whether it did.

        Args:
            stamp: what.
            top: first row, perhaps outside.
            left: first column, perhaps outside.
            owner: number of the object that the stamp belongs to, from 1 up to one more than there are; 0 for clutter.
        """
        (height, width), (h, w) = self.owner.shape, stamp.alpha.shape
        there = slice(max(top, 0), min(top + h, height)), slice(max(left, 0), min(left + w, width))
        here = tuple(slice(s.start - at, s.stop - at) for s, at in zip(there, (top, left), strict=True))
        alpha = stamp.alpha[here]
        solid = alpha > 127
        gained, whole = int(solid.sum()), int((stamp.alpha > 127).sum())
        if owner and (gained < LEAST_VISIBLE * whole or gained < 4):
            return False
        visible = self.visible - np.bincount(self.owner[there][solid], minlength=len(self.visible))
        if (visible[1:] < LEAST_VISIBLE * self.areas[1:]).any():
            return False
        if owner == len(visible):
            visible, self.areas = np.append(visible, 0), np.append(self.areas, 0)
        visible[owner] += gained
        self.areas[owner] += whole
        self.visible = visible
        self.owner[there][solid] = owner
        below, weight = self.image[there].astype(np.uint16), alpha[..., None].astype(np.uint16)
        self.image[there] = (below * (255 - weight) + stamp.colour[here] * weight + 127) // 255
        return True

    def scene(self) -> Scene:
        """The finished picture."""
        category = np.array([0, *(fact[0] for fact in self.facts)], np.uint8)
        objects = [
            SceneObject(category, self.owner == number, sources, crowd)
            for number, (category, sources, crowd) in enumerate(self.facts, start=1)
        ]
        return Scene(self.image, category[self.owner], objects)


def _place_crowd(canvas: _Canvas, stamps: _Stamps, rng: np.random.RandomState) -> None:
    """A heap of small things of one class, under everything that comes later."""
    category = int(stamps.labels[rng.randint(len(stamps.labels))])
    members = (stamps.labels == category).nonzero()[0]
    reach = 2 * stamps.unit
    top, left = (rng.randint(0, max(1, side - reach)) for side in canvas.owner.shape)
    number, sources = len(canvas.facts) + 1, []
    for _ in range(rng.randint(8, 13)):
        picture = int(members[rng.randint(len(members))])
        stamp = stamps.whole(picture, float(rng.uniform(0.5, 0.8)))
        y, x = rng.randint(0, reach, 2)
        if canvas.paste(stamp, top + y, left + x, number):
            sources.append(picture)
    if sources:
        # Its members hide each other, which is what a crowd is: only what shows at the start can be hidden later.
        canvas.areas[number] = canvas.visible[number]
        canvas.facts.append((category + 1, tuple(sources), True))


def _background(rng: np.random.RandomState, height: int, width: int, textured: bool) -> Array:
    """``(height, width, 3)`` uint8: one dark colour, or clouds of several with stripes."""
    if not textured:
        return np.broadcast_to(rng.randint(0, 80, 3).astype(np.uint8), (height, width, 3)).copy()
    cells = rng.randint(2, 9)
    coarse = rng.randint(10, 150, (cells, cells, 3)).astype(np.uint8)
    clouds = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    down, right = rng.randint(-3, 4, 2)
    period = rng.randint(8, 40)
    phase = down * np.arange(height, dtype=np.int16)[:, None] + right * np.arange(width, dtype=np.int16)
    stripes = (phase % np.int16(period) < period // 2) * np.int16(rng.randint(0, 30))
    return (clouds + stripes[..., None]).clip(0, 255).astype(np.uint8)


def _resized(picture: Image.Image, side: int) -> Array:
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
