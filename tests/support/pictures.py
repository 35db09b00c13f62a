"""Functions that generate pictures and write CSV files with pictures as base64."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE, TEXT = "b64string_images", "caption"


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return a picture of noise over a random colour. Pictures with different seeds are not near-duplicates."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((noise + rng.integers(0, 200, 3)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as a file of the given format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """Encode `picture(seed)` as PNG."""
    return encoded(picture(seed, size))


def as_base64(data: bytes) -> str:
    """Encode bytes as standard base64."""
    return base64.b64encode(data).decode()


def write_csv(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = (IMAGE, TEXT)) -> Path:
    """Write the rows as a CSV file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path
