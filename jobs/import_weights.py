"""`lakesight import-weights`: a checkpoint from published weights. No Spark, no run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import JsonOption, SetOption, open_screen
from jobs.progress import waiting
from jobs.screen import Screen
from pipelines.config import load_model
from pipelines.errors import UserError
from vlm.config import ModelConfig
from vlm.errors import CheckpointError

if TYPE_CHECKING:
    from vlm.text import Tokenizer
    from vlm.weights.family import Part
    from vlm.weights.load import ImportReport

OutOption = Annotated[Path, typer.Option("--out", help="A folder to write; it must be new or empty.")]


def import_weights(
    folder: Annotated[Path | None, typer.Argument(help="A published folder that holds all of the model.")] = None,
    *,
    model: Annotated[str, typer.Option("--model", help="Which model: a file of conf/model/.", metavar="NAME")],
    out: OutOption,
    encoder: Annotated[Path | None, typer.Option("--encoder", help="A published folder for the encoder.")] = None,
    decoder: Annotated[Path | None, typer.Option("--decoder", help="A published folder for the decoder.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights that no folder has.")] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a checkpoint from weights that another library published (config.json and safetensors).

    \b
    Examples:
      lakesight import-weights paligemma-3b-pt-224 --model paligemma --out weights/paligemma
      lakesight import-weights --model vit_gpt2 --encoder vit_mediumd --decoder gpt2 --out weights/vit_gpt2
    """
    with open_screen(as_json=as_json) as screen:
        parts: dict[Part, Path | None] = {"model": folder, "encoder": encoder, "decoder": decoder}
        folders = {part: path for part, path in parts.items() if path is not None}
        _check_parts(folders)
        check_new(out)
        config = load_model(model, overrides or ())
        report = _write(config, folders, out, seed)
        _show(screen, report)
        screen.report(report)
        screen.line("next", shlex.join(["lakesight", "ask", "PICTURE", "--checkpoint", str(out)]))


def _check_parts(folders: dict[Part, Path]) -> None:
    if not folders or ("model" in folders and len(folders) > 1):
        raise UserError(
            "the weights to import are not clear",
            got="a folder for the whole model beside one for a part" if folders else "no folder",
            fix="name one folder for the whole model, or --encoder, or --decoder, or both of these",
        )
    for part, path in folders.items():
        if not path.is_dir():
            where = "the folder of the whole model" if part == "model" else f"--{part}"
            raise UserError("there is no such folder", where=where, got=str(path), fix="name a folder as published")


def check_new(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        UserError: there is something at `out`.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError("the folder to write is not empty", where=str(out), fix="name a new folder, or remove this one")


def _write(config: ModelConfig, folders: dict[Part, Path], out: Path, seed: int) -> ImportReport:
    from vlm.checkpoint import save_model
    from vlm.weights.load import import_weights as load

    tokenizer = _tokenizer(config, folders)
    try:
        with waiting("reading weights"):
            model, report = load(config, tokenizer.vocab_size, folders, seed=seed)
    except CheckpointError as error:
        raise UserError(error.what, where=error.where, got=error.got, fix=error.fix) from None
    save_model(out, model, tokenizer)
    return report


def _tokenizer(config: ModelConfig, folders: dict[Part, Path]) -> Tokenizer:
    """The tokenizer published beside the decoder, where the model takes a published one and none is named."""
    from vlm import text

    source = folders.get("decoder", folders.get("model"))
    if config.text.kind == "json" and not config.text.path and source is not None:
        return text.learn(config.text.model_copy(update={"path": str(source / "tokenizer.json")}), ())
    if config.text.kind == "bpe":
        raise UserError(
            "the model learns its tokens from training texts, which an import does not have",
            where="model.text.kind",
            got="bpe",
            fix="choose a model with text.kind json or chars",
        )
    return text.learn(config.text, ())


def _show(screen: Screen, report: ImportReport) -> None:
    for part in report.parts:
        screen.line(part.part, f"{part.used} tensors of {part.folder} ({part.family})")
        for reason, names in part.dropped.items():
            screen.line("  dropped", f"{', '.join(names)}: {reason}")
        for label, names in (("  tied", part.tied), ("  resampled", part.resampled), ("  unchecked", part.unchecked)):
            if names:
                screen.line(label, ", ".join(names))
    if report.fresh:
        screen.line("fresh", ", ".join(report.fresh))
    screen.line("model", f"{report.parameters:,} parameters")
