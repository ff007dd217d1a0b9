"""Which 128x128 blocks an attention call computes: the BlockMask, and how FlashVSR chooses one."""
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .backends import Backend, pick, register

BLOCK = 128  # tokens of a block, in queries and in keys


@dataclass(frozen=True)
class BlockMask:
    """Key blocks of each query block, as lists.

    index: (B, H, Mq, cap) int32, key blocks ascending, packed left; entries past count are unspecified
    count: (B, H, Mq) int32
    order: (B, H * Mq) int32, query blocks (head * Mq + block) by falling count, for an even finish
    key_blocks: Mk, number of key blocks
    Built on the tensors' device without waiting for it.
    """
    index: Tensor
    count: Tensor
    order: Tensor
    key_blocks: int

    @classmethod
    def from_dense(cls, dense: Tensor) -> "BlockMask":
        """From bool (B, H, Mq, Mk). Raises ValueError for another dtype or number of dimensions."""
        if dense.dtype != torch.bool or dense.ndim != 4:
            raise ValueError(f"dense must be bool (B, H, Mq, Mk), got {dense.dtype} {tuple(dense.shape)}")
        # A stable sort of "not kept" packs the kept blocks left and leaves them ascending.
        index = (~dense).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
        count = dense.sum(-1, dtype=torch.int32)
        order = count.flatten(1).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return cls(index, count, order, dense.shape[-1])

    def to_dense(self) -> Tensor:
        """Bool (B, H, Mq, Mk)."""
        listed = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        # Unlisted entries are sent to an extra column, which is cut off.
        at = torch.where(listed, self.index, self.key_blocks).long()
        dense = torch.zeros(*self.count.shape, self.key_blocks + 1, dtype=torch.bool, device=at.device)
        return dense.scatter_(-1, at, True)[..., :self.key_blocks]

    def transposed(self) -> "BlockMask":
        """The lists of query blocks for each key block, which a backward pass over keys reads."""
        return BlockMask.from_dense(self.to_dense().transpose(-1, -2))

    def density(self) -> float:
        """Fraction of blocks kept. Waits for the device."""
        return self.count.sum().item() / (self.count.numel() * self.key_blocks)


def local_window(rows: int, cols: int, window: int, *, edge: str = "truncate",
                 device: torch.device | str | None = None) -> Tensor:
    """Bool (rows * cols, rows * cols): which blocks of a slice each block may attend to, before any choice.

    Block (r, c) sees rows r - window//2 ... r - window//2 + window - 1, and columns alike.
    edge: "truncate" lets the window hang over the border, as the official code does; "shift" moves it inside
    """
    if min(rows, cols, window) < 1:
        raise ValueError(f"rows, cols and window must be at least 1, got {rows}, {cols} and {window}")
    if edge not in ("truncate", "shift"):
        raise ValueError(f'edge must be "truncate" or "shift", got {edge!r}')
    return pick("local_window", None).run(rows, cols, window, edge, torch.device(device or "cpu"))


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, *, slices: int, topk: int) -> BlockMask:
    """Locality-constrained selection: of each head and query slice the block pairs with the largest
    probability.

    q_mean: (B, H, slices * S, D) means of the query blocks    k_mean: (B, H, n * S, D) of the key blocks
    local: bool (S, S), allowed pairs within any two slices (local_window)
    topk: budget of block pairs for one head and query slice; kept are those strictly above the (topk + 1)-th
    largest probability, so ties at the threshold go, and so does the smallest of all when the budget exceeds
    the pairs.
    Returns a BlockMask (B, H, slices * S, n * S). Source: FlashVSR, arXiv 2510.12747, and its code.
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
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    return BlockMask.from_dense(pick("lcsa_mask", None).run(q_mean, k_mean, local, slices, topk))


register("local_window", Backend("reference", reference.local_window))
register("lcsa_mask", Backend("reference", reference.lcsa_mask))
