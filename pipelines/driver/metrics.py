"""Caption metrics with bootstrap intervals: how good the captions are, and whether the model looks.

Every metric but the share of distinct captions is a ratio of sums over pictures, so resampling pictures is one matrix
product. BLEU, ROUGE-L and CIDEr count as pycocoevalcap does; what differs is the tokenizer: COCO's is a Java program,
ours is `words` below, so scores compare between runs here and not with the COCO leaderboard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlm.config import Config

Floats = npt.NDArray[np.float64]

RESAMPLES = 200
MAX_ORDER = 4
MAX_CONSTANTS = 256


@dataclass(frozen=True)
class Scored:
    """What a model made of one picture and prompt.

    Attributes:
        row: row of the picture in the shards; rows with the same number are one picture.
        image_id: the picture.
        prompt: empty for a plain caption.
        references: what people wrote, at least one.
        caption: what the model wrote.
        loss: of the references given the picture, summed over their tokens, in nats.
        blind_loss: the same given another picture; None where the split has no other.
        num_targets: tokens of the references, end tokens included.
    """

    row: int
    image_id: str
    prompt: str
    references: tuple[str, ...]
    caption: str
    loss: float
    blind_loss: float | None
    num_targets: int

    @property
    def exact(self) -> bool:
        """Whether the caption is one of the references, word for word."""
        return self.caption.strip() in {reference.strip() for reference in self.references}


class Interval(Config):
    """A metric and the 2.5th and 97.5th percentile of its bootstrap over pictures."""

    value: float
    low: float
    high: float


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; punctuation alone where there is no word (an emoticon)."""
    lowered = text.lower()
    return re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered)


def word_f1(caption: Counter[str], reference: Counter[str]) -> float:
    """Harmonic mean of the shares of words that caption and reference have in common, counted with repeats."""
    total = caption.total() + reference.total()
    return 2 * (caption & reference).total() / total if total else 0.0


def measure(scored: Sequence[Scored], *, seed: int = 0) -> dict[str, Interval]:
    """All metrics of a split.

    loss (nats per token), blind_gap (nats per token; left out where the split has one picture), exact_match, word_f1,
    bleu_1..4, rouge_l, cider (left out for one picture: it weighs words by how few pictures have them), words (mean
    length of a caption), distinct (share of captions that are different; of the whole split, so low = high = value),
    and the floors: floor_exact_match, floor_word_f1, floor_cider of the best caption that ignores the picture.

    Args:
        scored: at least one.
        seed: of the resampling.
    """
    pictures = np.unique([item.row for item in scored], return_inverse=True)[1]
    num_pictures = int(pictures.max()) + 1
    weights = _resampling(num_pictures, seed)

    def per_picture(values: Sequence[float] | Floats) -> Floats:
        return np.bincount(pictures, weights=np.asarray(values, float), minlength=num_pictures).astype(np.float64)

    def ratio(numerators: Sequence[float] | Floats, denominators: Sequence[float] | Floats) -> Interval:
        return _interval((weights @ per_picture(numerators)) / (weights @ per_picture(denominators)))

    ones, tokens = [1.0] * len(scored), [float(item.num_targets) for item in scored]
    captions = [words(item.caption) for item in scored]
    references = [[words(reference) for reference in item.references] for item in scored]
    means = _row_scores(scored, captions, references) | _floors(scored, references)
    metrics = {name: ratio(values, ones) for name, values in means.items()}
    metrics["loss"] = ratio([item.loss for item in scored], tokens)
    gaps = [item.blind_loss - item.loss for item in scored if item.blind_loss is not None]
    if len(gaps) == len(scored):
        metrics["blind_gap"] = ratio(gaps, tokens)
    metrics |= _bleu(captions, references, lambda values: weights @ per_picture(values))
    distinct = len({item.caption for item in scored}) / len(scored)
    metrics["distinct"] = Interval(value=distinct, low=distinct, high=distinct)
    return metrics


def _resampling(num_pictures: int, seed: int) -> Floats:
    """How often each picture counts: row 0 once each, the other rows as drawn with replacement."""
    draws = np.random.default_rng(seed).multinomial(num_pictures, [1 / num_pictures] * num_pictures, RESAMPLES)
    return np.vstack([np.ones((1, num_pictures)), draws]).astype(np.float64)


def _interval(values: Floats) -> Interval:
    """Value first, then its resamples."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(value=float(values[0]), low=float(low), high=float(high))


def _row_scores(
    scored: Sequence[Scored], captions: Sequence[list[str]], references: Sequence[list[list[str]]]
) -> dict[str, Floats]:
    """Metrics that are means over rows."""
    rouge = Rouge()
    best_f1 = [
        max(word_f1(Counter(caption), Counter(reference)) for reference in group)
        for caption, group in zip(captions, references, strict=True)
    ]
    scores: dict[str, Floats] = {
        "exact_match": np.array([float(item.exact) for item in scored]),
        "word_f1": np.array(best_f1),
        "rouge_l": np.array(
            [
                rouge.calc_score([" ".join(caption)], [" ".join(reference) for reference in group])
                for caption, group in zip(captions, references, strict=True)
            ]
        ),
        "words": np.array([float(len(caption)) for caption in captions]),
    }
    return scores | _cider("cider", captions, references)


def _cider(name: str, captions: Sequence[list[str]], references: Sequence[list[list[str]]]) -> dict[str, Floats]:
    if len(captions) < 2:
        return {}
    truth = {i: [" ".join(reference) for reference in group] for i, group in enumerate(references)}
    made = {i: [" ".join(caption)] for i, caption in enumerate(captions)}
    return {name: np.asarray(Cider().compute_score(truth, made)[1], float)}


def _floors(scored: Sequence[Scored], references: Sequence[list[list[str]]]) -> dict[str, Floats]:
    """Scores of the best constant captions: the most frequent one for exact match, the best by word F1 for the rest.

    Candidates are the references themselves, the MAX_CONSTANTS most frequent ones.
    """
    exact = Counter(reference.strip() for item in scored for reference in {r.strip() for r in item.references})
    constant = exact.most_common(1)[0][0]
    frequent = Counter(" ".join(reference) for group in references for reference in group).most_common(MAX_CONSTANTS)
    f1 = _constant_f1([caption.split() for caption, _ in frequent], references)
    best = int(f1.mean(axis=1).argmax())
    return {
        "floor_exact_match": np.array([float(constant in {r.strip() for r in item.references}) for item in scored]),
        "floor_word_f1": f1[best],
    } | _cider("floor_cider", [frequent[best][0].split()] * len(scored), references)


def _constant_f1(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> Floats:
    """Word F1 of every candidate on every row: (candidates, rows)."""
    flat = [(row, reference) for row, group in enumerate(references) for reference in group]
    index = {word: i for i, word in enumerate(sorted({w for _, reference in flat for w in reference}))}
    counts = np.zeros((len(flat), len(index)))
    for i, (_, reference) in enumerate(flat):
        for word in reference:
            counts[i, index[word]] += 1
    rows = np.array([row for row, _ in flat])
    scores = np.zeros((len(candidates), len(references)))
    for i, candidate in enumerate(candidates):
        own = Counter(index[word] for word in candidate)
        columns, repeats = list(own), np.array(list(own.values()))
        common = np.minimum(counts[:, columns], repeats).sum(axis=1)
        np.maximum.at(scores[i], rows, 2 * common / (counts.sum(axis=1) + len(candidate)))
    return scores


def _bleu(
    captions: Sequence[list[str]],
    references: Sequence[list[list[str]]],
    resampled: Callable[[Sequence[float]], Floats],
) -> dict[str, Interval]:
    """Corpus BLEU (Papineni et al., 2002) from pycocoevalcap's counts; the reference closest in length counts."""
    cooked: list[dict[str, Any]] = [
        cook_test(" ".join(caption), cook_refs([" ".join(reference) for reference in group]), eff="closest")
        for caption, group in zip(captions, references, strict=True)
    ]
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's: no match at all scores zero, not an error
    length_ratio = (resampled([c["testlen"] for c in cooked]) + tiny) / (
        resampled([c["reflen"] for c in cooked]) + small
    )
    brevity = np.exp(np.minimum(0, 1 - 1 / length_ratio))
    product = np.ones_like(brevity)
    metrics = {}
    for order in range(MAX_ORDER):
        correct = resampled([c["correct"][order] for c in cooked])
        guessed = resampled([c["guess"][order] for c in cooked])
        product = product * (correct + tiny) / (guessed + small)
        metrics[f"bleu_{order + 1}"] = _interval(brevity * product ** (1 / (order + 1)))
    return metrics
