"""Training of a text-only model in one rank, which reads windows of a token file instead of pictures with captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from pipelines.formats.run_files.token_file import TRAIN_TOKENS, VALIDATE_TOKENS, TokenSummary, read_tokens
from pipelines.formats.run_folder import CaptionSample
from pipelines.formats.shards import Shards
from pipelines.worker.data.windows import Windows, training_windows
from pipelines.worker.train.stages import advise_on_rates
from pipelines.worker.train.trainer import Trainer
from vlm.batch import Batch
from vlm.generation.generate import Request, generate
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.training.loop import SLOWER, NotFiniteError
from vlm.training.objective import row_losses
from vlm.training.parallel import global_sum

PROMPT_SHARE = 4
"""For a sample, the model continues the beginning of a validation window. The beginning is at most 1/PROMPT_SHARE of
the window."""


class TextTrainer(Trainer):
    """Trainer of a text-only model, which overrides the methods of Trainer that read pictures."""

    def __post_init__(self) -> None:
        """Open the token files of the run."""
        super().__post_init__()
        context = self.file.config.model.decoder.context
        train, _ = read_tokens(self.run.path / TRAIN_TOKENS)
        held_out, self.summary = read_tokens(self.run.path / VALIDATE_TOKENS)
        self.train_windows = Windows.of(train, context, self.tokenizer)
        self.validate_windows = Windows.of(held_out, context, self.tokenizer)

    def copied_shards(self) -> tuple[Shards, ...]:
        """Return no shards, because the ranks of a text-only model read token files."""
        return ()

    def batches(self, steps: range) -> Iterator[list[Batch]]:
        """Return the windows on which this rank trains at the given steps."""
        settings = self.file.config.train
        return training_windows(
            self.train_windows,
            steps=steps,
            **self.row_order(),
            rows_at_once=settings.rows_at_once,
            workers=settings.loader_workers,
            pinned=self.device.type == "cuda",
        )

    def compute_validation(self, step: int, batch_size: int) -> dict[str, float]:
        """Compute the loss of the first validation windows."""
        return validate_text(
            self.model,
            self.validate_windows,
            self.summary,
            step=step,
            num_windows=self.file.config.train.validate_rows,
            batch_size=batch_size,
            rank=self.env.rank,
            world_size=self.env.world_size,
            report_progress=self.monitor.report_progress,
        )

    def with_pictures(self, error: NotFiniteError) -> NotFiniteError:
        """Return the error without the names of windows, and without a command that replays the step.

        Windows have no names, and a step with windows cannot be replayed.
        """
        error.fix = advise_on_rates(error.fix, self.file.config.train)
        return error

    def sample(self, model: VisionLanguageModel, count: int) -> tuple[CaptionSample, ...]:
        """Let the model continue the texts with which the first validation windows begin."""
        count = min(count, self.summary.windows(self.validate_windows.context))
        return continue_windows(model, self.tokenizer, self.validate_windows, count)


@torch.no_grad()
def validate_text(
    model: VisionLanguageModel,
    windows: Windows,
    summary: TokenSummary,
    *,
    step: int,
    num_windows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    report_progress: Callable[[], None],
) -> dict[str, float]:
    """Compute val/loss (nats per token) and val/loss_per_char (nats per character) on windows, divided among the ranks.

    The end of a text is a token too, and the loss of this token counts. This function is a collective: every rank must
    call it at the same step and gets the same values.

    Args:
        model: model to validate, which is in training mode afterwards.
        windows: windows of the validation tokens, of which the first `num_windows` are used.
        summary: summary of the validation tokens, for the number of characters per token.
        step: number of the last training step, for the error message.
        num_windows: largest number of windows.
        batch_size: number of windows per batch of a rank.
        rank: number of this rank, 0 <= rank < world_size.
        world_size: number of ranks.
        report_progress: function to call after each batch.

    Raises:
        NotFiniteError: a loss is not finite.
    """
    total = min(num_windows, summary.windows(windows.context))
    device = model.mean.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    own = np.array_split(np.arange(total, dtype=np.int64), world_size)[rank]
    model.eval()
    # All ranks must call a sharded model equally often, so a rank without windows computes losses and discards them.
    for first in range(0, -(-total // world_size), batch_size):
        chosen = own[first : first + batch_size]
        batch = windows.held_out_batch(chosen if len(chosen) else np.zeros(1, np.int64)).to(device)
        losses_B, tokens_B = row_losses(model, batch)
        sums += bool(len(chosen)) * torch.stack([losses_B.double().sum(), tokens_B.double().sum()])
        report_progress()
    model.train()
    loss, tokens = global_sum(sums).tolist()
    if not math.isfinite(loss):
        error = NotFiniteError(
            "the validation loss is not finite",
            where=f"the validation after step {step}",
            got=str(loss),
            fix=SLOWER,
        )
        error.step, error.in_validation = step, True
        raise error
    return {"val/loss": loss / tokens, "val/loss_per_char": loss / tokens * summary.targets / summary.chars}


def continue_windows(
    model: VisionLanguageModel, tokenizer: Tokenizer, windows: Windows, count: int
) -> tuple[CaptionSample, ...]:
    """Let the model continue the texts with which the first windows begin.

    For each window, return the text of the window, and the beginning of this text with the model's continuation.
    """
    settings = model.config.generation
    length = min(windows.context // PROMPT_SHARE, windows.context - settings.max_new_tokens - 1)
    samples = []
    model.eval()
    for number in range(count):
        ids = [i for i in windows.held_out_batch(np.array([number])).tokens_BT[0].tolist() if i != windows.bos_id]
        beginning = ids[:length]
        (made,) = generate(model, tokenizer, [Request([windows.bos_id, *beginning])], settings)
        samples.append(
            CaptionSample(
                row=number,
                image_id="",
                text=tokenizer.decode(ids),
                caption=tokenizer.decode([*beginning, *made.tokens]),
            )
        )
    model.train()
    return tuple(samples)
