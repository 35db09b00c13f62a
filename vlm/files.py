"""Functions that write files atomically, read JSON files, hash files, and join safetensors files. Other functions
access the step number and the recorded hashes of a training checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 1 << 28
"""Largest accepted size of a JSON file, in bytes. The largest published tokenizers have about 40 MB."""
TRAINING_STEP = "training.json"
"""Name of the file of a training checkpoint that contains the number of the next training step."""

MANIFEST = "files.json"
"""Name of the file of a training checkpoint that contains the size in bytes and the SHA-256 of each other file."""

IMPORT_RECORD = "import.json"
"""Name of the file with the record of an import, in a checkpoint that `lakesight import-weights` has written."""


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. If the `with` block ends without an error, rename the temporary
    file to `path`.

    A reader sees the whole old file or the whole new file, never a part of a file. The folder of `path` is created if
    it is missing. Several processes may write the same file simultaneously. Each process uses a different temporary
    name, and the file of the last rename remains.

    Args:
        path: path of the file to write.
        sync: whether to flush the bytes to disk before the rename, so that a power failure leaves no empty file. Use
            False for files that are useless after a crash, such as heartbeats.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A temporary name that contains `path.name` might exceed the length limit of file names.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file of a model. The file may come from an untrusted source.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: the file is larger than MAX_JSON_BYTES, is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_small(path))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_small(path: Path) -> bytes:
    """Read a file of settings or of a tokenizer.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: the file is larger than MAX_JSON_BYTES.
    """
    with open_regular(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"the file is larger than {MAX_JSON_BYTES} bytes")
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, but refuse pipes and devices, because reading a pipe or a device may never end.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_training_step(folder: Path) -> int:
    """Read the number of the next training step from a training checkpoint.

    Raises:
        OSError, ValueError, KeyError: the file is missing or not valid.
    """
    return int(read_json(folder / TRAINING_STEP)["step"])


def write_training_step(folder: Path, step: int) -> None:
    """Write the number of the next training step into the folder of a training checkpoint."""
    (folder / TRAINING_STEP).write_text(json.dumps({"step": step}), encoding="utf-8")


COPY_BYTES = 16 * 2**20
"""Largest number of bytes that `join_rows` copies with one read."""


def join_rows(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Join safetensors files, each of which holds some rows (indices of the first dimension) of the same tensors.

    The rows of a tensor are concatenated in the order of the files. A tensor may be missing in any file except the
    first file. The joined file is written from start to end, and one read copies at most COPY_BYTES bytes. The memory
    therefore does not grow with the size of the tensors.

    Args:
        parts: safetensors files; the first file must hold rows of every tensor.
        path: file to write.
        metadata: metadata to write into the joined file.

    Raises:
        OSError, ValueError: a file of `parts` cannot be read, or the joined file cannot be written.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        headers = [_read_header(file) for file in files]
        starts = [file.tell() for file in files]
        joined: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, entry in headers[0].items():
            entries = [header[name] for header in headers if name in header]
            begin, end = end, end + sum(last - first for first, last in (each["data_offsets"] for each in entries))
            # A scalar has no rows, so only the first file contains the scalar.
            rows = [sum(each["shape"][0] for each in entries)] if entry["shape"] else []
            shape = [*rows, *entry["shape"][1:]]
            joined[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, end]}
        out = stack.enter_context(path.open("wb"))
        _write_header(out, joined)
        for name in headers[0]:
            for file, header, start in zip(files, headers, starts, strict=True):
                if name in header:
                    first, last = header[name]["data_offsets"]
                    file.seek(start + first)
                    _copy_bytes(file, out, last - first)


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of a safetensors file, and return it without the metadata. The next read of the file returns the
    bytes of the first tensor.
    """
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def _write_header(file: BinaryIO, header: Mapping[str, Any]) -> None:
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # in the format, each tensor starts at a multiple of 8 bytes
    file.write(len(data).to_bytes(8, "little") + data)


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        data = source.read(min(count, COPY_BYTES))
        if not data:
            raise ValueError(f"{source.name} is truncated")
        target.write(data)
        count -= len(data)


def find_damage(folder: Path) -> list[str]:
    """Return one sentence for each file of a checkpoint that differs from its size or hash in files.json.

    The list is empty if no file has changed since it was written.
    """
    try:
        entries = read_json(folder / MANIFEST).items()
        found = [_describe_damage(folder / name, entry["bytes"], entry["sha256"]) for name, entry in entries]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    return [problem for problem in found if problem]


def _describe_damage(path: Path, size: int, sha256: str) -> str:
    """Describe how a file differs from its size and SHA-256 in files.json. Return an empty text if the file is
    unchanged.
    """
    if not path.is_file():
        return f"{path.name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{path.name} has {found} bytes, expected {size}"
    return "" if file_digest(path) == sha256 else f"{path.name} has changed since it was written"
