"""The training loop, and nothing else: where batches come from and where reports go is the caller's business.

The whole state is weights, optimizer and one integer. Randomness inside a step (dropout) is seeded by (seed, step,
rank), so a loop that starts at step k does exactly what an uninterrupted one does from step k on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from vlm.batch import Batch
from vlm.errors import LakesightError
from vlm.objective import RouterReport, num_targets, routed_layers, router_loss, token_loss
from vlm.parallel import global_sum, unwrap, world_size
from vlm.seeds import mix


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over the global batch.

    Attributes:
        step: 0-based number of the step just taken.
        loss: nats per target token of the global batch, before the step.
        lr: learning rate used.
        grad_norm: global gradient norm before clipping.
        tokens: target tokens of the global batch.
        router: what routers did before the step; None for a dense model. Their losses are trained on beside `loss`, and
            are no part of it.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    router: RouterReport | None


class NotFiniteError(LakesightError):
    """Loss or gradient became NaN or infinite."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    start: int,
    lr_of: Callable[[int], float],
    grad_clip: float,
    seed: int,
    rank: int,
    device: torch.device,
    bf16: bool,
    on_step: Callable[[StepReport], None],
) -> None:
    """Take one optimizer step a batch, from step `start` on.

    Args:
        model: called with a Batch, returns logits at its targets; wrapped in DDP where there are several ranks.
        optimizer: over the model's parameters.
        batches: this rank's slice of each global batch, the one of step `start` first.
        start: number of the first step.
        lr_of: learning rate of a step.
        grad_clip: largest gradient norm.
        seed: of the run.
        rank: of this process.
        device: where the model is.
        bf16: run the forward pass in bfloat16 autocast.
        on_step: called after every step on every rank.

    Raises:
        NotFiniteError: a loss or gradient that is not finite; the weights are those before the step.
    """
    model.train()
    layers = routed_layers(unwrap(model))
    for step, batch in enumerate(batches, start):
        torch.manual_seed(mix(seed, step, rank))
        on_device = batch.to(device)
        with mixed_precision(device, bf16=bf16):
            loss_sum = token_loss(model(on_device), on_device)
        loss_and_tokens = global_sum(torch.stack((loss_sum.detach().double(), num_targets(on_device).double())))
        total, tokens = (float(v) for v in loss_and_tokens)
        # DDP averages gradients over ranks; the losses are means over the tokens of all ranks.
        objectives, router = [loss_sum * (world_size() / tokens)], None
        if layers:
            router_part, router = router_loss(layers, on_device)
            if router_part.requires_grad:  # not where an adapter is all that learns, behind the last router
                objectives.append(router_part * world_size())
        torch.autograd.backward(objectives)
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
        loss = total / tokens
        _require_finite(step, loss, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(StepReport(step, loss, lr_of(step), grad_norm, int(tokens), router))


def _require_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFiniteError(
            "training diverged",
            where=f"step {step}",
            got=f"loss {loss}, gradient norm {grad_norm}",
            fix="lower train.optimizer.lr or raise train.optimizer.warmup_steps (a new run: it starts over)",
        )


def mixed_precision(device: torch.device, *, bf16: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where it is asked for."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
