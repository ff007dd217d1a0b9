"""Norms and gated adds against their formulas, in float64 and at lower precision."""
import pytest
import torch

from flashvsr_kernels import gated_add, layer_norm_modulate, rms_norm

X, Y = torch.randn(2, 5, 96, dtype=torch.float64) * 3 + 1, torch.randn(2, 5, 96, dtype=torch.float64)
A, B = torch.randn(96, dtype=torch.float64), torch.randn(96, dtype=torch.float64)


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


@pytest.mark.parametrize("call, message", [
    (lambda: rms_norm(X, A[:5]), r"weight must be \(96,\) for x \(2, 5, 96\), got \(5,\)"),
    (lambda: layer_norm_modulate(X, A, B[:5]), r"shift must be \(96,\)"),
    (lambda: gated_add(X, Y[:1]), r"y must have x's shape \(2, 5, 96\), got \(1, 5, 96\)"),
    (lambda: gated_add(X, Y, A[:5]), r"gate must be \(96,\)"),
], ids=["weight", "shift", "shape", "gate"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
