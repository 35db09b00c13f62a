"""Verdicts of people on captions, in the table `verdicts`. A later verdict on a caption replaces the earlier verdict.

The tables are in local folders (`delta_store.py`) or in a workspace (`warehouse_store.py`).
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import Field, model_validator

from pipelines.errors import UserError
from pipelines.formats.tables import MODEL_DIGEST, PICTURE_COLUMNS
from vlm.config import Config

KEY = ("image_id", "model_version", "settings_hash", MODEL_DIGEST.name, "sha256")
"""Columns that identify a caption of one source table and one model.

The columns include the SHA-256 of the picture, because a table may have several columns of pictures, and a later
picture may have the id of an earlier picture.
"""
CAPTION_COLUMNS = ("caption", "error", "prompt", "mean_logprob", *KEY, *(column.name for column in PICTURE_COLUMNS))
REFRESH_SECONDS = 300
"""If the captions were read at least this many seconds ago, the next request for the page reads the captions again. A
server may run for days, while other processes write captions and verdicts.
"""
Show = Literal["open", "judged", "all"]
Key = tuple[str, str, str, str, str]
Position = tuple[float | None, str, str, str, str, str]
"""Place of a caption in the order of the review: the mean log-probability, then the key."""
Texts = dict[str, list[dict[str, str]]]
"""Human texts of pictures: a dict from image_id to the texts, each a dict with the keys `prompt` and `text`."""


class CaptionVerdict(Config):
    """Verdict of a reviewer on one caption.

    Attributes:
        model_digest: digest of the model, or empty if Lakesight 0.1.0 wrote the caption.
        sha256: SHA-256 of the captioned picture.
        text: corrected caption, or empty if `verdict` is not `corrected`.
    """

    image_id: Annotated[str, Field(min_length=1)]
    model_version: Annotated[str, Field(min_length=1)]
    settings_hash: Annotated[str, Field(min_length=1)]
    model_digest: str = ""
    sha256: Annotated[str, Field(min_length=1)]
    verdict: Literal["good", "bad", "corrected"]
    text: Annotated[str, Field(max_length=10_000)] = ""

    @model_validator(mode="after")
    def _text_only_if_corrected(self) -> Self:
        if (self.verdict == "corrected") != bool(self.text.strip()):
            raise ValueError("give a text with verdict corrected, and no text with verdict good or bad")
        return self

    @property
    def key(self) -> Key:
        """Values that identify the caption among all captions of its table and model."""
        return self.image_id, self.model_version, self.settings_hash, self.model_digest, self.sha256


class CaptionPage(NamedTuple):
    """Some of the captions that a filter selects.

    Attributes:
        rows: the captions, in the order of the review.
        start: number of selected captions that come before `rows`.
        found: number of all selected captions.
    """

    rows: list[dict[str, Any]]
    start: int
    found: int


class CaptionStore(Protocol):
    """Store of the captions of one model for the pictures of one table. The store also has the pictures and
    verdicts."""

    def read_captions(self) -> list[dict[str, Any]]:
        """Read CAPTION_COLUMNS, `verdict` and `correction` for each caption by the model version of the store.

        `verdict` is None if there is no verdict. `correction` is the text of a corrected caption, or None. Captions of
        replaced pictures are left out. If a picture has several captions with different decoding settings, the store
        reads the newest caption that was not judged as bad, and all captions with a verdict.

        Raises:
            UserError: the tables cannot be read.
        """
        ...

    def read_picture(self, caption: Mapping[str, Any]) -> bytes | None:
        """Read the picture file of a caption, or return None if the table does not contain this picture any more.

        `caption` is a row of `read_captions`.

        Raises:
            UserError: the table cannot be read.
        """
        ...

    def read_texts(self, captions: Sequence[Mapping[str, Any]]) -> Texts:
        """Read the texts that people wrote about the captioned pictures. Only table `samples` contains human texts.

        Raises:
            UserError: the table cannot be read.
        """
        ...

    def write_verdict(self, row: Mapping[str, Any], caption: Mapping[str, Any]) -> bool:
        """Write a row of table `verdicts`. The row replaces an earlier verdict on the same caption.

        The row has all columns except `image`, which the store adds. Return whether the table still contains the
        captioned picture; without the picture, nothing is written. `caption` is a row of `read_captions`.

        Raises:
            UserError: the table cannot be written.
        """
        ...


class Review:
    """Captions of one model for the pictures of one table, with the verdicts of reviewers.

    The captions are sorted by ascending likelihood, because unlikely captions need a review most. Captions of the same
    likelihood are sorted by their keys, so the order is the same after each reading of the tables.

    Attributes:
        captions: rows of `generated_captions` that have a caption.
        judged: dict from the key of a caption to its verdict. Captions without a verdict are not in the dict.
    """

    def __init__(self, store: CaptionStore, *, table: str, model: str) -> None:
        self._store, self._table, self._model = store, table, model
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read all captions and verdicts.

        Raises:
            UserError: the tables cannot be read.
        """
        with self._lock:
            rows = self._store.read_captions()
            self.captions = sorted(rows, key=_order)
            self._by_key = {key_of(row): row for row in rows}
            self._by_picture = {(row["image_id"], row["sha256"]): row for row in rows}
            self.judged = {key_of(row): row["verdict"] for row in rows if row["verdict"]}
            self._read_at = time.monotonic()

    def refresh_if_old(self) -> None:
        """Read all captions and verdicts, if the last read was at least REFRESH_SECONDS ago."""
        if time.monotonic() - self._read_at >= REFRESH_SECONDS:
            self.refresh()

    def find(self, show: Show, words: str) -> list[dict[str, Any]]:
        """Return the captions that contain the text `words` in upper or lower case, and that `show` selects.

        `show` is `open` for captions without a verdict, `judged` for captions with a verdict, or `all`.
        """
        judged = {"open": (False,), "judged": (True,), "all": (False, True)}[show]
        text = words.lower()
        return [
            row for row in self.captions if (key_of(row) in self.judged) in judged and text in row["caption"].lower()
        ]

    def select_page(
        self, show: Show, words: str, size: int, *, after: Position | None = None, before: Position | None = None
    ) -> CaptionPage:
        """Return at most `size` of the captions that `find` returns, as one page.

        The page begins after position `after`, or ends before position `before`, or begins with the first caption. A
        position stays valid if captions receive verdicts or are removed in the meantime. A page number would not stay
        valid, because verdicts shorten the list of captions without a verdict.
        """
        found = self.find(show, words)
        order = [_order(row) for row in found]
        start = 0 if after is None else bisect_right(order, _order_of(after))
        end = start + size
        if before is not None:
            end = bisect_left(order, _order_of(before))
            start = max(0, end - size)
        return CaptionPage(rows=found[start:end], start=start, found=len(found))

    def picture(self, image_id: str, sha256: str) -> bytes | None:
        """Return the bytes of a caption's picture file, or None if no caption has this picture or the table does not
        contain the picture any more.
        """
        caption = self._by_picture.get((image_id, sha256))
        return None if caption is None else self._store.read_picture(caption)

    def texts(self, captions: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return for each caption the human texts that answer the same prompt as the caption."""
        found = self._store.read_texts(captions)
        return [
            [pair["text"] for pair in found.get(row["image_id"], ()) if pair["prompt"] == row["prompt"]]
            for row in captions
        ]

    def save_verdict(self, verdict: CaptionVerdict, reviewer: str) -> None:
        """Write a verdict to the table. The new verdict replaces an earlier verdict on the same caption.

        Raises:
            UserError: the caption or its picture does not exist, or the table cannot be written.
        """
        caption = self._by_key.get(verdict.key)
        written = False
        if caption is not None:
            text = {"good": caption["caption"], "bad": None, "corrected": verdict.text.strip()}[verdict.verdict]
            row = verdict.model_dump() | {
                "source_table": self._table,
                "model_name": self._model,
                "model_digest": verdict.model_digest or None,
                "caption": caption["caption"],
                "prompt": caption["prompt"],
                "text": text,
                "reviewer": reviewer,
                "judged_at": datetime.now(UTC),
            }
            with self._lock:
                written = self._store.write_verdict(row, caption)
                if written:
                    self.judged[verdict.key] = verdict.verdict
                    caption["correction"] = verdict.text.strip() or None
        if not written:
            raise UserError(
                "the captioned picture does not exist any more",
                where=self._table,
                got=verdict.image_id,
                fix="caption the table again, and reload the page",
            )


def position_of(row: Mapping[str, Any]) -> Position:
    """Return the place of a caption in the order of the review."""
    value = row["mean_logprob"]
    return (None if value is None else float(value), *key_of(row))


def _order(row: Mapping[str, Any]) -> tuple[float, Key]:
    return _order_of(position_of(row))


def _order_of(position: Position) -> tuple[float, Key]:
    """Return a value that sorts positions. A caption without a likelihood comes last."""
    return math.inf if position[0] is None else position[0], position[1:]


def key_of(row: Mapping[str, Any]) -> Key:
    """Return the key of a caption. The digest is empty if Lakesight 0.1.0 wrote the caption."""
    return row["image_id"], row["model_version"], row["settings_hash"], row[MODEL_DIGEST.name] or "", row["sha256"]
