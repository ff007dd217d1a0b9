"""Rotary position and window order, from the definitions."""
import math

import pytest
import torch

from torch._dynamo.testing import CompileCounterWithBackend

from flashvsr_kernels import backends, qk_norm_rope, qkv_norm_rope, reference, rms_norm, rope_table, window_order

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


def test_into_a_slot():
    x, weight, ring = torch.randn(1, L, 128), torch.randn(128), torch.full((1, 3 * L, 2, 64), torch.nan)
    out, mean = qk_norm_rope(x, weight, tables(64), 64, out=ring[:, L:2 * L])
    wanted, wanted_mean = qk_norm_rope(x, weight, tables(64), 64)
    assert out.data_ptr() == ring[:, L].data_ptr()
    assert torch.equal(ring[:, L:2 * L], wanted) and torch.equal(mean, wanted_mean)
    assert ring[:, :L].isnan().all() and ring[:, 2 * L:].isnan().all()


@pytest.mark.parametrize("D", [64, 128])
def test_rotation_from_the_definition(D):
    x, weight = torch.randn(1, L, 2 * D, dtype=torch.float64), torch.randn(2 * D, dtype=torch.float64)
    out, mean = qk_norm_rope(window_order(x, GRID), weight, tables(D), D)
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


def projection(D=64, H=2, dtype=torch.float32, L=L):
    """qkv, q_weight, k_weight, tables, head_dim"""
    return (torch.randn(2, L, 3 * H * D, dtype=dtype), *(1 + 0.1 * torch.randn(2, H * D, dtype=dtype)), tables(D), D)


@pytest.mark.parametrize("slots", [False, True], ids=["allocated", "slots"])
def test_all_three_at_once(slots):
    qkv, q_weight, k_weight, *rest = projection()
    ring = torch.full((2, 2, 3 * L, 2, 64), torch.nan)
    out = tuple(ring[:, :, L:2 * L]) if slots else None
    q, k, v, q_mean, k_mean = qkv_norm_rope(qkv, q_weight, k_weight, *rest, out=out)
    parts = qkv.chunk(3, -1)
    for x, mean, part, weight in (q, q_mean, parts[0], q_weight), (k, k_mean, parts[1], k_weight):
        wanted, wanted_mean = qk_norm_rope(part, weight, *rest)
        assert torch.equal(x, wanted) and torch.equal(mean, wanted_mean) and mean.is_contiguous()
    assert torch.equal(v.flatten(2), parts[2])
    if slots:
        assert k.data_ptr() == ring[0, :, L:].data_ptr() and v.data_ptr() == ring[1, :, L:].data_ptr()
        assert ring[:, :, :L].isnan().all() and ring[:, :, 2 * L:].isnan().all()


def test_gradients_are_those_of_the_formula():
    qkv, q_weight, k_weight, turns, D = projection(dtype=torch.float64)
    results = []
    for run in qkv_norm_rope, lambda *call: reference.qkv_norm_rope(*call, 1e-6):
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in (qkv, q_weight, k_weight)]
        loss = sum((y * torch.randn(y.shape)).sum() for y in run(*leaves, turns, D))
        results.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*results)
    x, weight = qkv[..., :128].clone().requires_grad_(), q_weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: qk_norm_rope(x, weight, turns, D), (x,), fast_mode=True, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: window_order(x, GRID), (x,), fast_mode=True)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_operators_are_registered_right(training):
    qkv, q_weight, k_weight, turns, D = projection()
    qkv, q_weight, k_weight = (x.requires_grad_(training) for x in (qkv, q_weight, k_weight))
    ops, check = torch.ops.flashvsr, torch.library.opcheck
    check(ops.qkv_norm_rope.default, (qkv, q_weight, k_weight, *turns, D, 1e-6, None))
    check(ops.qk_norm_rope.default, (qkv[..., 128:256], q_weight, *turns, D, 1e-6, None))
    check(ops.window_order.default, (qkv, *GRID, None))
    if not training:
        k, v = torch.full((2, 2, 3 * L, 2, D), torch.nan)[:, :, L:2 * L]
        check(ops.qkv_norm_rope_into.default, (qkv, q_weight, k_weight, *turns, D, 1e-6, k, v, None))
        check(ops.qk_norm_rope_into.default, (qkv[..., :128], q_weight, *turns, D, 1e-6, k, None))


def test_window_order_is_a_copy():
    x = torch.randn(1, 128, 3)  # of one block: the order is the same
    out = window_order(x, (2, 8, 8))
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


def attend(qkv, q_weight, k_weight, turns, ring):
    q, k, v, q_mean, k_mean = qkv_norm_rope(window_order(qkv * 2, GRID), q_weight, k_weight, turns, 64,
                                            out=None if ring is None else tuple(ring[:, :, L:2 * L]))
    return (q * k + v).sin(), q_mean @ k_mean.transpose(2, 3)


def test_compiles_to_one_graph():
    qkv, q_weight, k_weight, turns, _ = projection()
    results = []
    for run in torch.compile(attend, fullgraph=True), attend:
        leaves = [x.clone().requires_grad_() for x in (qkv, q_weight, k_weight)]
        out, score = run(*leaves, turns, None)
        results.append((out, score, *torch.autograd.grad(out.square().sum() + score.sum(), leaves)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_compiles_with_slots():
    *call, turns, _ = projection()
    rings = torch.full((2, 2, 2, 3 * L, 2, 64), torch.nan)
    compiled = torch.compile(attend, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    torch.testing.assert_close(compiled(*call, turns, rings[0]), attend(*call, turns, rings[1]))
    torch.testing.assert_close(rings[0], rings[1], equal_nan=True)
    assert rings.isnan().sum() == rings.numel() * 2 // 3


@pytest.mark.parametrize("op", ["qk_norm_rope", "qkv_norm_rope"])
def test_backends_give_one_line(op):
    assert set(backends()[op]) == {"triton", "reference"}
    assert all(reason is None or reason and "\n" not in reason for reason in backends()[op].values())
    with pytest.raises(ValueError, match="backend of qkv_norm_rope must be one of"):
        qkv_norm_rope(*projection(), backend="cuda")


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
    (lambda: qk_norm_rope(torch.zeros(1, L, 128), torch.zeros(128).double(), tables(64), 64),
     "weight must be torch.float32 on cpu as x, got torch.float64 on cpu"),
    (lambda: qk_norm_rope(torch.zeros(1, L, 128), torch.zeros(128), [t.to(torch.complex128) for t in tables(64)], 64),
     "tables must be torch.complex64 on cpu, got torch.complex128 on cpu"),
    (lambda: qk_norm_rope(torch.zeros(1, L, 128), torch.zeros(128), tables(64), 64, out=torch.zeros(1, L, 128)),
     r"out must be \(1, 512, 2, 64\) torch.float32 on cpu, got \(1, 512, 128\)"),
    (lambda: qk_norm_rope(torch.zeros(1, L, 128), torch.zeros(128, requires_grad=True), tables(64), 64,
                          out=torch.zeros(1, L, 2, 64)), "out must be None where gradients are recorded"),
    (lambda: qkv_norm_rope(torch.zeros(1, L, 256), torch.zeros(128), torch.zeros(128), tables(64), 64),
     r"qkv must be \(B, L, 3 \* H \* 64\) and q_weight and k_weight \(H \* 64,\), got \(1, 512, 256\) and \(128,\)"),
], ids=["grid", "tokens", "width", "pairs", "dtype", "tables", "out", "gradients", "width of three"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
