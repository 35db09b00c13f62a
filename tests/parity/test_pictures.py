"""Picture preprocessing gives the same pixels as each family's own processor, after mean and std are applied.

Every pixel equals the pixel that transformers' Pillow processors and timm's evaluation transform compute. The
torchvision processors of transformers run the two passes of a resize in another order than Pillow, and clip values
after the first bicubic pass. The tests of the torchvision processors therefore allow a tolerance and use pictures
without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.vit.image_processing_vit import ViTImageProcessor

from pipelines.config import load_model
from vlm.config import ImageConfig
from vlm.image import to_pixels

Array = npt.NDArray[Any]
Processor = Callable[[Image.Image], Array]

SIZE = 64
SQUARE = {"height": SIZE, "width": SIZE}
SHORTEST: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}

SIGLIP = ImageConfig(size=SIZE)
VIT = ImageConfig(size=SIZE, filter="bilinear")
CLIP = ImageConfig(
    size=SIZE,
    resize="crop",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
TIMM = ImageConfig(size=SIZE, resize="crop", crop_start="even")

SIZES = [(64, 64), (200, 90), (90, 200), (129, 77), (67, 64), (64, 71), (33, 91), (5, 3), (1, 7), (641, 480), (300, 20)]
"""Picture sizes (width, height): the model's input size, wide, tall, odd margins, small, tiny, large, very wide."""


def of_transformers(processor: Any) -> Processor:
    return lambda image: np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def of_timm() -> Processor:
    published = get_pretrained_cfg("vit_mediumd_patch16_reg4_gap_384")
    assert published is not None
    data = resolve_data_config({}, pretrained_cfg=published.to_dict())
    transform = create_transform(**(data | {"input_size": (3, SIZE, SIZE)}))
    return lambda image: np.asarray(transform(image))


def normalised(image: Image.Image, config: ImageConfig) -> Array:
    pixels = to_pixels(image, config)
    assert pixels.dtype == np.uint8
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def levels_apart(image: Image.Image, config: ImageConfig, processor: Processor) -> Array:
    """Return the absolute difference between our pixels and the processor's pixels, in levels (0 to 255)."""
    apart = np.abs(normalised(image, config) - processor(image))
    return np.asarray(255 * apart * np.array(config.std).reshape(3, 1, 1))


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (SIGLIP, of_transformers(SiglipImageProcessorPil(size=SQUARE))),
        (VIT, of_transformers(ViTImageProcessorPil(size=SQUARE))),
        (CLIP, of_transformers(CLIPImageProcessorPil(**SHORTEST))),
        (TIMM, of_timm()),
    ],
    ids=["siglip", "vit", "clip", "timm"],
)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_pixel_equals_the_pixel_of_the_original_processor(
    size: tuple[int, int], config: ImageConfig, processor: Processor
) -> None:
    """Allow a difference of 0.0005 levels, because float32 rounds (x - mean) / std."""
    assert levels_apart(noise(size), config, processor).max() < 5e-4


@pytest.mark.parametrize(
    ("config", "processor", "most"),
    [
        (SIGLIP, of_transformers(SiglipImageProcessor(size=SQUARE)), 2),
        (VIT, of_transformers(ViTImageProcessor(size=SQUARE)), 1),
        (CLIP, of_transformers(CLIPImageProcessor(**SHORTEST)), 2),
    ],
    ids=["siglip", "vit", "clip"],
)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_differ_from_the_torchvision_processor_by_at_most_two_levels(
    size: tuple[int, int], config: ImageConfig, processor: Processor, most: int
) -> None:
    smooth = noise((5, 4)).resize(size, Image.Resampling.BICUBIC)
    apart = levels_apart(smooth, config, processor)
    assert apart.max() < most + 0.01
    assert (apart > 0.5).mean() < 0.06


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (SIGLIP, SiglipImageProcessorPil()),
        (VIT, ViTImageProcessorPil()),
        (CLIP, CLIPImageProcessorPil()),
    ],
    ids=["siglip", "vit", "clip"],
)
def test_mean_std_and_resize_filter_equal_the_defaults_of_the_original_processor(
    config: ImageConfig, processor: Any
) -> None:
    assert (config.mean, config.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    assert config.filter == processor.resample.name.lower()


@pytest.mark.parametrize(
    ("name", "config"),
    [("paligemma", SIGLIP), ("paligemma2", SIGLIP), ("clip_gpt2", CLIP), ("flamingo", CLIP), ("vit_gpt2", TIMM)],
)
def test_model_preprocesses_pictures_like_the_processor_of_its_encoder(name: str, config: ImageConfig) -> None:
    assert load_model(name).image.model_copy(update={"size": SIZE}) == config
