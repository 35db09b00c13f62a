"""Tests of generated scenes: each sentence describes its picture correctly, and the generated file is reproducible."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.driver.ingest.sources.scenes import follow_moved_file
from pipelines.errors import UserError
from pipelines.formats.tables import REASONS
from pipelines.scenes import (
    COLOURS,
    CORRUPTIONS,
    LOCATIONS,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    SceneObject,
    draw,
    random_scene,
    write_scenes,
)

OBJECT = f"a ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
SENTENCE = re.compile(f"{OBJECT} (?:({'|'.join(LOCATIONS)})|({'|'.join(RELATIONS)}) {OBJECT})")


def parse(caption: str) -> Scene:
    """Parse a sentence and return the scene that the sentence describes."""
    match = SENTENCE.fullmatch(caption)
    assert match, f"not a sentence of the grammar: {caption!r}"
    size, colour, shape, location, relation, *second = match.groups()
    first = SceneObject(size, colour, shape)
    return Scene((first, SceneObject(*second)), relation) if relation else Scene((first,), location)


def recognise(image: Image.Image) -> tuple[list[tuple[str, str]], str]:
    """From the pixels, recognise the size and colour of each object and the objects' relation or location."""
    pixels = np.asarray(image).astype(int)
    inked = (np.abs(pixels - pixels[0, 0]) > 60).any(axis=2)
    for axis, relation in ((1, "above"), (0, "left of")):
        spans = runs(inked.any(axis=axis))
        if len(spans) == 2:
            parts = [np.zeros_like(inked), np.zeros_like(inked)]
            for part, (start, stop) in zip(parts, spans, strict=True):
                window = (slice(start, stop), slice(None)) if axis == 1 else (slice(None), slice(start, stop))
                part[window] = inked[window]
            return [measure(pixels, part) for part in parts], relation
    columns, rows = runs(inked.any(axis=0))[0], runs(inked.any(axis=1))[0]
    cell = tuple(-1 if sum(span) / 2 < 23 else 1 if sum(span) / 2 > 41 else 0 for span in (columns, rows))
    return [measure(pixels, inked)], next(phrase for phrase, at in LOCATIONS.items() if at == cell)


def measure(pixels: npt.NDArray[np.int_], part: npt.NDArray[np.bool_]) -> tuple[str, str]:
    height = np.ptp(np.flatnonzero(part.any(axis=1)))
    colour = np.median(pixels[part], axis=0)
    nearest = min(COLOURS, key=lambda name: float(np.abs(colour - COLOURS[name]).sum()))
    return "small" if height < 15.5 else "large", nearest


def runs(marks: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def scenes(count: int) -> list[tuple[Scene, Image.Image]]:
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng)
        made.append((scene, draw(scene, rng)))
    return made


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_generated_scene_can_be_parsed_from_its_caption() -> None:
    for scene, _ in scenes(300):
        assert parse(scene.caption) == scene


def test_the_sizes_and_colours_and_the_relation_of_a_scene_are_recognisable_in_its_picture() -> None:
    for scene, image in scenes(300):
        objects, relation = recognise(image)
        assert (objects, relation) == ([(o.size, o.colour) for o in scene.objects], scene.relation), scene.caption


def test_pictures_of_the_same_scene_differ() -> None:
    scene = parse("a small red circle above a large blue square")
    pictures = {draw(scene, np.random.default_rng(seed)).tobytes() for seed in range(50)}
    assert len(pictures) == 50


def test_generated_scenes_cover_every_location_relation_shape_size_and_colour() -> None:
    made = [scene for scene, _ in scenes(600)]
    assert {scene.relation for scene in made} == {*LOCATIONS, *RELATIONS}
    objects = [one for scene in made for one in scene.objects]
    assert {one.size for one in objects} == set(RADII)
    assert {one.colour for one in objects} == set(COLOURS)
    assert {one.shape for one in objects} == set(SHAPES)


def test_the_generated_file_depends_only_on_the_number_of_pictures_and_the_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_scenes(tmp_path / name, 200, seed)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "three").read_bytes()


def test_an_existing_file_with_the_same_bytes_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "scenes.csv"
    write_scenes(path, 100, 0)
    before = path.stat().st_mtime_ns
    write_scenes(path, 100, 0)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-10])
    write_scenes(path, 100, 0)
    assert len(rows_of(path)) == 101


def test_the_summary_of_generated_scenes_counts_good_rows_and_broken_rows_and_duplicates(tmp_path: Path) -> None:
    summary = write_scenes(tmp_path / "scenes.csv", 1200, 0)
    header, *rows = rows_of(tmp_path / "scenes.csv")
    assert header == ["", "b64string_images", "caption"]
    assert (len(rows), summary.rows, summary.broken, summary.duplicates) == (1200, 1200, 12, 2)
    good = [row for row in rows if is_good(row)]
    assert len(good) == 1200 - 12
    assert len({row[1] for row in good}) == 1200 - 12 - 2
    assert all(parse(row[2]) for row in good)


def is_good(row: list[str]) -> bool:
    try:
        _, picture, caption = row
        image = Image.open(io.BytesIO(base64.b64decode(picture, validate=True)))
        image.load()
    except (ValueError, OSError):
        return False
    return image.size == (SIDE, SIDE) and bool(caption)


def test_every_kind_of_broken_row_has_a_quarantine_reason() -> None:
    assert set(CORRUPTIONS) <= set(REASONS)


def test_a_path_that_is_not_writable_raises_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_scenes(tmp_path / "file" / "scenes.csv", 10, 0)


def test_a_generated_file_counts_as_ingested_even_after_its_home_folder_was_moved() -> None:
    ledger = pa.table(
        {"item": ["file:/old/demo/scenes-9-0.csv", "file:/old/demo/scenes-19-0.csv"], "state": ["s", "t"]}
    )
    moved = follow_moved_file(ledger, "file:/new/place/demo/scenes-9-0.csv")
    assert moved.to_pydict() == {
        "item": ["file:/new/place/demo/scenes-9-0.csv", "file:/old/demo/scenes-19-0.csv"],
        "state": ["s", "t"],
    }
