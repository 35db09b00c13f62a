"""Object hallucination (CHAIR): objects that a caption mentions although no human text of the picture mentions them.

The user's word list (setting data.object_words) says which words stand for an object. `vlm.text.words` splits captions,
human texts and the word list into words, so that the metrics are defined for all writing systems. A plural counts only
if the word list contains the plural.

Source: Rohrbach et al., "Object Hallucination in Image Captioning" (2018), https://arxiv.org/abs/1809.02156. In
the paper, an object also counts as present if COCO's segmentation of the picture contains the object.

In the names of arrays, R stands for rows (a picture and a prompt) and S stands for resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from pipelines.config import short_hash
from pipelines.driver.evaluate.metrics import Floats, Metric, ScoredRow, captioned, ratio
from pipelines.errors import UserError
from vlm.text.words import words

Phrase = tuple[str, ...]
"""Consecutive words, such as ('fire', 'hydrant')."""


class ObjectWords(NamedTuple):
    """Word list of objects.

    Attributes:
        objects: a dict from each phrase of the word list to the name of the object for which the phrase stands. The
            name is itself one of the phrases.
        max_words: number of words of the longest phrase.
    """

    objects: Mapping[Phrase, str]
    max_words: int

    def digest(self) -> str:
        """Return a hash of the word list."""
        return short_hash(sorted(self.objects.items()))

    def mentions(self, text: str) -> list[str]:
        """Return the names of the objects that a text mentions, once per mention and in the order of the text.

        At each place of the text, only the longest matching phrase counts, so `hot dog` does not mention a dog.
        """
        text_words, found, at = words(text), list[str](), 0
        while at < len(text_words):
            for end in range(min(at + self.max_words, len(text_words)), at, -1):
                if name := self.objects.get(tuple(text_words[at:end])):
                    found.append(name)
                    at = end
                    break
            else:
                at += 1
        return found


def read_object_words(file: Path) -> ObjectWords:
    """Read a word list: a text file in which each line has the name and the synonyms of one object, separated by
    commas.

    Empty lines and lines that begin with `#` are ignored.

    Raises:
        UserError: the file cannot be read, contains no object, or contains the same phrase for two objects.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        _refuse(file, error.strerror or str(error), "set data.object_words to a text file that exists")
    except UnicodeDecodeError:
        _refuse(file, "bytes that are not UTF-8", "save the file in the encoding UTF-8")
    objects: dict[Phrase, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        phrases = [phrase for part in line.split(",") if (phrase := tuple(words(part)))]
        for phrase in phrases:
            name = " ".join(phrases[0])
            if objects.setdefault(phrase, name) != name:
                text = " ".join(phrase)
                got = (
                    f"line {number} lists {text!r} under {name!r}, but {text!r} already stands for {objects[phrase]!r}"
                )
                _refuse(file, got, "write each word or phrase in the line of only one object")
    if not objects:
        _refuse(file, "no object", "write one object per line, for example: dog, dogs, puppy, puppies")
    return ObjectWords(objects, max(map(len, objects)))


def _refuse(file: Path, got: str, fix: str) -> NoReturn:
    raise UserError("the word list of objects cannot be used", where=f"data.object_words: {file}", got=got, fix=fix)


def hallucination_metrics(scored: Sequence[ScoredRow], objects: ObjectWords) -> dict[str, Metric]:
    """Return the metrics of object hallucination. A metric takes one weight for each row that has a caption.

    - chair_i is the number of hallucinated mentions of objects, divided by the number of all mentions of objects in
      captions. A mention is hallucinated if no human text of the picture (for any prompt) mentions the object. If no
      caption mentions an object, chair_i is missing. For a resample without a mention, chair_i is 0.
    - chair_s is the share of captions with at least one hallucinated mention. A caption that mentions no object
      counts as a caption without a hallucinated mention.
    - object_mentions is the mean number of mentions per caption.

    Args:
        scored: all rows of the split, because the human texts of a row without a caption also describe the picture.
        objects: word list of objects.
    """
    present: dict[str, set[str]] = defaultdict(set)
    for item in scored:
        present[item.image_id].update(name for text in item.references for name in objects.mentions(text))
    with_caption = captioned(scored)
    mentions = [objects.mentions(item.caption or "") for item in with_caption]
    counts = [float(len(names)) for names in mentions]
    hallucinated = [
        float(sum(name not in present[item.image_id] for name in names))
        for item, names in zip(with_caption, mentions, strict=True)
    ]
    count_R, hallucinated_R = np.array(counts), np.array(hallucinated)

    def chair_i(weights_SR: Floats) -> Floats:
        return np.asarray((weights_SR @ hallucinated_R) / np.maximum(weights_SR @ count_R, 1))

    of_mentions: dict[str, Metric] = {"chair_i": chair_i} if any(counts) else {}
    return of_mentions | {
        "chair_s": ratio([float(count > 0) for count in hallucinated]),
        "object_mentions": ratio(counts),
    }
