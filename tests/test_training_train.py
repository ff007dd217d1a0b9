"""The training loop sees the model that streams."""
import dataclasses

import pytest
import torch

from flashvsr_model import StreamingUpscaler
from flashvsr_model.config import PRESETS
from flashvsr_model.training import skeleton
from flashvsr_model.training.train import Trainee, fuse, initial

SMALL = dataclasses.replace(PRESETS["compact"], num_layers=1, lq_hidden=(8, 8),
                            decoder_channels=(16, 8, 8, 8), ffn_dim=64, margin=0)


@pytest.fixture
def weights():
    return {name: w.requires_grad_() for name, w in initial(SMALL, torch.Generator().manual_seed(0)).items()}


def test_clip_equals_stream(weights):
    source = torch.rand(2, 41, 128, 128, 3) * 2 - 1
    trainee = Trainee(SMALL, torch.device("cpu"), torch.float32)
    whole = torch.func.functional_call(trainee, fuse(SMALL, weights, torch.float32), (source,))
    upscaler = StreamingUpscaler.from_tensors(SMALL, weights)
    for clip, expected in zip(source, whole):
        state = upscaler.new_state(32, 32)
        frames = [frame for a, b in ((0, 25), (21, 33), (29, 41))
                  for frame, _ in upscaler.step(state, clip[None, a:b])]
        torch.testing.assert_close(torch.cat(frames), expected, rtol=1e-4, atol=1e-5)


def test_every_weight_learns(weights):
    trainee = Trainee(SMALL, torch.device("cpu"), torch.float32)
    out = torch.func.functional_call(trainee, fuse(SMALL, weights, torch.float32),
                                     (torch.rand(1, 33, 128, 128, 3),))
    out.square().mean().backward()
    silent = [name for name, w in weights.items() if w.grad is None or not w.grad.abs().sum() > 0]
    assert silent == ["dit.patch_embedding.weight"]  # compact starts from zeros, not from noise


def test_training_starts_from_an_enlargement():
    """The construction laid into the decoder makes the pictures of the linear filter it was made from."""
    config = dataclasses.replace(PRESETS["compact"], color="none", num_layers=1, margin=0)
    weights = initial(config, torch.Generator().manual_seed(0))
    fitted = skeleton.LinearDecoder(5, 5, torch.Generator().manual_seed(1))
    with torch.no_grad():  # plain copying: each pixel the low-resolution one it belongs to
        for name, kernel in fitted.kernels.items():
            if name != "first":
                kernel.zero_()
                kernel[0, 0, 1, 1] = 1
    skeleton.lay_in(weights, config, fitted)
    frames = torch.nn.functional.interpolate(torch.rand(3, 25, 10, 12), scale_factor=8, mode="bilinear")
    frames = torch.nn.functional.pad(frames, (0, 32, 0, 48), mode="replicate").permute(
        1, 2, 3, 0)[None] * 1.6 - 0.8
    upscaler = StreamingUpscaler.from_tensors(config, weights)
    state = upscaler.new_state(32, 32)
    out = torch.cat([2 * frame - 1 for frame, _ in upscaler.step(state, frames)])
    flat = 3 * torch.tanh(frames[0, :21].permute(0, 3, 1, 2).flatten(0, 1)[:, None] / 3)
    expected = fitted(flat)[0].detach().view(21, 3, 128, 128).permute(0, 2, 3, 1)
    inside = slice(8, -8)
    # The filter's forward pass adds its noise of 0.03 on the way; without gates or offsets in place errors
    # are near 1.
    assert (out - expected)[:, inside, inside].square().mean().sqrt() < 0.08
