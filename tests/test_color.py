"""Colour matching, from the definitions."""
import pytest
import torch

from flashvsr_model.color import match_color

FRAMES, SOURCE = torch.rand(3, 40, 48, 3) * 1.5 - 0.7, torch.rand(3, 40, 48, 3) * 0.8 - 0.5


def test_adain_gives_the_moments_of_the_source():
    out = match_color(FRAMES, SOURCE, "adain")
    torch.testing.assert_close(out.mean((1, 2)), SOURCE.mean((1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((1, 2)), SOURCE.std((1, 2)), rtol=1e-3, atol=0)
    y, s = FRAMES[1, ..., 2].double(), SOURCE[1, ..., 2].double()
    expected = ((y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt() * (s.var(correction=0) + 1e-5).sqrt()
                + s.mean())
    torch.testing.assert_close(out[1, ..., 2].double(), expected, rtol=0, atol=1e-5)


def test_adain_of_a_flat_picture_is_finite():
    out = match_color(torch.zeros(1, 8, 8, 3), SOURCE[:1, :8, :8], "adain")
    torch.testing.assert_close(out, SOURCE[:1, :8, :8].mean((1, 2), keepdim=True).expand_as(out))


def smooth(x: torch.Tensor) -> torch.Tensor:
    """Five à-trous levels by index arithmetic."""
    for level in range(5):
        for axis in (1, 2):
            at, last = torch.arange(x.shape[axis]), x.shape[axis] - 1
            left, right = ((at + d).clamp(0, last) for d in (-2 ** level, 2 ** level))
            x = (x.index_select(axis, left) + 2 * x + x.index_select(axis, right)) / 4
    return x


def test_wavelet_takes_the_coarse_part_from_the_source():
    expected = FRAMES - smooth(FRAMES) + smooth(SOURCE)
    torch.testing.assert_close(match_color(FRAMES, SOURCE, "wavelet"), expected, rtol=0, atol=1e-5)


def test_wavelet_removes_a_colour_cast():
    cast = SOURCE + torch.tensor([0.2, -0.1, 0.05])
    torch.testing.assert_close(match_color(cast, SOURCE, "wavelet"), SOURCE, rtol=0, atol=1e-5)


def test_none_leaves_frames_alone():
    assert torch.equal(match_color(FRAMES, SOURCE, "none"), FRAMES)


def test_bf16_is_computed_in_float32():
    out = match_color(FRAMES.bfloat16(), SOURCE.bfloat16(), "wavelet")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, match_color(FRAMES.bfloat16().float(), SOURCE.bfloat16().float(),
                                                "wavelet"))


def test_unknown_way_is_named():
    with pytest.raises(ValueError, match='how must be "adain", "wavelet" or "none", got \'lab\''):
        match_color(FRAMES, SOURCE, "lab")
