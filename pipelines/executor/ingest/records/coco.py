"""Parser of COCO captions: one JSON document with a list of images and a list of their annotations."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from pipelines.config import ColumnNames
from pipelines.executor.ingest.records.record import Fields, Problem, Record, parse_integer, replace_lone_surrogates
from pipelines.executor.ingest.text_stream import open_text
from pipelines.executor.ingest.values import is_missing

KEPT_KEYS = frozenset({"images", "annotations", "id", "file_name", "height", "width", "image_id", "caption"})
"""Keys in a COCO document. The parser keeps only the values of these keys, because most of a document may consist of
other values, such as outlines of objects."""
WHOLE_NUMBER = re.compile(r"(-?[0-9]+)\.0*")


def coco_columns(columns: ColumnNames) -> list[str]:
    """Return the names of the fields that each record of `coco_records` has."""
    return ["id", columns.image, "height", "width", columns.text]


def coco_records(path: str, file: str, columns: ColumnNames) -> Iterator[Record]:
    """Yield one record per image, with a list of its captions.

    If the document has captions with an image id, but no image with this id, these captions become one record.

    Args:
        path: path of the document.
        file: name of the document.
        columns: names of the columns for the file name of the image and for its captions.

    Raises:
        ValueError: the document is not COCO captions JSON.
    """
    with closing(open_text(path)) as stream:
        text = replace_lone_surrogates(stream.read().decode("utf-8", errors="replace"))
    document = json.loads(text, object_pairs_hook=_kept, parse_int=parse_integer)
    images, annotations = (document.get(k) if isinstance(document, dict) else None for k in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError("a file without the lists images and annotations")
    yield from _malformed(file, columns, "image", images)
    yield from _malformed(file, columns, "annotation", annotations)
    captions: dict[str | None, list[Any]] = defaultdict(list)
    for annotation in filter(_is_object, annotations):
        said = captions[_to_id(annotation.get("image_id"))]
        caption = annotation.get("caption")
        said += [text for text in (caption if isinstance(caption, list) else [caption]) if not is_missing(text)]
    names: dict[str | None, set[str]] = defaultdict(set)
    listed = list(filter(_is_object, images))
    for fields in listed:
        names[_to_id(fields.get("id"))].add(_to_string(fields.get("file_name")))
    for fields in listed:
        image_id = _to_id(fields.get("id"))
        record = _record(file, columns, image_id, fields, captions.get(image_id) if image_id is not None else None)
        if image_id is not None and len(names[image_id]) > 1:
            record = record._replace(problem=Problem("malformed_record", f"several images have id {image_id}"))
        yield record
    for image_id in captions.keys() - (names.keys() - {None}):
        yield _record(file, columns, image_id, {}, captions[image_id])


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _malformed(file: str, columns: ColumnNames, kind: str, values: list[Any]) -> Iterator[Record]:
    """Yield one refused record for each image or annotation that is not a JSON object."""
    for value in values:
        if not _is_object(value):
            problem = Problem("malformed_record", f"an {kind} that is not a JSON object")
            yield Record(file, dict.fromkeys(coco_columns(columns)), f"{kind}: {_to_string(value)}", problem)


def _record(file: str, columns: ColumnNames, image_id: str | None, image: Fields, captions: list[Any] | None) -> Record:
    name = image.get("file_name")
    size = (_to_int(image.get("height")), _to_int(image.get("width")))
    texts = None if captions is None else sorted(captions, key=_to_string)
    values = (image_id, None if is_missing(name) else _to_string(name), *size, texts)
    return Record(file, dict(zip(coco_columns(columns), values, strict=True)))


def _kept(pairs: list[tuple[str, Any]]) -> Fields:
    return {key: value for key, value in pairs if key in KEPT_KEYS}


def _to_id(value: object) -> str | None:
    """Return an id as text, or None if the id is null or NaN.

    The ids 1, 1.0 and "1" become the same text, because tools write the same id in different ways.
    """
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else _to_string(value)
    whole = WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def _to_string(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _to_int(value: object) -> int | None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    return int(value) if whole else None  # type: ignore[call-overload]
