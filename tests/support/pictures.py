"""Pictures and base64 CSV files for tests, made on the spot."""

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
    """A picture of noise over a colour of its own: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((noise + rng.integers(0, 200, 3)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """The bytes of `picture(seed)` as PNG."""
    return encoded(picture(seed, size))


def as_base64(data: bytes) -> str:
    """Standard base64, as CSV files hold it."""
    return base64.b64encode(data).decode()


def write_csv(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = (IMAGE, TEXT)) -> Path:
    """A CSV file of those rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path
