"""Functions that read and write safetensors weights, in one file or in several shards.

Each read of a tensor opens and maps the weight file again. While a mapped file is open, all pages of the file that have
been read count as memory of the process. Loading a model would need twice the memory if the file stayed open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.config import read_error_message
from vlm.errors import CheckpointError
from vlm.files import open_regular, read_json

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorHeader:
    """Shape and type of a tensor, and the path of the tensor's file. A header does not contain the tensor's data."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class WeightFiles:
    """All tensors in the weight files of a folder. The constructor reads only the headers of the files.

    If a folder contains both model.safetensors and an index of shards, model.safetensors is read, as in transformers.
    The attribute `ignored` then lists the index and all other safetensors files of the folder. A folder can contain
    both because the shards were merged and the index was not removed.

    Raises:
        CheckpointError: the folder has no weights or several weight files without an index, a shard is missing, a file
            is damaged, or the weights are pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        files = _weight_files(folder)
        for file in files:
            self.headers.update(_read_headers(file))
        index = [folder / INDEX] if files == [folder / SINGLE] and (folder / INDEX).is_file() else []
        others = [path for path in folder.glob("*.safetensors") if index and path not in files]
        self.ignored = tuple(sorted(path.name for path in [*index, *others]))

    def read(self, name: str) -> Tensor:
        """Return one tensor as a view of the memory-mapped file. A caller that keeps the tensor must copy the data."""
        with safe_open(self.headers[name].file, framework="pt") as file:
            return file.get_tensor(name)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not a JSON object.
    """
    fix = "choose a published folder, with config.json and model.safetensors"
    return _read_object(folder / CONFIG, "the config of the weights", fix)


def read_other_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file of a published folder, such as tokenizer_config.json, but not config.json. Return an empty dict
    if the file is missing.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    return _read_object(path, "a file of the published folder", "download the file again")


def _read_object(path: Path, what: str, fix: str) -> dict[str, Any]:
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be read", where=str(path), got=read_error_message(error), fix=fix
        ) from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{what} is not a JSON object", where=str(path), got=type(settings).__name__, fix=fix)
    return settings


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: one file, or all shards."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    content = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in [*content, folder.name] if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            "the weights are pickled, and loading a pickle can run any code that it contains",
            where=str(folder),
            got=", ".join(pickles),
            fix="download the same weights in safetensors format, which most publishers also offer",
        )
    raise CheckpointError(
        "the folder has no weights, or several weight files without an index",
        where=str(folder),
        got=", ".join(content) or "the folder is missing or empty",
        fix=f"choose a folder with {SINGLE}, or with {INDEX} and its shards",
    )


def _shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    fix = "download the file again: its weight_map must contain the file name of each tensor"
    weight_map = _read_object(path, "the index of the weight files", fix).get("weight_map")
    found = weight_map.values() if isinstance(weight_map, dict) else ()
    wrong = [name for name in found if not isinstance(name, str)]
    if not found or wrong:
        raise CheckpointError(
            "the index of the weight files cannot be read",
            where=str(path),
            got=f"weight_map contains {wrong[0]!r}" if wrong else f"weight_map is {weight_map!r}",
            fix=fix,
        )
    names = sorted(set(found))
    elsewhere = [name for name in names if Path(name).name != name]
    if elsewhere:
        raise CheckpointError(
            "the index of the weight files lists files outside its folder",
            where=str(path),
            got=", ".join(elsewhere),
            fix="download the folder again from a trusted publisher: weight files must be in the folder of the index",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            "weight files that are listed in the index are missing",
            where=str(folder),
            got=f"{len(missing)} of {len(names)}: {', '.join(missing)}",
            fix="download the missing files",
        )
    return [folder / name for name in names]


def _read_headers(path: Path) -> dict[str, TensorHeader]:
    try:
        open_regular(path).close()  # if the path is a pipe, safe_open would wait forever for a writer
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 the file is not a mapping
            return {
                name: TensorHeader(tuple(part.get_shape()), str(part.get_dtype()), path)
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the weight file cannot be read",
            where=str(path),
            got=str(error),
            fix="download the file again: it is truncated, damaged or not safetensors",
        ) from None


# ------------------------------------------------------------------------------------------------ writing


def write_weights(folder: Path, groups: Iterable[Mapping[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Write tensors to one file, or to several shards and an index, and return the names of the written files.

    Args:
        folder: folder to write to.
        groups: dicts from tensor names to tensors. All tensors of a dict are written to the same shard.
        max_bytes: maximum size of a shard, in bytes. If the tensors of a dict have more bytes than `max_bytes`, they
            are written to a separate shard, which is larger than the maximum.
    """
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    buffer: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        shards.append(folder / f".shard-{len(shards)}")
        save_file({name: tensor.contiguous() for name, tensor in buffer.items()}, shards[-1], {"format": "pt"})
        weight_map.update(dict.fromkeys(buffer, len(shards) - 1))
        buffer.clear()

    for group in groups:
        size = sum(tensor.nbytes for tensor in group.values())
        if buffer and size + sum(tensor.nbytes for tensor in buffer.values()) > max_bytes:
            flush()
        buffer.update(group)
        total += size
    flush()
    if len(shards) == 1:
        shards[0].replace(folder / SINGLE)
        return [SINGLE]
    names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.replace(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[number] for key, number in sorted(weight_map.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [*names, INDEX]
