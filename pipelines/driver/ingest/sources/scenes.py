"""Generated scenes: input from nothing but this package, for a first look and for tests."""

from __future__ import annotations

import re

from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.platform import Platform
from pipelines.scenes import write_scenes

SCHEME = "scenes:"


def with_scenes_drawn(config: DataConfig, platform: Platform) -> DataConfig:
    """The same data, with a CSV in the place of a path that asks for scenes; written unless it is there.

    Raises:
        UserError: the path does not say how many scenes, or the file cannot be written.
    """
    asked = config.source.path
    if not asked.startswith(SCHEME):
        return config
    match = re.fullmatch(SCHEME + r"([1-9]\d{0,7})(?::(\d{1,9}))?", asked)
    if match is None or config.source.kind != "csv":
        raise UserError(
            "the scenes to draw cannot be understood",
            where="data.source.path",
            got=f"{asked} of kind {config.source.kind}",
            fix="say scenes:COUNT or scenes:COUNT:SEED, of kind csv",
        )
    count, seed = int(match[1]), int(match[2] or 0)
    path = platform.folder("demo") / f"scenes-{count}-{seed}.csv"
    write_scenes(path, count, seed)
    return config.model_copy(update={"source": config.source.model_copy(update={"path": str(path)})})
