"""Losses: zero where clips agree, positive and differentiable where not, each awake to its own error."""
import pytest
import torch

from flashvsr_model.training.losses import (PARTS, LossWeights, charbonnier, edges, ssim, structure, temporal,
                                            total)

SHAPE = (2, 4, 3, 48, 52)


@pytest.fixture
def target() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2


def noise(seed: int = 2) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", PARTS)
def test_zero_only_at_equality(name, target):
    assert PARTS[name](target, target.clone()).abs() < 1e-6
    assert PARTS[name](target + noise(), target) > 1e-3


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("offset", [0.0, 0.05], ids=["equal", "different"])
def test_gradients_are_finite(name, offset, target):
    pred = (target + offset * noise() / 0.05).requires_grad_()
    PARTS[name](pred, target).backward()
    assert pred.grad.isfinite().all()
    if offset:
        assert pred.grad.any()


@pytest.mark.parametrize("name", PARTS)
def test_half_precision_is_computed_in_float32(name, target):
    rough = (target + noise()).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = PARTS[name](rough, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, PARTS[name](rough.float(), target))


def test_temporal_sees_flicker_that_charbonnier_takes_for_an_offset(target):
    steady = target + 0.05
    flicker = target + 0.05 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(charbonnier(steady, target), charbonnier(flicker, target))
    assert temporal(steady, target) < 1e-6
    torch.testing.assert_close(temporal(flicker, target), torch.tensor(0.1))


def test_structure_sees_blur_that_costs_little_brightness(target):
    flat = target.mean((-2, -1), keepdim=True).expand(SHAPE)
    offset = target + (flat - target).abs().mean()
    assert charbonnier(offset, target) > 0.95 * charbonnier(flat, target)
    assert structure(flat, target) > 5 * structure(offset, target)
    assert edges(offset, target) < 1e-6 < edges(flat, target)


def test_edges_add_both_slopes_of_the_error(target):
    ramp = 0.002 * torch.arange(52.0) - 0.003 * torch.arange(48.0)[:, None]
    torch.testing.assert_close(edges(target + ramp, target), torch.tensor(0.005), rtol=1e-3, atol=0)


def test_ssim_of_constant_pictures_is_the_formula():
    x, y = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.6)
    expected = (2 * 0.3 * 0.6 + 1e-4) / (0.3 ** 2 + 0.6 ** 2 + 1e-4)
    torch.testing.assert_close(ssim(x, y), torch.full((1, 1, 6, 6), expected), rtol=1e-3, atol=0)


def test_total_is_the_weighted_sum(target):
    weights = LossWeights(charbonnier=2.0, structure=0.0, edges=0.25, temporal=3.0)
    pred = (target + noise()).requires_grad_()
    loss, parts = total(pred, target, weights)
    assert set(parts) == {"charbonnier", "edges", "temporal"}
    assert not any(part.requires_grad for part in parts.values())
    expected = 2 * parts["charbonnier"] + 0.25 * parts["edges"] + 3 * parts["temporal"]
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("call, message", [
    (lambda: total(torch.zeros(1, 2, 3, 48, 48), torch.zeros(1, 2, 3, 48, 44)), "must both be"),
    (lambda: temporal(torch.zeros(1, 1, 3, 48, 48), torch.zeros(1, 1, 3, 48, 48)), "at least 2 frames"),
    (lambda: structure(torch.zeros(1, 2, 3, 40, 48), torch.zeros(1, 2, 3, 40, 48)), "at least 44 rows"),
], ids=["shapes differ", "one frame", "too small"])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
