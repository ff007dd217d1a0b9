"""The projector's convolution against loops over its definition."""
import pytest
import torch

from flashvsr_kernels import causal_conv3d


@pytest.mark.parametrize("B, T, H, W", [(1, 4, 3, 5), (2, 2, 1, 1), (1, 6, 8, 2)])
def test_definition(B, T, H, W):
    x, tail = (torch.randn(B, t, H, W, 6, dtype=torch.float64) for t in (T, 2))
    weight, bias = torch.randn(7, 6, 4, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    whole = torch.cat([tail, x], 1)
    out = torch.zeros(B, T // 2, H, W, 7, dtype=torch.float64) + bias
    rows, cols = torch.arange(H), torch.arange(W)
    for t in range(T // 2):
        for dt in range(4):
            for dy in range(3):
                for dx in range(3):
                    picture = whole[:, 2 * t + dt][:, (rows + dy - 1).clamp(0, H - 1)][
                        :, :, (cols + dx - 1).clamp(0, W - 1)]
                    out[:, t] += picture @ weight[:, :, dt, dy, dx].T
    torch.testing.assert_close(causal_conv3d(x, weight, bias, tail), out)


X, W, B = torch.zeros(1, 4, 3, 3, 6), torch.zeros(7, 6, 4, 3, 3), torch.zeros(7)


@pytest.mark.parametrize("args, message", [
    ((X[:, :3], W, B, X[:, :2]), r"x must be \(B, T, H, W, C\) with even T"),
    ((X, W, B, X[:, :1]), r"tail must be \(1, 2, 3, 3, 6\)"),
    ((X, W[:, :5], B, X[:, :2]), r"weight must be \(O, 6, 4, 3, 3\)"),
], ids=["odd", "tail", "weight"])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        causal_conv3d(*args)
