"""Everything that changes while a stream runs."""
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvsr_kernels import BLOCK, rope_table

from .chunk_graphs import ChunkGraphs
from .config import FIRST_FRAMES, PATCH, SCALE, TILE, FlashVSRConfig


class Places(list[Tensor]):
    """Tensors that stay where they are, as recorded chunks look for them there: what is put in a place is copied.

    Not so within turning: what was made in spare takes the place, and what it drives out is the next spare.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__(tensors)
        self.spare: Tensor | None = None
        self._home = tuple(self)

    def __setitem__(self, place: int, x: Tensor) -> None:
        if x is self.spare:
            self.spare = self[place]
            super().__setitem__(place, x)
        else:
            self[place].copy_(x)

    @contextmanager
    def turning(self) -> Iterator[None]:
        """Puts all places in turn, the first to the last, again and again, without copying. All tensors are back where
        they were after one round more than there are places: so often, or a multiple, it must be.
        """
        self.spare = torch.empty_like(self[0])
        yield
        if any(x is not home for x, home in zip(self, self._home)):
            raise RuntimeError(f"{len(self)} places must be put in a multiple of {len(self) + 1} rounds")
        self.spare = None

    def zero_(self) -> None:
        """Zeros, where the tensors were at the start, wherever a chunk that failed has left them."""
        super().__setitem__(slice(None), self._home)
        self.spare = None
        for x in self:
            x.zero_()


class KVRing:
    """Rotated keys, values and key-block means of the newest slices, for every layer; fixed size.

    A slice's slot is its number modulo the slots, so once full the slots are not in the order of time:
    attention does not mind, and slot_order tells.
    """

    def __init__(self, keys: Tensor, values: Tensor, means: Tensor):
        """keys, values: (layers, 1, slots * S * 128, H, D)    means: (layers, 1, H, slots * S, D)"""
        self.keys, self.values, self.means = keys, values, means
        self.written = 0  # slices of the chunks before this one

    def begin(self, slices: int, slice_blocks: int) -> None:
        """Makes room for a chunk of that many slices, over the oldest ones."""
        self.blocks = slice_blocks
        self.slots = self.means.shape[3] // slice_blocks
        self.chunk = slices
        self.first = self.written % self.slots
        if self.first + slices > self.slots:
            raise ValueError(f"a chunk of {slices} slices does not fit behind slot "
                             f"{self.first} of {self.slots}")
        self.filled = min(self.written + slices, self.slots)

    def slot(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Where this chunk's keys and values of a layer go, (1, slices * S * 128, H, D) each; None: append
        takes them.
        """
        size = self.blocks * BLOCK
        rows = slice(self.first * size, (self.first + self.chunk) * size)
        return self.keys[layer, :, rows], self.values[layer, :, rows]

    def append(self, layer: int, k: Tensor, v: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All keys, values and key means that the chunk sees; k and v stand in their slot already."""
        self.means[layer, :, :, self.first * self.blocks:(self.first + self.chunk) * self.blocks] = mean
        rows = self.filled * self.blocks * BLOCK
        return (self.keys[layer, :, :rows], self.values[layer, :, :rows],
                self.means[layer, :, :, :self.filled * self.blocks])

    def end(self) -> None:
        self.written += self.chunk

    def slot_order(self) -> list[int]:
        """The filled slots, oldest slice first, as the last chunk saw them."""
        return [s % self.slots for s in range(self.written - self.filled, self.written)]

    def shift_time(self, latents: int, pairs: int) -> None:
        """Moves all keys that many latents towards the past; pairs: complex pairs of a head that turn with
        time.
        """
        turn = rope_table(torch.tensor([-latents], device=self.keys.device), pairs)[0]
        for rotated in (self.keys, self.means):
            for layer in rotated:  # one layer at a time: the float32 copy stays small
                part = layer[..., :2 * pairs]
                wide = torch.view_as_complex(part.float().unflatten(-1, (pairs, 2)))
                part.copy_(torch.view_as_real(wide * turn).flatten(-2))


@dataclass(frozen=True)
class Geometry:
    """What follows from a picture's size alone."""
    height: int          # of the input
    width: int
    padded_height: int   # of the output inside the model, multiples of 128
    padded_width: int
    margin: int          # output pixels above and to the left of the picture

    @classmethod
    def of(cls, height: int, width: int, margin: int = 0) -> "Geometry":
        if min(height, width) < 16:
            raise ValueError(f"frames must be at least 16x16, got {width}x{height}")
        pad = (math.ceil((SCALE * n + 2 * margin) / TILE) * TILE for n in (height, width))
        return cls(height, width, *pad, margin)

    @property
    def border(self) -> tuple[int, int, int, int]:
        """What the picture is continued by inside: left, right, top, bottom."""
        left = top = self.margin
        return (left, self.padded_width - SCALE * self.width - left,
                top, self.padded_height - SCALE * self.height - top)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of the picture inside."""
        return self.margin, self.margin, SCALE * self.height, SCALE * self.width

    @property
    def tokens(self) -> tuple[int, int]:
        return self.padded_height // PATCH, self.padded_width // PATCH

    @property
    def slice_blocks(self) -> int:
        return (self.padded_height // TILE) * (self.padded_width // TILE)


def _shapes(config: FlashVSRConfig, g: Geometry,
            dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    S, slots, (h, w) = g.slice_blocks, config.ring_slices, g.tokens
    heads = (config.num_heads, config.head_dim)
    wide = config.decoder_channels[:3]
    memory = {f"decoder.{i}": ((1, 2 * h << i // 3, 2 * w << i // 3, wide[i // 3]), dtype)
              for i in range(9)}
    return {
        "frames": ((FIRST_FRAMES, g.height, g.width, 3), torch.float32),
        "keys": ((config.num_layers, 1, slots * S * BLOCK, *heads), dtype),
        "values": ((config.num_layers, 1, slots * S * BLOCK, *heads), dtype),
        "means": ((config.num_layers, 1, config.num_heads, slots * S, config.head_dim), dtype),
        "lq.0": ((1, 2, h, w, 3 * PATCH * PATCH), dtype),
        "lq.1": ((1, 2, h, w, config.lq_hidden[0]), dtype),
        **memory,
    }


class StreamState:
    """The memory of one stream, allocated once: its size does not depend on how long the stream is."""

    def __init__(self, config: FlashVSRConfig, height: int, width: int, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", out_dtype: torch.dtype = torch.uint8,
                 graphs: bool = False):
        """height, width: of the input    dtype: of the model
        out_dtype: of the frames that come out, uint8 or float32
        graphs: whether steady chunks are recorded as CUDA graphs
        """
        if out_dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"out_dtype must be torch.uint8 or torch.float32, got {out_dtype}")
        self.geometry = Geometry.of(height, width, config.margin)
        self.out_dtype = out_dtype
        made = {name: torch.zeros(shape, dtype=kind, device="cpu" if name == "frames" else device)
                for name, (shape, kind) in _shapes(config, self.geometry, dtype).items()}
        self._tensors = made
        # newest input frames, 0 to 255; on the host, where the bicubic enlargement runs
        self.frames = made["frames"]
        self.kv = KVRing(made["keys"], made["values"], made["means"])
        self.lq_tail = Places([made["lq.0"], made["lq.1"]])
        self.decoder = [Places(made[f"decoder.{3 * stage + i}"] for i in range(3)) for stage in range(3)]
        if graphs and not self.kv.keys.is_cuda:
            raise ValueError(f"graphs need a CUDA device, the model is on {self.kv.keys.device}")
        self.graphs = ChunkGraphs() if graphs else None
        self.first_noise: Tensor | None = None  # of the first chunk, which every stream begins with; see new_state
        self.reset()

    def reset(self) -> None:
        """Back to the start of a stream, in the same memory."""
        self.eight_bit: bool | None = None  # whether the frames pushed are uint8; known at the first push
        self.pushed = self.emitted = 0      # frames in and out
        self.held = 0                       # frames in self.frames
        self.chunk = 0
        self.time = 0                       # rotary position of the next latent
        self.flushed = False
        self.torn = False                   # whether a chunk failed, which leaves memories of two times
        self.noise = self.first_noise       # of the next chunk, if it has been drawn
        self.ready: list[Tensor] = []   # frames done and not yet given; a push gives them all unless it fails
        self.kv.written = 0
        for memory in (self.lq_tail, *self.decoder):
            memory.zero_()

    def turning(self) -> AbstractContextManager[None]:
        """For a chunk's pictures: the last stage's memories change four times, the first chunk's twelve times."""
        return self.decoder[2].turning()

    def memory(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self._tensors.values())

    @staticmethod
    def plan(config: FlashVSRConfig, height: int, width: int, *,
             dtype: torch.dtype = torch.float32) -> dict[str, int]:
        """Bytes of each part of the state for an input of height x width, without allocating anything."""
        parts: dict[str, int] = {}
        for name, (shape, kind) in _shapes(config, Geometry.of(height, width, config.margin), dtype).items():
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + math.prod(shape) * kind.itemsize
        return parts
