"""One self-contained HTML page of figures, tables, bar charts and picture cards.

The file needs no network: pictures are data: URIs, style and script are inline. The templates escape all data.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlm.files import atomic_write


@dataclass(frozen=True)
class FormattedValue:
    """A number as text, with its confidence interval as text if it has one."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class ValueTable:
    """A table of numbers that the reader unfolds. `rows` maps a row's name to one value for each column."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[FormattedValue]]


@dataclass(frozen=True)
class Chart:
    """A bar chart of counts by name."""

    title: str
    values: Mapping[str, int]

    @property
    def bars(self) -> Iterator[tuple[str, str, float]]:
        """Name, count with thousands separators, and percent of the largest count."""
        largest = max(self.values.values(), default=0) or 1
        return ((name, f"{value:,}", round(100 * value / largest, 1)) for name, value in self.values.items())


@dataclass(frozen=True)
class CardText:
    """A text below a picture.

    Attributes:
        text: the text itself.
        label: who wrote it, such as Human or Model; empty for no label.
        exact: whether a caption equals a reference word for word; None for a text that is not compared.
        score: word F1 of a caption, 0 to 1; None for a text that is not compared.
    """

    text: str
    label: str = ""
    exact: bool | None = None
    score: float | None = None


@dataclass(frozen=True)
class Card:
    """A picture with its texts.

    Attributes:
        name: id of the picture, shown below the texts.
        thumbnail: a small JPEG file; None shows "no picture".
        texts: from top to bottom.
        problem: why the row was refused; empty if it was not.
        groups: names by which the page's filter selects the card.
    """

    name: str
    thumbnail: bytes | None
    texts: Sequence[CardText]
    problem: str = ""
    groups: Sequence[str] = ()

    @property
    def data_uri(self) -> str:
        """The thumbnail as a data: URI; empty without a thumbnail."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail).decode('ascii')}" if self.thumbnail else ""

    @property
    def good(self) -> bool:
        """Whether the row has no problem and every compared caption is exact."""
        return not self.problem and all(text.exact is not False for text in self.texts)

    @property
    def search_text(self) -> str:
        """Lower-case text that the page's filter searches."""
        return " ".join([self.name, *(text.text for text in self.texts)]).lower()


@dataclass(frozen=True)
class Gallery:
    """Cards under one title; an empty title shows no heading."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Page:
    """Contents of a page, from top to bottom. Cards with groups give the page a filter."""

    title: str
    about: str
    figures: Mapping[str, FormattedValue] = field(default_factory=dict)
    tables: Sequence[ValueTable] = ()
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()

    @property
    def groups(self) -> list[str]:
        """Distinct groups of the cards, in order of appearance."""
        return list(dict.fromkeys(g for gallery in self.galleries for card in gallery.cards for g in card.groups))


def write_page(path: Path, page: Page) -> None:
    """Write a page as one HTML file and create its folder."""
    html = render("page.html.j2", title=page.title, nonce="", page=page)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(template: str, **values: object) -> str:
    """Render a template of this package to HTML.

    Args:
        template: file name in `templates/`.
        values: variables of the template. Every template needs `title` and `nonce` (Content Security Policy nonce of
            style and script; empty for a page that is a file).
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("pipelines.pages"), autoescape=True, undefined=StrictUndefined)
