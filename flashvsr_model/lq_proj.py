"""The low-resolution projector: clips of four frames to one token for each of the transformer's."""
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr_kernels import causal_conv3d, pixel_unshuffle

from .config import LATENT_FRAMES, PATCH, FlashVSRConfig
from .dit import weight


class LQProjector(nn.Module):
    """Two convolutions that halve the number of steps, each behind two steps of context. In v1.1 these are the
    steps before, in v1 the last two of the same clip: for the second convolution its whole input, so that its
    weights are of two steps only (fold_repeat).
    """

    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        inside, a, b = 3 * PATCH * PATCH, *config.lq_hidden
        self.carries = config.version == "v1.1"
        self.conv1_weight, self.conv1_bias, self.norm1 = weight(a, inside, 4, 3, 3), weight(a), weight(a)
        self.conv2_weight = weight(b, a, 4 if self.carries else 2, 3, 3)
        self.conv2_bias, self.norm2 = weight(b), weight(b)
        self.linear_weight, self.linear_bias = weight(config.dim, b), weight(config.dim)

    def prime(self, frame: Tensor, tail: list[Tensor]) -> None:
        """Puts the context that a stream begins with into tail. frame: its first, (B, 1, H, W, 3), as for forward"""
        if self.carries:
            x = self._cells(frame).repeat(1, 4, 1, 1, 1)
            tail[0], tail[1] = x[:, :2], self._first(x, x[:, :2])

    def forward(self, frames: Tensor, tail: list[Tensor]) -> Tensor:
        """frames: (B, 4 n, H, W, 3), uint8 levels or in [-1, 1]    tail: the context in front of each convolution,
        (B, 2, H/16, W/16, 768) and (B, 2, H/16, W/16, lq_hidden[0]), replaced; not touched in v1
        Returns tokens (B, n * H/16 * W/16, dim), n latents one after another.
        """
        x = self._cells(frames)
        if self.carries:
            y = self._first(x, tail[0])
            tail[0], x = x[:, -2:], None  # its memory is free for what follows
            z = self._second(y, tail[1])
            tail[1], y = y[:, -2:], None
        else:
            clips = x.unflatten(1, (-1, LATENT_FRAMES)).flatten(0, 1)
            z = self._second(self._first(clips, clips[:, 2:]), None)
        return F.linear(z.reshape(len(frames), -1, z.shape[-1]), self.linear_weight, self.linear_bias)

    def _cells(self, frames: Tensor) -> Tensor:
        """(B, T, H/16, W/16, 768)"""
        cells = pixel_unshuffle(frames.flatten(0, 1).unsqueeze(1), PATCH, dtype=self.linear_weight.dtype)
        return cells.unflatten(0, frames.shape[:2])

    def _first(self, x: Tensor, tail: Tensor) -> Tensor:
        return causal_conv3d(x, self.conv1_weight, self.conv1_bias, tail, gamma=self.norm1)

    def _second(self, x: Tensor, tail: Tensor | None) -> Tensor:
        return causal_conv3d(x, self.conv2_weight, self.conv2_bias, tail, gamma=self.norm2)
