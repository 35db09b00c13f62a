"""The training loop, and nothing else: where batches come from and where reports go is the caller's business.

The whole state is weights, optimizer and one integer. Randomness inside a step (dropout) is seeded by (seed, step,
rank), so a loop that starts at step k does exactly what an uninterrupted one does from step k on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.errors import LakesightError
from vlm.layers.moe import MoeMlp
from vlm.seeds import mix
from vlm.training.objective import RouterReport, num_targets, routed_layers, router_loss, token_loss
from vlm.training.parallel import full_tensor, global_sum, gradient_sync, to_host, unwrap_ddp, world_size


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over the global batch.

    Attributes:
        step: 0-based number of the step just taken.
        loss: nats per target token of the global batch, before the step.
        lr: learning rate used: the largest, where groups have their own.
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
    """Loss or gradient became NaN or infinite.

    Attributes:
        on_other_rank: the loss of this rank was finite, and that of another was not.
    """

    on_other_rank = False


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
) -> None:
    """Take one optimizer step a batch, from step `start` on.

    Args:
        model: called with a Batch, returns logits at its targets; wrapped in DDP where there are several ranks.
        optimizer: of `vlm.training.optim.build_adamw`.
        batches: this rank's slice of each global batch, the one of step `start` first, in parts, as many on each rank:
            one is computed after another, and their gradients are added up, so it is the same step in less memory.
        start: number of the first step.
        lr_schedule: learning rate of a step; each group of the optimizer takes its share of it.
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
    layers = routed_layers(unwrap_ddp(model))
    for step, batch in enumerate(batches, start):
        torch.manual_seed(mix(seed, step, rank))
        parts = [part.to(device) for part in batch]
        tokens = global_sum(torch.stack([num_targets(part) for part in parts]).sum().double())
        own, routers = torch.zeros((), dtype=torch.float64, device=device), []
        for number, part in enumerate(parts, 1):
            with gradient_sync(model, here=number < len(parts)):
                loss_sum, router = _backward(model, layers, part, tokens, len(parts), bf16=bf16)
            own += loss_sum
            routers += [router] if router else []
        norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
        total, num_tokens, grad_norm = to_host(torch.stack((global_sum(own), tokens, norm.double())))
        loss = total / num_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _diverged(step, loss, grad_norm, rank, own)
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule(step) * group["lr_share"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        met = RouterReport.mean(routers) if routers else None
        on_step(StepReport(step, loss, lr_schedule(step), grad_norm, int(num_tokens), met))


def _backward(
    model: nn.Module, layers: Mapping[str, MoeMlp], part: Batch, tokens: Tensor, num_parts: int, *, bf16: bool
) -> tuple[Tensor, RouterReport | None]:
    """Gradients of a part of this rank's slice; returns its summed loss, and what its routers did."""
    with mixed_precision(part.tokens_BT.device, bf16=bf16):
        loss_sum = token_loss(model(part), part)
    # DDP averages gradients over ranks; the losses are means over the tokens of all ranks.
    objectives, report = [loss_sum * (world_size() / tokens).to(loss_sum.dtype)], None
    if layers:
        router_part, report = router_loss(layers, part)
        if router_part.requires_grad:  # not where an adapter is all that learns, behind the last router
            objectives.append(router_part * (world_size() / num_parts))
    torch.autograd.backward(objectives)
    return loss_sum.detach(), report


def _diverged(step: int, loss: float, grad_norm: float, rank: int, own: Tensor) -> NotFiniteError:
    """The error, with the ranks whose own loss began it. Every rank comes here at the same step."""
    fine = torch.zeros(world_size(), device=own.device)
    fine[rank] = own.detach().isfinite()
    bad = [number for number, is_fine in enumerate(to_host(global_sum(fine))) if not is_fine]
    error = NotFiniteError(
        "training diverged",
        where=f"step {step}" + (f", the loss of rank {', '.join(map(str, bad))}" if bad else ""),
        got=f"loss {loss}, gradient norm {grad_norm}",
        fix="lower train.optimizer.lr or raise train.optimizer.warmup_steps (a new run: it starts over)",
    )
    error.on_other_rank = bool(bad) and rank not in bad
    return error


def mixed_precision(device: torch.device, *, bf16: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where it is asked for."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
