"""Norms and gated adds in Triton, for every GPU from sm_80. Their time is that of memory: each tensor is touched once.

A row is held as a tuple of pieces, [R, W] each for R rows. A thread loads 16 bytes of every piece before it uses any,
and a piece of a row lies in one warp if rows are of usual width: their sums need neither shared memory nor barriers.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
PIECES = 8  # of a row, at most, so that registers hold it


def config(C: int, itemsize: int) -> dict[str, int]:
    """Tile for rows of C channels of itemsize bytes: R rows of a program, W channels of a piece, num_warps."""
    W = min(512 // itemsize, triton.next_power_of_2(C))  # 32 threads of 16 bytes
    while triton.cdiv(C, W) > PIECES:
        W *= 2
    together = max(1, WARPS * 512 // (W * itemsize))  # rows whose piece is one load of all threads
    most = max(1, 64 * 32 * WARPS // (triton.cdiv(C, W) * W))  # 64 values a thread: narrow rows must not take more
    return {"R": min(together * max(1, 256 // triton.next_power_of_2(C)), 1 << most.bit_length() - 1), "W": W,
            "num_warps": WARPS}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the public function; all of these take rows that are evenly spaced and contiguous, and check nothing."""
    out = _new(x)
    _launch(x, None, None, weight, None, None, out, eps)
    return out


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    out = _new(x)
    _launch(x, None, None, scale, shift, None, out, eps)
    return out


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    total = _new(x)
    _launch(x, y, gate, None, None, total, None, 0.0)
    return total


def gated_add_norm(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor,
                   eps: float) -> tuple[Tensor, Tensor]:
    total, out = _new(x), _new(x)
    _launch(x, y, gate, scale, shift, total, out, eps)
    return total, out


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
            total: Tensor | None, out: Tensor | None, eps: float) -> None:
    C = x.shape[-1]
    x = x.reshape(-1, C)
    y = None if y is None else y.reshape(-1, C)
    rows, chosen = x.shape[0], config(C, x.element_size())
    if rows:
        with torch.cuda.device_of(x):
            _row[(triton.cdiv(rows, chosen["R"]),)](
                x, y, gate, scale, shift, total, out, rows, x.stride(0), 0 if y is None else y.stride(0), eps, C=C,
                **chosen)


@triton.jit
def _inside(m_r, o_c, j: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Mask of piece j, [R, W] or [R, 1]: only where W does not divide C has the last one columns beyond the end."""
    if (j + 1) * W > C:
        m = m_r & (j * W + o_c < C)
    else:
        m = m_r
    return m


@triton.jit
def _vector(p, o_c, j: tl.constexpr, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Piece j of a vector of C channels in float32, R times: loaded as the rows are, it needs no shared memory."""
    p_vector = tl.broadcast_to(p + j * W + o_c, [R, W])  # [R, W]
    if (j + 1) * W > C:
        b = tl.load(p_vector, mask=j * W + o_c < C, other=0.0)  # [R, W]
    else:
        b = tl.load(p_vector)  # [R, W]
    return b.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _row(x, y, gate, scale, shift, total, out, rows, sx, sy, eps, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """One program: total = x + gate * y of R rows, and out, their norm; what is None is left out.

    The norm is LayerNorm * (1 + scale) + shift, without shift RMS norm * scale.
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]  # [R, 1]
    o_c = tl.arange(0, W)[None, :]  # [1, W]
    m_r = o_r < rows  # [R, 1]
    N: tl.constexpr = (C + W - 1) // W
    T: tl.constexpr = x.dtype.element_ty
    b_x = ()
    b_y = ()
    for j in tl.static_range(N):
        m = _inside(m_r, o_c, j, C, W)
        b_x += (tl.load(x + o_r * sx + j * W + o_c, mask=m, other=0.0),)  # [R, W]
        if y is not None:
            b_y += (tl.load(y + o_r * sy + j * W + o_c, mask=m, other=0.0),)  # [R, W]
    b_sum = tl.zeros([R, W], tl.float32)  # [R, W], of x or, for the RMS, of x^2
    b_row = ()
    for j in tl.static_range(N):
        b = b_x[j].to(tl.float32)  # [R, W]
        if y is not None:
            b_add = b_y[j].to(tl.float32)  # [R, W]
            if gate is not None:
                b_add *= _vector(gate, o_c, j, C, R, W)
            # The norm is that of what is stored, so that it is rounded before.
            b_total = (b + b_add).to(T)  # [R, W]
            tl.store(total + o_r * C + j * W + o_c, b_total, mask=_inside(m_r, o_c, j, C, W))
            b = b_total.to(tl.float32)
        b_row += (b,)
        if shift is None:
            b_sum += b * b
        else:
            b_sum += b
    if out is not None:
        b_mean = tl.sum(b_sum, 1)[:, None] / C  # [R, 1]
        if shift is not None:
            # The variance from the differences: the square of a large mean would swallow it.
            b_sum = tl.zeros([R, W], tl.float32)
            for j in tl.static_range(N):
                b = b_row[j] - b_mean  # [R, W]
                if (j + 1) * W > C:
                    b = tl.where(j * W + o_c < C, b, 0.0)
                b_sum += b * b
            b_scale = tl.math.rsqrt(tl.sum(b_sum, 1)[:, None] / C + eps)  # [R, 1]
        else:
            b_scale = tl.math.rsqrt(b_mean + eps)  # [R, 1]
        for j in tl.static_range(N):
            b_w = _vector(scale, o_c, j, C, R, W)  # [R, W]
            if shift is None:
                b = (b_row[j] * b_scale).to(T).to(tl.float32) * b_w  # [R, W]
            else:
                b = (b_row[j] - b_mean) * b_scale * (1.0 + b_w) + _vector(shift, o_c, j, C, R, W)  # [R, W]
            tl.store(out + o_r * C + j * W + o_c, b.to(T), mask=_inside(m_r, o_c, j, C, W))
