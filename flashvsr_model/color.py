"""Giving the result the colours of its input."""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
LEVELS = 5


def match_color(frames: Tensor, source: Tensor, how: str) -> Tensor:
    """frames (T, H, W, 3) with the colours of source, both about [-1, 1]; float32, unclamped.

    how: "adain": each frame's channels get the source's mean and standard deviation
         "wavelet": all but the finest five octaves come from the source    "none": frames as they are
    """
    frames, source = frames.float(), source.float()
    if how == "none":
        return frames
    if how == "adain":
        return _adain(frames, source)
    if how == "wavelet":
        return frames + _coarse(source - frames)
    raise ValueError(f'how must be "adain", "wavelet" or "none", got {how!r}')


def _adain(frames: Tensor, source: Tensor) -> Tensor:
    mean, std = _moments(frames)
    source_mean, source_std = _moments(source)
    return (frames - mean) / std * source_std + source_mean


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = x.flatten(1, 2).var(1, correction=0, keepdim=True), x.flatten(1, 2).mean(1, keepdim=True)
    return mean[:, None], (var + EPS).sqrt()[:, None]


def _coarse(x: Tensor) -> Tensor:
    """What is left of x after five à-trous smoothings by [1 2 1] / 4 in both directions, borders replicated.
    """
    x = x.permute(0, 3, 1, 2)
    taps = _taps(x.device)
    across, down = taps.view(1, 1, 1, 3).expand(3, 1, 1, 3), taps.view(1, 1, 3, 1).expand(3, 1, 3, 1)
    for level in range(LEVELS):
        step = 2 ** level
        x = F.conv2d(F.pad(x, (step, step, 0, 0), mode="replicate"), across, dilation=step, groups=3)
        x = F.conv2d(F.pad(x, (0, 0, step, step), mode="replicate"), down, dilation=step, groups=3)
    return x.permute(0, 2, 3, 1)


@functools.cache
def _taps(device: torch.device) -> Tensor:
    """Kept, as a CUDA graph cannot record their way to the device."""
    return torch.tensor([1.0, 2.0, 1.0], device=device) / 4
