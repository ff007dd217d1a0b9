"""Block-sparse attention forward for Hopper (sm_90), in Gluon: TMA, wgmma and specialised warps.

Programs stay on their multiprocessor and serve query blocks one after the other, each the next in the order when it
has nearly served its last: so those with neighbouring blocks stay in step, and share what the L2 holds. One producer
warp streams the listed key and value blocks through a ring in shared memory by TMA, the next query block's while the
consumers still are at the last; two consumer warpgroups of 64 query rows each take turns at the tensor cores: while
one multiplies, the other computes its exponentials. Inside a warpgroup the product P V of the block before runs under
the softmax of the current one.

bf16 holds the maximum of a row fixed at that of its first block: later blocks need no maximum, no exchange
between lanes and no rescaling. bf16 has float32's exponents, but P is rounded to it in the product and not in the sum.
Under their own maximum keys with all of a row's weight, one or equal ones, have the P 1, which needs no rounding. So
where a block triples a lane's share of the sum, the warp takes the maxima of this block. Equal keys that outgrow the
first block by less carry one rounding more than under the running maximum.
When a row's sum passes 2^60 or a sum of products is not finite, or when scores are so large (2^12 in base 2) that their
product with the scale cannot be rounded once, the program runs the block again with the running maximum, after it
has served all its blocks.
fp16 has too few exponents and always runs the exact pass. Lists run from their last block to the first: in a
stream the newest keys, the likeliest to weigh most, come first; and the block that may be partial is the
first too.

Ideas: ping-pong of warpgroups and overlapped P V from FlashAttention-3 (arXiv 2407.08608), to rescale only where it
is needed from FlashAttention-4. The fixed maximum, what tells that it is outgrown, named barriers instead of mbarriers
to free ring slots and sums kept per lane were found by experiment.
"""
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)

from ._gluon import descriptor, load as _load, meet as _meet, store as _store
from ._triton import processors

BLOCK = 128                                           # tokens of a block
CONSUMER_REGISTERS = gl.constexpr(240)                # of a thread; 64512 in all
PRODUCER_REGISTERS = gl.constexpr(24)

# Named barriers: slots of the ring free of keys 8 and 9, of values 10 and 11; queries free 12; consumers told of a
# tile, or that there are no more, 13; all tiles served 7; turns of the consumers 14 and 15. Triton itself uses the low
# numbers. 288 threads are both consumers and the producer, 256 the consumers.
K_FREE = gl.constexpr(8)
V_FREE = gl.constexpr(10)
AHEAD = gl.constexpr(8)  # blocks before a tile's last when its program takes the next tile, as the answer needs time


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, order: Tensor,
            scale: float) -> tuple[Tensor, Tensor]:
    B, Lq, H, D = q.shape
    Lk, (Mq, cap) = k.shape[1], index.shape[2:]
    out = torch.empty((B, Lq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    half, whole, tiles = [1, BLOCK // 2, 1, D], [1, BLOCK, 1, D], B * H * Mq
    # Of each tile: halves that need the running maximum, and the tile that its program served before.
    again = torch.empty((tiles, 3), dtype=torch.int32, device=q.device)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)  # tiles, beside each program's first
    with torch.cuda.device_of(q):
        forward_kernel[(min(tiles, processors(q.device)),)](
            descriptor(q, half), descriptor(k, whole), descriptor(v, whole), descriptor(out, half), lse, index,
            count, order, taken, again, scale * math.log2(math.e), Lq, Lk, H, Mq, cap, tiles,
            **config(q.dtype == torch.bfloat16, Lk % BLOCK != 0))
    return out, lse


def config(bf16: bool, partial: bool) -> dict[str, int | bool]:
    """The kernel's constants. partial: the last key block is."""
    return dict(FIXED_MAX=bf16, PARTIAL=partial, num_warps=4)


@gluon.jit
def _barrier(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _free(first: gl.constexpr, step):
    """A consumer is done with its slot. mbarrier.arrive would synchronise the warpgroup first."""
    gl.inline_asm_elementwise("bar.arrive $1, 288; mov.u32 $0, 0;", "=r,r", [first + (step & 1)],
                              dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch(desc, batch, row, head, step, ring, full, free: gl.constexpr):
    """The producer waits for both consumers to free the slot, then asks for a block."""
    if step >= 2:  # both slots begin free
        gl.inline_asm_elementwise("bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [free + (step & 1)],
                                  dtype=gl.int32, is_pure=False, pack=1)
    mbarrier.expect(full.index(step & 1), 128 * desc.block_shape[3] * 2)
    _load(desc, [batch, row, head, 0], full.index(step & 1), ring.index(step & 1))


@gluon.jit
def _take(taken):
    """Asks for a place in the order. Lane 0 will have the answer, _answer waits for it; gl.atomic_add would at once."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0; "
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }", "=r,l", [taken], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _answer(ticket):
    return gl.num_programs(0) + gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [ticket], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tell(told, tile, n, edge, first):
    """The consumers, who would have to wait for memory: tile, -1 if there are no more, n and the first block's keys.

    first: of a pass; before others the consumers must have done with the tile before
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if first == 0:
        _barrier("bar.sync 12, 288; mov.u32 $0, 0;")
    told.index(0).store(gl.full([1], tile, gl.int32, L))
    told.index(1).store(gl.full([1], n, gl.int32, L))
    told.index(2).store(gl.full([1], edge, gl.int32, L))
    _barrier("bar.arrive 13, 288; mov.u32 $0, 0;")


@gluon.jit
def _stream(q_desc, k_desc, v_desc, tile, n, first, step, taken, index, Lk, H, Mq, cap, q_tile, told, k_ring, v_ring,
            q_full, k_full, v_full, TAKE: gl.constexpr):
    """A tile's queries, and its listed blocks from the last to the first, keys one block ahead of values.

    first: of a pass    step: blocks that went through the ring before
    TAKE: the next tile's place is asked for: returns what _answer wants
    """
    row, head, batch = tile % Mq * 128, tile // Mq % H, tile // Mq // H
    index += tile.to(gl.int64) * cap
    block = gl.load(index + gl.maximum(n - 1, 0))
    following = gl.load(index + gl.maximum(n - 2, 0))
    if n > 0:
        _fetch(k_desc, batch, block * 128, head, step, k_ring, k_full, K_FREE)
    _tell(told, tile, n, gl.minimum(Lk - block * 128, 128), first)
    for w in gl.static_range(2):
        mbarrier.expect(q_full.index(w), 64 * q_desc.block_shape[3] * 2)
        _load(q_desc, [batch, row + w * 64, head, 0], q_full.index(w), q_tile.index(w))
    ticket = 0
    if TAKE:
        if n < 2:
            ticket = _take(taken)
    for j in range(1, n):
        if TAKE:
            if j == gl.maximum(n - AHEAD, 1):
                ticket = _take(taken)
        before = block
        block = following
        following = gl.load(index + gl.maximum(n - 2 - j, 0))
        _fetch(k_desc, batch, block * 128, head, step + j, k_ring, k_full, K_FREE)
        _fetch(v_desc, batch, before * 128, head, step + j - 1, v_ring, v_full, V_FREE)
    if n > 0:
        _fetch(v_desc, batch, block * 128, head, step + n - 1, v_ring, v_full, V_FREE)
    return ticket


@gluon.jit
def _producer(q_desc, k_desc, v_desc, index, count, order, taken, again, Lk, H, Mq, cap, tiles, q_tile, told, k_ring,
              v_ring, q_full, k_full, v_full, bad, FIXED_MAX: gl.constexpr):
    place = gl.program_id(0)
    tile = -1
    first = 1
    step = 0
    while place < tiles:
        before = tile
        tile = gl.load(order + place)
        n = gl.load(count + tile)
        if FIXED_MAX:
            gl.store(again + tile * 3 + 2, before)
        ticket = _stream(q_desc, k_desc, v_desc, tile, n, first, step, taken, index, Lk, H, Mq, cap, q_tile, told,
                         k_ring, v_ring, q_full, k_full, v_full, True)
        place = _answer(ticket)
        first = 0
        step += n
    _tell(told, -1, 0, 0, first)
    if FIXED_MAX:
        _barrier("bar.sync 7, 288; mov.u32 $0, 0;")
        L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        if gl.max(bad.index(0).load(L) + bad.index(1).load(L), 0) > 0:
            first = 1
            while tile >= 0:
                if gl.load(again + tile * 3) + gl.load(again + tile * 3 + 1) > 0:
                    n = gl.load(count + tile)
                    _stream(q_desc, k_desc, v_desc, tile, n, first, step, taken, index, Lk, H, Mq, cap, q_tile, told,
                            k_ring, v_ring, q_full, k_full, v_full, False)
                    first = 0
                    step += n
                tile = gl.load(again + tile * 3 + 2)
            _tell(told, -1, 0, 0, first)


@gluon.jit
def _row_sums(p):
    """What each lane holds of a row, summed: (64, 128) to (64, 4), without an exchange between lanes."""
    return gl.sum(gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3), 1)


@gluon.jit
def _shrunk(l, shrink):
    """The lanes' shares (64, 4) of sums times shrink (64,)."""
    return l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None]


@gluon.jit
def _at_once(x):
    """x, 16 bits, computed here. The compiler would move that into each branch of what follows, behind exponentials
    instead of among them. (With 64 channels that is faster.)"""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def _declare_any_lane():
    _barrier(".reg .b32 any_lane; mov.u32 $0, 0;")


@gluon.jit
def _has_greater(x, y):
    """Whether this warp has an x (64, 4) greater than its y. A reduction to a scalar would make the four warps meet; a
    register that _declare_any_lane declares takes the warp's vote from tensors to scalars."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.f32 p, $2, $4; setp.gt.or.f32 p, $3, $5, p; vote.sync.any.pred p, p, 0xffffffff; "
        "selp.b32 any_lane, 1, 0, p; mov.b32 $0, 0; mov.b32 $1, 0; }", "=r,=r,r,r,r,r", [x, y], dtype=gl.int32,
        is_pure=False, pack=2)
    return gl.inline_asm_elementwise("mov.b32 $0, any_lane;", "=r", [], dtype=gl.int32, is_pure=False, pack=1) > 0


@gluon.jit
def _attend(W: gl.constexpr, q, n, edge, c, step, k_ring, v_ring, k_full, v_full, FIXED_MAX: gl.constexpr,
            PARTIAL: gl.constexpr):
    """A consumer's pass over the list: sums of p v (64, D) and of p (64,), and the maximum (64,) they refer to, times
    c: of all scores, or of the first block's and of those of blocks that outgrew it.

    edge: keys of the block that comes first    step: blocks that went through the ring before
    """
    D: gl.constexpr = q.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])  # of scores
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])    # of the result
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    MY_TURN: gl.constexpr = ("bar.sync 14, 256; mov.u32 $0, 0;" if W == 0 else
                             "bar.sync 15, 256; mov.u32 $0, 0;")
    YOUR_TURN: gl.constexpr = ("bar.arrive 15, 256; mov.u32 $0, 0;" if W == 0 else
                               "bar.arrive 14, 256; mov.u32 $0, 0;")
    zero = gl.full([64, 128], 0.0, gl.float32, S)
    acc = gl.full([64, D], 0.0, gl.float32, O)

    mbarrier.wait(k_full.index(step & 1), step >> 1 & 1)
    _barrier(MY_TURN)
    s = warpgroup_mma(q, k_ring.index(step & 1).reshape([128, D]).permute((1, 0)), zero, use_acc=False,
                      is_async=True)
    _barrier(YOUR_TURN)
    s = warpgroup_mma_wait(0, deps=[s])
    _free(K_FREE, step)
    if PARTIAL:
        s = gl.where(gl.arange(0, 128, gl.SliceLayout(0, S))[None, :] < edge, s, float("-inf"))
    m = gl.max(s, 1)
    p = gl.exp2((s - m[:, None]) * c)
    l = _row_sums(p)
    m_c = m * c
    b_p = gl.convert_layout(p.to(q.dtype), P)
    for j in range(1, n):
        at = step + j
        mbarrier.wait(k_full.index(at & 1), at >> 1 & 1)
        _barrier(MY_TURN)
        s = warpgroup_mma(q, k_ring.index(at & 1).reshape([128, D]).permute((1, 0)), zero, use_acc=False,
                          is_async=True)
        mbarrier.wait(v_full.index(at - 1 & 1), at - 1 >> 1 & 1)
        pv = warpgroup_mma(b_p, v_ring.index(at - 1 & 1).reshape([128, D]), acc, is_async=True)
        _barrier(YOUR_TURN)
        s = warpgroup_mma_wait(1, deps=[s])
        _free(K_FREE, at)
        if FIXED_MAX:
            p = gl.exp2(s * c - m_c[:, None])
            more = _row_sums(p)
            acc = warpgroup_mma_wait(0, deps=[pv])
        else:
            highest = gl.maximum(m, gl.max(s, 1))
            shrink = gl.exp2((m - highest) * c)
            m = highest
            # Not s c - m c in one instruction, which is not 0 at the maximum when scores are large.
            p = gl.exp2((s - m[:, None]) * c)
            l = _shrunk(l, shrink)
            more = _row_sums(p)
            acc = warpgroup_mma_wait(0, deps=[pv])
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
        _free(V_FREE, at - 1)
        # Made before the wait, P in 16 bits makes ptxas put all wgmma in a row (its warning C7513).
        rounded = p.to(q.dtype)
        if FIXED_MAX and D == 128:
            rounded = _at_once(rounded)
        b_p = gl.convert_layout(rounded, P)
        if FIXED_MAX:
            # A key heavier than all before it, if P was rounded: from here on it, and keys like it, have the P 1.
            if _has_greater(more, l * 2.0 + 1.0):
                growth = gl.maximum(gl.max(p, 1), 1.0)
                m_c += gl.log2(growth)
                shrink = 1.0 / growth
                l, more = _shrunk(l, shrink), _shrunk(more, shrink)
                acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
                b_p = gl.convert_layout((p * shrink[:, None]).to(q.dtype), P)
        l += more
    last = step + n - 1
    mbarrier.wait(v_full.index(last & 1), last >> 1 & 1)
    pv = warpgroup_mma(b_p, v_ring.index(last & 1).reshape([128, D]), acc, is_async=True)
    R: gl.constexpr = gl.SliceLayout(1, O)
    total = gl.convert_layout(gl.sum(l, 1), R)
    acc = warpgroup_mma_wait(0, deps=[pv])
    _free(V_FREE, last)
    if not FIXED_MAX:
        m_c = m * c
    return acc, total, gl.convert_layout(m_c, R)


@gluon.jit
def _told(told, i: gl.constexpr):
    return gl.max(told.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _next(told):
    _barrier("bar.sync 13, 288; mov.u32 $0, 0;")
    return _told(told, 0), _told(told, 1)


@gluon.jit
def _serve(W: gl.constexpr, tile, n, out_desc, lse, again, served, step, c, Lq, H, Mq, q_tile, out_tile, told, k_ring,
           v_ring, q_full, k_full, v_full, FIXED_MAX: gl.constexpr, AGAIN: gl.constexpr, PARTIAL: gl.constexpr):
    """A consumer's half of a tile, written if its maximum was good enough; returns whether it was not.

    AGAIN: written only if it was not the first time
    """
    D: gl.constexpr = out_desc.block_shape[3]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    R: gl.constexpr = gl.SliceLayout(1, O)
    row, head, batch = tile % Mq * 128 + W * 64, tile // Mq % H, tile // Mq // H
    mbarrier.wait(q_full.index(W), served & 1)
    acc = gl.full([64, D], 0.0, gl.float32, O)
    log_sum = gl.full([64], float("-inf"), gl.float32, R)
    is_bad = 0
    if n > 0:
        edge = 128
        if PARTIAL:
            edge = _told(told, 2)
        q = q_tile.index(W).reshape([64, D])
        if D == 64 and FIXED_MAX:  # in registers a tenth faster; in all other forms as fast or slower
            q = q.load(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), 2))
        acc, l, m = _attend(W, q, n, edge, c, step, k_ring, v_ring, k_full, v_full, FIXED_MAX, PARTIAL)
        if FIXED_MAX:
            # Written so that NaN is bad too: the exact pass decides what it means. gl.max would drop it, and that
            # some column is not below infinity, asked of each, ptxas 12.8 takes to be false.
            in_range = (l < 2.0 ** 60) & (gl.abs(m) < 2.0 ** 12) & (gl.sum(gl.abs(acc), 1) < float("inf"))
            is_bad = gl.max(gl.where(in_range, 0, 1), 0)
        acc *= (1.0 / l)[:, None]
        log_sum = (m + gl.log2(l)) * 0.6931471805599453
    _barrier("bar.arrive 12, 288; mov.u32 $0, 0;")
    asked = 1
    if AGAIN:
        asked = gl.load(again + tile * 3 + W)
    if asked > is_bad:
        tma.store_wait(0)
        _meet()
        half = out_tile.index(W)
        half.reshape([64, D]).store(acc.to(out_desc.dtype))
        fence_async_shared()
        _meet()
        _store(out_desc, [batch, row, head, 0], half)
        rows = row + gl.arange(0, 64, R)
        gl.store(lse + (tile // Mq).to(gl.int64) * Lq + rows, log_sum, mask=rows < Lq)
    if FIXED_MAX:
        gl.store(again + tile * 3 + W, is_bad)
    return is_bad


@gluon.jit
def _consumer(W: gl.constexpr, out_desc, lse, again, c, Lq, H, Mq, q_tile, out_tile, told, k_ring, v_ring, q_full,
              k_full, v_full, bad, FIXED_MAX: gl.constexpr, PARTIAL: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    served = 0
    step = 0
    any_bad = 0
    if W == 1:
        _barrier("bar.arrive 14, 256; mov.u32 $0, 0;")  # the first turn is the other consumer's
    tile, n = _next(told)
    while tile >= 0:
        is_bad = _serve(W, tile, n, out_desc, lse, again, served, step, c, Lq, H, Mq, q_tile, out_tile, told, k_ring,
                        v_ring, q_full, k_full, v_full, FIXED_MAX, False, PARTIAL)
        any_bad = gl.maximum(any_bad, is_bad)
        served += 1
        step += n
        tile, n = _next(told)
    if FIXED_MAX:
        bad.index(W).store(gl.full([1], any_bad, gl.int32, ONE))
        _barrier("bar.sync 7, 288; mov.u32 $0, 0;")
        if gl.max(bad.index(0).load(ONE) + bad.index(1).load(ONE), 0) > 0:
            tile, n = _next(told)
            while tile >= 0:
                _serve(W, tile, n, out_desc, lse, again, served, step, c, Lq, H, Mq, q_tile, out_tile, told, k_ring,
                       v_ring, q_full, k_full, v_full, False, True, PARTIAL)
                served += 1
                step += n
                tile, n = _next(told)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Lq", "Lk", "H", "Mq", "cap", "tiles"])
def forward_kernel(q_desc, k_desc, v_desc, out_desc, lse, index, count, order, taken, again, c, Lq, Lk, H, Mq, cap,
                   tiles, FIXED_MAX: gl.constexpr, PARTIAL: gl.constexpr):
    D: gl.constexpr = k_desc.block_shape[3]
    _declare_any_lane()
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 64, 1, D], q_desc.layout)
    out_tile = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 64, 1, D], q_desc.layout)
    told = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 128, 1, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 128, 1, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bad = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (0, out_desc, lse, again, c, Lq, H, Mq, q_tile, out_tile, told, k_ring, v_ring, q_full, k_full,
                     v_full, bad, FIXED_MAX, PARTIAL)),
        (_consumer, (1, out_desc, lse, again, c, Lq, H, Mq, q_tile, out_tile, told, k_ring, v_ring, q_full, k_full,
                     v_full, bad, FIXED_MAX, PARTIAL)),
        (_producer, (q_desc, k_desc, v_desc, index, count, order, taken, again, Lk, H, Mq, cap, tiles, q_tile, told,
                     k_ring, v_ring, q_full, k_full, v_full, bad, FIXED_MAX)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
