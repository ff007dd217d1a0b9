"""The LQ projector's convolution."""
from torch import Tensor

from . import reference
from .backends import Backend, pick, register


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
    """(4, 3, 3) convolution with stride (2, 1, 1) behind two steps of context; borders of the picture are
    replicated.

    x: (B, T, H, W, C), T even    tail: (B, 2, H, W, C), the two steps before x
    weight: (O, C, 4, 3, 3)    bias: (O,)
    Returns (B, T / 2, H, W, O).
    """
    if x.ndim != 5 or x.shape[1] % 2:
        raise ValueError(f"x must be (B, T, H, W, C) with even T, got {tuple(x.shape)}")
    B, _, H, W, C = x.shape
    if tail.shape != (B, 2, H, W, C):
        raise ValueError(f"tail must be {(B, 2, H, W, C)} for x {tuple(x.shape)}, got {tuple(tail.shape)}")
    if weight.shape[1:] != (C, 4, 3, 3):
        raise ValueError(f"weight must be (O, {C}, 4, 3, 3), got {tuple(weight.shape)}")
    return pick("causal_conv3d", None).run(x, weight, bias, tail)


register("causal_conv3d", Backend("reference", reference.causal_conv3d))
