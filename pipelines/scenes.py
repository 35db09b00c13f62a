"""Data of the demo: generated pictures of simple scenes, each with one sentence that describes the scene.

A scene is one object at a location, or two objects in a relation, such as "left of". The scene determines its sentence,
which names the upper or the left object first. All words of the sentence describe something visible in the picture, so
exact match is a meaningful metric. Some rows are broken on purpose, so that a first run has rows in quarantine.
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
import PIL
from PIL import Image, ImageDraw

from pipelines.errors import UserError
from vlm.config import Config
from vlm.files import atomic_write, file_digest

SIDE = 64
"""Width and height of a picture in pixels."""
OVERSAMPLE = 4
"""A picture is drawn larger by this factor and is then scaled down, so that edges look smooth."""

RADII = {"small": (6.0, 7.5), "large": (12.0, 13.5)}
"""Smallest and largest radius of a small object, and of a large object, in pixels."""
COLOURS = {
    "red": (206, 28, 36),
    "green": (40, 150, 60),
    "blue": (30, 80, 200),
    "yellow": (236, 210, 30),
    "purple": (140, 50, 170),
    "orange": (244, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
LOCATIONS = {
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
"""Phrase for each location of a single object, with the (column, row) of the location in a 3 x 3 grid."""
RELATIONS = ("above", "left of")
"""Relations of the first object to the second object.

No relation is the opposite of another relation, so a scene has only one sentence.
"""

BROKEN_SHARE = 0.01
DUPLICATE_SHARE = 0.002
PAIR_SHARE = 0.7
COLUMNS = ("", "b64string_images", "caption")


@dataclass(frozen=True)
class SceneObject:
    """An object to draw: size (a key of RADII), colour (a key of COLOURS), and shape (an element of SHAPES)."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object at a location (a key of LOCATIONS), or two different objects in a relation of RELATIONS."""

    objects: tuple[SceneObject, ...]
    relation: str

    @property
    def caption(self) -> str:
        """Sentence that describes the scene."""
        return " ".join([str(self.objects[0]), self.relation, *map(str, self.objects[1:])])


class SceneSummary(Config):
    """Row counts of a file that `write_scenes` has written. `rows` includes broken rows and duplicate rows."""

    rows: int
    broken: int
    duplicates: int


# ------------------------------------------------------------------------------------------------ scenes


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene. The two objects of a scene always differ."""
    first = _random_object(rng)
    if rng.random() >= PAIR_SHARE:
        return Scene((first,), str(rng.choice(list(LOCATIONS))))
    second = first
    while second == first:
        second = _random_object(rng)
    return Scene((first, second), str(rng.choice(RELATIONS)))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as an RGB picture of SIDE x SIDE pixels. Position, size and shade of objects vary a little."""
    background = tuple(int(shade) for shade in rng.integers(228, 256, size=3))
    image = Image.new("RGB", (SIDE * OVERSAMPLE, SIDE * OVERSAMPLE), background)
    canvas = ImageDraw.Draw(image)
    radii = [float(rng.uniform(*RADII[item.size])) for item in scene.objects]
    centres = _position_one(scene, radii[0], rng) if len(radii) == 1 else _position_two(scene, radii, rng)
    for item, radius, (x, y) in zip(scene.objects, radii, centres, strict=True):
        shade = np.clip(np.array(COLOURS[item.colour]) + rng.integers(-12, 13, size=3), 0, 255)
        fill = (int(shade[0]), int(shade[1]), int(shade[2]))
        outline = [(OVERSAMPLE * (x + radius * dx), OVERSAMPLE * (y + radius * dy)) for dx, dy in _OUTLINES[item.shape]]
        canvas.polygon(outline, fill=fill)
    return image.reduce(OVERSAMPLE)


def _random_object(rng: np.random.Generator) -> SceneObject:
    return SceneObject(str(rng.choice(list(RADII))), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))


def _position_one(scene: Scene, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return a random centre of an object in the grid cell of the scene's location."""
    column, row = LOCATIONS[scene.relation]
    return [(_in_cell(column, radius, rng), _in_cell(row, radius, rng))]


def _in_cell(cell: int, radius: float, rng: np.random.Generator) -> float:
    if cell == 0:
        return SIDE / 2 + float(rng.uniform(-3, 3))
    from_edge = radius + float(rng.uniform(2, 6))
    return from_edge if cell < 0 else SIDE - from_edge


def _position_two(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the centres of two objects, with a clear gap along the axis of the relation."""
    free = SIDE - 2 * sum(radii)
    margin, gap = rng.uniform(1, free * 0.3), rng.uniform(free * 0.25, free * 0.6)
    along = (margin + radii[0], margin + 2 * radii[0] + gap + radii[1])
    across = SIDE / 2 + rng.uniform(-12, 12) + rng.uniform(-3, 3, size=2)
    pairs = zip(across, along, strict=True) if scene.relation == "above" else zip(along, across, strict=True)
    return [(float(x), float(y)) for x, y in pairs]


def _regular(corners: int, turn: float = -0.25, inner: float | None = None) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon, or of a star with the inner radius `inner`, on the unit circle.

    The angle of the first corner is `turn`, as a fraction of a full turn.
    """
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
    """Return how many of `count` rows are broken on purpose."""
    return math.ceil(count * BROKEN_SHARE)


def write_scenes(path: Path, count: int, seed: int) -> SceneSummary:
    """Write `count` rows as CSV with the columns of seemore's data: an unnamed index, b64string_images, and caption.

    About one row in 100 is broken on purpose, and about one row in 500 repeats an earlier row. With the same versions
    of this module, Pillow and NumPy, the bytes of the file depend only on `count` and `seed`. An existing file with the
    same bytes is not written again, so the next ingest skips the file. A small file beside the CSV file contains these
    versions and the digest of the CSV file. An unchanged CSV file is therefore recognised without drawing the pictures
    again. The small file does not contain `count` and `seed`, so each pair of `count` and `seed` needs its own `path`.

    Raises:
        UserError: the file cannot be written.
    """
    broken = broken_rows(count)
    duplicates = int(count * DUPLICATE_SHARE)
    summary = SceneSummary(rows=count, broken=broken, duplicates=duplicates)
    drawn_by = f"{file_digest(Path(__file__))} {PIL.__version__} {np.__version__}"
    mark = path.with_name(f"{path.name}.digest")
    if path.is_file() and mark.is_file() and mark.read_text("ascii") == f"{drawn_by} {file_digest(path)}":
        return summary
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(count, broken, duplicates, seed))
    content = buffer.getvalue().encode("ascii")
    try:
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
        with atomic_write(mark) as temporary:
            temporary.write_text(f"{drawn_by} {file_digest(path)}", "ascii")
    except OSError as error:
        raise UserError(
            "the generated scenes cannot be written",
            where=str(path),
            got=str(error.strerror or error),
            fix="free some disk space, or choose a writable folder",
        ) from None
    return summary


def _rows(count: int, broken: int, duplicates: int, seed: int) -> Iterator[list[str]]:
    """Yield good rows and, at regular intervals, a broken row or a copy of an earlier good row."""
    corruptions = list(CORRUPTIONS.values())
    broken_at = (
        {(2 * k + 1) * count // (2 * broken): corruptions[k % len(corruptions)] for k in range(broken)}
        if broken
        else {}
    )
    free = [index for index in range(count) if index not in broken_at]
    copies_at = {free[(2 * k + 1) * len(free) // (2 * duplicates)] for k in range(duplicates)} if duplicates else set()
    last_good: list[str] = []
    for index in range(count):
        if index in copies_at and last_good:
            yield last_good
            continue
        rng = np.random.default_rng((seed, index))
        scene = random_scene(rng)
        picture = _png(draw(scene, rng))
        if index in broken_at:
            yield broken_at[index](str(index), picture, scene.caption)
        else:
            last_good = [str(index), _base64(picture), scene.caption]
            yield last_good


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


CORRUPTIONS: dict[str, Callable[[str, bytes, str], list[str]]] = {
    # This text has 4n + 1 characters. No valid base64 text has 4n + 1 characters, so ingest refuses the row.
    "bad_base64": lambda index, png, caption: [index, _base64(png)[:401], caption],
    "not_an_image": lambda index, png, caption: [index, _base64(caption.encode()), caption],
    "empty_text": lambda index, png, caption: [index, _base64(png), ""],
    "truncated_image": lambda index, png, caption: [index, _base64(png[: len(png) // 2]), caption],
    "too_small": lambda index, png, caption: [index, _base64(_png(Image.new("RGB", (2, 2)))), caption],
    "malformed_record": lambda index, png, caption: [index, _base64(png), caption, "one column too many"],
}
"""Functions that make broken rows. The key of a function is the reason for which its rows are refused."""
