"""Drawings of a model's attention to the picture of a shard row, for the gallery of an evaluation."""

from __future__ import annotations

import io
import logging

from PIL import Image

from pipelines.formats.shards import Row
from pipelines.pages.attention import attention_panels
from vlm.captioner import Captioner
from vlm.config import GenerationConfig

logger = logging.getLogger(__name__)

SIDE = 96
"""Side of the drawing for one word, in pixels."""
MAX_WORDS = 12


def draw_row_attention(
    captioner: Captioner, row: Row, prompt: str, caption: str, settings: GenerationConfig
) -> list[tuple[str, bytes]]:
    """Draw where in the picture the model looked when it generated the first words of a caption.

    The model generates the caption again.

    Args:
        captioner: captioner that generated the caption.
        row: row of the shards.
        prompt: prompt of the caption.
        caption: caption that the model generated.
        settings: generation settings of the caption.

    Returns:
        A title and a JPEG file for each of the first MAX_WORDS words. The list is empty if the caption has no word, or
        if the model generates a different caption this time, because rounding errors can differ between batches.
    """
    if not caption.split():
        return []
    picture = Image.fromarray(row.pixels)
    maps = captioner.attention(picture, prompt, **settings.model_dump())
    if maps.text != caption:
        logger.info("no attention is drawn for %s, because the model generates a different caption", row.image_id)
        return []
    _, *words = attention_panels(picture, captioner.model.config.image, maps, side=SIDE)
    return [(word.title, _encode_jpeg(word.picture)) for word in words[:MAX_WORDS]]


def _encode_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
