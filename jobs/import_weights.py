"""`lakesight import-weights`: make a checkpoint from published weights. The command needs
neither Spark nor a run config. A repeated command finds the finished checkpoint and reads no tensor.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import JsonOption, SetOption, open_output
from jobs.import_record import (
    ImportRecord,
    ImportRequest,
    checkpoint_digests,
    describe_import,
    read_record,
    write_record,
)
from jobs.output import CommandOutput
from jobs.progress import show_elapsed
from pipelines.config import load_model
from pipelines.errors import UserError
from vlm.config import ModelConfig
from vlm.errors import CheckpointError

if TYPE_CHECKING:
    from vlm.text import Tokenizer
    from vlm.weights.family import Part
    from vlm.weights.load import ImportReport

OutOption = Annotated[Path, typer.Option("--out", help="Output folder, which must be new or empty.", metavar="FOLDER")]


def import_weights(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder with the published weights of the whole model.", metavar="FOLDER")
    ] = None,
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Name of a model, which is a file name in conf/model/ without .yml.", metavar="NAME"
        ),
    ],
    out: OutOption,
    encoder: Annotated[
        Path | None,
        typer.Option("--encoder", help="Folder with the published weights of the encoder.", metavar="FOLDER"),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(
            "--decoder", help="Folder with the published weights of the decoder (language model).", metavar="FOLDER"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**63 - 1,
            help="Random seed for the weights that are in none of the folders.",
            metavar="N",
        ),
    ] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a checkpoint from published weights.

    The command reads config.json and safetensors files of another library. The files are in one folder with the whole
    model, or in separate folders with the encoder and the decoder. One of the two separate folders is enough.
    Weights that are in none of the folders are initialised at random. If the output folder already has the unchanged
    checkpoint of the same import, the command only prints the report again.

    \b
    Examples:
      lakesight import-weights paligemma-3b-pt-224 --model paligemma \\
        --out weights/paligemma
      lakesight import-weights --model vit_gpt2 --encoder vit_mediumd \\
        --decoder gpt2 --out weights/vit_gpt2
    """
    with open_output(as_json=as_json) as output:
        parts: dict[Part, Path | None] = {"model": folder, "encoder": encoder, "decoder": decoder}
        folders = {part: path for part, path in parts.items() if path is not None}
        _check_parts(folders)
        report, tokens = _import_once(load_model(model, overrides or ()), folders, out, seed)
        _print_report(output, report, tokens)
        output.report(report)
        output.next(shlex.join(_next_command(out, report)))


def _next_command(out: Path, report: ImportReport) -> list[str]:
    """Return a command that uses the imported checkpoint. A model with random parameters must first be trained."""
    if not report.fresh:
        return ["lakesight", "ask", "PICTURE", "--checkpoint", str(out)]
    stages = f'[{{steps: 1000, groups: [{{pattern: "{_pattern(report.fresh)}", lr: 1e-3}}]}}]'
    settings = [f"train.start_from={out}", "train.steps=1000", f"train.stages={stages}"]
    return ["lakesight", "train", "--run", "RUN", *(word for each in settings for word in ("--set", each))]


def _pattern(names: Iterable[str]) -> str:
    """Return a pattern that matches the parameters of an import report: the whole encoder or projector, or parameters
    of the decoder without the numbers of their blocks.
    """
    parts = (name if name.startswith("decoder.") else name.partition(".")[0] + ".*" for name in names)
    return "|".join(dict.fromkeys(re.sub(r"\{[^}]*\}", ".*", part) for part in parts))


def _check_parts(folders: dict[Part, Path]) -> None:
    if not folders or ("model" in folders and len(folders) > 1):
        raise UserError(
            "import-weights needs one folder with the whole model, or folders with its encoder and decoder",
            got="a folder with the whole model and a folder with a part" if folders else "no folder",
            fix="give one folder with the whole model, or use --encoder, --decoder or both",
        )
    for part, path in folders.items():
        if not path.is_dir():
            where = "the folder of the whole model" if part == "model" else f"--{part}"
            raise UserError("the folder does not exist", where=where, got=str(path), fix="name an existing folder")


def _import_once(
    config: ModelConfig, folders: dict[Part, Path], out: Path, seed: int
) -> tuple[ImportReport, tuple[str, ...]]:
    """Import the weights, unless the output folder already has the checkpoint of this import.

    If the folder has the record of an interrupted import of the same weights, or a file of the finished checkpoint is
    missing, the import is repeated. A folder with any other content is an error.

    Returns:
        The report of the import, and the files and keys whose start or end token was compared with the tokenizer.
    """
    with show_elapsed("reading files"):
        request = describe_import(config, folders, seed)
    record = read_record(out)
    if record is None or not request.is_recorded_as(record.request):
        check_output_folder(out)
    elif record.report is not None and _is_intact(out, record):
        from vlm.weights.load import ImportReport

        return ImportReport.model_validate(record.report), record.tokens
    report, tokens = _write_checkpoint(config, folders, out, request)
    with show_elapsed("hashing the checkpoint"):
        digests = checkpoint_digests(out)
    write_record(
        out, ImportRecord(request=request, tokens=tokens, report=report.model_dump(mode="json"), files=digests)
    )
    return report, tokens


def _is_intact(out: Path, record: ImportRecord) -> bool:
    """Return whether the checkpoint of a finished import has all its files.

    Raises:
        UserError: a file of the checkpoint has changed since the import, for example because of an incomplete copy.
    """
    with show_elapsed("checking the checkpoint"):
        changed = record.changed(out)
    if changed:
        raise UserError(
            "the checkpoint in the output folder has changed since it was imported",
            where=str(out),
            got=", ".join(changed),
            fix="remove this folder to import the weights again, or choose a new folder with --out",
        )
    return not record.missing(out)


def check_output_folder(out: Path) -> None:
    """Check that the output folder is new or empty, so that nothing is overwritten.

    Raises:
        UserError: the path `out` is a file or a folder that is not empty.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(
            "the output folder is not empty",
            where=str(out),
            fix="choose a new folder with --out, or remove this folder",
        )


def _write_checkpoint(
    config: ModelConfig, folders: dict[Part, Path], out: Path, request: ImportRequest
) -> tuple[ImportReport, tuple[str, ...]]:
    """Write the checkpoint. Return the report, and the files and keys whose start or end token was compared with the
    tokenizer.
    """
    from vlm.checkpoint import save_model
    from vlm.weights.load import import_weights as load_weights
    from vlm.weights.special_tokens import check_special_tokens

    try:
        tokenizer = _build_tokenizer(config, folders)
        reads_text = [path for part, path in folders.items() if part != "encoder"]
        tokens = [key for path in reads_text for key in check_special_tokens(path, tokenizer)]
        with show_elapsed("reading weights"):
            model, report = load_weights(config, tokenizer.vocab_size, folders, seed=request.seed)
    except CheckpointError as error:
        raise UserError(error.what, where=error.where, got=error.problems, fix=error.fix) from None
    write_record(out, ImportRecord(request=request))
    save_model(out, model, tokenizer)
    return report, tuple(tokens)


def _build_tokenizer(config: ModelConfig, folders: dict[Part, Path]) -> Tokenizer:
    """Build the model's tokenizer.

    A tokenizer of kind `json` is read from `model.text.path`, by default from the `tokenizer.json` next to the weights
    of the decoder or of the whole model.

    Raises:
        UserError: the model's tokenizer must be learned from training texts, and an import has no training texts.
    """
    from vlm import text
    from vlm.weights.special_tokens import read_tokenizer

    source = next((part for part in ("decoder", "model") if part in folders), None)
    if config.text.kind == "json" and source is not None:
        return read_tokenizer(config.text, folders[source], source)
    if config.text.kind in {"bpe", "words"}:
        raise UserError(
            "the model learns its tokenizer from training texts, but an import has no training texts",
            where="model.text.kind",
            got=config.text.kind,
            fix="choose a model config whose text.kind is json or chars",
        )
    return text.learn(config.text, ())


def _print_report(output: CommandOutput, report: ImportReport, tokens: tuple[str, ...]) -> None:
    for part in report.parts:
        output.line(part.part, f"{part.used} tensors of {part.folder} ({part.family})")
        output.line("  compared", f"config.json: {', '.join(part.compared) or 'no key'}")
        for reason, keys in part.without_effect.items():
            output.line("  not used", f"config.json: {', '.join(keys)}: {reason}")
        for file in part.files:
            output.line("  compared", f"{file.file}: {', '.join(file.used) or 'no key'}")
            for reason, keys in file.without_effect.items():
                output.line("  not used", f"{file.file}: {', '.join(keys)}: {reason}")
        for reason, names in part.dropped.items():
            output.line("  dropped", f"{', '.join(names)}: {reason}")
        for label, names in (
            ("  tied", part.tied),
            ("  resampled", part.resampled),
            ("  unchecked", part.unchecked),
            ("  ignored", part.ignored),
        ):
            if names:
                output.line(label, ", ".join(names))
    if tokens:
        output.line("tokens", f"the tokenizer has the same start and end tokens as {', '.join(tokens)}")
    if report.fresh:
        output.line("fresh", ", ".join(report.fresh))
    output.line("model", f"{report.parameters:,} parameters")
