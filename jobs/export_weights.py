"""`lakesight export-weights`: a checkpoint as a folder that another library loads. No Spark, no run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.common import JsonOption, open_screen
from jobs.import_weights import OutOption, check_new
from pipelines.errors import UserError
from vlm.errors import CheckpointError


def export_weights(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    *,
    part: Annotated[Literal["model", "encoder", "decoder"], typer.Option("--part", help="What of it to write.")],
    family: Annotated[str, typer.Option("--as", help="Whose names and config to write.", metavar="FAMILY")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint, or a part of one, as another library publishes it (config.json and safetensors).

    \b
    Example:
      lakesight export-weights weights/vit_gpt2 --part decoder --as gpt2 --out exported/gpt2
    """
    from vlm.weights.export import export_weights as write

    with open_screen(as_json=as_json) as screen:
        check_new(out)
        try:
            report = write(checkpoint, part, family, out)
        except CheckpointError as error:
            raise UserError(error.what, where=error.where, got=error.got, fix=error.fix) from None
        screen.line(report.part, f"{report.tensors} tensors in {report.folder} ({report.family})")
        screen.line("files", ", ".join(report.files))
        for reason, names in report.without.items():
            screen.line("without", f"{', '.join(names)}: {reason}")
        screen.report(report)
        back = ["lakesight", "import-weights", "--model", "NAME", "--out", "FOLDER"]
        back += [str(out)] if part == "model" else [f"--{part}", str(out)]
        screen.line("next", f"load it there, or bring it back: {shlex.join(back)}")
