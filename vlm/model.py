"""The vision-language model, which consists of an encoder, a projector, a fusion and a decoder.

Letters in tensor names: batch (B), pictures (P), features of a picture (N), positions (T), width (W), vocabulary (V).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.decoder import Decoder
from vlm.fusion import CrossFusion, Media, SlotsFusion
from vlm.layers.cache import KVCache
from vlm.layers.mask import attention_mask, prefix_marks
from vlm.text.base import SLOT
from vlm.vision import NoEncoder, VisionEncoder


class VisionLanguageModel(nn.Module):
    """Vision-language model with an encoder, a projector, a fusion of features and token embeddings, and a decoder.

    Args:
        config: model config from which the modules below were built.
        encoder: module that turns pixels into features, or NoEncoder for a text-only model.
        projector: module that maps features to the width of the decoder.
        fusion: module that inserts features into the sequence or prepares the features for cross-attention.
        decoder: language model.
        prefix_lm: whether to let the positions of pictures and prompt attend to each other in both directions.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: VisionEncoder | NoEncoder,
        projector: nn.Module,
        fusion: SlotsFusion | CrossFusion,
        decoder: Decoder,
        *,
        prefix_lm: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.projector, self.fusion, self.decoder = encoder, projector, fusion, decoder
        self.prefix_lm = prefix_lm
        self.register_buffer(
            "mean", 255 * torch.tensor(config.image.mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(config.image.std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False
        )
        self.mean: Tensor
        self.std: Tensor

    def encode(self, pixels_PHWC: Tensor) -> Tensor:
        """Compute the features (P, N, W) of uint8 pictures at model resolution.

        Raises:
            UserError: the model has no encoder.
        """
        pixels_PCHW = (pixels_PHWC.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        return self.projector(self.encoder(pixels_PCHW))

    def embed(self, tokens_BT: Tensor, features_PNW: Tensor) -> tuple[Tensor, Media | None]:
        """Return embeddings (B, T, W) of pictures and tokens, and the Media for cross-attention (None for image slots).

        Raises:
            ValueError: the number of slots does not match the number of pictures.
        """
        return self.fusion(self.decoder.embed(tokens_BT), tokens_BT == SLOT, features_PNW)

    def hidden_states(self, batch: Batch, features_PNW: Tensor | None = None) -> Tensor:
        """Compute hidden states (B, T, W) of a right-padded batch.

        Args:
            batch: pictures and token sequences.
            features_PNW: features of all pictures, in the order of their slots, or None to encode the pictures of the
                batch.
        """
        if self.config.text_only:
            x_BTW, media = self.decoder.embed(batch.tokens_BT), None
        else:
            if features_PNW is None:
                features_PNW = self.encode(batch.pixels_PHWC)
                if batch.rows_per_picture > 1:
                    features_PNW = features_PNW.repeat_interleave(batch.rows_per_picture, dim=0)
            x_BTW, media = self.embed(batch.tokens_BT, features_PNW)
        # Right padding needs no mask under causal attention, because no token attends to a later position. A prefix
        # mask ignores right padding too, because padding comes after the answer.
        mask = None
        if self.prefix_lm:
            valid_BT = torch.ones_like(batch.tokens_BT, dtype=torch.bool)
            mask = attention_mask(valid_BT, prefix_marks(batch.prefix_lengths_B, batch.tokens_BT.shape[1]))
        return self.decoder(x_BTW, mask=mask, media=media)

    def forward(self, batch: Batch, features_PNW: Tensor | None = None) -> Tensor:
        """Compute the logits (targets, V) of the target positions, in row-major order, and skip all other positions.

        The arguments are the same as in `hidden_states`.
        """
        return self.decoder.logits(self.hidden_states(batch, features_PNW)[batch.labels_BT != IGNORE])

    def prefill(
        self, features_PNW: Tensor, prefix_BT: Tensor, cache: KVCache, padding_B: Tensor | None = None
    ) -> Tensor:
        """Fill the cache with the prefixes, and return the logits (B, V) of the first answer token.

        Args:
            features_PNW: features of all pictures, in the order of the pictures' slots.
            prefix_BT: left-padded token ids of the prefixes.
            cache: empty key-value cache.
            padding_B: number of padding positions at the start of each row, or None if no row is padded.
        """
        x_BTW, media = self.embed(prefix_BT, features_PNW)
        index_T = torch.arange(prefix_BT.shape[1], device=prefix_BT.device)
        mask, positions_BT = None, None
        if padding_B is not None:
            positions_BT = (index_T - padding_B[:, None]).clamp(min=0)
        if self.prefix_lm or padding_B is not None:
            valid_BT = torch.ones_like(prefix_BT, dtype=torch.bool)
            if padding_B is not None:
                valid_BT = index_T >= padding_B[:, None]
            marks = torch.zeros_like if self.prefix_lm else torch.ones_like
            mask = attention_mask(valid_BT, marks(prefix_BT))
        cache.padding_B = padding_B
        x_B1W = self.decoder(x_BTW, mask=mask, positions_BT=positions_BT, media=media, cache=cache, last_only=True)
        return self.decoder.logits(x_B1W[:, 0])

    def step(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each row, and return the logits (B, V) of the next token."""
        mask, positions_BT = None, None
        if cache.padding_B is not None:
            positions_BT = cache.length - cache.padding_B[:, None]
            keys_S = torch.arange(cache.length + 1, device=tokens_B.device)
            mask = (keys_S >= cache.padding_B[:, None])[:, None, None]
        x_B1W = self.decoder(self.decoder.embed(tokens_B[:, None]), mask=mask, positions_BT=positions_BT, cache=cache)
        return self.decoder.logits(x_B1W[:, 0])

    def new_cache(self, batch: int, context: int) -> KVCache:
        """Create an empty key-value cache for `batch` sequences of up to `context` positions."""
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
