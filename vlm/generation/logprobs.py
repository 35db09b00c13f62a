"""Log-probabilities of given answers.

Letters in tensor names: rows of a batch (B), positions (T), target positions of the batch (N), vocabulary (V).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm.batch import IGNORE, Batch
from vlm.errors import UserError
from vlm.generation.finite import log_probabilities, require_finite
from vlm.generation.request import Request, picture_features
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import answer_ids

BATCH_ROWS = 32


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probabilities of a given answer.

    Attributes:
        tokens: text of each token of the answer; the last token is the end token, whose text is empty.
        logprobs: log-probability of each token, in nats, given the pictures, the prompt and the earlier tokens. As in
            `Completion.logprobs`, a token that generation never produces (such as padding) has probability 0.
    """

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Log-probability of the whole answer, in nats.

        Example:
            >>> import vlm
            >>> vlm.AnswerLogprobs(tokens=("a", ""), logprobs=(-0.5, -0.25)).total
            -0.75
        """
        return sum(self.logprobs)


def answer_logprobs(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], answers: Sequence[str]
) -> list[AnswerLogprobs]:
    """Compute the log-probabilities of one answer for each request.

    Raises:
        UserError: a request and its answer do not fit the model's context, or the model computes NaN or infinite
            values.
    """
    targets = [answer_ids(tokenizer, answer) for answer in answers]
    for request, target in zip(requests, targets, strict=True):
        length, context = len(request.prefix) + len(target) - 1, model.config.decoder.context
        if length > context:
            raise UserError(
                "the answer does not fit the model's context",
                where="log-probabilities",
                got=f"picture, prompt and answer need {length} positions",
                fix=f"shorten the prompt or the answer: the context has {context} positions",
            )
    found: list[AnswerLogprobs] = []
    for start in range(0, len(requests), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        scored = _batch_logprobs(model, tokenizer, requests[rows], targets[rows])
        for target, logprobs in zip(targets[rows], scored, strict=True):
            found.append(AnswerLogprobs(tuple(tokenizer.decode([token]) for token in target), logprobs))
    return found


@torch.inference_mode()
def _batch_logprobs(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], targets: Sequence[list[int]]
) -> list[tuple[float, ...]]:
    """Return the log-probabilities of the target tokens of each request."""
    rows = [[*request.prefix, *target[:-1]] for request, target in zip(requests, targets, strict=True)]
    tokens_BT = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_id, dtype=torch.long, device="cpu")
    labels_BT = torch.full_like(tokens_BT, IGNORE)
    for index, (row, request, target) in enumerate(zip(rows, requests, targets, strict=True)):
        tokens_BT[index, : len(row)] = torch.tensor(row, dtype=torch.long, device="cpu")
        labels_BT[index, len(request.prefix) - 1 : len(row)] = torch.tensor(target, dtype=torch.long, device="cpu")
    # The features of the pictures are computed separately, because several answers may belong to the same picture.
    pixels = torch.empty(0, dtype=torch.uint8, device="cpu")
    features_PNW = None if model.config.text_only else picture_features(model, requests)
    prefix_lengths_B = torch.tensor([len(request.prefix) for request in requests], dtype=torch.long, device="cpu")
    batch = Batch(pixels, tokens_BT, labels_BT, prefix_lengths_B).to(model.mean.device)
    logits_NV = model(batch, features_PNW).float()
    logits_NV[:, list(tokenizer.suppressed_ids)] = -torch.inf
    labels_N = batch.labels_BT[batch.labels_BT != IGNORE]
    logprobs_N = log_probabilities(logits_NV, labels_N)
    require_finite(model, logprobs_N.tolist())
    parts = torch.split(logprobs_N.cpu(), [len(target) for target in targets])
    return [tuple(part.tolist()) for part in parts]
