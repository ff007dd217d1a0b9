"""The tiny conditional decoder: latents and the enlarged low-resolution frames to frames."""
import torch
from torch import Tensor, nn

from flashvsr_kernels import conv3x3, upsample_conv

from .config import LATENT_FRAMES, FlashVSRConfig
from .dit import weight


class MemBlock(nn.Module):
    """A residual block that also sees its own input of the time step before."""

    def __init__(self, width: int):
        super().__init__()
        self.weight1, self.bias1 = weight(width, 2 * width, 3, 3), weight(width)
        self.weight2, self.bias2 = weight(width, width, 3, 3), weight(width)
        self.weight3, self.bias3 = weight(width, width, 3, 3), weight(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, T, h, w, C)    memory: (B, 1, h, w, C), the step before x; replaced by x's last"""
        past = torch.cat([memory, x[:, :-1]], 1).flatten(0, 1)
        memory.copy_(x[:, -1:])
        frames = x.flatten(0, 1)
        y = conv3x3(frames, self.weight1, self.bias1, past=past, relu=True)
        y = conv3x3(y, self.weight2, self.bias2, relu=True)
        return conv3x3(y, self.weight3, self.bias3, residual=frames, relu=True).view(x.shape)


class Stage(nn.Module):
    """Three memory blocks, then twice the size and `grow` times the time steps."""

    def __init__(self, width: int, out: int, grow: int):
        super().__init__()
        self.memory = nn.ModuleList(MemBlock(width) for _ in range(3))
        self.folded = weight(grow, 2, 2, out, 2, 2, width)

    def forward(self, x: Tensor, memory: list[Tensor]) -> Tensor:
        for block, past in zip(self.memory, memory):
            x = block(x, past)
        y = upsample_conv(x.flatten(0, 1), self.folded)
        return y.view(len(x), -1, *y.shape[1:])


class Decoder(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        a, b, c, d = config.decoder_channels
        self.in_weight, self.in_bias = (weight(a, 3 * LATENT_FRAMES * 64 + config.latent_channels, 3, 3),
                                        weight(a))
        self.mid_weight = weight(a, a, 3, 3)
        self.stages = nn.ModuleList([Stage(a, b, 1), Stage(b, c, 2), Stage(c, d, 2)])
        self.out1_weight = weight(d, d, 3, 3)
        self.out2_weight, self.out2_bias = weight(3, d, 3, 3), weight(3)

    def forward(self, latent: Tensor, cond: Tensor, memory: list[Tensor]) -> Tensor:
        """Frames (B, 4 T, H, W, 3), about [0, 1], unclamped.

        latent: (B, C, T, H/8, W/8)    cond: (B, 4 T, H, W, 3), the enlarged input in [-1, 1]
        memory: nine tensors (B, 1, h, w, C), three a stage, replaced in place
        """
        B, C, T, h, w = latent.shape
        c = cond.view(B, T, LATENT_FRAMES, h, 8, w, 8, 3).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(
            B, T, h, w, -1)
        x = torch.cat([c, latent.permute(0, 2, 3, 4, 1)], -1)
        x = 3 * x.div_(3).tanh_()
        x = conv3x3(x.flatten(0, 1), self.in_weight, self.in_bias, relu=True)
        x = conv3x3(x, self.mid_weight, relu=True).view(B, T, h, w, -1)
        for i, stage in enumerate(self.stages):
            x = stage(x, memory[3 * i:3 * i + 3])
        x = conv3x3(x.flatten(0, 1).relu_(), self.out1_weight, relu=True)
        return conv3x3(x, self.out2_weight, self.out2_bias).view(B, LATENT_FRAMES * T, 8 * h, 8 * w, 3)
