"""The projector's convolution against loops over its definition, and as a PyTorch op."""
import pytest
import torch
import torch.nn.functional as F

from flashvsr_kernels import backends, causal_conv3d
from flashvsr_kernels.conv3d import fold_repeat
from tests.error_rule import check


ON_GPU = "triton", "hopper", "cuda"


def make(B=1, T=4, H=3, W=5, C=6, O=7, dtype=torch.float64, taps=4):
    x, tail = (torch.randn(B, t, H, W, C, dtype=dtype) for t in (T, 2))
    weight, bias = torch.randn(O, C, taps, 3, 3, dtype=dtype) / (C * taps) ** 0.5, torch.randn(O, dtype=dtype)
    return x, weight, bias, tail if taps == 4 else None


def defined(x, weight, bias, tail):
    """Sum over taps of clamped pixels times weights."""
    B, T, H, W, _ = x.shape
    whole = x if tail is None else torch.cat([tail, x], 1)
    out = torch.zeros(B, T // 2, H, W, len(bias), dtype=x.dtype) + bias
    rows, cols = torch.arange(H), torch.arange(W)
    for t in range(T // 2):
        for dt in range(weight.shape[2]):
            for dy in range(3):
                for dx in range(3):
                    picture = whole[:, 2 * t + dt][:, (rows + dy - 1).clamp(0, H - 1)][
                        :, :, (cols + dx - 1).clamp(0, W - 1)]
                    out[:, t] += picture @ weight[:, :, dt, dy, dx].T
    return out


@pytest.mark.parametrize("taps", [4, 2], ids=["context", "no context"])
@pytest.mark.parametrize("B, T, H, W", [(1, 4, 3, 5), (2, 2, 1, 1), (1, 6, 8, 2)])
def test_definition(B, T, H, W, taps):
    call = make(B, T, H, W, taps=taps)
    out = causal_conv3d(*call)
    assert out.is_contiguous()
    torch.testing.assert_close(out, defined(*call))


def test_same_as_conv3d_inside():
    x, weight, bias, tail = make(T=6, H=8, W=9)
    whole = torch.cat([tail, x], 1).permute(0, 4, 1, 2, 3)
    wanted = F.conv3d(whole, weight, bias, stride=(2, 1, 1)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(causal_conv3d(x, weight, bias, tail)[:, :, 1:-1, 1:-1], wanted)


def test_norm():
    call, gamma = make(O=48), torch.rand(48, dtype=torch.float64) + 0.5
    y = defined(*call)
    official = F.normalize(y, dim=-1, eps=1e-12) * 48 ** 0.5 * gamma
    torch.testing.assert_close(causal_conv3d(*call, gamma=gamma), F.silu(official))
    zero = causal_conv3d(call[0], 0 * call[1], 0 * call[2], call[3], gamma=gamma)
    assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_weights_folded_for_a_clip_that_is_its_own_context(dtype):
    """Half the products, and the error of rounding the sums of the weights."""
    x, weight, bias, _ = make(B=2, T=2, H=6, W=6, C=16, O=32)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    folded = fold_repeat(weight)
    assert folded.permute(0, 2, 3, 4, 1).is_contiguous() and folded.dtype == dtype
    exact = causal_conv3d(x.double(), weight.double(), bias.double(), x.double())
    check(causal_conv3d(x, folded, bias, None), causal_conv3d(x, weight, bias, x), exact)
    with pytest.raises(ValueError, match=r"weight must be \(O, C, 4, 3, 3\), got \(32, 16, 3, 3, 3\)"):
        fold_repeat(weight[:, :, :3])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("taps", [4, 2], ids=["context", "no context"])
def test_gradients(taps, norm):
    call = [value if value is None else value.requires_grad_() for value in make(T=2, H=2, W=3, C=2, O=3, taps=taps)]
    gamma = torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_() if norm else None
    assert torch.autograd.gradcheck(lambda *call: causal_conv3d(*call[:4], gamma=call[4]), (*call, gamma))


def test_gradients_of_what_needs_them():
    x, weight, bias, tail = make()
    causal_conv3d(x, weight.requires_grad_(), bias, tail).sum().backward()
    assert weight.grad.isfinite().all() and x.grad is None


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("taps", [4, 2], ids=["context", "no context"])
def test_opcheck(taps, norm):
    call = [value if value is None else value.requires_grad_() for value in make(dtype=torch.float32, taps=taps)]
    gamma = torch.rand(7).requires_grad_() if norm else None
    torch.library.opcheck(torch.ops.flashvsr.causal_conv3d.default, (*call, gamma, None))


def test_compile():
    call = make(dtype=torch.float32)
    compiled = torch.compile(lambda *call: causal_conv3d(*call) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), causal_conv3d(*call) * 2)


X, W, B = torch.zeros(1, 4, 3, 3, 6), torch.zeros(7, 6, 4, 3, 3), torch.zeros(7)


@pytest.mark.parametrize("args, gamma, message", [
    ((X[:, :3], W, B, X[:, :2]), None, r"x must be \(B, T, H, W, C\), not empty, with even T"),
    ((X[:, :0], W, B, X[:, :2]), None, r"x must be \(B, T, H, W, C\), not empty, with even T"),
    ((X, W, B, X[:, :1]), None, r"tail must be \(1, 2, 3, 3, 6\)"),
    ((X, W[:, :5], B, X[:, :2]), None, r"weight must be \(O, 6, 4, 3, 3\) with tail"),
    ((X, W, B, None), None, r"weight must be \(O, 6, 2, 3, 3\) without tail"),
    ((X, W[:0], B[:0], X[:, :2]), None, r"at least one channel out, got \(0, 6, 4, 3, 3\)"),
    ((X, W, B[:5], X[:, :2]), None, r"bias must be \(7,\)"),
    ((X, W, B, X[:, :2]), B[:5], r"gamma must be \(7,\)"),
    ((X, W.double(), B, X[:, :2]), None, r"weight must be torch.float32 on cpu as x, got torch.float64 on cpu"),
    ((X.int(), W.int(), B.int(), None), None, "x must have a floating dtype, got torch.int32"),
], ids=["odd", "empty", "tail", "weight", "taps", "no channels", "bias", "gamma", "dtype", "integers"])
def test_bad_arguments_are_named(args, gamma, message):
    with pytest.raises(ValueError, match=message):
        causal_conv3d(*args, gamma=gamma)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ON_GPU)
def test_opcheck_on_a_gpu(backend, training):
    if (reason := backends()["causal_conv3d"][backend]) is not None:
        pytest.skip(reason)
    call, gamma = make(1, 2, 16, 8, 16, 72, torch.bfloat16), torch.rand(72, dtype=torch.bfloat16)
    x, weight, bias, tail, gamma = (y.cuda().requires_grad_(training) for y in (*call, gamma))
    weight = weight.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_(training)
    torch.library.opcheck(torch.ops.flashvsr.causal_conv3d.default, (x, weight, bias, tail, gamma, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_vectors_that_are_not_contiguous(backend):
    """Kernels refuse them, and the call still gives what it should."""
    if (reason := backends()["causal_conv3d"][backend]) is not None:
        pytest.skip(reason)
    x, weight, bias, tail = (y.cuda() for y in make(1, 2, 16, 8, 16, 72, torch.bfloat16))
    weight, gamma = weight.contiguous(memory_format=torch.channels_last_3d), torch.rand_like(bias)
    apart, expanded = gamma.repeat_interleave(2)[::2], bias[:1].expand(72)
    for call, options in (((x, weight, expanded, tail), {}), ((x, weight, bias, tail), {"gamma": apart})):
        with pytest.raises(NotImplementedError, match=f"{backend}: bias and gamma must be contiguous"):
            causal_conv3d(*call, **options, backend=backend)
        whole = {key: value.contiguous() for key, value in options.items()}
        wanted = causal_conv3d(x, weight, call[2].contiguous(), tail, **whole, backend=backend)
        torch.testing.assert_close(causal_conv3d(*call, **options), wanted, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ON_GPU)
def test_backends_that_cannot_run_say_why(backend):
    with pytest.raises(NotImplementedError, match=f"{backend}: "):
        causal_conv3d(X, W, B, X[:, :2], backend=backend)
