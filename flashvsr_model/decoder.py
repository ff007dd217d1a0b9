"""The tiny conditional decoder: latents and the enlarged low-resolution frames to frames.

It works through a stream step by step: pictures (B, h, w, C) one after another, with what each block saw last.
At full resolution only one step is in memory at a time.
"""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flashvsr_kernels import conv3x3, pixel_unshuffle, rgb_head, upsample_conv

from .config import LATENT_FRAMES, FlashVSRConfig
from .dit import weight
from .state import Places

CELL = 8      # pixels of a latent
BOUND = 3.0   # of what the decoder takes, by tanh


class MemBlock(nn.Module):
    """A residual block that also sees its own input of the time step before."""

    def __init__(self, width: int):
        super().__init__()
        self.weight1, self.bias1 = weight(width, 2 * width, 3, 3), weight(width)
        self.weight2, self.bias2 = weight(width, width, 3, 3), weight(width)
        self.weight3, self.bias3 = weight(width, width, 3, 3), weight(width)

    def forward(self, x: Tensor, memory: list[Tensor], i: int) -> Tensor:
        """memory[i]: x of the step before, replaced"""
        y = conv3x3(x, self.weight1, self.bias1, past=memory[i], relu=True)
        memory[i] = x
        y = conv3x3(y, self.weight2, self.bias2, relu=True)
        return conv3x3(y, self.weight3, self.bias3, residual=x, relu=True, out=_spare(memory))


class Stage(nn.Module):
    """Three memory blocks, and weights for twice the size and `grow` times the time steps."""

    def __init__(self, width: int, out: int, grow: int):
        super().__init__()
        self.memory = nn.ModuleList(MemBlock(width) for _ in range(3))
        self.folded = weight(grow, 2, 2, out, 2, 2, width)

    def forward(self, x: Tensor, memory: list[Tensor]) -> Tensor:
        """x: one step (B, h, w, C)    memory: each block's last input, replaced    Returns x's like."""
        for i, block in enumerate(self.memory):
            x = block(x, memory, i)
        return x

    def grown(self, x: Tensor, memory: list[Tensor], following: list[Tensor]) -> Iterator[Tensor]:
        """As forward, then steps (B, 2 h, 2 w, out). following: the memory of the stage that they are for"""
        x = self(x, memory)
        for step in self.folded.split(1):
            yield upsample_conv(x, step, out=_spare(following))


def _spare(memory: list[Tensor]) -> Tensor | None:
    """Where the next picture is best made, if memory knows a place."""
    return memory.spare if isinstance(memory, Places) else None


class Decoder(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        a, b, c, d = config.decoder_channels
        self.moments = config.color == "adain"
        self.in_weight, self.in_bias = (weight(a, 3 * LATENT_FRAMES * 64 + config.latent_channels, 3, 3),
                                        weight(a))
        self.mid_weight = weight(a, a, 3, 3)
        self.stages = nn.ModuleList([Stage(a, b, 1), Stage(b, c, 2), Stage(c, d, 2)])
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
        pixel_unshuffle(cond, CELL, bound=BOUND, out=x[..., :cells])
        x[..., cells:] = (latent / BOUND).tanh().mul(BOUND).permute(0, 2, 3, 1)
        x = conv3x3(x, self.in_weight, self.in_bias, relu=True)
        x = conv3x3(x, self.mid_weight, relu=True)
        first, second, third = self.stages
        for x in first.grown(x, memory[0], memory[1]):
            for x in second.grown(x, memory[1], memory[2]):
                x = third(x, memory[2])
                for step in third.folded.split(1):
                    frame = rgb_head(x, step, self.out1_weight, self.out2_weight, self.out2_bias, box=box,
                                     out_dtype=torch.promote_types(x.dtype, torch.float32),
                                     return_moments=self.moments)
                    yield frame if self.moments else (frame, None)
