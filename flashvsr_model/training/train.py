"""Trains the compact weights: python -m flashvsr_model.training.train PACK OUT [--minutes 10] \
[--start WEIGHTS]

Directly for one step: degraded low-resolution clips in, high-resolution clips out, through the same code that
upscales streams, chunk after chunk, with gradients. The learning rate follows the clock, so a run ends when
it was told to.
"""
import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import FIRST_FRAMES, LOOKAHEAD, PRESETS, SCALE, SLICE_FRAMES, FlashVSRConfig
from ..decoder import Decoder
from ..dit import DiT
from ..fuse import expected_shapes, fuse_decoder, fuse_dit, fuse_lq
from ..lq_proj import LQProjector
from ..state import Geometry
from ..upscaler import StreamingUpscaler
from ..weights import load_compact, save_compact
from . import skeleton
from .data import ClipSource
from .degradation import degrade
from .losses import LossWeights, total


LOG_STEPS = 100
FULL_RATE_INPUTS = 64   # weights with more inputs learn at a rate that falls with their number


@dataclass(frozen=True)
class Recipe:
    """minutes: of the run    batch: clips a step    size: side of a clip, output pixels
    frames: input frames of a clip, 25 for the first chunk and 8 for each after it
    rate: the highest learning rate
    """
    minutes: float = 10.0
    batch: int = 6
    size: int = 256
    frames: int = 41
    rate: float = 6e-4
    warmup: float = 0.08
    clip_norm: float = 1.0
    average: float = 0.998
    seed: int = 0


class GrowingKV:
    """state.KVRing for training: keeps tensors instead of writing over them, so gradients can flow from chunk
    to chunk.
    """

    def __init__(self, config: FlashVSRConfig):
        self.slots, self.written = config.ring_slices, 0
        self.kept: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * config.num_layers

    def begin(self, slices: int, slice_blocks: int) -> None:
        self.chunk, self.blocks = slices, min(self.slots, self.written + slices) * slice_blocks

    def slot(self, layer: int) -> None:
        return None

    def append(self, layer: int, k: Tensor, v: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kept[layer] is not None:
            old = self.kept[layer]
            k, v, mean = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1), torch.cat([old[2], mean], 2)
        tokens = self.blocks * 128
        self.kept[layer] = k[:, -tokens:], v[:, -tokens:], mean[:, :, -self.blocks:]
        return self.kept[layer]

    def end(self) -> None:
        self.written += self.chunk


class ClipState:
    """What StreamingUpscaler.step reads and writes, for a batch of training clips."""

    def __init__(self, config: FlashVSRConfig, batch: int, size: int, dtype: torch.dtype,
                 device: torch.device):
        self.geometry, self.kv = Geometry.of(size // SCALE, size // SCALE), GrowingKV(config)
        self.chunk = self.time = 0
        self.noise = None
        side = size // 16
        self.lq_tail = [torch.zeros(batch, 2, side, side, width, dtype=dtype, device=device)
                        for width in (768, config.lq_hidden[0])]
        self.decoder = [[torch.zeros(batch, 2 * side << stage, 2 * side << stage, width, dtype=dtype, device=device)
                         for _ in range(3)] for stage, width in enumerate(config.decoder_channels[:3])]
        self.turning = nullcontext  # all that is remembered is a tensor of its own


class Trainee(nn.Module):
    """The model as a function of its weights, over whole clips."""

    def __init__(self, config: FlashVSRConfig, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.dit, self.lq_proj, self.decoder = DiT(config), LQProjector(config), Decoder(config)
        self.to(device, dtype)
        self.upscaler = StreamingUpscaler(config, self.dit, self.lq_proj, self.decoder)

    def forward(self, source: Tensor) -> Tensor:
        """(B, T, H, W, 3) enlarged input in [-1, 1] to (B, T - 4, H, W, 3), about [0, 1]."""
        state = ClipState(self.upscaler.config, len(source), source.shape[2], self.upscaler.dtype,
                          source.device)
        out = list(self.upscaler.step(state, source[:, :FIRST_FRAMES]))
        for end in range(FIRST_FRAMES + SLICE_FRAMES, source.shape[1] + 1, SLICE_FRAMES):
            out += self.upscaler.step(state, source[:, end - SLICE_FRAMES - LOOKAHEAD:end])
        return torch.stack([frame for frame, _ in out], 1)


def initial(config: FlashVSRConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights in the official names. Residual branches start small, the time step without effect."""
    made = {}
    for name, shape in expected_shapes(config).items():
        fan_in = math.prod(shape[1:])
        z = torch.randn(shape, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")):
            z = torch.ones(shape)
        elif name == "decoder.decoder.26.bias":
            z = torch.full(shape, 0.5)  # grey, and weights so small that the first pictures are nearly that
        elif name.endswith("bias") or "time_projection" in name:
            z = torch.zeros(shape)
        elif name.endswith("modulation"):
            z = torch.zeros(shape)
            if shape[1] == 6:
                z[:, [2, 5]] = 1  # the gates
        elif name == "decoder.decoder.3.weight":
            z = nn.init.dirac_(torch.empty(shape)) + 0.1 * z / fan_in ** 0.5
        elif name.startswith("decoder") and "conv." in name and len(shape) == 4 and shape[2] == 3:
            z *= (2 / fan_in) ** 0.5 * (0.1 if name.endswith("conv.4.weight") else 1)
        elif name != "context":
            if name == "decoder.decoder.26.weight":
                z *= 0.1
            z *= fan_in ** -0.5 * (0.3 if name.endswith((".o.weight", "ffn.2.weight")) else 1)
        made[name] = z
    return made


def enlarge(lr: Tensor) -> Tensor:
    """(n, T, 3, h, w) in [0, 1] to (n, T, 4h, 4w, 3) in [-1, 1], rounded to 8 bits as Pillow's bicubic is."""
    large = F.interpolate(lr.flatten(0, 1), scale_factor=SCALE, mode="bicubic", antialias=True)
    large = (large * 255).round_().clamp_(0, 255) / 127.5 - 1
    return large.unflatten(0, lr.shape[:2]).permute(0, 1, 3, 4, 2)


def fuse(config: FlashVSRConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    parts = {"dit": fuse_dit(config, weights), "lq_proj": fuse_lq(config, weights), "decoder": fuse_decoder(weights)}
    return {f"{part}.{name}": t.to(dtype) for part, state in parts.items() for name, t in state.items()}


class GradientStep:
    """Loss and gradients of one batch. On a GPU the first call records a CUDA graph: launching its thousands
    of small kernels one by one takes three times as long as running them (88 ms recorded, 320 ms not, on an
    H100).
    """

    def __init__(self, trainee: Trainee, weights: dict[str, Tensor]):
        self.trainee, self.weights = trainee, weights
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """source: (n, T, H, W, 3) enlarged input    target: (n, T, 3, H, W).

        Returns the parts of the loss.
        """
        if not source.is_cuda:
            return self._run(source, target)
        if self.graph is None:
            self._record(source, target)
        self.source.copy_(source)
        self.target.copy_(target)
        self.graph.replay()
        return {name: value.clone() for name, value in self.seen.items()}

    def _run(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        config, dtype = self.trainee.upscaler.config, self.trainee.upscaler.dtype
        out = torch.func.functional_call(self.trainee, fuse(config, self.weights, dtype), (source,))
        pred, target = out.permute(0, 1, 4, 2, 3).float(), target[:, :out.shape[1]]
        loss, seen = total(pred, target, LossWeights())
        for w in self.weights.values():
            w.grad = None
        loss.backward()
        return seen | {"mse": F.mse_loss(pred.detach(), target)}

    def _record(self, source: Tensor, target: Tensor) -> None:
        self.source, self.target = source.clone(), target.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries choose their algorithms and allocate here, which a recording must not
            for _ in range(3):
                self._run(self.source, self.target)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.seen = self._run(self.source, self.target)


def train(config: FlashVSRConfig, source: ClipSource, recipe: Recipe, weights: dict[str, Tensor],
          device: torch.device, dtype: torch.dtype,
          log: Callable[[dict, dict[str, Tensor]], None]) -> dict[str, Tensor]:
    """The running average of the weights after recipe.minutes. log: called with figures and that average
    every 100 steps.
    """
    noise = torch.Generator(device).manual_seed(recipe.seed)
    master = {name: w.to(device, torch.float32).requires_grad_() for name, w in weights.items()}
    average = {name: w.detach().clone() for name, w in master.items()}
    gradients = GradientStep(Trainee(config, device, dtype), master)
    # Adam moves every weight alike, and behind a ReLU all inputs push one way: a step must shrink with their
    # number.
    groups: dict[float, list[Tensor]] = {}
    for w in master.values():
        groups.setdefault(min(1.0, FULL_RATE_INPUTS / math.prod(w.shape[1:])), []).append(w)
    optimizer = torch.optim.AdamW([{"params": ws, "share": share} for share, ws in groups.items()],
                                  lr=recipe.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    start, step, parts = time.monotonic(), 0, {}
    while (done := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        rate = recipe.rate * min(1, done / recipe.warmup + 0.001) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        hr = source.batch(recipe.batch, recipe.frames, recipe.size, recipe.size)
        seen = gradients(enlarge(degrade(hr, noise)), hr)
        norm = nn.utils.clip_grad_norm_(master.values(), recipe.clip_norm)
        optimizer.step()
        keep = min(recipe.average, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [w.detach() for w in master.values()], 1 - keep)
        parts = {name: parts.get(name, 0) + value for name, value in (seen | {"norm": norm}).items()}
        step += 1
        if step % LOG_STEPS == 0:
            means = {name: round(float(value) / LOG_STEPS, 5) for name, value in parts.items()}
            if not all(math.isfinite(value) for value in means.values()):
                raise FloatingPointError(f"training diverged before step {step}: {means}")
            log({"step": step, "seconds": round(time.monotonic() - start, 1), "rate": round(rate, 6),
                 "psnr": round(-10 * math.log10(means.pop("mse")), 2)} | means, average)
            parts = {}
    return average


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flashvsr_model.training.train",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("pack", type=Path, help="folder made by flashvsr_model.training.pack")
    parser.add_argument("out", type=Path, help="safetensors file to write, in float16")
    parser.add_argument("--start", type=Path, help="weights to go on from; random ones if not given")
    parser.add_argument("--device", default="cuda")
    for name in ("minutes", "batch", "size", "frames", "rate", "seed"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    recipe = Recipe(args.minutes, args.batch, args.size, args.frames, args.rate, seed=args.seed)
    config, device = PRESETS["compact"], torch.device(args.device)
    source = ClipSource(args.pack, device, seed=recipe.seed)
    if args.start:
        config, weights = load_compact(args.start)
    else:
        weights = initial(config, torch.Generator().manual_seed(recipe.seed))
        fitted, psnr = skeleton.fit(config, source, seed=recipe.seed)
        print(json.dumps({"linear_psnr": round(psnr, 2)}), flush=True)
        skeleton.lay_in(weights, config, fitted)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = True

    def log(figures: dict, average: dict[str, Tensor]) -> None:
        print(json.dumps(figures), flush=True)
        if figures["step"] % 1000 == 0:
            save(average)

    def save(average: dict[str, Tensor]) -> None:
        save_compact(args.out, config, {name: w.half().cpu() for name, w in average.items()})
    save(train(config, source, recipe, weights, device, dtype, log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
