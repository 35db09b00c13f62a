"""Tests that the parser of regions finds boxes, labels and outline codes, and ignores any other text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.config import ImageConfig
from vlm.image import compute_resize, to_pixels
from vlm.text.regions import BINS, REGION_TOKEN, Box, Region, parse_regions, to_box


def box_tokens(y0: int, x0: int, y1: int, x1: int) -> str:
    return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>"


def outline(*codes: int) -> str:
    return "".join(f"<seg{code:03d}>" for code in codes)


def test_the_answer_to_a_detect_prompt_is_parsed_into_boxes_with_labels() -> None:
    text = f"{box_tokens(102, 307, 922, 716)} cat ; {box_tokens(0, 0, 511, 1023)} big dog ; {box_tokens(5, 5, 5, 5)}"
    assert parse_regions(text) == [
        Region(102, 307, 922, 716, "cat"),
        Region(0, 0, 511, 1023, "big dog"),
        Region(5, 5, 5, 5, ""),
    ]


def test_the_answer_to_a_segment_prompt_is_parsed_into_boxes_with_sixteen_outline_codes() -> None:
    codes = (*range(15), 127)
    text = f"{box_tokens(1, 2, 3, 4)} {outline(*codes)} cat ; {box_tokens(5, 6, 7, 8)}{outline(*codes)} cat"
    assert parse_regions(text) == [Region(1, 2, 3, 4, "cat", codes), Region(5, 6, 7, 8, "cat", codes)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("a cat on a mat", []),
        ("<loc0001><loc0002><loc0003> cat", []),
        ("<loc0001><loc0002><loc0003><loc1024> cat", []),
        ("<loc0001><loc0002><loc0003><loc004> cat", []),
        (f"{box_tokens(9, 0, 3, 4)} upside down", []),
        (f"{box_tokens(0, 9, 3, 4)} inside out", []),
        (f"I see {box_tokens(1, 2, 3, 4)} cat", [Region(1, 2, 3, 4, "cat")]),
        (f"<loc0001> ; {box_tokens(1, 2, 3, 4)} cat", [Region(1, 2, 3, 4, "cat")]),
        ("<loc0001> <loc0002> <loc0003> <loc0004> cat", [Region(1, 2, 3, 4, "cat")]),
        (f"{box_tokens(1, 2, 3, 4)}{outline(1, 2, 3)} cat", [Region(1, 2, 3, 4, "cat")]),
        (f"{box_tokens(1, 2, 3, 4)}{outline(*[1] * 17)} cat", [Region(1, 2, 3, 4, "cat")]),
        (f"{box_tokens(1, 2, 3, 4)}<seg128> cat", [Region(1, 2, 3, 4, "")]),
        (f"{box_tokens(1, 2, 3, 4)}{box_tokens(5, 6, 7, 8)} cat", [Region(1, 2, 3, 4, ""), Region(5, 6, 7, 8, "cat")]),
    ],
)
def test_the_box_parser_skips_incomplete_boxes(text: str, found: list[Region]) -> None:
    assert parse_regions(text) == found


pieces = st.one_of(
    st.integers(0, 1100).map(lambda n: f"<loc{n:04d}>"),
    st.integers(0, 140).map(lambda n: f"<seg{n:03d}>"),
    st.sampled_from([" ; ", " ", "cat", "<", ">", "<loc", "<loc\N{ARABIC-INDIC DIGIT ONE}000>", "\n"]),
    st.text(max_size=3),
)


@given(st.lists(pieces, max_size=40).map("".join), st.sampled_from(["stretch", "crop", "pad"]))
def test_the_box_parser_finds_only_boxes_inside_the_picture_in_any_text(text: str, resize: str) -> None:
    config = ImageConfig.model_validate({"size": 224, "resize": resize})
    for region in parse_regions(text):
        box = to_box(region, compute_resize(640, 481, config))
        assert 0 <= box.left <= box.right <= 640
        assert 0 <= box.top <= box.bottom <= 481
        assert len(region.codes) in (0, 16)


def test_the_region_tokens_are_exactly_1024_location_tokens_and_128_outline_codes() -> None:
    names = [f"<loc{n:04d}>" for n in range(10_000)] + [f"<seg{n:03d}>" for n in range(1000)]
    assert sum(REGION_TOKEN.fullmatch(name) is not None for name in names) == 1024 + 128
    assert REGION_TOKEN.fullmatch("<loc1023>")
    assert REGION_TOKEN.fullmatch("<seg127>")


def test_a_box_in_the_answer_about_a_stretched_picture_is_scaled_to_the_original_size() -> None:
    placement = compute_resize(1000, 500, ImageConfig(size=224))
    assert to_box(Region(256, 512, 512, 1023, "cat"), placement) == Box(500, 125, 999, 250)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(400, 200), (201, 399)])
def test_a_box_in_the_model_input_maps_to_its_position_in_the_picture(size: tuple[int, int], resize: str) -> None:
    """Find a green box in the model's input, convert its edges to bins, and map the bins back to the picture."""
    middle_x, middle_y = size[0] // 2, size[1] // 2
    truth = Box(middle_x - 30, middle_y - 50, middle_x + 60, middle_y + 40)
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.paste((0, 255, 0), truth)
    config = ImageConfig.model_validate({"size": 64, "resize": resize})
    pixels = to_pixels(picture, config).astype(int)
    rows, columns = np.nonzero((pixels[:, :, 1] > 128) & (pixels[:, :, 0] < 128))
    y0, x0, y1, x1 = (int(edge * BINS / 64) for edge in (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1))
    found = to_box(Region(y0, x0, y1, x1, "square"), compute_resize(*size, config))
    model_pixel = max(size) / 64
    assert np.abs(np.subtract(found, truth)).max() <= model_pixel + 1
