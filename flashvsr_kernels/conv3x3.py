"""The decoder's convolution."""
from torch import Tensor

from . import reference
from .backends import Backend, pick, register


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, past: Tensor | None = None,
            residual: Tensor | None = None, upsample: int = 1, relu: bool = False) -> Tensor:
    """3x3 convolution of NHWC pictures, zero padding 1, with what surrounds it in the decoder.

    x: (N, H, W, C)    weight: (O, C, 3, 3), or (O, 2 C, 3, 3) with past    bias: (O,) or None
    past: (N, H, W, C), the second half of the input channels: the picture one step before
    upsample: 2 doubles the picture (nearest neighbour) before the convolution
    residual: (N, upsample * H, upsample * W, O), added before relu
    Returns (N, upsample * H, upsample * W, O).
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError("x must be (N, H, W, C) and weight (O, C, 3, 3), "
                         f"got {tuple(x.shape)} and {tuple(weight.shape)}")
    if past is not None and past.shape != x.shape:
        raise ValueError(f"past must have x's shape {tuple(x.shape)}, got {tuple(past.shape)}")
    channels = x.shape[3] * (1 if past is None else 2)
    if weight.shape[1] != channels:
        raise ValueError(f"weight must take {channels} channels for x {tuple(x.shape)}"
                         f"{'' if past is None else ' with past'}, got {tuple(weight.shape)}")
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {upsample}")
    N, H, W, _ = x.shape
    out = (N, upsample * H, upsample * W, weight.shape[0])
    if residual is not None and residual.shape != out:
        raise ValueError(f"residual must be {out}, got {tuple(residual.shape)}")
    return pick("conv3x3", None).run(x, weight, bias, past, residual, upsample, relu)


register("conv3x3", Backend("reference", reference.conv3x3))
