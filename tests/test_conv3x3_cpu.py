"""The C++ convolutions, every instruction set that this processor runs, against float64."""
import statistics
import time
from functools import partial

import pytest
import torch

from flashvsr_kernels import _native, conv3x3, fold_upsample, reference, upsample_conv
from flashvsr_model import load_upscaler
from tests.error_rule import check
from tests.plain import references

pytestmark = pytest.mark.skipif(_native.available() is not None, reason=str(_native.available()))
NAN = float("nan")
ISAS = {"generic": 1, "avx2": 2, "avx512": 3}  # of csrc/params.h
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# N, H, W, C, O
LAYERS = {"in": (1, 12, 44, 784, 112), "1/8": (1, 24, 44, 112, 112), "1/4": (2, 21, 90, 64, 64),
          "1/2": (1, 38, 250, 32, 32), "full": (2, 30, 330, 16, 16), "rgb": (1, 30, 130, 16, 3)}
ODD = {"one pixel": (1, 1, 1, 3, 4), "one column": (2, 9, 1, 1, 1), "one row": (1, 1, 37, 5, 18),
       "few": (2, 5, 7, 8, 6), "17 to 33": (1, 33, 70, 17, 33), "20 to 40": (1, 7, 200, 20, 40),
       "160 to 80": (1, 9, 9, 160, 80)}
SIZES = pytest.mark.parametrize("size", (LAYERS | ODD).values(), ids=(LAYERS | ODD).keys())
conv = torch.ops.flashvsr.conv3x3_cpu
enlarge = torch.ops.flashvsr.upsample_conv_cpu


@pytest.fixture(params=ISAS)
def isa(request):
    """Skips where the processor has not these instructions; "generic" runs everywhere."""
    try:
        conv(*make(1, 1, 1, 1, 1)[:2], None, None, None, False, ISAS[request.param])
    except RuntimeError as error:
        if request.param == "generic" or "runs on this processor" not in str(error):
            raise
        pytest.skip(f"no {request.param} build here")
    return ISAS[request.param]


def make(N, H, W, C, O, past=False, tail=False, dtype=torch.float32):
    """x, weight, bias, past, residual, relu; the sums are of size one."""
    def random(*shape):
        return torch.randn(*shape).to(dtype)
    weight = torch.randn(O, 2 * C if past else C, 3, 3) / (18 * C if past else 9 * C) ** 0.5
    return (random(N, H, W, C), weight.to(dtype).contiguous(memory_format=torch.channels_last),
            random(O) if tail else None, random(N, H, W, C) if past else None,
            random(N, H, W, O) if tail else None, tail)


def make_folded(N, H, W, C, O, T, dtype=torch.float32):
    weight, grow = torch.randn(O, C, 3, 3) / (9 * C) ** 0.5, torch.randn(T * C, C) / C ** 0.5
    return torch.randn(N, H, W, C).to(dtype), fold_upsample(weight, grow).to(dtype)


def double(call):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in call]


def check_call(op, plain, call, isa):
    """By the error rule, and the relative error is that of float32."""
    out, exact = op(*call, isa), plain(*double(call))
    assert out.dtype == call[0].dtype and out.is_contiguous()
    check(out, plain(*call), exact)
    if out.dtype == torch.float32:
        assert (out - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("tail", [False, True], ids=["bare", "bias+residual+relu"])
@DTYPES
@SIZES
def test_conv3x3(size, dtype, tail, past, isa):
    check_call(conv, reference.conv3x3, make(*size, past, tail, dtype), isa)


@pytest.mark.parametrize("T", [1, 2], ids=lambda T: f"T={T}")
@DTYPES
@SIZES
def test_upsample_conv(size, dtype, T, isa):
    check_call(enlarge, reference.upsample_conv, (*make_folded(*size, T, dtype), T == 2), isa)


@pytest.mark.parametrize("kind", ["bias", "residual", "relu"])
def test_each_option_alone(kind):
    x, weight, bias, _, residual, _ = make(1, 9, 11, 20, 12, tail=True)
    call = (x, weight, bias if kind == "bias" else None, None, residual if kind == "residual" else None,
            kind == "relu")
    check_call(conv, reference.conv3x3, call, 0)


def in_nan(x):
    """x at an odd place in memory that is otherwise NaN."""
    if not isinstance(x, torch.Tensor):
        return x
    memory = torch.full((x.numel() + 997,), NAN, dtype=x.dtype)
    there = memory[499:499 + x.numel()].as_strided(x.shape, x.stride())
    return there.copy_(x)


@DTYPES
def test_only_the_tensors_are_read(isa, dtype):
    for size in (1, 11, 19, 20, 19), (2, 4, 30, 16, 16), (1, 1, 1, 5, 3):
        call = make(*size, past=True, tail=True, dtype=dtype)
        out = conv(*call, isa)
        assert out.isfinite().all() and torch.equal(conv(*map(in_nan, call), isa), out)
        call = make_folded(*size, 2, dtype)
        out = enlarge(*call, False, isa)
        assert out.isfinite().all() and torch.equal(enlarge(*map(in_nan, call), False, isa), out)


def test_only_the_result_is_written(isa):
    """Rows and channels beyond the result would be its neighbours: other pictures, other time steps."""
    x, weight, *rest = make(3, 7, 13, 20, 19, past=True, tail=True)
    out = conv(x, weight, *rest, isa)
    bias, past, residual, relu = rest
    for n in range(3):
        alone = conv(x[n:n + 1], weight, bias, past[n:n + 1], residual[n:n + 1], relu, isa)
        assert torch.equal(alone[0], out[n])
    x, folded = make_folded(3, 7, 13, 20, 19, 2)
    steps = [enlarge(x[n:n + 1], folded[t:t + 1], False, isa) for n in range(3) for t in range(2)]
    torch.testing.assert_close(enlarge(x, folded, False, isa), torch.cat(steps), atol=1e-5, rtol=0)


def test_nan_that_is_read_shows(isa):
    for relu in (False, True):
        x, weight, *_ = make(1, 20, 20, 16, 16)
        x[0, 9, 9, 3] = NAN
        out = conv(x, weight, None, None, None, relu, isa)
        assert out[0, 8:11, 8:11].isnan().all() and out[0, :4].isfinite().all()


@DTYPES
def test_same_bits_for_any_number_of_threads(isa, dtype):
    calls = [partial(conv, *make(*size, True, True, dtype), isa) for size in LAYERS.values()]
    calls += [partial(enlarge, *make_folded(*size, 2, dtype), True, isa) for size in LAYERS.values()]
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append([call() for call in calls])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_large_results():
    """From 32 MiB on they are written past the caches."""
    x, weight, *rest = make(1, 390, 705, 3, 32, tail=True)
    out = conv(x, weight, *rest)
    check(out, reference.conv3x3(x, weight, *rest), reference.conv3x3(*double((x, weight, *rest))))
    x, folded = make_folded(2, 90, 705, 5, 32, 1)
    out = enlarge(x, folded, False)
    assert torch.equal(out, torch.cat([enlarge(x[n:n + 1], folded, False) for n in range(2)]))


def test_no_pixels():
    for shape in (0, 4, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8):
        x, weight = torch.zeros(shape), torch.zeros(5, 8, 3, 3).contiguous(memory_format=torch.channels_last)
        assert conv(x, weight, None, None, None, False).shape == (*shape[:3], 5)
        N, H, W, _ = shape
        assert enlarge(x, torch.zeros(3, 2, 2, 5, 2, 2, 8), False).shape == (3 * N, 2 * H, 2 * W, 5)


def test_decoder_on_real_weights():
    """Frames of the shipped decoder: at most twice plain PyTorch's error, without any slack."""
    model = load_upscaler("compact").decoder
    latent = torch.randn(1, model.in_weight.shape[1] - 3 * 4 * 64, 6, 7)
    cond = torch.rand(1, 4, 48, 56, 3).mul_(2).sub_(1)
    memory = [[torch.zeros(1, 6 << i, 7 << i, stage.memory[0].bias1.shape[0]) for _ in range(3)]
              for i, stage in enumerate(model.stages)]

    def frames(to=lambda x: x):
        start = [[to(x) for x in stage] for stage in memory]
        return torch.cat([frame.double() for frame, _ in model(to(latent), to(cond), start)])
    ours = frames()
    with references():
        plain = frames()
        model.double()
        exact = frames(torch.Tensor.double)
    assert not torch.equal(ours, plain)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_public_ops_run_it():
    x, weight, bias, past, residual, relu = make(2, 9, 10, 20, 12, past=True, tail=True)
    options = dict(past=past, residual=residual, relu=relu)
    wanted = conv(x, weight, bias, past, residual, relu)
    assert torch.equal(conv3x3(x, weight, bias, **options, backend="cpu"), wanted)
    assert torch.equal(conv3x3(x, weight, bias, **options), wanted)
    with pytest.raises(NotImplementedError, match="cpu: weights must be torch.channels_last"):
        conv3x3(x, weight.contiguous(), bias, **options, backend="cpu")
    x, folded = make_folded(2, 9, 10, 20, 12, 2)
    assert torch.equal(upsample_conv(x, folded), enlarge(x, folded, False))
    assert torch.equal(upsample_conv(x, folded, relu=True), enlarge(x, folded, True))
    with pytest.raises(NotImplementedError, match="cpu: has no torch.float64"):
        upsample_conv(x.double(), folded.double(), backend="cpu")


def test_gradients():
    """Forward in C++, backward in PyTorch."""
    call = make(2, 9, 10, 20, 12, past=True, tail=True)[:5]
    leaves = [x.requires_grad_() for x in call]
    x, folded = (x.requires_grad_() for x in make_folded(2, 9, 10, 20, 12, 2))
    results = []
    for backend in "cpu", "reference":
        out = torch.ops.flashvsr.conv3x3(*leaves, False, backend)
        enlarged = upsample_conv(x, folded, backend=backend)
        grads = torch.sin(torch.arange(out.numel())).view_as(out), torch.ones_like(enlarged)
        results.append(torch.autograd.grad((out, enlarged), (*leaves, x, folded), grads))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_public_operators_are_registered_right(training):
    call = [x.requires_grad_(training) for x in make(2, 6, 5, 8, 16, past=True, tail=True)[:5]]
    torch.library.opcheck(torch.ops.flashvsr.conv3x3.default, (*call, True, "cpu"))
    call = [x.requires_grad_(training) for x in make_folded(2, 6, 5, 8, 16, 2)]
    torch.library.opcheck(torch.ops.flashvsr.upsample_conv.default, (*call, True, "cpu"))


X, W = torch.zeros(1, 4, 4, 8), torch.zeros(5, 8, 3, 3).contiguous(memory_format=torch.channels_last)
W2 = torch.zeros(5, 16, 3, 3).contiguous(memory_format=torch.channels_last)
FOLDED = torch.zeros(1, 2, 2, 5, 2, 2, 8)
BAD = {
    "rank": ((X[0], W, None, None, None), "x must be \\(N, H, W, C\\), got 3 dimensions"),
    "strided x": ((X.mT, W[:, :4], None, None, None), "x must be contiguous"),
    "no channels": ((X[..., :0], W[:, :0], None, None, None), "x must have channels"),
    "no outputs": ((X, W[:0], None, None, None), "there must be output channels"),
    "kernel": ((X, W[..., :2], None, None, None), "weight must be \\(O, 8, 3, 3\\)"),
    "weight of past": ((X, W, None, X, None), "weight must be \\(O, 16, 3, 3\\)"),
    "weight dtype": ((X, W.double(), None, None, None), "weight must have x's dtype"),
    "weight layout": ((X, W.contiguous(), None, None, None), "weight must lie in memory as channels_last"),
    "bias": ((X, W, X[0, 0, 0], None, None), "bias must be \\(5,\\)"),
    "past": ((X, W2, None, X[:, :2], None), "past must be like x"),
    "past's layout": ((X, W2, None, X.transpose(1, 2), None), "past must be contiguous"),
    "residual": ((X, W, None, None, X), "residual must be \\(N, H, W, 5\\)"),
    "float16": ((X.half(), W.half(), None, None, None), "no build for x's dtype"),
}
BAD_FOLDED = {
    "rank": (W, "folded must be \\(T, 2, 2, O, 2, 2, 8\\)"),
    "channels": (FOLDED[..., :7], "folded must be \\(T, 2, 2, O, 2, 2, 8\\)"),
    "phases": (FOLDED[:, :1], "folded must be \\(T, 2, 2, O, 2, 2, 8\\)"),
    "steps": (FOLDED[:0], "folded must have time steps"),
    "dtype": (FOLDED.bfloat16(), "folded must have x's dtype"),
    "layout": (FOLDED.transpose(1, 2).contiguous().transpose(1, 2), "folded must be contiguous"),
}


@pytest.mark.parametrize("call, words", BAD.values(), ids=BAD.keys())
def test_errors(call, words):
    with pytest.raises(RuntimeError, match=words):
        conv(*call, False)


@pytest.mark.parametrize("folded, words", BAD_FOLDED.values(), ids=BAD_FOLDED.keys())
def test_errors_of_upsample_conv(folded, words):
    with pytest.raises(RuntimeError, match=words):
        enlarge(X, folded, False)


def test_faster_than_pytorch():
    """Even on a busy machine; measured alone it is about 2.3x."""
    call, ratios = make(1, 96, 176, 64, 64, tail=True), []
    for _ in range(7):
        start = time.perf_counter()
        reference.conv3x3(*call)
        middle = time.perf_counter()
        conv(*call)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    assert statistics.median(ratios) > 1.2
