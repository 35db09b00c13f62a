"""Training loop over batches that the caller provides, with a report after each step.

The training state consists of the weights, the optimizer state and the number of the next step. Random numbers inside a
step, such as dropout, are seeded with (seed, step, rank), so that a resumed run takes exactly the same steps as an
uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.errors import LakesightError
from vlm.layers.moe import MoeMlp
from vlm.seeds import mix
from vlm.training.contrastive import Contrast
from vlm.training.objective import RouterReport, num_targets, routed_layers, router_loss, token_loss
from vlm.training.parallel import full_tensor, global_sum, gradient_sync, to_host, unwrap_ddp, world_size


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step over the global batch.

    Attributes:
        step: number of the step; the first step has number 0.
        loss: caption loss of the global batch before the step, in nats per target token. This loss contains no label
            smoothing, no router losses and no contrastive loss.
        lr: learning rate of the step; the largest learning rate if parameter groups have different rates.
        grad_norm: norm of the global gradient before clipping.
        tokens: number of target tokens of the global batch.
        router: router losses and expert load before the step, or None for a model without mixture of experts.
        contrastive: contrastive loss before the step, as a mean over ranks, or None without a contrastive loss.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    router: RouterReport | None
    contrastive: float | None = None


SLOWER = "lower train.optimizer.lr or raise train.optimizer.warmup_steps (this creates a new run)"
"""Advice in the error of a training that diverged."""


class NotFiniteError(LakesightError):
    """Error for a loss or gradient that is NaN or infinite, or for a batch without target tokens.

    Attributes:
        step: number of the step.
        on_other_rank: True if the loss of another rank is not finite, but the loss of this rank is finite.
        in_validation: True if the loss is the validation loss after the step.
    """

    step = 0
    on_other_rank = False
    in_validation = False


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sequence[Batch]],
    *,
    start: int,
    lr_schedule: Callable[[int], float],
    grad_clip: float,
    seed: int,
    rank: int,
    device: torch.device,
    bf16: bool,
    on_step: Callable[[StepReport], None],
    label_smoothing: float = 0.0,
    contrastive: float = 0.0,
) -> None:
    """Take one optimizer step for each batch, starting with step number `start`.

    Args:
        model: model that returns the logits of a Batch's target positions; for several ranks, with DDP or FSDP.
        optimizer: optimizer from `vlm.training.optim.build_adamw`.
        batches: for each step, this rank's share of the global batch, as a sequence of parts. The gradients of the
            parts are accumulated. The number of parts is the same on all ranks. Smaller parts need less memory.
        start: number of the first step to take; a new run starts with step 0.
        lr_schedule: function that returns the learning rate of a step; each parameter group multiplies the rate by its
            `lr_share`.
        grad_clip: largest gradient norm; a larger gradient is scaled down to this norm.
        seed: seed of the training run.
        rank: rank of this process.
        device: device of the model.
        bf16: whether to run the forward pass under bfloat16 autocast.
        on_step: function that is called after every step, on every rank.
        label_smoothing: share of the target probability that is spread over all tokens. The reported loss has no label
            smoothing.
        contrastive: weight of the contrastive loss between pictures and texts; 0 turns this loss off.

    Raises:
        NotFiniteError: the loss or gradient is not finite, or all targets are masked. The failed step changed no
            weights.
    """
    model.train()
    layers = routed_layers(unwrap_ddp(model))
    contrast = Contrast(unwrap_ddp(model), contrastive) if contrastive else None
    backward = partial(_backward, model, layers, contrast=contrast, label_smoothing=label_smoothing, bf16=bf16)
    for step, batch in enumerate(batches, start):
        torch.manual_seed(mix(seed, step, rank))
        parts = [part.to(device) for part in batch]
        tokens = global_sum(torch.stack([num_targets(part) for part in parts]).sum().double())
        rank_loss, routers = _accumulate(model, parts, partial(backward, tokens=tokens, num_parts=len(parts)))
        norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
        sums = global_sum(torch.stack((rank_loss, contrast.take_mean() if contrast else torch.zeros_like(rank_loss))))
        total, pairs, num_tokens, grad_norm = to_host(torch.stack((*sums, tokens, norm.double())))
        loss = total / num_tokens if num_tokens else math.nan
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _divergence_error(step, loss, grad_norm, rank, rank_loss) if num_tokens else _no_targets_error(step)
        _take_step(optimizer, lr_schedule(step))
        router_report = RouterReport.mean(routers) if routers else None
        mean_contrast = pairs / world_size() if contrast else None
        on_step(StepReport(step, loss, lr_schedule(step), grad_norm, int(num_tokens), router_report, mean_contrast))


def _accumulate(
    model: nn.Module, parts: Sequence[Batch], backward: Callable[[Batch], tuple[Tensor, RouterReport | None]]
) -> tuple[Tensor, list[RouterReport]]:
    """Accumulate the gradients of all parts of this rank's batch. Return this rank's loss, summed over targets, and one
    router report per part.
    """
    rank_loss, routers = torch.zeros((), dtype=torch.float64, device=parts[0].tokens_BT.device), []
    for number, part in enumerate(parts, 1):
        with gradient_sync(model, enabled=number == len(parts)):
            loss_sum, router = backward(part)
        rank_loss += loss_sum
        routers += [router] if router else []
    return rank_loss, routers


def _take_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the optimizer take a step with the accumulated gradients, and delete the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _backward(
    model: nn.Module,
    layers: Mapping[str, MoeMlp],
    part: Batch,
    tokens: Tensor,
    num_parts: int,
    *,
    contrast: Contrast | None,
    label_smoothing: float,
    bf16: bool,
) -> tuple[Tensor, RouterReport | None]:
    """Accumulate the gradients of one part of a batch, and return the summed loss and the router report of the part."""
    keep_features = contrast.keep_features() if contrast else nullcontext()
    with mixed_precision(part.tokens_BT.device, bf16=bf16), keep_features:
        logits_NV = model(part)
        objective = token_loss(logits_NV, part, label_smoothing)
        # The reported loss needs no gradient, so no tensors are kept for its backward pass.
        loss_sum = token_loss(logits_NV.detach(), part) if label_smoothing else objective
    # The loss is a mean over the tokens of all ranks. DDP divides the summed gradients by the number of ranks, so
    # multiply the loss by the number of ranks.
    objectives, report = [objective * (world_size() / tokens).to(objective.dtype)], None
    if layers:
        router_part, report = router_loss(layers, part)
        if router_part.requires_grad:  # `requires_grad` is False if no trained weight can change a router's choice
            objectives.append(router_part * (world_size() / num_parts))
    if contrast:  # the text pass of `contrast.loss` overwrites the routing, so compute the router loss first
        with mixed_precision(part.tokens_BT.device, bf16=bf16):
            contrastive_part = contrast.loss(part) / num_parts
        if contrastive_part.requires_grad:  # `requires_grad` is False if no trained weight can change the loss
            objectives.append(contrastive_part)
    torch.autograd.backward(objectives)
    return loss_sum.detach(), report


def _no_targets_error(step: int) -> NotFiniteError:
    error = NotFiniteError(
        "the batch has no target tokens",
        where=f"step {step}",
        got="all targets are masked, on all ranks",
        fix="remove the pictures without texts, or raise model.decoder.context, so that prompts leave room for texts",
    )
    error.step = step
    return error


def _divergence_error(step: int, loss: float, grad_norm: float, rank: int, rank_loss: Tensor) -> NotFiniteError:
    """Build an error that names the ranks whose loss is not finite. All ranks must call this function together."""
    finite = torch.zeros(world_size(), device=rank_loss.device)
    finite[rank] = rank_loss.detach().isfinite()
    bad = [number for number, is_finite in enumerate(to_host(global_sum(finite))) if not is_finite]
    error = NotFiniteError(
        "training diverged",
        where=f"step {step}" + (f", the loss of rank {', '.join(map(str, bad))}" if bad else ""),
        got=f"loss {loss}, gradient norm {grad_norm}",
        fix=SLOWER,
    )
    error.step = step
    error.on_other_rank = bool(bad) and rank not in bad
    return error


def mixed_precision(device: torch.device, *, bf16: bool) -> AbstractContextManager[object]:
    """Return a context manager that enables bfloat16 autocast if `bf16` is True and does nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
