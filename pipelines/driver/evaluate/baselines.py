"""Baselines: captions made without a model, with which an evaluation compares the captions of a model version.

The constant baseline gives the same caption to all pictures. The caption that is best by one metric may not be the best
by another metric. So each metric has its own constant caption: the best of the most frequent references
(`best_constants`).

In the names of arrays, C stands for candidates, F for all references of all rows, and N for lengths of n-grams.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.driver.evaluate.metrics import MAX_ORDER, Floats, Metric, ScoredRow, caption_metrics
from vlm.text.cider import SIGMA, bigrams, ngrams, norms
from vlm.text.words import words

MAX_PAIRS = 25_000_000
"""Largest number of pairs (candidate, reference) to compare. If MIN_CANDIDATES candidates need more pairs, all pairs of
these candidates are compared. With this limit, the comparison takes only seconds."""
MIN_CANDIDATES = 256
SHORTLIST = 4
"""The slower metrics compare only the SHORTLIST best candidates by word F1 and the SHORTLIST best candidates by CIDEr.
"""


def baseline_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """Return the caption metrics of the baselines.

    The metric `constant_cider` is the CIDEr if all pictures have the same caption. This caption is the candidate with
    the highest CIDEr. Each other metric `constant_*` is computed in the same way, with the caption that is best by that
    metric. The metrics `neighbour_*` are computed with the human caption of the most similar training picture. The
    metrics `neighbour_*` are missing if any row has no such caption.
    """
    constants = best_constants(scored)
    metrics_of = {text: caption_metrics(_with_caption(scored, text)) for text in set(constants.values())}
    metrics = {f"constant_{name}": metrics_of[text][name] for name, text in constants.items()}
    if neighbour := neighbour_rows(scored):
        metrics |= {f"neighbour_{name}": metric for name, metric in caption_metrics(neighbour).items()}
    return metrics


def baselines(scored: Sequence[ScoredRow], metric: str) -> dict[str, list[ScoredRow]]:
    """For each baseline, return the rows with the captions of the baseline in place of the captions of the model. The
    constant caption is the best single caption by `metric`.

    The baselines are `constant` if the metric is defined for the rows (CIDEr needs two rows), and `neighbour` if every
    row has a neighbour.
    """
    constants, neighbour = best_constants(scored), neighbour_rows(scored)
    rows = {"constant": _with_caption(scored, constants[metric])} if metric in constants else {}
    return rows | ({"neighbour": neighbour} if neighbour else {})


def neighbour_rows(scored: Sequence[ScoredRow]) -> list[ScoredRow] | None:
    """Return copies of the rows with the captions of their neighbours, or None if any row lacks a neighbour."""
    if any(item.neighbour is None for item in scored):
        return None
    return [replace(item, caption=item.neighbour) for item in scored]


def best_constants(scored: Sequence[ScoredRow]) -> dict[str, str]:
    """For each metric, return the candidate that has the best value as the caption of all pictures.

    The candidates are the most frequent references. The number of candidates is limited by MAX_PAIRS, but is at least
    MIN_CANDIDATES. Of two equally good candidates, the more frequent candidate is returned. Every candidate is compared
    by exact match, word F1 and CIDEr. ROUGE-L and BLEU are slow to compute, so they are computed only for the best
    candidates by word F1 or CIDEr.
    """
    references = [[words(reference) for reference in item.references] for item in scored]
    spelled = Counter(reference.strip() for item in scored for reference in item.references)
    count = max(MIN_CANDIDATES, MAX_PAIRS // spelled.total())
    candidates = [text for text, _ in spelled.most_common(count)]
    exact = Counter(text for item in scored for text in {reference.strip() for reference in item.references})
    split = [words(text) for text in candidates]
    scores = {
        "exact_match": np.array([float(exact[text]) for text in candidates]),
        "word_f1": constant_word_f1(split, references),
        "cider": constant_cider(split, references),
    }
    best = {name: candidates[int(values_C.argmax())] for name, values_C in scores.items()}
    shortlist = sorted(
        {int(i) for name in ("word_f1", "cider") for i in np.argsort(-scores[name], kind="stable")[:SHORTLIST]}
    )
    every_row = np.ones((1, len(scored)))
    measured = {i: caption_metrics(_with_caption(scored, candidates[i])) for i in shortlist}
    for name in ("rouge_l", *(f"bleu_{order}" for order in range(1, MAX_ORDER + 1))):
        values = [measured[i][name](every_row)[0] for i in shortlist]
        best[name] = candidates[shortlist[int(np.argmax(values))]]
    if len(scored) == 1:
        del best["cider"]  # CIDEr is undefined for one row, because the word weights of CIDEr need several rows
    return best


def _with_caption(scored: Sequence[ScoredRow], caption: str) -> list[ScoredRow]:
    return [replace(item, caption=caption) for item in scored]


def constant_word_f1(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> Floats:
    """For each candidate, return the mean word F1 if the candidate is the caption of every row, as an array (C,)."""
    flat = [reference for group in references for reference in group]
    first_of_row = np.cumsum([0, *(len(group) for group in references)])[:-1]
    lengths_F = np.array([len(reference) for reference in flat])
    index = _Postings([Counter(reference) for reference in flat])
    scores = []
    for candidate in candidates:
        common_F = np.zeros(len(flat))
        for word, count in Counter(candidate).items():
            rows, counts = index[word]
            common_F[rows] += np.minimum(counts, count)
        f1_F = 2 * common_F / np.maximum(1, lengths_F + len(candidate))
        scores.append(np.maximum.reduceat(f1_F, first_of_row).mean())
    return np.array(scores)


def constant_cider(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> Floats:
    """For each candidate, compute CIDEr-D if the candidate is the caption of every row. Return an array (C,).

    CIDEr-D is described in Vedantam et al. (2015). The result equals the result of pycocoevalcap, but pycocoevalcap
    would process all references again for each candidate.
    """
    flat = [ngrams(reference) for group in references for reference in group]
    weights_F = np.array([1 / (len(group) * len(references)) for group in references for _ in group])
    by_row = iter(flat)
    rows_with = Counter(gram for group in references for gram in set().union(*(next(by_row) for _ in group)))
    idf = {gram: math.log(len(references)) - math.log(rows) for gram, rows in rows_with.items()}
    vectors = [{gram: count * idf[gram] for gram, count in grams.items()} for grams in flat]
    norms_NF = np.array([norms(vector) for vector in vectors]).T
    bigrams_F = np.array([bigrams(grams) for grams in flat])
    index = _Postings(vectors)
    scores = []
    for candidate in candidates:
        grams = ngrams(candidate)
        vector = {gram: count * idf.get(gram, math.log(len(references))) for gram, count in grams.items()}
        products_NF = np.zeros_like(norms_NF)
        for gram, value in vector.items():
            rows, values = index[gram]
            products_NF[len(gram) - 1, rows] += np.minimum(values, value) * values
        scale_NF = np.array(norms(vector))[:, None] * norms_NF
        cosines_F = np.divide(products_NF, scale_NF, out=products_NF, where=scale_NF != 0).mean(axis=0)
        penalty_F = np.exp(-((bigrams_F - bigrams(grams)) ** 2) / (2 * SIGMA**2))
        scores.append(10 * (cosines_F * penalty_F) @ weights_F)
    return np.array(scores)


class _Postings:
    """Inverted index of the references. For each key (a word or an n-gram), the index has the numbers of the references
    that contain the key, and the value of the key in each of these references.
    """

    def __init__(self, references: Sequence[Mapping[Any, float]]) -> None:
        found: dict[object, list[tuple[int, float]]] = defaultdict(list)
        for number, values in enumerate(references):
            for key, value in values.items():
                found[key].append((number, value))
        self._arrays = {
            key: (np.array([number for number, _ in pairs]), np.array([value for _, value in pairs]))
            for key, pairs in found.items()
        }
        self._empty = np.array([], int), np.array([], float)

    def __getitem__(self, key: object) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Floats]:
        return self._arrays.get(key, self._empty)
