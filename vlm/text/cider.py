"""CIDEr-D of single captions (Vedantam et al., 2015), with document frequencies that are counted once and stored.

A document is the set of reference captions of one picture for one prompt. An n-gram that occurs in fewer documents has
a larger weight. In training with CIDEr-D as the reward, the documents are from the training split. In evaluation, the
library pycocoevalcap computes CIDEr-D, and the documents are from the evaluated split.

A list whose name ends with the letter N has one entry per order of n-grams.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlm.files import read_json
from vlm.text.words import words

MAX_ORDER, SIGMA = 4, 6.0
"""Length of the longest n-grams, and standard deviation of the length penalty, both in words and as in pycocoevalcap.
"""

END = "</s>"
"""Word that the CIDEr-D reward appends to each reference and to each complete caption. The function `words` never
returns this word.

Without END, a caption that stops in the middle of a sentence ("a dog on a") would get a high reward."""

Gram = tuple[str, ...]


class Cider:
    """CIDEr-D for a fixed set of documents. If the documents are the references of the scored captions, pycocoevalcap
    computes the same scores.

    Args:
        documents: number of documents in which the n-grams were counted.
        frequencies: dict from an n-gram to the number of documents that contain the n-gram. An n-gram that occurs in
            only one document can be left out, because an n-gram that is not in the dict gets the frequency 1.
    """

    def __init__(self, documents: int, frequencies: Mapping[Gram, int]) -> None:
        self.documents, self.frequencies = documents, frequencies

    @classmethod
    def count(cls, documents: Iterable[Sequence[Sequence[str]]]) -> Cider:
        """Count the n-grams of documents. A document is a list of references, and a reference is a list of words."""
        number, found = 0, Counter[Gram]()
        for references in documents:
            found.update(set().union(*(ngrams(reference) for reference in references)))
            number += 1
        return cls(number, {gram: count for gram, count in found.items() if count > 1})

    def score(self, caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the CIDEr-D of a caption, from 0 to 10. The caption and each reference are lists of words."""
        return self.scores([caption], references)[0]

    def scores(self, captions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the CIDEr-D of each of several captions of the same picture."""
        vectors = [self._vector(reference) for reference in references]
        candidates = [self._vector(caption) for caption in captions]
        return [10 * sum(one.similarity(other) for other in vectors) / len(vectors) for one in candidates]

    def _vector(self, text_words: Sequence[str]) -> _Vector:
        grams, log_documents, known = ngrams(text_words), math.log(self.documents), self.frequencies
        values = {gram: count * (log_documents - math.log(known.get(gram, 1))) for gram, count in grams.items()}
        return _Vector(values, bigrams(grams))

    def save(self, path: Path) -> None:
        """Write the number of documents and the frequencies to a JSON file. The words of an n-gram are joined by
        spaces.
        """
        content = {
            "documents": self.documents,
            "frequencies": {" ".join(gram): count for gram, count in sorted(self.frequencies.items())},
        }
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Cider:
        """Read the file that `save` has written."""
        content = read_json(path)
        return cls(content["documents"], {tuple(key.split(" ")): n for key, n in content["frequencies"].items()})


class _Vector:
    """Weighted n-gram counts of a text, the norm of these counts for each n-gram order, and the length of the text."""

    def __init__(self, values: Mapping[Gram, float], length: int) -> None:
        self.values, self.length, self.norms_N = values, length, norms(values)

    def similarity(self, reference: _Vector) -> float:
        """Return the mean cosine over all n-gram orders, multiplied by the length penalty: a number from 0 to 1."""
        products_N = [0.0] * MAX_ORDER
        for gram, value in self.values.items():
            if (other := reference.values.get(gram)) is not None:
                products_N[len(gram) - 1] += min(value, other) * other
        scales_N = [mine * theirs for mine, theirs in zip(self.norms_N, reference.norms_N, strict=True)]
        cosines = sum(product / scale for product, scale in zip(products_N, scales_N, strict=True) if scale)
        return cosines / MAX_ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


def rewarded_words(text: str, *, complete: bool = True) -> list[str]:
    """Return the words of a text, followed by END if the text is complete."""
    return [*words(text), END] if complete else words(text)


def ngrams(text_words: Sequence[str]) -> Counter[Gram]:
    """Count the n-grams of a text, from single words to `MAX_ORDER` words."""
    orders = range(1, MAX_ORDER + 1)
    return Counter(tuple(text_words[i : i + n]) for n in orders for i in range(len(text_words) - n + 1))


def norms(vector: Mapping[Gram, float]) -> list[float]:
    """Return the Euclidean norm of weighted n-grams for each order of n-grams."""
    squares = [0.0] * MAX_ORDER
    for gram, value in vector.items():
        squares[len(gram) - 1] += value**2
    return [math.sqrt(square) for square in squares]


def bigrams(grams: Mapping[Gram, int]) -> int:
    """Count the pairs of adjacent words of a text, a number that pycocoevalcap uses as the length of the text."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)
