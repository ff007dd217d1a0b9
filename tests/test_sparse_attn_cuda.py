"""The CUDA C++ op sparse_attn_cuda (sm_80 and newer) against float64."""
import math

import pytest
import torch

from flashvsr_kernels import BlockMask, _native
from tests.error_rule import check_attention
from tests.other_work import changed, with_and_without_others

REFUSAL = _native.cuda_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))]
NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"whole blocks": (256, 384, 128), "partial blocks": (300, 515, 128), "odd pairs": (129, 127, 64),
          "one": (1, 1, 64), "33 keys": (70, 33, 128), "65 keys": (70, 65, 64), "many": (1024, 4096, 128),
          "many D 64": (1024, 4096, 64)}


def call(q, k, v, mask, scale=None, **instead):
    lists = BlockMask.from_dense(mask)
    lists = {"index": lists.index, "count": lists.count, "order": lists.order} | instead
    return torch.ops.flashvsr.sparse_attn_cuda(q, k, v, *lists.values(),
                                               q.shape[-1] ** -0.5 if scale is None else scale)


def make(Lq, Lk, D, dtype, B=2, H=3, density=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=g).to("cuda", dtype) for L in (Lq, Lk, Lk))
    return q, k, v, (torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density).cuda()


def check(*call, **options):
    check_attention(*call, **options, lse_tolerance=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_float64_reference(dtype, shape):
    q, k, v, mask = make(*shape, dtype)
    out, lse = call(q, k, v, mask)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    check(out, lse, q, k, v, mask)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_scale(dtype, scale):
    q, k, v, mask = make(300, 515, 128, dtype)
    check(*call(q, k, v, mask, scale), q, k, v, mask, scale)


@pytest.mark.parametrize("layout", ["one tensor of q, k and v", "heads before rows", "padded rows"])
def test_strides(layout):
    q, k, v, mask = make(300, 300, 64, torch.bfloat16)
    if layout == "one tensor of q, k and v":
        views = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before rows":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    else:
        views = [torch.nn.functional.pad(x, (8, 16), value=NAN)[..., 8:-16] for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in views)
    for got, wanted in zip(call(*views, mask), call(q, k, v, mask)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("D", [64, 128])
def test_what_must_not_be_read_is_nan(D):
    Lq, Lk = 140, 400
    q, k, v, mask = make(Lq, Lk, D, torch.bfloat16)
    mask[..., 1] = False  # nobody reads key block 1
    wanted = call(q, k, v, mask)
    poisoned = []
    for x, L in ((q, Lq), (k, Lk), (v, Lk)):
        whole = torch.full((2, L + 200, 3, D), NAN, dtype=x.dtype, device="cuda")
        whole[:, 100:100 + L] = x
        poisoned.append(whole[:, 100:100 + L])
    for x in poisoned[1:]:
        x[:, 128:256] = NAN
    for got, expected in zip(call(*poisoned, mask), wanted):
        assert torch.equal(got, expected)


def test_any_order():
    q, k, v, mask = make(1024, 1000, 128, torch.bfloat16)
    wanted = call(q, k, v, mask)
    tiles = mask.shape[:3].numel()
    for order in (torch.arange(tiles), torch.arange(tiles).flip(0), torch.randperm(tiles)):
        for got, expected in zip(call(q, k, v, mask, order=order.int().cuda()), wanted):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("garbage", [-1, 2 ** 31 - 1])
def test_entries_past_count_are_not_followed(garbage):
    q, k, v, mask = make(300, 1000, 128, torch.bfloat16)
    lists = BlockMask.from_dense(mask)
    past = torch.arange(lists.index.shape[-1], device="cuda") >= lists.count[..., None]
    wanted = call(q, k, v, mask)
    for got, expected in zip(call(q, k, v, mask, index=lists.index.masked_fill(past, garbage)), wanted):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_empty_rows(dtype):
    q, k, v, mask = make(300, 300, 128, dtype)
    mask[:, 1, 0] = mask[0, :, 2] = False
    out, lse = call(q, k, v, mask)
    rows = (~mask.any(-1)).repeat_interleave(128, 2)[..., :300]
    assert (lse[rows] == -math.inf).all() and lse[~rows].isfinite().all()
    assert (out.transpose(1, 2)[rows] == 0).all()
    check(out, lse, q, k, v, mask)


@pytest.mark.parametrize("factor", [10, 60, 1000])
def test_large_scores(factor):
    q, k, v, mask = make(256, 640, 128, torch.bfloat16)
    q *= factor
    check(*call(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_maximum_in_the_last_block(dtype):
    q, k, v, mask = make(256, 1024, 128, dtype)
    mask[...] = True
    k[:, -1] = q[:, 5] * 4  # scores of this key outgrow all before, far more in some rows than in others
    check(*call(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("growth", [.5, 2.5, 3.5, 7, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_one_hot_key(dtype, growth):
    """On both sides of the growth from which the top of a row follows its maximum, to base 2."""
    q, k, v, mask = make(128, 384, 64, dtype)
    mask[...] = True
    q[...], k[...] = 0, 0
    q[..., 0], k[..., 0] = torch.linspace(6, 10, 128, device="cuda")[:, None], -25
    k[:, [0, 383], :, 0] = 0
    k[:, 200, :, 0] = growth / 1.4427
    check(*call(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("growth", [1.3, 2.5, 6, 12])
@pytest.mark.parametrize("keys", [1, 2, 4, 17, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_weight_on_equal_keys(dtype, keys, growth):
    """Plain PyTorch's weights, 1, 1 / 2 ... of keys that outgrow the first tile, are exact or nearly so."""
    q, k, v, mask = make(128, 384, 64, dtype)
    mask[...] = True
    q[...], k[...] = 0, 0
    q[..., 0], k[..., 0] = torch.linspace(6, 10, 128, device="cuda")[:, None], -25
    k[:, 0, :, 0] = 0
    k[:, 128:128 + keys, :, 0] = growth / 1.4427
    check(*call(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("keys", [1, 64], ids=["one a tile", "all"])
def test_equal_keys_that_outgrow_by_little(keys):
    """Plain PyTorch's weights are nearly exact, P lies between two bf16: one rounding more is what that may cost."""
    q, k, v, mask = make(128, 16 * 128, 64, torch.bfloat16)
    mask[...] = True
    q[...], k[...] = 0, 0
    q[..., 0], k[..., 0] = 8, -25
    k.view(-1, 32, 64, *k.shape[2:])[:, :, :keys, :, 0] = 0
    k[:, :keys, :, 0] = -.0039
    check(*call(q, k, v, mask), q, k, v, mask, roundings=1)


@with_and_without_others
def test_same_bits_500_times(others):
    q, k, v, mask = make(1024, 2048, 128, torch.bfloat16)
    assert changed(lambda: call(q, k, v, mask), others) == 0


def test_current_stream_and_graph():
    q, k, v, mask = make(512, 1024, 128, torch.bfloat16)
    held = BlockMask.from_dense(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = torch.ops.flashvsr.sparse_attn_cuda(q, k, v, held.index, held.count, held.order, 128 ** -0.5)
    for other in (mask, ~mask, torch.ones_like(mask)):
        lists = BlockMask.from_dense(other)
        for mine, new in zip((held.index, held.count, held.order), (lists.index, lists.count, lists.order)):
            mine.copy_(new)
        out.fill_(NAN), lse.fill_(NAN)
        graph.replay()
        for got, wanted in zip((out, lse), call(q, k, v, other)):
            assert torch.equal(got, wanted)


def test_offsets_beyond_32_bits():
    """Batches, and rows, more than 2^31 elements apart."""
    q, k, v, mask = make(300, 300, 64, torch.bfloat16, B=2, H=2)
    for strides in ((2 ** 31, 128, 64, 1), (64 * 300, 7_400_000, 64 * 300 * 2, 1)):
        for at, x in enumerate((q, k, v)):
            far, views = torch.empty(2 ** 31 + 2 ** 26, dtype=q.dtype, device="cuda"), [q, k, v]
            views[at] = far.as_strided(x.shape, strides).copy_(x)
            for got, wanted in zip(call(*views, mask), call(q, k, v, mask)):
                assert torch.equal(got, wanted)


BAD = {
    "float32": (lambda q, k, v: (q.float(), k.float(), v.float()), 1.0, "bfloat16 or float16"),
    "scale": (lambda q, k, v: (q, k, v), -1.0, "scale must be positive"),
    "alignment": (lambda q, k, v: (torch.nn.functional.pad(q, (1, 0))[..., 1:], k, v), 1.0,
                  "q('s rows)? must be"),
    "device": (lambda q, k, v: (q, k.cpu(), v), 1.0, "must be on q's device"),
}


BAD_ORDERS = {
    "int64": (lambda order: order.long(), "order must be int32"),
    "one tile short": (lambda order: order[1:], r"order must be \(6,\)"),
    "two dimensions": (lambda order: order[None], r"order must be \(6,\)"),
    "every second element": (lambda order: order.repeat_interleave(2)[::2], "order must be contiguous"),
    "on the CPU": (lambda order: order.cpu(), "must be on q's device"),
}


@pytest.mark.parametrize("change, words", BAD_ORDERS.values(), ids=BAD_ORDERS.keys())
def test_bad_orders(change, words):
    q, k, v, mask = make(128, 128, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=words):
        call(q, k, v, mask, order=change(BlockMask.from_dense(mask).order))


@pytest.mark.parametrize("change, scale, words", BAD.values(), ids=BAD.keys())
def test_errors(change, scale, words):
    q, k, v, mask = make(128, 128, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=words):
        call(*change(q, k, v), mask, scale)
