"""Block lists and FlashVSR's selection in Triton: nothing is read back, and every size of grid and scratch
follows from the shapes, so that a CUDA graph can hold it.

The selection sorts nothing. Probabilities are floats of at least 0, whose bit patterns, here called keys, order as
integers. The threshold of a group (a head's query slice) is found digit by digit: the first from a histogram of all
keys, the others from the few keys that begin with it, the candidates. Each kernel waits for all of the one before:
_scores, _spread (softmax, histogram), _gather (candidates), _select (lists), _rank (order).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import waves

NOT_A_NUMBER = tl.constexpr(0x3FFFFFFF)  # key of NaN: above the key of 1.0, 0x3F800000, as kthvalue has it
TOP = tl.constexpr(18)                   # the first digit is key >> TOP, 12 bits: 32 bins to a factor of 2
BINS = tl.constexpr(4096)
BITS, DIGITS = tl.constexpr(6), tl.constexpr(64)  # of each of the three other digits
LOG2_E = tl.constexpr(1.4426950408889634)
ROWS, KEYS = 8, 512                      # of the tile that a program takes at a time, at most
PARTS = 32                               # programs of _gather for a group, at most: each reads the histogram
# No kernel is specialised for a size: else a stream's first chunk and the others would each compile them all.


def block_lists(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """index, count and order of bool (B, H, Mq, Mk), any strides, as in BlockMask."""
    B, H, Mq, Mk = dense.shape
    index, count = _new_lists(dense, B, H, Mq, Mk)
    if count.numel():
        with torch.cuda.device_of(dense):
            _pack[(triton.cdiv(Mq, ROWS), B * H)](dense.view(torch.uint8), index, count, *dense.stride(), H,
                                                  Mq, Mk, R=ROWS, N=_tile(Mk))
    return index, count, order_of(count)


def transpose_lists(index: Tensor, count: Tensor, key_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the query blocks that keep each key block.

    index: (B, H, Mq, cap) int32, count: (B, H, Mq) int32, as in BlockMask    key_blocks: Mk
    Returns index_t (B, H, Mk, Mq), count_t (B, H, Mk), order_t (B * H * Mk,), all int32.
    """
    B, H, Mq, cap = index.shape
    dense = torch.zeros((B, H, Mq, key_blocks), dtype=torch.bool, device=index.device)
    if dense.numel():
        with torch.cuda.device_of(index):
            _scatter[(B * H * Mq,)](index, count, dense.view(torch.uint8), cap, key_blocks, N=_tile(cap))
    return block_lists(dense.transpose(2, 3))


def order_of(count: Tensor) -> Tensor:
    """Order (B * H * Mq,) int32 in which to run the tiles of count (B, H, Mq), as in BlockMask."""
    tiles = count.numel()
    order = torch.empty(tiles, dtype=torch.int32, device=count.device)
    if tiles:
        each, groups = waves(tiles, count.device)
        last = tiles - (groups - 1) * each  # the longest group
        with torch.cuda.device_of(count):
            _rank[(triton.cdiv(last, 16), groups)](count, order, each, tiles, T=16, N=256)
    return order


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, slices: int,
              topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """index, count and order of the selection; arguments as for the public lcsa_mask, any strides.

    Means bf16, fp16 or float32, D of at most 128.
    """
    B, H, Mq, D = q_mean.shape
    Mk, S, groups = k_mean.shape[2], Mq // slices, B * H * slices
    index, count = _new_lists(q_mean, B, H, Mq, Mk)
    rows, cols, warps = _score_tile(groups, S, Mk, q_mean.dtype)
    tiles, parts = triton.cdiv(S, ROWS), triton.cdiv(Mk, cols)
    pitch = parts * cols  # a multiple of 16, so that scores are read 16 bytes at a time
    scores = q_mean.new_empty((groups * S, pitch))
    partial = q_mean.new_empty((2, groups, parts, S), dtype=torch.float32)
    softmax = q_mean.new_empty((2, groups * S), dtype=torch.float32)
    tally = q_mean.new_empty(groups * (BINS.value + 1), dtype=torch.int32)
    hist, found = tally[:groups * BINS.value], tally[groups * BINS.value:]
    candidates = q_mean.new_empty((groups, S * Mk), dtype=torch.int32)
    state = q_mean.new_empty((groups, 2), dtype=torch.int32)
    tile = {"R": ROWS, "N": _tile(Mk), "num_warps": 8}
    with torch.cuda.device_of(q_mean):
        _scores[(parts, triton.cdiv(S, rows), groups)](
            q_mean, k_mean, local.view(torch.uint8), scores, partial, tally, *q_mean.stride(),
            *k_mean.stride(), *local.stride(), H, slices, S, Mk, pitch, tally.numel(), D ** -0.5, D=D, R=rows,
            N=cols, W=max(16, triton.next_power_of_2(D)), num_warps=warps)
        _spread[(tiles, groups)](scores, partial, softmax, hist, S, Mk, pitch, parts, P=16, **tile)
        _gather[(min(tiles, PARTS), groups)](scores, softmax, hist, found, candidates, state, S, Mk, pitch,
                                             min(S * Mk - 1, topk), **tile)
        _select[(tiles, groups)](scores, softmax, found, candidates, state, index, count, S, Mk, pitch, C=256,
                                 **tile)
    return index, count, order_of(count)


def _new_lists(like: Tensor, B: int, H: int, Mq: int, Mk: int) -> tuple[Tensor, Tensor]:
    return (torch.empty((B, H, Mq, Mk), dtype=torch.int32, device=like.device),
            torch.empty((B, H, Mq), dtype=torch.int32, device=like.device))


def _tile(length: int) -> int:
    # At least 32: then each thread has an element, and none of _spread's and _gather's atomics is done twice.
    return min(KEYS, max(32, triton.next_power_of_2(length)))


def _score_tile(groups: int, S: int, Mk: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Query and key blocks, and warps, of a program of _scores. Larger ones read less, smaller ones are more."""
    if dtype == torch.float32:  # without tensor cores
        return 16, 32, 4
    return (64, 128, 8) if groups * triton.cdiv(S, 64) * triton.cdiv(Mk, 128) >= 512 else (32, 64, 4)


@triton.jit
def _append(b_kept, b_n, o_key, p_row):
    """Writes the keys that b_kept [R, N] marks behind the b_n [R] that rows p_row [R] have; the new b_n."""
    b_one = b_kept.to(tl.int32)  # [R, N]
    b_at = b_n[:, None] + tl.cumsum(b_one, 1) - 1  # [R, N]
    tl.store(p_row[:, None] + b_at, tl.broadcast_to(o_key[None, :], b_at.shape), mask=b_kept)
    return b_n + tl.sum(b_one, 1)


@triton.jit(do_not_specialize=["H", "Mq", "Mk"])
def _pack(dense, index, count, sb, sh, sq, sk, H, Mq, Mk, R: tl.constexpr, N: tl.constexpr):
    """One program makes the lists of R query blocks of a head."""
    i_head = tl.program_id(1)
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    m_row = o_row < Mq
    i_b, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    p_dense = dense + i_b * sb + i_h * sh + o_row.to(tl.int64) * sq
    o_list = i_head.to(tl.int64) * Mq + o_row
    b_n = tl.zeros([R], tl.int32)  # [R]
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        m_key = m_row[:, None] & (o_key < Mk)[None, :]
        b_dense = tl.load(p_dense[:, None] + o_key[None, :].to(tl.int64) * sk, mask=m_key, other=0)  # [R, N]
        b_n = _append(b_dense != 0, b_n, o_key, index + o_list * Mk)
    tl.store(count + o_list, b_n, mask=m_row)


@triton.jit(do_not_specialize=["cap", "Mk"])
def _scatter(index, count, dense, cap, Mk, N: tl.constexpr):
    """One program marks the keys of one list in dense, which is 0."""
    i_row = tl.program_id(0).to(tl.int64)
    n = tl.load(count + i_row)
    for j in range(0, n, N):
        o_list = j + tl.arange(0, N)
        b_key = tl.load(index + i_row * cap + o_list, mask=o_list < n, other=0)  # [N]
        tl.store(dense + i_row * Mk + b_key, tl.full([N], 1, tl.uint8), mask=o_list < n)


@triton.jit(do_not_specialize=["group", "total"])
def _rank(count, order, group, total, T: tl.constexpr, N: tl.constexpr):
    """One program places T tiles of a group: behind the longer ones, and the equal ones of smaller id."""
    i_group = tl.program_id(1)
    first = i_group * group
    end = tl.where(i_group == tl.num_programs(1) - 1, total, first + group)
    o_tile = first + tl.program_id(0) * T + tl.arange(0, T)
    if first + tl.program_id(0) * T < end:
        # Both conditions in one integer, which is different for each tile; -1 is behind all.
        n = end - first
        b_mine = tl.load(count + o_tile, mask=o_tile < end, other=-1) * n - (o_tile - first)  # [T]
        b_before = tl.zeros([T, N], tl.int32)  # [T, N]
        for j in range(first, end, N):
            o_other = j + tl.arange(0, N)
            b_other = tl.load(count + o_other, mask=o_other < end, other=-1) * n - (o_other - first)  # [N]
            b_before += (b_other[None, :] > b_mine[:, None]).to(tl.int32)
        tl.store(order + first + tl.sum(b_before, 1), o_tile, mask=o_tile < end)


@triton.jit(do_not_specialize=["H", "slices", "S", "Mk", "cleared"])
def _scores(q, k, local, scores, partial, tally, sqb, sqh, sqm, sqd, skb, skh, skm, skd, sl0, sl1, H, slices, S,
            Mk, pitch, cleared, scale, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """One program: scores of R query blocks of a group (a head's slice) with N key blocks, -inf where not allowed,
    and of each row the largest and the sum of exponentials. Clears what the next kernels count in.
    """
    T: tl.constexpr = q.dtype.element_ty
    i_part, i_tile, i_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, groups = tl.num_programs(0), tl.num_programs(2)
    i_head, i_slice = i_group // slices, i_group % slices
    i_b, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    o_row, o_key, o_d = i_tile * R + tl.arange(0, R), i_part * N + tl.arange(0, N), tl.arange(0, W)
    m_row, m_key, m_d = o_row < S, o_key < Mk, o_d < D
    p_q = q + i_b * sqb + i_h * sqh + (i_slice * S + o_row)[:, None].to(tl.int64) * sqm + o_d[None, :] * sqd
    p_k = k + i_b * skb + i_h * skh + o_key[None, :].to(tl.int64) * skm + o_d[:, None] * skd
    b_q = tl.load(p_q, mask=m_row[:, None] & m_d[None, :], other=0.0)  # [R, W]
    b_k = tl.load(p_k, mask=m_d[:, None] & m_key[None, :], other=0.0)  # [W, N]
    b_local = tl.load(local + o_row[:, None] * sl0 + (o_key % S)[None, :] * sl1,
                      mask=m_row[:, None] & m_key[None, :], other=0)  # [R, N]
    i_program = (i_group * tl.num_programs(1) + i_tile) * parts + i_part
    for j in range(i_program * 512, cleared, groups * tl.num_programs(1) * parts * 512):
        o_tally = j + tl.arange(0, 512)
        tl.store(tally + o_tally, tl.zeros([512], tl.int32), mask=o_tally < cleared)
    # Rounded as torch.matmul rounds it, and again after scaling.
    b_s = tl.dot(b_q, b_k, input_precision="ieee").to(T).to(tl.float32)  # [R, N]
    b_s = tl.where(b_local != 0, (b_s * scale).to(T).to(tl.float32), -float("inf"))
    tl.store(scores + (i_group.to(tl.int64) * S + o_row)[:, None] * pitch + o_key[None, :], b_s.to(T),
             mask=m_row[:, None])
    b_max = tl.max(b_s, 1)  # [R]
    b_from = tl.where(b_max == -float("inf"), 0.0, b_max)  # [R], -inf - -inf is NaN
    b_sum = tl.sum(tl.exp2((b_s - b_from[:, None]) * LOG2_E), 1)  # [R]
    p_partial = partial + (i_group * parts + i_part) * S + o_row
    tl.store(p_partial, b_max, mask=m_row)
    tl.store(p_partial + groups * parts * S, b_sum, mask=m_row)


@triton.jit
def _keys(scores, b_max, b_log, o_list, m_row, o_key, Mk, pitch):
    """Keys of probabilities [R, N], 0 outside: at the end of the ranking, behind every rank that is asked for.

    b_max, b_log: [R], of the row's scores the largest and log2 of the sum of exponentials
    """
    b_s = tl.load(scores + o_list[:, None] * pitch + o_key[None, :], mask=m_row[:, None] & (o_key < pitch)[None, :],
                  other=0.0).to(tl.float32)  # [R, N]
    # NaN in a row without a key, as softmax has it. An FMA by name: each kernel must get the same bits.
    b_p = tl.exp2(tl.fma(b_s - b_max[:, None], LOG2_E, -b_log[:, None]))  # [R, N]
    b_key = tl.where(b_p == b_p, b_p.to(tl.int32, bitcast=True), NOT_A_NUMBER)
    return tl.where(m_row[:, None] & (o_key < Mk)[None, :], b_key, 0)


@triton.jit(do_not_specialize=["S", "Mk", "parts"])
def _spread(scores, partial, softmax, hist, S, Mk, pitch, parts, P: tl.constexpr, R: tl.constexpr,
            N: tl.constexpr):
    """One program: softmax of R query blocks of a group from its parts, and their keys in the group's histogram."""
    i_group = tl.program_id(1)
    o_row, o_part = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, P)
    m_row = o_row < S
    o_list = i_group.to(tl.int64) * S + o_row
    p_max = partial + i_group * parts * S + o_row
    p_sum = p_max + tl.num_programs(1) * parts * S
    b_max = tl.full([R], -float("inf"), tl.float32)  # [R]
    b_sum = tl.zeros([R], tl.float32)  # [R]
    for j in range(0, parts, P):
        m_part = m_row[:, None] & (j + o_part < parts)[None, :]
        b_part = tl.load(p_max[:, None] + (j + o_part)[None, :] * S, mask=m_part, other=-float("inf"))  # [R, P]
        b_max = tl.maximum(b_max, tl.max(b_part, 1))
    for j in range(0, parts, P):
        m_part = m_row[:, None] & (j + o_part < parts)[None, :]
        o_at = (j + o_part)[None, :] * S
        b_part = tl.load(p_max[:, None] + o_at, mask=m_part, other=-float("inf"))  # [R, P]
        b_scale = tl.exp2((b_part - b_max[:, None]) * LOG2_E)
        b_sum += tl.sum(tl.load(p_sum[:, None] + o_at, mask=m_part, other=0.0) * b_scale, 1)
    b_log = tl.log2(b_sum)  # [R]
    tl.store(softmax + o_list, b_max, mask=m_row)
    tl.store(softmax + tl.num_programs(1) * S + o_list, b_log, mask=m_row)
    for j in range(0, Mk, N):
        b_key = _keys(scores, b_max, b_log, o_list, m_row, j + tl.arange(0, N), Mk, pitch)  # [R, N]
        tl.atomic_add(hist + i_group * BINS + (b_key >> TOP), 1, mask=b_key > 0, sem="relaxed")


@triton.jit
def _digit(b_n, rank):
    """Digit of the key with a given rank from the top, if b_n [digits] keys have each, and its rank among those
    with this digit; 0 and the same rank if there are no more than rank keys.
    """
    b_above = tl.sum(b_n, 0) - tl.cumsum(b_n, 0)  # [digits], keys of a larger digit
    b_here = (b_above <= rank) & (rank < b_above + b_n)  # [digits], true once at most
    o_digit = tl.arange(0, b_n.shape[0])
    return tl.sum(tl.where(b_here, o_digit, 0), 0), rank - tl.sum(tl.where(b_here, b_above, 0), 0)


@triton.jit(do_not_specialize=["S", "Mk", "rank"])
def _gather(scores, softmax, hist, found, candidates, state, S, Mk, pitch, rank, R: tl.constexpr,
            N: tl.constexpr):
    """One program: the first digit of a group's threshold, and the candidates in a part of its rows."""
    i_group = tl.program_id(1)
    o_bin = tl.arange(0, 64)
    p_hist = hist + i_group * BINS
    upper, rank = _digit(tl.sum(tl.load(p_hist + o_bin[:, None] * 64 + o_bin[None, :]), 1), rank)
    lower, rank = _digit(tl.load(p_hist + upper * 64 + o_bin), rank)
    digit = upper * 64 + lower
    if tl.program_id(0) == 0:
        tl.store(state + i_group * 2, digit)
        tl.store(state + i_group * 2 + 1, rank)
    for i in range(tl.program_id(0) * R, S, tl.num_programs(0) * R):
        o_row = i + tl.arange(0, R)
        m_row = o_row < S
        o_list = i_group.to(tl.int64) * S + o_row
        b_max = tl.load(softmax + o_list, mask=m_row, other=0.0)  # [R]
        b_log = tl.load(softmax + tl.num_programs(1) * S + o_list, mask=m_row, other=0.0)  # [R]
        for j in range(0, Mk, N):
            b_key = _keys(scores, b_max, b_log, o_list, m_row, j + tl.arange(0, N), Mk, pitch)  # [R, N]
            m_key = (b_key > 0) & (b_key >> TOP == digit)
            b_at = tl.atomic_add(found + i_group + b_key * 0, 1, mask=m_key, sem="relaxed")  # [R, N], in any order
            tl.store(candidates + i_group.to(tl.int64) * S * Mk + b_at, b_key, mask=m_key)


@triton.jit(do_not_specialize=["S", "Mk"])
def _select(scores, softmax, found, candidates, state, index, count, S, Mk, pitch, C: tl.constexpr,
            R: tl.constexpr, N: tl.constexpr):
    """One program finds the threshold of a group and makes the lists of R of its query blocks: the keys above."""
    i_group = tl.program_id(1)
    threshold, rank = tl.load(state + i_group * 2), tl.load(state + i_group * 2 + 1)
    n = tl.load(found + i_group)
    for level in tl.static_range(3):
        SHIFT: tl.constexpr = TOP - BITS * (level + 1)
        b_hist = tl.zeros([DIGITS], tl.int32)  # [digits]
        for j in range(0, n, C):
            o_at = j + tl.arange(0, C)
            b_key = tl.load(candidates + i_group.to(tl.int64) * S * Mk + o_at, mask=o_at < n, other=-1)  # [C]
            b_hist += tl.histogram((b_key >> SHIFT) & (DIGITS - 1), DIGITS,
                                   mask=(b_key >> (SHIFT + BITS)) == threshold)
        digit, rank = _digit(b_hist, rank)
        threshold = threshold * DIGITS + digit
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    m_row = o_row < S
    o_list = i_group.to(tl.int64) * S + o_row
    b_max = tl.load(softmax + o_list, mask=m_row, other=0.0)  # [R]
    b_log = tl.load(softmax + tl.num_programs(1) * S + o_list, mask=m_row, other=0.0)  # [R]
    b_n = tl.zeros([R], tl.int32)  # [R]
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        b_key = _keys(scores, b_max, b_log, o_list, m_row, o_key, Mk, pitch)  # [R, N]
        b_n = _append((b_key > threshold) & (b_key < NOT_A_NUMBER), b_n, o_key, index + o_list * Mk)
    tl.store(count + o_list, b_n, mask=m_row)
