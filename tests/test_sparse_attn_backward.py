"""Gradients of sparse_attn in Triton, and in Gluon for sm_90, against float64: all on a GPU, Triton's small cases in
the interpreter too.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_kernels import BlockMask, _triton, backends, reference
from tests.error_rule import check_gradients
from tests.other_work import changed, with_and_without_others

pytest.importorskip("triton")
from flashvsr_kernels import sparse_attn_backward  # noqa: E402
from tests import interpreter  # noqa: E402

NAN = float("nan")
GPU = [pytest.mark.gpu, pytest.mark.skipif(_triton.available() is not None, reason=str(_triton.available()))]
INTERPRETED = pytest.param("cpu", torch.float16, marks=pytest.mark.interpret, id="interpreted fp16")
INTERPRETED_BF16 = pytest.param("cpu", torch.bfloat16, marks=pytest.mark.interpret, id="interpreted bf16")
BF16 = pytest.param("cuda", torch.bfloat16, marks=GPU, id="bf16")
FP16 = pytest.param("cuda", torch.float16, marks=GPU, id="fp16")
REFUSAL = backends()["sparse_attn_backward"]["hopper"]
HOPPER = [pytest.mark.gpu, pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))]
HOPPER_BF16 = pytest.param("hopper", torch.bfloat16, marks=HOPPER, id="hopper bf16")
HOPPER_FP16 = pytest.param("hopper", torch.float16, marks=HOPPER, id="hopper fp16")
everywhere = pytest.mark.parametrize("device, dtype", [INTERPRETED, BF16, FP16, HOPPER_BF16, HOPPER_FP16])
once = pytest.mark.parametrize("device, dtype", [INTERPRETED, BF16, HOPPER_BF16])
on_gpu = pytest.mark.parametrize("device, dtype", [BF16, FP16, HOPPER_BF16, HOPPER_FP16])
in_bf16_on_gpu = pytest.mark.parametrize("device, dtype", [BF16, HOPPER_BF16])
kernels = sparse_attn_backward
SMALL = {"partial blocks": (300, 515, 64), "one block": (128, 128, 128), "less than a block": (33, 70, 128),
         "one": (1, 1, 64), "one row, two keys": (1, 2, 64), "one row more": (257, 129, 64)}
LARGE = {"whole blocks": (1024, 4096, 128), "partial blocks": (1000, 4001, 128), "D 64": (1024, 4096, 64),
         "partial blocks D 64": (1111, 2222, 64), "more queries": (4096, 640, 128)}


@pytest.fixture(autouse=True)
def kernels_of_the_case(request, monkeypatch):
    """Device "hopper" stands for a GPU and the kernels for sm_90."""
    interpreter.repair()
    if request.node.callspec.params.get("device") == "hopper":
        from flashvsr_kernels import sparse_attn_backward_hopper
        monkeypatch.setitem(globals(), "kernels", sparse_attn_backward_hopper)


def make(Lq, Lk, D, device, dtype, B=1, H=2, density=0.6, seed=0):
    """grad, q, k, v and a mask."""
    g, device = torch.Generator().manual_seed(seed), "cpu" if device == "cpu" else "cuda"
    tensors = [torch.randn(B, L, H, D, generator=g).to(device, dtype) for L in (Lq, Lq, Lk, Lk)]
    mask = torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density
    mask[:, 0, 0, 0] = True
    return *tensors, mask.to(device)


def forward(q, k, v, mask, scale=None):
    out, lse = reference.sparse_attn(q.float(), k.float(), v.float(), mask, scale or q.shape[-1] ** -0.5)
    return out.to(q.dtype), lse


def call(grad, q, k, v, mask, scale=None, saved=None):
    """saved: what the forward gave, if the reference must not read q, k and v"""
    saved = saved or forward(q, k, v, mask, scale)
    return kernels.backward(grad, q, k, v, *saved, *lists(mask), scale or q.shape[-1] ** -0.5)


def lists(mask):
    made = BlockMask.from_dense(mask, backend="reference")
    return made.index, made.count, made.order


def check(grad, q, k, v, mask, scale=None):
    gradients = call(grad, q, k, v, mask, scale)
    for got, x in zip(gradients, (q, k, v)):
        assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous()
    check_gradients(gradients, grad, q, k, v, mask, scale)


def check_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def within(x, before=3, after=2, side=8):
    """x in the middle of NaN."""
    B, L, H, D = x.shape
    whole = torch.full((B, before + L + after, H, D + 2 * side), NAN, dtype=x.dtype, device=x.device)
    whole[:, before:before + L, :, side:side + D] = x
    return whole[:, before:before + L, :, side:side + D]


@pytest.mark.parametrize("device, dtype", [INTERPRETED, INTERPRETED_BF16, BF16, FP16, HOPPER_BF16, HOPPER_FP16])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_float64_reference(shape, device, dtype):
    check(*make(*shape, device, dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_configurations(capability, D, monkeypatch):
    """Those of other GPUs too: with and without descriptors."""
    chosen = sparse_attn_backward.config(capability, D)
    monkeypatch.setattr(sparse_attn_backward, "config", lambda *_: chosen)
    check(*make(200, 300, D, "cpu", torch.float16, B=2, H=1))


@on_gpu
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_large(shape, device, dtype):
    check(*make(*shape, device, dtype, B=2, H=3, density=0.4))


@everywhere
@pytest.mark.parametrize("scale", [1e-3, 0.5, -0.2])
def test_scale(scale, device, dtype):
    check(*make(130, 200, 64, device, dtype, H=1), scale)


@once
def test_large_scores(device, dtype):
    grad, q, k, v, mask = make(200, 300, 64, device, dtype)
    check(grad, 30 * q, k, v, mask)


@once
def test_very_negative_scores(device, dtype):
    """exp2(-lse) overflows, and that is what a key past the end would have for a weight."""
    grad, q, k, v, mask = make(140, 200, 64, device, dtype, H=1)
    check(grad, q.abs() + 3, -k.abs() - 3, v, mask, 1.0)


@everywhere
def test_empty_rows_columns_and_heads(device, dtype):
    grad, q, k, v, mask = make(300, 500, 64, device, dtype, H=3, density=0.9)
    mask[:, 1] = mask[:, 0, 1] = mask[:, 2, :, 2] = mask[:, 2, 0] = False
    dq, dk, dv = call(grad, q, k, v, mask)
    rows = (~mask.any(-1)).repeat_interleave(128, 2)[..., :300]
    keys = (~mask.any(-2)).repeat_interleave(128, 2)[..., :500]
    assert rows.any() and keys.any()
    assert (dq.transpose(1, 2)[rows] == 0).all()
    assert (dk.transpose(1, 2)[keys] == 0).all() and (dv.transpose(1, 2)[keys] == 0).all()
    check_gradients((dq, dk, dv), grad, q, k, v, mask)


@once
def test_rows_of_listed_blocks_without_keys(device, dtype):
    """lse -inf is what tells them."""
    grad, q, k, v, mask = make(200, 200, 64, device, dtype)
    out, lse = forward(q, k, v, mask)
    rows = torch.tensor([0, 77, 199], device=grad.device)
    out[:, rows], lse[..., rows] = 0, -torch.inf
    got = call(grad, q, k, v, mask, saved=(out, lse))
    assert (got[0][:, rows] == 0).all()
    grad[:, rows] = q[:, rows] = 0
    check_same(got[1:], call(grad, q, k, v, mask, saved=(out, lse))[1:])


@once
def test_no_block_at_all(device, dtype):
    grad, q, k, v, mask = make(130, 130, 64, device, dtype)
    assert all((x == 0).all() for x in call(grad, q, k, v, mask & False))


@once
@pytest.mark.parametrize("layout", ["q, k and v in one", "heads before rows", "padded rows", "odd rows"])
def test_strides(layout, device, dtype):
    if (layout, device) == ("odd rows", "hopper"):
        pytest.skip("TMA wants rows aligned: the op does not choose hopper for these")
    grad, q, k, v, mask = make(200, 200, 64, device, dtype)
    if layout == "q, k and v in one":
        views = torch.stack([grad, q, k, v], 2).unbind(2)
    elif layout == "heads before rows":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, q, k, v)]
    else:
        views = [within(x, side=8 if layout == "padded rows" else 3) for x in (grad, q, k, v)]
    assert not any(x.is_contiguous() for x in views)
    check_same(call(*views, mask), call(grad, q, k, v, mask))


@once
@pytest.mark.parametrize("layout", ["one number", "one row", "every other column"])
def test_strides_of_grad(layout, device, dtype):
    grad, q, k, v, mask = make(140, 200, 64, device, dtype, H=1)
    views = {"one number": grad[:1, :1, :1, :1].expand(grad.shape), "one row": grad[:, :1].expand(grad.shape),
             "every other column": grad.repeat_interleave(2, 3)[..., ::2]}
    check_same(call(views[layout], q, k, v, mask), call(views[layout].contiguous(), q, k, v, mask))


@everywhere
@pytest.mark.parametrize("D", [64, 128])
def test_what_must_not_be_read_is_nan(D, device, dtype):
    grad, q, k, v, mask = make(270, 400, D, device, dtype)
    mask[..., 1] = mask[:, :, 1] = False  # nobody reads key block 1, query block 1 reads none
    mask[..., 3] |= mask[..., 0]          # of the last, partial blocks both are read
    mask[:, :, 2, 3] = True
    saved = forward(q, k, v, mask)
    wanted = call(grad, q, k, v, mask)
    poisoned = [within(x, before=100, after=100) for x in (grad, q, k, v)]
    for x in poisoned:
        x[:, 128:256] = NAN
    check_same(call(*poisoned, mask, saved=saved), wanted)


@once
@pytest.mark.parametrize("rubbish", [2 ** 31 - 1, -2 ** 31])
def test_entries_past_count_are_not_used(rubbish, device, dtype):
    grad, q, k, v, mask = make(300, 500, 64, device, dtype)
    saved = forward(q, k, v, mask)
    index, count, order = lists(mask)
    past = torch.arange(index.shape[-1], device=grad.device) >= count[..., None]
    got, wanted = (kernels.backward(grad, q, k, v, *saved, index.masked_fill(past, entry), count,
                                                 order, 0.125) for entry in (rubbish, 0))
    check_same(got, wanted)


@once
def test_order_changes_nothing(device, dtype):
    grad, q, k, v, mask = make(300, 500, 64, device, dtype)
    saved = forward(q, k, v, mask)
    index, count, order = lists(mask)
    got, wanted = (kernels.backward(grad, q, k, v, *saved, index, count, o, 0.125)
                   for o in (order.flip(0), order))
    check_same(got, wanted)


@on_gpu
@with_and_without_others
def test_same_bits_500_times(others, device, dtype):
    grad, q, k, v, mask = make(2048, 4096, 128, device, dtype, H=4)
    saved = forward(q, k, v, mask)
    arguments = grad, q, k, v, *saved, *lists(mask), 128 ** -0.5
    assert changed(lambda: kernels.backward(*arguments), others) == 0


@in_bf16_on_gpu
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 400), st.integers(1, 700), st.integers(1, 3), st.sampled_from([64, 128]),
       st.sampled_from([0.0, 0.2, 0.6, 1.0]), st.integers(0, 999))
def test_any_mask(device, dtype, B, Lq, Lk, H, D, density, seed):
    check(*make(Lq, Lk, D, device, dtype, B, H, density, seed))


@in_bf16_on_gpu
def test_offsets_beyond_32_bits(device, dtype):
    """Batches, heads and rows more than 2^31 elements apart."""
    grad, q, k, v, mask = make(300, 300, 64, device, dtype, B=2)
    for dim in range(2):  # of B and L
        for at, x in enumerate((grad, q, k, v)):
            far = torch.empty(2 ** 31 + 2 ** 26, dtype=dtype, device="cuda")
            strides = (2 ** 31, 128, 64, 1) if dim == 0 else (64 * 300, 7_400_000, 64 * 300 * 2, 1)
            views = [grad, q, k, v]
            views[at] = far.as_strided(x.shape, strides).copy_(x)
            check_same(call(*views, mask), call(grad, q, k, v, mask))


@in_bf16_on_gpu
def test_graph_replays_with_another_mask(device, dtype):
    def arguments(seed):
        grad, q, k, v, mask = make(512, 1024, 128, device, dtype, density=0.2 + 0.3 * seed, seed=seed)
        return [grad, q, k, v, *forward(q, k, v, mask), *lists(mask)]
    held, graph = arguments(0), torch.cuda.CUDAGraph()
    kernels.backward(*held, 128 ** -0.5)
    with torch.cuda.graph(graph):
        got = kernels.backward(*held, 128 ** -0.5)
    for seed in range(3):
        for mine, other in zip(held, arguments(seed), strict=True):
            mine.copy_(other)
        for x in got:
            x.fill_(NAN)
        graph.replay()
        check_same(got, kernels.backward(*arguments(seed), 128 ** -0.5))
