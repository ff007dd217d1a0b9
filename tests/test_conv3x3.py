"""The decoder's convolutions against loops over their definitions, and as PyTorch operators. Kernels have
tests of their own.
"""
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from flashvsr_kernels import backends, conv3x3, fold_upsample, upsample_conv
from tests.error_rule import check

X, W = torch.zeros(1, 4, 4, 8), torch.zeros(5, 8, 3, 3)
FOLDED = torch.zeros(1, 2, 2, 5, 2, 2, 8)
TABLES = sys.modules["flashvsr_kernels.backends"]._tables  # the package's attribute of that name is a function


def by_definition(x, weight, bias=None, past=None, residual=None, upsample=1, relu=False):
    if past is not None:
        x = torch.cat([x, past], -1)
    x = x.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    N, H, W, C = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    y = sum(padded[:, dy:dy + H, dx:dx + W] @ weight[:, :, dy, dx].T for dy in range(3) for dx in range(3))
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return y.clamp(min=0) if relu else y


def grown(x, grow):
    """x (N, H, W, C) and grow (T * C, C) -> (N * T, H, W, C)"""
    return torch.stack([x @ step.T for step in grow.split(x.shape[3])], 1).flatten(0, 1)


SIZES = pytest.mark.parametrize("N, H, W, C, O", [(2, 5, 7, 8, 6), (1, 1, 1, 3, 4), (1, 16, 4, 16, 3),
                                                  (2, 3, 1, 1, 1)])


def inputs(N, H, W, C, O, past=True, tail=True, upsample=1, dtype=torch.float64, device="cpu"):
    """x, weight, as kernels want it in memory, and options of a call."""
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)
    options = dict(past=random(N, H, W, C) if past else None, upsample=upsample)
    if tail:
        options |= dict(bias=random(O), relu=True, residual=random(N, upsample * H, upsample * W, O))
    weight = random(O, 2 * C if past else C, 3, 3).contiguous(memory_format=torch.channels_last)
    return random(N, H, W, C), weight, options


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("tail", [False, True], ids=["bare", "bias+residual+relu"])
@SIZES
def test_definition(N, H, W, C, O, tail, past, upsample):
    x, weight, options = inputs(N, H, W, C, O, past, tail, upsample)
    before = x.clone()
    out = conv3x3(x, weight, **options)
    torch.testing.assert_close(out, by_definition(x, weight, **options))
    assert torch.equal(x, before) and out.is_contiguous()


@pytest.mark.parametrize("T", [None, 1, 2, 3], ids=lambda T: f"T={T}")
@SIZES
def test_folding(N, H, W, C, O, T):
    x, weight, _ = inputs(N, H, W, C, O, past=False)
    grow = None if T is None else torch.randn(T * C, C, dtype=x.dtype)
    folded = fold_upsample(weight, grow)
    assert folded.shape == (T or 1, 2, 2, O, 2, 2, C) and folded.is_contiguous()
    out = upsample_conv(x, folded)
    torch.testing.assert_close(out, by_definition(x if T is None else grown(x, grow), weight, upsample=2))
    assert out.is_contiguous()


def test_folded_taps():
    """upsample_conv as its docstring has it."""
    x, folded = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4, 5), (2, 2, 2, 6, 2, 2, 5)))
    padded, expected = F.pad(x, (0, 0, 1, 1, 1, 1)), torch.zeros(4, 6, 8, 6, dtype=torch.float64)
    for n, t, py, px, ty, tx in torch.cartesian_prod(*[torch.arange(2)] * 6).tolist():
        window = padded[n, ty + py:ty + py + 3, tx + px:tx + px + 4]
        expected[n * 2 + t, py::2, px::2] += window @ folded[t, py, px, :, ty, tx].T
    torch.testing.assert_close(upsample_conv(x, folded), expected)
    torch.testing.assert_close(upsample_conv(x, folded, relu=True), expected.relu())


@pytest.mark.parametrize("T", [None, 2], ids=["enlarged", "grown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_folding_keeps_the_rule(dtype, T):
    """The folded weights round once more: still within twice the plain order's error."""
    x, weight = torch.randn(1, 12, 12, 32, dtype=dtype), torch.randn(16, 32, 3, 3, dtype=dtype) / 17
    grow = None if T is None else torch.randn(32 * T, 32, dtype=dtype) / 6

    def plain(x, weight, grow):
        x = x if grow is None else grown(x, grow)
        large = x.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.conv2d(large, weight, padding=1).permute(0, 2, 3, 1)
    exact = plain(*(None if y is None else y.double() for y in (x, weight, grow)))
    folded = fold_upsample(weight, grow)
    assert folded.dtype == dtype
    errors = [y.double() - exact for y in (upsample_conv(x, folded), plain(x, weight, grow))]
    assert errors[0].abs().max() <= 2 * errors[1].abs().max() + 1e-5
    assert errors[0].square().mean().sqrt() <= 2 * errors[1].square().mean().sqrt() + 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_enlarged_in_16_bits(device):
    """Each part behind the convolution rounds, as PyTorch's operators do."""
    x, weight, options = inputs(2, 9, 7, 64, 64, upsample=2, device=device, dtype=torch.bfloat16)
    weight /= 34

    def plain(x, weight, bias, past, residual, upsample, relu):
        x = torch.cat([x, past], -1).permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1) + residual).relu()
    exact = plain(x.double(), weight.double(), **{key: value.double() if torch.is_tensor(value) else value
                                                  for key, value in options.items()})
    check(conv3x3(x, weight, **options), plain(x, weight, **options), exact)


@pytest.mark.parametrize("device, dtype, steps", [
    ("cpu", torch.float32, 64), pytest.param("cuda", torch.bfloat16, 2, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def test_past_may_be_kept_as_its_half_of_the_sum(device, dtype, steps):
    """conv(cat(x, past)) is conv(x) + conv(past), but for some rounding steps: in float32 the sum's too."""
    x, weight, options = inputs(2, 9, 7, 64, 64, tail=False, device=device, dtype=dtype)
    now, before = (half.contiguous(memory_format=torch.channels_last) for half in weight.chunk(2, 1))
    half = conv3x3(options["past"], before)
    whole = conv3x3(x, weight, past=options["past"], relu=True)
    error = (conv3x3(x, now, residual=half, relu=True).double() - whole.double()).abs().max()
    assert error <= steps * torch.finfo(dtype).eps * max(half.abs().max(), whole.abs().max())


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("tail", [False, True], ids=["bare", "bias+residual+relu"])
def test_gradients(tail, past, upsample):
    x, weight, options = inputs(2, 3, 4, 3, 2, past, tail, upsample)
    names = [name for name in ("bias", "past", "residual") if options.get(name) is not None]
    leaves = [leaf.requires_grad_() for leaf in (x, weight, *(options[name] for name in names))]
    torch.autograd.gradcheck(lambda x, w, *rest: conv3x3(x, w, **options | dict(zip(names, rest))), leaves)


@pytest.mark.parametrize("T", [None, 2], ids=["enlarged", "grown"])
def test_gradients_of_folding(T):
    shapes = [(2, 2, 3, 3), (2, 3, 3, 3)] + ([] if T is None else [(3 * T, 3)])
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for relu in (False, True):
        torch.autograd.gradcheck(lambda x, *weights: upsample_conv(x, fold_upsample(*weights), relu=relu), leaves)


def test_only_wanted_gradients():
    x, weight, options = inputs(1, 4, 4, 3, 2)
    for leaf in (x, weight, *(options[name] for name in ("bias", "past", "residual"))):
        leaf.requires_grad_()
        gradient, = torch.autograd.grad(conv3x3(x, weight, **options).sum(), leaf)
        assert gradient.shape == leaf.shape
        leaf.requires_grad_(False)


def test_outputs_may_be_changed_in_place():
    """The output of an operator with gradients must not be a view."""
    x, weight, options = inputs(1, 4, 4, 3, 3)
    x.requires_grad_()
    for make in (lambda: conv3x3(x, weight, **options | dict(relu=False)),
                 lambda: upsample_conv(x, fold_upsample(weight[:, :3]))):
        results = [torch.autograd.grad(relu(make().flatten(0, 1)).sum(), x)[0]
                   for relu in (torch.relu_, torch.relu)]
        assert torch.equal(*results)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_results_in_memory_that_is_given(upsample, backend):
    x, weight, options = inputs(2, 6, 5, 8, 16, upsample=upsample, dtype=torch.float32)
    for make in (lambda out: conv3x3(x, weight, **options, out=out, backend=backend),
                 lambda out: upsample_conv(x, fold_upsample(weight[:, :8]), relu=True, out=out, backend=backend)):
        wanted = make(None)
        out = torch.empty_like(wanted)
        assert make(out) is out and torch.equal(out, wanted)


@pytest.mark.parametrize("op", ["conv3x3", "upsample_conv"])
def test_backends_are_asked_about_the_memory_for_results_too(monkeypatch, op):
    asked = []
    last = TABLES[op][-1]
    monkeypatch.setitem(TABLES, op, (replace(last, supports=lambda *facts: asked.append(facts)),))
    call = (conv3x3, W) if op == "conv3x3" else (upsample_conv, FOLDED)
    out = call[0](X, call[1])
    call[0](X, call[1], out=out)
    assert asked[-1][-1] is not None and asked[-1][-1].data_ptr() == out.data_ptr() and len(asked) == 2


def test_wrong_memory_for_results_is_named():
    x, weight, _ = inputs(1, 4, 4, 8, 8)
    for out, message in ((torch.empty(1, 4, 4, 8), r"out must be \(1, 4, 4, 8\) torch.float64"),
                         (x.new_empty(1, 4, 8, 8)[:, :, ::2], "contiguous, got"), (x, "must share no memory")):
        with pytest.raises(ValueError, match=message):
            conv3x3(x, weight[:, :8], out=out)
    with pytest.raises(ValueError, match="where gradients are recorded"):
        upsample_conv(x, fold_upsample(weight[:, :8]).requires_grad_(), out=x.new_empty(1, 8, 8, 8))


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("hopper", "triton", "cuda"))])
def placed(request):
    """A backend, and a device and a dtype that it takes."""
    if (reason := backends()["conv3x3"][request.param]) is not None:
        pytest.skip(reason)
    on_gpu = request.param != "cpu"
    return request.param, {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16 if on_gpu else torch.float32}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_operators_are_registered_right(placed, training):
    backend, place = placed
    for past, tail in (True, True), (False, False):
        x, weight, options = inputs(2, 6, 5, 8, 64, past, tail, **place)
        x, weight = (y.requires_grad_(training) for y in (x, weight))
        call = (x, weight, options.get("bias"), options["past"], options.get("residual"), tail, backend)
        torch.library.opcheck(torch.ops.flashvsr.conv3x3.default, call)
    x, weight, _ = inputs(2, 4, 5, 8, 64, past=False, **place)
    folded = torch.randn(2, 2, 2, 64, 2, 2, 8, **place, requires_grad=training)
    torch.library.opcheck(torch.ops.flashvsr.upsample_conv.default, (x.requires_grad_(training), folded, True, backend))
    if not training:
        torch.library.opcheck(torch.ops.flashvsr.upsample_conv_into.default,
                              (x, folded, True, x.new_empty(4, 8, 10, 64), backend))
        torch.library.opcheck(torch.ops.flashvsr.conv3x3_into.default,
                              (x, weight, None, None, None, False, x.new_empty(2, 4, 5, 64), backend))


def block(x, weight, options, grow, backend=None):
    y = conv3x3(x * 2, weight, **options, backend=backend).sin()
    return upsample_conv(y, fold_upsample(weight[:, :y.shape[3]], grow), backend=backend).sin()


def test_compiles_to_one_graph(placed):
    backend, place = placed
    x, weight, options = inputs(2, 6, 5, 64, 64, **place)
    grow, weight = torch.randn(128, 64, **place) / 23, weight / 34  # or else bf16 cannot tell the angles of sin
    leaves = [leaf.requires_grad_() for leaf in (x, weight, grow, options["past"], options["residual"])]
    results, grad = [], torch.randn(4, 12, 10, 64, **place)
    for run in torch.compile(block, fullgraph=True), block:
        out = run(x, weight, options, grow, backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    tolerance = 2e-2 if place["dtype"] == torch.bfloat16 else 1e-5
    for compiled, plain in zip(*results):  # as a whole: single elements may be differences of large ones
        assert (compiled - plain).float().norm() <= tolerance * plain.float().norm()


def test_compiles_once_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for N, H, W in (2, 6, 5), (3, 7, 9), (4, 10, 8):
        x, weight, options = inputs(N, H, W, 11, 11)
        call = x, weight, options, torch.randn(22, 11, dtype=x.dtype)
        torch.testing.assert_close(compiled(*call), block(*call))
    assert counter.frame_count == 1




@pytest.mark.parametrize("args, options, message", [
    ((X[0], W), {}, r"x must be \(N, H, W, C\)"),
    ((X, W[:, :, :2]), {}, r"weight \(O, C, 3, 3\)"),
    ((X, W[:0]), {}, r"at least one channel in and one out, got \(0, 8, 3, 3\)"),
    ((X, W), dict(past=X), "weight must take 16 channels .* with past"),
    ((X, W), dict(past=X[:, :2]), "past must have x's shape"),
    ((X, W), dict(upsample=3), "upsample must be 1 or 2, got 3"),
    ((X, W), dict(residual=X), r"residual must be \(1, 4, 4, 5\), got \(1, 4, 4, 8\)"),
    ((X, W, W[0, 0, 0]), {}, r"bias must be \(5,\) .* got \(3,\)"),
    ((X, W.double()), {}, "weight must be torch.float32 on cpu like x, got torch.float64 on cpu"),
    ((X.int(), W), {}, "x must have a floating dtype, got torch.int32"),
], ids=["rank", "kernel", "no channels", "channels", "past", "upsample", "residual", "bias", "dtype", "integers"])
def test_bad_arguments_are_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(*args, **options)


@pytest.mark.parametrize("call, message", [
    (lambda: fold_upsample(W[0]), r"weight must be \(O, C, 3, 3\), got \(8, 3, 3\)"),
    (lambda: fold_upsample(W, X[0, 0]), r"grow must be \(T \* 8, 8\) for weight .* got \(4, 8\)"),
    (lambda: upsample_conv(X, W), r"folded \(T, 2, 2, O, 2, 2, C\), got .* \(5, 8, 3, 3\)"),
    (lambda: upsample_conv(X[..., :3], FOLDED), r"folded \(T, 2, 2, O, 2, 2, C\), got \(1, 4, 4, 3\)"),
    (lambda: upsample_conv(X, FOLDED[:0]), "at least one step"),
    (lambda: upsample_conv(X, FOLDED.half()), "folded must be torch.float32 on cpu like x"),
], ids=["kernel", "grow", "rank", "channels", "no step", "dtype"])
def test_bad_arguments_of_folding_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("op", ["conv3x3", "upsample_conv"])
def test_backends_give_one_line(op):
    assert list(backends()[op]) == ["hopper", "triton", "cuda", "cpu", "reference"]
    assert all(reason is None or reason and "\n" not in reason for reason in backends()[op].values())
    with pytest.raises(ValueError, match=f"backend of {op} must be one of"):
        conv3x3(X, W, backend="cudnn") if op == "conv3x3" else upsample_conv(X, FOLDED, backend="cudnn")


@pytest.mark.parametrize("backend", ["hopper", "triton", "cuda"])
def test_what_a_backend_cannot_run_has_its_reason(backend):
    for call in (lambda: conv3x3(X, W, backend=backend), lambda: upsample_conv(X, FOLDED, backend=backend)):
        with pytest.raises(NotImplementedError, match=f"cannot run this call\n  {backend}: .*\n"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton", "cuda"])
def test_every_backend_reaches_its_kernel(backend):
    """Weights in another memory format are refused, not copied in silence."""
    if (reason := backends()["conv3x3"][backend]) is not None:
        pytest.skip(reason)
    x, weight, options = inputs(2, 12, 20, 64, 64, dtype=torch.bfloat16, device="cuda")
    weight, folded = weight / 34, fold_upsample(weight[:, :64] / 34)
    with pytest.raises(NotImplementedError, match="weights must be torch.channels_last"):
        conv3x3(x, weight.contiguous(), **options, backend=backend)
    results = [(conv3x3(x, weight, **options, out=torch.empty_like(x), backend=name),
                upsample_conv(x, folded, out=x.new_empty(2, 24, 40, 64), backend=name))
               for name in (backend, "reference")]
    torch.testing.assert_close(*results, atol=3e-2, rtol=2e-2)
