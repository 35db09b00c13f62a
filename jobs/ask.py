"""`lakesight ask`: caption pictures or answer a question, and print the answer while the model generates it. With beam
search, the answer is printed at the end. The command needs no Spark.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import vlm
from jobs.common import (
    Job,
    JsonOption,
    PlatformOption,
    PrecisionOption,
    PromptOption,
    RunOption,
    SetOption,
    open_job,
    refuse_options,
)
from jobs.evaluate import open_model
from jobs.generation_options import with_generation_options
from jobs.regions import FoundRegion, check_drawing_path, draw_regions, find_regions
from jobs.settings_of_version import decoding_settings
from pipelines.config import LimitsConfig
from pipelines.errors import StageFailed, UserError
from pipelines.executor.crash_guard import Death, run_guarded
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit
from pipelines.pages.attention import draw_attention
from vlm.config import Config, GenerationConfig, Precision
from vlm.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm.captioner import Captioner
    from vlm.generation.generate import Completion, Request


OptionalVersion = Annotated[
    str | None,
    typer.Option(
        "--version", help="Model version: a number, an alias, or latest. Default: champion.", metavar="VERSION"
    ),
]


class AskReport(Config):
    """Report of `lakesight ask`.

    Attributes:
        images: paths of the picture files, in the order in which the model reads the pictures.
        model: name and version of the model, or path of its checkpoint folder.
        prompt: question about the pictures; empty if the model was asked for a caption.
        precision: number format of the model's weights, for example bf16.
        caption: the model's answer.
        num_tokens: number of tokens in the answer.
        regions: regions (boxes) in the answer; always empty if the command got no picture or several pictures.
        drawn: path of the written picture file, which shows the regions; null if no file was written.
        attention: path of the written picture file, which shows the attention of each word; null if no file was
            written.
    """

    images: tuple[str, ...]
    model: str
    prompt: str
    precision: Precision
    caption: str
    num_tokens: int
    regions: tuple[FoundRegion, ...]
    drawn: str | None
    attention: str | None


@with_generation_options
def ask(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Picture files, in order. Without a file, the model sees only --prompt.", metavar="FILE"),
    ] = None,
    *,
    prompt: PromptOption = "",
    draw: Annotated[
        Path | None,
        typer.Option("--draw", help="Save the picture with the answer's boxes to this file.", metavar="FILE"),
    ] = None,
    attention: Annotated[
        Path | None,
        typer.Option("--attention", help="Save a drawing of the attention for each word to this file.", metavar="FILE"),
    ] = None,
    version: OptionalVersion = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Use this checkpoint folder, not a model version.", metavar="FOLDER"),
    ] = None,
    precision: PrecisionOption = Precision.FP32,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption a picture, or ask a question about pictures.

    \b
    Examples:
      lakesight ask cat.png
      lakesight ask cat.png --run demo --version 3 --precision bf16
      lakesight ask cat.png --checkpoint weights/paligemma
      lakesight ask before.png after.png --prompt "what has changed?"
      lakesight ask cat.png --prompt "detect cat" --draw boxes.png
      lakesight ask cat.png --attention words.png --num-beams 4
    """
    files = images or []
    refuse_options({"--version": checkpoint and version}, "--checkpoint names the folder of the model")
    with open_job(run, platform, overrides, as_json, uses_version=True) as job:
        _check_question(files, prompt, {"--draw": draw, "--attention": attention})
        pictures = [read_picture(job, file) for file in files]
        folder, name = (checkpoint, str(checkpoint)) if checkpoint else _model_folder(job, version or "champion")
        captioner = load_checkpoint(folder, precision)
        settings = decoding_settings(job, captioner.model.config, name)
        request = captioner.request(pictures, prompt)
        answer = stream_answer(job, captioner, request, settings)
        drawings = _draw(job, captioner, pictures, request, answer, draw=draw, attention=attention)
        report = AskReport(
            images=tuple(str(file) for file in files),
            model=name,
            prompt=prompt,
            precision=precision,
            caption=answer.text,
            num_tokens=len(answer.tokens),
            **drawings,
        )
        job.output.report(report)
    _require_drawings(report, draw=draw, attention=attention)


def _draw(
    job: Job,
    captioner: Captioner,
    pictures: Sequence[Image],
    request: Request,
    answer: Completion,
    *,
    draw: Path | None,
    attention: Path | None,
) -> dict[str, Any]:
    """Find the regions of an answer, write the drawings, and return the report fields for regions and drawings."""
    image = captioner.model.config.image
    regions = find_regions(answer.text, pictures[0], image) if len(pictures) == 1 else ()
    drawn = looked = None
    if draw and regions:
        drawn = _save(job, "drawn", draw, draw_regions(pictures[0], regions))
    if attention and answer.text.split():
        from vlm.generation.attention_maps import attention_maps

        maps = attention_maps(captioner.model, captioner.tokenizer, request, answer)
        looked = _save(job, "attention", attention, draw_attention(pictures[0], image, maps))
    return {"regions": regions, "drawn": drawn, "attention": looked}


def _save(job: Job, label: str, path: Path, picture: Image) -> str:
    picture.save(path)
    job.output.line(label, str(path))
    return str(path)


def _require_drawings(report: AskReport, *, draw: Path | None, attention: Path | None) -> None:
    """Check that each requested drawing was made.

    Raises:
        StageFailed: --draw was given but the answer has no box, or --attention was given but the answer has no word.
    """
    if draw and not report.drawn:
        raise StageFailed(
            "the answer contains no region (box), so --draw drew nothing",
            where=report.images[0],
            got=report.caption,
            fix="use a model that was trained to detect objects, and a prompt like its training prompts, such as "
            "--prompt 'detect cat'",
        )
    if attention and not report.attention:
        raise StageFailed(
            "the answer has no word, so --attention drew nothing",
            where=report.images[0],
            got=repr(report.caption),
            fix="ask another question, or use a model that captions this picture",
        )


def _check_question(files: Sequence[Path], prompt: str, drawings: Mapping[str, Path | None]) -> None:
    """Check the arguments before the model is loaded.

    Raises:
        UserError: there is neither a picture nor a prompt, or a drawing cannot be made.
    """
    if not files and not prompt:
        raise UserError(
            "there is nothing to ask the model",
            got="neither a picture nor a prompt",
            fix="give the path of a picture file, or add --prompt TEXT",
        )
    for option, path in drawings.items():
        if path is None:
            continue
        if len(files) != 1:
            raise UserError(
                f"{option} can draw only on a single picture",
                where=f"{option} {path}",
                got=f"{len(files)} pictures",
                fix=f"give exactly one picture, or omit {option}",
            )
        check_drawing_path(path)


def read_picture(job: Job, path: Path) -> Image:
    """Read a picture file and check the picture against the run's limits for ingested pictures.

    A child process decodes the picture, so that a crash or an endless loop of the decoder becomes an error.

    Raises:
        UserError: the file is missing, is not a picture, or exceeds the limits.
    """
    from PIL import Image

    limits = job.config.data.limits
    if address := re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/(.*)", str(path)):  # `Path` replaces the :// of a URL by :/
        raise _unusable(
            "read", f"{address[1]}://{address[2]}", "a URL", "download the picture, and give the path of the file"
        )
    try:
        [picture] = run_guarded([_read_file(path, limits.max_bytes)], partial(_decode, limits=limits), _raise_death)
    except OSError as error:
        raise _unusable("read", path, str(error.strerror or error), "give the path of a picture file") from None
    except ImageError as error:
        raise _unusable("used", path, f"{error.reason}: {error.detail}", "use a PNG or JPEG file") from None
    return Image.frombytes("RGB", *picture)


def _unusable(verb: str, path: Path | str, got: str, fix: str) -> UserError:
    return UserError(f"the picture cannot be {verb}", where=str(path), got=got, fix=fix)


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of limited size. Devices, pipes and folders are never opened, because reading a device or a
    pipe might never end.

    Raises:
        OSError: the file cannot be opened or is not a regular file.
        ImageError: the file is larger than `max_bytes`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("a folder" if path.is_dir() else "a device or pipe, whose data may never end")
    # Some files below /proc have size 0, and a read would wait for data. With O_NONBLOCK, `read` does not wait, but
    # returns None.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = (file.read(max_bytes + 1) if size <= max_bytes else None) or b""
    if max(size, len(data)) > max_bytes:
        raise ImageError("too_large", f"{max(size, len(data))} bytes; at most {max_bytes} are allowed")
    return data


def _decode(data: bytes, limits: LimitsConfig) -> tuple[tuple[int, int], bytes]:
    """Return the size and the RGB pixels of a picture."""
    from vlm.image import open_image

    try:
        with time_limit(limits.max_decode_seconds):
            image, _ = open_image(data, max_pixels=limits.max_pixels, min_side=limits.min_side)
    except TimeLimitExceeded:
        raise ImageError("decode_timeout", f"decoding takes more than {limits.max_decode_seconds:g} seconds") from None
    return image.size, image.tobytes()


def _raise_death(_: bytes, death: Death) -> tuple[tuple[int, int], bytes]:
    raise ImageError(
        "decode_timeout" if death.timed_out else "decoder_crash", f"the process that decodes the picture {death.how}"
    )


def _model_folder(job: Job, which: str) -> tuple[Path, str]:
    model = open_model(job, which)
    return model.folder, f"{model.name}/{model.version}"


def load_checkpoint(folder: Path, precision: Precision) -> Captioner:
    """Load the model of a folder onto the GPU, or onto the CPU if there is no GPU.

    Raises:
        UserError: the folder contains no model, the model's files are damaged, or the precision needs a library that is
            not installed.
    """
    with garbage_collection_paused():
        importlib.import_module("vlm.captioner")
    try:
        return vlm.load(folder, precision=precision)
    except CheckpointError as error:
        raise UserError(error.what, where=error.where, got=error.problems, fix=error.fix) from None


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collection while the block imports torch.

    The import creates hundreds of thousands of objects that stay in use. The search for garbage among these objects
    takes about a seventh of the processor time of the import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def stream_answer(job: Job, captioner: Captioner, request: Request, settings: GenerationConfig) -> Completion:
    """Generate an answer, print each new part of its text, and return the answer.

    Raises:
        UserError: the pictures, the prompt and `max_new_tokens` do not fit into the model's context, or the model
            computes NaN or infinite values.
    """
    from vlm.generation.generate import Completion, stream

    answer, shown = Completion(), ""
    for answer in stream(captioner.model, captioner.tokenizer, request, settings):
        job.output.text(answer.text[len(shown) :], end="")
        shown = answer.text
    job.output.text("")
    return answer
