"""A model of random weights and a stream through it, as bench_upscaler and check time them."""
import itertools
import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr_model import PRESETS, FlashVSRConfig, StreamingUpscaler
from flashvsr_model.config import FIRST_FRAMES, SCALE, SLICE_FRAMES
from flashvsr_model.fuse import expected_shapes
from flashvsr_model.state import Geometry

from .cases import DTYPES

SHAPE = {"cuda": ("768x1408", "v1.1", "bf16"), "cpu": ("256x384", "compact", "fp32")}  # size, preset, type
FEWEST = FIRST_FRAMES + SLICE_FRAMES  # frames of a clip that has a steady chunk
Stamp = float | torch.cuda.Event


@dataclass(frozen=True)
class Case:
    """size: output HEIGHTxWIDTH, multiples of 4    preset: key of PRESETS    dtype: key of DTYPES
    sparse_ratio: instead of the preset's
    """
    size: str
    preset: str
    dtype: str
    sparse_ratio: float

    @property
    def key(self) -> str:
        """Names the case, the same in every run."""
        return f"{self.size}/{self.preset}/{self.dtype}/ratio{self.sparse_ratio:g}"

    @property
    def config(self) -> FlashVSRConfig:
        return replace(PRESETS[self.preset], sparse_ratio=self.sparse_ratio)

    @property
    def geometry(self) -> Geometry:
        height, width = (int(side) // SCALE for side in self.size.split("x"))
        return Geometry.of(height, width, self.config.margin)


def usual(device: str) -> Case:
    """The case of a device, "cuda" or "cpu"."""
    size, preset, dtype = SHAPE[device]
    return Case(size, preset, dtype, PRESETS[preset].sparse_ratio)


def random_model(config: FlashVSRConfig, dtype: str, device: str) -> StreamingUpscaler:
    """Weights that keep variances: normal numbers over the root of what is summed, norms about 1. How many
    blocks attention keeps is the budget's affair, as with trained weights; how the counts vary is not like
    theirs.
    """
    generator = torch.Generator(device).manual_seed(1)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        z = torch.randn(shape, device=device, generator=generator)
        if name == "context":
            return z
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")):
            return 1 + .1 * z
        if name.endswith("bias"):
            return .05 * z
        return .1 * z if "modulation" in name else z / math.sqrt(math.prod(shape[1:]))
    tensors = {name: drawn(name, shape) for name, shape in expected_shapes(config).items()}
    return StreamingUpscaler.from_tensors(config, tensors, device=device, dtype=DTYPES[dtype])


def random_clip(frames: int, height: int, width: int) -> Tensor:
    """uint8 (frames, height, width, 3) on the host: large shapes that move, and noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 2 + frames // 5, 2 + height // 16, 2 + width // 16, generator=generator)
    clip = F.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0].permute(1, 2, 3, 0)
    noise = torch.randint(-12, 13, clip.shape, generator=generator, dtype=torch.int8)
    return (255 * clip + noise).clamp_(0, 255).to(torch.uint8)


class Stream:
    """A case's model, a state, and the clip whose frames go through it, on and on.

    model: of the case's preset and dtype, on any device; its weights are shared
    frames: of the clip, FEWEST or more
    """

    def __init__(self, case: Case, model: StreamingUpscaler, frames: int):
        self.case, self.device, g = case, model.device.type, case.geometry
        self.model = StreamingUpscaler(case.config, model.dit, model.lq_proj, model.decoder)
        self.clip = random_clip(frames, g.height, g.width)
        self.state = self.model.new_state(g.height, g.width, graphs=self.device == "cuda")
        rest = self.clip[FIRST_FRAMES:]
        self._steady = itertools.cycle(rest[:len(rest) // SLICE_FRAMES * SLICE_FRAMES].split(SLICE_FRAMES))

    def start(self) -> None:
        """From the first chunk to where all that steady chunks need has been compiled and recorded."""
        self.state.reset()
        self.model.push(self.state, self.clip[:FIRST_FRAMES])
        for _ in range(self.state.kv.slots + 2):
            self.push()

    def push(self) -> Tensor:
        """One steady chunk: (8, H, W, 3) uint8 on the device, which may still be at it."""
        return self.model.push(self.state, next(self._steady))

    def whole(self) -> tuple[float, float]:
        """Seconds of the clip from its first frame pushed to the first ones done, and to the last."""
        self.state.reset()
        given, first, begin = 0, None, stamp(self.device)
        for frames in (self.clip[:FIRST_FRAMES], *self.clip[FIRST_FRAMES:].split(SLICE_FRAMES)):
            given += len(self.model.push(self.state, frames))
            first = first or stamp(self.device)
        given += len(self.model.flush(self.state))
        end = stamp(self.device)
        if given != len(self.clip):
            raise RuntimeError(f"{len(self.clip)} frames went in, {given} came out")
        return seconds(begin, first), seconds(begin, end)


def stamp(device: str) -> Stamp:
    """The moment at which what was launched so far has run."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def wait(moment: Stamp) -> None:
    """Until the moment has come."""
    if not isinstance(moment, float):
        moment.synchronize()


def seconds(start: Stamp, end: Stamp) -> float:
    """From start to end, which is waited for."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
