"""Norms and gated adds against their formulas, in float64 and at lower precision."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flashvsr_kernels import backends, gated_add, gated_add_norm, layer_norm_modulate, reference, rms_norm

X, Y = torch.randn(2, 5, 96, dtype=torch.float64) * 3 + 1, torch.randn(2, 5, 96, dtype=torch.float64)
A, B = torch.randn(96, dtype=torch.float64), torch.randn(96, dtype=torch.float64)
CALLS = {"rms_norm": (X, A, 1e-6), "layer_norm_modulate": (X, A, B, 1e-6), "gated_add": (X, Y, A),
         "gated_add without gate": (X, Y, None), "gated_add_norm": (X, Y, A, B, B, 1e-6),
         "gated_add_norm without gate": (X, Y, None, A, B, 1e-6)}
with_calls = pytest.mark.parametrize("op, call", CALLS.items(), ids=CALLS)


def test_rms_norm():
    torch.testing.assert_close(rms_norm(X, A), X / (X.square().mean(-1, keepdim=True) + 1e-6).sqrt() * A)


def test_layer_norm_modulate():
    mean, var = X.mean(-1, keepdim=True), X.var(-1, correction=0, keepdim=True)
    torch.testing.assert_close(layer_norm_modulate(X, A, B), (X - mean) / (var + 1e-6).sqrt() * (1 + A) + B)


@pytest.mark.parametrize("norm", [lambda x: rms_norm(x, A.to(x)),
                                  lambda x: layer_norm_modulate(x, A.to(x), B.to(x))],
                         ids=["rms", "layer"])
def test_epsilon_is_1e_6(norm):
    """With a signal of the epsilon's size the norm halves it: neither 1e-5 nor 1e-8 would."""
    x = torch.tensor([1e-3, -1e-3] * 48, dtype=torch.float64)
    ones = torch.ones(96, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, ones).abs(), ones * 0.5 ** 0.5)
    torch.testing.assert_close(layer_norm_modulate(x, 0 * ones, 0 * ones).abs(), ones * 0.5 ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_rounded_once(dtype):
    x, a, b = X.to(dtype), A.to(dtype), B.to(dtype)
    exact = layer_norm_modulate(x.double(), a.double(), b.double())
    assert ((layer_norm_modulate(x, a, b).double() - exact).abs()
            <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_gated_add():
    torch.testing.assert_close(gated_add(X, Y), X + Y)
    torch.testing.assert_close(gated_add(X, Y, A), X + Y * A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("gate", [A, None], ids=["gate", "no gate"])
def test_gated_add_norm_is_both(gate, dtype):
    x, y, scale, shift = (t.to(dtype) for t in (X, Y, A, B))
    gate = None if gate is None else gate.to(dtype)
    total, normed = gated_add_norm(x, y, gate, scale, shift)
    assert torch.equal(total, gated_add(x, y, gate))
    assert torch.equal(normed, layer_norm_modulate(total, scale, shift))


def test_any_layout():
    """Values, and contiguous results."""
    x, y = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (X, Y))
    assert not x.is_contiguous()
    for result, wanted in zip((rms_norm(x, A), *gated_add_norm(x, y, A, A, B)),
                              (rms_norm(X, A), *gated_add_norm(X, Y, A, A, B))):
        assert result.is_contiguous()
        torch.testing.assert_close(result, wanted)


def leaves_of(call):
    call = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in call]
    return call, [x for x in call if isinstance(x, torch.Tensor)]


@with_calls
def test_gradients_are_those_of_the_formula(op, call):
    name, results = op.split()[0], []
    for run in (lambda *call: getattr(torch.ops.flashvsr, name)(*call, None)), getattr(reference, name):
        torch.manual_seed(0)
        inputs, leaves = leaves_of(call)
        out = run(*inputs)
        loss = sum((y * torch.randn(y.shape)).sum() for y in (out if isinstance(out, tuple) else (out,)))
        results.append(torch.autograd.grad(loss, leaves))
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted)


def test_gradient_of_one_result():
    (x, *rest), leaves = leaves_of(CALLS["gated_add_norm"])
    total, _ = torch.ops.flashvsr.gated_add_norm(x, *rest, None)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), leaves[:2]),
                               (torch.ones_like(X), A.expand(X.shape)))


@with_calls
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_operators_are_registered_right(op, call, training):
    call = leaves_of(call)[0] if training else call
    torch.library.opcheck(getattr(torch.ops.flashvsr, op.split()[0]).default, (*call, None))


def block(x, y, a, b):
    total, normed = gated_add_norm(x * 2, y, a, a, b)
    return gated_add(total, rms_norm(layer_norm_modulate(normed.sin(), a, b), a))


def test_compiles_to_one_graph():
    results = []
    for run in torch.compile(block, fullgraph=True), block:
        inputs, leaves = leaves_of((X, Y, A, B))
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_compiles_once_for_all_lengths():
    counter, counts = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for L in 5, 7, 30:
        x, y = (torch.randn(2, L, 96, dtype=torch.float64) for _ in range(2))
        torch.testing.assert_close(compiled(x, y, A, B), block(x, y, A, B))
        counts.add(counter.frame_count)
    assert len(counts) == 1  # PyTorch itself may compile the first call twice, because of eps


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm_modulate", "gated_add", "gated_add_norm"])
def test_backends_give_one_line(op):
    assert set(backends()[op]) == {"triton", "reference"}
    assert all(reason is None or reason and "\n" not in reason for reason in backends()[op].values())
    with pytest.raises(ValueError, match=f"backend of {op} must be one of"):
        getattr(torch.ops.flashvsr, op)(*CALLS[op], "cuda")


@pytest.mark.parametrize("call, message", [
    (lambda: rms_norm(X, A[:5]), r"weight must be \(96,\) for x \(2, 5, 96\), got \(5,\)"),
    (lambda: layer_norm_modulate(X, A, B[:5]), r"shift must be \(96,\)"),
    (lambda: gated_add(X, Y[:1]), r"y must have x's shape \(2, 5, 96\), got \(1, 5, 96\)"),
    (lambda: gated_add(X, Y, A[:5]), r"gate must be \(96,\)"),
    (lambda: gated_add_norm(X, Y, None, A, B[:5]), r"shift must be \(96,\)"),
    (lambda: gated_add(X, Y.float()), "y must be torch.float64 on cpu as x, got torch.float32 on cpu"),
    (lambda: rms_norm(X, A.float()), "weight must be torch.float64 on cpu as x, got torch.float32 on cpu"),
    (lambda: rms_norm(X.int(), A), r"x must be \(..., C\) with a floating dtype, got \(2, 5, 96\) torch.int32"),
], ids=["weight", "shift", "shape", "gate", "shift of the sum", "dtype of y", "dtype", "integers"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
