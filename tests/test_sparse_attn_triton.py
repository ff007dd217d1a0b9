"""The Triton forward against float64: in the interpreter on CPU tensors, and on a GPU."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import sparse_attn_triton
from tests.error_rule import check_attention
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"whole blocks": (256, 384, 128), "partial blocks": (300, 515, 128), "odd": (129, 127, 64),
          "one": (1, 1, 64), "few queries": (9, 700, 128), "33 keys": (70, 33, 128), "64 keys": (70, 64, 128),
          "65 keys": (70, 65, 128), "320 keys": (130, 320, 64)}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def make(device, Lq=300, Lk=300, D=64, dtype=torch.bfloat16, B=1, H=2, density=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=g).to(device, dtype) for L in (Lq, Lk, Lk))
    return q, k, v, (torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density).to(device)


def lists(mask):
    """index, count and order of a mask; past count, index points far outside."""
    blocks = torch.arange(mask.shape[-1], device=mask.device)
    index = torch.where(mask, blocks, 2 ** 30).sort(-1).values.int()
    count = mask.sum(-1, dtype=torch.int32)
    return index, count, count.flatten().argsort(descending=True).int()


def call(q, k, v, mask, scale=None):
    return sparse_attn_triton.forward(q, k, v, *lists(mask), q.shape[-1] ** -0.5 if scale is None else scale)


def check(q, k, v, mask, scale=None):
    out, lse = call(q, k, v, mask, scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == torch.float32
    check_attention(out, lse, q, k, v, mask, scale, lse_tolerance=1e-5)
    return out, lse


def assert_same_bits(results, expected):
    for got, wanted in zip(results, expected):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@with_dtypes
def test_float64_reference(device, dtype, shape):
    check(*make(device, *shape, dtype, B=2))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_configurations(device, capability, D, monkeypatch):
    chosen = sparse_attn_triton.config(capability, D)
    monkeypatch.setattr(sparse_attn_triton, "config", lambda *_: chosen)
    check(*make(device, 140, 390, D))


@pytest.mark.parametrize("scale", [0.5, -0.1, 0.0, 8.0])
def test_scale(device, scale):
    check(*make(device, 130, 260), scale)


@pytest.mark.parametrize("first, last", [(1, 60), (60, 1)], ids=["growing", "falling"])
@with_dtypes
def test_large_scores(device, dtype, first, last):
    q, k, v, mask = make(device, 256, 640, 128, dtype)
    k *= torch.linspace(first, last, 640, device=device)[:, None, None]
    check(q, k, v, mask)


@pytest.mark.parametrize("layout", ["one tensor of q, k and v", "heads before rows", "rows before batch",
                                    "every other row", "unaligned rows", "odd stride", "broadcast"])
def test_strides(device, layout):
    q, k, v, mask = make(device, 150, 150, B=2)
    views = {
        "one tensor of q, k and v": lambda: torch.stack([q, k, v], 2).unbind(2),
        "heads before rows": lambda: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "rows before batch": lambda: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
        "every other row": lambda: [x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v)],
        "unaligned rows": lambda: [F.pad(x, (3, 13), value=NAN)[..., 3:-13] for x in (q, k, v)],
        "odd stride": lambda: [F.pad(x, (0, 1), value=NAN)[..., :-1] for x in (q, k, v)],
        "broadcast": lambda: [x[:1, :, :1].expand(2, -1, 2, -1) for x in (q, k, v)],
    }[layout]()
    assert not any(x.is_contiguous() for x in views) and all(x.stride(-1) == 1 for x in views)
    check(*views, mask)


@pytest.mark.parametrize("D", [64, 128])
def test_what_must_not_be_read_is_nan(device, D):
    Lq, Lk = 140, 390
    q, k, v, mask = make(device, Lq, Lk, D, B=2)
    mask[..., 1], mask[..., -1] = False, True  # nobody reads key block 1, all the partial one
    wanted = call(q, k, v, mask)
    poisoned = []
    for x, L in ((q, Lq), (k, Lk), (v, Lk)):
        whole = torch.full((2, L + 200, 2, D), NAN, dtype=x.dtype, device=device)
        whole[:, 100:100 + L] = x
        poisoned.append(whole[:, 100:100 + L])
    for x in poisoned[1:]:
        x[:, 128:256] = NAN
    assert all(x.isfinite().all() for x in wanted)
    assert_same_bits(call(*poisoned, mask), wanted)


def test_nan_that_is_read_shows(device):
    q, k, v, _ = make(device, 256, 256, H=1)
    k[0, 200, 0, 5] = NAN
    mask = torch.tensor([[True, False], [True, True]], device=device)[None, None]
    for x in (out.squeeze() for out in call(q, k, v, mask)):
        assert x[:128].isfinite().all() and x[128:].isnan().all()


@with_dtypes
def test_empty_rows_and_an_empty_head(device, dtype):
    q, k, v, mask = make(device, 300, 300, 64, dtype, H=3)
    mask[0, 1], mask[0, 0, 1] = False, False
    out, lse = check(q, k, v, mask)
    rows = (~mask.any(-1)).repeat_interleave(128, 2)[..., :300]
    assert (lse[rows] == -math.inf).all() and lse[~rows].isfinite().all()
    assert (out.transpose(1, 2)[rows] == 0).all()


@pytest.mark.parametrize("kept", ["none", "all", "first", "last", "ragged"])
def test_masks(device, kept):
    q, k, v, mask = make(device, 390, 390)
    mask[...] = kept == "all"
    if kept in ("first", "last"):
        mask[..., 0 if kept == "first" else -1] = True
    elif kept == "ragged":
        mask |= torch.ones_like(mask[0, 0]).tril()
    check(q, k, v, mask)


def test_lists_of_any_capacity(device):
    q, k, v, mask = make(device, 150, 515, density=0.4)
    index, count, order = lists(mask)
    wanted = call(q, k, v, mask)
    for other in (index[..., :count.max()], F.pad(index, (0, 3), value=2 ** 30)):
        assert_same_bits(sparse_attn_triton.forward(q, k, v, other.contiguous(), count, order, 0.125), wanted)
    out, lse = sparse_attn_triton.forward(q, k, v, index[..., :0].contiguous(), 0 * count, order, 0.125)
    assert not out.any() and (lse == -math.inf).all()


def test_any_order_gives_the_same_bits(device):
    q, k, v, mask = make(device, 390, 300, B=2)
    wanted = call(q, k, v, mask)
    index, count, order = lists(mask)
    for other in (order.flip(0), order[torch.randperm(len(order), device=device)]):
        assert_same_bits(sparse_attn_triton.forward(q, k, v, index, count, other, 0.125), wanted)


def test_only_the_blocks_in_order_are_made(device):
    q, k, v, mask = make(device, 300, 300)
    index, count, order = lists(mask)
    wanted = call(q, k, v, mask)[1].view(-1, 300)
    lse = sparse_attn_triton.forward(q, k, v, index, count, order.new_tensor([4]), 0.125)[1].view(-1, 300)
    assert torch.equal(lse[1, 128:256], wanted[1, 128:256])
    assert lse.isnan().sum() == lse.numel() - 128


def test_a_head_alone_gives_the_same_bits(device):
    q, k, v, mask = make(device, 150, 300, B=2)
    wanted = call(q, k, v, mask)[0]
    for b in range(2):
        for h in range(2):
            alone = (x[b:b + 1, :, h:h + 1] for x in (q, k, v))
            assert torch.equal(call(*alone, mask[b:b + 1, h:h + 1])[0][0, :, 0], wanted[b, :, h])


@settings(max_examples=12, deadline=None)
@given(B=st.integers(1, 2), H=st.integers(1, 2), Lq=st.integers(1, 300), Lk=st.integers(1, 500),
       D=st.sampled_from([64, 128]), dtype=st.sampled_from(sorted(DTYPES)), density=st.floats(0, 1),
       seed=st.integers(0, 999))
def test_any_mask(device, B, H, Lq, Lk, D, dtype, density, seed):
    check(*make(device, Lq, Lk, D, DTYPES[dtype], B, H, density, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 8192, 128), (2000, 8100, 128), (2000, 8100, 64)],
                         ids=["whole blocks", "partial blocks", "D 64"])
@with_dtypes
def test_large(shape, dtype):
    check(*make("cuda", *shape, dtype, H=5, density=0.45))


@pytest.mark.gpu
@with_and_without_others
def test_same_bits_500_times(others):
    q, k, v, mask = make("cuda", 4096, 8192, 128, H=4, density=0.45)
    assert changed(lambda: call(q, k, v, mask), others) == 0


@pytest.mark.gpu
def test_graph_with_other_masks():
    """What was captured for one mask is replayed for others, in the same memory."""
    q, k, v, mask = make("cuda", 700, 1100, 128)
    static = lists(mask)
    sparse_attn_triton.forward(q, k, v, *static, 0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_attn_triton.forward(q, k, v, *static, 0.1)
    for other in (mask, ~mask, torch.zeros_like(mask), torch.ones_like(mask)):
        for held, new in zip(static, lists(other)):
            held.copy_(new)
        graph.replay()
        assert_same_bits(captured, sparse_attn_triton.forward(q, k, v, *lists(other), 0.1))


FAR = {  # rows, strides and distance of q, k and v in one memory; elements 2^31 and more apart
    "batches": (300, (2 ** 31, 128, 64, 1), 2 ** 17), "heads": (300, (300 * 64, 64, 2 ** 31, 1), 2 ** 17),
    "rows": (300, (128, 2 ** 23, 64, 1), 256), "rows of a block": (140, (128, 2 ** 25, 64, 1), 256)}


@pytest.mark.gpu
@pytest.mark.parametrize("rows, strides, apart", FAR.values(), ids=FAR.keys())
def test_far_apart(rows, strides, apart):
    near = make("cuda", rows, rows, B=2)
    size = sum((n - 1) * stride for n, stride in zip(near[0].shape, strides)) + 2 * apart + 1
    memory = torch.full((size,), NAN, dtype=torch.bfloat16, device="cuda")
    far = [memory.as_strided(x.shape, strides, i * apart).copy_(x) for i, x in enumerate(near[:3])]
    assert_same_bits(call(*far, near[3]), call(*near))


@pytest.mark.gpu
def test_more_than_2_to_the_31_outputs():
    Lq = 2 ** 24 + 100
    q, k, v, _ = make("cuda", 1, 100, 128, H=1)
    q = torch.randn(1, Lq, 1, 128, dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(1, 1, -(-Lq // 128), 1, dtype=torch.int32, device="cuda")
    order = torch.arange(index.shape[2], dtype=torch.int32, device="cuda")
    out, lse = sparse_attn_triton.forward(q, k, v, index, torch.ones_like(index[..., 0]), order, 0.1)
    for rows in (slice(0, 128), slice(2 ** 23 - 64, 2 ** 23 + 64), slice(Lq - 100, Lq)):
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
        check_attention(out[:, rows], lse[..., rows], q[:, rows], k, v, mask, 0.1, lse_tolerance=1e-5)
