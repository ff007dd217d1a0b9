"""Runs golden streams of the official model through ours: python -m tests.golden FILE... [--device cuda] \
[--dtype bf16]

A file holds what the official model put out for a procedural clip and drawn weights; both are made again here
from the file's metadata. For each kind of key the worst relative error is printed; the exit status is 1 if
one is over its bound.
"""
import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flashvsr_kernels import BlockMask
from flashvsr_model import FlashVSRConfig, StreamingUpscaler, dit
from flashvsr_model.color import match_color
from flashvsr_model.config import SCALE
from flashvsr_model.fuse import expected_shapes

# Bounds for float32: relative (norm of the difference over norm), frames_mean absolute, block_mask entries.
BOUNDS = {"block_mask": 0, "lq_tokens": 1e-5, "velocity": 1e-5, "decoded": 1e-5, "frames": 1e-4,
          "frames_std": 1e-4, "frames_mean": 1e-5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The tensor of a name: normal numbers from the name's checksum, scaled by what the name says it is."""
    z = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(
        shape).astype(np.float32)
    if name in ("context", "noise"):
        return torch.from_numpy(z)
    if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")):
        return torch.from_numpy(1 + 0.1 * z)
    if name.endswith("bias"):
        return torch.from_numpy(0.05 * z)
    if "modulation" in name:
        return torch.from_numpy(0.1 * z)
    return torch.from_numpy(z / np.sqrt(np.prod(shape[1:])).astype(np.float32))


def procedural_clip(frames: int, height: int, width: int, seed: int) -> Tensor:
    """(frames, height, width, 3) in [-1, 1], from 8-bit values."""
    rs = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    phase, fx, fy, speed = (rs.rand(3, 4) * 6.28, rs.rand(3, 4) * 0.15, rs.rand(3, 4) * 0.15,
                            (rs.rand(3, 4) - 0.5) * 0.8)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        for k in range(3):
            waves = [np.sin(fx[k, i] * x + fy[k, i] * y + speed[k, i] * t + phase[k, i]) for i in range(4)]
            clip[t, :, :, k] = np.clip(np.rint((np.mean(waves, 0) * 0.5 + 0.5) * 255), 0, 255)
    return torch.from_numpy(clip).float() / 255 * 2 - 1


class GoldenUpscaler(StreamingUpscaler):
    """Starts from the file's noise."""
    whole_noise: Tensor

    def noise(self, chunk: int, shape: tuple[int, ...]) -> Tensor:
        first = 0 if chunk == 0 else 4 + 2 * chunk
        return self.whole_noise[:, :, first:first + shape[2]].to(self.device, self.dtype)


@dataclass
class Recorder:
    """What our model computed, under the file's keys."""
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, kind: str, value: Tensor) -> None:
        number = sum(name.startswith(f"{kind}.") for name in self.values)
        self.values[f"{kind}.{number}"] = value.float().cpu()


def run(config: FlashVSRConfig, case: dict, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stream of a file's metadata through our model: every key that such a file can hold, stored parts
    only.
    """
    tensors = {name: drawn(name, shape, case["seed"]) for name, shape in expected_shapes(config).items()}
    upscaler = GoldenUpscaler.from_tensors(config, tensors, device=device, dtype=dtype)
    F, H, W = case["F"], case["H"], case["W"]
    upscaler.whole_noise = drawn("noise", (1, config.latent_channels, (F - 1) // 4, H // 8, W // 8),
                                 case["seed"])
    clip = procedural_clip(F, H, W, case["seed"])
    state = upscaler.new_state(H // SCALE, W // SCALE)
    seen = Recorder()

    def record_mask(*call, **options) -> BlockMask:
        mask = lcsa_mask(*call, **options)
        ring = state.kv  # slots to slices in the order of time, as the file has them
        order = [s % ring.slots for s in range(ring.written + ring.chunk - ring.filled,
                                               ring.written + ring.chunk)]
        dense = mask.to_dense()[0].unflatten(-1, (ring.filled, ring.blocks))[:, :, order].flatten(-2)
        seen.add("block_mask", dense)
        return mask
    lcsa_mask = dit.lcsa_mask
    decoded, frames = [], []


    def record_tokens(module, args, out) -> None:
        clips = out.unflatten(1, (-1, (H // 16) * (W // 16)))  # the file has them clip by clip
        for i in range(clips.shape[1]):
            seen.add("lq_tokens", clips[:, i, ::7, ::5])
    upscaler.lq_proj.register_forward_hook(record_tokens)
    upscaler.dit.register_forward_hook(lambda module, args, out: seen.add("velocity", out[0, :, :, ::2, ::3]))
    with mock.patch.object(dit, "lcsa_mask", record_mask), torch.no_grad():
        for source in chunks(clip):
            for i, (frame, _) in enumerate(upscaler.step(state, source[None])):
                decoded.append(frame.cpu())
                frames.append(match_color(2 * frame - 1, source[i:i + 1].to(frame), config.color).clamp(-1, 1).cpu())
    whole = torch.cat(frames).permute(3, 0, 1, 2)
    per_frame = whole.transpose(0, 1).flatten(1)
    return seen.values | {"decoded": torch.cat(decoded).permute(0, 3, 1, 2)[:, :, ::8, ::8],
                          "frames": whole[:, :, ::8, ::8], "frames_mean": per_frame.mean(1),
                          "frames_std": per_frame.std(1)}


def chunks(clip: Tensor) -> Iterator[Tensor]:
    """The frames of each call of step: 25, then 12 of which 4 overlap."""
    yield clip[:25]
    for end in range(33, len(clip) + 1, 8):
        yield clip[end - 12:end]


def compare(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Worst error of each kind of key, as BOUNDS counts it. Raises ValueError if the file lacks or adds a
    key.
    """
    with safe_open(path, "pt") as file:
        meta = {name: json.loads(text) for name, text in file.metadata().items()}
        stored = {name: file.get_tensor(name) for name in file.keys()}
    sizes = {name: tuple(value) if isinstance(value, list) else value
             for name, value in meta["config"].items()}
    case = meta["case"]
    config = FlashVSRConfig(**sizes, version=case["version"], sparse_ratio=case["sparse_ratio"],
                            local_range=case["local_range"])
    ours = run(config, case, device, dtype)
    if ours.keys() != stored.keys():
        raise ValueError(f"{path}: keys differ: {sorted(ours.keys() ^ stored.keys())}")
    worst: dict[str, float] = {}
    for name, value in stored.items():
        kind, got, want = name.split(".")[0], ours[name].double(), value.double()
        if got.shape != want.shape:
            raise ValueError(f"{path}: {name} must be {tuple(want.shape)}, got {tuple(got.shape)}")
        if kind == "block_mask":
            error = float((got != want).sum())
        elif kind == "frames_mean":
            error = float((got - want).abs().max())
        else:
            error = float((got - want).norm() / want.norm())
        # max would let NaN through: it must not pass
        worst[kind] = (worst.get(kind, 0) + error if kind == "block_mask"
                       else np.maximum(worst.get(kind, 0), error).item())
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    args = parser.parse_args()
    failed = False
    for path in args.files:
        print(path.name)
        for kind, error in compare(path, args.device, DTYPES[args.dtype]).items():
            ok = error <= BOUNDS[kind]
            failed |= not ok
            shown = f"{error:.0f} entries differ" if kind == "block_mask" else f"{error:.2e}"
            print(f"  {kind:12} {shown:>20}   bound {BOUNDS[kind]:g}   {'ok' if ok else 'FAILED'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
