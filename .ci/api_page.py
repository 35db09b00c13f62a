"""Write docs/api.md, the page of the Python API, from the signatures and docstrings of the package `vlm`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlm

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MAX_LENGTH = 100
"""Length of the longest signature that is written in one line."""
INTRODUCTION = """\
# Python API

The package `vlm` can be used without the rest of Lakesight. The package needs PyTorch, but neither Spark nor MLflow:
`pip install 'lakesight[torch]'`.

```python
from PIL import Image

import vlm

captioner = vlm.load("weights/paligemma")
picture = Image.open("cat.png")
print(captioner.caption([picture], max_new_tokens=30)[0].caption)
```

`make api` writes this page from the docstrings of the package. The tests run all examples.
"""
ORDER = ("load", "build", "Captioner", "CaptionResult", "AnswerLogprobs", "AttentionMaps", "GenerationConfig")
"""Names of the package `vlm` that the page describes, in the order of the page. The page models.md describes the
remaining public name, ModelConfig.
"""


def api_page() -> str:
    """Return the text of the page."""
    assert {*ORDER, "ModelConfig"} == {*vlm.__all__}
    parts = [INTRODUCTION, *(part for name in ORDER for part in _describe(name, getattr(vlm, name)))]
    models = "[Models](models.md) describes `vlm.ModelConfig`, the config that `vlm.build` takes.\n"
    return "\n".join([*parts, models])


def _describe(name: str, value: Any) -> Iterator[str]:
    yield f"## vlm.{name}\n"
    if not inspect.isclass(value):
        yield _function(f"vlm.{name}", value)
        return
    yield _markdown(inspect.getdoc(value) or "")
    for method, function in vars(value).items():
        if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            yield f"### {name}.{method}\n"
            if isinstance(function, property):
                yield _markdown(inspect.getdoc(function) or "")
            else:
                yield _function(f"{name}.{method}", function)


class _Annotation(str):
    """Text of an annotation. The repr of the text has no quotes, because a printed signature shows the repr."""

    def __repr__(self) -> str:
        return str(self)


def _function(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=_Annotation(each.annotation))
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    result = _Annotation(signature.return_annotation)
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=result)}"
    if len(line) > MAX_LENGTH:
        head, _, rest = line.partition("(")
        inner, _, result = rest.rpartition(")")
        arguments = re.split(r", (?![^\[]*\])", inner)  # a comma in brackets does not separate arguments
        line = "\n".join([f"{head}(", *(f"    {each}," for each in arguments), f"){result}"])
    return f"```python\n{line}\n```\n\n{_markdown(inspect.getdoc(function) or '')}"


def _markdown(docstring: str) -> str:
    """Convert a docstring with the sections Args, Attributes, Returns, Raises and Example to Markdown."""
    text = docstring
    for heading in ("Args", "Attributes", "Returns", "Raises"):
        text = re.sub(rf"^{heading}:\n((?:    .*\n?|\n(?=    ))+)", lambda m: _items(m[0]), text, flags=re.M)
    return re.sub(r"^Example:\n((?:    .*\n?)+)", lambda m: _example(m[1]), text.rstrip() + "\n", flags=re.M)


def _items(section: str) -> str:
    heading, _, body = section.partition("\n")
    items = re.sub(r"^(\S+): ", lambda m: f"- `{m[1]}`: ", textwrap.dedent(body), flags=re.M)
    return f"**{heading.rstrip(':')}**\n\n" + re.sub(r"^    ", "  ", items, flags=re.M)


def _example(body: str) -> str:
    return f"```python\n{textwrap.dedent(body).rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
