"""The vision-language model as it is drawn: encoder, projector, decoder; pictures enter through slots.

Letters: B batch, N slots of a picture, T positions, W width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch
from vlm.cache import KVCache
from vlm.config import ModelConfig
from vlm.decoder import Decoder
from vlm.layers.mask import attention_mask, prefix_marks
from vlm.text.base import IMAGE
from vlm.vision import VisionEncoder


class VisionLanguageModel(nn.Module):
    """Encoder -> projector -> slots in the decoder's sequence."""

    def __init__(
        self, config: ModelConfig, encoder: VisionEncoder, projector: nn.Module, decoder: Decoder, *, prefix_lm: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.projector, self.decoder = encoder, projector, decoder
        self.prefix_lm = prefix_lm
        self.register_buffer("mean", 255 * torch.tensor(config.image.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.image.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Slots (B, N, W) of uint8 pictures at model resolution."""
        pixels_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        return self.projector(self.encoder(pixels_BCHW))

    def embed(self, tokens_BT: Tensor, slots_BNW: Tensor) -> Tensor:
        """Token embeddings with the slots in the places of the image tokens, in order.

        Raises:
            ValueError: a row has another number of image tokens than slots.
        """
        x_BTW = self.decoder.tokens(tokens_BT)
        is_slot_BT = tokens_BT == IMAGE
        count = int(is_slot_BT.sum())
        if count != slots_BNW.shape[0] * slots_BNW.shape[1]:
            raise ValueError(
                f"{count} image tokens in a batch of {slots_BNW.shape[0]} pictures with {slots_BNW.shape[1]} slots each"
            )
        return x_BTW.masked_scatter(is_slot_BT[..., None], slots_BNW.to(x_BTW.dtype))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states (B, T, W) of a right-padded batch."""
        x_BTW = self.embed(batch.tokens_BT, self.encode(batch.pixels_BHWC))
        # Right padding needs no mask of its own under causal attention: nothing real ever looks at it.
        mask = self._prefix_mask(batch.tokens_BT, batch.prefix_lengths_B) if self.prefix_lm else None
        return self.decoder(x_BTW, mask=mask)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (targets, V) at the target positions alone, in row-major order: the head skips slots and prompt."""
        return self.decoder.head(self.hidden(batch)[batch.labels_BT != IGNORE])

    def prefill(self, pixels_BHWC: Tensor, prefix_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the first answer token; fills the cache with the prefix (rows equally long)."""
        x_BTW = self.embed(prefix_BT, self.encode(pixels_BHWC))
        lengths_B = torch.full((len(prefix_BT),), prefix_BT.shape[1], device=prefix_BT.device)
        mask = self._prefix_mask(prefix_BT, lengths_B) if self.prefix_lm else None
        return self.decoder.head(self.decoder(x_BTW, mask=mask, cache=cache)[:, -1])

    def step(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after one more token a row."""
        x_B1W = self.decoder.tokens(tokens_B[:, None])
        return self.decoder.head(self.decoder(x_B1W, mask=None, cache=cache)[:, -1])

    def new_cache(self, batch: int, context: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `context` positions."""
        attention = self.config.decoder.transformer.attention
        return KVCache(
            depth=self.config.decoder.transformer.depth,
            batch=batch,
            num_kv_heads=attention.num_kv_heads,
            context=context,
            head_dim=attention.head_dim,
            dtype=self.mean.dtype,
            device=self.mean.device,
        )

    def _prefix_mask(self, tokens_BT: Tensor, prefix_lengths_B: Tensor) -> Tensor:
        # Padding stands after the answer, so its marks come last and nothing real sees it: all positions are valid.
        marks_BT = prefix_marks(prefix_lengths_B, tokens_BT.shape[1])
        return attention_mask(torch.ones_like(tokens_BT, dtype=torch.bool), marks_BT)
