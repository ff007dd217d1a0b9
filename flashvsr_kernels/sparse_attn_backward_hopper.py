"""Gradients of block-sparse attention for Hopper (sm_90), in Gluon: the two passes of sparse_attn_backward
with TMA, wgmma and specialised warps.

A program of either pass keeps one block and its sums on chip while a producer warp streams the other side's
blocks through a ring in shared memory; two consumer warpgroups own 64 rows each. P and dS go from the
registers of one product straight into the next as wgmma's first operand.

In the pass for dk and dv the consumers take turns: one's products, those of a step and the scores of the next
back to back, run while the other computes P and dS. That made it a sixth faster. The pass for dq reaches the
card's power limit without.
"""
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._gluon import descriptor, load as _load, meet as _meet, store as _store
from .block_mask import BLOCK
from .block_mask_triton import transpose_lists
from .sparse_attn_backward import prepare, readable
from .sparse_attn_hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, _barrier

ROWS = gl.constexpr(64)    # queries of a step of the dk, dv pass: both sums leave no registers for more
STAGES = gl.constexpr(3)   # slots of its ring

# Named barriers from this number on: slots free. 288 threads: both consumers and the producer.
FREE = gl.constexpr(8)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Tensor,
             count: Tensor, order: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As sparse_attn_backward.backward; rows of q, k and v must be 16-byte aligned."""
    B, Lq, H, D = q.shape
    Lk, Mq = k.shape[1], count.shape[2]
    Mk = -(-Lk // BLOCK)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad = readable(grad)
    delta, lse2 = prepare(grad, out, lse)
    index_t, count_t, order_t = transpose_lists(index, count, Mk)
    half, whole, step = [1, 64, 1, D], [1, BLOCK, 1, D], [1, ROWS.value, 1, D]
    with torch.cuda.device_of(q):
        dkv_kernel[(B * H * Mk,)](
            *(descriptor(x, step) for x in (q, grad)), _vector(lse2), _vector(delta),
            *(descriptor(x, half) for x in (k, v, dk, dv)), index_t, count_t, order_t, scale,
            scale * math.log2(math.e), H, Mk, Mq, num_warps=4)
        dq_kernel[(B * H * Mq,)](
            *(descriptor(x, half) for x in (q, grad, dq)), *(descriptor(x, whole) for x in (k, v)), lse2,
            delta, index, count, order, scale, scale * math.log2(math.e), Lk, H, Mq, index.shape[3],
            PARTIAL=Lk % BLOCK != 0, num_warps=4)
    return dq, dk, dv


def _vector(x: Tensor) -> TensorDescriptor:
    """Of pieces (1, ROWS) of float32 rows."""
    block = [1, ROWS.value]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout(0, 32, 2))


@gluon.jit
def _free(slot):
    gl.inline_asm_elementwise("bar.arrive $1, 288; mov.u32 $0, 0;", "=r,r", [FREE + slot], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _wait_free(slot):
    gl.inline_asm_elementwise("bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [FREE + slot], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _tile(count, order, H, M):
    """This program's block number, its list's length, first row, head and batch."""
    tile = gl.load(order + gl.program_id(0))
    return tile, gl.load(count + tile), tile % M * 128, tile // M % H, tile // M // H


@gluon.jit
def _dkv_producer(q_desc, grad_desc, lse_desc, delta_desc, k_desc, v_desc, index, count, order, H, Mk, cap,
                  k_tile, v_tile, q_ring, grad_ring, lse_ring, delta_ring, own, q_full, grad_full):
    D: gl.constexpr = k_desc.block_shape[3]
    R: gl.constexpr = ROWS
    S: gl.constexpr = STAGES
    tile, n, row, head, batch = _tile(count, order, H, Mk)
    if n > 0:
        mbarrier.expect(own, 2 * 128 * D * 2)
        for w in gl.static_range(2):
            _load(k_desc, [batch, row + w * 64, head, 0], own, k_tile.index(w))
            _load(v_desc, [batch, row + w * 64, head, 0], own, v_tile.index(w))
        index += tile.to(gl.int64) * cap
        block = gl.load(index)
        slot = 0
        for j in range(n):
            following = gl.load(index + gl.minimum(j + 1, n - 1))
            for part in gl.static_range(128 // R):
                if j * (128 // R) + part >= S:
                    _wait_free(slot)
                first = block * 128 + part * R
                mbarrier.expect(q_full.index(slot), R * D * 2 + R * 4)
                _load(q_desc, [batch, first, head, 0], q_full.index(slot), q_ring.index(slot))
                _load(lse_desc, [tile // Mk, first], q_full.index(slot), lse_ring.index(slot))
                mbarrier.expect(grad_full.index(slot), R * D * 2 + R * 4)
                _load(grad_desc, [batch, first, head, 0], grad_full.index(slot), grad_ring.index(slot))
                _load(delta_desc, [tile // Mk, first], grad_full.index(slot), delta_ring.index(slot))
                slot = gl.where(slot == S - 1, 0, slot + 1)
            block = following


@gluon.jit
def _dkv_scores(k, v, q_ring, grad_ring, q_full, grad_full, slot, phase):
    """Starts K Q^T and V dO^T (64, ROWS)."""
    T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    D: gl.constexpr = k.shape[1]
    zero = gl.full([64, ROWS], 0.0, gl.float32, T)
    mbarrier.wait(q_full.index(slot), phase)
    mbarrier.wait(grad_full.index(slot), phase)
    q = q_ring.index(slot).reshape([ROWS, D])
    grad = grad_ring.index(slot).reshape([ROWS, D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, grad.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _dkv_weights(s, dp, c, lse_ring, delta_ring, slot, dtype: gl.constexpr, A: gl.constexpr):
    """P^T and dS^T (64, ROWS) as first operands, once s and dp are there."""
    C: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))
    lse = lse_ring.index(slot).reshape([ROWS]).load(C)[None, :]
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * c - lse)
    delta = delta_ring.index(slot).reshape([ROWS]).load(C)[None, :]
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - delta)
    return gl.convert_layout(p.to(dtype), A), gl.convert_layout(ds.to(dtype), A)


@gluon.jit
def _dkv_consumer(W: gl.constexpr, dk_desc, dv_desc, count, order, scale, c, H, Mk, k_tile, v_tile, q_ring,
                  grad_ring, lse_ring, delta_ring, own, q_full, grad_full):
    D: gl.constexpr = dk_desc.block_shape[3]
    R: gl.constexpr = ROWS
    S: gl.constexpr = STAGES
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])   # of the sums
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    MY_TURN: gl.constexpr = ("bar.sync 14, 256; mov.u32 $0, 0;" if W == 0 else
                             "bar.sync 15, 256; mov.u32 $0, 0;")
    YOUR_TURN: gl.constexpr = ("bar.arrive 15, 256; mov.u32 $0, 0;" if W == 0 else
                               "bar.arrive 14, 256; mov.u32 $0, 0;")
    tile, n, row, head, batch = _tile(count, order, H, Mk)
    k = k_tile.index(W).reshape([64, D])
    v = v_tile.index(W).reshape([64, D])
    dk = gl.full([64, D], 0.0, gl.float32, O)
    dv = gl.full([64, D], 0.0, gl.float32, O)
    if n > 0:
        mbarrier.wait(own, 0)
        if W == 1:
            _barrier(YOUR_TURN)  # the first turn is the other consumer's
        slot = 0
        phase = 0
        _barrier(MY_TURN)
        s, dp = _dkv_scores(k, v, q_ring, grad_ring, q_full, grad_full, slot, phase)
        _barrier(YOUR_TURN)
        b_p, b_ds = _dkv_weights(s, dp, c, lse_ring, delta_ring, slot, k.dtype, A)
        for j in range(1, n * (128 // R)):
            _barrier(MY_TURN)
            dv = warpgroup_mma(b_p, grad_ring.index(slot).reshape([R, D]), dv, is_async=True)
            dk = warpgroup_mma(b_ds, q_ring.index(slot).reshape([R, D]), dk, is_async=True)
            dv = warpgroup_mma_wait(1, deps=[dv])  # there are not the registers to leave both running
            before = slot
            phase = gl.where(slot == S - 1, phase ^ 1, phase)
            slot = gl.where(slot == S - 1, 0, slot + 1)
            s, dp = _dkv_scores(k, v, q_ring, grad_ring, q_full, grad_full, slot, phase)
            _barrier(YOUR_TURN)
            dk = warpgroup_mma_wait(2, deps=[dk])
            _free(before)
            b_p, b_ds = _dkv_weights(s, dp, c, lse_ring, delta_ring, slot, k.dtype, A)
        _barrier(MY_TURN)
        dv = warpgroup_mma(b_p, grad_ring.index(slot).reshape([R, D]), dv, is_async=True)
        dk = warpgroup_mma(b_ds, q_ring.index(slot).reshape([R, D]), dk, is_async=True)
        _barrier(YOUR_TURN)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    k.store((dk * scale).to(k.dtype))
    v.store(dv.to(v.dtype))
    fence_async_shared()
    _meet()
    _store(dk_desc, [batch, row + W * 64, head, 0], k_tile.index(W))
    _store(dv_desc, [batch, row + W * 64, head, 0], v_tile.index(W))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "Mk", "cap"])
def dkv_kernel(q_desc, grad_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc, index, count, order,
               scale, c, H, Mk, cap):
    D: gl.constexpr = k_desc.block_shape[3]
    R: gl.constexpr = ROWS
    S: gl.constexpr = STAGES
    k_tile = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 64, 1, D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 64, 1, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [S, 1, R, 1, D], q_desc.layout)
    grad_ring = gl.allocate_shared_memory(grad_desc.dtype, [S, 1, R, 1, D], grad_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [S, 1, R], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [S, 1, R], delta_desc.layout)
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own, count=1)
    for i in gl.static_range(S):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(grad_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_dkv_consumer, (0, dk_desc, dv_desc, count, order, scale, c, H, Mk, k_tile, v_tile, q_ring,
                         grad_ring, lse_ring, delta_ring, own, q_full, grad_full)),
        (_dkv_consumer, (1, dk_desc, dv_desc, count, order, scale, c, H, Mk, k_tile, v_tile, q_ring,
                         grad_ring, lse_ring, delta_ring, own, q_full, grad_full)),
        (_dkv_producer, (q_desc, grad_desc, lse_desc, delta_desc, k_desc, v_desc, index, count, order, H, Mk,
                         cap, k_tile, v_tile, q_ring, grad_ring, lse_ring, delta_ring, own, q_full,
                         grad_full)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])


@gluon.jit
def _dq_producer(q_desc, grad_desc, k_desc, v_desc, index, count, order, H, Mq, cap, q_tile, grad_tile,
                 k_ring, v_ring, own, k_full, v_full):
    D: gl.constexpr = k_desc.block_shape[3]
    tile, n, row, head, batch = _tile(count, order, H, Mq)
    if n > 0:
        mbarrier.expect(own, 2 * 128 * D * 2)
        for w in gl.static_range(2):
            _load(q_desc, [batch, row + w * 64, head, 0], own, q_tile.index(w))
            _load(grad_desc, [batch, row + w * 64, head, 0], own, grad_tile.index(w))
        index += tile.to(gl.int64) * cap
        block = gl.load(index)
        for j in range(n):
            following = gl.load(index + gl.minimum(j + 1, n - 1))
            if j >= 2:
                _wait_free(j & 1)
            mbarrier.expect(k_full.index(j & 1), 128 * D * 2)
            _load(k_desc, [batch, block * 128, head, 0], k_full.index(j & 1), k_ring.index(j & 1))
            mbarrier.expect(v_full.index(j & 1), 128 * D * 2)
            _load(v_desc, [batch, block * 128, head, 0], v_full.index(j & 1), v_ring.index(j & 1))
            block = following


@gluon.jit
def _dq_consumer(W: gl.constexpr, dq_desc, lse2, delta, index, count, order, scale, c, Lk, H, Mq, cap, q_tile,
                 grad_tile, k_ring, v_ring, own, k_full, v_full, PARTIAL: gl.constexpr):
    D: gl.constexpr = dq_desc.block_shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])  # of scores
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])    # of the sum
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tile, n, row, head, batch = _tile(count, order, H, Mq)
    q = q_tile.index(W).reshape([64, D])
    grad = grad_tile.index(W).reshape([64, D])
    zero = gl.full([64, 128], 0.0, gl.float32, S)
    dq = gl.full([64, D], 0.0, gl.float32, O)
    rows = (tile // Mq).to(gl.int64) * Mq * 128 + row + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    b_lse = gl.load(lse2 + rows)[:, None]
    b_delta = gl.load(delta + rows)[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, S))[None, :]
    edge = 128
    if n > 0:
        mbarrier.wait(own, 0)
        if PARTIAL:
            edge = gl.minimum(Lk - gl.load(index + tile.to(gl.int64) * cap + n - 1) * 128, 128)
    for j in range(n):
        k = k_ring.index(j & 1).reshape([128, D])
        mbarrier.wait(k_full.index(j & 1), j >> 1 & 1)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(j & 1), j >> 1 & 1)
        dp = warpgroup_mma(grad, v_ring.index(j & 1).reshape([128, D]).permute((1, 0)), zero, use_acc=False,
                           is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * c - b_lse)
        if PARTIAL:  # keys past the end are zeros, not absent
            p = gl.where(column < gl.where(j == n - 1, edge, 128), p, 0.0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp - b_delta)
        dq = warpgroup_mma(gl.convert_layout(ds.to(k.dtype), A), k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        _free(j & 1)
    q.store((dq * scale).to(q.dtype))
    fence_async_shared()
    _meet()
    _store(dq_desc, [batch, row + W * 64, head, 0], q_tile.index(W))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Lk", "H", "Mq", "cap"])
def dq_kernel(q_desc, grad_desc, dq_desc, k_desc, v_desc, lse2, delta, index, count, order, scale, c, Lk, H,
              Mq, cap, PARTIAL: gl.constexpr):
    D: gl.constexpr = k_desc.block_shape[3]
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 64, 1, D], q_desc.layout)
    grad_tile = gl.allocate_shared_memory(grad_desc.dtype, [2, 1, 64, 1, D], grad_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 128, 1, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 128, 1, D], v_desc.layout)
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own, count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_dq_consumer, (0, dq_desc, lse2, delta, index, count, order, scale, c, Lk, H, Mq, cap, q_tile,
                        grad_tile, k_ring, v_ring, own, k_full, v_full, PARTIAL)),
        (_dq_consumer, (1, dq_desc, lse2, delta, index, count, order, scale, c, Lk, H, Mq, cap, q_tile,
                        grad_tile, k_ring, v_ring, own, k_full, v_full, PARTIAL)),
        (_dq_producer, (q_desc, grad_desc, k_desc, v_desc, index, count, order, H, Mq, cap, q_tile, grad_tile,
                        k_ring, v_ring, own, k_full, v_full)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
