"""One self-contained HTML page of figures, tables, bar charts and picture cards.

A page needs no network, because its pictures are `data:` URIs and its style and script are inline. The templates escape
all data that they show.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class FormattedValue:
    """A number as text, and its confidence interval as text (empty if there is no interval)."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class ValueTable:
    """A table of numbers, folded until the reader opens the table. `rows` has the values of each row, by row name."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[FormattedValue]]


@dataclass(frozen=True)
class Chart:
    """A bar chart with one bar for each name. The length of a bar shows a count."""

    title: str
    values: Mapping[str, int]

    @property
    def bars(self) -> Iterator[tuple[str, str, float]]:
        """Name of each bar, its count with thousands separators, and its count in percent of the largest count."""
        largest = max(self.values.values(), default=0) or 1
        return ((name, f"{value:,}", round(100 * value / largest, 1)) for name, value in self.values.items())


@dataclass(frozen=True)
class Bar:
    """A bar in a group of bars: the bar's name, its value as text, and its length in percent of the scale.

    `low` and `high` are the ends of the confidence interval in percent of the scale, and are equal if there is no
    interval. `main` is true for the bar with which all other bars are compared.
    """

    name: str
    value: FormattedValue
    percent: float
    low: float
    high: float
    main: bool = False


@dataclass(frozen=True)
class BarGroup:
    """Bars that show one measure on a common scale, such as the CIDEr of a model and of its baselines."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class CardText:
    """A text below a picture.

    Attributes:
        text: text to show.
        label: author of the text, such as Human or Model; empty to show no author.
        exact: whether a caption equals a reference word for word, or None for a text that is not compared.
        score: word F1 of a caption (0 to 1), or None for a text that is not compared.
        parts: the text in consecutive parts, each with a flag that says whether the page marks the part; empty to show
            the text without marks.
    """

    text: str
    label: str = ""
    exact: bool | None = None
    score: float | None = None
    parts: Sequence[tuple[str, bool]] = ()


@dataclass(frozen=True)
class WordPicture:
    """A small JPEG file that shows where a model looked when it generated a word. `title` contains the word."""

    title: str
    picture: bytes

    @property
    def data_uri(self) -> str:
        """Picture as a data: URI."""
        return _data_uri(self.picture)


@dataclass(frozen=True)
class Card:
    """A picture with its texts.

    Attributes:
        name: id of the picture, shown below the texts.
        thumbnail: small JPEG file, or None to show "no picture".
        texts: texts below the picture, from top to bottom.
        problem: reason for which the row was refused, or empty if the row was not refused.
        groups: names by which the page's filter selects the card.
        attention: a picture for each word of the model's caption, shown below the texts.
    """

    name: str
    thumbnail: bytes | None
    texts: Sequence[CardText]
    problem: str = ""
    groups: Sequence[str] = ()
    attention: Sequence[WordPicture] = ()

    @property
    def data_uri(self) -> str:
        """Thumbnail as a `data:` URI, or an empty string if the card has no thumbnail."""
        return _data_uri(self.thumbnail) if self.thumbnail else ""

    @property
    def alt(self) -> str:
        """Alternative text of the picture: the human caption, else the first text, else the name of the card."""
        described = (text.text for text in self.texts if text.label in {"", "Human"} and text.text)
        return next(described, self.name)

    @property
    def good(self) -> bool:
        """Whether the row was not refused and every compared caption equals a reference."""
        return not self.problem and all(text.exact is not False for text in self.texts)

    @property
    def search_text(self) -> str:
        """The card's text in lower case, which the page's filter searches."""
        return " ".join([self.name, *(text.text for text in self.texts)]).lower()


@dataclass(frozen=True)
class Gallery:
    """Group of picture cards with a title. If the title is empty, the group has no heading."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Page:
    """Contents of a page, from top to bottom. The page has a filter if at least one card has groups.

    If the page has bars, the `figures` stay hidden until the reader opens them.

    Attributes:
        title: heading of the page.
        about: paragraph about the data. On a page with a verdict, this paragraph is at the end; on any other page, it
            is below the heading.
        figures: numbers to show, by name.
        tables: tables of numbers, each of which stays folded until the reader opens it.
        charts: bar charts of counts.
        galleries: groups of picture cards.
        verdict: result in one sentence, shown below the heading; empty if the page has no verdict.
        bars: bar charts of the main numbers, shown after the verdict.
    """

    title: str
    about: str
    figures: Mapping[str, FormattedValue] = field(default_factory=dict)
    tables: Sequence[ValueTable] = ()
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    verdict: str = ""
    bars: Sequence[BarGroup] = ()

    @property
    def groups(self) -> list[str]:
        """Distinct groups of all cards, in the order of their first card. Groups such as `size=64` are sorted and come
        last."""
        found = list(dict.fromkeys(g for gallery in self.galleries for card in gallery.cards for g in card.groups))
        return [g for g in found if "=" not in g] + sorted((g for g in found if "=" in g), key=natural_key)


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def natural_key(text: str) -> list[tuple[bool, float, str]]:
    """Return a sort key that compares the numbers in a text by value, so that `size=9` comes before `size=10`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(bool(n % 2), float(part) if n % 2 else 0.0, part) for n, part in enumerate(parts)]


def write_page(path: Path, page: Page) -> None:
    """Write a page as one HTML file. Create the folder of the file if it does not exist."""
    html = render("page.html.j2", title=page.title, nonce="", page=page)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(template: str, **values: object) -> str:
    """Render a template of this package to HTML.

    Args:
        template: file name in `templates/`.
        values: variables of the template. Every template needs `title` and `nonce`. `nonce` is the nonce of the style
            and the script for the Content Security Policy. A page that is written to a file has an empty `nonce`.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only a command that writes a page needs jinja2

    return Environment(loader=PackageLoader("pipelines.pages"), autoescape=True, undefined=StrictUndefined)
