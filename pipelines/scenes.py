"""The demo's data: generated pictures of simple scenes, each with the one sentence that describes it.

A scene is one thing at a place, or two things in a relation. The sentence is a function of the scene in a canonical
order (the upper thing first, the left thing first), and everything it says can be seen in the picture, so word-for-word
agreement means something. Some rows are broken on purpose, so that a first run shows what quarantine is for.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipelines.errors import UserError
from vlm.config import Config
from vlm.files import atomic_write

SIDE = 64
"""Pixels on a side of a finished picture."""
OVERSAMPLE = 4
"""Pictures are drawn this much larger and averaged down, which gives clean edges."""

RADII = {"small": (6.0, 7.5), "large": (12.0, 13.5)}
"""Pixels from a thing's centre to its rim, lowest and highest."""
COLOURS = {
    "red": (206, 28, 36),
    "green": (40, 150, 60),
    "blue": (30, 80, 200),
    "yellow": (236, 210, 30),
    "purple": (140, 50, 170),
    "orange": (244, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = {
    "in the top left corner": (-1, -1),
    "at the top": (0, -1),
    "in the top right corner": (1, -1),
    "on the left": (-1, 0),
    "in the middle": (0, 0),
    "on the right": (1, 0),
    "in the bottom left corner": (-1, 1),
    "at the bottom": (0, 1),
    "in the bottom right corner": (1, 1),
}
"""Where a single thing can be: phrase to (column, row) of a 3 x 3 grid."""
RELATIONS = ("above", "left of")
"""How the first thing of two stands to the second. Their opposites are never said: one scene, one sentence."""

BROKEN_SHARE = 0.01
DUPLICATE_SHARE = 0.002
PAIR_SHARE = 0.7
COLUMNS = ("", "b64string_images", "caption")


@dataclass(frozen=True)
class Thing:
    """One thing to be drawn: keys of RADII and COLOURS, one of SHAPES."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing at one of PLACES, or two different things in one of RELATIONS."""

    things: tuple[Thing, ...]
    relation: str

    @property
    def caption(self) -> str:
        """The scene's sentence."""
        return " ".join([str(self.things[0]), self.relation, *map(str, self.things[1:])])


class SceneSummary(Config):
    """What `write_scenes` put into the file. `rows` counts all of them, broken ones and duplicates too."""

    rows: int
    broken: int
    duplicates: int


# ------------------------------------------------------------------------------------------------ scenes


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn at random; two things of one scene are never alike."""
    first = _random_thing(rng)
    if rng.random() >= PAIR_SHARE:
        return Scene((first,), str(rng.choice(list(PLACES))))
    second = first
    while second == first:
        second = _random_thing(rng)
    return Scene((first, second), str(rng.choice(RELATIONS)))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of SIDE x SIDE; place, size and shade vary a little within what the sentence says."""
    background = tuple(int(shade) for shade in rng.integers(228, 256, size=3))
    image = Image.new("RGB", (SIDE * OVERSAMPLE, SIDE * OVERSAMPLE), background)
    canvas = ImageDraw.Draw(image)
    radii = [float(rng.uniform(*RADII[thing.size])) for thing in scene.things]
    centres = _place_one(scene, radii[0], rng) if len(radii) == 1 else _place_two(scene, radii, rng)
    for thing, radius, (x, y) in zip(scene.things, radii, centres, strict=True):
        shade = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, size=3), 0, 255)
        fill = (int(shade[0]), int(shade[1]), int(shade[2]))
        outline = [
            (OVERSAMPLE * (x + radius * dx), OVERSAMPLE * (y + radius * dy)) for dx, dy in _OUTLINES[thing.shape]
        ]
        canvas.polygon(outline, fill=fill)
    return image.reduce(OVERSAMPLE)


def _random_thing(rng: np.random.Generator) -> Thing:
    return Thing(str(rng.choice(list(RADII))), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))


def _place_one(scene: Scene, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """In the grid cell the phrase names: 2 to 6 pixels from an edge, or within 3 pixels of the middle."""
    column, row = PLACES[scene.relation]
    return [(_in_cell(column, radius, rng), _in_cell(row, radius, rng))]


def _in_cell(cell: int, radius: float, rng: np.random.Generator) -> float:
    if cell == 0:
        return SIDE / 2 + float(rng.uniform(-3, 3))
    from_edge = radius + float(rng.uniform(2, 6))
    return from_edge if cell < 0 else SIDE - from_edge


def _place_two(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Along one axis with a clear gap between them; along the other nearly level."""
    room = SIDE - 2 * sum(radii)
    margin, gap = rng.uniform(1, room * 0.3), rng.uniform(room * 0.25, room * 0.6)
    along = (margin + radii[0], margin + 2 * radii[0] + gap + radii[1])
    across = SIDE / 2 + rng.uniform(-12, 12) + rng.uniform(-3, 3, size=2)
    pairs = zip(across, along, strict=True) if scene.relation == "above" else zip(along, across, strict=True)
    return [(float(x), float(y)) for x, y in pairs]


def _regular(corners: int, turn: float = -0.25, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners on the unit circle, the first at `turn` of a full turn; with `inner` a star with that inner radius."""
    steps = corners if inner is None else 2 * corners
    points = []
    for step in range(steps):
        radius = 1.0 if inner is None or step % 2 == 0 else inner
        angle = 2 * math.pi * (turn + step / steps)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_OUTLINES = {
    "circle": _regular(48),
    "square": _regular(4, turn=-0.125),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.4),
}


# ------------------------------------------------------------------------------------------------ the file


def broken_rows(count: int) -> int:
    """How many of `count` rows are broken on purpose."""
    return math.ceil(count * BROKEN_SHARE)


def write_scenes(path: Path, count: int, seed: int) -> SceneSummary:
    """Write `count` rows as base64 CSV in the seeds' own form: unnamed index, b64string_images, caption.

    About one row in a hundred is broken on purpose and one in five hundred repeats an earlier one. The bytes depend
    on `count` and `seed` alone; a file that already holds them is left untouched, so an ingest recognises it.

    Raises:
        UserError: the file cannot be written.
    """
    broken = broken_rows(count)
    duplicates = int(count * DUPLICATE_SHARE)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(count, broken, duplicates, seed))
    content = buffer.getvalue().encode("ascii")
    try:
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise UserError(
            "the generated scenes cannot be written",
            where=str(path),
            got=str(error.strerror or error),
            fix="free some space, or name a folder you may write to",
        ) from None
    return SceneSummary(rows=count, broken=broken, duplicates=duplicates)


def _rows(count: int, broken: int, duplicates: int, seed: int) -> Iterator[list[str]]:
    """Good rows, with broken rows and copies of an earlier good row strewn in evenly."""
    breakers = list(BREAKERS.values())
    bad_at = {(2 * k + 1) * count // (2 * broken): breakers[k % len(breakers)] for k in range(broken)} if broken else {}
    free = [index for index in range(count) if index not in bad_at]
    copies_at = {free[(2 * k + 1) * len(free) // (2 * duplicates)] for k in range(duplicates)} if duplicates else set()
    last_good: list[str] = []
    for index in range(count):
        if index in copies_at and last_good:
            yield last_good
            continue
        rng = np.random.default_rng((seed, index))
        scene = random_scene(rng)
        picture = _png(draw(scene, rng))
        if index in bad_at:
            yield bad_at[index](str(index), picture, scene.caption)
        else:
            last_good = [str(index), _base64(picture), scene.caption]
            yield last_good


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


BREAKERS: dict[str, Callable[[str, bytes, str], list[str]]] = {
    # 4n + 1 characters are never base64, whatever a decoder forgives.
    "bad_base64": lambda index, png, caption: [index, _base64(png)[:401], caption],
    "not_an_image": lambda index, png, caption: [index, _base64(caption.encode()), caption],
    "empty_text": lambda index, png, caption: [index, _base64(png), ""],
    "truncated_image": lambda index, png, caption: [index, _base64(png[: len(png) // 2]), caption],
    "too_small": lambda index, png, caption: [index, _base64(_png(Image.new("RGB", (2, 2)))), caption],
    "malformed_record": lambda index, png, caption: [index, _base64(png), caption, "one column too many"],
}
"""Ways to break a row, by the reason it should be refused for (`pipelines.formats.tables.REASONS`)."""
