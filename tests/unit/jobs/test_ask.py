"""Tests of `lakesight ask` with a single picture, several pictures or no picture, and of the boxes in an answer."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_tokenizers import byte_fallback
from tokenizers import AddedToken

from jobs.ask import ask
from jobs.regions import FoundRegion, draw_regions
from pipelines.config import load_model
from pipelines.errors import StageFailed, UserError
from pipelines.pages.attention import PANEL, attention_panels, draw_attention, join_panels
from vlm import text
from vlm.captioner import Captioner
from vlm.checkpoint import save_model
from vlm.config import CharsConfig, ImageConfig, JsonTextConfig
from vlm.factory import build_model
from vlm.generation.attention_maps import AttentionMaps
from vlm.generation.generate import Request, generate
from vlm.image import open_image, to_pixels
from vlm.model import VisionLanguageModel
from vlm.text import Tokenizer
from vlm.text.prompt import prefix_ids

CAT, DOG = ("<loc0256><loc0512><loc0768><loc0896> " + name for name in ("cat ; ", "dog ; "))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a new Lakesight home folder and a new working folder with two pictures."""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (400, 200), "black").save("wide.png")
    Image.new("RGB", (50, 60), "red").save("red.png")


AskInProcess = Callable[..., dict[str, Any]]


@pytest.fixture
def ask_in_process(capsys: pytest.CaptureFixture[str]) -> AskInProcess:
    """Return a function that runs `ask` in this process and returns its JSON report."""

    def run(*files: str, **options: Any) -> dict[str, Any]:
        capsys.readouterr()
        ask([Path(file) for file in files], as_json=True, **options)
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run


@pytest.fixture
def random_model(tmp_path: Path) -> tuple[Path, VisionLanguageModel, Tokenizer]:
    """Build a model with random weights. The model's sampled answer depends on the pictures and their order."""
    tokenizer = text.learn(CharsConfig(kind="chars", alphabet="abc "), ())
    config = load_model("nano_tiny")
    generation = config.generation.model_copy(update={"max_new_tokens": 12, "temperature": 1.0})
    config = config.model_copy(update={"generation": generation})
    torch.manual_seed(1)
    model = build_model(config, tokenizer.vocab_size).eval()
    save_model(tmp_path / "random_model", model, tokenizer)
    return tmp_path / "random_model", model, tokenizer


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """Save a model whose answers consist of only two kinds of tokens: the box of a cat and the box of a dog.

    The output head has opposite weights for the tokens of the two boxes, and zero weights for all other tokens.
    """
    backend = byte_fallback()
    backend.add_tokens([AddedToken(token, normalized=False) for token in (CAT, DOG)])
    backend.save(str(tmp_path / "published.json"))
    rows = backend.get_vocab_size()
    settings = JsonTextConfig(
        kind="json", path=str(tmp_path / "published.json"), vocab_size=rows, bos="<bos>", eos="<eos>", pad="<pad>"
    )
    tokenizer = text.learn(settings, ())
    config = load_model("nano_tiny")
    generation = config.generation.model_copy(update={"max_new_tokens": 2})
    decoder = config.decoder.model_copy(update={"tie_embeddings": False})
    image = config.image.model_copy(update={"resize": "crop"})
    update = {"text": settings, "generation": generation, "decoder": decoder, "image": image}
    model = build_model(config.model_copy(update=update), rows)
    with torch.no_grad():
        model.decoder.head.weight[:-1] = 0
        model.decoder.head.weight[-2] = -model.decoder.head.weight[-1]
    save_model(tmp_path / "detector", model, tokenizer)
    return tmp_path / "detector"


@pytest.mark.parametrize(
    ("files", "prompt"),
    [(("red.png",), ""), (("wide.png", "red.png"), ""), (("red.png", "wide.png"), "a cab"), ((), "a cab")],
    ids=["one", "two", "two-and-a-prompt", "none"],
)
def test_lakesight_ask_passes_pictures_to_the_model_in_the_given_order(
    files: tuple[str, ...],
    prompt: str,
    random_model: tuple[Path, VisionLanguageModel, Tokenizer],
    ask_in_process: AskInProcess,
) -> None:
    folder, model, tokenizer = random_model
    seen = [open_image(Path(file).read_bytes(), max_pixels=10**6, min_side=1)[0] for file in files]
    pixels = tuple(torch.from_numpy(to_pixels(picture, model.config.image)) for picture in seen)
    prefix = prefix_ids(tokenizer, model.config.num_slots, prompt, len(files))
    (expected,) = generate(model, tokenizer, [Request(prefix, pixels)], model.config.generation)
    report = ask_in_process(*files, prompt=prompt, checkpoint=folder)
    assert report["caption"] == expected.text
    assert report["images"] == list(files)
    assert (report["regions"], report["drawn"]) == ([], None)


def test_lakesight_ask_refuses_more_pictures_than_fit_into_the_context(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer],
) -> None:
    with pytest.raises(UserError, match="does not fit the model's context"):
        ask([Path("red.png")] * 9, checkpoint=random_model[0])


def test_boxes_in_an_answer_are_reported_in_pixels_of_the_picture_and_are_drawn(
    detector: Path, ask_in_process: AskInProcess
) -> None:
    """The model sees columns 100 to 300 of the picture, so the middle of its input is column 200 of the picture."""
    report = ask_in_process("wide.png", prompt="detect cat", checkpoint=detector, draw=Path("boxes.png"))
    assert report["regions"]
    for region in report["regions"]:
        assert region.pop("label") in ("cat", "dog")
        assert region == {"left": 200, "top": 50, "right": 275, "bottom": 150, "codes": []}
    assert report["drawn"] == "boxes.png"
    with Image.open("boxes.png") as drawn:
        assert drawn.size == (400, 200)
        box_columns = [x for x in range(210, 400) if drawn.getpixel((x, 120)) != (0, 0, 0)]
        assert box_columns == [274], "the last pixel before the right edge"


def test_lakesight_ask_reports_no_boxes_for_an_answer_about_several_pictures(
    detector: Path, ask_in_process: AskInProcess
) -> None:
    report = ask_in_process("wide.png", "red.png", checkpoint=detector)
    assert "<loc0256>" in report["caption"]
    assert report["regions"] == []


def test_lakesight_ask_with_draw_prints_the_answer_and_fails_if_the_answer_has_no_boxes(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageFailed, match=r"the answer contains no region .*, so --draw drew nothing") as caught:
        ask([Path("red.png")], checkpoint=random_model[0], draw=Path("boxes.png"), as_json=True)
    assert json.loads(capsys.readouterr().out)["caption"] == caught.value.got
    assert caught.value.exit_code == 1
    assert not Path("boxes.png").exists()


def test_boxes_with_equal_labels_have_equal_colours_and_boxes_without_area_can_be_drawn() -> None:
    picture = Image.new("RGB", (300, 300), "white")
    corners = [(0, 0, 300, 300), (299, 299, 300, 300), (300, 300, 300, 300), (7, 7, 7, 7)]
    labels = ["a", "b", "", "a\N{SNOWMAN}"]
    found = [
        FoundRegion(label=label, left=x0, top=y0, right=x1, bottom=y1, codes=())
        for label, (x0, y0, x1, y1) in zip(labels, corners, strict=True)
    ]
    assert draw_regions(picture, found).size == (300, 300)
    assert picture.getcolors() == [(90_000, (255, 255, 255))], "the original picture is unchanged"
    boxes = [(40, 40, 90, 90), (140, 40, 190, 90), (40, 140, 90, 190)]
    same = [
        FoundRegion(label=label, left=x0, top=y0, right=x1, bottom=y1, codes=())
        for label, (x0, y0, x1, y1) in zip(["cat", "cat", "dog"], boxes, strict=True)
    ]
    drawn = draw_regions(picture, same)
    first, second, third = (drawn.getpixel((x1 - 1, y1 - 1)) for _, _, x1, y1 in boxes)
    assert first == second != third


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("/dev/zero", "a device or pipe"),
        ("/dev/tty", "a device or pipe"),
        ("pipe", "a device or pipe"),
        (".", "a folder"),
        ("sparse", f"too_large: {10 * 2**30} bytes"),
        ("/proc/self/status", "not_an_image"),
        ("/proc/kmsg", ""),
        ("empty.png", "not_an_image: 0 bytes"),
        ("loop.png", "Too many levels of symbolic links"),
        ("https://example.org/a.png", "download the picture"),
    ],
)
def test_lakesight_ask_refuses_an_endless_file_and_a_file_that_is_not_a_picture_in_one_paragraph(
    name: str, got: str, tmp_path: Path, random_model: tuple[Path, VisionLanguageModel, Tokenizer]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "empty.png").touch()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(UserError, match=re.escape(got)) as caught:
        ask([Path(name)], checkpoint=random_model[0])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("limit", "reason"), [("max_bytes=100", "too_large"), ("max_pixels=9", "too_large")])
def test_lakesight_ask_applies_the_picture_limits_of_the_run(
    limit: str, reason: str, random_model: tuple[Path, VisionLanguageModel, Tokenizer]
) -> None:
    with pytest.raises(UserError, match=reason):
        ask([Path("wide.png")], checkpoint=random_model[0], overrides=[f"data.limits.{limit}"])


def test_an_error_is_reported_if_the_decoding_of_a_picture_crashes_or_never_ends(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = ["data.limits.max_decode_seconds=0.5"]
    for fault, got in ((lambda *_, **__: ctypes.string_at(0), "SIGSEGV"), (loop_in_c, "took too long")):
        monkeypatch.setattr("vlm.image.open_image", fault)
        with pytest.raises(UserError, match=got):
            ask([Path("red.png")], checkpoint=random_model[0], overrides=limit)


def loop_in_c(*_: object, **__: object) -> None:
    deque(itertools.repeat(0), maxlen=0)


def test_lakesight_ask_accepts_overrides_of_decoding_settings_and_refuses_other_model_overrides(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer],
    ask_in_process: AskInProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = random_model[0]
    short = ask_in_process("red.png", checkpoint=folder, overrides=["model.generation.max_new_tokens=1"])
    assert short["num_tokens"] <= 1 < ask_in_process("red.png", checkpoint=folder)["num_tokens"]
    with pytest.raises(UserError, match="cannot change this setting") as refused:
        ask_in_process("red.png", checkpoint=folder, overrides=["model.image.filter=lanczos"])
    assert "--set model.image.filter=lanczos" in refused.value.got
    for temperature in (1, 0):
        given = [f"model.generation.{each}" for each in (f"temperature={temperature}", "top_k=5")]
        ask([Path("red.png")], checkpoint=folder, overrides=given)
        assert ("the setting top_k 5 has no effect" in capsys.readouterr().err) == (temperature == 0)
    with pytest.raises(UserError, match="exclude each other"):
        ask_in_process("red.png", checkpoint=folder, overrides=["model.generation.num_beams=3"])


def test_lakesight_ask_draws_and_reports_the_attention_of_each_word(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer], ask_in_process: AskInProcess
) -> None:
    folder, model, tokenizer = random_model
    report = ask_in_process("wide.png", checkpoint=folder, attention=Path("words.png"), temperature=1.0, seed=5)
    words = report["caption"].split()
    assert words
    maps = Captioner(model, tokenizer).attention(Path("wide.png"), temperature=1.0, seed=5)
    assert [word for word, _ in maps.words()] == words
    assert report["attention"] == "words.png"
    with Image.open("wide.png") as picture, Image.open("words.png") as drawn:
        expected = draw_attention(picture.convert("RGB"), model.config.image, maps)
        assert drawn.tobytes() == expected.tobytes()


def test_each_attention_panel_highlights_the_patches_of_its_word_in_the_part_that_the_model_sees() -> None:
    maps = AttentionMaps(
        text="left right",
        spans=((0, 4), (4, 10)),
        decoder_TLHN=torch.tensor([[0.4, 0], [0.1, 0.3]])[:, None, None],
        rollout_NP=torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]) / 2,
    )
    picture = Image.new("RGB", (400, 200), "white")
    picture.paste("black", (0, 0, 90, 200))  # black only outside of the square that the model sees
    seen, left, right = attention_panels(picture, ImageConfig(size=16, resize="crop"), maps)
    assert seen.picture.getcolors() == [(PANEL**2, (255, 255, 255))]
    assert (left.title, right.title) == ("left 40%", "right 40%")
    corners = [(4, 4), (PANEL - 4, 4), (4, PANEL - 4), (PANEL - 4, PANEL - 4)]
    blues = [[panel.picture.getpixel(corner)[2] for corner in corners] for panel in (left, right)]  # type: ignore[index]
    assert blues == [[51, 255, 51, 255], [255, 51, 255, 51]]
    assert join_panels([seen, left, right]).width == 3 * (PANEL + 8) + 8
    assert join_panels([seen] * 7).size == (5 * (PANEL + 8) + 8, 2 * (PANEL + 28) + 8)


def test_option_attention_is_refused_with_several_pictures_and_fails_if_the_answer_has_no_words(
    random_model: tuple[Path, VisionLanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_model[0]
    for files in ([], [Path("red.png"), Path("wide.png")]):
        with pytest.raises(UserError, match="--attention can draw only on a single picture"):
            ask(files, prompt="a", checkpoint=folder, attention=Path("words.png"))
    with pytest.raises(UserError, match="is not the suffix of a picture format"):
        ask([Path("red.png")], checkpoint=folder, attention=Path("words.txt"))
    with pytest.raises(StageFailed, match="no word, so --attention drew nothing"):
        ask([Path("red.png")], checkpoint=folder, attention=Path("words.png"), stop=[*"abc \ufffd"], as_json=True)
    assert json.loads(capsys.readouterr().out)["attention"] is None
    assert not Path("words.png").exists()
