"""The decoder's convolution against loops over its definition."""
import pytest
import torch

from flashvsr_kernels import conv3x3


def by_definition(x, weight, bias=None, past=None, residual=None, upsample=1, relu=False):
    if past is not None:
        x = torch.cat([x, past], -1)
    x = x.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    N, H, W, C = x.shape
    padded = torch.zeros(N, H + 2, W + 2, C, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    y = sum(padded[:, dy:dy + H, dx:dx + W] @ weight[:, :, dy, dx].T for dy in range(3) for dx in range(3))
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return y.clamp(min=0) if relu else y


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("tail", [False, True], ids=["bare", "bias+residual+relu"])
@pytest.mark.parametrize("N, H, W, C, O", [(2, 5, 7, 8, 6), (1, 1, 1, 3, 4), (1, 16, 4, 16, 3)])
def test_definition(N, H, W, C, O, tail, past, upsample):
    x = torch.randn(N, H, W, C, dtype=torch.float64)
    weight = torch.randn(O, 2 * C if past else C, 3, 3, dtype=torch.float64)
    options = dict(past=torch.randn_like(x) if past else None, upsample=upsample)
    if tail:
        options |= dict(bias=torch.randn(O, dtype=torch.float64), relu=True,
                        residual=torch.randn(N, upsample * H, upsample * W, O, dtype=torch.float64))
    before = x.clone()
    torch.testing.assert_close(conv3x3(x, weight, **options), by_definition(x, weight, **options))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_folded_enlargement_keeps_the_rule(dtype):
    """The folded weights round once more: still within twice the plain order's error."""
    x, weight = torch.randn(1, 12, 12, 32, dtype=dtype), torch.randn(16, 32, 3, 3, dtype=dtype) / 17
    exact = by_definition(x.double(), weight.double(), upsample=2)
    large = x.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain = torch.nn.functional.conv2d(large, weight, padding=1).permute(0, 2, 3, 1)
    errors = [(y.double() - exact) for y in (conv3x3(x, weight, upsample=2), plain)]
    assert errors[0].abs().max() <= 2 * errors[1].abs().max() + 1e-5
    assert errors[0].square().mean().sqrt() <= 2 * errors[1].square().mean().sqrt() + 1e-5


X, W = torch.zeros(1, 4, 4, 8), torch.zeros(5, 8, 3, 3)


@pytest.mark.parametrize("args, options, message", [
    ((X[0], W), {}, r"x must be \(N, H, W, C\)"),
    ((X, W[:, :, :2]), {}, r"weight \(O, C, 3, 3\)"),
    ((X, W), dict(past=X), "weight must take 16 channels .* with past"),
    ((X, W), dict(past=X[:, :2]), "past must have x's shape"),
    ((X, W), dict(upsample=3), "upsample must be 1 or 2, got 3"),
    ((X, W), dict(residual=X), r"residual must be \(1, 4, 4, 5\), got \(1, 4, 4, 8\)"),
], ids=["rank", "kernel", "channels", "past", "upsample", "residual"])
def test_bad_arguments_are_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(*args, **options)
