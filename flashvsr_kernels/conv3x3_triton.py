"""conv3x3 and upsample_conv in Triton, for every GPU from sm_80: implicit GEMMs over taps and channels."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton


def config(capability: int, C: int, O: int) -> dict[str, int]:
    """Tile and pipeline for a GPU, such that shared memory holds them and no register spills.

    capability: 80 and more, 90 for 9.0    C: input channels of one picture    O: output channels
    Returns tile_o (output channels) and tile_p (pixels) of a program, tile_c (input channels of a step),
    num_warps and num_stages. Chosen from what the compiler makes of them, not yet by measuring.
    """
    tile_o = min(max(16, triton.next_power_of_2(O)), 128)
    wide = capability // 10 in (9, 10)  # 227 KiB of shared memory and operands from there, not from registers
    # Padding channels costs up to a sixth before shorter steps, which synchronise more often, cost more.
    tile_c = next((n for n in ((64, 32) if wide else (32,)) if -(-C // n) * n * 6 <= C * 7), 16)
    # What cannot be copied in 16 bytes passes through registers, which 8 warps have more of.
    if wide or capability == 80 or C % 8:
        return {"tile_o": tile_o, "tile_p": 256, "tile_c": tile_c, "num_warps": 8, "num_stages": 4}
    # Two programs fit a multiprocessor with 99 KiB, and one fetches while the other stores.
    return {"tile_o": tile_o, "tile_p": 128, "tile_c": tile_c, "num_warps": 4, "num_stages": 4}


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: Tensor | None,
            relu: bool, out: Tensor | None = None) -> Tensor:
    """3x3 convolution as flashvsr_kernels.conv3x3 without upsample describes it.

    x, past: (N, H, W, C)    residual: (N, H, W, O)    bf16 or fp16, contiguous
    weight: (O, C, 3, 3), or (O, 2 C, 3, 3) with past, channels_last
    Returns (N, H, W, O). Checks nothing: the public function does. Tensors on a CPU are for Triton's
    interpreter.
    """
    N, H, W, _ = x.shape
    out = x.new_empty((N, H, W, weight.shape[0])) if out is None else out
    return _launch(x, past, weight, bias, residual, out, 1, 3, relu)


def upsample_conv(x: Tensor, folded: Tensor, relu: bool, out: Tensor | None = None) -> Tensor:
    """flashvsr_kernels.upsample_conv: x (N, H, W, C) and folded (T, 2, 2, O, 2, 2, C), contiguous, bf16 or
    fp16, to (N * T, 2 H, 2 W, O). Checks nothing.
    """
    N, H, W, _ = x.shape
    T, _, _, O = folded.shape[:4]
    out = x.new_empty((N * T, 2 * H, 2 * W, O)) if out is None else out
    return _launch(x, None, folded, None, None, out, 4 * T, 2, relu)


def _launch(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
            out: Tensor, sets: int, taps: int, relu: bool) -> Tensor:
    """sets: of weights, each of which makes every pixel of x once    taps: along one axis"""
    N, H, W, C = x.shape
    O, pixels = out.shape[3], N * H * W
    with torch.cuda.device_of(x):
        chosen = config(_triton.capability(x), C, O)
        tile_o, tile_p = chosen["tile_o"], chosen["tile_p"]
        _conv[(triton.cdiv(pixels, tile_p) * sets * triton.cdiv(O, tile_o),)](
            x, past, weight, bias, residual, out, pixels, H, W, C=C, O=O, SETS=sets, TAPS=taps, RELU=relu,
            TILE_O=tile_o, TILE_P=tile_p, TILE_C=chosen["tile_c"], num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"])
    return out


@triton.jit(do_not_specialize=["pixels", "H", "W"])
def _conv(x, past, weight, bias, residual, out, pixels, H, W, C: tl.constexpr, O: tl.constexpr,
          SETS: tl.constexpr, TAPS: tl.constexpr, RELU: tl.constexpr,
          TILE_O: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    """One program makes TILE_O channels of TILE_P pixels, numbered through all pictures, with one set of
    weights.

    weight: (SETS, O, TAPS, TAPS, C of x and of past)
    Weights are operand A and pixels operand B, so the accumulator is transposed: on an H100 the other way
    round was slower, and wrong with 4 warps and buffers for two steps. Here buffers are for three steps or
    more, and in the PTX (read for 8.0, 9.0, 10.0 and 12.0) a barrier lies between the end of a product and
    the next copy to what it read.
    """
    CHUNKS: tl.constexpr = (C + TILE_C - 1) // TILE_C
    SOURCES: tl.constexpr = 1 if past is None else 2
    AREA: tl.constexpr = TAPS * TAPS
    K: tl.constexpr = AREA * SOURCES * C
    TILES_O: tl.constexpr = (O + TILE_O - 1) // TILE_O
    # Programs that read the same pixels follow each other; the L2 cache holds those and all weights.
    i_set = tl.program_id(0) % (SETS * TILES_O) // TILES_O
    i_o = tl.program_id(0) % TILES_O * TILE_O
    i_p = tl.program_id(0) // (SETS * TILES_O) * TILE_P
    i_py = i_set // 2 % 2  # phase of the enlarged picture, 0 if it is not
    i_px = i_set % 2

    o_o = i_o + tl.arange(0, TILE_O)  # [TILE_O]
    o_p = tl.arange(0, TILE_P)  # [TILE_P]
    o_c = tl.arange(0, TILE_C)  # [TILE_C]
    o_y = (i_p + o_p) // W % H  # [TILE_P]
    o_x = (i_p + o_p) % W  # [TILE_P]
    b_inside = tl.zeros([TILE_P], tl.int32)  # [TILE_P], bit i: tap i is inside the picture
    for i in tl.static_range(AREA):
        y = o_y + (i // TAPS - 1 + i_py)
        x_ = o_x + (i % TAPS - 1 + i_px)
        m_tap = (y >= 0) & (y < H) & (x_ >= 0) & (x_ < W) & (o_p < pixels - i_p)  # [TILE_P]
        b_inside |= m_tap.to(tl.int32) << i

    p_w = weight + i_set.to(tl.int64) * (O * K) + o_o[:, None] * K + o_c[None, :]  # [TILE_O, TILE_C]
    first = i_p.to(tl.int64) * C
    o_in = o_p[None, :] * C + o_c[:, None]  # [TILE_C, TILE_P]
    b_acc = tl.zeros([TILE_O, TILE_P], tl.float32)
    for i in tl.range(0, SOURCES * CHUNKS * AREA):
        i_tap = i % AREA
        i_c = i // AREA % CHUNKS * TILE_C
        source = x
        i_k = i_tap * (SOURCES * C) + i_c
        if SOURCES == 2:
            source = tl.where(i < CHUNKS * AREA, x, past)
            i_k += tl.where(i < CHUNKS * AREA, 0, C)
        shift = ((i_tap // TAPS - 1 + i_py) * W + (i_tap % TAPS - 1 + i_px)) * C + i_c
        m_w = o_o[:, None] < O
        m_x = (b_inside >> i_tap & 1)[None, :] != 0
        if C % TILE_C != 0:
            m_w &= o_c[None, :] < C - i_c
            m_x &= o_c[:, None] < C - i_c
        b_w = tl.load(p_w + i_k, mask=m_w, other=0.0)  # [TILE_O, TILE_C]
        b_x = tl.load(source + (first + shift) + o_in, mask=m_x, other=0.0)  # [TILE_C, TILE_P]
        b_acc = tl.dot(b_w, b_x, b_acc)

    if bias is not None:
        b_acc += tl.load(bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)[:, None]
    b_out = tl.trans(b_acc)  # [TILE_P, TILE_O]
    m_out = (o_p < pixels - i_p)[:, None] & (o_o < O)[None, :]  # [TILE_P, TILE_O]
    if SETS == 1:
        o_out = (i_p.to(tl.int64) + o_p) * O  # [TILE_P]
    else:
        i_frame = (i_p + o_p) // (H * W) * (SETS // 4) + i_set // 4  # [TILE_P]
        o_out = ((i_frame.to(tl.int64) * H + o_y) * 2 + i_py) * (2 * W) + (2 * o_x + i_px)
        o_out *= O
    o_out = o_out[:, None] + o_o[None, :]  # [TILE_P, TILE_O]
    if residual is not None:
        b_out += tl.load(residual + o_out, mask=m_out, other=0.0).to(tl.float32)
    if RELU:
        b_out = tl.where(b_out < 0, 0.0, b_out)  # a maximum would take what is not a number for 0
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_out)
