"""Weight files: safetensors, one file or several shards, read and written tensor by tensor.

A file is opened anew for each tensor. Tensors are views of the mapped file, and pages once touched count as ours until
it is closed: held open, reading a model would cost its size twice.
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

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before any of it is read."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class WeightFiles:
    """The tensors of a folder by name. Opening it reads headers alone.

    Raises:
        CheckpointError: there are no weights, a shard is missing, a file is damaged, or the weights are pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, Header] = {}
        for file in _files(folder):
            self.headers.update(_headers(file))

    def read(self, name: str) -> Tensor:
        """One tensor: a view of the mapped file, so copy what is kept."""
        with safe_open(self.headers[name].file, framework="pt") as file:
            return file.get_tensor(name)


def read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the weights have no config that can be read",
            where=str(path),
            got=read_error_message(error),
            fix="name a folder as published: config.json beside model.safetensors",
        ) from None
    if not isinstance(settings, dict):
        raise CheckpointError(
            "the config is not a JSON object",
            where=str(path),
            got=type(settings).__name__,
            fix="name a folder as published",
        )
    return settings


def _files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if (folder / INDEX).is_file():
        return _shards(folder)
    found = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in [*there, folder.name] if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            "the weights are pickled, and loading a pickle runs whatever code it holds",
            where=str(folder),
            got=", ".join(pickles),
            fix="get the same weights as safetensors; most publishers offer both",
        )
    raise CheckpointError(
        "the folder holds no weights, or several",
        where=str(folder),
        got=", ".join(there) or "no such folder, or an empty one",
        fix=f"name a folder with {SINGLE}, or with {INDEX} and its shards",
    )


def _shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            "the list of shards cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="get the file again: its weight_map names the file of each tensor",
        ) from None
    elsewhere = [name for name in names if Path(name).name != name]
    if elsewhere:
        raise CheckpointError(
            "the list of shards names files that are not in its folder",
            where=str(path),
            got=", ".join(elsewhere),
            fix="a published folder's shards lie beside their list: get it again, from a publisher that you trust",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            "shards of the weights are missing",
            where=str(folder),
            got=f"{len(missing)} of {len(names)}: {', '.join(missing)}",
            fix="get the whole folder",
        )
    return [folder / name for name in names]


def _headers(path: Path) -> dict[str, Header]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            return {name: Header(tuple(part.get_shape()), str(part.get_dtype()), path) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the weights cannot be read",
            where=str(path),
            got=str(error),
            fix="the file is cut short, damaged or not safetensors: get it again",
        ) from None


# ------------------------------------------------------------------------------------------------ writing


def write_weights(folder: Path, pieces: Iterable[Mapping[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Write tensors as they come: one file, or shards of about `max_bytes` and an index. Returns the files' names."""
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        shards.append(folder / f".shard-{len(shards)}")
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, shards[-1], {"format": "pt"})
        weight_map.update(dict.fromkeys(held, len(shards) - 1))
        held.clear()

    for piece in pieces:
        size = sum(tensor.nbytes for tensor in piece.values())
        if held and size + sum(tensor.nbytes for tensor in held.values()) > max_bytes:
            flush()
        held.update(piece)
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
        "weight_map": {key: names[at] for key, at in sorted(weight_map.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [*names, INDEX]
