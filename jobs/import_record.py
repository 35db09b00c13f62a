"""Record of an import of published weights. The record tells a repeated `import-weights` that the work is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, JsonValue, ValidationError

from pipelines.errors import UserError
from vlm.config import Config, JsonTextConfig, ModelConfig
from vlm.files import IMPORT_RECORD, atomic_write, file_digest

if TYPE_CHECKING:
    from vlm.weights.family import Part

SOURCES = ("*.json", "*.safetensors")
"""Name patterns of the files that an import reads."""
FILES = ("model.safetensors", "config.json", "tokenizer.json")
"""Names of the files of a checkpoint, which an import writes."""
TOKENIZER = "tokenizer"
"""Key in `ImportRequest.sources` of a tokenizer file outside the imported folders."""


class ImportRequest(Config):
    """Request for an import: everything that determines the contents of the checkpoint.

    Attributes:
        model: config of the model.
        sources: for each imported part (such as `encoder`), a dict from the name of a file in the part's folder to the
            file's SHA-256. The key TOKENIZER has such a dict for the file `model.text.path`, if the file is in none of
            the folders.
        seed: random seed for initialising the weights that no folder contains.
    """

    model: ModelConfig
    sources: dict[str, dict[str, str]]
    seed: int

    def is_recorded_as(self, recorded: ImportRequest) -> bool:
        """Return whether a record describes this request. Records of earlier releases lack the digest of a tokenizer
        outside the folders."""
        if TOKENIZER in recorded.sources or TOKENIZER not in self.sources:
            return recorded == self
        sources = {part: digests for part, digests in self.sources.items() if part != TOKENIZER}
        return recorded == self.model_copy(update={"sources": sources})


class ImportRecord(Config):
    """Record of the import that has written, or is writing, the checkpoint in the same folder.

    Attributes:
        request: published files that were imported, and the model config and seed of the import.
        tokens: files and keys whose start or end token was compared with the tokenizer, such as `config.json:
            eos_token_id`.
        report: report of the import; null while the checkpoint is not complete.
        files: dict from the name of each file of the checkpoint to the file's SHA-256. Records of earlier releases have
            no files.
    """

    request: ImportRequest
    tokens: tuple[str, ...] = ()
    report: JsonValue = None
    files: dict[str, str] = Field(default_factory=dict)

    def missing(self, out: Path) -> list[str]:
        """List the files of the checkpoint that the folder `out` lacks."""
        return [name for name in FILES if not (out / name).is_file()]

    def changed(self, out: Path) -> list[str]:
        """List the files of the checkpoint whose SHA-256 differs from the record. Missing files are not listed.

        Raises:
            UserError: a file cannot be read.
        """
        return [
            name
            for name, sha256 in self.files.items()
            if (out / name).is_file() and _digest(out / name, "a file of the imported checkpoint") != sha256
        ]


def checkpoint_digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the checkpoint in a folder, by file name."""
    return {name: _digest(out / name, "a file of the imported checkpoint") for name in FILES}


def describe_import(config: ModelConfig, folders: Mapping[Part, Path], seed: int) -> ImportRequest:
    """Hash the files that an import reads, and return the request for this import.

    Raises:
        UserError: a file cannot be read.
    """
    sources: dict[str, dict[str, str]] = {part: _digests(folder) for part, folder in folders.items()}
    path = Path(config.text.path) if isinstance(config.text, JsonTextConfig) and config.text.path else None
    if path and path.is_file() and path.parent.resolve() not in {folder.resolve() for folder in folders.values()}:
        sources[TOKENIZER] = {path.name: _digest(path)}
    return ImportRequest(model=config, sources=sources, seed=seed)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: _digest(path) for path in sorted(path for pattern in SOURCES for path in folder.glob(pattern))}


def _digest(path: Path, what: str = "a file of the published weights") -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise UserError(
            f"{what} cannot be read",
            where=str(path),
            got=str(error.strerror or error),
            fix="copy the whole published folder again, with files instead of symbolic links",
        ) from None


def read_record(out: Path) -> ImportRecord | None:
    """Return the import record of a checkpoint folder, or None if the folder has no readable import record."""
    try:
        return ImportRecord.model_validate_json((out / IMPORT_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_record(out: Path, record: ImportRecord) -> None:
    """Write the record of an import into the folder of its checkpoint."""
    with atomic_write(out / IMPORT_RECORD) as temporary:
        temporary.write_text(record.model_dump_json(indent=2), encoding="utf-8")
