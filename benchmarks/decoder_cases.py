"""The single calls that bench_decoder times: convolutions of decoder and projector, and the pixels' ends."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvsr_kernels import (adain_uint8, causal_conv3d, color_moments, conv3x3, enlarge, fold_upsample,
                              rgb_conv, rgb_head, upsample_conv)
from flashvsr_model.config import LATENT_FRAMES, PATCH, PRESETS, SCALE, SLICE_FRAMES, FlashVSRConfig

from .cases import DTYPES

BYTES = ("rgb_conv", "adain_uint8", "enlarge")  # bound by memory: held against a copy, not a matrix product
SHAPE = {"cuda": ("768x1408", "v1.1", "bf16"), "cpu": ("256x384", "compact", "fp32")}  # picture, preset, type
QUICK = ("first", "A", "B-past", "C-past", "D", "F-relu", "E", "G", "adain", "enlarge", "1-norm", "2-norm")
SMALL = ("B", "B-past", "C-residual")  # for check on a CPU: what takes most of compact's time


@dataclass(frozen=True)
class Case:
    """One call of an op.

    name: letter as in grid, and what else goes into the call: past, residual, relu (where it may lack), norm;
    one: as many pictures as the model's decoder takes at a time
    shape: of x    out: channels of the result    steps: of upsample_conv    dtype: key of DTYPES
    """
    op: str
    name: str
    shape: tuple[int, ...]
    out: int = 3
    steps: int = 1
    dtype: str = "bf16"

    @property
    def key(self) -> str:
        """Names the case, the same in every run."""
        return f"{self.op}/{self.name}/{'x'.join(map(str, self.shape))}-{self.out}/{self.dtype}"

    def has(self, what: str) -> bool:
        return what in self.name.split("-")

    @property
    def flop(self) -> float:
        """2 a product and sum; upsample_conv as folded, 4 taps an output pixel."""
        pixels, C = math.prod(self.shape[:-1]), self.shape[-1]
        if self.op == "upsample_conv":
            return 2 * pixels * self.steps * 4 * 4 * C * self.out
        if self.op == "rgb_head":
            return 2 * 4 * pixels * self.out * (4 * C + 9 * self.out + 9 * 3)
        if self.op == "causal_conv3d":
            return 2 * pixels // 2 * 36 * C * self.out
        return 2 * pixels * 9 * C * (2 if self.has("past") else 1) * self.out

    @property
    def bytes(self) -> float:
        """Read and written once; weights, moments and what overlaps do not count."""
        pixels, size = math.prod(self.shape[:-1]), DTYPES[self.dtype].itemsize
        if self.op == "enlarge":
            return pixels * 3 * (1 + SCALE ** 2)
        rgb = 4 * 3  # float32 between the last convolution and the bytes
        return pixels * (rgb + 3) if self.op == "adain_uint8" else pixels * (size * self.shape[-1] + rgb)


def grid(device: str, quick: bool = False, picture: str | None = None) -> list[Case]:
    """The cases of a device, "cuda" or "cpu", all or a few; picture: output HEIGHTxWIDTH, multiples of 128.

    A, B, C, D: the decoder's widths from full to an eighth of the size    F: growth, enlargement, 3x3
    1, 2: the projector's convolutions for the 8 frames of a steady chunk    E: 3x3 to red, green and blue
    G: a frame of the decoder's end, an F without growth, an A and an E
    """
    usual, preset, dtype = SHAPE[device]
    config = PRESETS[preset]
    H, W = (int(side) for side in (picture or usual).split("x"))
    a, b, c, d = config.decoder_channels
    inside = 3 * LATENT_FRAMES * 64 + config.latent_channels

    def conv(name: str, N: int, scale: int, C: int, O: int) -> Case:
        return Case("conv3x3", name, (N, H // scale, W // scale, C), O, dtype=dtype)

    def grown(name: str, N: int, scale: int, C: int, O: int, steps: int) -> Case:
        return Case("upsample_conv", name, (N, H // scale, W // scale, C), O, steps, dtype)
    cases = [conv("first", 2, 8, inside, a), conv("A", 4, 1, d, d), conv("A-residual", 4, 1, d, d)]
    for name, N, scale, C in (("B", 4, 2, c), ("C", 2, 4, b), ("D", 2, 8, a)):
        cases += [conv(name + form, N, scale, C, C) for form in ("", "-past", "-residual")]
    cases += [grown("F-512", 2, 8, a, b, 1), grown("F-256", 2, 4, b, c, 2), grown("F-relu", 2, 2, c, d, 2)]
    cases += [conv("A-one", 1, 1, d, d), conv("B-past-one", 1, 2, c, c), conv("C-past-one", 1, 4, b, b),
              conv("D-past-one", 1, 8, a, a), grown("F-relu-one", 1, 2, c, d, 1)]
    cases += [Case("rgb_head", "G", (1, H // 2, W // 2, c), d, dtype=dtype),
              Case("rgb_conv", "E", (LATENT_FRAMES, H, W, d), dtype=dtype),
              Case("adain_uint8", "adain", (SLICE_FRAMES, H, W, 3), dtype=dtype),
              Case("enlarge", "enlarge", (SLICE_FRAMES, H // SCALE, W // SCALE, 3), dtype=dtype)]
    cases += [case for form in ("", "-norm") for case in _projector(config, form, H, W, dtype)]
    return [case for case in cases if not quick or case.name in (QUICK if device == "cuda" else SMALL)]


def _projector(config: FlashVSRConfig, form: str, H: int, W: int, dtype: str) -> list[Case]:
    size, (one, two) = (H // PATCH, W // PATCH), config.lq_hidden
    return [Case("causal_conv3d", f"1{form}", (1, SLICE_FRAMES, *size, 3 * PATCH * PATCH), one, dtype=dtype),
            Case("causal_conv3d", f"2{form}", (1, SLICE_FRAMES // 2, *size, one), two, dtype=dtype)]


Inputs = tuple[Tensor | bool | None, ...]


def inputs(case: Case, device: str, seed: int = 1) -> Inputs:
    """Random tensors, by op:

    conv3x3: x, weight, bias, past, residual    upsample_conv: x, weight (O, C, 3, 3), grow (T C, C), relu
    causal_conv3d: x, weight, bias, tail, gamma    rgb_conv: x, weight, bias
    rgb_head: x, weight (D, C, 3, 3) to be folded, the hidden one, the last one, bias
    adain_uint8: rgb, its moments, moments of a source    enlarge: frames
    Weights lie channels last, as the model holds them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype, C, O = DTYPES[case.dtype], case.shape[-1], case.out

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)
    if case.op == "enlarge":
        return torch.randint(0, 256, case.shape, device=device, generator=generator, dtype=torch.uint8),
    if case.op == "adain_uint8":
        rgb, source = rand(*case.shape, scale=.2).float() + .5, rand(*case.shape, scale=.3)
        return rgb, color_moments(2 * rgb - 1), color_moments(source)
    x, bias = rand(*case.shape), rand(O, scale=.1)
    if case.op == "causal_conv3d":
        weight = rand(O, C, 4, 3, 3, scale=(36 * C) ** -.5).contiguous(memory_format=torch.channels_last_3d)
        return x, weight, bias, rand(len(x), 2, *case.shape[2:]), rand(O) if case.has("norm") else None
    K = 2 * C if case.has("past") else C
    weight = rand(O, K, 3, 3, scale=(9 * K) ** -.5).contiguous(memory_format=torch.channels_last)
    if case.op == "rgb_head":
        hidden, last = (rand(n, O, 3, 3, scale=(4 * O) ** -.5).contiguous(memory_format=torch.channels_last)
                        for n in (O, 3))
        return x, weight, hidden, last, bias[:3]
    if case.op == "upsample_conv":
        return x, weight, rand(case.steps * C, C, scale=C ** -.5), case.has("relu")
    if case.op == "rgb_conv":
        return x, weight, bias
    return (x, weight, bias, rand(*case.shape) if case.has("past") else None,
            rand(*case.shape[:3], O) if case.has("residual") else None)


def exact(case: Case, call: Inputs) -> Tensor:
    """What the call should give, by the reference in float32."""
    wide = [x.float() if isinstance(x, Tensor) and x.dtype in DTYPES.values() else x for x in call]
    # Which of its float32 algorithms cuDNN takes does not matter here: no time is lost on trying all.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return ours("reference", case, wide)()


def ours(backend: str, case: Case, call: Inputs) -> Callable[[], Tensor]:
    """The case by one of our backends. Weights are folded here."""
    if case.op == "conv3x3":
        x, weight, bias, past, residual = call
        return lambda: conv3x3(x, weight, bias, past=past, residual=residual, relu=True, backend=backend)
    if case.op == "upsample_conv":
        x, weight, grow, relu = call
        folded = fold_upsample(weight, grow)
        return lambda: upsample_conv(x, folded, relu=relu, backend=backend)
    if case.op == "rgb_head":
        x, weight, *rest = call
        grown = fold_upsample(weight)
        return lambda: rgb_head(x, grown, *rest, out_dtype=torch.float32, backend=backend)[0]
    if case.op == "causal_conv3d":
        *rest, gamma = call
        return lambda: causal_conv3d(*rest, gamma=gamma, backend=backend)
    if case.op == "rgb_conv":
        return lambda: rgb_conv(*call, out_dtype=torch.float32, backend=backend)[0]
    return lambda: {"adain_uint8": adain_uint8, "enlarge": enlarge}[case.op](*call, backend=backend)


def error(got: Tensor, true: Tensor) -> float:
    """RMS error over RMS."""
    return ((got.float() - true.float()).square().mean() / true.float().square().mean()).sqrt().item()
