"""Tests of the Python API: loading, captions, streams, log-probabilities, and the examples of the documentation."""

from __future__ import annotations

import base64
import doctest
import importlib
import inspect
import io
import math
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import tiny_config, tiny_model, tiny_pixels

import vlm
from vlm import inputs
from vlm.captioner import Captioner
from vlm.checkpoint import save_model
from vlm.errors import ArgumentError, CheckpointError, ConfigError, ImageError, UserError
from vlm.inputs import Picture

ROOT = Path(__file__).parents[3]
PAGE = runpy.run_path(str(ROOT / ".ci" / "api_page.py"), run_name="api_page")
MODULES = ("vlm", "vlm.captioner", "vlm.config.model", "vlm.generation.attention_maps", "vlm.generation.logprobs")


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels.numpy()) for pixels in tiny_pixels(count)]


def as_file(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(*tiny_model("plain"))


# ------------------------------------------------------------------------------------------------ documentation


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_give_the_results_that_are_shown_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert (failed, tried > 0) == (0, True)


def test_the_examples_of_the_api_page_run_in_an_empty_folder_with_no_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "api.md"
    blocks = re.findall(r"^```python\n(>>> .*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 10
    for block in blocks:
        example = doctest.DocTestParser().get_doctest(block, {}, block, str(page), None)
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def test_every_function_and_method_of_the_api_has_an_example() -> None:
    missing = [name for name, function in public_functions() if ">>>" not in (inspect.getdoc(function) or "")]
    assert missing == []


def public_functions() -> Iterator[tuple[str, Any]]:
    """Yield the functions, methods and properties of the API with their names."""
    for name in vlm.__all__:
        value = getattr(vlm, name)
        if name == "ModelConfig":  # described in docs/models.md
            continue
        if inspect.isclass(value):
            members = {key: member for key, member in vars(value).items() if not key.startswith("_")}
            yield from (
                (f"{name}.{key}", member)
                for key, member in members.items()
                if inspect.isfunction(member) or isinstance(member, property)
            )
        else:
            yield name, value


def test_the_api_page_equals_the_page_that_is_generated_from_the_docstrings() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == PAGE["api_page"](), "run `make api`"
    headings = {*re.findall(r"^##+ (?:vlm\.)?(\S+)$", PAGE["api_page"](), re.M)}
    assert headings >= {name for name, _ in public_functions()}


def test_the_code_example_in_the_readme_runs_and_captions_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    captioner = Captioner(*tiny_model("plain"))
    captioner.save("checkpoint")
    picture = pictures(1)[0]
    picture.save("cat.png")
    exec(compile(lines, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == captioner.caption([picture], max_new_tokens=8)[0].caption


# ------------------------------------------------------------------------------------------------ load and build


def test_the_function_load_accepts_a_checkpoint_folder_or_run_folder_or_mlflow_model_folder(tmp_path: Path) -> None:
    expected, other = Captioner(*tiny_model("plain")), Captioner(*tiny_model("plain", seed=2))
    expected.save(tmp_path / "checkpoint")
    other.save(tmp_path / "run" / "checkpoints" / "step_000900")
    expected.save(tmp_path / "run" / "checkpoints" / "step_001000")
    other.save(tmp_path / "run" / "checkpoints" / "damaged_step_002000")
    expected.save(tmp_path / "version" / "artifacts")
    caption = expected.caption(pictures(1))[0].caption
    for folder in ("checkpoint", "run", "version"):
        assert vlm.load(tmp_path / folder, device="cpu").caption(pictures(1))[0].caption == caption
    assert other.caption(pictures(1))[0].caption != caption


def test_a_run_folder_whose_newest_checkpoint_has_only_an_adapter_is_refused_with_the_reason(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step_000500"
    step.mkdir(parents=True)
    (step / "adapter.safetensors").write_bytes(b"weights")
    for folder in (tmp_path, step):
        with pytest.raises(CheckpointError, match=r"has only an adapter.*only the last checkpoint of a run"):
            vlm.load(folder)
    save_model(tmp_path / "checkpoints" / "step_001000", *tiny_model("plain"))
    (tmp_path / "checkpoints" / "step_001000" / "adapter.safetensors").write_bytes(b"weights")
    assert vlm.load(tmp_path, device="cpu").model.config.image.size == 16


def test_the_api_loads_a_model_in_the_given_precision_and_on_the_given_device(tmp_path: Path) -> None:
    save_model(tmp_path, *tiny_model("plain"))
    assert vlm.load(str(tmp_path), precision="bf16").model.mean.dtype == torch.bfloat16
    assert vlm.load(tmp_path, device="meta").model.mean.device.type == "meta"
    with pytest.raises(ConfigError, match="no such precision"):
        vlm.load(tmp_path, precision="fp8")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", ""])
def test_a_folder_without_a_complete_model_is_refused_and_the_error_names_the_folder(
    missing: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_model(folder, *tiny_model("plain"))
    if missing:
        (folder / missing).unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError) as caught:
        vlm.load(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_with_published_weights_of_only_a_decoder_is_refused_and_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"model_type in config\.json is 'gpt2', .* for the decoder"):
        vlm.load(tmp_path)


def test_the_function_build_accepts_a_config_or_mapping_or_file_and_keeps_the_random_state() -> None:
    config = tiny_config("plain")
    state = torch.random.get_rng_state()
    built = [vlm.build(given, seed=3) for given in (config, config.model_dump())]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = (dict(each.model.named_parameters()) for each in built)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.head.weight"], vlm.build(config, seed=4).model.decoder.head.weight)
    assert vlm.build(ROOT / "conf/model/nano_tiny.yml").model.config.image.size == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image": {"size": 16}}, "text: missing"),
        ("missing.yml", "no such file or model.*nano_tiny"),
        ("nan", "no such file or model, did you mean 'nano'"),
        ("a\0b", "no such file or model"),
        pytest.param("a" * 300, "cannot be read: File name too long", id="name of 300 characters"),
        pytest.param("image: {size: 32}\n" * 50, "cannot be read: File name too long", id="text of a YAML file"),
    ],
)
def test_build_refuses_an_invalid_config(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"the model config cannot be used.*{message}"):
        vlm.build(config)


def test_build_accepts_the_name_of_a_model_that_ships_and_prefers_a_model_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = (ROOT / "conf/model/nano_tiny.yml").read_text(encoding="utf-8")
    assert vlm.build("nano_tiny").model.config.image.size == 32
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/nano_tiny.yml").write_text(shipped.replace("size: 32", "size: 16"))
    Path("conf/model/own.yml").write_text(shipped.replace("size: 32", "size: 24"))
    assert [vlm.build(name).model.config.image.size for name in ("nano_tiny", "own")] == [16, 24]
    Path("nano_tiny").write_text(shipped.replace("size: 32", "size: 8"))
    assert vlm.build("nano_tiny").model.config.image.size == 8, "a file of exactly this name"
    Path("own").mkdir()
    assert vlm.build("own").model.config.image.size == 24, "a folder is no config"


# ------------------------------------------------------------------------------------------------ pictures


def test_a_picture_gets_the_same_caption_in_every_form_in_which_the_api_accepts_pictures(
    captioner: Captioner, tmp_path: Path
) -> None:
    picture = pictures(1)[0]
    data = as_file(picture)
    (tmp_path / "a.png").write_bytes(data)
    forms: list[Picture] = [picture, picture.convert("RGBA"), tmp_path / "a.png", data, base64.b64encode(data).decode()]
    results = captioner.caption([*forms, Image.open(tmp_path / "a.png")])
    assert len({result.caption for result in results}) == 1
    assert results[0].error is None


def test_a_picture_opened_with_pillow_is_turned_upright_just_as_its_file_would_be(
    captioner: Captioner, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures(1)[0].save(tmp_path / "turned.png", exif=exif)
    opened = captioner.request([Image.open(tmp_path / "turned.png")]).pixels[0]
    assert torch.equal(opened, captioner.request([tmp_path / "turned.png"]).pixels[0])
    assert torch.equal(opened, torch.rot90(tiny_pixels(1)[0], -1))


def test_a_bad_picture_gives_an_error_in_its_row_but_calls_with_a_single_picture_raise_the_error(
    captioner: Captioner, tmp_path: Path
) -> None:
    data = as_file(Image.effect_noise((300, 300), 90))
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    half = Image.open(tmp_path / "half.png")
    bad: list[Picture | None] = [tmp_path / "none.png", half, Image.new("F", (9, 9)), b"x", None]
    results = captioner.caption([*bad, pictures(1)[0]])
    assert [result.error is None for result in results] == [False] * 5 + [True]
    assert str(tmp_path / "none.png") in str(results[0].error)
    for picture in bad[:4]:
        assert picture is not None
        for call in (captioner.stream, captioner.attention):
            with pytest.raises(ImageError):
                call(picture)


# ------------------------------------------------------------------------------------------------ calls


def test_a_single_prompt_applies_to_all_pictures_and_a_wrong_number_of_prompts_is_refused(captioner: Captioner) -> None:
    one, two = pictures(2)
    together = captioner.caption([one, two], "what")
    assert together == captioner.caption([one, two], ["what", "what"])
    assert together != captioner.caption([one, two])
    with pytest.raises(UserError, match="pictures: 1, prompts: 2"):
        captioner.caption([one], ["a", "b"])


def test_every_api_function_refuses_a_misspelled_or_invalid_setting(captioner: Captioner) -> None:
    picture = pictures(1)[0]
    for call in (lambda **s: captioner.caption([picture], **s), lambda **s: captioner.stream(picture, **s)):
        with pytest.raises(ConfigError, match="did you mean 'temperature'"):
            call(temprature=1)
        with pytest.raises(ConfigError, match="top_p"):
            call(top_p=2)
        with pytest.raises(ConfigError, match="exclude each other"):
            call(num_beams=2, temperature=1)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}, {"stop": ["a"]}])
def test_the_streamed_pieces_of_a_caption_joined_together_equal_the_whole_caption(
    captioner: Captioner, settings: dict[str, Any]
) -> None:
    picture = pictures(1)[0]
    pieces = list(captioner.stream(picture, "what", **settings))
    assert "".join(pieces) == captioner.caption([picture], "what", **settings)[0].caption
    assert all(pieces)


def test_a_stream_reads_several_pictures_in_order(captioner: Captioner) -> None:
    one, two = pictures(2)
    answers = {"".join(captioner.stream(seen, "what")) for seen in ([one, two], [two, one], [one], one)}
    assert len(answers) == 3
    with pytest.raises(UserError, match="does not fit the model's context"):
        captioner.stream([one] * 20)


@pytest.mark.parametrize("variant", ["plain", "prefix", "looking"])
def test_the_function_logprobs_returns_the_same_values_that_were_computed_when_the_answer_was_generated(
    variant: str,
) -> None:
    captioner = Captioner(*tiny_model(variant))
    seen, prompts = pictures(3), ["", "what", "a"]
    requests = [captioner.request([picture], prompt) for picture, prompt in zip(seen, prompts, strict=True)]
    results = captioner.caption(seen, prompts, max_new_tokens=20)
    answers = [str(result.caption) for result in results]
    scored = captioner.logprobs(seen, prompts, answers)
    for request, result, answer, score in zip(requests, results, answers, scored, strict=True):
        assert "".join(score.tokens) == answer
        assert score.tokens[-1] == ""
        generated = score.logprobs[: result.num_tokens]
        assert sum(generated) / len(generated) == pytest.approx(result.mean_logprob, abs=1e-4)
        assert len(score.logprobs) == len(request.pixels) + len(captioner.tokenizer.encode(answer))
    labels = ["a", "b", "cat", ""]
    totals = [each.total for each in captioner.logprobs([seen[0]] * 4, [""] * 4, labels)]
    assert sum(map(math.exp, totals)) < 1
    assert len({*totals}) == 4


@pytest.mark.parametrize("variant", ["plain", "looking"])
def test_logprobs_decodes_and_encodes_one_picture_once_for_all_answers(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner(*tiny_model(variant))
    one, two = pictures(2)
    apart = [captioner.logprobs([one], [""], [answer])[0] for answer in ("a", "b", "cat")]
    encoded: list[int] = []
    decoded: list[Any] = []
    encode, decode = captioner.model.encode, inputs.decode_picture

    def count_encoded(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(pixels)

    def count_decoded(image: Any, *arguments: Any, **limits: Any) -> inputs.DecodedPicture:
        decoded.append(image)
        return decode(image, *arguments, **limits)

    monkeypatch.setattr(captioner.model, "encode", count_encoded)
    monkeypatch.setattr(inputs, "decode_picture", count_decoded)
    together = captioner.logprobs(one, "", ["a", "b", "cat"])
    assert (encoded, decoded) == ([1], [one])
    assert [each.total for each in together] == pytest.approx([each.total for each in apart], abs=1e-4)
    captioner.logprobs([one, two, one], "", ["a", "b", "cat"])
    assert (encoded, len(decoded)) == ([1, 2], 3)


def test_logprobs_refuses_answers_that_do_not_fit_the_context_or_the_number_of_prompts(captioner: Captioner) -> None:
    (picture,) = pictures(1)
    with pytest.raises(UserError, match="does not fit the model's context"):
        captioner.logprobs([picture], [""], ["a" * 100])
    with pytest.raises(UserError, match="different lengths"):
        captioner.logprobs([picture], [""], ["a", "b"])


def test_importing_the_library_is_lazy_and_the_error_names_a_missing_package() -> None:
    assert {*vlm.__all__} <= {*dir(vlm)}
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        vlm.lode  # noqa: B018
    assert (Path(str(vlm.__file__)).parent / "py.typed").exists()


def test_a_published_model_is_not_overwritten_by_a_checkpoint_but_an_earlier_checkpoint_is_replaced(
    tmp_path: Path,
) -> None:
    captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ArgumentError, match="a folder without a model of another library"):
        captioner.save(tmp_path)
    for damaged in ("5", "{", "null"):
        (tmp_path / "config.json").write_text(damaged)
        captioner.save(tmp_path)
    captioner.save(tmp_path)
    assert vlm.load(tmp_path).model.config == captioner.model.config
