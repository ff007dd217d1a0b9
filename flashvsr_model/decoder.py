"""The tiny conditional decoder: latents and the enlarged low-resolution frames to frames.

It works through a stream step by step: pictures (B, h, w, C) one after another, with what each block saw last.
At full resolution only one step is in memory at a time.
"""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flashvsr_kernels import conv3x3, pixel_unshuffle, rgb_conv, upsample_conv

from .config import LATENT_FRAMES, FlashVSRConfig
from .dit import weight

CELL = 8  # pixels of a latent


class MemBlock(nn.Module):
    """A residual block that also sees its own input of the time step before."""

    def __init__(self, width: int):
        super().__init__()
        self.weight1, self.bias1 = weight(width, 2 * width, 3, 3), weight(width)
        self.weight2, self.bias2 = weight(width, width, 3, 3), weight(width)
        self.weight3, self.bias3 = weight(width, width, 3, 3), weight(width)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        y = conv3x3(x, self.weight1, self.bias1, past=past, relu=True)
        y = conv3x3(y, self.weight2, self.bias2, relu=True)
        return conv3x3(y, self.weight3, self.bias3, residual=x, relu=True)


class Stage(nn.Module):
    """Three memory blocks, then twice the size and `grow` times the time steps."""

    def __init__(self, width: int, out: int, grow: int, relu: bool):
        super().__init__()
        self.memory = nn.ModuleList(MemBlock(width) for _ in range(3))
        self.folded = weight(grow, 2, 2, out, 2, 2, width)
        self.relu = relu

    def forward(self, x: Tensor, memory: list[Tensor]) -> Iterator[Tensor]:
        """x: one step (B, h, w, C)    memory: each block's last input, replaced
        Yields steps (B, 2 h, 2 w, out).
        """
        for i, block in enumerate(self.memory):
            memory[i], x = x, block(x, memory[i])
        for step in self.folded.split(1):
            yield upsample_conv(x, step, relu=self.relu)


class Decoder(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        a, b, c, d = config.decoder_channels
        self.moments = config.color == "adain"
        self.in_weight, self.in_bias = (weight(a, 3 * LATENT_FRAMES * 64 + config.latent_channels, 3, 3),
                                        weight(a))
        self.mid_weight = weight(a, a, 3, 3)
        self.stages = nn.ModuleList([Stage(a, b, 1, False), Stage(b, c, 2, False), Stage(c, d, 2, True)])
        self.out1_weight = weight(d, d, 3, 3)
        self.out2_weight, self.out2_bias = weight(3, d, 3, 3), weight(3)

    def forward(self, latent: Tensor, cond: Tensor, memory: list[list[Tensor]],
                box: tuple[int, int, int, int] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The four frames of one latent.

        latent: (B, C, H/8, W/8)    cond: (B, 4, H, W, 3), the enlarged input, uint8 levels or in [-1, 1]
        memory: for each stage what its blocks saw last, three tensors (B, h, w, C); replaced
        box: (top, left, height, width) of the part of each frame that is wanted, None for all of it
        Yields frames (B, height, width, 3), about [0, 1], unclamped, in float32 or wider, and the moments of
        2 * frame - 1 if the colours are matched by them, else None.
        """
        B, _, h, w = latent.shape
        x = latent.new_empty((B, h, w, self.in_weight.shape[1]))
        cells = 3 * LATENT_FRAMES * CELL ** 2
        pixel_unshuffle(cond, CELL, out=x[..., :cells])
        x[..., cells:] = latent.permute(0, 2, 3, 1)
        x = x.div_(3).tanh_().mul(3)
        x = conv3x3(x, self.in_weight, self.in_bias, relu=True)
        x = conv3x3(x, self.mid_weight, relu=True)
        first, second, third = self.stages
        for x in first(x, memory[0]):
            for x in second(x, memory[1]):
                for x in third(x, memory[2]):
                    frame = self._frame(x, box or (0, 0, *x.shape[1:3]))
                    del x  # before the next is made
                    yield frame

    def _frame(self, x: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
        """The last two convolutions, (B, H, W, d) to a frame and its moments: a third of the rows after the other, so that
        what is in between takes a third of the memory. Of several pictures a part of the rows would not be contiguous.
        """
        (B, H), (top, _, height, _) = x.shape[:2], box
        step = -(-H // 3) if B == 1 else H
        bands = [(max(top, row), min(row + step, top + height)) for row in range(0, H, step)]
        parts = [self._rows(x, box, first, end) for first, end in bands if first < end]
        frames, moments, rows = zip(*parts)
        return torch.cat(frames, 1), sum(m * n / height for m, n in zip(moments, rows)) if self.moments else None

    def _rows(self, x: Tensor, box: tuple[int, int, int, int], first: int,
              end: int) -> tuple[Tensor, Tensor | None, int]:
        """Rows first to end of a frame, their moments, and how many they are."""
        above = max(0, first - 2)
        x = conv3x3(x[:, above:end + 2], self.out1_weight, relu=True)
        last = rgb_conv(x, self.out2_weight, self.out2_bias, box=(first - above, box[1], end - first, box[3]),
                        out_dtype=torch.promote_types(x.dtype, torch.float32), return_moments=self.moments)
        return *(last if self.moments else (last, None)), end - first
