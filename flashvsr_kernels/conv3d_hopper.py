"""causal_conv3d for Hopper (sm_90), in Gluon: TMA, wgmma and specialised warps.

An item of work is 256 pixels of 128 channels, or 128 of 256, whichever lets the multiprocessors finish together.
A pixel tile is 16 rows of 8 columns. For 64 input channels, a tap of time and a column of taps the producer warp
loads 18 rows once; the three taps of the column are views of them, a row of 1 KiB apart. Weights come tap by
tap. Two consumers of four warps keep 128 x 128 sums each in registers.

Borders. TMA fills what lies outside the picture with zeros, but here the border is repeated. Rows: the first and
the last of the 18 are loaded apart, from a row that is clamped. Columns: eight pixels that begin or end one
outside the picture are loaded from `edges`, which a small kernel copies from the border columns beforehand: 2/11
of the input at 768x1408. A copy of all of it with a frame around it would take 1-2 % of the time. Tiles that
stick out of the picture are moved inside: some pixels are then made twice, with the same bits.

All programs go through the input in the same order, and items with the same weights run together: each slice of
weights comes from memory once for all, each slice of the input once for as many items as run at a time. Steps of
time lie in x or in tail and are never copied together.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait)

from ._gluon import descriptor, load as _load
from ._triton import processors
from .conv3d_triton import normalise

ROWS, COLS = 16, 8                                    # pixels of a tile
CONSUMER_REGISTERS = gl.constexpr(232)                # of a thread; 64512 in all
PRODUCER_REGISTERS = gl.constexpr(40)

# Named barriers from 8 on free the slots for weights; Triton itself uses the low numbers. 288 threads are both
# consumers and the producer. Slots for pixels need none: before a step's first tap the producer has waited until
# the weights of WS + 1 taps before are free. With X_SLOTS of 3 and WS of at most 6 no older tap is in progress
# that could use the slot.
W_FREE = gl.constexpr(8)
X_SLOTS = gl.constexpr(3)


def config(tiles: int, O: int, processors: int) -> dict[str, int]:
    """PT pixel tiles by OT times 128 channels of an item, and WS slots for weights, by the number of waves."""
    by_pixels = -(-(-(-tiles // 2) * -(-O // 128)) // processors)
    by_channels = -(-(tiles * -(-O // 256)) // processors)
    # 256 pixels need fewer bytes: 28 KiB for 64 channels and a tap, against 38.
    return dict(PT=2, OT=1, WS=6) if by_pixels <= by_channels else dict(PT=1, OT=2, WS=5)


def forward(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> Tensor:
    """As causal_conv3d, which has checked the arguments: rows are 16-byte aligned, weight is channels_last_3d."""
    B, T, H, W, C = x.shape
    O, _, taps = weight.shape[:3]
    out = torch.empty((B, T // 2, H, W, O), dtype=x.dtype, device=x.device)
    context = x if tail is None else tail
    edges = torch.empty((B * (taps - 2 + T), 2, H, COLS, C), dtype=x.dtype, device=x.device)
    squares = torch.empty((-(-O // 128), out.numel() // O), dtype=torch.float32, device=x.device)
    tiles = -(-H // ROWS) * -(-W // COLS) * B * (T // 2)
    available = processors(x.device)
    chosen = config(tiles, O, available)
    items = -(-tiles // chosen["PT"]) * -(-O // (128 * chosen["OT"]))
    programs = min(items, available)
    with torch.cuda.device_of(x):
        _edges[(len(edges) * 2, H)](x, context, edges, *x.stride()[:4], *context.stride()[:4], taps - 2,
                                    taps - 2 + T, H, W, C, N=512)
        blocks = [[1, 1, rows, COLS, 64] for rows in (1, ROWS)]
        pictures = [descriptor(source, block) for source in (x, context, edges) for block in blocks]
        by_tap = weight.permute(0, 2, 3, 4, 1).view(O, taps * 9, C)
        conv3d_kernel[(programs,)](*pictures, descriptor(by_tap, [128, 1, 64]), bias, out, squares, items, programs,
                                  tiles, squares.shape[1], T, H, W, C, O, TAPS=taps, NORM=gamma is not None,
                                  num_warps=4, **chosen)
        if gamma is not None:
            normalise(out, squares, gamma)
    return out


@triton.jit(do_not_specialize=["context", "frames", "H", "W", "C"])
def _edges(x, tail, edges, sxb, sxt, sxh, sxw, stb, stt, sth, stw, context, frames, H, W, C, N: tl.constexpr):
    """One program copies a row of eight pixels: the first seven behind the first, or the last seven and the last."""
    i_side = tl.program_id(0) % 2
    i_b = (tl.program_id(0) // 2 // frames).to(tl.int64)
    i_t = (tl.program_id(0) // 2 % frames).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    o_w = tl.arange(0, 8)  # [8]
    o_col = tl.where(i_side == 0, tl.maximum(o_w - 1, 0), tl.minimum(W - 7 + o_w, W - 1)).to(tl.int64)  # [8]
    p_x = x + i_b * sxb + (i_t - context) * sxt + i_h * sxh + o_col * sxw  # [8]
    p_tail = tail + i_b * stb + i_t * stt + i_h * sth + o_col * stw  # [8]
    p_x = tl.where(i_t < context, p_tail, p_x)  # [8]
    p_edges = edges + ((tl.program_id(0).to(tl.int64) * H + i_h) * 8 + o_w) * C  # [8]
    for i in range(0, tl.cdiv(C, N)):
        o_c = i * N + tl.arange(0, N)  # [N]
        m_c = (o_c < C)[None, :]
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_c)  # [8, N]
        tl.store(p_edges[:, None] + o_c[None, :], b_x, mask=m_c)


@gluon.jit
def _free(slot):
    """A consumer is done with weights. mbarrier.arrive would synchronise the warpgroup first."""
    gl.inline_asm_elementwise("bar.arrive $1, 288; mov.u32 $0, 0;", "=r,r", [W_FREE + slot], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _await_free(slot):
    gl.inline_asm_elementwise("bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [W_FREE + slot], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _own(x):
    """x, but what is made of it is neither shared with other warps nor moved out of a loop: there it would spill."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _place(tile, T, H, W):
    """Batch, step, first row and first column of a pixel tile."""
    cols = (W + 7) // 8
    rows = (H + 15) // 16
    picture = tile // cols // rows
    y, x = gl.minimum(tile // cols % rows * 16, H - 16), gl.minimum(tile % cols * 8, W - 8)
    return picture // (T // 2), picture % (T // 2), y, x


@gluon.jit
def _fetch_rows(row, rows, i, j, y, H, x, c, full, ring, at):
    """18 rows of 8 pixels into the ring, from row y - 1 on; the border row is repeated."""
    one: gl.constexpr = [1, 1, 1, 8, 64]
    most: gl.constexpr = [1, 1, 16, 8, 64]
    above, below = gl.maximum(y - 1, 0), gl.minimum(y + 16, H - 1)
    _load(row, [i, j, above, x, c], full, ring.index(at)._reinterpret(ring.dtype, one, row.layout))
    _load(rows, [i, j, y, x, c], full, ring.index(at + 1)._reinterpret(ring.dtype, most, rows.layout))
    _load(row, [i, j, below, x, c], full, ring.index(at + 17)._reinterpret(ring.dtype, one, row.layout))


@gluon.jit
def _producer(x_row, x_rows, tail_row, tail_rows, edge_row, edge_rows, w_desc, items, programs, tiles, T, H, W, C,
              x_ring, w_ring, x_full, w_full, TAPS: gl.constexpr, PT: gl.constexpr, OT: gl.constexpr,
              WS: gl.constexpr):
    tiles, T, H, W, C = _own(tiles), _own(T), _own(H), _own(W), _own(C)
    groups = (tiles + PT - 1) // PT
    step = 0
    for item in range(_own(gl.program_id(0)), items, programs):
        for c in range(0, C, 64):
            for t in range(TAPS):
                for dx in range(3):
                    full = x_full.index(step % X_SLOTS)
                    mbarrier.expect(full, PT * 18 * 8 * 64 * 2)
                    for w in gl.static_range(PT):
                        b, t_out, y, x = _place(gl.minimum(item % groups * PT + w, tiles - 1), T, H, W)
                        frame = 2 * t_out + t  # counted from the first step of context
                        at = (step % X_SLOTS * PT + w) * 18
                        left, right = (dx == 0) & (x == 0), (dx == 2) & (x == W - 8)
                        if left | right:
                            _fetch_rows(edge_row, edge_rows, b * (T + TAPS - 2) + frame, gl.cast(right, gl.int32), y, H,
                                        0, c, full, x_ring, at)
                        else:
                            if frame < TAPS - 2:
                                _fetch_rows(tail_row, tail_rows, b, frame, y, H, x + dx - 1, c, full, x_ring, at)
                            else:
                                _fetch_rows(x_row, x_rows, b, frame - (TAPS - 2), y, H, x + dx - 1, c, full,
                                            x_ring, at)
                    for dy in gl.static_range(3):
                        k = 3 * step + dy
                        slot = k % WS
                        if k >= WS:  # slots begin free
                            _await_free(slot)
                        mbarrier.expect(w_full.index(slot), OT * 128 * 64 * 2)
                        for w in gl.static_range(OT):
                            _load(w_desc, [(item // groups * OT + w) * 128, (t * 3 + dy) * 3 + dx, c],
                                  w_full.index(slot), w_ring.index(slot * OT + w))
                    step += 1


@gluon.jit
def _consumer(G: gl.constexpr, bias, out, squares, items, programs, tiles, pixels, T, H, W, C, O, x_ring, w_ring,
              x_full, w_full, TAPS: gl.constexpr, NORM: gl.constexpr, PT: gl.constexpr, OT: gl.constexpr,
              WS: gl.constexpr):
    """G: 0 or 1, which half of an item's pixels or channels."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    GX: gl.constexpr = G if PT == 2 else 0
    GW: gl.constexpr = G if OT == 2 else 0
    tiles, T, H, W, C = _own(tiles), _own(T), _own(H), _own(W), _own(C)
    groups = (tiles + PT - 1) // PT
    step = 0
    for item in range(_own(gl.program_id(0)), items, programs):
        acc = gl.full([128, 128], 0.0, gl.float32, L)
        for i in range((C + 63) // 64 * (TAPS * 3)):
            mbarrier.wait(x_full.index(step % X_SLOTS), step // X_SLOTS & 1)
            for dy in gl.static_range(3):
                k = 3 * step + dy
                mbarrier.wait(w_full.index(k % WS), k // WS & 1)
                rows = x_ring.index((step % X_SLOTS * PT + GX) * 18 + dy)._reinterpret(x_ring.dtype, [128, 64], S)
                taps = w_ring.index(k % WS * OT + GW).reshape([128, 64])
                acc = warpgroup_mma(rows, taps.permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])  # all but the newest are done
                if i + dy > 0:
                    _free((k - 1) % WS)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        _free((3 * step - 1) % WS)

        tile, part = item % groups * PT + GX, item // groups * OT + GW
        if (tile < tiles) & (part * 128 < O):
            b, t_out, y, x = _place(tile, T, H, W)
            width, depth = _own(W), _own(O // 8) * 8
            p = gl.arange(0, 128, gl.SliceLayout(1, L))
            o = gl.arange(0, 128, gl.SliceLayout(0, L))
            # O is a multiple of 8, and o // 8 is a constant of the register that holds the channel.
            m_o = o // 8 * 8 < depth - part * 128
            acc += gl.load(bias + part * 128 + o, mask=m_o, other=0.0).to(gl.float32)[None, :]
            first = (gl.cast(b * (T // 2) + t_out, gl.int64) * H + y) * W + x
            pixel = p // 8 * width + p % 8
            if NORM:  # past the last channel acc is 0
                gl.store(squares + gl.cast(part, gl.int64) * _own(pixels) + first + pixel, gl.sum(acc * acc, 1))
            rows = out + (first * depth + part * 128) + (pixel * depth)[:, None]
            gl.store(rows + o[None, :], acc.to(x_ring.dtype), mask=m_o[None, :])


@gluon.jit(do_not_specialize=["items", "programs", "tiles", "pixels", "T", "H", "W", "C"])
def conv3d_kernel(x_row, x_rows, tail_row, tail_rows, edge_row, edge_rows, w_desc, bias, out, squares, items, programs,
                  tiles, pixels, T, H, W, C, O, TAPS: gl.constexpr, NORM: gl.constexpr, PT: gl.constexpr,
                  OT: gl.constexpr, WS: gl.constexpr):
    x_ring = gl.allocate_shared_memory(x_rows.dtype, [X_SLOTS * PT * 18, 8, 64], gl.NVMMASharedLayout(128, 16, 2))
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [WS * OT, 128, 1, 64], w_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(i), count=1)
    for i in gl.static_range(WS):
        mbarrier.init(w_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (0, bias, out, squares, items, programs, tiles, pixels, T, H, W, C, O, x_ring, w_ring, x_full,
                     w_full, TAPS, NORM, PT, OT, WS)),
        (_consumer, (1, bias, out, squares, items, programs, tiles, pixels, T, H, W, C, O, x_ring, w_ring, x_full,
                     w_full, TAPS, NORM, PT, OT, WS)),
        (_producer, (x_row, x_rows, tail_row, tail_rows, edge_row, edge_rows, w_desc, items, programs, tiles, T, H,
                     W, C, x_ring, w_ring, x_full, w_full, TAPS, PT, OT, WS)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
