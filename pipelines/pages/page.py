"""One HTML page of figures, bar charts and pictures. It holds everything it shows (no script, pictures as data: URIs),
so it opens offline and survives being mailed; whatever comes from data is escaped by the template.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Chart:
    """Numbers by name, drawn as bars as long as they are large."""

    title: str
    values: Mapping[str, int]

    @property
    def bars(self) -> Iterator[tuple[str, str, float]]:
        """Name, number as people write it, and percent of the largest."""
        most = max(self.values.values(), default=0) or 1
        return ((name, f"{value:,}", round(100 * value / most, 1)) for name, value in self.values.items())


@dataclass(frozen=True)
class Card:
    """A row with its picture. `thumbnail` is a small JPEG file; `note` says what is wrong, if anything."""

    name: str
    thumbnail: bytes | None
    texts: Sequence[str]
    note: str = ""

    @property
    def data_uri(self) -> str:
        """The thumbnail as a data: URI; empty without one."""
        coded = base64.b64encode(self.thumbnail).decode("ascii") if self.thumbnail else ""
        return f"data:image/jpeg;base64,{coded}" if coded else ""


@dataclass(frozen=True)
class Gallery:
    """Rows under one title."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom."""

    title: str
    about: str
    figures: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()


def write_page(path: Path, page: Page) -> None:
    """Write the page as one HTML file."""
    source = resources.files("pipelines.pages").joinpath("page.html.j2").read_text(encoding="utf-8")
    html = Environment(autoescape=True, undefined=StrictUndefined).from_string(source).render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
