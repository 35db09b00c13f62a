"""What `vlm.size` says a model computes is what torch counts when it runs."""

import pytest
import torch
from models import VARIANTS, tiny_model, tiny_pixels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.size import flops_per_sample
from vlm.text.base import SLOT


def grouped_flops(rows: torch.Size, weights: torch.Size, *_: object, **__: object) -> int:
    """Rows (A, I) by one of X matrices (X, I, O) each: torch has no count of its own for it."""
    return 2 * rows.numel() * weights[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    text = model.config.generation.max_new_tokens
    tokens = torch.tensor([[SLOT] * model.config.num_slots + [5] * text])
    # The plain kernel: torch counts its matrix products one by one, over all pairs of positions.
    grouped = {torch.ops.aten._grouped_mm: grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        x, media = model.embed(tokens, model.encode(tiny_pixels(1)))
        model.decoder.logits(model.decoder(x, mask=None, media=media)[:, -text:])
    assert flops_per_sample(model.config, tokenizer.vocab_size) == counter.get_total_flops()
