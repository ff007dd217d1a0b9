"""The low-resolution projector: clips of four frames to one token for each of the transformer's."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr_kernels import causal_conv3d, rms_norm

from .config import PATCH, FlashVSRConfig
from .dit import weight

EPS = 1e-24  # the official norm divides by max(|x|, 1e-12)


class LQProjector(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        inside, a, b = 3 * PATCH * PATCH, *config.lq_hidden
        self.carries = config.version == "v1.1"
        self.conv1_weight, self.conv1_bias, self.norm1 = weight(a, inside, 4, 3, 3), weight(a), weight(a)
        self.conv2_weight, self.conv2_bias, self.norm2 = weight(b, a, 4, 3, 3), weight(b), weight(b)
        self.linear_weight, self.linear_bias = weight(config.dim, b), weight(config.dim)

    def prime(self, frame: Tensor, tail: list[Tensor]) -> None:
        """Takes the stream's first frame, (B, 1, H, W, 3) in [-1, 1]. Emits nothing; fills tail for v1.1."""
        if self.carries:
            x = unshuffle(frame, PATCH)
            y = self._first(x.expand(-1, 4, -1, -1, -1), x.expand(-1, 2, -1, -1, -1))
            tail[0], tail[1] = _keep(tail[0], x.expand(-1, 2, -1, -1, -1)), _keep(tail[1], y)

    def forward(self, clip: Tensor, tail: list[Tensor]) -> Tensor:
        """Tokens (B, H/16 * W/16, dim) of the next clip, (B, 4, H, W, 3) in [-1, 1].

        tail: the context in front of each convolution, (B, 2, H/16, W/16, 768) and
        (B, 2, H/16, W/16, lq_hidden[0]); v1.1 reads it and replaces it by the clip's own,
        v1 uses the clip's own frames instead.
        """
        x = unshuffle(clip, PATCH)
        y = self._first(x, tail[0] if self.carries else x[:, 2:])
        z = causal_conv3d(y, self.conv2_weight, self.conv2_bias, tail[1] if self.carries else y)
        z = F.silu(rms_norm(z, self.norm2, eps=EPS))
        if self.carries:
            tail[0], tail[1] = _keep(tail[0], x[:, 2:]), _keep(tail[1], y)
        return F.linear(z.flatten(1, 3), self.linear_weight, self.linear_bias)

    def _first(self, x: Tensor, tail: Tensor) -> Tensor:
        return F.silu(rms_norm(causal_conv3d(x, self.conv1_weight, self.conv1_bias, tail),
                               self.norm1, eps=EPS))


def _keep(buffer: Tensor, new: Tensor) -> Tensor:
    # A training step needs the old values for its backward pass; a stream keeps to its memory.
    return new if new.requires_grad else buffer.copy_(new)


def unshuffle(frames: Tensor, size: int) -> Tensor:
    """(B, T, H, W, 3) -> (B, T, H/size, W/size, 3 * size^2), channels by (colour, row, column)."""
    B, T, H, W, C = frames.shape
    x = frames.view(B, T, H // size, size, W // size, size, C).permute(0, 1, 2, 4, 6, 3, 5)
    return x.reshape(B, T, H // size, W // size, C * size * size)
