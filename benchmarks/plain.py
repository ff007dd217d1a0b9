"""Decoder and projector as plain PyTorch modules on cuDNN, as good as PyTorch's own operators make them.

Pictures are NHWC, which PyTorch calls channels_last; bias, addition and ReLU are fused into the convolutions;
nothing is concatenated that need not be. B is 1. All ours are held against these, eager and compiled.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr_model.config import LATENT_FRAMES, PATCH, FlashVSRConfig
from flashvsr_model.fuse import _STAGES

EPS = 1e-5
# Forms, of which the fastest is compared with. A block's first convolution is two, of x and of the step
# before, or one of both side by side in memory; "both": two latents in a call, not one.
DECODER, PROJECTOR = ("split", "buffer", "split-both"), ("conv3d", "im2col")


@torch.library.custom_op("flashvsr_benchmarks::conv_relu", mutates_args=())
def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """relu(3x3 convolution + bias + add) of NHWC pictures; on a GPU one operator of cuDNN's."""
    y, one = x.permute(0, 3, 1, 2), [1, 1]
    if x.device.type == "cpu":
        y = F.conv2d(y, weight, bias, padding=1)
        y = (y if add is None else y.add_(add.permute(0, 3, 1, 2))).relu_()
    elif add is None:
        y = torch.ops.aten.cudnn_convolution_relu(y, weight, bias, one, one, one, 1)
    else:
        add = add.permute(0, 3, 1, 2)
        y = torch.ops.aten.cudnn_convolution_add_relu(y, weight, add, 1.0, bias, one, one, one, 1)
    return y.permute(0, 2, 3, 1)


@conv_relu.register_fake
def _(x, weight, bias, add):
    return x.new_empty((*x.shape[:3], weight.shape[0]))


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution of NHWC pictures alone."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)


def enlarged(x: Tensor, grow: Tensor) -> Tensor:
    """Growth in time at the small size, then nearest enlargement; (N T, 2 H, 2 W, C)."""
    x = F.linear(x, grow)
    if len(grow) > grow.shape[1]:
        x = x.unflatten(3, (-1, grow.shape[1])).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0).permute(0, 2, 3, 1)


def grown(x: Tensor, grow: Tensor, weight: Tensor, relu: bool) -> Tensor:
    """Growth, enlargement and 3x3 convolution; (N T, 2 H, 2 W, O)."""
    x = enlarged(x, grow)
    return conv_relu(x, weight, None, None) if relu else conv(x, weight)


def matched(rgb: Tensor, source_mean: Tensor, source_std: Tensor) -> Tensor:
    """uint8 pictures from rgb (N, H, W, 3), about [0, 1], with mean and standard deviation (N, 1, 1, 3) of
    their source in [-1, 1].
    """
    var, mean = torch.var_mean(2 * rgb.float() - 1, (1, 2), correction=0, keepdim=True)
    y = (2 * rgb.float() - 1 - mean) / (var + EPS).sqrt() * source_std + source_mean
    return y.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def mean_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """What matched takes, from moments as flashvsr_kernels gives them."""
    mean, square = moments[:, :, None, None].unbind(1)
    return mean.float(), (square - mean * mean + EPS).sqrt().float()


def padded(x: Tensor, tail: Tensor) -> Tensor:
    """(B, T + 2, H + 2, W + 2, C): tail in front, borders replicated."""
    return F.pad(torch.cat([tail, x], 1), (0, 0, 1, 1, 1, 1), mode="replicate")


def conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuDNN's, of what padded gives."""
    return F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, stride=(2, 1, 1)).permute(0, 2, 3, 4, 1)


def im2col(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as a matrix product of all taps of all pixels; weight lies channels last, so is not copied."""
    taps = x.unfold(1, 4, 2).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 1, 2, 3, 5, 6, 7, 4)
    return F.linear(taps.flatten(4), weight.permute(0, 2, 3, 4, 1).flatten(1), bias)


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x, gamma.shape, gamma, 1e-24))


class _Block(nn.Module):
    def __init__(self, width: int, split: bool):
        super().__init__()
        self.split = split
        self.conv = nn.ModuleDict({"0": nn.Conv2d(2 * width, width, 3), "2": nn.Conv2d(width, width, 3),
                                   "4": nn.Conv2d(width, width, 3)})

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        first, second, third = self.conv.values()
        if self.split:
            past = memory if len(x) == 1 else torch.cat([memory, x[:-1]])
            y = conv_relu(x, self.now, first.bias, conv(past, self.before))
            memory.copy_(x[-1:])
        else:  # x and the step before it, side by side
            C = x.shape[3]
            memory[..., :C] = x
            memory[1:, ..., C:] = x[:-1]
            y = conv_relu(memory, first.weight, first.bias, None)
            memory[0, ..., C:] = x[-1]
        return conv_relu(conv_relu(y, second.weight, second.bias, None), third.weight, third.bias, x)

    def prepare(self) -> None:
        if self.split:
            self.now, self.before = (half.contiguous(memory_format=torch.channels_last)
                                     for half in self.conv["0"].weight.chunk(2, 1))


class PlainDecoder(nn.Module):
    """The modules have the official numbers for names; form: one of DECODER."""

    def __init__(self, config: FlashVSRConfig, tensors: dict[str, Tensor], form: str):
        super().__init__()
        self.split, widths = form.startswith("split"), config.decoder_channels
        self.latents = 2 if form.endswith("both") else 1  # of a call
        with torch.device("meta"):
            parts = {"1": nn.Conv2d(3 * LATENT_FRAMES * 64 + config.latent_channels, widths[0], 3),
                     "3": nn.Conv2d(widths[0], widths[0], 3, bias=False),
                     "24": nn.Conv2d(widths[3], widths[3], 3, bias=False), "26": nn.Conv2d(widths[3], 3, 3)}
            for (first, grow, last), C, out, steps in zip(_STAGES, widths, widths[1:], (1, 2, 2)):
                parts |= {str(i): _Block(C, self.split) for i in range(first, first + 3)}
                parts[str(grow)] = nn.ModuleDict({"conv": nn.Conv2d(C, steps * C, 1, bias=False)})
                parts[str(last)] = nn.Conv2d(C, out, 3, bias=False)
            self.decoder = nn.ModuleDict(parts)
        self.load_state_dict({name.removeprefix("decoder."): x for name, x in tensors.items()}, strict=True,
                             assign=True)
        self.requires_grad_(False).to(memory_format=torch.channels_last)
        self.blocks = [part for part in parts.values() if isinstance(part, _Block)]
        for block in self.blocks:
            block.prepare()

    def memory(self, h: int, w: int) -> list[Tensor]:
        """Zeros, for forward; h, w: of a latent"""
        kind, made = self.decoder["1"].weight, []
        for i, block in enumerate(self.blocks):
            steps, scale, C = self.latents * (1, 1, 2)[i // 3], 2 ** (i // 3), block.conv["2"].out_channels
            N, width = (1, C) if self.split else (steps, 2 * C)
            made.append(kind.new_zeros(N, scale * h, scale * w, width))
        return made

    def forward(self, latent: Tensor, cond: Tensor, memory: list[Tensor]) -> Tensor:
        """rgb (4 T, H, W, 3), about [0, 1], of latent (1, C, T, H/8, W/8) and cond (1, 4 T, H, W, 3)."""
        _, C, T, h, w = latent.shape
        parts = self.decoder
        x = cond.view(T, LATENT_FRAMES, h, 8, w, 8, 3).permute(0, 2, 4, 6, 1, 3, 5).reshape(T, h, w, -1)
        x = 3 * torch.tanh(torch.cat([x, latent[0].permute(1, 2, 3, 0)], -1) / 3)
        x = conv_relu(x, parts["1"].weight, parts["1"].bias, None)
        x = conv_relu(x, parts["3"].weight, None, None)
        for i, (first, grow, last) in enumerate(_STAGES):
            for j in range(3):
                x = parts[str(first + j)](x, memory[3 * i + j])
            x = grown(x, parts[str(grow)]["conv"].weight.flatten(1), parts[str(last)].weight, relu=i == 2)
        x = conv_relu(x, parts["24"].weight, None, None)
        return conv(x, parts["26"].weight, parts["26"].bias)


class PlainProjector(nn.Module):
    """Version v1.1, a whole chunk in one call; form: one of PROJECTOR."""

    def __init__(self, tensors: dict[str, Tensor], form: str):
        super().__init__()
        self.convolve = conv3d if form == "conv3d" else im2col
        for i in "12":
            weight = tensors[f"lq.conv{i}.weight"].contiguous(memory_format=torch.channels_last_3d)
            self.register_buffer(f"weight{i}", weight)
            self.register_buffer(f"bias{i}", tensors[f"lq.conv{i}.bias"])
            self.register_buffer(f"gamma{i}", tensors[f"lq.norm{i}.gamma"].flatten())
        self.register_buffer("out_weight", tensors["lq.linear_layers.0.weight"])
        self.register_buffer("out_bias", tensors["lq.linear_layers.0.bias"])

    def forward(self, frames: Tensor, tail: list[Tensor]) -> Tensor:
        """Tokens (1, T/4 * H/16 * W/16, dim) of frames (1, T, H, W, 3)."""
        x = F.pixel_unshuffle(frames[0].permute(0, 3, 1, 2), PATCH).permute(0, 2, 3, 1)[None]
        y = norm(self.convolve(padded(x, tail[0]), self.weight1, self.bias1), self.gamma1)
        z = norm(self.convolve(padded(y, tail[1]), self.weight2, self.bias2), self.gamma2)
        tail[0].copy_(x[:, -2:])
        tail[1].copy_(y[:, -2:])
        return F.linear(z.flatten(1, 3), self.out_weight, self.out_bias)
