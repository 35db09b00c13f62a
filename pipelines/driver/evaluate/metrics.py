"""Metrics of captions as functions of row weights.

A metric is a function that takes an array of weights (S resamples, R rows) and returns S values. Intervals, slices and
paired differences of two models are computed by calling the same metric with different weights (`bootstrap.py`). To add
a metric that needs only captions and references, extend `caption_metrics`. To add any other metric, extend
`model_metrics`.

pycocoevalcap computes BLEU, ROUGE-L and CIDEr-D. `vlm.text.words` splits the texts into words. The metrics of this
module are defined for all writing systems and need no Java, so the promotion gate makes the same decision on every
host. Figures in papers are computed from the words of COCO's tokenizer. Lakesight reports figures with COCO's words
under separate names, such as `coco_cider` (see `coco.py`).

In the names of arrays, R stands for rows (a picture and a prompt) and S stands for resamples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipelines.formats.caption_stats import SAMPLED_CAPTIONS, CaptionStats, sum_stats
from pipelines.formats.row_scores import RowScore
from vlm.text.words import TOKENISATION, words

Floats = npt.NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""Function that takes weights of shape (S, R) and returns values of shape (S,)."""

WORD_METRICS = re.compile(
    r"(constant_|neighbour_|over_)?(word_f1|rouge_l|cider|meteor|bleu_\d|words|distinct(_\w+)?"
    r"|chair_[is]|object_mentions)"
)
"""Pattern of the names of metrics that compare or count words, and therefore depend on the tokenisation."""
COCO_PREFIX = "coco_"
"""Prefix of the metrics for which COCO's tokenizer splits the texts into words."""
COCO_TOKENISATION = "Stanford PTB 3.4.1 in lower case, without punctuation (pycocoevalcap)"
"""Name of the rules by which COCO's tokenizer splits a text."""
MAX_ORDER = 4
MAX_DISTINCT = 2


@dataclass(frozen=True)
class ScoredRow(RowScore):
    """Scores of one row, and the caption of the nearest-neighbour baseline for this row.

    Attributes:
        neighbour: human caption of the most similar training picture, or None if no other training picture is a
            candidate (`_neighbour_captions` in scores.py).
    """

    neighbour: str | None

    @property
    def key(self) -> tuple[str, str]:
        """Key of the row: its image_id and its prompt. The key of a row is the same for all models."""
        return self.image_id, self.prompt

    @property
    def exact(self) -> bool:
        """Whether the caption equals one of the references, apart from white space at the ends."""
        return _exact(self.caption or "", self.references)

    @property
    def f1(self) -> float:
        """Highest word F1 of the caption with any of its references."""
        return best_f1(words(self.caption or ""), [words(reference) for reference in self.references])


def best_f1(caption: Sequence[str], references: Iterable[Sequence[str]]) -> float:
    """Compute the highest word F1 of a caption with any of its references. Word F1 is the harmonic mean of word
    precision and word recall."""

    def f1(reference: Sequence[str]) -> float:
        total = len(caption) + len(reference)
        return 2 * (Counter(caption) & Counter(reference)).total() / total if total else 0.0

    return max(map(f1, references))


def tokenisation_of(metric: str) -> str | None:
    """Return the name of the rules by which a metric splits texts into words, or None if the metric ignores words."""
    if metric.startswith(COCO_PREFIX):
        return COCO_TOKENISATION
    return TOKENISATION if WORD_METRICS.fullmatch(metric) else None


def describe_words(metrics: Iterable[str]) -> str:
    """Return a phrase for the rules by which the metrics with these names split texts into words."""
    coco = any(name.startswith(COCO_PREFIX) for name in metrics)
    return TOKENISATION + (f"; for metrics {COCO_PREFIX}* by {COCO_TOKENISATION}" if coco else "")


def captioned(scored: Sequence[ScoredRow]) -> list[ScoredRow]:
    """Return the rows that have a caption."""
    return [item for item in scored if item.caption is not None]


# ------------------------------------------------------------------------------------------------ metrics


def model_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """Return the metrics of rows that all have a caption. A metric takes one weight per row, in the order of the rows.

    - loss is in nats per target token. The texts of a picture share a weight of 1, because training draws one text of a
      picture in each epoch. The same weights apply in token_accuracy, blind_gap, blank_gap and noise_gap.
    - token_accuracy is the share of target tokens that the model ranks first.
    - blind_gap, blank_gap and noise_gap are loss differences in nats per token: the loss with the picture of another
      row, with a grey picture or with noise, minus the loss with the right picture. If the split has only one picture,
      blind_gap is missing.
    - exact_match, word_f1, bleu_1..4, rouge_l and cider compare captions with references. For a single row, cider is
      missing, because the word weights of CIDEr need several rows.
    - words and tokens are the mean number of words and of tokens per caption. captions_per_second is the speed of one
      process.
    - distinct is the share of different captions. distinct_1 and distinct_2 are the shares of different words and of
      different word pairs.
    - distinct_words is the expected number of different words in 100 captions. With fewer than 100 captions,
      distinct_words is missing.
    - mean_logprob is the mean log-probability of the captions, in nats per token.
    - brightness and contrast are means over the rows' pictures, on the scale from 0 to 255.
    """
    texts: Counter[int] = Counter()
    for item in scored:
        texts[item.row] += item.num_texts or len(item.references)
    tokens = [item.num_targets / texts[item.row] for item in scored]

    def per_token(values_R: Sequence[float]) -> Metric:
        return ratio([value / texts[item.row] for value, item in zip(values_R, scored, strict=True)], tokens)

    metrics: dict[str, Metric] = {
        "loss": per_token([item.loss for item in scored]),
        "token_accuracy": per_token([float(item.num_correct) for item in scored]),
        "blank_gap": per_token([item.blank_loss - item.loss for item in scored]),
        "noise_gap": per_token([item.noise_loss - item.loss for item in scored]),
        "tokens": ratio([float(item.num_tokens) for item in scored]),
        "captions_per_second": ratio([1.0] * len(scored), [item.seconds for item in scored]),
        "mean_logprob": ratio([item.mean_logprob or 0.0 for item in scored]),
        "brightness": ratio([item.brightness for item in scored]),
        "contrast": ratio([item.contrast for item in scored]),
    }
    gaps = [item.blind_loss - item.loss for item in scored if item.blind_loss is not None]
    if len(gaps) == len(scored):
        metrics["blind_gap"] = per_token(gaps)
    return metrics | caption_metrics(scored) | _distinct([item.caption or "" for item in scored])


def ratio(numerators_R: Sequence[float], denominators_R: Sequence[float] | None = None) -> Metric:
    """Return the metric "weighted sum of numerators / weighted sum of denominators". Denominators are 1 by default."""
    numerator_R = np.asarray(numerators_R, float)
    denominator_R = np.ones_like(numerator_R) if denominators_R is None else np.asarray(denominators_R, float)
    return lambda weights_SR: (weights_SR @ numerator_R) / (weights_SR @ denominator_R)


def caption_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """Return the metrics that need only captions and references, such as word_f1 and cider."""
    captions = [words(item.caption or "") for item in scored]
    references = [[words(reference) for reference in item.references] for item in scored]
    return {
        "exact_match": ratio([float(item.exact) for item in scored]),
        "word_f1": ratio([best_f1(caption, group) for caption, group in zip(captions, references, strict=True)]),
        "words": ratio([float(len(caption)) for caption in captions]),
        **ngram_metrics(captions, references),
    }


def ngram_metrics(captions: Sequence[list[str]], references: Sequence[list[list[str]]]) -> dict[str, Metric]:
    """Return bleu_1..4, rouge_l and cider (CIDEr-D) of captions that are split into words. A single row has no cider.

    A reference that several people have written counts as often as it was written, as in pycocoevalcap.
    """
    rouge = Rouge()
    metrics = {
        "rouge_l": ratio(
            [
                rouge.calc_score([" ".join(caption)], [" ".join(reference) for reference in group])
                for caption, group in zip(captions, references, strict=True)
            ]
        ),
    }
    if len(captions) > 1:
        metrics["cider"] = ratio(Cider().compute_score(*_as_coco(captions, references))[1])
    return metrics | _bleu(captions, references)


def _as_coco(
    captions: Sequence[list[str]], references: Sequence[list[list[str]]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and captions as pycocoevalcap needs them: two dicts from a row number to a list of texts."""
    truth = {i: [" ".join(reference) for reference in group] for i, group in enumerate(references)}
    return truth, {i: [" ".join(caption)] for i, caption in enumerate(captions)}


def _distinct(texts: Sequence[str]) -> dict[str, Metric]:
    """Return the diversity metrics, which are computed over all rows and ignore the weights."""

    def constant(value: float) -> Metric:
        return lambda weights_SR: np.full(len(weights_SR), value)

    captions = [words(text) for text in texts]
    metrics = {"distinct": constant(len({" ".join(caption) for caption in captions}) / len(captions))}
    for n in range(1, MAX_DISTINCT + 1):
        grams = [tuple(caption[i : i + n]) for caption in captions for i in range(len(caption) - n + 1)]
        metrics[f"distinct_{n}"] = constant(len(set(grams)) / max(1, len(grams)))
    if len(texts) >= SAMPLED_CAPTIONS:
        counted = sum_stats(CaptionStats.from_caption(text, 0.0) for text in texts)
        metrics["distinct_words"] = constant(counted.figures()["distinct_words"])
    return metrics


def _bleu(captions: Sequence[list[str]], references: Sequence[list[list[str]]]) -> dict[str, Metric]:
    """Return corpus BLEU (Papineni et al., 2002) from pycocoevalcap's counts, with the closest reference length."""
    cooked: list[dict[str, Any]] = [
        cook_test(" ".join(caption), cook_refs([" ".join(reference) for reference in group]), eff="closest")
        for caption, group in zip(captions, references, strict=True)
    ]
    lengths_2R = np.array([[c["testlen"] for c in cooked], [c["reflen"] for c in cooked]], float)
    correct_NR = np.array([[c["correct"][n] for c in cooked] for n in range(MAX_ORDER)], float)
    guessed_NR = np.array([[c["guess"][n] for c in cooked] for n in range(MAX_ORDER)], float)
    tiny, small = 1e-15, 1e-9  # pycocoevalcap adds these small values to avoid a division by zero

    def bleu(order: int) -> Metric:
        def metric(weights_SR: Floats) -> Floats:
            caption_S, reference_S = lengths_2R @ weights_SR.T
            precision_NS = (correct_NR[:order] @ weights_SR.T + tiny) / (guessed_NR[:order] @ weights_SR.T + small)
            brevity_S = np.exp(np.minimum(0, 1 - (reference_S + small) / (caption_S + tiny)))
            return np.asarray(brevity_S * precision_NS.prod(axis=0) ** (1 / order))

        return metric

    return {f"bleu_{order}": bleu(order) for order in range(1, MAX_ORDER + 1)}


def _exact(caption: str, references: Iterable[str]) -> bool:
    return caption.strip() in {reference.strip() for reference in references}
