"""Self-critical training: sample captions of training pictures, and make captions with a higher CIDEr-D more likely.

Sources: Rennie et al., "Self-critical sequence training for image captioning", 2016; Luo, "A better variant of
self-critical sequence training", 2020.

The advantage of a caption is its reward minus the mean reward of the other samples of the same picture. In the loss,
the cross entropy of each sampled caption is weighted by the caption's advantage, so the gradient of the loss is the
policy gradient. If all samples of a picture have the same reward, the picture contributes nothing to the gradient.

The random numbers of a caption depend only on (seed, epoch, row, number of the sample), so a resumed run samples the
same captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipelines.config.train import CiderObjectiveConfig, TrainConfig
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.batches import Collator, RowOrder, TokenSequence, rows_of_step
from pipelines.worker.data.order import random_bits
from pipelines.worker.rank.metrics import MeanSinceLog
from vlm.batch import Batch
from vlm.config import GenerationConfig
from vlm.generation.generate import Completion, Request, generate
from vlm.model import VisionLanguageModel
from vlm.seeds import mix
from vlm.text.base import Tokenizer
from vlm.text.cider import Cider, rewarded_words
from vlm.text.prompt import prefix_ids
from vlm.training.loop import mixed_precision


class SampledRow(NamedTuple):
    """Training picture with a prompt, the words of its reference texts, and the seed of its sampled captions."""

    row: Row
    prompt: str
    references: list[list[str]]
    seed: int


def sampled_rows(shards: Shards, step: int, order: RowOrder, augmenter: Augmenter | None) -> list[SampledRow]:
    """Return the rows of this rank at a step, with one prompt per row and all reference texts of the prompt.

    A picture is augmented only in ways that keep all its reference texts true, because each sampled caption is compared
    with all reference texts.
    """
    rows, texts, picks = rows_of_step(shards, step, **order)
    references = [
        [text for other, text in row.texts if other == prompt] for row, (prompt, _) in zip(rows, texts, strict=True)
    ]
    if augmenter:
        shown = [(prompt, "\n".join(said)) for (prompt, _), said in zip(texts, references, strict=True)]
        rows = augmenter.rows(rows, shown, picks)
    return [
        SampledRow(row, prompt, [rewarded_words(text) for text in said], seed)
        for row, (prompt, _), said, seed in zip(
            rows, texts, references, random_bits(picks, seed=order["seed"]).tolist(), strict=True
        )
    ]


class CaptionSampler:
    """Sampler that generates captions for training rows, and returns batches in which each caption is weighted by its
    advantage.

    The setting `rows_at_once` limits the number of captions in a batch. However, all captions of a picture are in the
    same batch, so a batch has at least as many captions as there are samples per picture.

    Args:
        model: model whose captions are sampled, without a DDP wrapper.
        tokenizer: tokenizer of the model.
        collator: collator of the model.
        cider: CIDEr-D with the document frequencies of the training texts. The end token of a text counts as a word.
        objective: settings of the CIDEr objective (number of samples per picture, and temperature).
        settings: settings of the run.
        reward: running mean to which the CIDEr-D of the sampled captions is added.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        collator: Collator,
        cider: Cider,
        objective: CiderObjectiveConfig,
        *,
        settings: TrainConfig,
        reward: MeanSinceLog,
    ) -> None:
        self._model, self._tokenizer, self._collator, self._cider = model, tokenizer, collator, cider
        self._samples, self._rows_at_once = objective.samples, settings.rows_at_once
        self._bf16 = settings.precision == "bf16"
        self._reward = reward
        longest = model.config.generation.max_new_tokens
        self._settings = GenerationConfig(max_new_tokens=longest, temperature=objective.temperature)
        self._max_prefix = model.config.decoder.context - longest

    def sample(self, rows: Sequence[SampledRow]) -> list[Batch]:
        """Sample captions of the rows of a step, and return the captions as batches.

        The model is in training mode afterwards.
        """
        size = max(1, (self._rows_at_once or len(rows) * self._samples) // self._samples)
        self._model.eval()
        parts = [self._sample_part(rows[first : first + size]) for first in range(0, len(rows), size)]
        self._model.train()
        return parts

    def _sample_part(self, rows: Sequence[SampledRow]) -> Batch:
        prefixes = [
            prefix_ids(self._tokenizer, self._model.config.num_slots, row.prompt)[: self._max_prefix] for row in rows
        ]
        requests = [
            Request(prefix, (torch.tensor(row.row.pixels),), mix(row.seed, number))
            for row, prefix in zip(rows, prefixes, strict=True)
            for number in range(self._samples)
        ]
        with mixed_precision(self._model.mean.device, bf16=self._bf16):
            completions = generate(self._model, self._tokenizer, requests, self._settings)
        weights: list[float] = []
        for number, row in enumerate(rows):
            sampled = completions[number * self._samples : (number + 1) * self._samples]
            captions = [rewarded_words(each.text, complete=_is_complete(each)) for each in sampled]
            rewards = self._cider.scores(captions, row.references)
            weights += advantages(rewards)
            self._reward.add(sum(rewards) / len(rewards), len(rewards))
        sequences = [
            TokenSequence([*request.prefix, *self._targets(completion)], len(request.prefix))
            for request, completion in zip(requests, completions, strict=True)
        ]
        return self._collator.collate_samples([row.row for row in rows], sequences, weights)

    def _targets(self, completion: Completion) -> list[int]:
        return [*completion.tokens, *([self._tokenizer.eos_id] if _is_complete(completion) else [])]


def advantages(rewards: Sequence[float]) -> list[float]:
    """For each sample of a picture, return its reward minus the mean reward of the other samples (Luo, 2020)."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def _is_complete(completion: Completion) -> bool:
    """Return whether the model has ended the caption with an end token, and the caption was not cut at the limit."""
    return completion.num_tokens > len(completion.tokens)
