"""Giving the result the colours of its input."""
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
    """What is left of x (T, H, W, 3) after five à-trous smoothings by [1 2 1] / 4 in both directions, borders
    replicated.
    """
    for level in range(LEVELS):
        for axis in (2, 1):
            x = _smooth(x, axis, 2 ** level)
    return x


def _smooth(x: Tensor, axis: int, step: int) -> Tensor:
    """With neighbours at that distance. Sums of parts take a quarter of the time of padding and a convolution."""
    n = x.shape[axis]
    step = min(step, n)
    out, inside = x / 2, n - step
    for at, start, length in ((step, 0, inside), (0, step, inside)):
        out.narrow(axis, at, length).add_(x.narrow(axis, start, length), alpha=0.25)
    for at, edge in ((0, 0), (inside, n - 1)):
        out.narrow(axis, at, step).add_(x.narrow(axis, edge, 1), alpha=0.25)
    return out
