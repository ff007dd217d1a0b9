"""causal_conv3d in Triton, for every GPU from sm_80: a matrix product whose second operand is gathered while it runs.

A program makes BO channels of BP pixels of one output picture. Its product runs over the input channels, BK at a
time, and inside over the taps, so that all programs read the same slice of the input at the same time. Pixels that a
tap finds outside the picture are read from its border: a clamped address, no padded copy. Weights are the first
operand: with pixels as the first the product was 10-20 % slower on an H100. Programs that share weights run together.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton


def config(capability: int, O: int) -> dict[str, int]:
    """Tile and pipeline for a GPU (80 and more, 90 for 9.0), such that shared memory holds them and no register spills.

    BO channels, BP pixels, BK input channels of a step, a multiple of 16.
    """
    if O <= 64:
        return dict(BO=64, BP=128, BK=32, num_warps=4, num_stages=4)
    if capability == 90 and O > 128:  # at 768x1408 all programs of the model's layers fill the multiprocessors evenly
        return dict(BO=256, BP=128, BK=64, num_warps=8, num_stages=4)
    if capability == 90 or capability // 10 == 10:
        return dict(BO=128, BP=128, BK=64, num_warps=8, num_stages=4)
    return dict(BO=128, BP=128, BK=32, num_warps=8, num_stages=4)


def forward(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> Tensor:
    """As causal_conv3d, which has checked the arguments; weight is channels_last_3d.

    Tensors on a CPU are for Triton's interpreter.
    """
    B, T, H, W, C = x.shape
    O = weight.shape[0]
    chosen = config(_triton.capability(x), O)
    out = torch.empty((B, T // 2, H, W, O), dtype=x.dtype, device=x.device)
    parts, tiles = triton.cdiv(O, chosen["BO"]), triton.cdiv(H * W, chosen["BP"])
    # Sums of squares by tile, not by atomic addition: the same bits every time.
    squares = None if gamma is None else torch.empty((parts, out.numel() // O), dtype=torch.float32, device=x.device)
    context = x if tail is None else tail
    strides = x.stride()[:4] + context.stride()[:4]
    unit = 8 if all(n % 8 == 0 for n in (C, *strides)) else 1  # 8 elements are 16 bytes, one copy
    wide = max(H * source.stride(2) + W * source.stride(3) for source in (x, context)) >= 2 ** 31
    with torch.cuda.device_of(x):
        _conv[(tiles * B * (T // 2) * parts,)](
            x, context, weight, bias, out, squares, *(n // unit for n in (*strides, C)), T // 2, H, W, O, tiles,
            B * (T // 2), UNIT=unit, TAPS=4 if tail is not None else 2, NORM=gamma is not None,
            WHOLE=C % chosen["BK"] == 0, OFFSET=tl.int64 if wide else tl.int32, **chosen)
        if gamma is not None:
            normalise(out, squares, gamma)
    return out


def normalise(out: Tensor, squares: Tensor, gamma: Tensor) -> None:
    """Replaces out (..., O) by its SiLU(out / sqrt(mean(out^2) + 1e-24) * gamma).

    squares: (parts, pixels) float32, whose sum over parts is the sum of out^2 over O    gamma: (O,)
    """
    parts, pixels = squares.shape
    _normalise[(triton.cdiv(pixels, 4),)](out, squares, gamma, pixels, gamma.shape[0], parts, R=4, N=1024,
                                          S=triton.next_power_of_2(parts), num_warps=4)


@triton.jit(do_not_specialize=["T2", "H", "W", "tiles", "pictures"])
def _conv(x, tail, weight, bias, out, squares, sxb, sxt, sxh, sxw, stb, stt, sth, stw, C, T2, H, W, O, tiles, pictures,
          UNIT: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr,
          BO: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr):
    """UNIT: of all strides and C, so that the compiler knows how they are aligned
    TAPS: of time, 4 if the first two can lie in tail, else 2    WHOLE: C is a multiple of BK
    OFFSET: type of offsets inside a picture
    """
    C *= UNIT
    i_tile = tl.program_id(0) % tiles
    i_picture = tl.program_id(0) // tiles % pictures
    i_o = tl.program_id(0) // tiles // pictures
    i_t = i_picture % T2
    i_b = (i_picture // T2).to(tl.int64)
    o_p = i_tile * BP + tl.arange(0, BP)  # [BP]
    o_o = i_o * BO + tl.arange(0, BO)  # [BO]
    o_c = tl.arange(0, BK)  # [BK]
    # Past the last pixel and channel the last is read again: no masks in the loop, they are in the stores.
    o_safe = tl.minimum(o_p, H * W - 1)  # [BP]
    o_y = o_safe // W  # [BP]
    o_x = o_safe % W  # [BP]
    N: tl.constexpr = TAPS * 9
    p_weight = weight + tl.minimum(o_o, O - 1).to(tl.int64)[:, None] * (N * C) + o_c[None, :]  # [BO, BK]
    b_acc = tl.zeros([BO, BP], tl.float32)
    for k in tl.range(0, tl.cdiv(C, BK) * N):
        i_tap = k % N
        i_c = k // N * BK
        i_frame = 2 * i_t + i_tap // 9 - (TAPS - 2)
        p_frame = x + (i_b * sxb + i_frame.to(tl.int64) * sxt) * UNIT
        sh = sxh
        sw = sxw
        if TAPS == 4:
            p_tail = tail + (i_b * stb + (i_frame + 2).to(tl.int64) * stt) * UNIT
            p_frame = tl.where(i_frame < 0, p_tail, p_frame)
            sh = tl.where(i_frame < 0, sth, sxh)
            sw = tl.where(i_frame < 0, stw, sxw)
        o_row = tl.minimum(tl.maximum(o_y + i_tap % 9 // 3 - 1, 0), H - 1).to(OFFSET)  # [BP]
        o_col = tl.minimum(tl.maximum(o_x + i_tap % 3 - 1, 0), W - 1).to(OFFSET)  # [BP]
        p_x = p_frame + i_c + ((o_row * sh + o_col * sw) * UNIT)[:, None] + o_c[None, :]  # [BP, BK]
        p_w = p_weight + (i_tap * C + i_c)  # [BO, BK]
        if WHOLE:
            b_x = tl.load(p_x)  # [BP, BK]
            b_w = tl.load(p_w)  # [BO, BK]
        else:
            b_x = tl.load(p_x, mask=(o_c < C - i_c)[None, :], other=0.0)  # [BP, BK]
            b_w = tl.load(p_w, mask=(o_c < C - i_c)[None, :], other=0.0)  # [BO, BK]
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc)
    b_acc += tl.load(bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)[:, None]
    o_out = i_picture.to(tl.int64) * H * W + o_p  # [BP], among all pixels of out
    if NORM:
        b_square = tl.sum(tl.where((o_o < O)[:, None], b_acc * b_acc, 0.0), 0)  # [BP]
        tl.store(squares + i_o.to(tl.int64) * pictures * H * W + o_out, b_square, mask=o_p < H * W)
    tl.store(out + o_out[:, None] * O + o_o[None, :], tl.trans(b_acc).to(out.dtype.element_ty),
             mask=(o_p < H * W)[:, None] & (o_o < O)[None, :])


@triton.jit(do_not_specialize=["pixels", "parts"])
def _normalise(out, squares, gamma, pixels, O, parts, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """One program makes R pixels, N channels at a time, in place."""
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # [R]
    o_s = tl.arange(0, S)  # [S]
    m_s = (o_s < parts)[:, None] & (o_r < pixels)[None, :]
    b_square = tl.load(squares + o_s.to(tl.int64)[:, None] * pixels + o_r[None, :], mask=m_s, other=0.0)  # [S, R]
    b_scale = tl.math.rsqrt(tl.sum(b_square, 0) / O + 1e-24)  # [R]
    for i in range(0, tl.cdiv(O, N)):
        o_n = i * N + tl.arange(0, N)  # [N]
        m = (o_r < pixels)[:, None] & (o_n < O)[None, :]
        p = out + o_r[:, None] * O + o_n[None, :]  # [R, N]
        b_gamma = tl.load(gamma + o_n, mask=o_n < O, other=0.0).to(tl.float32)  # [N]
        b_y = tl.load(p, mask=m, other=0.0).to(tl.float32) * b_scale[:, None] * b_gamma[None, :]  # [R, N]
        tl.store(p, (b_y / (1.0 + tl.exp(-b_y))).to(out.dtype.element_ty), mask=m)
