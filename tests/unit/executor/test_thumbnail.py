"""Tests that rows get thumbnails of their pictures, and null if a row has no picture."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pytest
from crashing_decoder import crashing_picture, hanging_picture
from pictures import as_base64, png
from PIL import Image

from pipelines.executor import thumbnail
from pipelines.executor.thumbnail import SHOWN_CHARS, find_picture, make_thumbnails, with_thumbnails
from pipelines.pages.thumbnail import SIDE


def test_a_thumbnail_is_a_small_jpeg_or_null_if_the_bytes_are_not_a_picture() -> None:
    batch = pa.RecordBatch.from_pydict({"image": [png(1, (900, 450)), b"words", None], "name": ["a", "b", "c"]})
    [out] = with_thumbnails(iter([batch]), "image")
    assert out.schema.names == ["name", "thumbnail"]
    small, *none = out.column("thumbnail").to_pylist()
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE // 2))
    assert none == [None, None]


def test_the_stored_text_of_a_refused_row_is_shortened_and_a_thumbnail_of_its_picture_is_added() -> None:
    payloads = [json.dumps({"text": "a bird", "photo": as_base64(png(1)), "x": 1}), "1,not json", '{"a": 1}']
    batch = pa.RecordBatch.from_pydict({"payload": payloads, "reason": ["x"] * 3})
    [out] = with_thumbnails(iter([batch]), "payload")
    assert out.schema.names == ["reason", "payload", "thumbnail"]
    assert out.column("payload").to_pylist() == [payload[:SHOWN_CHARS] for payload in payloads]
    assert [data is not None for data in out.column("thumbnail").to_pylist()] == [True, False, False]
    assert find_picture(payloads[0]) == png(1)


def test_a_picture_whose_decoding_crashes_gets_no_thumbnail() -> None:
    payload = json.dumps({"photo": as_base64(png(1))})
    reasons = ["decoder_crash", "decode_timeout", "too_small"]
    batch = pa.RecordBatch.from_pydict({"payload": [payload] * 3, "reason": reasons})
    [out] = with_thumbnails(iter([batch]), "payload")
    assert [data is not None for data in out.column("thumbnail").to_pylist()] == [False, False, True]


def test_a_picture_of_an_unknown_format_whose_decoding_crashes_or_hangs_loses_only_its_thumbnail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thumbnail, "MAX_SECONDS", 0.3)
    made = make_thumbnails([png(1), crashing_picture(), hanging_picture(), png(2)])
    assert [data is not None for data in made] == [True, False, False, True]
