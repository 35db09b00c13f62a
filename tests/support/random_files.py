"""Random input files, drawn with a seed, and naive readers of these files.

A naive reader uses only pyarrow, Pillow, tarfile and the csv and json modules of Python. Every row has a text that no
other row has, so a row can be found in `samples` and in the payloads of `quarantine`.
"""

from __future__ import annotations

import base64
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = (
    "a",
    "shop[1]",
    "{x,y}",
    "half #1",
    "50%",
    "10:30",
    "_part",
    "k\u00f6ln",
    "\u732b",
    "two  blanks",
    "a.b",
    "-dash",
    "q?",
)
FOLDERS = ("", "", "sub", "year=2024", "split=train/day=1", "[x]", "d \u00e9", "_new")
WORDS = (
    "a cat",
    "\u00dcn\u00efcode",
    "eine Katze, schwarz",
    'say "hi"',
    "\u732b\u304c\u5ea7\u308b",
    "\u0642\u0637\u0629",
    "\u092c\u093f\u0932\u094d\u0932\u0940",
    "tab\there",
    "semi;colon",
    "\U0001f642",
)
EXTRAS = ("width", "WIDTH", "meta.url", "we`ird", "\u00fc", "Text", "x y", "0")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
MAGIC: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


class NaiveRow(NamedTuple):
    """A row that a naive reader has read.

    The row is `readable` if its picture can be decoded and its text is not empty.
    """

    text: str
    readable: bool


class RandomFile(NamedTuple):
    """One input file: its path, a description for messages, and its rows (None if no naive reader can read them)."""

    path: Path
    about: str
    rows: list[NaiveRow] | None


class Draw:
    """Object that makes the random choices for one source, and records all texts that it has drawn."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.texts: list[str] = []

    def text(self) -> str:
        """Return a text that is drawn only once."""
        self.texts.append(f"{self.rng.choice(WORDS)} row {len(self.texts)}.")
        return self.texts[-1]

    def picture(self) -> bytes:
        """Return a small picture that is drawn only once. On average, one picture in ten is damaged."""
        rng = self.rng
        pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (4, 5, 3), np.uint8)
        image = Image.fromarray(pixels).resize((rng.randint(8, 40), rng.randint(8, 40)))
        form = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
        out = io.BytesIO()
        image.convert("P" if form == "GIF" else rng.choice(("RGB", "L"))).save(out, form)
        data = out.getvalue()
        return data[: len(data) // 3] if rng.random() < 0.1 else data

    def rows(self, most: int = 6) -> list[tuple[bytes, str]]:
        """Return up to `most` pictures with texts. On average, one text in ten is empty."""
        count = self.rng.randint(0, most)
        return [(self.picture(), "" if self.rng.random() < 0.1 else self.text()) for _ in range(count)]

    def base64(self, data: bytes) -> str:
        """Encode a picture in one of the usual forms of base64."""
        text, form = base64.b64encode(data).decode(), self.rng.randrange(5)
        if form == 1:
            text = base64.urlsafe_b64encode(data).decode()
        if form == 2:
            text = text.rstrip("=")
        return f"data:image/png;base64,{text}" if form == 3 else text

    def path(self, folder: Path, number: int, suffix: str) -> Path:
        """Return the path of a new file with an odd name, in a folder that may have an odd name."""
        path = folder / self.rng.choice(FOLDERS) / f"{self.rng.choice(NAMES)}-{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def encode(self, text: str) -> tuple[bytes, str]:
        """Encode a text file as UTF-8, UTF-8 with BOM or UTF-16. Return the bytes and the name of the encoding."""
        encoding = self.rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
        return text.encode(encoding), encoding

    def store(self, path: Path, content: bytes) -> tuple[Path, str]:
        """Write a file unchanged, compressed, truncated, or empty. Return the path of the file, and a description of
        how the file was changed.
        """
        how = self.rng.choice(("", "", "", *COMPRESS))
        if how:
            suffix = how.upper() if self.rng.random() < 0.2 else how
            path, content = path.with_name(path.name + suffix), COMPRESS[how](content)
        damage = self.rng.choice(("", "", "", "", "", "", "", "empty", "cut" if how else ""))
        content = {"empty": b"", "cut": content[: len(content) // 2]}.get(damage, content)
        path.write_bytes(content)
        return path, f"{how} {damage}"


def readable(data: object) -> bool:
    """Return whether Pillow decodes a picture that is given as bytes or base64."""
    try:
        if isinstance(data, str):
            body = data.partition(",")[2] if data.startswith("data:") else data
            data = base64.b64decode(body.translate(str.maketrans("-_", "+/")) + "==")
        assert isinstance(data, bytes)
        Image.open(io.BytesIO(data)).load()
    except (OSError, ValueError, SyntaxError, AssertionError):
        return False
    return True


def naive_text(path: Path) -> str | None:
    """Return the text of a file, or None if the file is damaged. The file may be compressed or have a BOM."""
    content = path.read_bytes()
    try:
        for magic, decompress in MAGIC.items():
            content = decompress(content) if content.startswith(magic) else content
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return None
    encoding = next((name for bom, name in BOMS.items() if content.startswith(bom)), "utf-8")
    return content.decode(encoding)


# ------------------------------------------------------------------------------------------------ kinds of files


def csv_file(draw: Draw, folder: Path, number: int) -> RandomFile:
    """Draw a CSV file; delimiter, quotes, line ends, further columns, encoding, compression and damage are random."""
    rng, text = draw.rng, io.StringIO()
    end, delimiter = rng.choice(("\n", "\r\n", "\r")), rng.choice(",,,;\t|")
    names = ["image", "text", *rng.sample(EXTRAS, rng.randint(0, 3))]
    rng.shuffle(names)
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=rng.choice((0, 0, 1)))
    writer.writerow(names)
    for image, said in draw.rows():
        row = {"image": draw.base64(image), "text": said}
        writer.writerow([row.get(name, f"{name},1") for name in names])
    content, encoding = draw.encode(text.getvalue() if rng.random() < 0.8 else text.getvalue().removesuffix(end))
    path, how = draw.store(draw.path(folder, number, ".csv"), content)
    read = naive_text(path)
    lines = None if read is None else csv.DictReader(io.StringIO(read, newline=""), delimiter=delimiter)
    rows = None if lines is None else [NaiveRow(r["text"], readable(r["image"]) and bool(r["text"])) for r in lines]
    return RandomFile(path, f"csv {end!r} {delimiter!r} {encoding} {names}{how}", rows)


def jsonl_file(draw: Draw, folder: Path, number: int) -> RandomFile:
    """Draw a JSON lines file with missing values, lists of texts and further keys; encoding, compression and damage are
    random.
    """
    rng = draw.rng
    lines = []
    for image, said in draw.rows():
        missing = rng.choice(({"text": None}, {"text": float("nan")}, {}, {"text": [None, ""]}))
        row = {"image": draw.base64(image)} | ({"text": rng.choice((said, [said]))} if said else missing)
        lines.append(
            json.dumps(
                row | {name: [1, {"a": None}] for name in rng.sample(EXTRAS, 2)}, ensure_ascii=rng.random() < 0.5
            )
        )
    end = rng.choice(("\n", "\r\n"))
    content, encoding = draw.encode(end.join(lines) + rng.choice(("", end)))
    path, how = draw.store(draw.path(folder, number, rng.choice((".jsonl", ".ndjson"))), content)
    read = naive_text(path)
    rows = None if read is None else [_json_row(json.loads(line)) for line in read.splitlines() if line.strip()]
    return RandomFile(path, f"jsonl {end!r} {encoding}{how}", rows)


def _json_row(row: dict[str, Any]) -> NaiveRow:
    value = row.get("text")
    said = next((text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)), "")
    return NaiveRow(said, readable(row["image"]) and bool(said))


ODD_COLUMNS: tuple[Callable[[int], pa.Array], ...] = (
    lambda n: pa.array(range(n), pa.timestamp("ns")),
    lambda n: pa.array([2**60] * n, pa.timestamp("us")),
    lambda n: pa.array([np.float16(1)] * n, pa.float16()),
    lambda n: pa.array([b"0123456789abcdef"] * n, pa.uuid()),
    lambda n: pa.array([b"\xff\xfe"] * n, pa.binary()).view(pa.string()),
    pa.nulls,
    lambda n: pa.array([[{"a": 1}]] * n),
    lambda n: pa.array([7] * n, pa.decimal128(38, 10)),
    lambda n: pa.array(["x"] * n).dictionary_encode(),
    lambda n: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int8())),
    lambda n: pa.array(range(n), pa.duration("s")),
    lambda n: pa.array(range(n), pa.time64("ns")),
)


def parquet_file(draw: Draw, folder: Path, number: int) -> RandomFile:
    """Draw a Parquet file with odd further columns; column types, codec, row groups and damage are random."""
    rng, rows = draw.rng, draw.rows()
    pictures, texts = [image for image, _ in rows], [said or None for _, said in rows]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = rng.choice(
        (
            pa.array(pictures, pa.binary()),
            pa.array(pictures, pa.large_binary()),
            pa.array([draw.base64(data) for data in pictures], pa.string()),
            pa.array([{"bytes": data, "path": "x.png"} for data in pictures], struct),
            pa.array(pictures, pa.binary()).dictionary_encode(),
        )
    )
    text = rng.choice(
        (
            pa.array(texts, pa.string()),
            pa.array(texts, pa.large_string()),
            pa.array([[said, None] for said in texts], pa.list_(pa.string())),
            pa.array(texts, pa.string()).dictionary_encode(),
        )
    )
    columns = {"image": image, "text": text} | {
        name: rng.choice(ODD_COLUMNS)(len(rows)) for name in rng.sample(EXTRAS, rng.randint(0, 3))
    }
    path = draw.path(folder, number, rng.choice((".parquet", ".PARQUET")))
    options = {
        "compression": rng.choice(("snappy", "zstd", "gzip", "brotli", "none")),
        "row_group_size": rng.choice((1, 2, 100)),
    }
    pq.write_table(pa.table(columns), path, data_page_version=rng.choice(("1.0", "2.0")), **options)
    damage = rng.choice(("", "", "", "", "", "", "", "empty", "cut", "random"))
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-50], "random": rng.randbytes(200)}.get(damage, content))
    about = f"parquet {image.type} {text.type} {options} {[str(c.type) for c in columns.values()]} {damage}"
    naive = (
        None
        if damage
        else [
            NaiveRow(said or "", readable(data) and said is not None)
            for data, said in zip(pictures, texts, strict=True)
        ]
    )
    return RandomFile(path, about, naive)


def tar_file(draw: Draw, folder: Path, number: int) -> RandomFile:
    """Draw a WebDataset tar; tar format, member names, text encodings, links, compression and damage are random."""
    rng, out = draw.rng, io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    prefix = rng.choice(("", "./", "in/", "a.folder/"))
    rows = []
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for n, (image, said) in enumerate(draw.rows()):
            extension = rng.choice(("jpg", "png", "JPG", "webp"))
            members = [(f"{n:05}.{extension}", image), (f"{n:05}.txt", said.encode(rng.choice(("utf-8", "utf-8-sig"))))]
            if rng.random() < 0.3:
                members.append((f"{n:05}.json", b'{"key": 1}'))
            rng.shuffle(members)
            for name, content in members:
                info = tarfile.TarInfo(prefix + name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            rows.append(NaiveRow(said, readable(image) and bool(said)))
    path, how = draw.store(draw.path(folder, number, ".tar"), out.getvalue())
    damaged = how.strip().endswith(("cut", "empty"))
    return RandomFile(path, f"tar {form} {prefix}{how}", None if damaged else rows)
