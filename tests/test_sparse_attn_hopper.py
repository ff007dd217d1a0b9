"""The Gluon forward for sm_90, on the GPU and as Python on threads, against float64, above all where its fixed maximum
must give way.
"""
import math

import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

from flashvsr_kernels import BlockMask, backends, sparse_attn, sparse_attn_hopper
from tests import gluon_on_threads
from tests.error_rule import check_attention
from tests.gluon_on_threads import Launcher, planted
from tests.other_work import changed, with_and_without_others

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
REFUSAL = backends()["sparse_attn"]["hopper"]
NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = {"whole blocks": (1, 384, 512, 2, 64), "partial blocks": (2, 300, 515, 1, 64), "one": (1, 1, 1, 1, 64),
         "several tiles a program": (1, 700, 900, 3, 128)}
SHAPES = {"whole blocks": (1, 256, 384, 2, 128), "partial blocks": (2, 300, 515, 3, 128),
          "odd": (2, 129, 127, 3, 64), "33 keys": (1, 70, 33, 1, 128), "many": (1, 1024, 4096, 3, 128),
          "many D 64": (1, 1024, 4096, 3, 64), "several tiles a program": (1, 6400, 1300, 8, 128)}


def shrunk(l, shrink):
    """Stands for the kernel's, which asks l for its layout."""
    return l * shrink[:, None]


def take(taken):
    """Stands for an atomic addition; one program runs at a time."""
    place = int(taken.load())
    taken.store(place + 1)
    return place


STAND_INS = dict(_shrunk=shrunk, _at_once=lambda x: x, _declare_any_lane=lambda: None,
                 _has_greater=lambda x, y: bool((x > y).any()), _take=take,
                 _answer=lambda ticket: gluon_on_threads.LANGUAGE.num_programs(0) + ticket)
THREADS = {late: Launcher(sparse_attn_hopper, "forward_kernel", late, **STAND_INS) for late in ("products", "copies")}


def needs_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


@pytest.fixture(params=["late products", "late copies", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if REFUSAL is not None:
            pytest.skip(REFUSAL)
        return "cuda"
    monkeypatch.setattr(sparse_attn_hopper, "forward_kernel", THREADS[request.param.split()[1]])
    return "cpu"


def make(B=1, Lq=512, Lk=1024, H=2, D=128, dtype=torch.bfloat16, density=0.6, seed=0, device="cuda"):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=g).to(device, dtype) for L in (Lq, Lk, Lk))
    mask = (torch.rand(B, H, -(-Lq // 128), -(-Lk // 128), generator=g) < density).to(device)
    mask[..., 0, 0] = True
    return q, k, v, mask


def call(q, k, v, mask, scale=None):
    if q.is_cuda:
        return sparse_attn(q, k, v, mask, scale=scale, return_lse=True, backend="hopper")
    lists, scale = BlockMask.from_dense(mask), q.shape[-1] ** -.5 if scale is None else scale
    return sparse_attn_hopper.forward(q, k, v, lists.index, lists.count, lists.order, scale)


def check(q, k, v, mask, scale=None, **options):
    out, lse = call(q, k, v, mask, scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    check_attention(out, lse, q, k, v, mask, scale, lse_tolerance=1e-5, **options)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_small(device, dtype, shape):
    check(*make(*shape, dtype=dtype, device=device))


def test_empty_rows(device):
    q, k, v, mask = make(1, 600, 384, 3, 64, device=device)
    mask[0, 1] = mask[0, 0, 2] = mask[0, 2, 4] = False
    check(q, k, v, mask)


@pytest.mark.parametrize("rows", [slice(70, 71), slice(0, 700), slice(300, 410)], ids=["one", "all", "some"])
def test_rows_that_need_the_running_maximum(device, rows):
    """Alone in their half of a tile, in all of them, and in some that are empty too."""
    q, k, v, mask = make(1, 700, 900, 2, 64, device=device)
    mask[..., -1] = mask[..., 0] = True
    mask[0, 1, 3] = False
    q[:, rows] *= 60
    check(q, k, v, mask)


def growing(blocks, device):
    """Each block's keys weigh 2.7 to 2.9 times those of the one before: from the fourth on none triples the sum."""
    q, k, v, mask = make(1, 128, 128 * blocks, 1, 64, device=device)
    mask[...] = True
    q[..., 1:], q[..., 0] = 0, torch.linspace(8.08, 8.4, 128, device=device)[:, None]
    k[0, :, 0, 0] = torch.arange(blocks, device=device).flip(0).repeat_interleave(128)
    return q, k, v, mask


def sums_that_are_not_finite(device):
    """Of a column of values alone: under the fixed maximum +inf, then NaN, beside sums that are; finite under any."""
    q, k, v, mask = growing(24, device)
    v[:, 128:256, :, 5], v[:, :128, :, 5] = 1e30, -3e30
    return q, k, v, mask


def test_sums_that_are_not_finite(device):
    check(*sums_that_are_not_finite(device))


def equal_keys(at, device, D=64, seed=0):
    """All weight on keys that are alike and not in the block that is served first."""
    q, k, v, mask = make(1, 128, 384, 1, D, device=device, seed=seed)
    mask[...] = True
    q[..., 0] = torch.linspace(8, 24, 128, device=device)[:, None] * (D / 64) ** .5
    k[:, list(at)] = 0
    k[:, list(at), :, 0] = 14
    return q, k, v, mask


MISTAKES = {
    "none": ("", ""),
    "queries overwritten while they are read": ('        _barrier("bar.sync 12, 288; mov.u32 $0, 0;")', "        pass"),
    "tiles that were served before not kept": ("gl.store(again + tile * 3 + 2, before)",
                                               "gl.store(again + tile * 3 + 2, -1)"),
    "rows asked for before they are judged": (
        '        bad.index(W).store(gl.full([1], any_bad, gl.int32, ONE))\n        _barrier("bar.sync 7, 288; mov.u32 $0, 0;")',
        '        _barrier("bar.sync 7, 288; mov.u32 $0, 0;")\n        bad.index(W).store(gl.full([1], any_bad, gl.int32, ONE))'),
    "keys freed while they are read": ("s = warpgroup_mma_wait(1, deps=[s])\n        _free(K_FREE, at)",
                                       "_free(K_FREE, at)\n        s = warpgroup_mma_wait(1, deps=[s])"),
    "values freed while they are read": ("        pv = warpgroup_mma(b_p, v_ring.index(at - 1 & 1)",
                                         "        _free(V_FREE, at - 1)\n        pv = warpgroup_mma(b_p, v_ring.index(at - 1 & 1)"),
    "no fence before a store": ("fence_async_shared()\n        _meet", "_meet"),
    "a store's source overwritten": ("        tma.store_wait(0)\n        _meet()\n        half", "        half"),
    "the ring's phase of values": ("mbarrier.wait(v_full.index(last & 1), last >> 1 & 1)", "pass"),
    "blocks of the tiles before not counted": ("        step += n\n        tile, n = _next(told)\n    if FIXED_MAX",
                                               "        tile, n = _next(told)\n    if FIXED_MAX"),
    "sums not looked at": (' & (gl.sum(gl.abs(acc), 1) < float("inf"))', ""),
    "nobody asks whether rows were bad": ("is_bad = gl.max(gl.where(in_range, 0, 1), 0)", "is_bad = 0"),
    "growth not looked for": ("if _has_greater(more, l * 2.0 + 1.0):", "if False:"),
    "what came before does not shrink": ("l, more = _shrunk(l, shrink), _shrunk(more, shrink)",
                                         "more = _shrunk(more, shrink)")}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_threads_find_mistakes(mistake, tmp_path, monkeypatch):
    (right, wrong), found = mistake, []
    mistaken = planted(sparse_attn_hopper, right, wrong, tmp_path, monkeypatch)
    q, k, v, mask = make(1, 700, 900, 1, 64, device="cpu")
    mask[..., -1] = True
    q[:, 300:410] *= 60
    cases = (q, k, v, mask), sums_that_are_not_finite("cpu"), equal_keys(range(0, 256, 32), "cpu")
    launchers = [Launcher(mistaken, "forward_kernel", late, **STAND_INS) for late in ("products", "copies")]
    # Whether a mistake shows can depend on which thread runs when: more than one try.
    for launcher in launchers * (10 if right else 1):
        if any(found):
            break
        monkeypatch.setattr(mistaken, "forward_kernel", launcher)
        try:
            for q, k, v, mask in cases:
                lists = BlockMask.from_dense(mask)
                out, lse = mistaken.forward(q, k, v, lists.index, lists.count, lists.order, .125)
                check_attention(out, lse, q, k, v, mask, lse_tolerance=1e-5)
            found.append(False)
        except (AssertionError, RuntimeError, TypeError):  # the last of sums that are not complete
            found.append(True)
    assert any(found) == bool(right)


@needs_hopper
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_float64_reference(dtype, shape):
    check(*make(*shape, dtype=dtype))


@needs_hopper
@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, x) for x in (1, 3, 10, 30, 60, 100, 200, 1000)]
                         + [(torch.float16, x) for x in (1, 10, 100)])
def test_growth_past_the_first_block(dtype, factor):
    """Scores of any size: rows whose sum leaves the fixed maximum's range are computed again."""
    q, k, v, mask = make(dtype=dtype)
    check(q * factor, k, v, mask)


@needs_hopper
@pytest.mark.parametrize("at", [0, 500, 1023], ids=["first key", "a key between", "last key"])
@pytest.mark.parametrize("gain", [1, 5, 10, 20, 60, 87, 89, 91, 1e3])
def test_one_hot_key(gain, at):
    """One row in one warpgroup has all its weight on one key, whose P is finite (to a gain of 88.7) or not."""
    q, k, v, mask = make()
    mask[...] = True
    k[:, at] = q[:, 300] * gain / 11.3
    check(q, k, v, mask)


def test_sum_at_the_limit(device):
    """Row sums on both sides of 2^60 in one block: the verdict is the block's, results are right on both."""
    q, k, v, mask = growing(38, device)
    s = q[0, :, 0].double() @ k[0, :, 0].double().T / 8
    third = s[:, -384:-256]  # served: whose maxima are taken last
    sums = (s - third.amax(1, keepdim=True)).logsumexp(1) / math.log(2)
    assert sums.min() < 59.5 and sums.max() > 60.3
    check(q, k, v, mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("at", [(3,), (0, 2), (0, 1), (0, 2, 36, 70), range(0, 256, 32), range(1, 256, 15), range(256)],
                         ids=["one", "two lanes", "one lane", "four", "eight", "seventeen", "two blocks"])
def test_weight_on_equal_keys(device, at, D, seed):
    """Plain PyTorch's weights, 1, 1 / 2 ... of them, are exact or nearly so."""
    check(*equal_keys(at, device, D, seed))


@pytest.mark.parametrize("keys", [1, 128], ids=["one a block", "all"])
def test_equal_keys_that_outgrow_by_little(device, keys):
    """Plain PyTorch's weights are nearly exact, P lies between two bf16: one rounding more is what that may cost."""
    q, k, v, mask = make(1, 128, 17 * 128, 1, 64, device=device)
    mask[...] = True
    q[...], k[...] = 0, 0
    q[..., 0], k[..., 0] = 8, -25
    blocks = k.view(17, 128, 64)
    blocks[:, :keys, 0], blocks[-1, :keys, 0] = 0, -.0039
    check(q, k, v, mask, roundings=1)


@needs_hopper
@pytest.mark.parametrize("keys", [slice(500), slice(1500, None)], ids=["served last", "served first"])
def test_outliers_in_every_tenth_row(keys):
    q, k, v, mask = make(Lq=1024, Lk=2048)
    q[:, ::10] *= 50
    k[:, keys] *= 3
    check(q, k, v, mask)


@needs_hopper
def test_nan_stays_in_its_row():
    q, k, v, mask = make()
    mask[...] = True
    q[0, 200, 1] = NAN
    out, lse = call(q, k, v, mask)
    assert out[0, 200, 1].isnan().all() and lse[0, 1, 200].isnan()
    q[0, 200, 1] = 0
    out[0, 200, 1], lse[0, 1, 200] = (x[0] for x in (call(q, k, v, mask)[0][:, 200, 1],
                                                     call(q, k, v, mask)[1][:, 1, 200]))
    check_attention(out, lse, q, k, v, mask, lse_tolerance=1e-5)


@needs_hopper
@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0])
def test_scale(scale):
    check(*make(Lq=300, Lk=515), scale)


@needs_hopper
@pytest.mark.parametrize("layout", ["one tensor of q, k and v", "heads before rows", "padded rows", "ring of keys"])
def test_strides(layout):
    q, k, v, mask = make(2, 300, 300, 3, 64)
    if layout == "one tensor of q, k and v":
        views = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before rows":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "padded rows":
        views = [torch.nn.functional.pad(x, (8, 16), value=NAN)[..., 8:-16] for x in (q, k, v)]
    else:
        views = [q] + [torch.nn.functional.pad(x, (0, 0, 0, 0, 128, 256), value=NAN)[:, 128:-256] for x in (k, v)]
    assert not any(x.is_contiguous() for x in views[1:])
    for got, wanted in zip(call(*views, mask), call(q, k, v, mask)):
        assert torch.equal(got, wanted)


@needs_hopper
@pytest.mark.parametrize("D", [64, 128])
def test_what_must_not_be_read_is_nan(D):
    q, k, v, mask = make(2, 140, 400, 3, D)
    mask[..., 1] = False  # nobody reads key block 1
    wanted = call(q, k, v, mask)
    k[:, 128:256] = v[:, 128:256] = NAN
    lists = BlockMask.from_dense(mask)
    past = torch.arange(lists.index.shape[-1], device="cuda") >= lists.count[..., None]
    lists.index[past] = 2 ** 30
    for got, expected in zip(call(q, k, v, lists), wanted):
        assert torch.equal(got, expected)


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_empty_rows_and_heads(dtype):
    q, k, v, mask = make(2, 300, 300, 3, dtype=dtype)
    mask[:, 1, 0] = mask[0, :, 2] = mask[1, 2] = False
    out, lse = call(q, k, v, mask)
    rows = (~mask.any(-1)).repeat_interleave(128, 2)[..., :300]
    assert (lse[rows] == -math.inf).all() and (out.transpose(1, 2)[rows] == 0).all()
    check(q, k, v, mask)


@needs_hopper
@pytest.mark.parametrize("every", [97, 700, 6400])
@pytest.mark.parametrize("Lk", [1280, 1300])
def test_programs_that_serve_many_tiles_run_some_again(Lk, every):
    """More than four tiles a program; rows that need the running maximum in all of a program's, in some, in one."""
    q, k, v, mask = make(1, 6400, Lk, 12)
    mask[0, 3] = mask[0, :, 20:22] = False
    q[:, 5::every] *= 1000
    check(q, k, v, mask)


@needs_hopper
@with_and_without_others
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_same_bits_500_times(dtype, others):
    q, k, v, mask = make(1, 8448, 4096, 4, dtype=dtype)
    q[:, ::300] *= 1000  # the blocks of these rows run again
    assert changed(lambda: call(q, k, v, mask), others) == 0


@needs_hopper
def test_graph_replays_with_another_mask():
    q, k, v, mask = make()
    call(q, k, v, mask)
    graph, held = torch.cuda.CUDAGraph(), mask.clone()
    with torch.cuda.graph(graph):
        out, lse = call(q, k, v, held)
    for seed in range(3):
        q2, k2, v2, mask2 = make(seed=seed, density=0.2 + 0.3 * seed)
        for a, b in ((q, q2), (k, k2), (v, v2), (held, mask2)):
            a.copy_(b)
        out.fill_(NAN), lse.fill_(NAN)
        graph.replay()
        for got, wanted in zip((out, lse), call(q2, k2, v2, mask2)):
            assert torch.equal(got, wanted)


FAR = {  # rows, strides and distance of q, k and v in one memory; elements 2^31 and more apart
    "batches": (300, (2 ** 31, 128, 64, 1), 2 ** 17), "heads": (300, (300 * 64, 64, 2 ** 31, 1), 2 ** 17),
    "rows": (300, (128, 2 ** 23, 64, 1), 256), "rows of a block": (140, (128, 2 ** 25, 64, 1), 256)}


@needs_hopper
@pytest.mark.parametrize("rows, strides, apart", FAR.values(), ids=FAR.keys())
def test_far_apart(rows, strides, apart):
    q, k, v, mask = make(2, rows, rows, 2, 64)
    memory = torch.full((sum((n - 1) * stride for n, stride in zip(q.shape, strides)) + 2 * apart + 1,), NAN,
                        dtype=q.dtype, device="cuda")
    far = [memory.as_strided(x.shape, strides, i * apart).copy_(x) for i, x in enumerate((q, k, v))]
    for got, wanted in zip(call(*far, mask), call(q, k, v, mask)):
        assert torch.equal(got, wanted)


@needs_hopper
def test_more_than_2_to_the_31_outputs():
    Lq, mask = 2 ** 24 + 100, torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    _, k, v, _ = make(1, 1, 128, 1)
    q = torch.randn(1, Lq, 1, 128, dtype=k.dtype, device="cuda")
    out, lse = call(q, k, v, mask.expand(1, 1, -(-Lq // 128), 1))
    for rows in (slice(0, 128), slice(2 ** 23 - 64, 2 ** 23 + 64), slice(Lq - 100, Lq)):
        check_attention(out[:, rows], lse[..., rows], q[:, rows], k, v, mask, lse_tolerance=1e-5)


@needs_hopper
def test_misaligned_rows_are_refused_with_the_reason():
    q, k, v, mask = make()
    odd = torch.nn.functional.pad(q, (1, 0))[..., 1:]
    with pytest.raises(NotImplementedError, match="hopper: rows of q must be distinct and 16-byte aligned"):
        call(odd, k, v, mask)
