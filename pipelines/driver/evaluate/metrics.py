"""What a caption is worth: the figures of a split as functions of how often each row counts.

A metric here takes weights (S resamples, R rows) and gives S values, so an interval, a slice of the rows and the paired
difference of two models are one thing each: other weights (`driver/bootstrap.py`). BLEU, ROUGE-L and CIDEr count as
pycocoevalcap does, METEOR is the program it comes with; what differs is the tokenizer: COCO's is a Java program, ours
is `vlm.text.words`, so scores compare between runs here and not with the COCO leaderboard.

Letters: R rows (a picture and a prompt), S resamples.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from pipelines.formats.caption_stats import SAMPLED_CAPTIONS, CaptionStats, sum_stats
from vlm.text.words import words

Floats = npt.NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""Weights (S, R) to values (S,)."""

MAX_ORDER = 4
MAX_DISTINCT = 2
MAX_CONSTANTS = 256


@dataclass(frozen=True)
class ScoredRow:
    """What a model made of one picture and prompt. Losses are sums over the references' tokens, in nats.

    Attributes:
        row: row of the picture in the shards; rows with the same number are one picture.
        image_id: the picture.
        prompt: empty for a plain caption.
        references: what people wrote, at least one.
        caption: what the model wrote; None where the prompt leaves no room for a caption.
        neighbour: what people wrote about the most similar picture of the training split; None without one.
        loss: given the picture.
        blind_loss: given another picture; None where the split has no other.
        blank_loss: given a grey picture.
        noise_loss: given noise.
        num_targets: tokens of the references, end tokens included.
        num_correct: those of them that the model holds likeliest, given the picture and the tokens before.
        num_tokens: tokens of the caption, end token included.
        seconds: this row's share of the time its batch took to caption.
        mean_logprob: of the caption's tokens, in nats; None without one.
        brightness: mean level of the picture at model resolution, 0 to 255.
        contrast: standard deviation of its levels.
    """

    row: int
    image_id: str
    prompt: str
    references: tuple[str, ...]
    caption: str | None
    neighbour: str | None
    loss: float
    blind_loss: float | None
    blank_loss: float
    noise_loss: float
    num_targets: int
    num_correct: int
    num_tokens: int
    seconds: float
    mean_logprob: float | None
    brightness: float
    contrast: float

    @property
    def key(self) -> tuple[str, str]:
        """What tells the row apart, whatever the model."""
        return self.image_id, self.prompt

    @property
    def exact(self) -> bool:
        """Whether the caption is one of the references, word for word."""
        return _exact(self.caption or "", self.references)

    @property
    def f1(self) -> float:
        """Word F1 of the caption and the reference that is most like it."""
        return best_f1(words(self.caption or ""), [words(reference) for reference in self.references])


def best_f1(caption: Sequence[str], references: Iterable[Sequence[str]]) -> float:
    """Harmonic mean of the shares of words in common, counted with repeats; of the best reference."""

    def f1(reference: Sequence[str]) -> float:
        total = len(caption) + len(reference)
        return 2 * (Counter(caption) & Counter(reference)).total() / total if total else 0.0

    return max(map(f1, references))


def captioned(scored: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The rows that have a caption."""
    return [item for item in scored if item.caption is not None]


# ------------------------------------------------------------------------------------------------ metrics


def model_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """The metrics of rows that all have a caption; weights follow their order.

    loss (nats per token), token_accuracy, blind_gap (nats per token, with the picture of another row; left out where
    the split has one picture), blank_gap and noise_gap (with a grey picture, with noise), exact_match, word_f1,
    bleu_1..4, rouge_l, cider (left out for one row: it weighs words by how few rows have them), words and tokens (mean
    length of a caption), captions_per_second (of one process), distinct (share of captions that are different),
    distinct_1..2 (share of word n-grams that are different), distinct_words (different ones among 100 captions; left
    out where there are fewer), mean_logprob (nats per token, mean over captions), brightness and contrast (of pictures,
    in levels of 0 to 255).
    """
    tokens = [float(item.num_targets) for item in scored]
    metrics: dict[str, Metric] = {
        "loss": ratio([item.loss for item in scored], tokens),
        "token_accuracy": ratio([float(item.num_correct) for item in scored], tokens),
        "blank_gap": ratio([item.blank_loss - item.loss for item in scored], tokens),
        "noise_gap": ratio([item.noise_loss - item.loss for item in scored], tokens),
        "tokens": ratio([float(item.num_tokens) for item in scored]),
        "captions_per_second": ratio([1.0] * len(scored), [item.seconds for item in scored]),
        "mean_logprob": ratio([item.mean_logprob or 0.0 for item in scored]),
        "brightness": ratio([item.brightness for item in scored]),
        "contrast": ratio([item.contrast for item in scored]),
    }
    gaps = [item.blind_loss - item.loss for item in scored if item.blind_loss is not None]
    if len(gaps) == len(scored):
        metrics["blind_gap"] = ratio(gaps, tokens)
    return metrics | caption_metrics(scored) | _distinct([item.caption or "" for item in scored])


def baseline_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """The metrics of captions alone, for captions that need no model: constant_* (the best caption that ignores the
    picture) and neighbour_* (what people wrote about the most similar picture of the training split)."""
    return {
        f"{name}_{metric}": function
        for name, rows in baselines(scored).items()
        for metric, function in caption_metrics(rows).items()
    }


def ratio(numerators_R: Sequence[float], denominators_R: Sequence[float] | None = None) -> Metric:
    """A sum over rows divided by another; a mean without the other."""
    numerator_R = np.asarray(numerators_R, float)
    denominator_R = np.ones_like(numerator_R) if denominators_R is None else np.asarray(denominators_R, float)
    return lambda weights_SR: (weights_SR @ numerator_R) / (weights_SR @ denominator_R)


def caption_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """Metrics that need nothing but captions and references: exact_match, word_f1, rouge_l, words, cider, bleu_1..4."""
    captions = [words(item.caption or "") for item in scored]
    references = [[words(reference) for reference in item.references] for item in scored]
    rouge = Rouge()
    metrics = {
        "exact_match": ratio([float(item.exact) for item in scored]),
        "word_f1": ratio([best_f1(made, group) for made, group in zip(captions, references, strict=True)]),
        "rouge_l": ratio(
            [
                rouge.calc_score([" ".join(made)], [" ".join(reference) for reference in group])
                for made, group in zip(captions, references, strict=True)
            ]
        ),
        "words": ratio([float(len(made)) for made in captions]),
    }
    if len(scored) > 1:
        metrics["cider"] = ratio(Cider().compute_score(*_as_coco(captions, references))[1])
    return metrics | _bleu(captions, references)


def meteor(scored: Sequence[ScoredRow]) -> Metric:
    """METEOR (Denkowski and Lavie, 2014), the mean over rows; by the Java program that pycocoevalcap brings."""
    captions = [words(item.caption or "") for item in scored]
    references = [[words(reference) for reference in item.references] for item in scored]
    return ratio(Meteor().compute_score(*_as_coco(captions, references))[1])


def has_java() -> bool:
    """Whether METEOR can run here."""
    return shutil.which("java") is not None


def _as_coco(
    captions: Sequence[list[str]], references: Sequence[list[list[str]]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    truth = {i: [" ".join(reference) for reference in group] for i, group in enumerate(references)}
    return truth, {i: [" ".join(caption)] for i, caption in enumerate(captions)}


def _distinct(texts: Sequence[str]) -> dict[str, Metric]:
    """Shares of what is different; of all rows, whatever the weights."""

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
    """Corpus BLEU (Papineni et al., 2002) from pycocoevalcap's counts; the reference closest in length counts."""
    cooked: list[dict[str, Any]] = [
        cook_test(" ".join(caption), cook_refs([" ".join(reference) for reference in group]), eff="closest")
        for caption, group in zip(captions, references, strict=True)
    ]
    lengths_2R = np.array([[c["testlen"] for c in cooked], [c["reflen"] for c in cooked]], float)
    correct_NR = np.array([[c["correct"][n] for c in cooked] for n in range(MAX_ORDER)], float)
    guessed_NR = np.array([[c["guess"][n] for c in cooked] for n in range(MAX_ORDER)], float)
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's: no match at all scores zero, not an error

    def bleu(order: int) -> Metric:
        def of(weights_SR: Floats) -> Floats:
            made_S, wanted_S = lengths_2R @ weights_SR.T
            precision_NS = (correct_NR[:order] @ weights_SR.T + tiny) / (guessed_NR[:order] @ weights_SR.T + small)
            brevity_S = np.exp(np.minimum(0, 1 - (wanted_S + small) / (made_S + tiny)))
            return np.asarray(brevity_S * precision_NS.prod(axis=0) ** (1 / order))

        return of

    return {f"bleu_{order}": bleu(order) for order in range(1, MAX_ORDER + 1)}


# ------------------------------------------------------------------------------------------------ baselines


def baselines(scored: Sequence[ScoredRow]) -> dict[str, list[ScoredRow]]:
    """The rows with the captions of what needs no model: `constant`, and `neighbour` where every row has one."""
    constant = best_constant(scored)
    rows = {"constant": [replace(item, caption=constant) for item in scored]}
    if all(item.neighbour is not None for item in scored):
        rows["neighbour"] = [replace(item, caption=item.neighbour) for item in scored]
    return rows


def best_constant(scored: Sequence[ScoredRow]) -> str:
    """The caption that is best by word F1 when said of every picture, of the MAX_CONSTANTS most frequent references.

    Between equals the more frequent one.
    """
    references = [[words(reference) for reference in item.references] for item in scored]
    spelled = Counter(reference.strip() for item in scored for reference in item.references)
    candidates = [text for text, _ in spelled.most_common(MAX_CONSTANTS)]
    return candidates[int(_constant_f1([words(text) for text in candidates], references).mean(axis=1).argmax())]


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
        totals = np.maximum(1, counts.sum(axis=1) + len(candidate))
        np.maximum.at(scores[i], rows, 2 * common / totals)
    return scores


def _exact(caption: str, references: Iterable[str]) -> bool:
    return caption.strip() in {reference.strip() for reference in references}
