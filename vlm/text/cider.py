"""CIDEr-D of single captions (Vedantam et al., 2015), with document frequencies that are counted once and stored.

A document is a picture with its references. The rarer an n-gram is in the documents, the more it counts. In evaluation,
the documents are those of the evaluated split. As a reward of training, the documents are those of the training split.

Letters in tensor names: N orders of n-grams.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlm.text.words import words

MAX_ORDER, SIGMA = 4, 6.0
"""Length of the longest n-grams, and standard deviation of the length penalty, in words (pycocoevalcap's CIDEr-D)."""

END = "</s>"
"""Word that ends each reference and each complete caption in the reward of training. `words` never returns this word.

Without an end in the reward, captions that stop in the middle of a sentence ("a dog on a") are rewarded."""

Gram = tuple[str, ...]


class Cider:
    """CIDEr-D for a fixed set of documents. The scores of the documents' own captions equal pycocoevalcap's.

    Args:
        documents: number of documents.
        frequencies: number of documents that contain an n-gram, by n-gram. N-grams of a single document can be left
            out, because an unknown n-gram has the same weight.
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
        """Return the CIDEr-D of a caption, from 0 to 10. Caption and references are lists of words."""
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
        """Write the number of documents and the frequencies as JSON. The words of an n-gram are joined by spaces."""
        content = {
            "documents": self.documents,
            "frequencies": {" ".join(gram): count for gram, count in sorted(self.frequencies.items())},
        }
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Cider:
        """Read the file that `save` has written."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["documents"], {tuple(key.split(" ")): n for key, n in content["frequencies"].items()})


class _Vector:
    """Weighted counts of the n-grams of a text, their norm for each order of n-grams, and the length of the text."""

    def __init__(self, values: Mapping[Gram, float], length: int) -> None:
        self.values, self.length, self.norms_N = values, length, norms(values)

    def similarity(self, reference: _Vector) -> float:
        """Return the similarity to a reference, from 0 to 1: the mean cosine over orders times the length penalty."""
        products_N = [0.0] * MAX_ORDER
        for gram, value in self.values.items():
            if (other := reference.values.get(gram)) is not None:
                products_N[len(gram) - 1] += min(value, other) * other
        scales_N = [mine * theirs for mine, theirs in zip(self.norms_N, reference.norms_N, strict=True)]
        cosines = sum(product / scale for product, scale in zip(products_N, scales_N, strict=True) if scale)
        return cosines / MAX_ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


def rewarded_words(text: str, *, complete: bool = True) -> list[str]:
    """Return the words of a text, and END if the text is complete."""
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
    """Count the pairs of words, which pycocoevalcap takes for the length of a text."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)
