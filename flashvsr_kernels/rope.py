"""What stands between the q, k, v projection and attention: normalisation, rotary position, window order."""
import torch
from torch import Tensor

from . import reference
from .backends import Backend, pick, register

Grid = tuple[int, int, int]  # latents, token rows, token columns


def rope_table(positions: Tensor, pairs: int) -> Tensor:
    """Rotations of one axis: complex64 (n, pairs), exp(i * p * 10000^(-2j / (2 * pairs))) for integer
    positions p.

    Angles are taken in float64, so a table is exact for any position up to 2^40.
    """
    theta = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = positions.double().cpu()[:, None] * theta
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(positions.device)


def qk_norm_rope(x: Tensor, weight: Tensor, tables: tuple[Tensor, Tensor, Tensor], head_dim: int, *,
                 eps: float = 1e-6, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMS norm over all heads, 3D rotary position and window order of a query or key projection.

    x: (B, L, H * head_dim), tokens by (latent, row, column), last dimension contiguous
    weight: (H * head_dim,)
    tables: rotations (rope_table) of the latents, rows and columns, complex64 (f, a), (h, b), (w, c) with
    L = f * h * w and a + b + c = head_dim / 2; f even, h and w multiples of 8
    out: (B, L, H, head_dim) to write into, such as a slot of the key ring; allocated if None
    Returns out, tokens by (slice, block row, block column, latent, row, column), and the mean of each of its
    blocks of 128 tokens, (B, H, L / 128, head_dim).
    """
    f, h, w = (t.shape[0] for t in tables)
    _check_grid(x, (f, h, w))
    if x.shape[2] % head_dim or weight.shape != x.shape[2:]:
        raise ValueError(f"x must be (B, L, H * {head_dim}) and weight as wide, "
                         f"got {tuple(x.shape)} and {tuple(weight.shape)}")
    if sum(t.shape[1] for t in tables) != head_dim // 2:
        raise ValueError(f"tables must have {head_dim // 2} pairs in all, got {[t.shape[1] for t in tables]}")
    turned, mean = pick("qk_norm_rope", None).run(x, weight, tables, head_dim, eps)
    return turned if out is None else out.copy_(turned), mean


def window_order(x: Tensor, grid: Grid, *, out: Tensor | None = None) -> Tensor:
    """Tokens (B, L, C) from (latent, row, column) order into attention's blocks of 2 x 8 x 8; raster_order
    undoes it.
    """
    _check_grid(x, grid)
    ordered = pick("window_order", None).run(x, grid)
    return ordered if out is None else out.copy_(ordered.view(out.shape))


def raster_order(x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, L, C) from attention's blocks back into (latent, row, column) order."""
    _check_grid(x, grid)
    return pick("raster_order", None).run(x, grid)


def _check_grid(x: Tensor, grid: Grid) -> None:
    f, h, w = grid
    if f % 2 or h % 8 or w % 8:
        raise ValueError(f"grid must be a multiple of (2, 8, 8), got {grid}")
    if x.ndim != 3 or x.shape[1] != f * h * w:
        raise ValueError(f"x must be (B, {f * h * w}, C) for grid {grid}, got {tuple(x.shape)}")


register("qk_norm_rope", Backend("reference", reference.qk_norm_rope))
register("window_order", Backend("reference", reference.window_order))
register("raster_order", Backend("reference", reference.raster_order))
