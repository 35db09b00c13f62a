"""Functions that add the texts of newly ingested rows to the texts that a picture already has in the table `samples`.

Several people may write the same caption for a picture. The number of repeats of a caption changes the scores of an
evaluation, and determines how often training shows the caption (unless `data.text_weights` is `uniform`). However, an
ingest that runs twice must not add its texts twice. After the merge, the number of repeats of a text is therefore the
larger of two numbers: its repeats in `samples` and its repeats in the ingest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipelines.formats.tables import TEXT_TYPE

Text = tuple[str, str]
"""Pair of a prompt and a text."""
MERGED = pa.schema(
    [
        pa.field("new_texts", pa.list_(TEXT_TYPE)),
        pa.field("contributing", pa.int32()),
        pa.field("full", pa.list_(TEXT_TYPE)),
    ]
)
"""Columns that store one `MergedTexts` per row."""


class MergedTexts(NamedTuple):
    """Result of merging the texts of a picture's rows with the texts that the picture already has.

    A text may occur several times in `new_texts`.

    Attributes:
        new_texts: texts to append, in the order of the rows.
        contributing: number of distinct rows that add at least one text which the picture did not have.
        full: None, or all distinct texts of the picture after the merge if a row has exceeded `max_texts`.
    """

    new_texts: list[Text]
    contributing: int
    full: list[Text] | None


def merge_texts(known: Sequence[Text], rows: Sequence[Sequence[Text]], max_texts: int | None) -> MergedTexts:
    """Merge the texts of rows with the known texts of a picture.

    Args:
        known: texts that the picture already has in `samples`, with repeats.
        rows: texts of each row, in the order of the rows.
        max_texts: largest number of distinct texts of a picture, or None for any number. Rows are sorted by their
            texts, and accepted up to the first row that exceeds the limit. A later row is accepted only if all its
            texts are known or have already been accepted. The accepted texts therefore do not depend on the order of
            `rows`.
    """
    seen, contributing, exceeded = set(known), 0, False
    for texts in sorted({tuple(dict.fromkeys(row)) for row in rows}):
        added = [text for text in texts if text not in seen]
        exceeded = exceeded or bool(added and max_texts is not None and len(seen) + len(added) > max_texts)
        if added and not exceeded:
            seen.update(added)
            contributing += 1
    counts, still_known = Counter[Text](), Counter(known)
    new_texts = []
    for row in rows:
        if exceeded and not seen.issuperset(row):
            continue
        for text in row:
            counts[text] += 1
            if counts[text] > still_known[text]:
                new_texts.append(text)
    return MergedTexts(new_texts, contributing, sorted(seen) if exceeded else None)


def merge_texts_of_pictures(batches: Iterator[pa.RecordBatch], max_texts: int | None) -> Iterator[pa.RecordBatch]:
    """Replace the last column of the batches, `row_texts`, by the columns of MERGED.

    The column before the last column is `known_texts`, which contains the texts that the picture already has in
    `samples`.
    """
    for batch in batches:
        *others, row_texts = batch.columns
        merged = [
            merge_texts(_to_texts(known), [_to_texts(row) for row in rows], max_texts)
            for known, rows in zip(others[-1].to_pylist(), row_texts.to_pylist(), strict=True)
        ]
        columns = [
            pa.array([_to_structs(each.new_texts) for each in merged], MERGED.field("new_texts").type),
            pa.array([each.contributing for each in merged], MERGED.field("contributing").type),
            pa.array(
                [None if each.full is None else _to_structs(each.full) for each in merged], MERGED.field("full").type
            ),
        ]
        yield pa.RecordBatch.from_arrays([*others, *columns], names=[*batch.schema.names[:-1], *MERGED.names])


def _to_texts(structs: Sequence[dict[str, str]]) -> list[Text]:
    return [(struct["prompt"], struct["text"]) for struct in structs]


def _to_structs(texts: Sequence[Text]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "text": text} for prompt, text in texts]
