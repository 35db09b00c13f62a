"""Functions that derive the split of a row from the hash of its picture, from its file name, or from a split column."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pipelines.config import PICTURE, ColumnSplitConfig, HashSplitConfig, Split, SplitConfig
from pipelines.executor.ingest.outcome import Refused
from pipelines.executor.ingest.records.record import Fields
from pipelines.executor.ingest.values import is_missing, to_text, trim

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Name of the split (train, val or test) for each word that stands for a split in columns and file names of a source.

The library `datasets` of Hugging Face uses the same words for splits.
"""
PART_NUMBER = re.compile(r"-\d+(-of-\d+)?$")


def assign_split(file: str, fields: Fields, sha256: str, config: SplitConfig) -> Split:
    """Return the split of a row.

    Args:
        file: name of the row's file.
        fields: values of the row by column name.
        sha256: SHA-256 of the picture file, hexadecimal.
        config: config of the rule that assigns a row to a split.

    Raises:
        Refused: with the reason missing_field (the split is missing) or malformed_record (the split is unknown).
    """
    if isinstance(config, HashSplitConfig):
        return split_of_hash(sha256, config)
    given = _read_split(fields, config.column) if isinstance(config, ColumnSplitConfig) else ""
    split = SPLITS.get(given) if given else split_of_file(file)
    if split is None:
        raise Refused("decode", "malformed_record", f"the split {given or file!r} is none of {', '.join(SPLITS)}")
    return split


def _read_split(fields: Fields, column: str) -> str:
    return trim(to_text(require_field(fields, column), f"column {column}")).lower()


def split_of_hash(sha256: str, config: HashSplitConfig) -> Split:
    """Return the split of a picture.

    The split depends only on the picture's content, so equal pictures are in the same split.
    """
    fraction = int(sha256[:13], 16) / 16**13
    if fraction < config.test:
        return "test"
    return "val" if fraction < config.test + config.val else "train"


def split_of_file(file: str) -> Split | None:
    """Return the split in the name of a file or of one of its folders, or None if no name contains a split.

    The file name is examined first, then the names of its folders, nearest folder first. A name contains a split if one
    of its words stands for the split, as in `val-00000-of-00005.csv`, `train_0.parquet` or `cats.test.tar`. A name with
    words for two splits is ignored. The only exception is a file name such as `train.test.csv`, in which the word
    before the first dot decides.

    Args:
        file: name of the file, or its path relative to the source.
    """
    path = PurePosixPath(file)
    begins_with = SPLITS.get(PART_NUMBER.sub("", path.name.partition(".")[0]))
    return begins_with or next(filter(None, map(_split_of_words, [path.name, *reversed(path.parts[:-1])])), None)


def _split_of_words(name: str) -> Split | None:
    words = re.split(r"[^a-z]+", name.casefold())
    splits = {SPLITS[word] for word in words if word in SPLITS}
    return splits.pop() if len(splits) == 1 else None


def require_field(fields: Fields, column: str) -> object:
    """Return the value of a field of a row.

    Raises:
        Refused: with the reason missing_field (the row has no such field, or the value of the field is missing).
    """
    value = fields.get(column)
    if is_missing(value):
        detail = "the row has no picture" if column == PICTURE else f"column {column} is empty"
        raise Refused("decode", "missing_field", detail)
    return value
