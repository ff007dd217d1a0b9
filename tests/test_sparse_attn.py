"""sparse_attn as a PyTorch operator: backends, gradients, registration, errors. Kernels have tests of their
own.
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flashvsr_kernels import BlockMask, backends, sparse_attn
from tests.error_rule import check_attention


def inputs(Lq=200, Lk=390, H=2, D=64, dtype=torch.float64, density=0.5, device="cpu", B=1):
    q, k, v = (torch.randn(B, L, H, D, dtype=dtype, device=device) for L in (Lq, Lk, Lk))
    mask = torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), device=device) < density
    mask[..., :1, :1] = True
    return q, k, v, mask


def dense_attention(q, k, v, mask):
    """From the definition, row by row of blocks."""
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])):
        keys = torch.cat([torch.arange(128 * j, min(128 * j + 128, k.shape[1]))
                          for j in mask[b, h, i].nonzero().flatten()]
                         or [torch.arange(0)])
        rows = slice(128 * i, min(128 * i + 128, q.shape[1]))
        if len(keys):
            s = q[b, rows, h] @ k[b, keys, h].T / q.shape[3] ** 0.5
            out[b, rows, h], lse[b, h, rows] = s.softmax(-1) @ v[b, keys, h], s.logsumexp(-1).float()
    return out, lse


ON_CPU = ("cpu", "reference")


def backend_names(names=ON_CPU):
    return [pytest.param(name, marks=[] if reason is None else pytest.mark.skip(reason=reason))
            for name, reason in backends()["sparse_attn"].items() if name in names]


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("D", [64, 128])
def test_definition(backend, D):
    q, k, v, mask = inputs(D=D)
    mask[0, 1, 1] = False  # an empty row
    out, lse = sparse_attn(q, k, v, mask, return_lse=True, backend=backend)
    expected, expected_lse = dense_attention(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(out, sparse_attn(q, k, v, BlockMask.from_dense(mask), backend=backend))


@pytest.mark.parametrize("empty", ["B", "Lq", "Lk", "H"])
@pytest.mark.parametrize("device, backend", [*(("cpu", name) for name in ON_CPU), *(
    pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("hopper", "triton", "cuda"))])
def test_nothing_to_attend(device, backend, empty):
    if (reason := backends()["sparse_attn"][backend]) is not None:
        pytest.skip(reason)
    q, k, v, mask = inputs(dtype=torch.bfloat16, device=device, **{empty: 0})
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attn(*leaves, mask, return_lse=True, backend=backend)
    assert out.shape == q.shape and not out.any() and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in torch.autograd.grad(out, leaves, torch.ones_like(out)))


def test_reference_in_parts(monkeypatch):
    """What does not fit at a time is computed in parts."""
    q, k, v, mask = inputs(Lq=400)
    whole = sparse_attn(q, k, v, mask, return_lse=True, backend="reference")
    monkeypatch.setattr("flashvsr_kernels.reference.SCORES", 128 * 390)
    for a, b in zip(whole, sparse_attn(q, k, v, mask, return_lse=True, backend="reference")):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", backend_names())
def test_gradients(backend):
    q, k, v, _ = inputs(2, 258, 1)  # few queries: gradcheck is slow
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    torch.autograd.gradcheck(lambda *x: sparse_attn(*x, mask, backend=backend), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("backend", backend_names())
def test_gradients_with_empty_rows_are_finite_and_right(backend):
    q, k, v, mask = inputs()
    mask[0, 0, 1] = False
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    grad = torch.randn_like(q)
    sparse_attn(*ours, mask, backend=backend).backward(grad)
    dense_attention(*theirs, mask)[0].backward(grad)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", backend_names(backends()["sparse_attn"]))
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 400), st.integers(1, 700), st.integers(1, 3),
       st.sampled_from([64, 128]), st.sampled_from([0.0, 0.2, 0.6, 1.0]), st.integers(0, 999))
def test_any_mask(backend, B, Lq, Lk, H, D, density, seed):
    device, dtype = ("cpu", torch.float32) if backend in ON_CPU else ("cuda", torch.bfloat16)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=g).to(device, dtype) for L in (Lq, Lk, Lk))
    mask = (torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density).to(device)
    out, lse = sparse_attn(q, k, v, mask, return_lse=True, backend=backend)
    check_attention(out, lse, q, k, v, mask, lse_tolerance=2e-6 if backend in ON_CPU else 1e-5)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def placed(request):
    """Device and dtype: on a GPU what its kernels take."""
    return {"device": request.param, "dtype": torch.bfloat16 if request.param == "cuda" else torch.float32}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_operator_is_registered_right(placed, training):
    q, k, v, mask = inputs(130, 260, **placed)
    m = BlockMask.from_dense(mask)
    q, k, v = (x.requires_grad_(training) for x in (q, k, v))
    call = (q, k, v, m.index, m.count, m.order, 0.1, None)
    torch.library.opcheck(torch.ops.flashvsr.sparse_attn.default, call)


def test_backward_operator_is_registered_right(placed):
    q, k, v, mask = inputs(130, 260, **placed)
    m = BlockMask.from_dense(mask)
    out, lse = sparse_attn(q, k, v, m, return_lse=True)
    call = (torch.randn_like(out), q, k, v, out, lse, m.index, m.count, m.order, 0.1, None)
    torch.library.opcheck(torch.ops.flashvsr.sparse_attn_backward.default, call)


def close(given, expected):
    """But for what fused operations round differently."""
    for a, b in zip(given, expected, strict=True):
        tolerance = 2e-2 if b.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_compiles_to_one_graph(placed):
    q, k, v, mask = inputs(**placed)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def attend(q, k, v, mask):
        return sparse_attn(q * 2, k, v, mask).sin()
    compiled, grad = torch.compile(attend, fullgraph=True), torch.randn_like(q)
    results = []
    for run in compiled, attend:
        out = run(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    close(*results)


def test_compiles_once_for_all_lengths(placed):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse_attn, fullgraph=True, dynamic=True, backend=counter)
    for Lq, Lk in (200, 390), (300, 700), (500, 515):
        q, k, v, mask = inputs(Lq, Lk, H=5, **placed)  # equal sizes would be taken for the same variable
        close([compiled(q, k, v, mask)], [sparse_attn(q, k, v, mask)])
    assert counter.frame_count == 1


LAYOUTS = {"one tensor of q, k and v": lambda x: torch.stack([x, x, x], 2)[:, :, 1],
           "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
           "rows before batches": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
           "part of the heads and rows": lambda x: F.pad(x, (0, 0, 1, 2, 3, 4))[:, 3:-4, 1:-2],
           "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2]}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strided_views(placed, layout):
    """Values and gradients have the same bits, with an incoming gradient that is strided too."""
    *whole, mask = inputs(B=2, **placed)
    whole, grad, results = [x.requires_grad_() for x in whole], torch.randn_like(whole[0]), []
    for view in layout, torch.clone:
        q, k, v = (view(x) for x in whole)
        assert view is torch.clone or not q.is_contiguous()
        out = sparse_attn(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out, whole, view(grad))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_scale():
    q, k, v, mask = inputs()
    torch.testing.assert_close(sparse_attn(q, k, v, mask, scale=0.3), sparse_attn(q * 0.3 * 8, k, v, mask))


Q = torch.zeros(1, 256, 2, 64)
MASK = torch.ones(1, 2, 2, 2, dtype=torch.bool)
LISTS = BlockMask.from_dense(MASK)


@pytest.mark.parametrize("args, message", [
    ((Q[0], Q, Q, MASK), r"q must be \(B, Lq, H, D\) with D 64 or 128, got \(256, 2, 64\)"),
    ((Q[..., :32], Q, Q, MASK), "D 64 or 128"),
    ((Q, Q[:, :, :1], Q, MASK), r"k and v must both be \(1, Lk, 2, 64\)"),
    ((Q, Q.half(), Q, MASK), "one floating dtype, got torch.float32, torch.float16"),
    ((Q, Q.transpose(1, 3).contiguous().transpose(1, 3), Q, MASK), "contiguous in their last dimension"),
    ((Q, Q, Q, None), r"mask must be a BlockMask or a bool tensor \(1, 2, 2, 2\), got NoneType"),
    ((Q, Q, Q, MASK.int()), r"mask must be bool \(1, 2, 2, 2\) for q .* got torch.int32"),
    ((Q, Q, Q, MASK[:, :1]), r"mask must be bool \(1, 2, 2, 2\) .* got torch.bool \(1, 1, 2, 2\)"),
    ((Q, Q, Q, BlockMask.from_dense(MASK[..., :1])),
     r"mask must be for \(1, 2, 2, 2\) blocks, got one for \(1, 2, 2, 1\)"),
    ((Q, Q, Q, replace(LISTS, index=LISTS.index[:, :1])), r"mask.index must be int32 \(1, 2, 2, 2\), contiguous, got"),
    ((Q, Q, Q, replace(LISTS, index=LISTS.index.mT)), r"mask.index must be int32 \(1, 2, 2, 2\), contiguous, got"),
    ((Q, Q, Q, replace(LISTS, count=LISTS.count.long())), r"mask.count must be int32 \(1, 2, 2\), .* got torch.int64"),
    ((Q, Q, Q, replace(LISTS, order=LISTS.order[1:])), r"mask.order must be int32 \(4,\), contiguous, got .* \(3,\)"),
    ((Q, Q, Q, replace(LISTS, order=LISTS.order.to("meta"))), "mask must be on cpu, got order on meta"),
], ids=["rank", "D", "heads", "dtype", "stride", "no mask", "mask dtype", "mask shape", "BlockMask", "index's shape",
        "index's strides", "count's dtype", "order's length", "order's device"])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        sparse_attn(*args)


def test_backends_are_the_fastest_first():
    """The C++ for GPUs behind Triton, which is there for who has none."""
    assert list(backends()["sparse_attn"]) == ["hopper", "triton", "cuda", "cpu", "reference"]


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend of sparse_attn must be one of .*"
                                         "reference or None, got 'flash'"):
        sparse_attn(Q, Q, Q, MASK, backend="flash")


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match="cpu: "):
        sparse_attn(*(x.half() for x in (Q, Q, Q)), MASK, backend="cpu")
