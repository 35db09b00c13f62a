"""The mixture of experts gives the same outputs and gradients as Mixtral in transformers with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from vlm.batch import IGNORE, Batch
from vlm.layers.moe import GatedExperts, MoeMlp
from vlm.training.objective import router_loss

WIDTH, MLP_WIDTH, EXPERTS = 24, 40, 6


def both(top_k: int) -> tuple[MoeMlp, nn.Module]:
    """Return our mixture-of-experts layer and Mixtral's layer, with the same random weights."""
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs: nn.Module = MixtralSparseMoeBlock(config)
    experts = GatedExperts(EXPERTS, WIDTH, MLP_WIDTH, F.silu, bias=False)
    ours = MoeMlp(WIDTH, experts, top_k=top_k, noisy=False, balance_weight=1.0, z_weight=0.0)
    names = {
        "gate.weight": "router.weight",
        "experts.gate_up_proj": "experts.gate_up.weight",
        "experts.down_proj": "experts.out.weight",
    }
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            ours.get_parameter(names.pop(name)).copy_(parameter)
    assert not names
    return ours, theirs


def gradients(layer: nn.Module, x_BTW: Tensor, y_BTW: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Return the gradients of a layer by their shapes, because our parameter names differ from Mixtral's."""
    torch.manual_seed(2)
    given = [x_BTW, *layer.parameters()]
    found = torch.autograd.grad((y_BTW * torch.randn_like(y_BTW)).sum(), given)
    return {tuple(gradient.shape): gradient for gradient in found}


@pytest.mark.parametrize("top_k", [2, 3])
def test_mixture_of_experts_gives_the_outputs_and_gradients_of_mixtral(top_k: int) -> None:
    ours, theirs = both(top_k)
    x_BTW = torch.randn(3, 17, WIDTH, requires_grad=True)
    mine, expected = ours(x_BTW), theirs(x_BTW)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    found, reference = gradients(ours, x_BTW, mine), gradients(theirs, x_BTW, expected)
    assert len(found) == 4
    for shape, gradient in reference.items():
        torch.testing.assert_close(found[shape], gradient, rtol=1e-5, atol=1e-5)


def test_the_load_balance_loss_without_padding_equals_the_loss_in_the_transformers_library() -> None:
    ours, _ = both(2)
    real_BT = torch.arange(17) < torch.tensor([[17], [9], [12]])
    labels_BT = torch.where(real_BT, 1, IGNORE)
    ours.train()(torch.randn(3, 17, WIDTH))
    logits_NX = ours.routing.logits_NX  # type: ignore[union-attr]
    loss, report = router_loss({"decoder.blocks.0": ours}, Batch(*3 * (labels_BT,), torch.zeros(3)))
    (mine,) = torch.autograd.grad(loss, logits_NX)
    logits_NX = logits_NX.detach().requires_grad_()
    # At an even load, transformers' loss equals top_k (here 2), and our loss equals 1.
    expected = load_balancing_loss_func((logits_NX,), EXPERTS, 2, real_BT) / 2
    assert isinstance(expected, Tensor)
    assert report.balance == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, logits_NX)[0], rtol=1e-5, atol=1e-7)
