"""From a Lakesight checkpoint to a folder that another library loads: the same tables, the other way round.

Tensors go from file to file, one rule at a time.
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
from vlm.weights.facts import merge
from vlm.weights.family import Family, Part, families
from vlm.weights.files import MAX_SHARD_BYTES, WeightFiles, write_weights
from vlm.weights.load import belongs
from vlm.weights.plan import told
from vlm.weights.rules import Rule, expand

MARK = "<image>"
"""What published tokenizers call a picture's place."""


class ExportReport(Config):
    """What was written.

    Attributes:
        part: of the model.
        family: it was written as.
        folder: it lies in.
        files: names in it.
        tensors: in the other library's names.
        left_out: parameters of the checkpoint that are of other parts.
        without: why, and the names that the other library's own files have besides: it makes them anew, or fresh.
    """

    part: Part
    family: str
    folder: str
    files: tuple[str, ...]
    tensors: int
    left_out: int
    without: dict[str, tuple[str, ...]]


def export_weights(
    checkpoint: Path, part: Part, family_name: str, out: Path, *, max_bytes: int = MAX_SHARD_BYTES
) -> ExportReport:
    """Write a part of a checkpoint as another library's folder.

    Args:
        checkpoint: a folder written by training or by an import.
        part: `model`, `encoder` or `decoder`.
        family_name: whose names and config to write.
        out: a folder; it is created.
        max_bytes: weights above this are written in shards.

    Raises:
        CheckpointError: no such family, or it has no place for something the model has; lists all of it.
    """
    config = load_config(checkpoint)
    family = _family(family_name, part, config, checkpoint)
    files = WeightFiles(checkpoint)
    ours = {name: header.shape for name, header in files.headers.items() if belongs(name, part)}
    table = family.table(config)
    rules = list(expand(table.rules, ours))
    homeless = set(ours) - {name for rule in rules for name in rule.ours}
    if homeless:
        raise CheckpointError(
            f"{family.name} has no place for parameters of this {part}",
            where=str(checkpoint),
            got="; ".join(told("without a place", homeless, near=())),
            fix="export another part, or as another family",
        )
    out.mkdir(parents=True, exist_ok=True)
    written = write_weights(out, _pieces(files, rules), max_bytes)
    settings = family.to_settings(config)
    if family.text is not None:
        rows = files.headers["decoder.tokens.weight"].shape[0]
        _merge_text(settings, family, checkpoint, rows)
        written += _write_tokenizer(checkpoint, out)
    (out / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    reasons = sorted({drop.reason for drop in table.drops})
    return ExportReport(
        part=part,
        family=family.name,
        folder=str(out),
        files=(*written, CONFIG),
        tensors=sum(len(rule.theirs) for rule in rules),
        left_out=len(files.headers) - len(ours),
        without={why: tuple(drop.pattern for drop in table.drops if drop.reason == why) for why in reasons},
    )


def _family(name: str, part: Part, config: ModelConfig, checkpoint: Path) -> Family:
    candidates = [family for family in families() if family.part == part]
    family = next((family for family in candidates if family.name == name), None)
    if family is None:
        raise CheckpointError(
            f"there is no family of that name to write the {part} as",
            where="--as",
            got=name,
            fix="one of " + ", ".join(f.name for f in candidates),
        )
    differ = family.disagreements(config, family.to_settings(config))
    if differ:
        fits = [other.name for other in candidates if not other.disagreements(config, other.to_settings(config))]
        raise CheckpointError(
            f"{name} cannot express this {part}",
            where=str(checkpoint),
            got="; ".join(differ),
            fix=f"export it as {' or '.join(fits)}" if fits else "no family that is known can",
        )
    return family


def _pieces(files: WeightFiles, rules: list[Rule]) -> Iterator[Mapping[str, Tensor]]:
    """A few tensors of theirs at a time."""
    for rule in rules:
        yield dict(zip(rule.theirs, rule.write([files.read(name) for name in rule.ours]), strict=True))


def _merge_text(settings: dict[str, Any], family: Family, checkpoint: Path, rows: int) -> None:
    """What the other library has to know of the tokens."""
    tokenizer = text.load(checkpoint / TOKENIZER)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    section = {"vocab_size": rows, **ids}
    merge(settings, {family.text: section} if family.text else section)
    if family.image_key:
        # No token of ours marks a picture. Theirs may stand behind the table's last row: it is never looked up.
        named = _published(checkpoint)
        found = Backend.from_str(json.dumps(named["tokenizer"])).token_to_id(MARK) if named else None
        settings[family.image_key] = rows if found is None else found


def _write_tokenizer(checkpoint: Path, out: Path) -> list[str]:
    """A published tokenizer goes back as it came; ours, whose special tokens have no spelling, stays."""
    named = _published(checkpoint)
    if not named:
        return []
    tokens = {f"{key}_token": named[key] for key in ("bos", "eos", "pad")}
    for name, content in (
        (TOKENIZER, named["tokenizer"]),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}),
    ):
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return [TOKENIZER, "tokenizer_config.json"]


def _published(checkpoint: Path) -> dict[str, Any] | None:
    content: dict[str, Any] = json.loads((checkpoint / TOKENIZER).read_text(encoding="utf-8"))
    return content if content["kind"] == "json" else None
