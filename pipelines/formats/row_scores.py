"""Scores of a model on one row of a split. Executors and ranks compute the scores, and evaluation stores the scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True)
class RowScore:
    """Scores of a picture with one of its prompts. Each loss is a sum over the tokens of `num_texts` texts, in nats.

    Scores with the same `row` belong to the same picture. `num_texts` is 0 in scores that earlier versions of Lakesight
    wrote, because these versions added the losses of all references.

    Attributes:
        row: index of the picture in the shards.
        image_id: id of the picture, as in the table `samples`.
        prompt: prompt, or an empty string for a plain caption.
        references: all reference texts of the prompt (at least one), including repeated texts.
        caption: caption that the model generated, or None if the prompt leaves no room for a caption.
        loss: loss when the model is given the right picture.
        blind_loss: loss when the model is given the picture of another row, or None if the split has only one picture.
        blank_loss: loss when the model is given a grey picture.
        noise_loss: loss when the model is given a picture of random noise.
        num_targets: number of tokens in the texts, including end tokens.
        num_correct: number of target tokens that the model ranks first, given the picture and the preceding tokens.
        num_tokens: number of tokens in the caption, including the end token.
        seconds: captioning time of the row's batch divided by the batch size, in seconds.
        mean_logprob: mean log-probability of the caption's tokens, in nats, or None if there is no caption.
        brightness: mean pixel level (0 to 255) of the picture at the model's resolution.
        contrast: standard deviation of the picture's pixel levels.
        num_texts: number of the picture's texts among which training draws one text for each step. These are all
            references, or the distinct references if `data.text_weights` is `uniform`.
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
    num_texts: int = field(default=0, kw_only=True)


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
        pa.field("num_texts", pa.int64(), nullable=False),
    ]
)
"""Arrow schema with one column for each field of `RowScore`."""
