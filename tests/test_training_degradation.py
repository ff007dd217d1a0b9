"""Degradation: each step against a definition of its own (pooling, Pillow, statistics), and the chain."""
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flashvsr_model.training.degradation import (DegradationConfig, add_noise, compress, degrade, flat_tables,
                                                 jpeg_tables, shrink)

CLEAN = DegradationConfig(clean=1.0, clean_step=(1.0, 1.0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 64, width: int = 96, *, seed: int = 3) -> torch.Tensor:
    """(1, 1, 3, height, width), smooth with some noise, multiples of 1/255."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=seeded(seed))
    fine = torch.rand(1, 3, height, width, generator=seeded(seed + 1)) * 0.1
    smooth = F.interpolate(coarse, (height, width), mode="bilinear") * 0.8 + fine + 0.05
    return ((smooth * 255).round() / 255)[None]


def to_image(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((x[0, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def from_image(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, None] / 255


def constant(value: float, n: int = 1, frames: int = 1) -> torch.Tensor:
    return torch.full((n, frames), value)


def flags(*values: bool) -> torch.Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize("height, width", [(64, 64), (20, 28), (36, 100)])
def test_result_is_a_quarter_and_8_bit(height, width):
    hr = torch.rand(3, 5, 3, height, width, generator=seeded(1))
    lr = degrade(hr, seeded())
    assert lr.shape == (3, 5, 3, height // 4, width // 4) and lr.dtype == torch.float32
    assert 0 <= lr.min() and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), rtol=0, atol=1e-4)


def test_seed_decides_and_hr_is_untouched():
    hr = torch.rand(4, 3, 3, 32, 32, generator=seeded(1))
    before = hr.clone()
    assert torch.equal(degrade(hr, seeded(5)), degrade(hr, seeded(5)))
    assert not torch.equal(degrade(hr, seeded(5)), degrade(hr, seeded(6)))
    assert torch.equal(hr, before)


def test_autocast_changes_nothing():
    hr = torch.rand(2, 2, 3, 32, 32, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        lr = degrade(hr, seeded())
    assert torch.equal(lr, degrade(hr, seeded()))


def test_area_is_average_pooling():
    hr = torch.rand(2, 3, 3, 36, 48, generator=seeded())
    lr = shrink(hr, constant(0, 2, 3), constant(0, 2, 3), flags(False, False))
    torch.testing.assert_close(lr, F.avg_pool3d(hr, (1, 4, 4)), rtol=0, atol=1e-6)


def test_bicubic_is_pillows():
    hr = picture()
    lr = shrink(hr, constant(0), constant(0), flags(True))
    torch.testing.assert_close(lr[0], F.interpolate(hr[0], scale_factor=0.25, mode="bicubic", antialias=True),
                               rtol=0, atol=1e-5)
    pillow = from_image(to_image(hr).resize((24, 16), Image.Resampling.BICUBIC))
    assert (lr - pillow).abs().max() < 1.51 / 255   # Pillow rounds after each axis


def test_blur_is_per_frame_and_per_axis():
    hr = torch.zeros(2, 2, 3, 64, 64)
    hr[:, :, :, 30:34, 30:34] = 1
    sigma = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    lr = shrink(hr, sigma, torch.zeros(2, 2), flags(False, False))
    spread = (lr.sum(-1) > 1e-3).sum(-1)[:, :, 0]   # rows that the square reaches
    assert spread[0, 0] == spread[1, 1] == 2 and spread[0, 1] == spread[1, 0] > 4
    assert ((lr.sum(-2) > 1e-3).sum(-1) == 2).all()
    torch.testing.assert_close(lr.sum((-2, -1)), torch.ones(2, 2, 3))


def test_blur_follows_the_gaussian():
    hr = torch.zeros(1, 1, 3, 128, 128)
    hr[..., 64, 64] = 1
    lr = shrink(hr, constant(4.0), constant(0), flags(False))[0, 0, 0].sum(-1) * 4
    at = torch.arange(128.0).view(32, 4)
    expected = torch.exp(-(at - 64) ** 2 / 32).mean(-1) / (4 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(lr, expected, rtol=1e-3, atol=1e-5)


def test_noise_has_the_asked_variance():
    grey = torch.full((3, 1, 3, 200, 200), 0.25)
    sigma, shot = torch.tensor([[0.02], [0.0], [0.0]]), torch.tensor([[0.0], [0.04], [0.0]])
    noisy = add_noise(grey, sigma, shot, flags(False, True, False), seeded()) - grey
    assert noisy[0].std() == pytest.approx(0.02, rel=0.02)
    assert noisy[1].std() == pytest.approx(0.04 * 0.25 ** 0.5, rel=0.02)
    assert torch.equal(noisy[1, :, 0], noisy[1, :, 2]) and not torch.equal(noisy[0, :, 0], noisy[0, :, 2])
    assert not noisy[2].any()


@pytest.mark.parametrize("quality", [50, 75, 90, 98])
def test_jpeg_tables_are_libjpegs(quality):
    file = io.BytesIO()
    to_image(picture()).save(file, "JPEG", quality=quality)
    expected = Image.open(file).quantization
    tables = jpeg_tables(torch.tensor(float(quality)))
    assert tables.flatten(1).tolist() == [expected[0], expected[1]]


@pytest.mark.parametrize("subsampled", [False, True], ids=["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [60, 90])
def test_compression_resembles_libjpeg(quality, subsampled):
    x, file = picture(), io.BytesIO()
    to_image(x).save(file, "JPEG", quality=quality, subsampling=2 if subsampled else 0)
    theirs = from_image(Image.open(file))
    ours = compress(x, jpeg_tables(constant(quality)), flags(subsampled)).clamp(0, 1)
    lost = (theirs - x).square().mean().sqrt()
    assert (ours - theirs).square().mean().sqrt() < 0.5 * lost
    assert (ours - x).square().mean().sqrt() == pytest.approx(lost.item(), rel=0.1)


@pytest.mark.parametrize("subsampled", [False, True], ids=["4:4:4", "4:2:0"])
def test_compression_loses_less_at_higher_quality(subsampled):
    x = picture()
    lost = [(compress(x, jpeg_tables(constant(q)), flags(subsampled)) - x).square().mean()
            for q in (20, 50, 70, 85, 95, 100)]
    assert all(low > high for low, high in zip(lost, lost[1:]))


def test_compression_with_tiny_steps_is_the_identity_at_any_size():
    x = picture()[..., :43, :51]
    torch.testing.assert_close(compress(x, flat_tables(constant(1e-3)), flags(False)), x, rtol=0, atol=1e-5)


def test_tables_belong_to_their_frame():
    x = picture().expand(2, 2, -1, -1, -1)
    steps = torch.tensor([[1e-3, 60.0], [60.0, 1e-3]])
    lost = (compress(x, flat_tables(steps), flags(False, False)) - x).square().mean((2, 3, 4))
    assert lost[0, 0] < 1e-9 and lost[1, 1] < 1e-9 and lost[0, 1] > 1e-5
    torch.testing.assert_close(lost[0, 1], lost[1, 0])


def test_clean_clips_are_average_pooling_with_mild_compression():
    hr = picture().mean(2, keepdim=True).expand(4, 3, 3, -1, -1)   # grey: subsampled chroma is exact
    lr = degrade(hr, seeded(), CLEAN)
    assert (lr - F.avg_pool3d(hr, (1, 4, 4))).abs().max() < 3 / 255
    assert torch.equal(lr[0, 0], lr[3, 2])


def test_share_of_clean_clips():
    hr = picture(32, 32).expand(400, 1, -1, -1, -1)
    config = DegradationConfig(clean=0.4, clean_step=(1.0, 1.0), noisy=1.0, noise=(0.05, 0.05))
    error = (degrade(hr, seeded(), config) - degrade(hr, seeded(), CLEAN)).square().mean((1, 2, 3, 4)).sqrt()
    assert (error < 0.01).float().mean() == pytest.approx(0.4, abs=0.08)


def test_parameters_drift_within_a_clip():
    hr = picture(64, 64).expand(8, 9, -1, -1, -1)
    steady = DegradationConfig(clean=0.0, noisy=0.0, shot_noisy=0.0, jpeg=0.0, step=(1.0, 40.0), drift=0.0)
    lr = degrade(hr, seeded(), steady)
    assert torch.equal(lr, lr[:, :1].expand_as(lr))
    drifting = degrade(hr, seeded(), DegradationConfig(**{**vars(steady), "drift": 0.5}))
    assert not torch.equal(drifting[:, 0], drifting[:, -1])


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 2, 1, 32, 32), (1, 2, 3, 30, 32)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="hr must be"):
        degrade(torch.zeros(shape), seeded())
