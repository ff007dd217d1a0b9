"""Which 128x128 blocks an attention call computes: the BlockMask, and how FlashVSR chooses one."""
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _triton, reference
from .backends import Backend, pick, register

BLOCK = 128  # tokens of a block, in queries and in keys
STRIP = 8         # block columns, of which order makes neighbours: 132 blocks are nearly a square

_lib = torch.library.Library("flashvsr", "FRAGMENT")


@dataclass(frozen=True)
class BlockMask:
    """Key blocks of each query block, as lists.

    index: (B, H, Mq, cap) int32, key blocks ascending, packed left; entries past count are unspecified
    count: (B, H, Mq) int32
    order: (B * H * Mq,) int32, query blocks (b * H + h) * Mq + m in the order to run them: a GPU full of
       neighbours at a time (waves), which share keys and values in the cache, their longest lists first. As fast
       as whole heads sorted at 768x1408, 1.09 times at 2048x3840; neighbours are those of strips of the picture
       where its columns are known, another 1 % (H100).
    key_blocks: Mk, number of key blocks
    Built on the tensors' device without waiting for it.
    """
    index: Tensor
    count: Tensor
    order: Tensor
    key_blocks: int

    @classmethod
    def from_dense(cls, dense: Tensor, *, columns: int | None = None, backend: str | None = None) -> "BlockMask":
        """From bool (B, H, Mq, Mk), any strides.

        columns: of the picture whose blocks the Mq are, row by row, for a better order
        backend: "triton" or "reference"; None takes the first that can run the call
        Raises ValueError for another dtype or number of dimensions, and for columns that do not divide Mq,
        NotImplementedError with the reason if the backend cannot run.
        """
        if dense.dtype != torch.bool or dense.ndim != 4:
            raise ValueError(f"dense must be bool (B, H, Mq, Mk), got {dense.dtype} {tuple(dense.shape)}")
        columns = _checked(columns, dense.shape[2])
        return cls(*torch.ops.flashvsr.block_lists(dense, columns, backend), dense.shape[-1])

    def to_dense(self) -> Tensor:
        """Bool (B, H, Mq, Mk)."""
        listed = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        # Unlisted entries are sent to an extra column, which is cut off.
        at = torch.where(listed, self.index, self.key_blocks).long()
        dense = torch.zeros(*self.count.shape, self.key_blocks + 1, dtype=torch.bool, device=at.device)
        return dense.scatter_(-1, at, True)[..., :self.key_blocks]

    def transposed(self, *, backend: str | None = None) -> "BlockMask":
        """The lists of query blocks for each key block, (B, H, Mk, up to Mq), which a backward pass over keys reads.

        backend: as for from_dense, with NotImplementedError if it cannot run
        """
        lists = torch.ops.flashvsr.transposed_lists(self.index, self.count, self.key_blocks, backend)
        return BlockMask(*lists, self.count.shape[-1])

    def density(self) -> float:
        """Fraction of blocks kept, 0 where there are none. Waits for the device."""
        return self.count.sum().item() / max(1, self.count.numel() * self.key_blocks)


def waves(tiles: int, device: torch.device) -> tuple[int, int]:
    """How order takes the tiles, by their number: as many as the GPU runs at once, and in how many groups.

    The last two groups are one, which leaves more short lists to even out the finish; on an H100 with 12 heads of 66
    blocks (2, 2, 2, 2 and 4 heads) it was the fastest of the orders measured.
    """
    processors = _triton.processors(device)
    return processors, max(1, -(-tiles // processors) - 1)


def strips(blocks: int, columns: int, device: torch.device) -> Tensor:
    """The blocks of a picture with that many columns, strip by strip, STRIP columns wide, row by row."""
    at = torch.arange(blocks, device=device)
    row, column = at // columns, at % columns
    return (column // STRIP * blocks * STRIP + row * STRIP + column % STRIP).argsort()


def local_window(rows: int, cols: int, window: int, *, edge: str = "truncate",
                 device: torch.device | str | None = None) -> Tensor:
    """Bool (rows * cols, rows * cols): which blocks of a slice each block may attend to, before any choice.

    Block (r, c) sees rows r - window//2 ... r - window//2 + window - 1, and columns alike.
    edge: "truncate" lets the window hang over the border, as the official code does; "shift" moves it inside
    device: where the result is, a CPU if None
    Raises ValueError for numbers under 1 and another edge.
    """
    if min(rows, cols, window) < 1:
        raise ValueError(f"rows, cols and window must be at least 1, got {rows}, {cols} and {window}")
    if edge not in ("truncate", "shift"):
        raise ValueError(f'edge must be "truncate" or "shift", got {edge!r}')
    return pick("local_window", None).run(rows, cols, window, edge, torch.device(device or "cpu"))


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, *, slices: int, topk: int,
              columns: int | None = None, backend: str | None = None) -> BlockMask:
    """Locality-constrained selection: of each head and query slice the block pairs with the largest
    probability.

    q_mean: (B, H, slices * S, D) means of the query blocks    k_mean: (B, H, n * S, D) of the key blocks
    local: bool (S, S), allowed pairs within any two slices (local_window)
    topk: budget of block pairs for one head and query slice; kept are those strictly above the (topk + 1)-th
    largest probability, so ties at the threshold go, and so does the smallest of all when the budget exceeds
    the pairs.
    columns: of the picture whose blocks the S are, row by row, for a better order
    backend: "triton" (means bf16, fp16 or float32), "reference", or None for the first that can run the call
    Returns a BlockMask (B, H, slices * S, n * S). Source: FlashVSR, arXiv 2510.12747, and its code.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the call.
    """
    if (q_mean.ndim != 4 or k_mean.ndim != 4 or q_mean.shape[:2] != k_mean.shape[:2]
            or q_mean.shape[3] != k_mean.shape[3]):
        raise ValueError("q_mean and k_mean must be (B, H, blocks, D) with equal B, H and D, got "
                         f"{tuple(q_mean.shape)} and {tuple(k_mean.shape)}")
    S = local.shape[0]
    if (local.dtype != torch.bool or local.shape != (S, S) or q_mean.shape[2] != slices * S
            or k_mean.shape[2] % S):
        raise ValueError(f"local must be bool (S, S) with slices * S = {q_mean.shape[2]} query blocks and a "
                         f"multiple of S = {k_mean.shape[2]} key blocks, got {local.dtype} "
                         f"{tuple(local.shape)} and slices {slices}")
    if q_mean.dtype != k_mean.dtype or not q_mean.device == k_mean.device == local.device:
        raise ValueError("q_mean and k_mean must have one dtype and be on one device with local, got "
                         f"{q_mean.dtype} and {k_mean.dtype} on {q_mean.device}, {k_mean.device} and "
                         f"{local.device}")
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    columns = q_mean.shape[2] if columns is None else _checked(columns, S)
    lists = torch.ops.flashvsr.lcsa_mask(q_mean, k_mean, local, slices, topk, columns, backend)
    return BlockMask(*lists, k_mean.shape[2])


def _checked(columns: int | None, blocks: int) -> int:
    if columns is None:
        return max(1, blocks)
    if columns < 1 or blocks % columns:
        raise ValueError(f"columns must divide the {blocks} blocks, got {columns}")
    return columns


def _lists_reference(dense: Tensor, columns: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Mq, Mk = dense.shape
    dense = dense.contiguous()  # or else the lists have the strides of a view
    # A stable sort of "not kept" packs the kept blocks left and leaves them ascending.
    index = (~dense).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    count = dense.sum(-1, dtype=torch.int32)
    each, groups = waves(count.numel(), dense.device)
    heads = torch.arange(B * H, device=dense.device)[:, None] * Mq
    tile = (heads + strips(Mq, columns or max(1, Mq), dense.device)).flatten()
    group = (torch.arange(count.numel(), device=dense.device) // each).clamp(max=groups - 1)
    place = group * (Mk + 1) + Mk - count.flatten()[tile]
    return index, count, tile[place.argsort(stable=True)].to(torch.int32)


def _transposed_reference(index: Tensor, count: Tensor, key_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    return _lists_reference(BlockMask(index, count, count, key_blocks).to_dense().transpose(-1, -2))


def _lcsa_reference(q_mean: Tensor, k_mean: Tensor, local: Tensor, slices: int, topk: int,
                    columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return _lists_reference(reference.lcsa_mask(q_mean, k_mean, local, slices, topk), columns)


# The kernels are imported when they first run: Triton is optional, and takes a second to import.

def _lists_triton(*call: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    from . import block_mask_triton
    return block_mask_triton.block_lists(*call)


def _transposed_triton(*call: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    from . import block_mask_triton
    return block_mask_triton.transpose_lists(*call)


def _lcsa_triton(*call: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    from . import block_mask_triton
    return block_mask_triton.lcsa_mask(*call)


def _on_gpu(x: Tensor) -> str | None:
    return None if x.device.type == "cuda" else f"runs on a CUDA device, the call is on {x.device}"


def _lcsa_on_gpu(q_mean: Tensor) -> str | None:
    if q_mean.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {q_mean.dtype}"
    return f"D must be at most 128, is {q_mean.shape[3]}" if q_mean.shape[3] > 128 else _on_gpu(q_mean)


register("local_window", Backend("reference", reference.local_window))
register("block_lists", Backend("triton", _lists_triton, _triton.available, _on_gpu),
         Backend("reference", _lists_reference))
register("transposed_lists", Backend("triton", _transposed_triton, _triton.available, _on_gpu),
         Backend("reference", _transposed_reference))
register("lcsa_mask", Backend("triton", _lcsa_triton, _triton.available, _lcsa_on_gpu),
         Backend("reference", _lcsa_reference))

_lib.define("block_lists(Tensor dense, SymInt columns, str? backend) -> (Tensor, Tensor, Tensor)")
_lib.define("transposed_lists(Tensor index, Tensor count, SymInt key_blocks, str? backend) "
            "-> (Tensor, Tensor, Tensor)")
_lib.define("lcsa_mask(Tensor q_mean, Tensor k_mean, Tensor local, int slices, int topk, SymInt columns, "
            "str? backend) -> (Tensor, Tensor, Tensor)")


@torch.library.impl(_lib, "block_lists", "CompositeExplicitAutograd")
def _block_lists(dense, columns, backend):
    return pick("block_lists", backend, dense).run(dense, columns)


@torch.library.impl(_lib, "transposed_lists", "CompositeExplicitAutograd")
def _transposed_lists(index, count, key_blocks, backend):
    return pick("transposed_lists", backend, index).run(index, count, key_blocks)


@torch.library.impl(_lib, "lcsa_mask", "CompositeExplicitAutograd")
def _lcsa_mask(q_mean, k_mean, local, slices, topk, columns, backend):
    return pick("lcsa_mask", backend, q_mean).run(q_mean, k_mean, local, slices, topk, columns)


def _fake_lists(like: Tensor, B: int, H: int, M: int, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, H, M, cap), (B, H, M), (B * H * M,)
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.register_fake("flashvsr::block_lists", lib=_lib)
def _block_lists_fake(dense, columns, backend):
    return _fake_lists(dense, *dense.shape)


@torch.library.register_fake("flashvsr::transposed_lists", lib=_lib)
def _transposed_lists_fake(index, count, key_blocks, backend):
    B, H, Mq = count.shape
    return _fake_lists(index, B, H, key_blocks, Mq)


@torch.library.register_fake("flashvsr::lcsa_mask", lib=_lib)
def _lcsa_mask_fake(q_mean, k_mean, local, slices, topk, columns, backend):
    return _fake_lists(q_mean, *q_mean.shape[:3], k_mean.shape[2])
