"""Scores of one row of a split by one model: what ranks or executors compute and what evaluation stores."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class RowScore:
    """Scores of one row: a picture and a prompt. Losses are sums over the tokens of all references, in nats.

    Attributes:
        row: index of the picture in the shards; rows with the same index have the same picture.
        image_id: id of the picture.
        prompt: empty for a plain caption.
        references: human captions, at least one.
        caption: the model's caption; None if the prompt leaves no room for one.
        loss: loss given the picture.
        blind_loss: loss given another picture; None if the split has only one picture.
        blank_loss: loss given a grey picture.
        noise_loss: loss given a picture of noise.
        num_targets: tokens of the references, including end tokens.
        num_correct: target tokens that the model ranks first, given the picture and the preceding tokens.
        num_tokens: tokens of the caption, including the end token.
        seconds: captioning time of the row's batch divided by the batch size.
        mean_logprob: mean log-probability of the caption's tokens, in nats; None without a caption.
        brightness: mean level of the picture at model resolution, 0 to 255.
        contrast: standard deviation of the picture's levels.
    """

    row: int
    image_id: str
    prompt: str
    references: tuple[str, ...]
    caption: str | None
    loss: float
    blind_loss: float | None
    blank_loss: float
    noise_loss: float
    num_targets: int
    num_correct: int
    num_tokens: int
    seconds: float
    mean_logprob: float | None
    brightness: float
    contrast: float


SCORE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("blind_loss", pa.float64()),
        pa.field("blank_loss", pa.float64(), nullable=False),
        pa.field("noise_loss", pa.float64(), nullable=False),
        pa.field("num_targets", pa.int64(), nullable=False),
        pa.field("num_correct", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("mean_logprob", pa.float64()),
        pa.field("brightness", pa.float64(), nullable=False),
        pa.field("contrast", pa.float64(), nullable=False),
    ]
)
"""Columns of a `RowScore`."""
