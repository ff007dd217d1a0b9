"""Rotary position, window order and their inverses, from the definitions."""
import math

import pytest
import torch

from flashvsr_kernels import qk_norm_rope, raster_order, rms_norm, rope_table, window_order

GRID = (4, 16, 8)
L = 4 * 16 * 8


def tables(D):
    side = D // 6
    return tuple(rope_table(torch.arange(n), pairs)
                 for n, pairs in zip(GRID, (D // 2 - 2 * side, side, side)))


def test_window_order_is_by_block_then_inside():
    f, h, w = GRID
    at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij"), -1).view(1, L, 3)
    ordered = window_order(at, GRID)[0]
    key = [(t // 2, r // 8, c // 8, t % 2, r % 8, c % 8) for t, r, c in ordered.tolist()]
    assert key == sorted(key) and len(set(key)) == L
    assert torch.equal(raster_order(window_order(at, GRID), GRID), at)


def test_window_order_into_a_slot():
    x, ring = torch.randn(1, L, 128), torch.full((1, 3 * L, 2, 64), torch.nan)
    window_order(x, GRID, out=ring[:, L:2 * L])
    assert torch.equal(ring[:, L:2 * L].flatten(2), window_order(x, GRID))
    assert ring[:, :L].isnan().all() and ring[:, 2 * L:].isnan().all()


@pytest.mark.parametrize("D", [64, 128])
def test_rotation_from_the_definition(D):
    x, weight = torch.randn(1, L, 2 * D, dtype=torch.float64), torch.randn(2 * D, dtype=torch.float64)
    out, mean = qk_norm_rope(x, weight, tables(D), D)
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    side = 2 * (D // 6)
    split = (D - 2 * side, side, side)
    angle = []
    for t, r, c in ((t, r, c) for t in range(4) for r in range(16) for c in range(8)):
        angle.append([p * 10000.0 ** (-2 * i / d) for p, d in zip((t, r, c), split) for i in range(d // 2)])
    angle = torch.tensor(angle, dtype=torch.float64)[None, :, None]
    even, odd = normed.view(1, L, 2, D // 2, 2).unbind(-1)
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    expected = window_order(turned.reshape(1, L, 2 * D), GRID).view(1, L, 2, D)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, expected.view(1, -1, 128, 2, D).mean(2).transpose(1, 2),
                               rtol=1e-6, atol=1e-6)


def test_table_is_exact_far_out():
    far = 10**9 + 7
    row = rope_table(torch.tensor([far]), 22)[0]
    for i, value in enumerate(row.tolist()):
        exact = math.fmod(far * 10000.0 ** (-i / 22), 2 * math.pi)
        assert abs(value - complex(math.cos(exact), math.sin(exact))) < 1e-6


def test_bf16_keeps_the_rule():
    """At most twice the error of plain PyTorch, which rounds at the same places."""
    x, weight = torch.randn(1, L, 128), 1 + 0.1 * torch.randn(128)
    exact, _ = qk_norm_rope(x.bfloat16().double(), weight.bfloat16().double(), tables(128), 128)
    out, _ = qk_norm_rope(x.bfloat16(), weight.bfloat16(), tables(128), 128)
    assert out.dtype == torch.bfloat16
    normed = rms_norm(x.bfloat16(), weight.bfloat16()).double()
    plain = ((normed - rms_norm(x.bfloat16().double(), weight.bfloat16().double())).abs().max()
             + 2**-8 * exact.abs().max())
    assert (out.double() - exact).abs().max() <= 2 * plain


@pytest.mark.parametrize("call, message", [
    (lambda: window_order(torch.zeros(1, 96, 8), (3, 4, 8)),
     r"grid must be a multiple of \(2, 8, 8\), got \(3, 4, 8\)"),
    (lambda: window_order(torch.zeros(1, 96, 8), (2, 8, 8)), r"x must be \(B, 128, C\) for grid \(2, 8, 8\)"),
    (lambda: qk_norm_rope(torch.zeros(1, L, 100), torch.zeros(100), tables(64), 64),
     r"x must be \(B, L, H \* 64\)"),
    (lambda: qk_norm_rope(torch.zeros(1, L, 128), torch.zeros(128), tables(128), 64),
     "tables must have 32 pairs in all"),
], ids=["grid", "tokens", "width", "pairs"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
