"""Tests of ingest and sharding in child processes: a picture that crashes or hangs its decoder costs only one row."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from crashing_decoder import crashing_picture, hanging_picture
from pictures import IMAGE, TEXT, encoded, picture, png

from pipelines.config import ColumnNames, HashSplitConfig, LimitsConfig
from pipelines.errors import StageFailed
from pipelines.executor.ingest.decode import DecodeRules, decode_guarded
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.shard import assign_files_and_decode, assign_files_and_decode_guarded
from pipelines.formats.shards import ShardRequest
from vlm.config import ImageConfig

SECONDS = 0.4
REQUEST = ShardRequest(
    table="samples",
    table_id="t",
    table_version=1,
    source="s",
    split="train",
    image=ImageConfig(size=8),
    encoding="raw",
    rows=8,
    seed=0,
)


def test_guarded_ingest_refuses_only_the_rows_whose_decoding_crashes_or_hangs() -> None:
    pictures = [png(1), crashing_picture(), png(2), hanging_picture(), b"no picture", png(3)]
    records = [Record("a.csv", {IMAGE: data, TEXT: "a bird"}) for data in pictures]
    rules = DecodeRules("birds", ColumnNames(), LimitsConfig(max_decode_seconds=SECONDS), HashSplitConfig())
    [batch] = decode_guarded(iter([]), lambda _: iter(records), rules)
    assert batch.column("reason").to_pylist() == [
        None,
        "decoder_crash",
        None,
        "decode_timeout",
        "not_an_image",
        None,
    ]
    assert batch.column("detail")[1].as_py() == "the process that decoded the picture was ended by SIGSEGV"
    assert batch.column("detail")[3].as_py() == "more than 0.4 seconds"


def batches(*pictures: bytes) -> list[pa.RecordBatch]:
    rows = [
        {"image_id": f"s/{n}", "image": data, "texts": [{"prompt": "", "text": "a"}]} for n, data in enumerate(pictures)
    ]
    return [pa.RecordBatch.from_pylist(rows)]


def test_sharding_with_protection_against_crashes_yields_the_same_rows_as_sharding_without_protection() -> None:
    rows = batches(png(1), png(2), png(3))
    [whole] = assign_files_and_decode(iter(rows), REQUEST, [""], SECONDS)
    guarded = assign_files_and_decode_guarded(iter(rows), REQUEST, [""], SECONDS)
    assert pa.Table.from_batches(list(guarded)).to_pylist() == whole.to_pylist()


@pytest.mark.parametrize(
    ("deadly", "message"), [(crashing_picture, "Where: s/1.*SIGSEGV"), (hanging_picture, "Where: s/1.*took too long")]
)
def test_the_error_of_the_shard_stage_names_the_picture_whose_decoding_crashes_or_hangs(
    deadly: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(StageFailed, match=message):
        list(assign_files_and_decode_guarded(iter(batches(png(1), deadly(), png(2))), REQUEST, [""], SECONDS))


def test_the_error_of_the_shard_stage_names_a_picture_whose_decoding_takes_too_long() -> None:
    slow = batches(encoded(picture(1, (1500, 1500))))
    with pytest.raises(
        StageFailed, match=r"Where: s/0\. Got: decoding takes more than 0\.002 seconds\. Fix: raise data\.limits"
    ):
        list(assign_files_and_decode(iter(slow), REQUEST, [""], 0.002))
