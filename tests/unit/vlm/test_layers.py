"""Tests that compare layers with slow reference implementations of the layers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from vlm.config import AxialPositionConfig
from vlm.layers.attention import Attention
from vlm.layers.block import Block
from vlm.layers.cache import KVCache
from vlm.layers.mask import apply_window, attention_mask, prefix_marks
from vlm.layers.mlp import PlainMlp
from vlm.layers.norm import OffsetRmsNorm
from vlm.layers.position import Angles, AxialRotary, Rotary, apply_rotary


def naive_attention(layer: Attention, x_BTW: Tensor, mask_TS: Tensor, angles: Angles | None) -> Tensor:
    """Compute attention as softmax(q k / sqrt(head_dim)) v, in a loop over the heads."""
    H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = layer.qkv(x_BTW).split([H * D, K * D, K * D], dim=-1)
    heads = []
    for h in range(H):
        shared = h // (H // K)
        q_h, k_h = q[..., h * D : (h + 1) * D], k[..., shared * D : (shared + 1) * D]
        if angles is not None:
            q_h, k_h = apply_rotary(q_h[:, None], angles)[:, 0], apply_rotary(k_h[:, None], angles)[:, 0]
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(D)
        if layer.soft_cap is not None:
            scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
        scores = scores.masked_fill(~mask_TS, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., shared * D : (shared + 1) * D])
    return torch.as_tensor(layer.out(torch.cat(heads, dim=-1)))


def make_attention(num_kv_heads: int, soft_cap: float | None = None) -> Attention:
    torch.manual_seed(0)
    return Attention(
        24, num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, bias=True, out_bias=True, dropout=0.0, soft_cap=soft_cap
    ).eval()


ROTARY = Rotary(6, 32, 10_000.0)


def angles_of(rotary: bool, start: int, end: int) -> Angles | None:
    return ROTARY(slice(start, end), torch.float32) if rotary else None


@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_the_attention_formula_head_by_head(
    num_kv_heads: int, rotary: bool, soft_cap: float | None
) -> None:
    layer, x_BTW, angles = make_attention(num_kv_heads, soft_cap), torch.randn(2, 7, 24), angles_of(rotary, 0, 7)
    for causal, mask in ((True, torch.ones(7, 7).tril().bool()), (False, torch.ones(7, 7).bool())):
        expected = naive_attention(layer, x_BTW, mask, angles)
        torch.testing.assert_close(layer(x_BTW, mask=None, causal=causal, angles=angles), expected)
        torch.testing.assert_close(layer(x_BTW, mask=mask[None, None], causal=False, angles=angles), expected)


@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_computed_piece_by_piece_with_the_cache_equals_attention_over_the_whole_sequence(
    rotary: bool, soft_cap: float | None
) -> None:
    layer, x_BTW = make_attention(2, soft_cap), torch.randn(2, 9, 24)
    cache = KVCache(
        depth=1, batch=2, num_kv_heads=2, context=9, head_dim=6, dtype=torch.float32, device=torch.device("cpu")
    )
    outputs = []
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, 9))):
        angles = angles_of(rotary, start, end)
        outputs.append(layer(x_BTW[:, start:end], mask=None, causal=True, angles=angles, cache=cache, layer=0))
        cache.advance(end - start)
    whole = layer(x_BTW, mask=None, causal=True, angles=angles_of(rotary, 0, 9))
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


def test_the_dot_product_of_rotated_vectors_depends_only_on_the_distance_of_their_positions() -> None:
    rotary, q, k = Rotary(8, 64, 10_000.0), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def rotated(x: Tensor, at: int) -> Tensor:
        return apply_rotary(x, rotary(slice(at, at + 1), torch.float32))

    def dot(at: int, other: int) -> Tensor:
        return (rotated(q, at) * rotated(k, other)).sum()

    torch.testing.assert_close(dot(5, 2), dot(40, 37))
    torch.testing.assert_close(rotated(q, 7).norm(), q.norm())
    assert not torch.isclose(dot(5, 2), dot(5, 4))


@pytest.mark.parametrize("coordinates", ["index", "centred"])
@pytest.mark.parametrize("first", ["row", "column"])
def test_axial_rotation_makes_dot_products_depend_on_the_distance_in_rows_and_in_columns(
    coordinates: str, first: str
) -> None:
    config = AxialPositionConfig.model_validate({"kind": "axial", "coordinates": coordinates, "first": first})
    side, extra = 4, 2
    cos, sin = AxialRotary(config, head_dim=8, side=side, extra=extra)(torch.float32)
    assert cos.shape == (extra + side**2, 4)
    q, k = (torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rotated_q, rotated_k = (apply_rotary(each.expand(1, 1, len(cos), -1), (cos, sin))[0, 0] for each in (q, k))
    assert torch.equal(rotated_q[:extra], q.expand(extra, -1)), "class token and registers are not rotated"
    products = rotated_q[extra:] @ rotated_k[extra:].T
    by_distance: dict[tuple[int, int], list[float]] = {}
    for i in range(side**2):
        for j in range(side**2):
            distance = (i // side - j // side, i % side - j % side)
            by_distance.setdefault(distance, []).append(float(products[i, j]))
    assert all(max(found) - min(found) < 1e-5 for found in by_distance.values())
    means = {distance: round(sum(found) / len(found), 3) for distance, found in by_distance.items()}
    assert len({*means.values()}) > len(means) * 0.9
    quarter = cos[extra + 1, :2] if first == "row" else cos[extra + 1, 2:]
    assert torch.equal(quarter, cos[extra, :2] if first == "row" else cos[extra, 2:]), "row angles ignore the column"


def test_rotary_angles_are_the_same_for_positions_given_as_a_tensor_or_as_a_slice() -> None:
    rotary, x = Rotary(8, 64, 10_000.0), torch.randn(2, 3, 5, 8)
    rows = torch.tensor([[4, 5, 6, 7, 8], [0, 0, 0, 1, 2]])
    by_row = apply_rotary(x, rotary(rows, torch.float32))
    torch.testing.assert_close(by_row[0], apply_rotary(x[:1], rotary(slice(4, 9), torch.float32))[0])
    torch.testing.assert_close(by_row[1, :, 2:], apply_rotary(x[1:, :, 2:], rotary(slice(0, 3), torch.float32))[0])


def test_the_offset_rms_norm_equals_an_rms_norm_whose_weight_is_one_larger() -> None:
    offset, plain, x = OffsetRmsNorm(8, 1e-6), torch.nn.RMSNorm(8, 1e-6), torch.randn(3, 8)
    with torch.no_grad():
        offset.weight.normal_()
        plain.weight.copy_(1 + offset.weight)
    torch.testing.assert_close(offset(x), plain(x))
    assert offset(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (2, 5)])
def test_a_sliding_window_masks_keys_that_are_too_far_before_the_query(queries: int, keys: int) -> None:
    mask = apply_window(None, 3, queries=queries, keys=keys, device=torch.device("cpu"))[0, 0]
    first = keys - queries
    assert mask.tolist() == [[t - 3 < s <= t for s in range(keys)] for t in range(first, keys)]


def test_attention_mask_builds_the_masks_that_the_docstring_of_its_module_shows() -> None:
    valid = torch.tensor([[True, True, True, True, False]])
    causal = attention_mask(valid, torch.ones(1, 5, dtype=torch.long))[0, 0]
    assert causal.tolist() == [[s <= t and (s < 4 or s == t) for s in range(5)] for t in range(5)]
    prefix = attention_mask(valid, prefix_marks(torch.tensor([2]), 5))[0, 0]
    assert prefix.tolist() == [
        [(s <= t or (s < 2 and t < 2)) and (s < 4 or s == t) for s in range(5)] for t in range(5)
    ]
    assert attention_mask(torch.ones(1, 3).bool(), torch.zeros(1, 3, dtype=torch.long)).all()


def test_stochastic_depth_skips_branches_at_the_configured_rate_and_keeps_the_mean_output() -> None:
    torch.manual_seed(0)
    norms = torch.nn.Identity(), torch.nn.Identity()
    mlp = PlainMlp(24, 8, torch.nn.GELU(), bias=True, out_width=24)
    with torch.no_grad():
        mlp.out.weight.zero_()  # for any input, the MLP adds the constant 1
        mlp.out.bias.fill_(1)
    block = Block(make_attention(4), mlp, norms, 0.0, width=24, skip_probability=0.25)
    x_BTW = torch.randn(1, 3, 24).expand(4000, -1, -1)
    attended_BTW = block.attention(x_BTW, mask=None, causal=True)
    torch.testing.assert_close(block.eval()(x_BTW, mask=None, causal=True), x_BTW + attended_BTW + 1)
    change_BTW = block.train()(x_BTW, mask=None, causal=True) - x_BTW
    kinds = [a * attended_BTW[0] / 0.75 + b / 0.75 for a in (0, 1) for b in (0, 1)]
    shares = [float(((change_BTW - kind).abs().amax(dim=(1, 2)) < 1e-4).float().mean()) for kind in kinds]
    assert shares == pytest.approx([0.25**2, 0.25 * 0.75, 0.75 * 0.25, 0.75**2], abs=0.03)
