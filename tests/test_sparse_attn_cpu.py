"""The C++ op sparse_attn_cpu, every instruction set that this processor runs, against float64."""
import math
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from flashvsr_kernels import BlockMask, _native, reference
from tests.error_rule import check_attention

pytestmark = pytest.mark.skipif(_native.available() is not None, reason=str(_native.available()))
NAN = float("nan")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
ISAS = {"generic": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}  # of csrc/params.h
# avx512bf16 serves bf16 alone
KINDS = [pytest.param(dtype, isa, id=f"{name}-{isa}") for name, dtype in DTYPES.items() for isa in ISAS
         if isa != "avx512bf16" or name == "bf16"]
SHAPES = {"whole blocks": (256, 384, 128), "partial blocks": (300, 515, 128), "odd pairs": (129, 127, 64),
          "one": (1, 1, 64), "few queries": (9, 1100, 128)}


def call(q, k, v, mask, scale=None, isa=None):
    lists = BlockMask.from_dense(mask)
    return torch.ops.flashvsr.sparse_attn_cpu(q, k, v, lists.index, lists.count,
                                              q.shape[-1] ** -0.5 if scale is None else scale, ISAS.get(isa, 0))


def skip_unless_runs(isa, dtype):
    """Skips where the processor has not these instructions; "generic" runs everywhere."""
    x = torch.zeros(1, 1, 1, 64, dtype=dtype)
    try:
        call(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.bool), isa=isa)
    except RuntimeError as error:
        if isa == "generic" or "runs on this processor" not in str(error):
            raise
        pytest.skip(f"no {isa} build for {dtype} here")


def make(Lq, Lk, D, dtype, B=2, H=3, density=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=g).to(dtype) for L in (Lq, Lk, Lk))
    return q, k, v, torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype, isa", KINDS)
def test_float64_reference(dtype, isa, shape):
    skip_unless_runs(isa, dtype)
    q, k, v, mask = make(*shape, dtype)
    out, lse = call(q, k, v, mask, isa=isa)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    check_attention(out, lse, q, k, v, mask)


@pytest.mark.parametrize("scale", [0.5, -0.1, 0.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_scale(dtype, scale):
    q, k, v, mask = make(130, 260, 64, dtype)
    check_attention(*call(q, k, v, mask, scale), q, k, v, mask, scale)


def test_float64_is_float64():
    q, k, v, mask = make(200, 300, 128, torch.float64)
    exact, _ = reference.sparse_attn(q, k, v, mask, 128 ** -0.5)
    torch.testing.assert_close(call(q, k, v, mask)[0], exact, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("layout", ["one tensor of q, k, v", "heads before rows", "padded rows",
                                    "broadcast batch"])
def test_strides(layout, dtype):
    q, k, v, mask = make(300, 300, 64, dtype)
    if layout == "one tensor of q, k, v":
        views = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before rows":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "padded rows":
        views = [F.pad(x, (3, 5), value=NAN)[..., 3:-5] for x in (q, k, v)]
    else:
        q, k, v = (x[:1].expand(2, -1, -1, -1).contiguous() for x in (q, k, v))
        views = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in views)
    for got, wanted in zip(call(*views, mask), call(q, k, v, mask)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype, isa", KINDS)
def test_what_must_not_be_read_is_nan(dtype, isa):
    skip_unless_runs(isa, dtype)
    Lq, Lk = 140, 400
    q, k, v, mask = make(Lq, Lk, 128, dtype)
    mask[..., 1] = False  # nobody reads key block 1
    wanted = call(q, k, v, mask, isa=isa)
    poisoned = []
    for x, L in ((q, Lq), (k, Lk), (v, Lk)):
        whole = torch.full((2, L + 200, 3, 128), NAN, dtype=dtype)
        whole[:, 100:100 + L] = x
        poisoned.append(whole[:, 100:100 + L])
    for x in poisoned[1:]:
        x[:, 128:256] = NAN
    for got, expected in zip(call(*poisoned, mask, isa=isa), wanted):
        assert torch.equal(got, expected)


def test_nan_that_is_read_shows():
    q, k, v, _ = make(256, 256, 64, torch.float32, B=1, H=1)
    k[0, 200, 0, 5] = NAN
    out, lse = call(q, k, v, torch.tensor([[True, False], [True, True]])[None, None])
    assert out[0, :128].isfinite().all() and out[0, 128:].isnan().all()
    assert lse[0, 0, :128].isfinite().all() and lse[0, 0, 128:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_empty_rows(dtype):
    q, k, v, mask = make(300, 300, 128, dtype)
    mask[:, 1, 0] = mask[0, :, 2] = False
    out, lse = call(q, k, v, mask)
    empty = ~mask.any(-1)
    assert empty.any() and not empty.all()
    rows = empty.repeat_interleave(128, 2)[..., :300]
    assert (lse[rows] == -math.inf).all() and lse[~rows].isfinite().all()
    assert (out.transpose(1, 2)[rows] == 0).all() and (out.transpose(1, 2)[~rows] != 0).any(-1).all()
    check_attention(out, lse, q, k, v, mask)


def test_nothing_kept_and_nothing_there():
    q, k, v, mask = make(130, 130, 64, torch.float32, density=0)
    count = mask.sum(-1, dtype=torch.int32)
    index = torch.zeros(2, 3, 2, 0, dtype=torch.int32)
    out, lse = torch.ops.flashvsr.sparse_attn_cpu(q, k, v, index, count, 1.0)
    assert not out.any() and (lse == -math.inf).all()
    out, lse = call(q[:, :0], k, v, mask[:, :, :0])
    assert out.shape == (2, 0, 3, 64) and lse.shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_large_scores(dtype):
    q, k, v, mask = make(256, 640, 128, dtype)
    q *= 60  # scores up to some hundreds: one key takes all
    out, lse = call(q, k, v, mask)
    exact, exact_lse = reference.sparse_attn(q.double(), k.double(), v.double(), mask, 128 ** -0.5)
    native = (reference.sparse_attn(q, k, v, mask, 128 ** -0.5)[0].double() - exact).abs()
    assert (out.double() - exact).abs().max() <= 2 * native.max() + 1e-5
    torch.testing.assert_close(lse, exact_lse.float(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype, isa", KINDS)
def test_same_bits_for_any_number_of_threads(dtype, isa):
    skip_unless_runs(isa, dtype)
    q, k, v, mask = make(700, 900, 64, dtype, B=1, H=5)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(call(q, k, v, mask, isa=isa))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_a_head_alone_gives_the_same_bits():
    q, k, v, mask = make(300, 500, 128, torch.float32)
    out, _ = call(q, k, v, mask)
    for b in range(2):
        for h in range(3):
            alone = (x[b:b + 1, :, h:h + 1] for x in (q, k, v))
            assert torch.equal(call(*alone, mask[b:b + 1, h:h + 1])[0][0, :, 0], out[b, :, h])


X = torch.zeros(1, 200, 2, 64)
LISTS = torch.zeros(1, 2, 2, 2, dtype=torch.int32), torch.ones(1, 2, 2, dtype=torch.int32)
BAD = {
    "D": ((X[..., :32], X[..., :32], X[..., :32], *LISTS), "D must be 64 or 128, got 32"),
    "heads": ((X, X[:, :, :1], X[:, :, :1], *LISTS), "k must agree with q in dimension 2"),
    "keys": ((X, X, X[:, :100], *LISTS), "v must agree with k in dimension 1"),
    "dtypes": ((X, X.double(), X, *LISTS), "k must have q's dtype"),
    "stride": ((X.transpose(1, 3).contiguous().transpose(1, 3), X, X, *LISTS), "q's last dimension must be"),
    "float16": ((X.half(), X.half(), X.half(), *LISTS), "no build for q's dtype"),
    "index dtype": ((X, X, X, LISTS[0].long(), LISTS[1]), "index must be int32"),
    "index shape": ((X, X, X, LISTS[0][:, :, :1], LISTS[1]), "index must be"),
    "index too large": ((X, X, X, LISTS[0] + 2, LISTS[1]), "index must be below 2, got 2"),
    "index negative": ((X, X, X, LISTS[0] - 1, LISTS[1]), "index must be below 2, got -1"),
    "count too large": ((X, X, X, LISTS[0], LISTS[1] + 2), "count must be 0 to 2, got 3"),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD.keys())
def test_errors(arguments, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.flashvsr.sparse_attn_cpu(*arguments, 1.0)


def test_faster_than_masked_dense_attention():
    """At least 1.5x even on a busy machine; python -m benchmarks.bench_cpu_attention measures it."""
    q, k, v, mask = make(1024, 4096, 128, torch.float32, B=1, H=2, density=0.45)
    tokens = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)
    lists = BlockMask.from_dense(mask)
    ratios = []
    for _ in range(7):
        start = time.perf_counter()
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=tokens)
        middle = time.perf_counter()
        torch.ops.flashvsr.sparse_attn_cpu(q, k, v, lists.index, lists.count, 128 ** -0.5)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    assert statistics.median(ratios) > 1.5
