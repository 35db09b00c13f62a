"""`lakesight export-weights`: write a checkpoint in the format of another library. The command
needs neither Spark nor a run config.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.common import JsonOption, open_output
from jobs.import_weights import OutOption, check_output_folder
from pipelines.errors import UserError
from vlm.errors import CheckpointError


def export_weights(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", metavar="CHECKPOINT")],
    *,
    part: Annotated[Literal["model", "encoder", "decoder"], typer.Option("--part", help="Part of the model to write.")],
    family: Annotated[
        str,
        typer.Option(
            "--as", help="Model family in whose format the weights are written, such as gpt2.", metavar="FAMILY"
        ),
    ],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in the format of another library.

    The command writes the whole model, only the encoder, or only the decoder as config.json and safetensors files.

    \b
    Example:
      lakesight export-weights weights/vit_gpt2 --part decoder --as gpt2 \\
        --out exported/gpt2
    """
    from vlm.weights.export import export_weights as write_weights

    with open_output(as_json=as_json) as output:
        check_output_folder(out)
        try:
            report = write_weights(checkpoint, part, family, out)
        except CheckpointError as error:
            raise UserError(error.what, where=error.where, got=error.problems, fix=error.fix) from None
        output.line(report.part, f"{report.tensors} tensors in {report.folder} ({report.family})")
        output.line("files", ", ".join(report.files))
        for reason, names in report.without.items():
            output.line("without", f"{', '.join(names)}: {reason}")
        for reason, names in report.unwritten.items():
            output.line("not written", f"{', '.join(names)}: {reason}")
        output.report(report)
        import_command = ["lakesight", "import-weights", "--model", "NAME", "--out", "FOLDER"]
        import_command += [str(out)] if part == "model" else [f"--{part}", str(out)]
        output.line("", "load these files with the other library, or import them again:")
        output.next(shlex.join(import_command))
