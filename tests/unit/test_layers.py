"""Layers against the formulas they stand for, written out slowly."""

import math

import pytest
import torch
from torch import Tensor

from vlm.cache import KVCache
from vlm.layers.attention import Attention
from vlm.layers.mask import attention_mask, prefix_marks
from vlm.layers.position import Rotary


def naive_attention(layer: Attention, x_BTW: Tensor, seen_TS: Tensor) -> Tensor:
    """Attention head by head, as on the blackboard: softmax(q k / sqrt(head_dim)) v."""
    H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = layer.qkv(x_BTW).split([H * D, K * D, K * D], dim=-1)
    heads = []
    for h in range(H):
        shared = h // (H // K)
        q_h, k_h = q[..., h * D : (h + 1) * D], k[..., shared * D : (shared + 1) * D]
        if layer.rotary is not None:
            q_h, k_h = layer.rotary(q_h[:, None], 0)[:, 0], layer.rotary(k_h[:, None], 0)[:, 0]
        scores = (q_h @ k_h.transpose(1, 2) / math.sqrt(D)).masked_fill(~seen_TS, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., shared * D : (shared + 1) * D])
    return torch.as_tensor(layer.out(torch.cat(heads, dim=-1)))


def make_attention(num_kv_heads: int, rotary: bool) -> Attention:
    torch.manual_seed(0)
    turn = Rotary(6, 32, 10_000.0) if rotary else None
    return Attention(24, num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, bias=True, dropout=0.0, rotary=turn).eval()


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_the_formula(num_kv_heads: int, rotary: bool) -> None:
    layer, x_BTW = make_attention(num_kv_heads, rotary), torch.randn(2, 7, 24)
    causal = torch.ones(7, 7).tril().bool()
    torch.testing.assert_close(layer(x_BTW, mask=None, causal=True), naive_attention(layer, x_BTW, causal))
    everyone = torch.ones(7, 7).bool()
    torch.testing.assert_close(layer(x_BTW, mask=None, causal=False), naive_attention(layer, x_BTW, everyone))


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_in_pieces_through_the_cache_equals_attention_at_once(rotary: bool) -> None:
    layer, x_BTW = make_attention(2, rotary), torch.randn(2, 9, 24)
    cache = KVCache(
        depth=1, batch=2, num_kv_heads=2, context=9, head_dim=6, dtype=torch.float32, device=torch.device("cpu")
    )
    outputs = []
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, 9))):
        outputs.append(layer(x_BTW[:, start:end], mask=None, causal=True, cache=cache, layer=0))
        cache.advance(end - start)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x_BTW, mask=None, causal=True))


def test_rotary_dot_products_depend_on_distance_alone() -> None:
    turn, q, k = Rotary(8, 64, 10_000.0), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def dot(at: int, other: int) -> Tensor:
        return torch.as_tensor((turn(q, at) * turn(k, other)).sum())

    torch.testing.assert_close(dot(5, 2), dot(40, 37))
    torch.testing.assert_close(turn(q, 7).norm(), q.norm())
    assert not torch.isclose(dot(5, 2), dot(5, 4))


def test_mask_cases_are_those_drawn_in_its_docstring() -> None:
    valid = torch.tensor([[True, True, True, True, False]])
    causal = attention_mask(valid, torch.ones(1, 5, dtype=torch.long))[0, 0]
    assert causal.tolist() == [[s <= t and s < 4 for s in range(5)] for t in range(5)]
    prefix = attention_mask(valid, prefix_marks(torch.tensor([2]), 5))[0, 0]
    assert prefix.tolist() == [[(s <= t or (s < 2 and t < 2)) and s < 4 for s in range(5)] for t in range(5)]
    assert attention_mask(torch.ones(1, 3).bool(), torch.zeros(1, 3, dtype=torch.long)).all()
