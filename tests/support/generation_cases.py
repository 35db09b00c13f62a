"""A case for each generation setting, and pictures whose captions change with each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from tiny_models import tiny_model
from tiny_runs import write_shards

from vlm.captioner import Captioner

PICTURES = 4
Settings = dict[str, Any]
CASES: dict[str, tuple[Settings, Any]] = {
    "max_new_tokens": ({}, 3),
    "temperature": ({}, 1.5),
    "top_k": ({"temperature": 2.0}, 2),
    "top_p": ({"temperature": 2.0}, 0.3),
    "min_p": ({"temperature": 1.0}, 0.98),
    "repetition_penalty": ({}, 5.0),
    "num_beams": ({}, 4),
    "length_penalty": ({"num_beams": 4}, -4.0),
    "stop": ({}, ["a", "e"]),
    "seed": ({"temperature": 2.0}, 9),
}
"""Dict from each generation setting to other settings that must also be set, and to a value that changes the
captions.
"""


class CaptionedPictures:
    """A model, and pictures as picture files, as rows of shards, and as Pillow images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captioner = Captioner(*tiny_model("plain"))
        self.captioner.save(folder / "checkpoint")
        self.shards = write_shards(folder / "shards", rows=PICTURES)
        self.pictures = [Image.fromarray(self.shards.row(index).pixels) for index in range(PICTURES)]
        self.files = [folder / f"{index}.png" for index in range(PICTURES)]
        for picture, file in zip(self.pictures, self.files, strict=True):
            picture.save(file)

    def expected(self, settings: Settings) -> list[str | None]:
        """Return the captions of all pictures with changed generation settings."""
        return [result.caption for result in self.captioner.caption(self.pictures, **settings)]
