"""sparse_attn as a PyTorch operator: backends, gradients, registration, errors. Kernels have tests of their
own.
"""
import pytest
import torch

from flashvsr_kernels import BlockMask, backends, sparse_attn


def inputs(Lq=200, Lk=390, H=2, D=64, dtype=torch.float64, density=0.5):
    q, k, v = (torch.randn(1, L, H, D, dtype=dtype) for L in (Lq, Lk, Lk))
    mask = torch.rand(1, H, -(-Lq // 128), -(-Lk // 128)) < density
    mask[..., 0, 0] = True
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


def backend_names():
    return [pytest.param(name, marks=[] if reason is None else pytest.mark.skip(reason=reason))
            for name, reason in backends()["sparse_attn"].items() if name != "cuda"]


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


def test_reference_in_parts(monkeypatch):
    """What does not fit at a time is computed in parts."""
    q, k, v, mask = inputs(Lq=400)
    whole = sparse_attn(q, k, v, mask, return_lse=True, backend="reference")
    monkeypatch.setattr("flashvsr_kernels.reference.SCORES", 128 * 390)
    for a, b in zip(whole, sparse_attn(q, k, v, mask, return_lse=True, backend="reference")):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", backend_names())
def test_gradients(backend):
    q, k, v, mask = inputs(130, 260, 1)
    mask[0, 0, 1] = False
    q, k, v = (x[:, ::43].contiguous().requires_grad_() for x in (q, k, v))  # few tokens: gradcheck is slow
    mask = mask[..., :1, :1]
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


def test_operator_is_registered_right():
    q, k, v, mask = inputs(130, 130)
    m = BlockMask.from_dense(mask)
    args = tuple(x.requires_grad_() for x in (q, k, v)) + (m.index, m.count, 0.1, None)
    torch.library.opcheck(torch.ops.flashvsr.sparse_attn.default, args)


def test_compiles_to_one_graph():
    q, k, v, mask = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda *x: sparse_attn(*x).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), sparse_attn(q, k, v, mask).sin())


def test_strided_views_out_of_one_tensor():
    qkv = torch.randn(1, 256, 3 * 2 * 64)
    q, k, v = (x.unflatten(-1, (2, 64)) for x in qkv.chunk(3, -1))
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(sparse_attn(q, k, v, mask), sparse_attn(q.clone(), k.clone(), v.clone(), mask))


def test_scale():
    q, k, v, mask = inputs()
    torch.testing.assert_close(sparse_attn(q, k, v, mask, scale=0.3), sparse_attn(q * 0.3 * 8, k, v, mask))


Q = torch.zeros(1, 256, 2, 64)
MASK = torch.ones(1, 2, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize("args, message", [
    ((Q[0], Q, Q, MASK), r"q must be \(B, Lq, H, D\) with D 64 or 128, got \(256, 2, 64\)"),
    ((Q[..., :32], Q, Q, MASK), "D 64 or 128"),
    ((Q, Q[:, :, :1], Q, MASK), r"k and v must both be \(1, Lk, 2, 64\)"),
    ((Q, Q.half(), Q, MASK), "one floating dtype, got torch.float32, torch.float16"),
    ((Q, Q.transpose(1, 3).contiguous().transpose(1, 3), Q, MASK), "contiguous in their last dimension"),
    ((Q, Q, Q, MASK.int()), r"mask must be bool \(1, 2, 2, 2\) for q .* got torch.int32"),
    ((Q, Q, Q, MASK[:, :1]), r"mask must be bool \(1, 2, 2, 2\) .* got torch.bool \(1, 1, 2, 2\)"),
    ((Q, Q, Q, BlockMask.from_dense(MASK[..., :1])),
     r"mask must be for \(1, 2, 2, 2\) blocks, got one for \(1, 2, 2, 1\)"),
], ids=["rank", "D", "heads", "dtype", "stride", "mask dtype", "mask shape", "BlockMask"])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        sparse_attn(*args)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend of sparse_attn must be one of .*"
                                         "reference or None, got 'flash'"):
        sparse_attn(Q, Q, Q, MASK, backend="flash")


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match="cpu: "):
        sparse_attn(*(x.half() for x in (Q, Q, Q)), MASK, backend="cpu")
