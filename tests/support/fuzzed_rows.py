"""Random CSV rows, drawn with a seed: valid rows, and rows with invalid pictures, base64 texts or lines."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from pictures import as_base64, encoded
from PIL import Image

HEADER = b"row,b64string_images,caption\n"
MAX_PIXELS, MAX_CHARS = 2_000_000, 300
GOOD: frozenset[str | None] = frozenset({None})
DAMAGED = frozenset({None, "truncated_image", "not_an_image", "unsupported_format", "too_large", "too_small"})
"""Allowed results for a picture with a few changed bytes: reason codes, or None if the picture can still be decoded."""


class Row(NamedTuple):
    """A CSV line, its number and kind, and the allowed results: reason codes, or None if the row may be valid."""

    number: int
    kind: str
    line: bytes
    allowed: frozenset[str | None]


def rows(count: int, seed: int) -> Iterator[Row]:
    """Yield rows, of which about a third have a valid picture and a valid text."""
    rng = random.Random(seed)
    for number in range(count):
        kind = rng.choice(("good", "damaged", rng.choice(tuple(ODD))))
        if kind in ODD:
            fields, allowed = ODD[kind](rng, number)
        else:
            name = rng.choice(tuple(PICTURES))
            data = PICTURES[name](rng)
            kind = f"{kind} {name}"
            if kind.startswith("damaged"):
                data = damaged(rng, data)
            fields, allowed = (as_base64(data), f"row {number}"), (DAMAGED if "damaged" in kind else GOOD)
        line = fields if isinstance(fields, bytes) else quoted(number, *fields)
        yield Row(number, kind, line, allowed)


def quoted(number: int, image: str, text: str) -> bytes:
    """Return a CSV line with the text in quotes."""
    return f'{number},{image},"{text.replace(chr(34), chr(34) * 2)}"'.encode()


# ------------------------------------------------------------------------------------------------ pictures


def drawn(rng: random.Random, mode: str = "RGB") -> Image.Image:
    """Draw a small picture: random noise added to a random colour."""
    noise = np.random.default_rng(rng.randrange(2**32))
    width, height = rng.randint(8, 40), rng.randint(8, 40)
    field = noise.integers(0, 60, (height, width, 3)) + noise.integers(0, 190, 3)
    image = Image.fromarray(field.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((field[..., 0].astype(np.uint16) << 8) | 7)
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise.integers(0, 256, (height, width), dtype=np.uint8)))
    return image


def saved(mode: str, kind: str, **options: object) -> Callable[[random.Random], bytes]:
    """Return a function that draws pictures of one mode and saves them in one format."""
    return lambda rng: encoded(drawn(rng, mode), kind, **options)


def rotated(rng: random.Random) -> bytes:
    """Draw a JPEG picture whose EXIF data contain an orientation."""
    exif = Image.Exif()
    exif[0x0112] = rng.randint(2, 8)
    return encoded(drawn(rng), "JPEG", exif=exif)


def animated(kind: str) -> Callable[[random.Random], bytes]:
    """Return a function that draws animations of two frames."""

    def draw(rng: random.Random) -> bytes:
        first = drawn(rng)
        return encoded(first, kind, save_all=True, append_images=[first.rotate(180)])

    return draw


PICTURES: dict[str, Callable[[random.Random], bytes]] = {
    "JPEG": saved("RGB", "JPEG", quality=90),
    "JPEG progressive": saved("RGB", "JPEG", progressive=True),
    "JPEG CMYK": saved("CMYK", "JPEG"),
    "JPEG grey": saved("L", "JPEG", quality=5),
    "JPEG turned": rotated,
    "PNG": saved("RGB", "PNG"),
    "PNG palette": saved("P", "PNG"),
    "PNG palette clear": saved("P", "PNG", transparency=3),
    "PNG 16 bit": saved("I;16", "PNG"),
    "PNG alpha": saved("RGBA", "PNG"),
    "PNG grey alpha": saved("LA", "PNG"),
    "PNG bits": saved("1", "PNG"),
    "WEBP": saved("RGB", "WEBP"),
    "WEBP lossless alpha": saved("RGBA", "WEBP", lossless=True),
    "WEBP animated": animated("WEBP"),
    "GIF": saved("P", "GIF"),
    "GIF animated": animated("GIF"),
    "TIFF": saved("RGB", "TIFF"),
    "TIFF LZW": saved("RGBA", "TIFF", compression="tiff_lzw"),
    "TIFF CMYK": saved("CMYK", "TIFF"),
    "TIFF JPEG": saved("RGB", "TIFF", compression="jpeg"),
    "BMP": saved("RGB", "BMP"),
    "BMP palette": saved("P", "BMP"),
    "AVIF": saved("RGB", "AVIF", speed=10),
}


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Delete, duplicate, zero or change some bytes of a file.

    In half of the cases, these bytes begin within the first 100 bytes of the file.
    """
    at = rng.randrange(1, min(len(data), 100) if rng.random() < 0.5 else len(data))
    end = min(len(data), at + rng.randint(1, 30))
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:at] + bytes(end - at) + data[end:]
        case 3:
            return data[:end] + data[at:]
        case 4:
            return data[:at] + rng.randbytes(end - at) + data[end:]
        case _:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


# ------------------------------------------------------------------------------------------------ odd rows

Odd = tuple[tuple[str, str] | bytes, frozenset[str | None]]


def valid_fields(rng: random.Random, number: int) -> tuple[str, str]:
    """Return a valid picture as base64, and the text that describes the picture."""
    return as_base64(PICTURES["PNG"](rng)), f"row {number}"


def with_base64(
    change: Callable[[random.Random, str], str], *allowed: str | None
) -> Callable[[random.Random, int], Odd]:
    """Return a function that makes rows with changed base64."""

    def make(rng: random.Random, number: int) -> Odd:
        image, text = valid_fields(rng, number)
        return (change(rng, image), text), frozenset(allowed)

    return make


def with_text(change: Callable[[random.Random, str], str], *allowed: str | None) -> Callable[[random.Random, int], Odd]:
    """Return a function that makes rows with a changed text."""

    def make(rng: random.Random, number: int) -> Odd:
        image, text = valid_fields(rng, number)
        return (image, change(rng, text)), frozenset(allowed)

    return make


def with_line(change: Callable[[bytes], bytes], *allowed: str | None) -> Callable[[random.Random, int], Odd]:
    """Return a function that makes changed CSV lines."""

    def make(rng: random.Random, number: int) -> Odd:
        return change(quoted(number, *valid_fields(rng, number))), frozenset(allowed)

    return make


def with_picture(draw: Callable[[random.Random], bytes], *allowed: str | None) -> Callable[[random.Random, int], Odd]:
    """Return a function that makes rows with unusual pictures. The function `draw` draws these pictures."""
    return lambda rng, number: ((as_base64(draw(rng)), f"row {number}"), frozenset(allowed))


def spaced(rng: random.Random, image: str) -> str:
    width = rng.choice((1, 60, 76))
    return rng.choice((" ", "\t", "  ")).join(image[at : at + width] for at in range(0, len(image), width))


def corrupted(rng: random.Random, image: str) -> str:
    at = rng.randrange(len(image))
    return image[:at] + rng.choice("!?*\u00e9\x00.") + image[at + 1 :]


def png_claiming(width: int, height: int) -> bytes:
    """Return a PNG file whose header states the given size, but which contains only a few bytes of pixel data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    packed = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bomb(rng: random.Random) -> bytes:
    """Return a small picture file whose decoded picture would have very many pixels."""
    side = rng.choice((1_500, 20_000, 65_000))
    match rng.randrange(5):
        case 0:
            return png_claiming(side, side)
        case 1:
            return encoded(Image.new("1", (1_500, rng.randint(1_400, 1_600))), "PNG")
        case 2:
            jpeg = encoded(drawn(rng), "JPEG")
            at = jpeg.index(b"\xff\xc0") + 5
            return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]
        case 3:
            gif = encoded(drawn(rng, "P"), "GIF")
            return gif[:6] + struct.pack("<HH", side, side) + gif[10:]
        case _:
            bmp = encoded(drawn(rng), "BMP")
            return bmp[:18] + struct.pack("<II", side, side) + bmp[26:]


def text_bomb(rng: random.Random) -> bytes:
    """Return a valid PNG with a compressed text chunk of 5 MB."""
    data = encoded(drawn(rng), "PNG")
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(5_000_000), 9)
    return data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def foreign(rng: random.Random) -> bytes:
    return encoded(drawn(rng), rng.choice(("PPM", "ICO", "PCX", "JPEG2000", "TGA")))


def tiny(rng: random.Random) -> bytes:
    return encoded(drawn(rng).resize((rng.randint(1, 3), rng.randint(1, 40))), rng.choice(("PNG", "GIF", "BMP")))


ODD: dict[str, Callable[[random.Random, int], Odd]] = {
    "url-safe": with_base64(lambda _, image: image.replace("+", "-").replace("/", "_"), None),
    "unpadded": with_base64(lambda _, image: image.rstrip("="), None),
    "data URL": with_base64(lambda _, image: image and f'"data:image/png;base64,{image}"', None),
    "spaced": with_base64(spaced, None),
    "struck": with_base64(corrupted, "bad_base64"),
    "no picture": with_base64(lambda rng, _: rng.choice(("", " ", '""')), "missing_field"),
    "words": with_base64(lambda rng, _: rng.choice(("NaN", "null", "none", "abcd" * 9)), "not_an_image", "bad_base64"),
    "short code": with_base64(lambda rng, image: image[: rng.randint(1, len(image) - 9)], "bad_base64", *DAMAGED),
    "coded twice": with_base64(lambda _, image: as_base64(image.encode()), None),
    "hex": with_base64(lambda _, image: base64.b64decode(image).hex(), "not_an_image", "bad_base64"),
    "noise": with_picture(lambda rng: rng.randbytes(rng.randint(1, 200)), *DAMAGED - GOOD),
    "bomb": with_picture(bomb, "too_large"),
    "text bomb": with_picture(text_bomb, None),
    "foreign": with_picture(foreign, "unsupported_format", "not_an_image"),
    "tiny": with_picture(tiny, "too_small"),
    "no text": with_text(lambda rng, _: rng.choice(("", " ", "\t ", "\u00a0", "\x07")), "empty_text"),
    "long text": with_text(lambda _, text: text * MAX_CHARS, "text_too_long"),
    "quotes": with_text(lambda rng, text: rng.choice(('"', '""', ', "a", ', "\\")) + text, None),
    "any letters": with_text(
        lambda rng, text: text + "".join(chr(rng.randrange(0x20, 0xD800)) for _ in range(9)), None
    ),
    "controls": with_text(lambda rng, text: text + rng.choice("\x00\x01\x0b\x0c\x1b\x7f\x85\u2028"), None),
    "bytes": with_line(lambda line: line[:-1] + b'\xff\xfe\xc3"', None),
    "fewer columns": with_line(lambda line: line.rpartition(b",")[0], "malformed_record"),
    "more columns": with_line(lambda line: line + b",x,y", "malformed_record"),
    "open quote": with_line(lambda line: line[:-1], "malformed_record"),
    "stray quote": with_line(lambda line: line + b"x", "malformed_record"),
    "spaces and carriage return": with_line(lambda line: line + b"\r", None),
    "blank line before": with_line(lambda line: b" \n" + line, None),
}


def written(drawn_rows: list[Row]) -> bytes:
    """Return the rows as one CSV file."""
    file = io.BytesIO(HEADER)
    file.seek(0, io.SEEK_END)
    file.writelines(row.line + b"\n" for row in drawn_rows)
    return file.getvalue()
