"""Generated scenes as a source: Lakesight writes the input itself, for a first run and for tests."""

from __future__ import annotations

import re

import pyarrow as pa

from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.platform import Platform
from pipelines.scenes import write_scenes

SCHEME = "scenes:"


def generate_scenes(config: DataConfig, platform: Platform) -> DataConfig:
    """Generate the CSV file of a path like `scenes:COUNT:SEED`, and return the config with the path of this file.

    A config whose path does not begin with `scenes:` is returned unchanged.

    Raises:
        UserError: the path is malformed, the kind of the source is not `csv`, or the file cannot be written.
    """
    requested = config.source.path
    if not requested.startswith(SCHEME):
        return config
    match = re.fullmatch(SCHEME + r"([1-9]\d{0,7})(?::(\d{1,9}))?", requested)
    if match is None or config.source.kind != "csv":
        raise UserError(
            "the path for generated scenes is malformed",
            where="data.source.path",
            got=f"path {requested}, kind {config.source.kind}",
            fix="set data.source.path to scenes:COUNT or scenes:COUNT:SEED, and data.source.kind to csv",
        )
    count, seed = int(match[1]), int(match[2] or 0)
    path = platform.folder("demo") / f"scenes-{count}-{seed}.csv"
    write_scenes(path, count, seed)
    return config.model_copy(update={"source": config.source.model_copy(update={"path": str(path)})})


def follow_moved_file(ingested: pa.Table, item: str) -> pa.Table:
    """Return the ingested items with the present path of the generated file, because the home folder may have been
    moved.

    Args:
        ingested: items that need not be read again.
        item: name of the generated file in the ledger, with the present path of the home folder.
    """
    folder, name = item.split("/")[-2:]
    items = [item if each.endswith(f"/{folder}/{name}") else each for each in ingested["item"].to_pylist()]
    return ingested.set_column(ingested.schema.get_field_index("item"), "item", pa.array(items, pa.string()))
