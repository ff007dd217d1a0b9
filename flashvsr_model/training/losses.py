"""What training minimises. Clips are (n, T, 3, H, W) in [0, 1]; all is computed in float32, autocast or not.

Each loss is 0 where prediction and target agree and positive elsewhere.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Y_WEIGHTS = (0.299, 0.587, 0.114)   # BT.601
WINDOW = 11                         # pixels, of SSIM's Gaussian with sigma 1.5
C1, C2 = 0.01 ** 2, 0.03 ** 2       # SSIM's constants for a range of 1


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the total; a part of weight 0 is not computed."""
    charbonnier: float = 1.0
    structure: float = 0.1
    edges: float = 0.5
    temporal: float = 0.5


def charbonnier(pred: Tensor, target: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(d^2 + eps^2) - eps over the differences d: quadratic below eps, absolute above."""
    d = pred.float() - target.float()
    return (d * d + eps * eps).sqrt().mean() - eps


def structure(pred: Tensor, target: Tensor, *, levels: int = 3) -> Tensor:
    """1 minus the SSIM of Y, averaged over levels scales (each half as large as the one before).

    Raises ValueError if H or W is below 11 pixels at the coarsest scale.
    """
    if min(pred.shape[-2:]) >> (levels - 1) < WINDOW:
        raise ValueError(f"pred must have at least {WINDOW << (levels - 1)} rows and columns for {levels} "
                         f"levels, got {tuple(pred.shape)}")
    with torch.autocast(pred.device.type, enabled=False):
        x, y = luma(pred), luma(target)
        total = x.new_zeros(())
        for level in range(levels):
            if level:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            total = total + ssim(x, y).mean()
        return 1 - total / levels


def edges(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and of the vertical differences of Y, added."""
    d = luma(pred) - luma(target)
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def temporal(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the changes from frame to frame: blind to a steady offset, awake to flicker.

    Raises ValueError for clips of one frame.
    """
    if pred.shape[1] < 2:
        raise ValueError(f"pred must have at least 2 frames, got {tuple(pred.shape)}")
    return (pred.float() - target.float()).diff(dim=1).abs().mean()


PARTS = {"charbonnier": charbonnier, "structure": structure, "edges": edges, "temporal": temporal}


def total(pred: Tensor, target: Tensor,
          weights: LossWeights = LossWeights()) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses and, for the log, each one unweighted and detached, still on the device.

    pred, target: (n, T, 3, H, W) in [0, 1], the same shape; ValueError otherwise
    """
    if pred.shape != target.shape or pred.dim() != 5 or pred.shape[2] != 3:
        raise ValueError(f"pred and target must both be (n, T, 3, H, W), got {tuple(pred.shape)} "
                         f"and {tuple(target.shape)}")
    parts = {name: part(pred, target) for name, part in PARTS.items() if getattr(weights, name)}
    loss = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
    return loss, {name: value.detach() for name, value in parts.items()}


def luma(clips: Tensor) -> Tensor:
    """(n, T, 3, H, W) RGB to Y (n * T, 1, H, W), float32."""
    r, g, b = clips.float().flatten(0, 1).split(1, dim=1)
    return Y_WEIGHTS[0] * r + Y_WEIGHTS[1] * g + Y_WEIGHTS[2] * b


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM map (N, 1, H - 10, W - 10) of pictures (N, 1, H, W) in [0, 1]."""
    at = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    gauss = torch.exp(-at * at / (2 * 1.5 ** 2))
    gauss = (gauss / gauss.sum()).expand(4, 1, 1, WINDOW)
    # one depthwise convolution for all four moments: exact float32, where a full one might round to TF32
    moments = torch.cat([x, y, x * x + y * y, x * y], 1)
    moments = F.conv2d(F.conv2d(moments, gauss, groups=4), gauss.transpose(2, 3), groups=4)
    mean_x, mean_y, squares, product = moments.split(1, dim=1)
    mean_xy, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    light = (2 * mean_xy + C1) / (mean_squares + C1)
    return light * (2 * (product - mean_xy) + C2) / (squares - mean_squares + C2)
