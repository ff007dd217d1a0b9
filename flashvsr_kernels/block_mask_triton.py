"""Block lists and FlashVSR's selection in Triton: nothing is read back, and every size of grid and scratch
follows from the shapes, so that a CUDA graph can hold it.

The selection sorts nothing. Probabilities are floats of at least 0, whose bits order as integers: keys. The
threshold of a group (a head's query slice) is found digit by digit, the first in a histogram of all keys, the
others among the few keys that begin with it, the candidates. Each kernel needs all of the one before:
_scores, _spread (softmax, histogram), _gather (candidates), _select (lists), _rank (order). They are short: from
sm_90 on each is started before the one before ends, and waits for its results itself (programmatic dependent launch).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from . import _triton
from .block_mask import STRIP, waves

NOT_A_NUMBER = tl.constexpr(0x3FFFFFFF)  # key of NaN: above the key of 1.0, 0x3F800000, as kthvalue has it
TOP, BINS = tl.constexpr(18), tl.constexpr(4096)  # the first digit is key >> TOP: 32 of them to a factor of 2
BITS, DIGITS = tl.constexpr(6), tl.constexpr(64)  # of each of the other three
ROWS, KEYS = 8, 512  # of the tile that a program takes at a time, with a warp a row; KEYS at most
CHUNK = 32 * ROWS    # candidates that _select takes at a time, one a thread
# No kernel is specialised for a size: else a stream's first chunk and the others would each compile them all.


def block_lists(dense: Tensor, columns: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """index, count and order of bool (B, H, Mq, Mk), any strides, as in BlockMask; columns as for order_of."""
    B, H, Mq, Mk = dense.shape
    index, count = _new_lists(dense, B, H, Mq, Mk)
    if count.numel():
        with torch.cuda.device_of(dense):
            _pack[(triton.cdiv(Mq, ROWS), B * H)](dense.view(torch.uint8), index, count, *dense.stride(), H,
                                                  Mq, Mk, R=ROWS, N=_tile(Mk), num_warps=ROWS)
    return index, count, order_of(count, columns)


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


def order_of(count: Tensor, columns: int | None) -> Tensor:
    """Order (B * H * Mq,) int32 in which to run the tiles of count (B, H, Mq), as in BlockMask.

    columns: of the picture whose blocks the Mq are; None for one row
    """
    tiles, blocks = count.numel(), count.shape[2]
    columns = blocks if columns is None else columns
    order = torch.empty(tiles, dtype=torch.int32, device=count.device)
    if tiles:
        each, groups = waves(tiles, count.device)
        last = tiles - (groups - 1) * each  # the longest group
        with torch.cuda.device_of(count):
            _rank[(triton.cdiv(last, 8), groups)](count, order, each, tiles, blocks, columns, W=STRIP, T=8, N=256,
                                                  **_early(count))
    return order


def _early(x: Tensor) -> dict[str, bool]:
    """For a kernel that begins with _await: whether it may start early on x's device."""
    early = _triton.capability(x) >= 90
    return {"EARLY": early, "launch_pdl": early}


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, slices: int, topk: int,
              columns: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
    softmax = q_mean.new_empty((2, groups * S), dtype=torch.float32)
    tally = q_mean.new_empty(groups * (BINS.value + 1), dtype=torch.int32)
    hist, found = tally[:groups * BINS.value], tally[groups * BINS.value:]
    candidates = q_mean.new_empty((groups, S * Mk), dtype=torch.int32)
    state = q_mean.new_empty((groups, 2), dtype=torch.int32)
    tile = {"R": ROWS, "N": _tile(Mk), "num_warps": ROWS, **_early(q_mean)}
    with torch.cuda.device_of(q_mean):
        _scores[(parts, triton.cdiv(S, rows), groups)](
            q_mean, k_mean, local.view(torch.uint8), scores, tally, *q_mean.stride(), *k_mean.stride(),
            *local.stride(), H, slices, S, Mk, pitch, tally.numel(), D ** -0.5, D=D, R=rows, N=cols,
            W=max(16, triton.next_power_of_2(D)), EARLY=tile["EARLY"], num_warps=warps)
        _spread[(tiles, groups)](scores, softmax, hist, S, Mk, pitch, **tile)
        _gather[(tiles, groups)](scores, softmax, hist, found, candidates, state, S, Mk, pitch,
                                 min(S * Mk - 1, topk), **tile)
        _select[(tiles, groups)](scores, softmax, found, candidates, state, index, count, S, Mk, pitch,
                                 C=CHUNK, **tile)
    return index, count, order_of(count, columns)


def _new_lists(like: Tensor, B: int, H: int, Mq: int, Mk: int) -> tuple[Tensor, Tensor]:
    return (torch.empty((B, H, Mq, Mk), dtype=torch.int32, device=like.device),
            torch.empty((B, H, Mq), dtype=torch.int32, device=like.device))


def _tile(length: int) -> int:
    # At least a warp's threads: were there fewer keys, _spread and _gather might count some twice.
    return min(KEYS, max(32, triton.next_power_of_2(length)))


def _score_tile(groups: int, S: int, Mk: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Query and key blocks of a program of _scores, and its warps."""
    if dtype == torch.float32:  # without tensor cores; larger ones spill registers
        return 16, 32, 8
    # Large ones read less, but must be enough to fill a GPU several times.
    return (64, 128, 8) if groups * triton.cdiv(S, 64) * triton.cdiv(Mk, 128) >= 512 else (32, 64, 4)


@triton.jit
def _await(EARLY: tl.constexpr):
    """Lets the next kernel start, and waits for all that the kernels before wrote."""
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def _append(b_kept, b_n, o_key, p_row):
    """Writes the keys that b_kept [R, N] marks behind the b_n [R] that rows p_row [R] have; the new b_n."""
    b_one = b_kept.to(tl.int32)  # [R, N]
    b_at = tl.where(b_kept, b_n[:, None] + tl.cumsum(b_one, 1) - 1, -1)  # [R, N]
    tl.store(p_row[:, None] + b_at, tl.broadcast_to(o_key[None, :], b_at.shape), mask=b_at >= 0)
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


@triton.jit
def _in_strips(at, blocks, columns, W: tl.constexpr):
    """Tile at a place, if each head's picture of blocks in so many columns is taken in strips of W columns."""
    inside = at % blocks
    rows = blocks // columns
    left = inside // (rows * W) * W  # the strip's first column
    width = tl.minimum(columns - left, W)
    inside -= left * rows
    return at // blocks * blocks + inside // width * columns + left + inside % width


@triton.jit(do_not_specialize=["group", "total", "blocks", "columns"])
def _rank(count, order, group, total, blocks, columns, W: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
          EARLY: tl.constexpr):
    """One program places T tiles of a group: behind the longer ones, and the equal ones before it in strips."""
    _await(EARLY)
    i_group = tl.program_id(1)
    first = i_group * group
    end = tl.where(i_group == tl.num_programs(1) - 1, total, first + group)
    o_at = first + tl.program_id(0) * T + tl.arange(0, T)
    if first + tl.program_id(0) * T < end:
        # Both conditions in one integer, which is different for each tile; -1 is behind all.
        n = end - first
        o_tile = _in_strips(o_at, blocks, columns, W)
        b_mine = tl.load(count + o_tile, mask=o_at < end, other=-1) * n - (o_at - first)  # [T]
        b_before = tl.zeros([T, N], tl.int32)  # [T, N]
        for j in range(first, end, N):
            o_other = j + tl.arange(0, N)
            p_other = count + _in_strips(o_other, blocks, columns, W)
            b_other = tl.load(p_other, mask=o_other < end, other=-1) * n - (o_other - first)  # [N]
            b_before += (b_other[None, :] > b_mine[:, None]).to(tl.int32)
        tl.store(order + first + tl.sum(b_before, 1), o_tile, mask=o_at < end)


@triton.jit(do_not_specialize=["H", "slices", "S", "Mk", "cleared"])
def _scores(q, k, local, scores, tally, sqb, sqh, sqm, sqd, skb, skh, skm, skd, sl0, sl1, H, slices, S, Mk,
            pitch, cleared, scale, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
            EARLY: tl.constexpr):
    """One program: scores of R query blocks of a group with N key blocks, -inf where not allowed. All of them
    together clear what the next kernels count in, tally.
    """
    _await(EARLY)  # it is the first: there is nothing to wait for
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
    # Keys first: where the compiler sees nothing contiguous, a warp takes neighbours of the first dimension.
    p_local = local + (o_key % S)[:, None] * sl1 + o_row[None, :] * sl0
    b_local = tl.load(p_local, mask=m_key[:, None] & m_row[None, :], other=0)  # [N, R]
    # Rounded as torch.matmul rounds it, and again after scaling.
    b_s = tl.dot(b_q, b_k, input_precision="ieee").to(T).to(tl.float32)  # [R, N]
    b_s = tl.where(tl.trans(b_local) != 0, (b_s * scale).to(T).to(tl.float32), -float("inf")).to(T)
    p_scores = scores + (i_group.to(tl.int64) * S + o_row)[:, None] * pitch + o_key[None, :]
    tl.store(p_scores, b_s, mask=m_row[:, None])
    i_program = (i_group * tl.num_programs(1) + i_tile) * parts + i_part
    for j in range(i_program * 512, cleared, groups * tl.num_programs(1) * parts * 512):
        o_tally = j + tl.arange(0, 512)
        tl.store(tally + o_tally, tl.zeros([512], tl.int32), mask=o_tally < cleared)


@triton.jit
def _rows(S, R: tl.constexpr):
    """The R query blocks of a program: whether they are there, and their numbers among all."""
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    return o_row < S, tl.program_id(1).to(tl.int64) * S + o_row


@triton.jit
def _load(scores, o_list, m_row, o_key, pitch):
    return tl.load(scores + o_list[:, None] * pitch + o_key[None, :],
                   mask=m_row[:, None] & (o_key < pitch)[None, :], other=-float("inf"))  # [R, N]


@triton.jit
def _keys(b_s, b_max, b_log, m_row, o_key, Mk):
    """Keys [R, N] from scores b_s [R, N]; b_max, b_log: [R], each row's largest and the logarithm of its sum
    of exponentials. Outside they are 0: at the end of the ranking, behind every rank that is asked for.
    """
    # NaN in a row without a key, as softmax has it.
    b_p = tl.exp(b_s.to(tl.float32) - b_max[:, None] - b_log[:, None])  # [R, N]
    b_key = tl.where(b_p == b_p, b_p.to(tl.int32, bitcast=True), NOT_A_NUMBER)
    return tl.where(m_row[:, None] & (o_key < Mk)[None, :], b_key, 0)


@triton.jit(do_not_specialize=["S", "Mk"])
def _spread(scores, softmax, hist, S, Mk, pitch, R: tl.constexpr, N: tl.constexpr, EARLY: tl.constexpr):
    """One program: softmax of R query blocks of a group, and their keys in the group's histogram."""
    _await(EARLY)
    m_row, o_list = _rows(S, R)
    b_max = tl.full([R], -float("inf"), tl.float32)  # [R]
    b_sum = tl.zeros([R], tl.float32)  # [R]
    for j in range(0, Mk, N):
        b_s = _load(scores, o_list, m_row, j + tl.arange(0, N), pitch).to(tl.float32)  # [R, N]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [R]
        b_from = tl.where(b_new == -float("inf"), 0.0, b_new)  # [R], no key yet: -inf - -inf is NaN
        b_sum = b_sum * tl.exp(b_max - b_from) + tl.sum(tl.exp(b_s - b_from[:, None]), 1)
        b_max = b_new
    b_log = tl.log(b_sum)  # [R]
    tl.store(softmax + o_list, b_max, mask=m_row)
    tl.store(softmax + tl.num_programs(1) * S + o_list, b_log, mask=m_row)
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        b_s = _load(scores, o_list, m_row, o_key, pitch)  # [R, N]
        b_key = tl.reshape(_keys(b_s, b_max, b_log, m_row, o_key, Mk), [R * N], can_reorder=True)
        tl.atomic_add(hist + tl.program_id(1) * BINS + (b_key >> TOP), 1, mask=b_key > 0, sem="relaxed")


@triton.jit
def _digit(b_n, rank, N: tl.constexpr):
    """Digit of the key before which there are rank larger ones, if b_n [N] keys have each digit, and how many
    of those have the same. The digit is 0 if there are no more than rank keys.
    """
    o_digit = tl.arange(0, N)
    b_above = tl.cumsum(b_n, 0, reverse=True) - b_n  # [N], keys of a larger digit: falls to 0
    # The smallest digit with at most rank above it: the most above, the smallest of those with as many.
    b_both = tl.where(b_above <= rank, b_above.to(tl.int64) * N + (N - 1 - o_digit), -1)  # [N]
    both = tl.max(b_both, 0)
    return N - 1 - (both % N).to(tl.int32), rank - (both // N).to(tl.int32)


@triton.jit(do_not_specialize=["S", "Mk", "rank"])
def _gather(scores, softmax, hist, found, candidates, state, S, Mk, pitch, rank, R: tl.constexpr,
            N: tl.constexpr, EARLY: tl.constexpr):
    """One program: the first digit of a group's threshold, and the candidates in R of its query blocks."""
    _await(EARLY)
    i_group = tl.program_id(1)
    m_row, o_list = _rows(S, R)
    b_max = tl.load(softmax + o_list, mask=m_row, other=0.0)  # [R]
    b_log = tl.load(softmax + tl.num_programs(1) * S + o_list, mask=m_row, other=0.0)  # [R]
    b_s = _load(scores, o_list, m_row, tl.arange(0, N), pitch)  # [R, N], arrives while the digit is found
    o_bin = tl.arange(0, 64)
    p_hist = hist + i_group * BINS
    upper, rank = _digit(tl.sum(tl.load(p_hist + o_bin[:, None] * 64 + o_bin[None, :]), 1), rank, 64)
    lower, rank = _digit(tl.load(p_hist + upper * 64 + o_bin), rank, 64)
    digit = upper * 64 + lower
    if tl.program_id(0) == 0:
        tl.store(state + i_group * 2, digit)
        tl.store(state + i_group * 2 + 1, rank)
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        b_key = tl.reshape(_keys(b_s, b_max, b_log, m_row, o_key, Mk), [R * N], can_reorder=True)
        if j + N < Mk:
            b_s = _load(scores, o_list, m_row, o_key + N, pitch)
        m_key = (b_key > 0) & (b_key >> TOP == digit)
        b_at = tl.atomic_add(found + i_group + b_key * 0, 1, mask=m_key, sem="relaxed")  # [R * N]
        tl.store(candidates + i_group.to(tl.int64) * S * Mk + b_at, b_key, mask=m_key)


@triton.jit
def _count_digits(b_key, m_key, above, SHIFT: tl.constexpr):
    """How many of the keys whose upper digits are as given have each next digit."""
    m_key = m_key & (b_key >> (SHIFT + BITS) == above)
    return tl.histogram((b_key >> SHIFT) & (DIGITS - 1), DIGITS, mask=m_key)


@triton.jit(do_not_specialize=["S", "Mk"])
def _select(scores, softmax, found, candidates, state, index, count, S, Mk, pitch, C: tl.constexpr,
            R: tl.constexpr, N: tl.constexpr, EARLY: tl.constexpr):
    """One program: the threshold of a group and the lists of R of its query blocks, of the keys above."""
    _await(EARLY)
    i_group = tl.program_id(1)
    m_row, o_list = _rows(S, R)
    b_max = tl.load(softmax + o_list, mask=m_row, other=0.0)  # [R]
    b_log = tl.load(softmax + tl.num_programs(1) * S + o_list, mask=m_row, other=0.0)  # [R]
    b_s = _load(scores, o_list, m_row, tl.arange(0, N), pitch)  # [R, N], as in _gather
    o_at = tl.arange(0, C)
    p_candidates = candidates + i_group.to(tl.int64) * S * Mk + o_at
    b_first = tl.load(p_candidates, mask=o_at < S * Mk, other=0)  # [C], most often all there are
    threshold, rank = tl.load(state + i_group * 2), tl.load(state + i_group * 2 + 1)
    n = tl.load(found + i_group)
    for SHIFT in tl.static_range(TOP - BITS, -1, -BITS):
        b_hist = _count_digits(b_first, o_at < n, threshold, SHIFT)  # [DIGITS]
        for j in range(C, n, C):
            b_key = tl.load(p_candidates + j, mask=j + o_at < n, other=0)  # [C]
            b_hist += _count_digits(b_key, j + o_at < n, threshold, SHIFT)
        digit, rank = _digit(b_hist, rank, DIGITS)
        threshold = threshold * DIGITS + digit
    b_n = tl.zeros([R], tl.int32)  # [R]
    for j in range(0, Mk, N):
        o_key = j + tl.arange(0, N)
        b_key = _keys(b_s, b_max, b_log, m_row, o_key, Mk)  # [R, N]
        if j + N < Mk:
            b_s = _load(scores, o_list, m_row, o_key + N, pitch)
        b_n = _append((b_key > threshold) & (b_key < NOT_A_NUMBER), b_n, o_key, index + o_list * Mk)
    tl.store(count + o_list, b_n, mask=m_row)
