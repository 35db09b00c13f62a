"""Functions that write texts to shard files in shuffled order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from pipelines.executor.shard import WRITTEN, split_by_file
from pipelines.formats.shards import ShardRequest, shard_schema, write_shard_file
from pipelines.formats.tables import TEXT_TYPE


def write_text_files(batches: Iterator[pa.RecordBatch], request: ShardRequest, folder: str) -> Iterator[pa.RecordBatch]:
    """Write shard files of texts, and yield one row of the schema `executor.shard.WRITTEN` per file.

    All rows of a shard file must be in the batches of the same call.

    Args:
        batches: batches with the columns file, text_id and text, in the order of the shards.
        request: description of the content of the shards.
        folder: shard folder, an existing folder that has the same path on every executor.
    """
    for number, pieces in groupby(split_by_file(batches), key=lambda piece: piece[0]):
        written = write_shard_file(Path(folder), number, request, (_to_rows(piece, request) for _, piece in pieces))
        yield pa.RecordBatch.from_pylist([written.model_dump()], WRITTEN)


def _to_rows(piece: pa.RecordBatch, request: ShardRequest) -> pa.RecordBatch:
    texts = [[{"prompt": "", "text": text}] for text in piece.column("text").to_pylist()]
    columns = [piece.column("text_id").cast(pa.string()), pa.array(texts, pa.list_(TEXT_TYPE))]
    return pa.RecordBatch.from_arrays(columns, schema=shard_schema(request))
