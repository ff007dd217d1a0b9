"""Forward of sparse_attn in Triton, for every GPU from sm_80."""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from .block_mask import BLOCK


def config(capability: int, D: int) -> dict[str, int]:
    """Tile and pipeline for a GPU, such that shared memory holds them and no register spills.

    capability: 80 and more, 90 for 9.0    D: 64 or 128
    Returns tile_n (keys of a step, a divisor of 128), num_warps, num_stages (K and V tiles in shared memory)
    and lanes (columns of the row sum that are added up only at the end).
    On an H100 64 keys a step beat 128 by a tenth, 8 warps 4 by a third, and a third stage gives 4 %. The
    others are chosen from what the compiler makes for 80, 86, 89, 100 and 120.
    """
    if capability // 10 == 10:  # a thread holds half a row of scores here: its sum needs no shuffles anyway
        return {"tile_n": 128, "num_warps": 8, "num_stages": 3, "lanes": 1}
    # With mma.sync K and V also pass through registers. 96 KiB, which 8.6, 8.9 and 12.0 just hold.
    return {"tile_n": 128 if D == 64 else 64, "num_warps": 8, "num_stages": 3, "lanes": 8}


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, order: Tensor,
            scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the listed key blocks, and the natural log of each row's sum of exponentials.

    q: (B, Lq, H, D), D 64 or 128    k, v: (B, Lk, H, D)    bf16 or fp16, any strides with a contiguous last
       dimension; multiples of 16 are several times as fast as others
    index: (B, H, Mq, cap) int32 and count: (B, H, Mq) int32 as in BlockMask; entries past count are not used
    order: (B * H * Mq,) int32, query blocks (b * H + h) * Mq + m in the order in which to run them
    Returns out (B, Lq, H, D) contiguous, 0 where count is, and lse (B, H, Lq) float32, -inf there.
    Checks nothing: sparse_attn does. Tensors on a CPU are for Triton's interpreter.
    """
    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    out = torch.empty((B, Lq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        chosen = config(_triton.capability(q), D)
        wide = BLOCK * max(q.stride(1), k.stride(1), v.stride(1)) >= 2 ** 31
        _forward[(order.numel(),)](
            q, k, v, index, count, order, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            Lq, Lk, H, index.shape[2], index.shape[3], abs(scale) * math.log2(math.e), D=D, M=BLOCK,
            N=chosen["tile_n"], LANES=chosen["lanes"], OFFSET=tl.int64 if wide else tl.int32,
            NEGATE=scale < 0, PARTIAL=Lk % BLOCK != 0, num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"])
    return out, lse


@triton.jit
def _tile(order, H, Mq, M: tl.constexpr):
    """This program's query block: number, first row, head, batch.

    Volatile, so that a second call really loads again: kept in registers through the loop they would spill.
    """
    i_tile = tl.load(order + tl.program_id(0), volatile=True)
    i_head = i_tile // Mq
    return i_tile, (i_tile % Mq * M).to(tl.int64), (i_head % H).to(tl.int64), (i_head // H).to(tl.int64)


@triton.jit
def _step(b_o, b_l, b_m, b_q, p_k, p_v, m_n, c, N: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """Takes N keys into the running softmax; if MASKED, only those that m_n marks.

    b_o: [M, D] sum of p * v    b_l: [M, LANES] sum of p, in parts    b_m: [M] maximum of score * c
    """
    if MASKED:  # what lies beyond the end is not read: in V, 0 times it could be NaN
        b_k = tl.load(p_k, mask=m_n[None, :], other=0.0)  # [D, N]
    else:
        b_k = tl.load(p_k)  # [D, N]
    b_s = tl.dot(b_q, b_k)  # [M, N]
    b_max = tl.max(tl.where(m_n[None, :], b_s, -float("inf")) if MASKED else b_s, 1) * c  # [M]
    b_max = tl.maximum(b_m, b_max)
    b_p = tl.math.exp2(b_s * c - b_max[:, None])  # [M, N], an FMA and an exp2 each
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
        b_v = tl.load(p_v, mask=m_n[:, None], other=0.0)  # [N, D]
    else:
        b_v = tl.load(p_v)  # [N, D]
    b_alpha = tl.math.exp2(b_m - b_max)  # [M]
    # Columns LANES apart are one thread's in the layout of mma and wgmma: no shuffles until the end.
    b_l = b_l * b_alpha[:, None] + tl.sum(tl.reshape(b_p, [b_p.shape[0], N // LANES, LANES]), 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None])
    return b_o, b_l, b_max


@triton.jit(do_not_specialize=["Lq", "Lk", "H", "Mq", "cap"])
def _forward(q, k, v, index, count, order, out, lse, sqb, sql, sqh, skb, skl, skh, svb, svl, svh,
             Lq, Lk, H, Mq, cap, c, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
             OFFSET: tl.constexpr, NEGATE: tl.constexpr, PARTIAL: tl.constexpr):
    """One program makes one query block, M rows of a head.

    c: |scale| * log2(e)    OFFSET: type of offsets inside a block    NEGATE: scale < 0
    PARTIAL: the last key block is; only then is there code with masks
    """
    i_tile, i_m, i_h, i_b = _tile(order, H, Mq, M)
    o_m = tl.arange(0, M)  # [M]
    o_n = tl.arange(0, N)  # [N]
    o_d = tl.arange(0, D)  # [D]
    # 64-bit scalars reach the first row of a tile; from there on OFFSET is enough.
    p_q = q + i_b * sqb + i_h * sqh + i_m * sql
    p_k = k + i_b * skb + i_h * skh
    p_v = v + i_b * svb + i_h * svh
    p_index = index + i_tile.to(tl.int64) * cap
    o_q = o_m[:, None].to(OFFSET) * sql + o_d[None, :]  # [M, D]
    o_k = o_n[None, :].to(OFFSET) * skl + o_d[:, None]  # [D, N]
    o_v = o_n[:, None].to(OFFSET) * svl + o_d[None, :]  # [N, D]
    n = tl.load(count + i_tile)
    b_q = tl.load(p_q + o_q, mask=(o_m < Lq - i_m)[:, None], other=0.0)  # [M, D]
    if NEGATE:
        b_q = -b_q
    b_o = tl.zeros([M, D], tl.float32)
    b_l = tl.zeros([M, LANES], tl.float32)
    b_m = tl.full([M], -float("inf"), tl.float32)

    n_whole = n
    if PARTIAL:  # lists ascend, so a partial block is the last of its list
        i_last = tl.load(p_index + n - 1, mask=n > 0, other=0)
        n_whole -= ((n > 0) & (i_last == Lk // M)).to(tl.int32)
    # A block's number is loaded one step before its keys' addresses need it.
    i_block = tl.load(p_index, mask=n > 0, other=0)
    for j in tl.range(0, n_whole * (M // N)):
        i_n = (i_block * M + j % (M // N) * N).to(tl.int64)
        i_next = (j + 1) // (M // N)
        i_block = tl.load(p_index + i_next, mask=i_next < n, other=0)
        b_o, b_l, b_m = _step(b_o, b_l, b_m, b_q, p_k + i_n * skl + o_k, p_v + i_n * svl + o_v,
                              None, c, N, LANES, False)
    if PARTIAL:
        if n_whole < n:
            for j in tl.range(0, tl.cdiv(Lk % M, N), num_stages=1):
                i_n = (Lk // M * M + j * N).to(tl.int64)
                b_o, b_l, b_m = _step(b_o, b_l, b_m, b_q, p_k + i_n * skl + o_k, p_v + i_n * svl + o_v,
                                      o_n < Lk - i_n, c, N, LANES, True)

    _, i_m, i_h, i_b = _tile(order, H, Mq, M)
    m_m = o_m < Lq - i_m  # [M]
    b_sum = tl.sum(b_l, 1)  # [M]
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)  # 0 only where there was no key: there b_o is 0 and b_m -inf
    b_lse = (b_m + tl.math.log2(b_sum)) * 0.6931471805599453  # [M], times ln 2
    b_o = b_o * (1 / b_sum)[:, None]
    tl.store(lse + (i_b * H + i_h) * Lq + i_m + o_m, b_lse, mask=m_m)
    p_out = out + ((i_b * Lq + i_m) * H + i_h) * D
    tl.store(p_out + (o_m[:, None] * (H * D) + o_d[None, :]), b_o.to(out.dtype.element_ty), mask=m_m[:, None])
