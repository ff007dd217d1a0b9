"""Block lists and FlashVSR's selection in Triton: nothing is read back, and every size of grid and scratch
follows from the shapes, so that a CUDA graph can hold it.

The selection sorts nothing. Probabilities are floats of at least 0, whose bit patterns order as integers: the
threshold of a group (a head's query slice) is found one digit of that integer at a time, from histograms.
Kernels: _scores (softmax, first histogram), _digits three times, _select (lists), _rank (order).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import waves

NOT_A_NUMBER = tl.constexpr(0x3FFFFFFF)  # key of NaN: above the key of 1.0, 0x3F800000, as kthvalue has it
TOP = tl.constexpr(22)                   # the first digit is key >> TOP, 8 bits
BINS = tl.constexpr(256)
LEVELS = ((14, 8), (6, 8), (0, 6))       # of the other digits: shift, bits
CHUNK = 2048                             # keys that one program of _digits takes at a time
PARTS = 32                               # programs of _digits for a group, at most
ROWS, KEYS = 4, 512                      # of the tile in which lists are packed, at most
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
            _rank[(triton.cdiv(last, 32), groups)](count, order, each, tiles, T=32, N=128)
    return order


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, slices: int,
              topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """index, count and order of the selection; arguments as for the public lcsa_mask, any strides.

    Means bf16, fp16 or float32, D of at most 128.
    """
    B, H, Mq, D = q_mean.shape
    Mk, S, groups = k_mean.shape[2], Mq // slices, B * H * slices
    index, count = _new_lists(q_mean, B, H, Mq, Mk)
    n = S * Mk  # probabilities of a group
    rows, cols = _score_tile(groups, S, q_mean.dtype)
    tiles, parts = triton.cdiv(S, rows), min(triton.cdiv(n, CHUNK), PARTS)
    slots = max(tiles, parts)
    keys = q_mean.new_empty((B, H, Mq, Mk), dtype=torch.int32)
    hist = q_mean.new_empty((1 + len(LEVELS), groups, slots, BINS.value), dtype=torch.int32)
    state = q_mean.new_empty((1 + len(LEVELS), groups, 2), dtype=torch.int32)  # digits, rank among their keys
    with torch.cuda.device_of(q_mean):
        _scores[(tiles, groups)](
            q_mean, k_mean, local.view(torch.uint8), keys, hist, state, *q_mean.stride(), *k_mean.stride(),
            *local.stride(), H, slices, S, Mk, slots, min(n - 1, topk), D ** -0.5, D=D, R=rows, N=cols,
            W=max(16, triton.next_power_of_2(D)), num_warps=8, num_stages=2)
        before, told = 8, tiles
        for level, (shift, bits) in enumerate(LEVELS):
            _digits[(parts, groups)](keys, hist[level], state[level], hist[level + 1], state[level + 1], n,
                                     slots, told, BEFORE=before, SHIFT=shift, BITS=bits, CHUNK=CHUNK)
            before, told = bits, parts
        _select[(triton.cdiv(S, ROWS), groups)](keys, hist[-1], state[-1], index, count, S, Mk, slots, parts,
                                                BITS=before, R=ROWS, N=_tile(Mk))
    return index, count, order_of(count)


def _new_lists(like: Tensor, B: int, H: int, Mq: int, Mk: int) -> tuple[Tensor, Tensor]:
    return (torch.empty((B, H, Mq, Mk), dtype=torch.int32, device=like.device),
            torch.empty((B, H, Mq), dtype=torch.int32, device=like.device))


def _tile(length: int) -> int:
    return min(KEYS, max(16, triton.next_power_of_2(length)))


def _score_tile(groups: int, S: int, dtype: torch.dtype) -> tuple[int, int]:
    """Query and key blocks of a step of _scores. Larger ones read keys less often, but spill registers."""
    if dtype == torch.float32:  # without tensor cores
        return 16, 32
    return (32, 64) if groups * triton.cdiv(S, 32) >= 64 else (16, 128)


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
        b_count = tl.load(count + o_tile, mask=o_tile < end, other=0)  # [T]
        b_rank = tl.zeros([T], tl.int32)  # [T]
        for j in range(first, end, N):
            o_other = j + tl.arange(0, N)
            b_other = tl.load(count + o_other, mask=o_other < end, other=-1)  # [N]
            b_before = (b_other[None, :] > b_count[:, None]) | (
                (b_other[None, :] == b_count[:, None]) & (o_other[None, :] < o_tile[:, None]))  # [T, N]
            b_rank += tl.sum(b_before.to(tl.int32), 1)
        tl.store(order + first + b_rank, o_tile, mask=o_tile < end)


@triton.jit
def _score(b_q, p_k, local, o_key, o_row, skm, sl0, sl1, S, Mk, m_row, m_d, scale):
    """Scores of N key blocks, -inf where not allowed. The product is rounded as torch.matmul rounds it, and
    again after scaling: b_s [R, N].
    """
    T: tl.constexpr = b_q.dtype
    m_key = o_key < Mk
    p_k += o_key[None, :].to(tl.int64) * skm
    b_k = tl.load(p_k, mask=m_d[:, None] & m_key[None, :], other=0.0)  # [W, N]
    b_s = tl.dot(b_q, b_k, input_precision="ieee").to(T).to(tl.float32)  # [R, N]
    b_s = (b_s * scale).to(T).to(tl.float32)
    m_s = m_row[:, None] & m_key[None, :]
    b_local = tl.load(local + o_row[:, None] * sl0 + (o_key % S)[None, :] * sl1, mask=m_s, other=0)  # [R, N]
    return tl.where(b_local != 0, b_s, -float("inf"))


@triton.jit(do_not_specialize=["H", "slices", "S", "Mk", "slots", "rank"])
def _scores(q, k, local, keys, hist, state, sqb, sqh, sqm, sqd, skb, skh, skm, skd, sl0, sl1, H, slices, S,
            Mk, slots, rank, scale, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """One program: R query blocks of a group (a head's slice) against all keys. Writes the bits of their
    probabilities and the histogram of the first digit.

    Scores are computed twice, for the softmax's sum and for its values: cheaper than to keep them.
    """
    i_tile, i_group = tl.program_id(0), tl.program_id(1)
    i_head, i_slice = i_group // slices, i_group % slices
    i_b, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    o_row, o_d = i_tile * R + tl.arange(0, R), tl.arange(0, W)
    m_row, m_d = o_row < S, o_d < D
    p_q = q + i_b * sqb + i_h * sqh + (i_slice * S + o_row)[:, None].to(tl.int64) * sqm + o_d[None, :] * sqd
    b_q = tl.load(p_q, mask=m_row[:, None] & m_d[None, :], other=0.0)  # [R, W]
    p_k = k + i_b * skb + i_h * skh + o_d[:, None] * skd  # [W, 1]
    b_max = tl.full([R], -float("inf"), tl.float32)  # [R]
    b_sum = tl.zeros([R], tl.float32)  # [R]
    for j in range(0, Mk, N):
        b_s = _score(b_q, p_k, local, j + tl.arange(0, N), o_row, skm, sl0, sl1, S, Mk, m_row, m_d, scale)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [R]
        b_from = tl.where(b_new == -float("inf"), 0.0, b_new)  # [R], no key yet: -inf - -inf is NaN
        b_sum = b_sum * tl.exp(b_max - b_from) + tl.sum(tl.exp(b_s - b_from[:, None]), 1)
        b_max = b_new
    b_from = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_hist = tl.zeros([BINS], tl.int32)  # [BINS]
    p_keys = keys + (i_group.to(tl.int64) * S + o_row)[:, None] * Mk  # [R, 1]
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        b_s = _score(b_q, p_k, local, o_key, o_row, skm, sl0, sl1, S, Mk, m_row, m_d, scale)
        b_p = tl.exp(b_s - b_from[:, None]) / b_sum[:, None]  # [R, N], NaN in a row without a key, as softmax
        b_key = tl.where(b_p == b_p, b_p.to(tl.int32, bitcast=True), NOT_A_NUMBER)  # [R, N]
        m_key = m_row[:, None] & (o_key < Mk)[None, :]
        tl.store(p_keys + o_key[None, :], b_key, mask=m_key)
        # What is outside counts as 0: that is at the end of the ranking, behind every rank that is asked for.
        b_key = tl.where(m_key, b_key, 0)
        b_hist += tl.histogram(tl.reshape(b_key >> TOP, [R * N], can_reorder=True), BINS)
    tl.store(hist + (i_group * slots + i_tile) * BINS + tl.arange(0, BINS), b_hist)
    if i_tile == 0:
        tl.store(state + i_group * 2, 0)
        tl.store(state + i_group * 2 + 1, rank)


@triton.jit
def _narrow(hist, state, i_group, slots, told, BITS: tl.constexpr):
    """Digits of the key with a given rank from the top, one digit further, and its rank among such keys.

    hist, state: what the last kernel wrote, in told parts for each group
    """
    P: tl.constexpr = 16
    o_bin, o_part = tl.arange(0, 1 << BITS), tl.arange(0, P)
    digits, rank = tl.load(state + i_group * 2), tl.load(state + i_group * 2 + 1)
    b_n = tl.zeros([1 << BITS], tl.int32)  # [bins]
    for j in range(0, told, P):
        b_part = tl.load(hist + (i_group * slots + j + o_part)[:, None] * BINS + o_bin[None, :],
                         mask=(j + o_part < told)[:, None], other=0)  # [P, bins]
        b_n += tl.sum(b_part, 0)
    b_above = tl.sum(b_n, 0) - tl.cumsum(b_n, 0)  # [bins], keys of a larger digit
    b_here = (b_above <= rank) & (rank < b_above + b_n)  # [bins], true once
    digit = tl.sum(tl.where(b_here, o_bin, 0), 0)
    return (digits << BITS) | digit, rank - tl.sum(tl.where(b_here, b_above, 0), 0)


@triton.jit(do_not_specialize=["n", "slots", "told"])
def _digits(keys, hist, state, next_hist, next_state, n, slots, told, BEFORE: tl.constexpr,
            SHIFT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: histogram of the next digit over a part of a group's keys that have the digits so far."""
    i_part, i_group = tl.program_id(0), tl.program_id(1)
    digits, rank = _narrow(hist, state, i_group, slots, told, BEFORE)
    b_hist = tl.zeros([1 << BITS], tl.int32)  # [bins]
    for j in range(i_part * CHUNK, n, tl.num_programs(0) * CHUNK):
        o_key = j + tl.arange(0, CHUNK)
        b_key = tl.load(keys + i_group.to(tl.int64) * n + o_key, mask=o_key < n, other=-1)  # [CHUNK]
        b_hist += tl.histogram((b_key >> SHIFT) & ((1 << BITS) - 1), 1 << BITS,
                               mask=(b_key >> (SHIFT + BITS)) == digits)
    tl.store(next_hist + (i_group * slots + i_part) * BINS + tl.arange(0, 1 << BITS), b_hist)
    if i_part == 0:
        tl.store(next_state + i_group * 2, digits)
        tl.store(next_state + i_group * 2 + 1, rank)


@triton.jit(do_not_specialize=["S", "Mk", "slots", "told"])
def _select(keys, hist, state, index, count, S, Mk, slots, told, BITS: tl.constexpr, R: tl.constexpr,
            N: tl.constexpr):
    """One program makes the lists of R query blocks of a group: the keys above the threshold."""
    i_group = tl.program_id(1)
    threshold, _ = _narrow(hist, state, i_group, slots, told, BITS)
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    m_row = o_row < S
    o_list = i_group.to(tl.int64) * S + o_row
    b_n = tl.zeros([R], tl.int32)  # [R]
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        m_key = m_row[:, None] & (o_key < Mk)[None, :]
        b_key = tl.load(keys + o_list[:, None] * Mk + o_key[None, :], mask=m_key, other=0)  # [R, N]
        b_n = _append((b_key > threshold) & (b_key < NOT_A_NUMBER), b_n, o_key, index + o_list * Mk)
    tl.store(count + o_list, b_n, mask=m_row)
