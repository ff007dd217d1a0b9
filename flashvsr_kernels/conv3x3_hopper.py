"""The decoder's convolutions for Hopper (sm_90), in Gluon: implicit GEMM, TMA, wgmma and specialised warps.

Programs stay on their multiprocessor and serve tiles of 256 pixels by 128 (or 64) channels in turn. One
producer warp streams 64 input channels at a time, of the tile's pixels and of each tap's weights, through two
rings in shared memory; two consumer warpgroups multiply 128 pixels each and hand the result to TMA through a
staging buffer, where the residual has been waiting since the middle of the sum. A pixel enters shared memory
once for several taps: these are views of the ring, shifted by whole pixels, that is by 128 bytes. Tiles have
two shapes, to fit pictures of any size; both add up in the same order and give the same bits.
  wide    4 x 64 pixels, in rows of 72 (64 and TMA's smallest box of 8): all taps are views of one stage
  square  16 x 16 pixels: a stage serves one column of taps, its rows of 16 pixels stand one behind the other
With a head, what leaves is not the result but what another 3x3 convolution makes of its pixels: the products
with each of that one's taps, in planes that somebody adds up.
What lies outside a picture is read as zeros and not stored. So the border needs no other care, nor do
pictures that the tiles do not divide, nor input channels that 64 does not divide.

Who may touch what, when:
  Rings are the asynchronous proxy's alone: TMA writes, wgmma reads, so there is nothing to fence. A slot is
  read once its mbarrier has counted all bytes. It is freed when the products that read it are complete: they
  complete in order, and only those of the last tap may be running. Each thread arrives at the slot's named
  barrier behind its own wait, so that no warp speaks for another, and the producer refills a slot when all
  256 threads have arrived. Nobody arrives twice before that: the next use of the slot is the refilled one.
  The staging buffer is written and read by threads and by TMA. Threads fence behind their writes, then meet,
  then one starts the store. Before anybody writes there again, a thread or TMA with the residual, the thread
  that started the store has waited until TMA has read, and all have met.
  Every mbarrier that is initialised is used to the end: Triton gives the memory of others to the rings, and
  PTX leaves undefined what a living mbarrier does in memory that has another use.
"""
import math

import torch
from torch import Tensor
from triton import cdiv
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)

from ._gluon import descriptor, load as _load, meet as _meet, store as _store
from ._triton import processors

CONSUMER_REGISTERS = gl.constexpr(232)   # of a thread; 64512 in all
PRODUCER_REGISTERS = gl.constexpr(40)    # with 24 it spills

# Named barriers: slots of weights free from 8 on, stages of pixels from 12 on. Triton itself uses the low
# numbers. 288 threads are both consumers and the producer.
WEIGHTS_FREE = gl.constexpr(8)
PIXELS_FREE = gl.constexpr(12)


def supports(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """None if conv3x3 or upsample_conv can run contiguous tensors like these, else the reason in one line.

    weight: (O, C, 3, 3), channels last, or folded (T, 2, 2, O, 2, 2, C)    others: bias, past, residual, out
    """
    C, O = x.shape[3], weight.shape[0 if weight.ndim == 4 else 3]
    if not x.numel():
        return f"x is empty: {tuple(x.shape)}"
    if C % 8:
        return f"x must have a multiple of 8 channels, for pixels of 16-byte pieces, has {C}"
    if O % 64:
        return f"the output must have a multiple of 64 channels, has {O}"
    if any(y is not None and y.data_ptr() % 16 for y in (x, weight, *others)):
        return "tensors must begin at a multiple of 16 bytes"
    return None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: Tensor | None,
            relu: bool, out: Tensor | None = None) -> Tensor:
    """As the public conv3x3. Input channels count as if rounded up to 64: 784 cost as much as 832."""
    O = weight.shape[0]
    out = torch.empty((*x.shape[:3], O), dtype=x.dtype, device=x.device) if out is None else out
    taps = weight.permute(0, 2, 3, 1).reshape(O, 9, -1)
    _launch(x, taps, out.unsqueeze(2), bias, past, residual, relu)
    return out


def upsample_conv(x: Tensor, folded: Tensor, relu: bool, out: Tensor | None = None) -> Tensor:
    """As the public upsample_conv."""
    (N, H, W, C), (T, _, _, O) = x.shape, folded.shape[:4]
    out = torch.empty((N * T, 2 * H, 2 * W, O), dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, folded.view(-1, 4, C), out.view(N * T, H, 2, W, 2 * O), None, None, None, relu)
    return out


def tap_planes(x: Tensor, weight: Tensor, head: Tensor, planes: Tensor, first: int) -> None:
    """Writes what the taps of head, (P, O, 3, 3) with P * 9 at most 32, make of single pixels of relu(conv3x3(x, weight)).

    x: (N, H, W, C), C at most 128    weight: (O, C, 3, 3), O 64 or 128    weight and head: channels last
    planes: float32 (P * 9, N, rows, W), W a multiple of 4, any strides in front: by head's channel and tap y, x; of
       the pixels from row `first` on
    """
    O = weight.shape[0]
    taps = weight.permute(0, 2, 3, 1).reshape(O, 9, -1)
    _launch(x, taps, planes, None, None, None, True, head.permute(0, 2, 3, 1).reshape(-1, O), first)


def _launch(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, past: Tensor | None,
            residual: Tensor | None, relu: bool, head: Tensor | None = None, first: int = 0) -> None:
    """weight: (sets * O, taps, channels), a set for each step in time and phase
    out: (pictures, H, phases in y, W, phases in x * O), or planes and first of tap_planes with its head
    """
    (N, H, W, C), (rows, taps, _), side = x.shape, weight.shape, math.isqrt(weight.shape[1])
    O = out.shape[4] // out.shape[2] if head is None else rows
    block = 128 if O % 128 == 0 else 64
    wide = prefers_wide(C if past is None else 2 * C, residual is not None)
    h, w = (4, 64) if wide else (16, 16)
    across, down = cdiv(W, w), cdiv(H if head is None else out.shape[2], h)
    tiles = N * down * across * (rows // block)
    # Boxes are powers of two: a stage is filled by them and by 8 pixels to the right or the rows below.
    body, rest = ([1, 1, 64, 64], [1, 1, 8, 64]) if wide else ([1, 16, 16, 64], [1, side - 1, 16, 64])
    pixels = [None if y is None else descriptor(y, box) for y in (x, past) for box in (body, rest)]
    half = h // 4, w  # 64 pixels, what one wgmma takes
    box = [1, half[0], 1, half[1], block] if head is None else [32, 1, *half]
    with torch.cuda.device_of(x):
        conv3x3_kernel[(min(tiles, processors(x.device)),)](
            *pixels, descriptor(weight, [block, 1, 64]), descriptor(out, box),
            None if residual is None else descriptor(residual, [1, *half, block]),
            None if head is None else descriptor(head, [32, block]), bias, tiles,
            rows // block, O // block, across, down, C, first, RELU=relu, num_warps=4,
            **config(wide, side, residual is not None, head is not None))


def prefers_wide(channels: int, residual: bool) -> bool:
    """Whether tiles of 4 x 64 pixels are faster than those of 16 x 16, as measured on an H100: up to 7 % where sums are
    short and their result leaves, else up to 30 % slower.
    """
    return channels <= 128 and not residual


def config(wide: bool, side: int, residual: bool, head: bool = False) -> dict[str, int]:
    """The kernel's constants: SIDE of the square of taps, 3 or 2, STAGES of pixels, SLOTS for weights, and
    HALVES of a consumer's pixels that the staging buffer holds.
    """
    if wide and side == 3 and not head:  # 110,592 bytes of pixels leave no room for both 4 slots and a whole buffer
        return dict(SIDE=side, STAGES=2, SLOTS=3 if residual else 4, HALVES=2 if residual else 1)
    return dict(SIDE=side, STAGES=2, SLOTS=4, HALVES=2)


@gluon.jit
def _free(barrier):
    """All threads of a consumer are done with a slot. mbarrier.arrive would synchronise them first."""
    gl.inline_asm_elementwise("bar.arrive $1, 288; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _wait_free(barrier, uses, slots: gl.constexpr):
    """The producer waits for both consumers to free a slot; all slots begin free."""
    if uses >= slots:
        gl.inline_asm_elementwise("bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [barrier], dtype=gl.int32,
                                  is_pure=False, pack=1)


@gluon.jit
def _tile(t, columns, panels, across, down, WIDE: gl.constexpr):
    """Column of tile t, its set, picture, first row and first pixel. The columns of a place follow one
    another, as they read the same pixels; panels of them are a set.
    """
    HEIGHT: gl.constexpr = 4 if WIDE else 16
    WIDTH: gl.constexpr = 64 if WIDE else 16
    column, place = t % columns, t // columns
    return (column, column // panels, place // across // down, place // across % down * HEIGHT,
            place % across * WIDTH)


@gluon.jit
def _fetch_pixels(body, rest, picture, y, x, channel, full, ring, at, SIDE: gl.constexpr, WIDE: gl.constexpr):
    """64 channels of a stage's pixels, from row y and column x on, to the ring."""
    for r in gl.static_range(SIDE + 3 if WIDE else 1):
        _load(body, [picture, y + r, x, channel], full,
              ring.index(at + r * 72)._reinterpret(body.dtype, body.block_shape, body.layout))
        _load(rest, [picture, y + (r if WIDE else 16), x + (64 if WIDE else 0), channel], full,
              ring.index(at + (r * 72 + 64 if WIDE else 256))._reinterpret(
                  rest.dtype, rest.block_shape, rest.layout))


@gluon.jit
def _producer(x_body, x_rest, past_body, past_rest, weight_desc, head_desc, tiles, columns, panels, across, down, C,
              first, x_ring, w_ring, head, x_full, w_full, head_full, SIDE: gl.constexpr, WIDE: gl.constexpr,
              PAST: gl.constexpr, HEAD: gl.constexpr):
    STAGES: gl.constexpr = x_full.shape[0]
    SLOTS: gl.constexpr = w_full.shape[0]
    STAGE: gl.constexpr = x_ring.shape[0] // STAGES
    BLOCK: gl.constexpr = w_ring.shape[1]
    LOADS: gl.constexpr = 1 if WIDE else SIDE  # stages for 64 channels
    own = (C + 63) // 64
    chunks = own
    if PAST:
        chunks = 2 * own
    stages = 0
    slots = 0
    if HEAD:
        mbarrier.expect(head_full.index(0), 32 * BLOCK * 2)
        _load(head_desc, [0, 0], head_full.index(0), head)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, of_set, picture, y, x = _tile(t, columns, panels, across, down, WIDE)
        y += first - 1
        x -= 1
        if SIDE == 2:
            y += of_set >> 1 & 1
            x += of_set & 1
        for c in range(chunks):
            # With x's last channels come past's first weights, if 64 does not divide C: they meet zeros.
            channel = gl.where(c < own, c * 64, C + (c - own) * 64)
            for dx in range(LOADS):
                stage = stages % STAGES
                full, at = x_full.index(stage), stage * STAGE
                _wait_free(PIXELS_FREE + stage, stages, STAGES)
                mbarrier.expect(full, STAGE * 128)
                if not PAST:
                    _fetch_pixels(x_body, x_rest, picture, y, x + dx, c * 64, full, x_ring, at, SIDE, WIDE)
                elif c < own:
                    _fetch_pixels(x_body, x_rest, picture, y, x + dx, c * 64, full, x_ring, at, SIDE, WIDE)
                else:
                    _fetch_pixels(past_body, past_rest, picture, y, x + dx, (c - own) * 64, full, x_ring, at,
                                  SIDE, WIDE)
                stages += 1
                for i in range(SIDE * SIDE // LOADS):
                    slot = slots % SLOTS
                    tap = i % SIDE * SIDE + i // SIDE + dx  # a column of taps after another, in both shapes
                    _wait_free(WEIGHTS_FREE + slot, slots, SLOTS)
                    mbarrier.expect(w_full.index(slot), BLOCK * 128)
                    _load(weight_desc, [column * BLOCK, tap, channel], w_full.index(slot), w_ring.index(slot))
                    slots += 1


@gluon.jit
def _tap(j: gl.constexpr, W: gl.constexpr, acc0, acc1, ADD: gl.constexpr, stage, slots, x_ring, w_ring, x_full, w_full,
         SIDE: gl.constexpr, WIDE: gl.constexpr):
    """Starts the products with a stage's j-th tap, when those with the tap before the last are complete."""
    SLOTS: gl.constexpr = w_full.shape[0]
    STAGE: gl.constexpr = x_ring.shape[0] // x_full.shape[0]
    BLOCK: gl.constexpr = w_ring.shape[1]
    PITCH: gl.constexpr = 72 if WIDE else 16    # pixels of a row in the ring
    ROWS: gl.constexpr = 1 if WIDE else 4       # of a half, 64 pixels
    PIXELS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    at = stage * STAGE + (W * 2 * ROWS + j % SIDE) * PITCH + j // SIDE
    upper = x_ring.index(at)._reinterpret(x_ring.dtype, [64, 64], PIXELS)
    lower = x_ring.index(at + ROWS * PITCH)._reinterpret(x_ring.dtype, [64, 64], PIXELS)
    slot = slots % SLOTS
    mbarrier.wait(w_full.index(slot), slots // SLOTS & 1)
    weights = w_ring.index(slot).reshape([BLOCK, 64]).permute((1, 0))
    acc0 = warpgroup_mma(upper, weights, acc0, use_acc=ADD, is_async=True)
    acc1 = warpgroup_mma(lower, weights, acc1, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(2, deps=[acc0, acc1])


@gluon.jit
def _leave(h: gl.constexpr, W: gl.constexpr, b_out, place, out_desc, staging, HALVES: gl.constexpr,
           RESIDUAL: gl.constexpr, HEAD: gl.constexpr):
    """A half's result goes. place: picture, row, phase, pixel, channel"""
    half = staging.index(W * HALVES + h % HALVES)
    if not RESIDUAL and (h == 0 or HALVES == 1):
        tma.store_wait(0)
        _meet()
    half.store(b_out)
    fence_async_shared()
    _meet()
    of_half = half._reinterpret(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    picture, y, phase, x, channel = place
    if HEAD:
        _store(out_desc, [0, picture, y + h * out_desc.block_shape[2], x], of_half)
    else:
        _store(out_desc, [picture, y + h * out_desc.block_shape[1], phase, x, channel], of_half)


@gluon.jit
def _plus(b_sum, b_half):
    """b_sum, float32, + b_half. Triton takes twice as many instructions to part the pairs in which b_half comes."""
    BF16: gl.constexpr = "{ .reg .b32 x, y; shl.b32 x, $4, 16; and.b32 y, $4, 0xffff0000; " \
                         "add.f32 $0, $2, x; add.f32 $1, $3, y; }"
    FP16: gl.constexpr = "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $4; cvt.f32.f16 x, a; " \
                         "cvt.f32.f16 y, b; add.f32 $0, $2, x; add.f32 $1, $3, y; }"
    return gl.inline_asm_elementwise(BF16 if b_half.dtype == gl.bfloat16 else FP16, "=f,=f,f,f,r", [b_sum, b_half],
                                     dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _fetch_residual(desc, place, W: gl.constexpr, staging, full):
    """When the last result has left the staging buffer."""
    tma.store_wait(0)
    _meet()
    mbarrier.expect(full, 2 * 64 * desc.block_shape[3] * 2)
    picture, y, phase, x, channel = place
    for h in gl.static_range(2):
        _load(desc, [picture, y + h * desc.block_shape[1], x, channel], full,
              staging.index(W * 2 + h)._reinterpret(desc.dtype, desc.block_shape, desc.layout))


@gluon.jit
def _consumer(W: gl.constexpr, out_desc, residual_desc, bias, tiles, columns, panels, across, down, chunks,
              x_ring, w_ring, head, staging, x_full, w_full, head_full, residual_full, SIDE: gl.constexpr,
              WIDE: gl.constexpr, BIAS: gl.constexpr, PAST: gl.constexpr, RESIDUAL: gl.constexpr, HEAD: gl.constexpr,
              RELU: gl.constexpr):
    STAGES: gl.constexpr = x_full.shape[0]
    SLOTS: gl.constexpr = w_full.shape[0]
    BLOCK: gl.constexpr = w_ring.shape[1]
    HALVES: gl.constexpr = staging.shape[0] // 2
    LOADS: gl.constexpr = 1 if WIDE else SIDE
    TAPS: gl.constexpr = SIDE * SIDE // LOADS   # of a stage
    ROWS: gl.constexpr = 1 if WIDE else 4
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    PLANES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    stages = 0
    slots = 0
    served = 0
    # A result waits in registers until the next tile's first products run: it leaves under them.
    if HEAD:
        b_upper = gl.full([64, 32], 0.0, gl.float32, PLANES).permute((1, 0))
    else:
        b_upper = gl.full([64, BLOCK], 0.0, staging.dtype, SUMS)
    b_lower = b_upper
    left = 0, 0, 0, 0, 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, of_set, picture, y, x = _tile(t, columns, panels, across, down, WIDE)
        place = picture, y + W * 2 * ROWS, 0, x, column % panels * BLOCK
        acc0 = gl.full([64, BLOCK], 0.0, gl.float32, SUMS)
        acc1 = gl.full([64, BLOCK], 0.0, gl.float32, SUMS)
        stage = stages % STAGES
        mbarrier.wait(x_full.index(stage), stages // STAGES & 1)
        for j in gl.static_range(TAPS):
            acc0, acc1 = _tap(j, W, acc0, acc1, j > 0, stage, slots, x_ring, w_ring, x_full, w_full, SIDE, WIDE)
            if j > 0:
                _free(WEIGHTS_FREE + (slots - 1) % SLOTS)
            slots += 1
            if served > 0:
                if j == 0:
                    _leave(0, W, b_upper, left, out_desc, staging, HALVES, RESIDUAL, HEAD)
                if j == TAPS // 2:
                    _leave(1, W, b_lower, left, out_desc, staging, HALVES, RESIDUAL, HEAD)
        stages += 1
        for i in range(1, chunks * LOADS):
            if RESIDUAL:
                if i == chunks * LOADS // 2:  # long after the last tile's store, long before the sum is there
                    _fetch_residual(residual_desc, place, W, staging, residual_full.index(W))
            stage = stages % STAGES
            mbarrier.wait(x_full.index(stage), stages // STAGES & 1)
            for j in gl.static_range(TAPS):
                acc0, acc1 = _tap(j, W, acc0, acc1, True, stage, slots, x_ring, w_ring, x_full, w_full, SIDE, WIDE)
                _free(WEIGHTS_FREE + (slots - 1) % SLOTS)
                if j == 0:
                    _free(PIXELS_FREE + (stages - 1) % STAGES)
                slots += 1
            stages += 1
        if RESIDUAL:
            if chunks * LOADS == 1:
                _fetch_residual(residual_desc, place, W, staging, residual_full.index(W))
        if BIAS:  # on its way while the last products run
            b_bias = gl.load(bias + place[4] + gl.arange(0, BLOCK, gl.SliceLayout(0, SUMS))).to(gl.float32)
        acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        _free(WEIGHTS_FREE + (slots - 1) % SLOTS)
        _free(PIXELS_FREE + (stages - 1) % STAGES)
        if RESIDUAL:
            mbarrier.wait(residual_full.index(W), served & 1)
        for h in gl.static_range(2):
            b_out = acc0 if h == 0 else acc1
            if BIAS:
                b_out += b_bias[None, :]
            if RESIDUAL:
                b_residual = staging.index(W * HALVES + h).load(SUMS)
                if PAST:  # _plus would have ptxas keep two of the producer's numbers in memory
                    b_out += b_residual.to(gl.float32)
                else:
                    b_out = _plus(b_out, b_residual)
            if RELU:
                b_out = gl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if HEAD:
                mbarrier.wait(head_full.index(0), 0)  # complete for good once it has come
                b_hidden = gl.convert_layout(b_out.to(x_ring.dtype), gl.DotOperandLayout(0, PLANES, 2))
                b_out = warpgroup_mma(b_hidden, head.permute((1, 0)), gl.full([64, 32], 0.0, gl.float32, PLANES),
                                      is_async=True)
                b_out = warpgroup_mma_wait(0, deps=[b_out]).permute((1, 0))
            if h == 0:
                b_upper = b_out.to(staging.dtype)
            else:
                b_lower = b_out.to(staging.dtype)
        left = place
        if SIDE == 2:
            left = (picture * (columns // (4 * panels)) + (of_set >> 2), place[1], of_set >> 1 & 1, x,
                    place[4] + (of_set & 1) * panels * BLOCK)
        served += 1
    if served > 0:
        _leave(0, W, b_upper, left, out_desc, staging, HALVES, RESIDUAL, HEAD)
        _leave(1, W, b_lower, left, out_desc, staging, HALVES, RESIDUAL, HEAD)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "columns", "panels", "across", "down", "C", "first"])
def conv3x3_kernel(x_body, x_rest, past_body, past_rest, weight_desc, out_desc, residual_desc, head_desc, bias, tiles,
                   columns, panels, across, down, C, first, SIDE: gl.constexpr, STAGES: gl.constexpr,
                   SLOTS: gl.constexpr, HALVES: gl.constexpr, RELU: gl.constexpr):
    PAST: gl.constexpr = past_body is not None
    RESIDUAL: gl.constexpr = residual_desc is not None
    HEAD: gl.constexpr = head_desc is not None
    BIAS: gl.constexpr = bias is not None
    BLOCK: gl.constexpr = weight_desc.block_shape[0]
    WIDE: gl.constexpr = x_body.block_shape[1] == 1
    STAGE: gl.constexpr = (SIDE + 3) * 72 if WIDE else (SIDE + 15) * 16
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(x_body.dtype, [STAGES * STAGE, 1, 64], SWIZZLED)
    w_ring = gl.allocate_shared_memory(x_body.dtype, [SLOTS, BLOCK, 1, 64], weight_desc.layout)
    if HEAD:
        head = gl.allocate_shared_memory(x_body.dtype, [32, BLOCK], head_desc.layout)
        staging = gl.allocate_shared_memory(gl.float32, [2 * HALVES, 32, 64], gl.NVMMASharedLayout(128, 32, 2))
    else:
        head = w_ring
        staging = gl.allocate_shared_memory(x_body.dtype, [2 * HALVES, 64, BLOCK], SWIZZLED)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(x_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(w_full.index(i), count=1)
    chunks = (C + 63) // 64
    # Partitions take no None: where there is none they get something else, and do not touch it.
    if PAST:
        chunks *= 2
    else:
        past_body, past_rest = x_body, x_rest
    if RESIDUAL:
        residual_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(residual_full.index(i), count=1)
    else:
        residual_desc, residual_full = out_desc, x_full
    if HEAD:
        head_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(head_full.index(0), count=1)
    else:
        head_desc, head_full = out_desc, x_full
    if not BIAS:
        bias = C
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (0, out_desc, residual_desc, bias, tiles, columns, panels, across, down, chunks, x_ring, w_ring,
                     head, staging, x_full, w_full, head_full, residual_full, SIDE, WIDE, BIAS, PAST, RESIDUAL, HEAD,
                     RELU)),
        (_consumer, (1, out_desc, residual_desc, bias, tiles, columns, panels, across, down, chunks, x_ring, w_ring,
                     head, staging, x_full, w_full, head_full, residual_full, SIDE, WIDE, BIAS, PAST, RESIDUAL, HEAD,
                     RELU)),
        (_producer, (x_body, x_rest, past_body, past_rest, weight_desc, head_desc, tiles, columns, panels, across,
                     down, C, first, x_ring, w_ring, head, x_full, w_full, head_full, SIDE, WIDE, PAST, HEAD)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
