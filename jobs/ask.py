"""`lakesight ask`: a caption of one picture, printed as it is generated. No Spark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption, open_model
from pipelines.errors import UserError
from vlm.config import Config
from vlm.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image


class Answer(Config):
    """What the model said about a picture."""

    image: str
    model: str
    prompt: str
    caption: str
    num_tokens: int


def ask(
    image: Annotated[Path, typer.Argument(help="A picture file.")],
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="A question; empty asks for a caption.")] = "",
    version: VersionOption = "champion",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint folder instead of a version.")
    ] = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption one picture.

    \b
    Examples:
      lakesight ask cat.png
      lakesight ask cat.png --run demo --version 3
      lakesight ask cat.png --checkpoint .lakesight/runs/demo-0123/checkpoints/step_001200
    """
    with open_job(run, platform, overrides, as_json) as job:
        picture = read_picture(job, image)
        folder, name = (checkpoint, str(checkpoint)) if checkpoint else _model_folder(job, version)
        answer = stream_answer(job, picture, folder, prompt)
        job.screen.report(Answer(image=str(image), model=name, prompt=prompt, caption=answer[0], num_tokens=answer[1]))


def read_picture(job: Job, path: Path) -> Image:
    """The picture, under the same limits as an ingested one.

    Raises:
        UserError: the file is missing, or is no picture that can be used.
    """
    from vlm.image import open_image

    limits = job.config.data.limits
    try:
        return open_image(path.read_bytes(), max_pixels=limits.max_pixels, min_side=limits.min_side)[0]
    except OSError as error:
        raise UserError(
            "the picture cannot be read", where=str(path), got=str(error.strerror or error), fix="name a picture file"
        ) from None
    except ImageError as error:
        raise UserError(
            "the picture cannot be used",
            where=str(path),
            got=f"{error.reason}: {error.detail}",
            fix="name a PNG or JPEG file",
        ) from None


def _model_folder(job: Job, which: str) -> tuple[Path, str]:
    model = open_model(job, which)
    return model.folder, f"{model.name}/{model.version}"


def stream_answer(job: Job, picture: Image, folder: Path, prompt: str) -> tuple[str, int]:
    """Print the answer token by token; returns the whole of it and its number of tokens.

    Raises:
        UserError: the folder holds no model.
    """
    import torch

    from vlm.checkpoint import load_model
    from vlm.generate import Request, stream
    from vlm.image import to_pixels
    from vlm.text.prompt import prefix_ids

    try:
        model, tokenizer = load_model(folder)
    except CheckpointError as error:
        raise UserError(error.what, where=error.where, got=error.got, fix=error.fix) from None
    pixels = torch.from_numpy(to_pixels(picture, model.config.image))
    request = Request(prefix_ids(tokenizer, model.config.num_slots, prompt), (pixels,))
    ids: list[int] = []
    shown = ""
    for token in stream(model, tokenizer, request, model.config.generation):
        ids.append(token)
        # A token may end in the middle of a character; it is shown once its other bytes are there.
        text = tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        job.screen.text(text[len(shown) :], end="")
        shown = text
    caption = tokenizer.decode(ids)
    job.screen.text(caption[len(shown) :])
    return caption, len(ids)
