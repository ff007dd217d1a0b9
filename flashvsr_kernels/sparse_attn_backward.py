"""Gradients of block-sparse attention in Triton, sm_80 and newer; the same bits in every run.

With P = exp(scale Q K^T - lse), dP = dO V^T, delta = rowsum(dO * O) and dS = P * (dP - delta) they are dV =
P^T dO, dK = scale dS^T Q and dQ = scale dS K. dK and dV are sums over the query blocks of a key block, dQ is
a sum over the key blocks of a query block: no order of the work keeps all three in registers. Either one pass
over the kept blocks adds its pieces of dQ to memory (5 matrix products a block), in another order in every
run unless programs wait for their turn; or two passes keep their sums in registers and both compute Q K^T and
dP (7 products). This is the second: deterministic without waiting, and without float32 copies in memory.

  1. _prepare: delta, and lse in base 2
  2. _dkv_kernel: a program walks the query blocks of a key block. Q K^T and dP it computes transposed, so P^T
     and dS^T are where the next product wants its first operand: in registers, which suits sm_90's wgmma too
  3. _dq_kernel: a program walks the key blocks of a query block, as the forward does
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _triton
from .block_mask import BLOCK
from .block_mask_triton import transpose_lists


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Tensor,
             count: Tensor, order: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of sparse_attn, contiguous, in the dtype of q, k and v.

    grad: (B, Lq, H, D)    q: (B, Lq, H, D)    k, v: (B, Lk, H, D)    bf16 or fp16, D 64 or 128, any strides:
       a tensor whose rows overlap (an expanded gradient) or are not 16-byte aligned is copied
    out, lse: what the forward gave, (B, Lq, H, D) and float32 (B, H, Lq), -inf where a row has no key
    index: int32 (B, H, Mq, cap), count: int32 (B, H, Mq), as in BlockMask; entries past count are not used
    order: int32 (B * H * Mq,), query blocks (b * H + h) * Mq + m in the order to run them
    A query block without keys gets dq 0, a key block without queries dk and dv 0.
    Checks nothing: sparse_attn does.
    """
    B, Lq, H, D = q.shape
    Lk, Mq = k.shape[1], count.shape[2]
    Mk = -(-Lk // BLOCK)
    chosen = config(_triton.capability(q), D)
    grad, q, k, v = (readable(x) for x in (grad, q, k, v))
    strides = [stride for x in (grad, q, k, v) for stride in x.stride()[:3]]
    numbers = *strides, scale, scale * math.log2(math.e), H, Lq, Lk, Mq, Mk
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    index_t, count_t, order_t = transpose_lists(index, count, Mk)
    delta, lse2 = prepare(grad, out, lse)
    with torch.cuda.device_of(q):
        tile = chosen["dkv"]
        streamed = [_descriptor(x, tile["BM"]) if tile["TMA"] else x for x in (grad, q)]
        _dkv_kernel[(B * H * Mk * (BLOCK // tile["BN"]),)](
            *streamed, k, v, delta, lse2, dk, dv, index_t, count_t, order_t, *numbers, index_t.shape[3], D,
            PARTIAL=Lq % BLOCK != 0, **tile)
        tile = chosen["dq"]
        streamed = [_descriptor(x, tile["BN"]) if tile["TMA"] else x for x in (k, v)]
        _dq_kernel[(B * H * Mq * (BLOCK // tile["BM"]),)](
            grad, q, *streamed, delta, lse2, dq, index, count, order, *numbers, index.shape[3], D,
            PARTIAL=Lk % BLOCK != 0, **tile)
    return dq, dk, dv


def config(capability: int, D: int) -> dict[str, dict[str, int | bool]]:
    """Tiles and pipelines for a GPU, chosen so that shared memory holds them and no register spills.

    capability: 80 and more, 90 for 9.0    D: 64 or 128
    Returns for "dkv" and for "dq": BM queries and BN keys of a step (divisors of 128), TMA (whether the tiles
    of the loop come through descriptors), num_warps and num_stages.
    """
    def tile(BM: int, BN: int, num_stages: int) -> dict[str, int | bool]:
        return {"BM": BM, "BN": BN, "TMA": 90 <= capability < 120, "num_warps": 8, "num_stages": num_stages}
    if 90 <= capability < 120:  # 227 KiB of shared memory
        return {"dkv": tile(64, 128, 3), "dq": tile(128, 128, 2)}
    if D == 64:  # 99 KiB is enough for these and the next
        return {"dkv": tile(64, 128, 3), "dq": tile(128, 64, 3)}
    return {"dkv": tile(32, 128, 2), "dq": tile(128, 64, 2)}  # 64 queries a step would spill


def prepare(grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """delta, and lse in base 2, as float32 (B * H, Mq * 128): whole blocks, which are read without a mask."""
    B, Lq, H, D = grad.shape
    rows = -(-Lq // BLOCK) * BLOCK
    delta, lse2 = (torch.empty(B * H, rows, dtype=torch.float32, device=grad.device) for _ in range(2))
    with torch.cuda.device_of(grad):
        _prepare[(rows // 32, B * H)](grad, out, lse, delta, lse2, *grad.stride()[:3], *out.stride()[:3], H,
                                      Lq, D, ROWS=32)
    return delta, lse2


def readable(x: Tensor) -> Tensor:
    """x, or a copy if its rows overlap, are not 16-byte aligned or too far apart for offsets of 32 bits."""
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    if (x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.stride(1) < 2 ** 24
            and all(stride > 0 and stride % 8 == 0 for stride in strides)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of tiles (1, rows, 1, D) of x (B, L, H, D)."""
    # A dimension of one element may have any stride in PyTorch, but descriptors check it.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride())]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, x.shape[3]])


@triton.jit(do_not_specialize=["H", "Lq"])
def _prepare(grad, out, lse, delta, lse2, grad_b, grad_l, grad_h, out_b, out_l, out_h, H, Lq, D: tl.constexpr,
             ROWS: tl.constexpr):
    """One program: ROWS rows of one head."""
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    i_m = tl.program_id(0) * ROWS
    b_grad = _rows(grad, i_b, i_m, i_h, grad_b, grad_l, grad_h, Lq, ROWS, D, True, False)  # (ROWS, D)
    b_out = _rows(out, i_b, i_m, i_h, out_b, out_l, out_h, Lq, ROWS, D, True, False)       # (ROWS, D)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)                      # (ROWS,)
    o_m = i_m + tl.arange(0, ROWS)
    b_lse = tl.load(lse + tl.program_id(1).to(tl.int64) * Lq + o_m, o_m < Lq, -float("inf"))  # (ROWS,)
    # +inf makes P zero for any finite score: in rows without keys and in rows past the end. 1.44...: log2(e)
    b_lse2 = tl.where(b_lse == -float("inf"), float("inf"), b_lse * 1.4426950408889634)       # (ROWS,)
    o_to = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * ROWS + o_m
    tl.store(delta + o_to, b_delta)
    tl.store(lse2 + o_to, b_lse2)


@triton.jit
def _rows(x, i_b, i_l, i_h, x_b, x_l, x_h, L, ROWS: tl.constexpr, D: tl.constexpr, PARTIAL: tl.constexpr,
          TMA: tl.constexpr):
    """(ROWS, D): rows i_l ... of one head, zeros past row L. x: (B, L, H, D); if TMA a descriptor"""
    if TMA:
        return x.load([i_b, i_l, i_h, 0]).reshape(ROWS, D)
    else:
        o_l = tl.arange(0, ROWS)
        # 64 bits for where the tile starts, 32 within it: half the registers.
        p_x = x + (i_b.to(tl.int64) * x_b + i_l.to(tl.int64) * x_l + i_h.to(tl.int64) * x_h)
        p_x += o_l[:, None] * x_l + tl.arange(0, D)[None, :]
        if PARTIAL:
            return tl.load(p_x, (i_l + o_l < L)[:, None], 0.0)
        else:
            return tl.load(p_x)


@triton.jit
def _tile(order, M, H, ROWS: tl.constexpr):
    """Block, batch, head and first row of a program that has ROWS rows of one of M blocks a head.

    Volatile, so that a second call finds them again: kept in registers through the loop they would spill.
    """
    PARTS: tl.constexpr = 128 // ROWS
    i_tile = tl.load(order + tl.program_id(0) // PARTS, volatile=True)
    i_row = i_tile % M * 128 + tl.program_id(0) % PARTS * ROWS
    return i_tile, i_tile // M // H, i_tile // M % H, i_row


@triton.jit
def _step(p_index, t, steps, ROWS: tl.constexpr):
    """First row of step t of the listed blocks, each of which takes 128 / ROWS steps; 0 past the last."""
    PARTS: tl.constexpr = 128 // ROWS
    return tl.load(p_index + t // PARTS, t < steps, 0) * 128 + t % PARTS * ROWS


@triton.jit
def _store(to, b_x, i_b, i_l, i_h, H, L, ROWS: tl.constexpr, D: tl.constexpr):
    """Writes b_x (ROWS, D) to rows i_l ... of one head of to (B, L, H, D), contiguous."""
    o_l = i_l + tl.arange(0, ROWS)
    p_to = to + ((i_b.to(tl.int64) * L + o_l) * H + i_h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_to, b_x.to(to.dtype.element_ty), (o_l < L)[:, None])


@triton.jit(do_not_specialize=["H", "Lq", "Lk", "Mq", "Mk", "cap"])
def _dkv_kernel(grad, q, k, v, delta, lse2, dk, dv, index, count, order, grad_b, grad_l, grad_h, q_b, q_l,
                q_h, k_b, k_l, k_h, v_b, v_l, v_h, scale, c, H, Lq, Lk, Mq, Mk, cap, D: tl.constexpr,
                PARTIAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """One program makes BN rows of dk and dv from the transposed lists. PARTIAL: the last query block is"""
    i_tile, i_b, i_h, i_n = _tile(order, Mk, H, BN)
    b_k = _rows(k, i_b, i_n, i_h, k_b, k_l, k_h, Lk, BN, D, True, False)  # (BN, D)
    b_v = _rows(v, i_b, i_n, i_h, v_b, v_l, v_h, Lk, BN, D, True, False)  # (BN, D)
    o_m = tl.arange(0, BM)
    p_index = index + i_tile.to(tl.int64) * cap
    p_delta = delta + (i_tile // Mk).to(tl.int64) * Mq * 128
    p_lse2 = lse2 + (i_tile // Mk).to(tl.int64) * Mq * 128
    b_dk = tl.zeros([BN, D], tl.float32)  # (BN, D)
    b_dv = tl.zeros([BN, D], tl.float32)  # (BN, D)
    steps = tl.load(count + i_tile) * (128 // BM)
    i_m = _step(p_index, 0, steps, BM)
    for t in range(0, steps):
        b_q = _rows(q, i_b, i_m, i_h, q_b, q_l, q_h, Lq, BM, D, PARTIAL, TMA)                 # (BM, D)
        b_grad = _rows(grad, i_b, i_m, i_h, grad_b, grad_l, grad_h, Lq, BM, D, PARTIAL, TMA)  # (BM, D)
        b_lse2 = tl.load(p_lse2 + i_m + o_m)                  # (BM,)
        b_delta = tl.load(p_delta + i_m + o_m)                # (BM,)
        # Keys past the end give rubbish below, which stays in their rows: those are not stored.
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * c - b_lse2[None, :])            # (BN, BM)
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_grad)) - b_delta[None, :])            # (BN, BM)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
        i_m = _step(p_index, t + 1, steps, BM)  # one step ahead of its rows, which would wait for it
    _, i_b, i_h, i_n = _tile(order, Mk, H, BN)
    _store(dk, b_dk * scale, i_b, i_n, i_h, H, Lk, BN, D)
    _store(dv, b_dv, i_b, i_n, i_h, H, Lk, BN, D)


@triton.jit(do_not_specialize=["H", "Lq", "Lk", "Mq", "Mk", "cap"])
def _dq_kernel(grad, q, k, v, delta, lse2, dq, index, count, order, grad_b, grad_l, grad_h, q_b, q_l, q_h,
               k_b, k_l, k_h, v_b, v_l, v_h, scale, c, H, Lq, Lk, Mq, Mk, cap, D: tl.constexpr,
               PARTIAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """One program makes BM rows of dq. PARTIAL: the last key block is"""
    i_tile, i_b, i_h, i_m = _tile(order, Mq, H, BM)
    b_q = _rows(q, i_b, i_m, i_h, q_b, q_l, q_h, Lq, BM, D, True, False)                 # (BM, D)
    b_grad = _rows(grad, i_b, i_m, i_h, grad_b, grad_l, grad_h, Lq, BM, D, True, False)  # (BM, D)
    o_m = (i_tile // Mq).to(tl.int64) * Mq * 128 + i_m + tl.arange(0, BM)
    b_delta = tl.load(delta + o_m)  # (BM,)
    b_lse2 = tl.load(lse2 + o_m)    # (BM,)
    p_index = index + i_tile.to(tl.int64) * cap
    b_dq = tl.zeros([BM, D], tl.float32)  # (BM, D)
    steps = tl.load(count + i_tile) * (128 // BN)
    i_n = _step(p_index, 0, steps, BN)
    for t in range(0, steps):
        b_k = _rows(k, i_b, i_n, i_h, k_b, k_l, k_h, Lk, BN, D, PARTIAL, TMA)  # (BN, D)
        b_v = _rows(v, i_b, i_n, i_h, v_b, v_l, v_h, Lk, BN, D, PARTIAL, TMA)  # (BN, D)
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)) * c - b_lse2[:, None])        # (BM, BN)
        if PARTIAL:  # past the end exp2(0 - lse2) may be inf, and inf * 0 would spoil the sum
            b_p = tl.where((i_n + tl.arange(0, BN) < Lk)[None, :], b_p, 0.0)
        b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v)) - b_delta[:, None])        # (BM, BN)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
        i_n = _step(p_index, t + 1, steps, BN)
    _, i_b, i_h, i_m = _tile(order, Mq, H, BM)
    _store(dq, b_dq * scale, i_b, i_m, i_h, H, Lq, BM, D)
