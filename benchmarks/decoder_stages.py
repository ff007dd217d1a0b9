"""Whole stages for one steady chunk of 8 frames: the decoder to uint8 pictures, and the projector.

Ours run as flashvsr_model runs them, with one backend put first in each op's table; the peers are plain.py's
modules with the same random weights. Colour statistics of the source are given to all: enlarge makes them.
"""
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flashvsr_kernels import adain_uint8, color_moments
from flashvsr_kernels.backends import _tables
from flashvsr_model.config import LATENT_FRAMES, PATCH, PRESETS, SLICE_FRAMES, FlashVSRConfig
from flashvsr_model.decoder import Decoder
from flashvsr_model.fuse import expected_shapes, fuse_decoder, fuse_lq
from flashvsr_model.lq_proj import LQProjector
from flashvsr_model.state import Places

from . import plain, roofline
from .cases import DTYPES
from .decoder_cases import SHAPE

CHUNK_LATENTS = SLICE_FRAMES // LATENT_FRAMES
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Stage:
    """part: "decoder" or "projector"    picture: output HEIGHTxWIDTH    preset: key of PRESETS"""
    part: str
    picture: str
    preset: str
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.part}/{self.picture}/{self.preset}/{self.dtype}"

    @property
    def size(self) -> tuple[int, int]:
        H, W = self.picture.split("x")
        return int(H), int(W)

    @property
    def config(self) -> FlashVSRConfig:
        return replace(PRESETS[self.preset], color="adain")  # what the official model does, and what is timed

    @property
    def flop(self) -> float:
        """Without repeated frames and with enlargement folded, for all contestants alike."""
        name = {"decoder": "decoder", "projector": "LQ projector"}[self.part]
        return next(flop for part, flop, _ in roofline.parts(self.config, *self.size) if part == name)


def stages(device: str, picture: str | None = None) -> list[Stage]:
    usual, preset, dtype = SHAPE[device]
    return [Stage(part, picture or usual, preset, dtype) for part in ("decoder", "projector")]


class Work:
    """Weights and inputs of a stage, made once and shared; steps of contestants."""

    def __init__(self, stage: Stage, device: str):
        self.stage, self.device, self.dtype = stage, device, DTYPES[stage.dtype]
        generator, (H, W) = torch.Generator(device).manual_seed(1), stage.size

        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, device=device, generator=generator)
        # Variances that ReLU does not diminish; biases and norms near what training leaves.
        prefix = {"decoder": "decoder.", "projector": "lq."}[stage.part]
        self.tensors = {name: 1 + rand(*shape, scale=.1) if name.endswith("gamma") else
                        rand(*shape, scale=.05 if len(shape) == 1 else math.sqrt(1.5 / math.prod(shape[1:])))
                        for name, shape in expected_shapes(stage.config).items() if name.startswith(prefix)}
        self.frames = rand(1, SLICE_FRAMES, H, W, 3, scale=.4).clamp_(-1, 1).to(self.dtype)
        self.latent = rand(1, stage.config.latent_channels, CHUNK_LATENTS, H // 8, W // 8).to(self.dtype)
        self.source_moments = color_moments(self.frames[0])

    def ours(self, backend: str, dtype: torch.dtype | None = None) -> Step:
        """The model's own module, from zeroed memory. dtype: another than the stage's"""
        config, dtype, (H, W) = self.stage.config, dtype or self.dtype, self.stage.size
        frames, latent = self.frames.to(dtype), self.latent.to(dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        if self.stage.part == "projector":
            projector = self._module(LQProjector, fuse_lq(config, self.tensors), dtype)
            h, w = H // PATCH, W // PATCH
            tail = Places([zeros(1, 2, h, w, 3 * PATCH ** 2), zeros(1, 2, h, w, config.lq_hidden[0])])

            def project() -> Tensor:
                with preferring(backend):
                    return projector(frames, tail)
            return project
        decoder = self._module(Decoder, fuse_decoder(self.tensors), dtype)
        memory = [Places(zeros(1, H // 8 << stage, W // 8 << stage, width) for _ in range(3))
                  for stage, width in enumerate(config.decoder_channels[:3])]

        def decode() -> Tensor:
            done = []
            with preferring(backend), memory[2].turning():
                for i, cond in enumerate(frames.split(LATENT_FRAMES, 1)):
                    for rgb, moments in decoder(latent[:, :, i], cond, memory):
                        n = len(done)
                        done.append(adain_uint8(rgb, moments, self.source_moments[n:n + 1]))
            return torch.cat(done)
        return decode

    def plain(self, form: str, compiled: bool) -> Step:
        """The peer, from zeroed memory. form: of plain.DECODER or plain.PROJECTOR"""
        H, W = self.stage.size
        tensors = {name: x.to(self.dtype) for name, x in self.tensors.items()}
        if self.stage.part == "projector":
            projector = plain.PlainProjector(tensors, form)
            inside = 3 * PATCH ** 2, self.stage.config.lq_hidden[0]
            tail = [self.frames.new_zeros(1, 2, H // PATCH, W // PATCH, C) for C in inside]
            run = _compiled(projector, compiled)
            return lambda: run(self.frames, tail)
        decoder = plain.PlainDecoder(self.stage.config, tensors, form)
        memory, n = decoder.memory(H // 8, W // 8), decoder.latents
        mean, std = plain.mean_std(self.source_moments)

        def step(latent: Tensor, cond: Tensor, memory: list[Tensor], mean: Tensor, std: Tensor) -> Tensor:
            return plain.matched(decoder(latent, cond, memory), mean, std)
        run = _compiled(step, compiled)
        per = [x.split(LATENT_FRAMES * n, axis) for x, axis in ((self.frames, 1), (mean, 0), (std, 0))]
        parts = list(zip(self.latent.split(n, 2), *per))
        return lambda: torch.cat([run(x, cond, memory, mean, std) for x, cond, mean, std in parts])

    def _module(self, kind: type[nn.Module], state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            module = kind(self.stage.config)
        module.load_state_dict({name: x.to(dtype) for name, x in state.items()}, strict=True, assign=True)
        for p in module.requires_grad_(False).parameters():
            form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.ndim, torch.contiguous_format)
            p.data = p.data.contiguous(memory_format=form)
        return module


def _compiled(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


@contextmanager
def preferring(backend: str, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Puts backend first in the tables of ops, None: all, or "apart", what is made of other ops, and the reference last.
    What backend cannot run the next one does; used tells.
    """
    before = dict(_tables)
    for op in before if ops is None else ops:
        _tables[op] = tuple(sorted(before[op], key=lambda b: (b.name not in (backend, "apart"), b.name == "reference")))
    try:
        yield
    finally:
        _tables.update(before)


def used(step: Step) -> dict[str, int]:
    """How often a step ran each "op backend"."""
    counts, before = Counter(), dict(_tables)

    def counting(op: str, name: str, run: Callable) -> Callable:
        def counted(*call, **options):
            counts[f"{op} {name}"] += 1
            return run(*call, **options)
        return counted
    for op, table in before.items():
        _tables[op] = tuple(replace(b, run=counting(op, b.name, b.run)) for b in table)
    try:
        step()
    finally:
        _tables.update(before)
    return dict(counts)


def allocated(device: str) -> int:
    """Bytes of a GPU's memory; a CPU's are not counted."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(step: Step) -> float:
    """GiB of the GPU's memory that a step works in beside what is held already."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - held) / 2 ** 30
