"""Where training starts: a decoder that already enlarges its input, as well as a linear filter can.

From random weights the tiny decoder needs most of a run to learn that its output looks like its input. It has
no skip connection, and worse: nearest enlargement and 3x3 kernels treat all pixels of a cell alike, so what
is constant over the cells of 8x8 pixels stays constant, and a pattern of exactly that period cannot come out
at all. The transformer's output can tell cells apart, though: its head has a bias for each of a token's 2x2
latents. So

- two latent channels carry the parity of the cell's column and row,
- the first memory block at 1/4 resolution makes of them which half of its cell a pixel is in,
- the second lets each pixel pick its own out of the cell's 2x2 low-resolution pixels (ReLU of value + gate),
- the rest interpolates linearly, with kernels fitted in seconds on one colour of one frame.

All other weights stay random, and what they feed into starts small. A constant channel lifts signals above
ReLU's zero.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LATENT_FRAMES, FlashVSRConfig
from .data import ClipSource
from .degradation import SCALE, degrade

CELL = 8                      # pixels, side of what one position at 1/8 resolution stands for
SERIES = 3 * LATENT_FRAMES    # of one colour of one frame each
OFFSET = 1.25                 # added to every signal while it passes through ReLUs
GATE = 4.0                    # what is taken off a low-resolution pixel that is not this position's
NOISE = 0.03                  # standard deviation of what fitted kernels must bear
PARITY = 1.0                  # amplitude of the two latent channels


class LinearDecoder(nn.Module):
    """One colour of one frame through the decoder's convolutions, with the choice of pixels as a pixel
    shuffle.
    """

    def __init__(self, half: int, full: int, generator: torch.Generator):
        """half, full: channels for each (colour, frame) at 1/2 and full resolution"""
        super().__init__()
        sizes = {"first": (4, CELL * CELL), "up2": (half, 1), "up3": (full, half), "out1": (full, full),
                 "out2": (1, full)}
        self.kernels = nn.ParameterDict({
            name: torch.randn(*size, 3, 3, generator=generator) / (9 * size[1]) ** 0.5
            for name, size in sizes.items()})
        with torch.no_grad():  # each of the four starts as the mean of its own 4x4 pixels
            first = self.kernels["first"].mul_(0.1)
            first.view(2, 2, 2, 4, 2, 4, 3, 3)[[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], :,
                                               [0, 1, 0, 1], :, 1, 1] += 1 / 16

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, H, W) to the same shape, and how far signals on the way leave the range that OFFSET makes
        room for.

        Signals get noise on their way, equal in every call: large kernels that cancel would not survive bf16
        nor training.
        """
        noise = torch.Generator(x.device).manual_seed(0)

        def disturb(x: Tensor) -> Tensor:
            return x + NOISE * torch.randn(x.shape, device=x.device, generator=noise)
        x = F.pixel_shuffle(F.conv2d(F.pixel_unshuffle(x, CELL), self.kernels["first"], padding=1), 2)
        outside = x.new_zeros(())
        for name in ("up2", "up3", "out1"):
            if name != "out1":
                x = F.interpolate(disturb(x), scale_factor=2, mode="nearest")
            x = disturb(F.conv2d(x, self.kernels[name], padding=1))
            outside = outside + (-OFFSET - x).add(0.1).relu().square().mean()
        return F.conv2d(x, self.kernels["out2"], padding=1), outside


def fit(config: FlashVSRConfig, source: ClipSource, *, clips: int = 32, size: int = 128,
        iterations: int = 100, seed: int = 0) -> tuple[LinearDecoder, float]:
    """A LinearDecoder that makes high-resolution frames of enlarged low-resolution ones, and its PSNR in dB.

    By L-BFGS on all pixels of one set of clips: products of kernels are badly conditioned, Adam stays 2 dB
    behind.
    """
    half, full = (config.decoder_channels[2] - 1) // 6, (config.decoder_channels[3] - 1) // 3
    model = LinearDecoder(half, full, torch.Generator().manual_seed(seed)).to(source.device)
    hr = source.batch(clips, 1, size, size)
    lr = degrade(hr, torch.Generator(source.device).manual_seed(seed))
    large = F.interpolate(lr.flatten(0, 1), scale_factor=SCALE, mode="bicubic",
                          antialias=True).flatten(0, 1)[:, None] * 2 - 1
    target = hr.flatten(0, 2)[:, None] * 2 - 1
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=iterations, history_size=30,
                                  line_search_fn="strong_wolfe")

    def errors() -> tuple[Tensor, Tensor]:
        out, outside = model(3 * torch.tanh(large / 3))
        return (out - target)[..., CELL:-CELL, CELL:-CELL].square().mean(), outside

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(errors())
        loss.backward()
        return loss
    optimizer.step(closure)
    return model, float(-10 * torch.log10(errors()[0].detach() / 4))


@torch.no_grad()
def lay_in(weights: dict[str, Tensor], config: FlashVSRConfig, fitted: LinearDecoder, *,
           branch: float = 0.0) -> None:
    """Writes the construction into weights (official names), in place; random residual branches are scaled by
    branch.
    """
    w = {name.removeprefix("decoder.decoder."): t for name, t in weights.items()
         if name.startswith("decoder.")}
    kernels = {name: kernel.detach().cpu() for name, kernel in fitted.kernels.items()}
    for name, t in w.items():
        if name.endswith("conv.4.weight"):
            t.mul_(branch)
    # (row, column, channel) of a token
    head = weights["dit.head.head.weight"].view(2, 2, config.latent_channels, -1)
    bias = weights["dit.head.head.bias"].view(2, 2, config.latent_channels)
    head[:, :, :2] = 0
    sign = torch.tensor([1.0, -1.0]) * -PARITY  # the latent is minus the transformer's output
    bias[:, :, 0], bias[:, :, 1] = sign[None, :], sign[:, None]
    _cells(w, config, kernels["first"])
    _which_half(w, 11)
    _choose_pixels(w, 12)
    _interpolate(w, kernels)


# Channels: 4 s ... 4 s + 3 the low-resolution pixels (row, column) of a cell for series s = 3 frame + colour;
# at 1/4 resolution 4 s becomes the position's own one. Behind them: parity of column and row, the constant,
# the two halves.
PARITY_AT, ONE_AT, HALF_AT, FREE_AT = 4 * SERIES, 4 * SERIES + 2, 4 * SERIES + 3, 4 * SERIES + 5


def _cells(w: dict[str, Tensor], config: FlashVSRConfig, first: Tensor) -> None:
    """1/8 resolution, and enlargement to 1/4: all channels copied."""
    inside = 3 * LATENT_FRAMES * CELL * CELL
    w["1.weight"][:HALF_AT] = 0
    for s in range(SERIES):
        frame, colour = divmod(s, 3)
        cond = w["1.weight"][4 * s:4 * s + 4, :inside].view(4, 3, LATENT_FRAMES, CELL, CELL, 3, 3)
        cond[:, colour, frame] = first.view(4, CELL, CELL, 3, 3)
    squashed = 3 * torch.tanh(torch.tensor(PARITY / 3))
    for axis in range(2):
        w["1.weight"][PARITY_AT + axis, inside + axis, 1, 1] = PARITY / squashed
    w["1.bias"][:HALF_AT] = OFFSET
    w["3.weight"][:HALF_AT] = 0
    w["9.conv.weight"][:HALF_AT] = 0
    w["10.weight"][:FREE_AT] = 0
    for c in range(HALF_AT):
        w["3.weight"][c, c, 1, 1] = w["9.conv.weight"][c, c] = w["10.weight"][c, c, 1, 1] = 1


def _which_half(w: dict[str, Tensor], block: int) -> None:
    """HALF_AT gets 1 in the right half of a cell, else 0, and the channel after it 1 in the lower half.

    With p the parity and d its difference to the left minus to the right, |p + d| is 3 (at the picture's
    border 2) in the right half and at most 1 in the left: 1 is a ramp of it from 1 to 2.
    """
    for n in (0, 2, 4):
        w[f"{block}.conv.{n}.weight"][:8] = w[f"{block}.conv.{n}.bias"][:8] = 0
    w[f"{block}.conv.4.weight"][HALF_AT:FREE_AT] = 0
    hidden = 0
    for axis in range(2):
        for side in (1.0, -1.0):
            for start in (1.0, 2.0):
                row = w[f"{block}.conv.0.weight"][hidden]
                taps = (((1, 1, 1.0), (1, 0, 1.0), (1, 2, -1.0)) if axis == 0
                        else ((1, 1, 1.0), (0, 1, 1.0), (2, 1, -1.0)))
                for y, x, value in taps:
                    row[PARITY_AT + axis, y, x] = side * value
                    # takes the parity's offset off; zero outside the picture as well
                    row[ONE_AT, y, x] -= side * value
                w[f"{block}.conv.0.bias"][hidden] = -start
                w[f"{block}.conv.2.weight"][hidden, hidden, 1, 1] = 1
                w[f"{block}.conv.4.weight"][HALF_AT + axis, hidden, 1, 1] = 1.0 if start == 1.0 else -1.0
                hidden += 1


def _choose_pixels(w: dict[str, Tensor], block: int) -> None:
    """Channel 4 s becomes the low-resolution pixel of the position itself."""
    first, second, third = (w[f"{block}.conv.{n}.weight"] for n in (0, 2, 4))
    for n, used in ((0, 5 * SERIES), (2, 2 * SERIES)):
        w[f"{block}.conv.{n}.weight"][:used] = w[f"{block}.conv.{n}.bias"][:used] = 0
    third[:4 * SERIES] = 0
    third[:, :2 * SERIES] = 0
    for s in range(SERIES):
        for row in range(2):
            for column in range(2):
                hidden = 4 * s + 2 * row + column
                first[hidden, hidden, 1, 1] = 1
                for half, wanted in ((HALF_AT, column), (HALF_AT + 1, row)):
                    first[hidden, half, 1, 1] = GATE if wanted else -GATE
                w[f"{block}.conv.0.bias"][hidden] = -GATE * (row + column)
                second[s, hidden, 1, 1] = 1
        first[4 * SERIES + s, 4 * s, 1, 1] = second[SERIES + s, 4 * SERIES + s, 1, 1] = 1
        third[4 * s, s, 1, 1], third[4 * s, SERIES + s, 1, 1] = 1, -1


def _interpolate(w: dict[str, Tensor], kernels: dict[str, Tensor]) -> None:
    """From 1/4 resolution to the picture. In front stand the channels of each (frame, colour), last the
    constant.
    """
    half, full = kernels["up2"].shape[0], kernels["up3"].shape[0]
    for grow, conv, kernel, frames, stride, one in (("15.conv.weight", "16.weight", "up2", 2, 4, ONE_AT),
                                                    ("21.conv.weight", "22.weight", "up3", 1, half, -1)):
        width, inside = w[grow].shape[1], kernels[kernel].shape[1]
        used = 3 * frames * inside
        for step in range(2):  # each of the two time steps takes its own frames to the front
            part = w[grow][step * width:(step + 1) * width]
            part[:used], part[-1] = 0, 0
            for s in range(3 * frames):
                for i in range(inside):
                    part[s * inside + i, (3 * frames * step + s) * stride + i] = 1
            part[-1, one] = 1
        _spread(w[conv], kernels[kernel], 3 * frames)
    _spread(w["24.weight"], kernels["out1"], 3)
    w["26.weight"].zero_()
    for colour in range(3):
        w["26.weight"][colour, colour * full:(colour + 1) * full] = kernels["out2"][0] / 2
        w["26.weight"][colour, -1] = -kernels["out2"][0].sum(0) / 2
    w["26.bias"].fill_(0.5)  # from [-1, 1] to [0, 1]


def _spread(weight: Tensor, kernel: Tensor, series: int) -> None:
    """weight (O, C, 3, 3): kernel for each of the series, offsets kept, the constant from last channel to
    last channel.
    """
    out, inside = kernel.shape[:2]
    weight[:series * out] = weight[-1] = 0
    for s in range(series):
        weight[s * out:(s + 1) * out, s * inside:(s + 1) * inside] = kernel
    # The constant channel takes each tap's offset off, outside the picture as well, and gives the result its
    # own.
    weight[:series * out, -1] = -kernel.sum(1).repeat(series, 1, 1)
    weight[:series * out, -1, 1, 1] += 1
    weight[-1, -1, 1, 1] = 1
