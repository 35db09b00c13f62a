"""Tests that the FLOPs and the numbers of parameters computed from a config are those of the built model."""

import pytest
import torch
from tiny_models import VARIANTS, tiny_model, tiny_pixels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.config.parameters import ParameterCounts, count_parameters
from vlm.config.size import flops_per_sample, peak_flops
from vlm.text.base import SLOT


def grouped_flops(rows: torch.Size, weights: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of a grouped matrix product (A, I) x (X, I, O), which torch's FLOP counter does not count."""
    return 2 * rows.numel() * weights[-1]


@pytest.mark.parametrize("text_length", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_computed_from_the_config_equal_the_flops_that_torch_counts(
    variant: str, text_length: int | None
) -> None:
    model, tokenizer = tiny_model(variant)
    text = text_length or model.config.generation.max_new_tokens
    tokens = torch.tensor([[SLOT] * model.config.num_slots + [5] * text])
    # With the math kernel, torch counts every matrix product of attention over all pairs of positions.
    grouped = {torch.ops.aten._grouped_mm: grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        x, media = model.embed(tokens, model.encode(tiny_pixels(1)))
        model.decoder.logits(model.decoder(x, mask=None, media=media)[:, -text:])
    assert flops_per_sample(model.config, tokenizer.vocab_size, text_length) == counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_parameters_counted_from_the_config_equals_the_number_in_the_built_model(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    parts = (model.encoder, model.projector, model.fusion, model.decoder)
    built = ParameterCounts(*(sum(parameter.numel() for parameter in part.parameters()) for part in parts))
    assert count_parameters(model.config, tokenizer.vocab_size) == built
    assert sum(built) == sum(parameter.numel() for parameter in model.parameters())


def test_a_text_only_model_has_only_the_parameters_of_its_decoder() -> None:
    config = tiny_model("plain")[0].config
    counted, whole = (count_parameters(each, 30) for each in (config.model_copy(update={"text_only": True}), config))
    assert counted == ParameterCounts(0, 0, 0, whole.decoder)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_are_looked_up_by_the_name_of_the_gpu(gpu: str, peak: float | None) -> None:
    assert peak_flops(gpu) == peak
