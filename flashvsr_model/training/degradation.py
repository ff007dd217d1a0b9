"""High-resolution clips to low-resolution ones such as a viewer might own: blur, 4x down, noise, compression.

Every step runs on all frames of all clips at once and takes its parameters per frame, so that they differ
between clips and drift along each. Random numbers come from one generator on the clips' device; nothing
synchronises.
"""
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 4
LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),   # ITU-T T.81, table K.1
        (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
        (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
CHROMA = tuple(row + (99,) * 4 for row in (   # table K.2
    (17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))) + ((99,) * 8,) * 4
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))   # JFIF
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@dataclass(frozen=True)
class DegradationConfig:
    """Shares of clips and ranges (low, high) of what is drawn for them.

    A clean clip is shrunk by area and compressed mildly, nothing else. The others get blur, noise and either
    JPEG's tables or a flat step, as in video codecs. Blur, noise and step are drawn squared: weak is common.
    """
    clean: float = 0.45                              # share of clean clips
    clean_step: tuple[float, float] = (2.0, 7.0)     # their flat step in 8-bit levels; 5 is like x264 crf 14
    blur: tuple[float, float] = (0.0, 1.2)           # sigma in high-resolution pixels
    anisotropic: float = 0.4                         # share with a second sigma of its own for columns
    bicubic: float = 0.5                             # share shrunk by bicubic rather than area
    noisy: float = 0.7                               # share with Gaussian noise
    noise: tuple[float, float] = (0.0, 6 / 255)      # its sigma, in [0, 1] brightness
    shot_noisy: float = 0.25                         # share with noise that grows with the brightness
    shot: tuple[float, float] = (0.0, 6 / 255)       # its sigma at white
    grey_noise: float = 0.4                          # share whose noise is the same in R, G and B
    jpeg: float = 0.5                                # share with JPEG's tables
    quality: tuple[float, float] = (50.0, 98.0)      # JPEG quality
    step: tuple[float, float] = (1.0, 14.0)          # flat quantisation step, in 8-bit levels
    subsampled: float = 0.5                          # share of JPEG clips with 4:2:0 chroma; flat ones do
    drift: float = 0.15                              # most that a parameter changes in a clip, of its range


@torch.no_grad()
def degrade(hr: Tensor, generator: torch.Generator,
            config: DegradationConfig = DegradationConfig()) -> Tensor:
    """Degraded low-resolution clips.

    hr: (n, T, 3, H, W) float32 RGB in [0, 1]; H and W multiples of 4
    generator: on hr's device; the same state gives the same result
    Returns (n, T, 3, H/4, W/4) float32, multiples of 1/255 in [0, 1].
    Raises ValueError on a bad shape, or if the devices differ.
    """
    if hr.dim() != 5 or hr.shape[2] != 3 or hr.shape[3] % SCALE or hr.shape[4] % SCALE:
        raise ValueError(f"hr must be (n, T, 3, H, W), H and W multiples of {SCALE}, got {tuple(hr.shape)}")
    if generator.device.type != hr.device.type:
        raise ValueError(f"generator must be on hr's device {hr.device}, got {generator.device}")
    n, frames = hr.shape[:2]
    draw = _Draw(n, frames, generator, config.drift)
    with torch.autocast(hr.device.type, enabled=False):
        dirty = ~draw.chance(config.clean)
        sigma_y = draw.track(config.blur, power=2)
        sigma_x = torch.where(draw.chance(config.anisotropic), draw.track(config.blur, power=2), sigma_y)
        bicubic = draw.chance(config.bicubic) & dirty
        lr = shrink(hr.float(), torch.where(dirty, sigma_y, 0), torch.where(dirty, sigma_x, 0), bicubic)

        sigma = torch.where(draw.chance(config.noisy) & dirty, draw.track(config.noise, power=2), 0)
        shot = torch.where(draw.chance(config.shot_noisy) & dirty, draw.track(config.shot, power=2), 0)
        lr = add_noise(lr, sigma, shot, draw.chance(config.grey_noise), generator)

        jpeg = draw.chance(config.jpeg) & dirty
        step = torch.where(dirty, draw.track(config.step, power=2), draw.track(config.clean_step))
        tables = torch.where(_per_frame(jpeg), jpeg_tables(draw.track(config.quality)), flat_tables(step))
        lr = compress(lr, tables, draw.chance(config.subsampled) | ~jpeg)
    return lr.clamp_(0, 1).mul_(255).round_().div_(255)


def shrink(hr: Tensor, sigma_y: Tensor, sigma_x: Tensor, bicubic: Tensor) -> Tensor:
    """hr blurred by a Gaussian and shrunk 4x; weights outside the picture are left out, as Pillow does.

    hr: (n, T, 3, H, W)    sigma_y, sigma_x: (n, T), in pixels of hr; 0 does not blur
    bicubic: (n, 1) bool, True for antialiased bicubic, False for area
    Returns (n, T, 3, H/4, W/4). Both steps are linear and separable, so each axis is one matrix.
    """
    rows = _shrink_matrix(hr.shape[3], sigma_y, bicubic)
    cols = _shrink_matrix(hr.shape[4], sigma_x, bicubic)
    return rows[:, :, None] @ (hr @ cols[:, :, None].transpose(-1, -2))


def add_noise(lr: Tensor, sigma: Tensor, shot: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """lr plus noise of variance sigma^2 + shot^2 * brightness, Poisson's law with a Gaussian's shape.

    lr: (n, T, 3, h, w)    sigma, shot: (n, T) in lr's unit    grey: (n, 1) bool, one noise for all channels
    """
    noise = torch.randn(lr.shape, generator=generator, device=lr.device)
    noise = torch.where(_per_frame(grey), noise[:, :, :1], noise)
    return lr + noise * (_per_frame(sigma) ** 2 + _per_frame(shot) ** 2 * lr.clamp(0, 1)).sqrt()


def compress(lr: Tensor, tables: Tensor, subsampled: Tensor) -> Tensor:
    """lr after 8x8 block transform, quantisation and back, in Y'CbCr.

    lr: (n, T, 3, h, w) RGB in [0, 1]    tables: (n, T, 2, 8, 8) steps in 8-bit levels, for luma and chroma
    subsampled: (n, 1) bool, True averages chroma over 2x2 pixels and spreads it again bilinearly
    Returns lr's shape, not clamped.
    """
    n, frames, _, h, w = lr.shape
    padded = F.pad(lr.flatten(0, 1), (0, -w % 16, 0, -h % 16), mode="replicate")
    ycc = _mix_channels(padded * 255, TO_YCC)
    steps = tables.flatten(0, 1)
    luma = _quantise(ycc[:, :1] - 128, steps[:, :1])
    chroma = _quantise(ycc[:, 1:], steps[:, 1:])
    small = _quantise(F.avg_pool2d(ycc[:, 1:], 2), steps[:, 1:])
    spread = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    where = subsampled.expand(n, frames).reshape(-1, 1, 1, 1)
    rgb = _mix_channels(torch.cat([luma + 128, torch.where(where, spread, chroma)], 1), TO_RGB) / 255
    return rgb[..., :h, :w].unflatten(0, (n, frames))


def jpeg_tables(quality: Tensor) -> Tensor:
    """JPEG's luma and chroma tables at quality (1 to 100), as in libjpeg: quality's shape + (2, 8, 8)."""
    base = _constant((LUMA, CHROMA), quality.device)
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    return ((base * percent[..., None, None, None] + 50) / 100).floor().clamp(1, 255)


def flat_tables(step: Tensor) -> Tensor:
    """The same step for every frequency: step's shape + (2, 8, 8)."""
    return step[..., None, None, None].expand(*step.shape, 2, 8, 8)


class _Draw:
    """Random decisions (n, 1) and drifting parameters (n, T) for n clips of T frames."""

    def __init__(self, n: int, frames: int, generator: torch.Generator, drift: float) -> None:
        self.shape, self.generator, self.drift = (n, 1), generator, drift
        self.time = torch.arange(frames, device=generator.device) / max(frames - 1, 1) - 0.5

    def chance(self, share: float) -> Tensor:
        return self._uniform() < share

    def track(self, limits: tuple[float, float], *, power: int = 1) -> Tensor:
        slope = (self._uniform() * 2 - 1) * self.drift
        unit = (self._uniform() ** power + slope * self.time).clamp(0, 1)
        return limits[0] + (limits[1] - limits[0]) * unit

    def _uniform(self) -> Tensor:
        return torch.rand(self.shape, generator=self.generator, device=self.generator.device)


@cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    """values on device in float32, copied there once: a copy from the host waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _mix_channels(x: Tensor, matrix: tuple) -> Tensor:
    """The 3x3 matrix applied to the channels of x (N, 3, H, W), as a sum: a product might round to TF32."""
    return (_constant(matrix, x.device)[:, :, None, None] * x[:, None]).sum(2)


def _per_frame(x: Tensor) -> Tensor:
    return x[..., None, None, None]


def _shrink_matrix(size: int, sigma: Tensor, bicubic: Tensor) -> Tensor:
    """(n, T, size/4, size): blur of sigma (n, T), then shrinking by area or, where bicubic (n, 1), that."""
    at = torch.arange(size, device=sigma.device, dtype=torch.float32)
    centre = (torch.arange(size // SCALE, device=sigma.device) + 0.5) * SCALE - 0.5
    offset = (at - centre[:, None]) / SCALE
    kernels = torch.stack([(offset.abs() < 0.5).float(), _cubic(offset)])
    kernels = kernels / kernels.sum(-1, keepdim=True)
    distance = (at - at[:, None]) ** 2
    blur = torch.exp(distance / (-2 * sigma.clamp(min=0.02)[..., None, None] ** 2))   # 0.02: the identity
    blur = blur / blur.sum(-1, keepdim=True)
    return kernels[bicubic.long()] @ blur


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, which Pillow and antialiased interpolation use."""
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)


def _quantise(x: Tensor, step: Tensor) -> Tensor:
    """x (N, C, H, W), H and W multiples of 8, its 8x8 blocks' coefficients rounded to step (N, 1, 8, 8)."""
    k = torch.arange(8, device=x.device, dtype=torch.float64)   # products of float64 never round to TF32
    dct = torch.cos((2 * k + 1) * k[:, None] * (torch.pi / 16)) / 2
    dct[0] /= 2 ** 0.5
    blocks = x.double().unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)   # (N, C, H/8, W/8, 8, 8)
    step = step[:, :, None, None]
    rounded = (dct @ blocks @ dct.T / step).round() * step
    return (dct.T @ rounded @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3).float()
