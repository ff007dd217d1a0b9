"""Separable picture resizing by matrices: the bicubic and Lanczos baselines, and exact area shrinking."""
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

FILTERS = {"bicubic": 4, "lanczos": 8}  # taps; the same filters as OpenCV's INTER_CUBIC and INTER_LANCZOS4


def filter_weight(name: str, x: Tensor) -> Tensor:
    """The filter's value at distance x: cubic with a = -0.75, or a sinc windowed to four lobes."""
    if name == "lanczos":
        return torch.where(x < 4, torch.sinc(x) * torch.sinc(x / 4), 0.0)
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return torch.where(x < 1, near, torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


def growth_matrix(size: int, name: str, scale: int = 4) -> Tensor:
    """(scale * size, size) float32: a row weighs a line's pixels for one new pixel; edges are repeated."""
    taps = FILTERS[name]
    centre = (torch.arange(scale * size, dtype=torch.float64) + 0.5) / scale - 0.5
    index = centre.floor().long()[:, None] + torch.arange(1 - taps // 2, taps // 2 + 1)
    weight = filter_weight(name, (centre[:, None] - index).abs())
    matrix = torch.zeros(scale * size, size, dtype=torch.float64)
    matrix.scatter_add_(1, index.clamp(0, size - 1), weight / weight.sum(1, keepdim=True))
    return matrix.float()


def grow(frames: Tensor, name: str) -> Tensor:
    """(T, 4H, 4W, 3) uint8 of frames (T, H, W, 3) uint8 by "bicubic" or "lanczos"."""
    rows, columns = growth_matrix(frames.shape[1], name), growth_matrix(frames.shape[2], name)
    result = torch.empty(len(frames), len(rows), len(columns), 3, dtype=torch.uint8)
    for out, frame in zip(result, frames):
        out.copy_((rows @ frame.permute(2, 0, 1).float() @ columns.T).round().clamp(0, 255).permute(1, 2, 0))
    return result


def sharpen(frames: Tensor, radius: float = 2, percent: int = 60) -> Tensor:
    """Pillow's unsharp mask of frames (T, H, W, 3) uint8: frames + percent % of what a Gaussian of radius removes."""
    mask = ImageFilter.UnsharpMask(radius, percent, threshold=0)
    return torch.stack([torch.from_numpy(np.array(Image.fromarray(f).filter(mask))) for f in frames.numpy()])


def shrink_area(frames: Tensor, scale: int = 4) -> Tensor:
    """(T, H/scale, W/scale, 3) uint8: rounded means of scale x scale squares of frames (T, H, W, 3) uint8."""
    if frames.shape[1] % scale or frames.shape[2] % scale:
        raise ValueError(f"height and width must be multiples of {scale}, got {tuple(frames.shape)}")
    squares = frames.unflatten(2, (-1, scale)).unflatten(1, (-1, scale))
    return torch.stack([s.float().mean((1, 3)).round().to(torch.uint8) for s in squares])
