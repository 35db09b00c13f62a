"""Tests of the mixture of experts: the dispatch of tokens, and the noise, precision and gradients of routers."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.formats.run_folder import Metrics
from pipelines.tracking.describe.figures import draw_expert_load
from vlm.layers.moe import GatedExperts, MoeMlp, PlainExperts, Routing, dispatch, naive_experts

X, K = 5, 2
CHOSEN = {
    "spread": [[n % X, (n * 3 + 1 + n % X) % X] for n in range(23)],
    "one expert without tokens": [[(0, 1, 3)[n % 3], 4] for n in range(23)],
    "two experts for all tokens": [[2, 1]] * 23,
    "one token": [[4, 0]],
}


def make_experts(kind: str, width: int, mlp_width: int, *, bias: bool) -> PlainExperts | GatedExperts:
    torch.manual_seed(0)
    make = GatedExperts if kind == "gated" else PlainExperts
    experts = make(X, width, mlp_width, F.silu, bias=bias)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def make_layer(*, noisy: bool) -> MoeMlp:
    layer = MoeMlp(16, make_experts("plain", 16, 32, bias=True), top_k=K, noisy=noisy, balance_weight=0.0, z_weight=0.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def gradients(experts: PlainExperts | GatedExperts, x_NW: Tensor, gates_NK: Tensor, y_NW: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((y_NW * torch.randn_like(y_NW)).sum(), [x_NW, gates_NK, *experts.parameters()]))


# The widths cover both implementations: rows of a multiple of 16 bytes use torch's grouped kernel, and rows of any
# other size use a padded matrix product.
@pytest.mark.parametrize("widths", [(16, 32), (8, 20), (6, 10)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_sending_tokens_to_experts_in_groups_equals_a_plain_loop_over_the_experts(
    chosen: str, kind: str, bias: bool, widths: tuple[int, int]
) -> None:
    experts = make_experts(kind, *widths, bias=bias)
    chosen_NK = torch.tensor(CHOSEN[chosen])
    x_NW = torch.randn(len(chosen_NK), widths[0], requires_grad=True)
    gates_NK = torch.rand(len(chosen_NK), K, requires_grad=True)
    routing = Routing(torch.zeros(len(chosen_NK), X), gates_NK, chosen_NK)
    fast, slow = dispatch(experts, x_NW, routing), naive_experts(experts, x_NW, routing)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(experts, x_NW, gates_NK, fast), gradients(experts, x_NW, gates_NK, slow), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_output_of_a_token_sums_the_outputs_of_its_best_experts_with_softmax_weights() -> None:
    layer, x_1W = make_layer(noisy=False).eval(), torch.randn(1, 16)
    logits_X = (x_1W @ layer.router.weight.T)[0]
    first, second = logits_X.argsort(descending=True)[:K].tolist()
    weight = torch.sigmoid(logits_X[first] - logits_X[second])

    def expert(number: int) -> Tensor:
        up, out = layer.experts.get_submodule("up"), layer.experts.out
        hidden = F.silu(x_1W @ up.weight[number].T + up.bias[number])  # type: ignore[index]
        return hidden @ out.weight[number].T + out.bias[number]  # type: ignore[index]

    torch.testing.assert_close(layer(x_1W), weight * expert(first) + (1 - weight) * expert(second))


def test_the_router_adds_noise_only_in_training_and_the_seed_decides_the_noise() -> None:
    layer, x = make_layer(noisy=True), torch.randn(2, 40, 16)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    layer.train()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_scale_of_the_router_noise_is_a_learned_parameter() -> None:
    layer = make_layer(noisy=True).train()
    assert layer.noise is not None
    x_NW = torch.randn(1, 16).expand(4000, 16)
    nn.init.constant_(layer.router.weight, 0.0)
    nn.init.constant_(layer.noise.weight, -100.0)
    layer.noise.weight.data[3] = 0.3
    with torch.no_grad():
        assert layer.route(x_NW.abs()).chosen_NK.flatten().bincount(minlength=X)[3] == pytest.approx(2000, abs=150)
        layer.noise.weight.data[3] = -100.0
        assert layer.route(x_NW.abs()).gates_NK.allclose(torch.tensor(0.5))


def test_the_router_the_noise_layer_and_the_experts_get_gradients() -> None:
    layer = make_layer(noisy=True).train()
    assert layer.noise is not None
    layer(torch.randn(30, 16)).square().sum().backward()
    for parameter in (layer.router.weight, layer.noise.weight, *layer.experts.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_the_router_computes_in_fp32_under_autocast() -> None:
    layer, x_NW = make_layer(noisy=False).train(), torch.randn(200, 16)
    plain = layer(x_NW)
    expected = layer.pop_routing()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x_NW)
    found = layer.pop_routing()
    assert torch.equal(found.logits_NX, expected.logits_NX)
    assert torch.equal(found.chosen_NK, expected.chosen_NK)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), plain, rtol=0.1, atol=0.1)


def test_the_routing_is_stored_only_in_a_training_pass_and_is_removed_by_pop_routing() -> None:
    layer = make_layer(noisy=False)
    layer.train()(torch.randn(3, 7, 16))
    layer.eval()(torch.randn(5, 16))
    assert layer.pop_routing().chosen_NK.shape == (21, K)
    assert layer.pop_routing().chosen_NK.shape == (0, K)


def test_the_expert_load_plot_shows_the_load_of_each_layer_relative_to_an_even_load() -> None:
    load = {"encoder.blocks.0": (0.1, 0.9), "decoder.blocks.0": (0.25, 0.5, 0.25, 0.0)}
    (axes,) = draw_expert_load(Metrics(step=7, time=0.0, values={}, expert_load=load)).axes
    drawn: npt.NDArray[np.float64] = np.ma.filled(np.ma.asarray(axes.images[0].get_array()), np.nan)
    assert drawn == pytest.approx(np.array([[0.2, 1.8, np.nan, np.nan], [1.0, 2.0, 1.0, 0.0]]), nan_ok=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(load)
    assert {text.get_text() for text in axes.texts} == {"0.10", "0.90", "0.25", "0.50", "0.00"}
