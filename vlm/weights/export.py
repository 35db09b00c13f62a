"""Export of a Lakesight checkpoint to a folder that another library loads.

An export uses the same weight tables as an import, and converts tensors with the function `write` of each rule. The
export reads and converts the tensors of one rule at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from torch import Tensor

from vlm import text
from vlm.checkpoint import CONFIG, TOKENIZER, load_config
from vlm.config import Config, ModelConfig
from vlm.errors import CheckpointError
from vlm.files import read_json
from vlm.weights.config_fields import merge_settings
from vlm.weights.family import Family, Part
from vlm.weights.files import MAX_SHARD_BYTES, WeightFiles, write_weights
from vlm.weights.generation_keys import GENERATION, write_generation
from vlm.weights.load import in_published_part
from vlm.weights.picture_keys import PREPROCESSOR, write_pictures
from vlm.weights.plan import describe_names
from vlm.weights.rules import Rule, expand_rules
from vlm.weights.tables import families

IMAGE_MARKER = "<image>"
"""Token of published tokenizers that stands for a picture feature."""


class ExportReport(Config):
    """Result of an export.

    Attributes:
        part: which part of the model was exported (`model`, `encoder` or `decoder`).
        family: name of the weight family in whose format the part was written, such as `gemma`.
        folder: folder of the written files.
        files: names of the written files.
        tensors: number of tensors in the written files.
        left_out: number of parameter tensors of the checkpoint that do not belong to the exported part.
        without: name patterns of the tensors that the export leaves out, as a dict from the reason to the patterns. The
            other library's own files contain these tensors, but the other library can compute or initialise the tensors
            if they are missing.
        unwritten: settings of the model that the files cannot describe, as a dict from the reason to the settings.
    """

    part: Part
    family: str
    folder: str
    files: tuple[str, ...]
    tensors: int
    left_out: int
    without: dict[str, tuple[str, ...]]
    unwritten: dict[str, tuple[str, ...]]


def export_weights(
    checkpoint: Path, part: Part, family_name: str, out: Path, *, max_bytes: int = MAX_SHARD_BYTES
) -> ExportReport:
    """Write a part of a checkpoint to a folder in the format of another library.

    Args:
        checkpoint: folder of a checkpoint written by training or by an import.
        part: part of the model to export (`model`, `encoder` or `decoder`).
        family_name: name of the weight family whose format is written, such as `gemma`.
        out: folder to create and write to.
        max_bytes: maximum size of the tensors in a weight file, in bytes. Weights with more than `max_bytes` bytes are
            split into several files. The tensors of one rule stay in one file, even if these tensors have more than
            `max_bytes` bytes.

    Raises:
        CheckpointError: the checkpoint cannot be read, the family is unknown, or the family cannot represent the model
            (the error lists all mismatches). The error is also raised if the family has no tensor for a parameter, or
            if the model is a text-only model and `part` is not `decoder`.
    """
    config = load_config(checkpoint)
    if config.text_only and part != "decoder":
        raise CheckpointError(
            "a text-only model has only a decoder to export",
            where=str(checkpoint),
            got=f"--part {part}",
            fix="export the decoder: --part decoder",
        )
    family = _find_family(family_name, part, config, checkpoint)
    files = WeightFiles(checkpoint)
    ours = {name: header.shape for name, header in files.headers.items() if in_published_part(name, part)}
    table = family.table(config)
    rules = list(expand_rules(table.rules, ours))
    unmapped = set(ours) - {name for rule in rules for name in rule.ours}
    if unmapped:
        raise CheckpointError(
            f"{family.name} has no tensor for some parameters of this {part}",
            where=str(checkpoint),
            got=describe_names("no tensor for", unmapped, similar_to=()),
            fix="export another part of the model, or choose another family",
        )
    out.mkdir(parents=True, exist_ok=True)
    written = write_weights(out, _convert(files, rules), max_bytes)
    names, unwritten = _write_settings(config, family, checkpoint, files, out)
    drop_reasons = sorted({drop.reason for drop in table.drops})
    return ExportReport(
        part=part,
        family=family.name,
        folder=str(out),
        files=(*written, *names),
        tensors=sum(len(rule.theirs) for rule in rules),
        left_out=len(files.headers) - len(ours),
        without={reason: tuple(d.pattern for d in table.drops if d.reason == reason) for reason in drop_reasons},
        unwritten=unwritten,
    )


def _write_settings(
    config: ModelConfig, family: Family, checkpoint: Path, files: WeightFiles, out: Path
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Write the tokenizer and the settings of pictures, of generation and of the model.

    Returns:
        The names of the written files, and the settings that the files cannot describe, as a dict from the reason to
        the settings.
    """
    written: list[str] = []
    settings, unwritten = family.to_settings(config), dict(family.unwritten(config))
    if family.vocab_section is not None:
        rows = files.headers["decoder.tokens.weight"].shape[0]
        ids = _add_token_settings(settings, family, checkpoint, rows)
        written += _write_tokenizer(checkpoint, out)
        generation, reasons = write_generation(config.generation)
        written += _write_json(out / GENERATION, ids | generation)
        unwritten |= reasons
    if family.part != "decoder":
        pictures, reasons = write_pictures(config, family)
        written += _write_json(out / PREPROCESSOR, pictures)
        unwritten |= reasons
    return [*written, *_write_json(out / CONFIG, settings)], unwritten


def _write_json(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Write a JSON file unless the content is empty, and return a list with the name of the written file."""
    if not content:
        return []
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return [path.name]


def _find_family(name: str, part: Part, config: ModelConfig, checkpoint: Path) -> Family:
    candidates = [family for family in families() if family.part == part and family.exportable]
    family = next((family for family in candidates if family.name == name), None)
    if family is None:
        raise CheckpointError(
            f"--as names no model family in which a {part} can be exported",
            where="--as",
            got=name,
            fix="choose one of " + ", ".join(f.name for f in candidates),
        )
    mismatches = family.mismatches(config, family.to_settings(config), pictures=False)
    if mismatches:
        fitting = [
            other.name
            for other in candidates
            if not other.mismatches(config, other.to_settings(config), pictures=False)
        ]
        raise CheckpointError(
            f"model family {name} cannot represent this {part}",
            where=str(checkpoint),
            got=mismatches,
            fix=f"export it as {' or '.join(fitting)}" if fitting else f"no known family can represent this {part}",
        )
    return family


def _convert(files: WeightFiles, rules: list[Rule]) -> Iterator[Mapping[str, Tensor]]:
    """Convert the tensors of one rule at a time, and yield a dict from the other library's names to the tensors."""
    for rule in rules:
        yield dict(zip(rule.theirs, rule.write([files.read(name) for name in rule.ours]), strict=True))


def _add_token_settings(settings: dict[str, Any], family: Family, checkpoint: Path, rows: int) -> dict[str, int]:
    """Add the vocabulary size and the ids of the special tokens to the other library's settings. Return the ids."""
    tokenizer = text.load(checkpoint / TOKENIZER)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    section = {"vocab_size": rows, **ids}
    merge_settings(settings, {family.vocab_section: section} if family.vocab_section else section)
    if family.image_id_key:
        # Our models have no image token. The other library never reads the embedding of this token, so the embedding
        # table needs no row for the id of this token.
        published = _read_published_tokenizer(checkpoint)
        found = Backend.from_str(json.dumps(published["tokenizer"])).token_to_id(IMAGE_MARKER) if published else None
        settings[family.image_id_key] = rows if found is None else found
    return ids


def _write_tokenizer(checkpoint: Path, out: Path) -> list[str]:
    """Write the published tokenizer of a checkpoint, and return the names of the written files.

    Any other kind of tokenizer is not written, because its special tokens have no text form.
    """
    published = _read_published_tokenizer(checkpoint)
    if not published:
        return []
    tokens = {f"{key}_token": published[key] for key in ("bos", "eos", "pad")}
    for name, content in (
        (TOKENIZER, published["tokenizer"]),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}),
    ):
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return [TOKENIZER, "tokenizer_config.json"]


def _read_published_tokenizer(checkpoint: Path) -> dict[str, Any] | None:
    content: dict[str, Any] = read_json(checkpoint / TOKENIZER)
    return content if content["kind"] == "json" else None
