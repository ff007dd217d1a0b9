"""qk_norm_rope and qkv_norm_rope in Triton, for every GPU from sm_80. Their time is that of memory: each tensor is
touched once.

A program makes one block of 128 tokens of q, of k or, merely copied, of v, R tokens at a time, and adds up what it
wrote for the block's mean. R tokens are held as a tuple of heads, [R, D] each: so the RMS over all heads is a sum of a
thread's own values but for the last steps, and all heads share one tile of rotations. Loads of the next R tokens are
under way meanwhile.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BLOCK

Tables = tuple[Tensor, Tensor, Tensor]


def config(D: int) -> dict[str, int]:
    """R tokens of a step, STAGES, num_warps. A thread has 4 channels of each head: with 8 its means, which it keeps
    in float32, would not fit in registers beside the rest, and two programs not on a multiprocessor.
    """
    return {"R": 512 // D, "STAGES": 3, "num_warps": 4}


def qk_norm_rope(x: Tensor, weight: Tensor, tables: Tables, head_dim: int, eps: float, out: Tensor) -> Tensor:
    """Writes out, as the public function does, and returns the means; checks nothing."""
    mean = _means(out)
    _launch(x, weight, weight, tables, head_dim, eps, out, out, None, mean, mean)
    return mean


def qkv_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, tables: Tables, head_dim: int, eps: float,
                  q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Writes q, k and v, as the public function does, and returns the means of q and k; checks nothing."""
    q_mean, k_mean = _means(q), _means(k)
    _launch(qkv, q_weight, k_weight, tables, head_dim, eps, q, k, v, q_mean, k_mean)
    return q_mean, k_mean


def _means(x: Tensor) -> Tensor:
    B, L, H, D = x.shape
    return torch.empty((B, H, L // BLOCK, D), dtype=x.dtype, device=x.device)


def _launch(x: Tensor, q_weight: Tensor, k_weight: Tensor, tables: Tables, D: int, eps: float, q: Tensor, k: Tensor,
            v: Tensor | None, q_mean: Tensor, k_mean: Tensor) -> None:
    B, L, H, _ = q.shape
    t, h, w = (torch.view_as_real(table) for table in tables)
    if q.numel():
        with torch.cuda.device_of(x):
            _rope[(L // BLOCK, 1 if v is None else 3, B)](
                x, q_weight, k_weight, t, h, w, q, k, v, q_mean, k_mean, *x.stride()[:2], *q.stride()[:3],
                *k.stride()[:3], *(k if v is None else v).stride()[:3], h.shape[0] // 8, w.shape[0] // 8, eps, H=H,
                D=D, PT=t.shape[1], PH=h.shape[1], PW=w.shape[1], M=BLOCK, **config(D))


@triton.jit
def _rotations(t, h, w, i_t, i_h, i_w, o_m, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Cosines and sines of tokens o_m [R] of the block whose first token is at (i_t, i_h, i_w): [R, D / 2] each."""
    o_p = tl.arange(0, PT + PH + PW)[None, :]  # [1, D / 2], pairs: of time first, then of rows, then of columns
    p_t = t + ((i_t + o_m // 64)[:, None] * PT + o_p) * 2
    p_h = h + ((i_h + o_m // 8 % 8)[:, None] * PH + (o_p - PT)) * 2
    p_w = w + ((i_w + o_m % 8)[:, None] * PW + (o_p - PT - PH)) * 2
    p = tl.where(o_p < PT, p_t, tl.where(o_p < PT + PH, p_h, p_w))
    return tl.load(p), tl.load(p + 1)


@triton.jit
def _copy(p_x, sxl, p_v, svl, svh, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
          STAGES: tl.constexpr):
    """M tokens, H heads, from p_x to p_v."""
    o_d = tl.arange(0, D)  # [D]
    for i in tl.range(0, M // R, num_stages=STAGES):
        o_m = i * R + tl.arange(0, R)  # [R]
        for j in tl.static_range(H):
            b_v = tl.load(p_x + (o_m.to(tl.int64) * sxl)[:, None] + (j * D + o_d)[None, :])  # [R, D]
            tl.store(p_v + (o_m.to(tl.int64) * svl)[:, None] + (j * svh + o_d)[None, :], b_v)


@triton.jit(do_not_specialize=["rows", "cols"], do_not_specialize_on_alignment=["t", "h", "w"])
def _rope(x, q_weight, k_weight, t, h, w, q, k, v, q_mean, k_mean, sxb, sxl, sqb, sql, sqh, skb, skl, skh, svb, svl,
          svh, rows, cols, eps, H: tl.constexpr, D: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
          PW: tl.constexpr, M: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr):
    """rows, cols: of blocks    PT, PH, PW: pairs that turn with time, row and column"""
    i_block, i_which, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_l = i_block.to(tl.int64) * M
    p_x = x + i_b * sxb + i_l * sxl + i_which * (H * D)
    if v is not None:
        if i_which == 2:
            _copy(p_x, sxl, v + i_b * svb + i_l * svl, svl, svh, H, D, M, R, STAGES)
            return
    T: tl.constexpr = x.dtype.element_ty
    o_d = tl.arange(0, D)  # [D]
    weight = tl.where(i_which == 0, q_weight, k_weight)
    sl = tl.where(i_which == 0, sql, skl)
    sh = tl.where(i_which == 0, sqh, skh)
    p_out = tl.where(i_which == 0, q + i_b * sqb + i_l * sql, k + i_b * skb + i_l * skl)
    i_t = i_block // (rows * cols) * 2
    i_h = i_block // cols % rows * 8
    i_w = i_block % cols * 8
    b_w = ()
    b_mean = ()
    for j in tl.static_range(H):
        b_w += (tl.load(tl.broadcast_to((weight + j * D + o_d)[None, :], [R, D])),)  # [R, D]
        b_mean += (tl.zeros([R, D], tl.float32),)
    for i in tl.range(0, M // R, num_stages=STAGES):
        o_m = i * R + tl.arange(0, R)  # [R]
        b_x = ()
        b_sum = tl.zeros([R, D], tl.float32)  # [R, D]
        for j in tl.static_range(H):
            b_x += (tl.load(p_x + (o_m.to(tl.int64) * sxl)[:, None] + (j * D + o_d)[None, :]),)  # [R, D]
        b_cos, b_sin = _rotations(t, h, w, i_t, i_h, i_w, o_m, PT, PH, PW)
        for j in tl.static_range(H):
            b = b_x[j].to(tl.float32)
            b_sum += b * b
        b_scale = tl.math.rsqrt(tl.sum(b_sum, 1) / (H * D) + eps)[:, None]  # [R, 1]
        b_new = ()
        for j in tl.static_range(H):
            # Rounded where PyTorch rounds, so that the selection of blocks sees the same means.
            b = (b_x[j].to(tl.float32) * b_scale).to(T).to(tl.float32)  # [R, D]
            b = (b * b_w[j].to(tl.float32)).to(T).to(tl.float32)
            b_re, b_im = tl.split(tl.reshape(b, [R, D // 2, 2]))  # [R, D / 2]
            b = tl.join(b_re * b_cos - b_im * b_sin, b_re * b_sin + b_im * b_cos)
            b_y = tl.reshape(b, [R, D]).to(T)  # [R, D]
            tl.store(p_out + (o_m.to(tl.int64) * sl)[:, None] + (j * sh + o_d)[None, :], b_y)
            b_new += (b_mean[j] + b_y.to(tl.float32),)
        b_mean = b_new
    p_mean = tl.where(i_which == 0, q_mean, k_mean) + (i_b * H * tl.num_programs(0) + i_block) * D + o_d
    for j in tl.static_range(H):
        tl.store(p_mean + j * (tl.num_programs(0) * D), (tl.sum(b_mean[j], 0) * (1.0 / M)).to(T))
