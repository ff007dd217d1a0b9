"""The training loop sees the model that streams."""
import dataclasses

import pytest
import torch

from flashvsr_model import StreamingUpscaler
from flashvsr_model.config import PRESETS
from flashvsr_model.training.train import Trainee, fuse, initial

SMALL = dataclasses.replace(PRESETS["compact"], num_layers=1, lq_hidden=(8, 8), decoder_channels=(16, 8, 8, 8),
                            ffn_dim=64)


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
        parts = [part for a, b in ((0, 25), (21, 33), (29, 41)) for part in upscaler.step(state, clip[None, a:b])]
        torch.testing.assert_close(torch.cat(parts, 1)[0], expected, rtol=1e-4, atol=1e-5)


def test_every_weight_learns(weights):
    trainee = Trainee(SMALL, torch.device("cpu"), torch.float32)
    out = torch.func.functional_call(trainee, fuse(SMALL, weights, torch.float32), (torch.rand(1, 33, 128, 128, 3),))
    out.square().mean().backward()
    silent = [name for name, w in weights.items() if w.grad is None or not w.grad.abs().sum() > 0]
    assert silent == ["dit.patch_embedding.weight"]  # compact starts from zeros, not from noise
