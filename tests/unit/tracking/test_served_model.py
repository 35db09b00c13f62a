"""Tests that one bad row never fails a request to the registered model, whatever its cells contain."""

from __future__ import annotations

import base64
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_model, tiny_pixels

from pipelines.tracking import logged_model
from pipelines.tracking import model as served_model
from vlm.checkpoint import save_model
from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer


def picture_file() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tiny_pixels(1)[0].numpy()).save(buffer, "PNG")
    return buffer.getvalue()


FILE = picture_file()
TEXT = base64.b64encode(FILE).decode()
GOOD: list[Any] = [
    *(FILE, bytearray(FILE), memoryview(FILE), np.bytes_(FILE), np.str_(TEXT)),
    *(
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(FILE).decode(),
        f"data:image/png;base64,{TEXT}",
        f"\ufeff{TEXT}",
    ),
]
BAD: list[Any] = [
    *(None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, Decimal("sNaN"), "", " ", b"", "\u200b", [], [None]),
    *(7, 7.5, True, np.int64(7), {"bytes": FILE}, {}, [TEXT], [[TEXT]], (TEXT,), np.array([TEXT]), np.zeros((2, 2))),
    *(
        "\ud800",
        TEXT[:9] + "\ud800" + TEXT[9:],
        TEXT + "\0",
        "%ED%A0%80",
        "x",
        b"x",
        FILE[:60],
        "A" * 100_000,
        object(),
    ),
]
NO_PROMPT: list[Any] = [None, float("nan"), pd.NA, "", b"", [], "\ufeff"]
GOOD_PROMPTS: list[Any] = ["what", b"what", 7, np.int64(7), 1.5, True, "\U0001f600"]
BAD_PROMPTS: list[Any] = [
    *("\ud83d", b"\xff", ["what"], {"a": 1}, {}, ("what",), np.array(["what"]), bytearray(b"what"), "x" * 100_000),
]


def served(folder: Path, network: VisionLanguageModel, tokenizer: Tokenizer) -> Any:
    """Save a model as `log_model` does, and load it as a server does."""
    save_model(folder / "checkpoint", network, tokenizer)
    config = network.config
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(Path(str(served_model.__file__))),
        artifacts={file: str(folder / "checkpoint" / file) for file in logged_model.MODEL_FILES},
        signature=logged_model.signature(config.generation, text_only=config.text_only),
        pip_requirements=["mlflow"],
    )
    return mlflow.pyfunc.load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return served(tmp_path_factory.mktemp("served"), *tiny_model("plain"))


def predict(model: Any, rows: list[tuple[Any, Any]]) -> list[tuple[str | None, str | None]]:
    frame = pd.DataFrame(index=range(len(rows)), columns=["image", "prompt"], dtype=object)
    for index, (image, prompt) in enumerate(rows):
        frame.at[index, "image"], frame.at[index, "prompt"] = image, prompt
    answers = model.predict(frame)
    json.dumps(answers.to_dict(), ensure_ascii=False).encode()  # a server sends the answers as UTF-8
    assert list(answers.index) == list(frame.index)
    return list(zip(answers["caption"], answers["error"], strict=True))


def test_a_picture_in_any_form_with_any_missing_value_as_prompt_gets_the_same_caption(model: Any) -> None:
    answers = predict(model, [(image, "") for image in GOOD] + [(TEXT, prompt) for prompt in NO_PROMPT])
    assert set(answers) == {(answers[0][0], None)}


def test_a_bad_cell_in_a_serving_request_gives_an_error_only_in_its_row(model: Any) -> None:
    rows = [(image, "") for image in BAD] + [(TEXT, prompt) for prompt in BAD_PROMPTS]
    for row, (caption, error) in zip(rows, predict(model, rows), strict=True):
        assert caption is None, ascii(row)[:80]
        assert error
        assert "unexpected" not in error


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(GOOD + BAD), st.sampled_from(NO_PROMPT + BAD_PROMPTS)), max_size=6))
def test_a_good_row_of_a_request_gets_the_same_caption_for_any_content_of_the_other_rows(
    model: Any, rows: list[tuple[Any, Any]]
) -> None:
    ((caption, _),) = predict(model, [(TEXT, "")])
    for (image, prompt), answer in zip(rows, predict(model, rows), strict=True):
        good = any(image is each for each in GOOD) and any(prompt is each for each in NO_PROMPT)
        assert (answer[0] == caption) == good
        assert (answer[1] is None) == good


def test_a_prompt_that_is_a_number_or_bytes_is_read_as_its_text(model: Any) -> None:
    answers = predict(model, [(TEXT, prompt) for prompt in GOOD_PROMPTS])
    assert [error for _, error in answers] == [None] * len(GOOD_PROMPTS)
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def test_a_serving_request_without_rows_gets_an_empty_answer(model: Any) -> None:
    assert predict(model, []) == []


def test_a_served_text_only_model_continues_each_prompt_and_a_bad_prompt_gives_an_error_in_its_row(
    tmp_path: Path,
) -> None:
    network, tokenizer = tiny_model("plain")
    config = network.config.model_copy(update={"text_only": True})
    model = served(tmp_path, build_model(config, tokenizer.vocab_size), tokenizer)
    prompts = ["what", *BAD_PROMPTS, b"what", *NO_PROMPT]
    frame = pd.DataFrame(index=range(len(prompts)), columns=["prompt"], dtype=object)
    for index, prompt in enumerate(prompts):
        frame.at[index, "prompt"] = prompt
    answers = model.predict(frame)
    bad = [*range(1, len(BAD_PROMPTS) + 1)]
    assert answers.index[answers["error"].notna()].tolist() == bad
    assert answers.index[answers["caption"].isna()].tolist() == bad
    assert answers["caption"][0] == answers["caption"][len(bad) + 1]
