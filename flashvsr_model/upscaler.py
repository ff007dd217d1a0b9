"""Frames in, frames four times as large out, chunk by chunk."""
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import flashvsr_kernels as kernels
from flashvsr_kernels import adain_uint8, color_moments, local_window, rope_table

from .color import match_color
from .config import (FIRST_FRAMES, FIRST_LATENTS, LATENT_FRAMES, LOOKAHEAD, SCALE,
                     SLICE_FRAMES, TILE, FlashVSRConfig)
from .decoder import Decoder
from .dit import DiT
from .fuse import fuse_decoder, fuse_dit, fuse_lq, round_taps
from .lq_proj import LQProjector
from .state import Geometry, StreamState

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class StreamingUpscaler:
    """A FlashVSR model that upscales streams. It holds weights only: everything that changes is in a
    StreamState.

        state = upscaler.new_state(height, width)
        for frames in source:                       # any number at a time
            result = upscaler.push(state, frames)   # (t, 4 height, 4 width, 3) uint8, t >= 0
        result = upscaler.flush(state)              # the rest: as many frames come out as went in
    """

    def __init__(self, config: FlashVSRConfig, dit: DiT, lq_proj: LQProjector, decoder: Decoder):
        self.config, self.dit, self.lq_proj, self.decoder = config, dit, lq_proj, decoder
        self.dtype, self.device = dit.patch_weight.dtype, dit.patch_weight.device
        self._time_table = rope_table(torch.arange(config.rope_positions),
                                      config.rope_split[0]).to(self.device)
        self._sizes: dict[Geometry, tuple[tuple[Tensor, Tensor], Tensor]] = {}

    @classmethod
    def from_tensors(cls, config: FlashVSRConfig, tensors: dict[str, Tensor], *,
                     device: torch.device | str = "cpu",
                     dtype: torch.dtype = torch.float32) -> "StreamingUpscaler":
        """From checkpoint tensors with the names and shapes of fuse.expected_shapes(config), on any device
        and dtype.
        """
        with torch.device("meta"):
            parts = DiT(config), LQProjector(config), Decoder(config)
        states = fuse_dit(config, tensors), fuse_lq(config, tensors), fuse_decoder(tensors)
        for part, state, rounded in zip(parts, states, (Tensor.to, Tensor.to, round_taps)):
            part.load_state_dict({name: rounded(t.detach().to(device), dtype) for name, t in state.items()},
                                 strict=True, assign=True)
            part.requires_grad_(False).eval()
        for part in parts[1:]:  # channels last, as pictures and clips are
            for p in part.parameters():
                if p.ndim in FORMATS:
                    p.data = p.data.contiguous(memory_format=FORMATS[p.ndim])
        return cls(config, *parts)

    def new_state(self, height: int, width: int, *, out_dtype: torch.dtype = torch.uint8,
                  graphs: bool | None = None) -> StreamState:
        """Memory for one stream of frames of that (input) size; see StreamState.plan for what it takes.

        out_dtype: of the result, torch.uint8, or torch.float32 in [0, 1] for more than 8 bits
        graphs: record steady chunks as CUDA graphs, one for each slot of the K/V ring: less work for the host;
           None: in 16 bits where Triton's kernels run, as all of those can be recorded
        Raises ValueError if the size is under 16x16, or too small for sparse_ratio, or for graphs without CUDA.
        """
        g = Geometry.of(height, width, self.config.margin)
        if self.config.topk(g.padded_height, g.padded_width) < 1:
            raise ValueError(f"sparse_ratio {self.config.sparse_ratio} leaves no attention at "
                             f"{width}x{height}; raise it")
        if graphs is None:
            kernels_run = kernels.backends()["sparse_attn"]["triton"] is None
            graphs = self.device.type == "cuda" and self.dtype.itemsize == 2 and kernels_run
        state = StreamState(self.config, height, width, dtype=self.dtype, device=self.device, out_dtype=out_dtype,
                            graphs=graphs)
        state.first_noise = state.noise = self._noise(state, 1)  # so that the first frames need not wait for it
        return state

    @torch.no_grad()
    def warm_up(self, state: StreamState, *, eight_bit: bool = True) -> float:
        """Runs black frames through state until all its kernels are compiled and its graphs recorded, and resets it.

        eight_bit: the kind of frames that will come    Returns the seconds it took.
        """
        began, steady = time.perf_counter(), 1 if state.graphs is None else 1 + self.config.ring_slices
        frame = torch.zeros(state.geometry.height, state.geometry.width, 3)
        for _ in range(FIRST_FRAMES + SLICE_FRAMES * steady):
            self.push(state, [frame.to(torch.uint8) if eight_bit else frame])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        state.reset()
        return time.perf_counter() - began

    def push(self, state: StreamState, frames: Tensor | np.ndarray | Iterable[np.ndarray]) -> Tensor:
        """Takes frames, gives those that are ready: 21 after the first 25, then 8 for every 8.

        frames: (T, h, w, 3) uint8, or float in [0, 1], or an iterable of (h, w, 3)
        Returns (t, 4h, 4w, 3), t >= 0, in the state's out_dtype, on the model's device.
        Raises ValueError if a frame is not what the state was made for; the frames before it have been taken,
        and what they gave comes with the next push or flush. Raises RuntimeError if a chunk failed before.
        """
        if state.flushed:
            raise ValueError("the stream was flushed; start another with new_state, "
                             "or this one again with state.reset()")
        _check_whole(state)
        if isinstance(frames, (Tensor, np.ndarray)) and frames.ndim != 4:
            raise ValueError(f"frames must be (T, h, w, 3), got {tuple(frames.shape)}")
        for frame in frames:
            if isinstance(frame, np.ndarray):
                frame = np.ascontiguousarray(frame)  # PyTorch knows no strides that step back, as of BGR turned to RGB
            self._take(state, torch.as_tensor(frame))
            if state.held == FIRST_FRAMES or state.chunk and state.held == LOOKAHEAD + SLICE_FRAMES:
                self._chunk(state)
        return self._give(state)

    def flush(self, state: StreamState) -> Tensor:
        """Ends the stream: the frames not yet given, (t, 4h, 4w, 3). The last frame stands in for those after
        it. Raises RuntimeError if a chunk failed before.
        """
        _check_whole(state)
        while state.emitted < state.pushed:
            need = (LOOKAHEAD + SLICE_FRAMES) if state.chunk else FIRST_FRAMES
            state.frames[state.held:need] = state.frames[state.held - 1]
            state.held = need
            self._chunk(state)
        frames = self._give(state)
        surplus, state.emitted, state.flushed = state.emitted - state.pushed, state.pushed, True
        return frames[:len(frames) - surplus]

    def upscale(self, frames: Tensor | np.ndarray) -> Tensor:
        """A whole clip (T, h, w, 3), T >= 1, to (T, 4h, 4w, 3) uint8."""
        if not isinstance(frames, (Tensor, np.ndarray)):
            raise ValueError(f"frames must be a tensor or an array (T, h, w, 3), got {type(frames).__name__}; "
                             "push takes frames one by one")
        if frames.ndim != 4 or not len(frames):
            raise ValueError(f"frames must be (T, h, w, 3) with T at least 1, got {tuple(frames.shape)}")
        state = self.new_state(*frames.shape[1:3])
        return torch.cat([self.push(state, frames), self.flush(state)])

    def step(self, state: StreamState, frames: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """One chunk of the model itself; to be taken to its end.

        frames: (B, 25, H, W, 3) for the first chunk, then (B, 12, H, W, 3) of which 4 were the last of the
        chunk before; enlarged and padded to multiples of 128, in [-1, 1]
        Yields frames (B, H, W, 3), about [0, 1] and unclamped, without colour matching and margin, and the moments
        of 2 * frame - 1 (Decoder): 21 in all, then 8.
        """
        frames = frames.to(self.device, self.dtype)
        noise, times = self._begin(state, len(frames))
        yield from self._run(state, frames, noise, times)
        self._end(state)

    def _begin(self, state: StreamState, batch: int) -> tuple[Tensor, Tensor]:
        """What a chunk starts from: its noise, and the rotations of its latents."""
        g, latents = state.geometry, 2 if state.chunk else FIRST_LATENTS
        if state.time + latents > self.config.rope_positions:
            # Attention knows only differences of positions: the oldest cached latent becomes the first again.
            now = 2 * (min(state.kv.written, state.kv.slots) - 1)
            state.kv.shift_time(state.time - now, self.config.rope_split[0])
            state.time = now
        state.kv.begin(latents // 2, g.slice_blocks)
        noise = self._noise(state, batch) if state.noise is None else state.noise
        return noise, self._time_table[state.time:state.time + latents]

    def _end(self, state: StreamState) -> None:
        state.time += 2 if state.chunk else FIRST_LATENTS
        state.chunk += 1
        state.kv.end()
        state.noise = None

    def _noise(self, state: StreamState, batch: int) -> Tensor:
        g, latents = state.geometry, 2 if state.chunk else FIRST_LATENTS
        return self.noise(state.chunk, (batch, self.config.latent_channels, latents, g.padded_height // 8,
                                        g.padded_width // 8))

    def _run(self, state: StreamState, frames: Tensor, noise: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """step's work on the device, frames in uint8 levels or as step takes them; of the host's part of state only
        whether this is the first chunk matters, and the slots of the ring.
        """
        g, first = state.geometry, state.chunk == 0
        if first:
            self.lq_proj.prime(frames[:, :1], state.lq_tail)
        lq = self.lq_proj(frames[:, 1 if first else LOOKAHEAD:], state.lq_tail)
        (rows, cols), local = self._size(g)
        latent = noise - self.dit(noise, lq, (times, rows, cols), state.kv, local,
                                  self.config.topk(g.padded_height, g.padded_width))
        del lq
        with state.turning():
            for i in range(latent.shape[2]):
                end = LATENT_FRAMES * i + (1 if first else LATENT_FRAMES)
                cond = frames[:, max(0, end - LATENT_FRAMES):end]
                lacking = LATENT_FRAMES - cond.shape[1]  # the first latent has one frame of input; the others are dropped
                cond = torch.cat([cond[:, :1].expand(-1, lacking, -1, -1, -1), cond], 1) if lacking else cond
                for j, frame in enumerate(self.decoder(latent[:, :, i], cond, state.decoder, g.box)):
                    if j >= lacking:
                        yield frame

    def noise(self, chunk: int, shape: tuple[int, ...]) -> Tensor:
        """What the one step of a chunk starts from; the same on every device."""
        if self.config.noise == 0:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        # The generator looks at 32 bits only: seeds are spread over them, chunks follow one another.
        generator = torch.Generator().manual_seed((self.config.seed * 2654435761 + chunk) % 2**32)
        return self._upload((torch.randn(shape, generator=generator) * self.config.noise).to(self.dtype))

    def _upload(self, x: Tensor) -> Tensor:
        """x on the device. From pinned memory the host goes on while the copy waits for its turn."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def _size(self, g: Geometry) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Rotations of rows and columns, and the window, of a picture size."""
        if g not in self._sizes:
            side = self.config.rope_split[1]
            rows, cols = (rope_table(torch.arange(n), side).to(self.device) for n in g.tokens)
            local = local_window(g.padded_height // TILE, g.padded_width // TILE, self.config.local_range,
                                 edge=self.config.edge, device=self.device)
            self._sizes[g] = (rows, cols), local
        return self._sizes[g]

    def _take(self, state: StreamState, frame: Tensor) -> None:
        g = state.geometry
        if frame.shape != (g.height, g.width, 3):
            raise ValueError(f"frames must be ({g.height}, {g.width}, 3) for this state, "
                             f"got {tuple(frame.shape)}")
        eight_bit = frame.dtype == torch.uint8
        if not eight_bit and not frame.is_floating_point():
            raise ValueError(f"frames must be uint8 or float, got {frame.dtype}")
        if state.eight_bit is None:
            state.eight_bit = eight_bit
        if state.eight_bit != eight_bit:
            raise ValueError(f"the stream began with {'uint8' if state.eight_bit else 'float'} "
                             f"frames, got {frame.dtype}")
        state.frames[state.held].copy_(frame)
        if not eight_bit:
            state.frames[state.held].mul_(255).clamp_(0, 255)
        state.held += 1
        state.pushed += 1

    @torch.no_grad()
    def _chunk(self, state: StreamState) -> None:
        frames = state.frames[:state.held]
        if state.eight_bit:
            frames = frames.to(torch.uint8)
        frames = self._upload(frames)
        noise, times = self._begin(state, 1)
        state.torn = True
        key = state.kv.first, state.kv.filled, frames.dtype
        # The first steady chunk of all compiles what the others need: only these can be recorded.
        if state.graphs is not None and state.chunk and (state.chunk > 1 or key in state.graphs):
            done = state.graphs.run(key, partial(self._compute, state), frames, noise, times)
        else:
            done = torch.cat(self._compute(state, frames, noise, times))
        state.torn = False
        self._end(state)
        state.noise = self._noise(state, 1)  # drawn while the device works
        state.frames[:LOOKAHEAD] = state.frames[state.held - LOOKAHEAD:state.held].clone()
        state.held = LOOKAHEAD
        state.ready.append(done)
        state.emitted += len(done)

    def _compute(self, state: StreamState, frames: Tensor, noise: Tensor, times: Tensor) -> list[Tensor]:
        """Finished frames, (1, 4h, 4w, 3) each, from input frames as enlarge takes them."""
        g = state.geometry
        large, moments = enlarge(frames)
        inside = framed(large, g.border)
        inside = inside if inside.dtype == torch.uint8 else inside.to(self.dtype)
        done = []
        for i, (frame, its_moments) in enumerate(self._run(state, inside[None], noise, times)):
            one = slice(i, i + 1)
            if self.config.color == "adain":
                source_moments = color_moments(normal(large[one])) if moments is None else moments[one]
                done.append(adain_uint8(frame, its_moments, source_moments, out_dtype=state.out_dtype,
                                        truncate=self.config.exact_upstream))
            else:
                frame = match_color(2 * frame - 1, normal(large[one]), self.config.color)
                done.append(self._finish(frame, state.out_dtype))
        return done

    def _finish(self, frames: Tensor, out_dtype: torch.dtype) -> Tensor:
        if out_dtype == torch.float32:
            return frames.add(1).div_(2).clamp_(0, 1)
        levels = frames.add(1).mul_(127.5)
        return (levels if self.config.exact_upstream else levels.round_()).clamp_(0, 255).to(torch.uint8)

    def _give(self, state: StreamState) -> Tensor:
        g, ready = state.geometry, state.ready
        state.ready = []
        return torch.cat([torch.empty((0, SCALE * g.height, SCALE * g.width, 3), dtype=state.out_dtype,
                                      device=self.device), *ready])


def _check_whole(state: StreamState) -> None:
    if state.torn:
        raise RuntimeError("a chunk of this stream failed half done; start the stream again with state.reset()")


def enlarge(frames: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pillow's bicubic enlargement of frames (T, h, w, 3), in 8 bits if they are uint8, or in float32 if they are
    float, both in 0...255.

    Returns (T, 4h, 4w, 3), uint8 or float32 in [-1, 1], and its moments where they cost nothing, else None.
    """
    _, h, w, _ = frames.shape
    if frames.dtype != torch.uint8:
        large = F.interpolate(frames.permute(0, 3, 1, 2), scale_factor=SCALE, mode="bicubic", antialias=True)
        return large.permute(0, 2, 3, 1).clamp(0, 255).div_(127.5).sub_(1), None
    if frames.is_cuda:
        return kernels.enlarge(frames, return_moments=True)

    def one(frame: np.ndarray) -> Tensor:
        large = Image.fromarray(frame).resize((SCALE * w, SCALE * h), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(large))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow works outside Python's lock
        return torch.stack(list(pool.map(one, frames.numpy()))), None


def normal(large: Tensor) -> Tensor:
    """uint8 levels as float32 in [-1, 1]; float frames as they are."""
    return large.float().div_(127.5).sub_(1) if large.dtype == torch.uint8 else large


def framed(pictures: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Pictures (T, H, W, 3) continued by their outermost pixels to the left, right, top and bottom."""
    if not any(border):
        return pictures
    (T, H, W, C), (left, right, top, bottom) = pictures.shape, border
    out = pictures.new_empty((T, top + H + bottom, left + W + right, C))
    rows, columns = slice(top, top + H), slice(left, left + W)
    out[:, rows, columns] = pictures
    out[:, :top, columns], out[:, top + H:, columns] = pictures[:, :1], pictures[:, -1:]
    out[:, :, :left], out[:, :, left + W:] = out[:, :, left:left + 1], out[:, :, left + W - 1:left + W]
    return out
