"""The pixel ops in Triton, for every GPU from sm_80.

Sums over a picture are made in two steps, always in the same order: each program adds up its part, then _mean
the parts of a picture, in float64.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton, reference

ROWS = range(8, 65)  # output rows that a program of _rgb_conv may make: it reads two more
ENLARGED = 512    # values of an output row that a program of _enlarge makes, four rows high
MATCHED = 4096    # values that a program of _adain makes
UNSHUFFLED = 2048  # values of a colour that a program of _unshuffle makes
EPS = tl.constexpr(reference.EPS)
ROUND, HALF = tl.constexpr(reference.ROUND), tl.constexpr(1 << reference.ROUND - 1)


def config(capability: int, C: int) -> dict[str, int]:
    """Tile and pipeline of _rgb_conv for a GPU, such that no register spills and, up to 128 channels, a
    multiprocessor holds two programs.

    capability: 80 and more, 90 for 9.0    C: channels, 1 to 256
    Returns width (pixels of a tile, two of them halo), channels (C as a block size), num_warps and
    num_stages. As measured on an H100, elsewhere from what the compiler makes: the kernel has to keep many
    bytes on their way, not to calculate fast.
    """
    channels = max(16, triton.next_power_of_2(C))
    large = capability // 10 in (9, 10)  # shared memory
    return {"width": 128 if channels < 128 else 64, "channels": channels, "num_warps": 4,
            "num_stages": 4 if channels < 64 or large and channels <= 128 else 3}


def enlarge(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as for the public enlarge with return_moments."""
    T, h, w, _ = frames.shape
    out = torch.empty((T, 4 * h, 4 * w, 3), dtype=torch.uint8, device=frames.device)
    tiles = triton.cdiv(12 * w, ENLARGED)
    parts = torch.empty((T, h * tiles, 6), dtype=torch.int32, device=frames.device)
    # Offsets inside a row of pixels. int32 takes half the registers.
    offset = tl.int64 if w * abs(frames.stride(2)) + 2 * abs(frames.stride(3)) >= 2 ** 31 else tl.int32
    if T:
        with torch.cuda.device_of(frames):
            _enlarge[(tiles, h, T)](frames, reference.bicubic_taps(frames.device), out, parts,
                                    *frames.stride(), h, w, N=ENLARGED, OFFSET=offset, num_warps=4)
    return out, means(parts, 16 * h * w, 255)


def pixel_unshuffle(frames: Tensor, size: int, bound: float | None, out: Tensor) -> None:
    """Writes out, as the public function does; checks nothing."""
    (N, T, _, _, _), (h, w) = frames.shape, out.shape[1:3]
    values = triton.next_power_of_2(T * size ** 2)
    cells = max(1, UNSHUFFLED // values)
    if out.numel():
        with torch.cuda.device_of(frames):
            _unshuffle[(triton.cdiv(w, cells), h, N)](
                frames, out, *frames.stride(), *out.stride()[:3], w, bound, S=size, T=T,
                EIGHT_BIT=frames.dtype == torch.uint8, K=values, G=cells, num_warps=4)


def rgb_conv(x: Tensor, weight: Tensor, bias: Tensor, box: list[int], out_dtype: torch.dtype,
             moments: bool = True) -> tuple[Tensor, Tensor]:
    """Arguments and results as for the public rgb_conv, x with contiguous channels. No moments: none of no picture."""
    N, H, W, C = x.shape
    top, left, height, width = box
    chosen = config(_triton.capability(x), C)
    tiles = triton.cdiv(width, chosen["width"] - 2)
    rows = strip(height, tiles * N, x.device)
    strips = triton.cdiv(height, rows)
    out = torch.empty((N, height, width, 3), dtype=out_dtype, device=x.device)
    parts = torch.empty((N, strips * tiles, 6), dtype=torch.float32, device=x.device)
    if N:
        with torch.cuda.device_of(x):
            _rgb_conv[(tiles, strips, N)](
                x, weight, bias, out, parts, *x.stride()[:3], *weight.stride(), *bias.stride(), H, W, top,
                left, height, width, C, rows, K=chosen["channels"], P=chosen["width"],
                num_warps=chosen["num_warps"], num_stages=chosen["num_stages"])
    return out, means(parts if moments else parts[:0], height * width, 1)


def strip(height: int, tiles: int, device: torch.device) -> int:
    """Rows of a program of _rgb_conv, of tiles side by side, such that a GPU that runs two programs on a multiprocessor
    is done soonest: of a third of 768x1408 1.1 times as soon as with 32 (H100).
    """
    places = 2 * _triton.processors(device)

    def took(rows: int) -> tuple[int, int]:
        return triton.cdiv(triton.cdiv(height, rows) * tiles, places) * (rows + 2), -rows
    return min(ROWS, key=took)


def adain_uint8(rgb: Tensor, moments: Tensor, source_moments: Tensor, out_dtype: torch.dtype,
                truncate: bool) -> Tensor:
    """Arguments and results as for the public adain_uint8, the pixels of a row of rgb next to one another."""
    N, height, width, _ = rgb.shape
    out = torch.empty((N, height, width, 3), dtype=out_dtype, device=rgb.device)
    rows, length = height, 3 * width
    if rgb.stride(1) == length:  # no gap between the rows
        rows, length = 1, height * length
    if out.numel():
        with torch.cuda.device_of(rgb):
            _adain[(triton.cdiv(length, MATCHED), rows, N)](
                rgb, moments.contiguous(), source_moments.contiguous(), out, *rgb.stride()[:2], length,
                EIGHT_BIT=out_dtype == torch.uint8, TRUNCATE=truncate, N=MATCHED, num_warps=8)
    return out


def means(parts: Tensor, pixels: int, unit: int) -> Tensor:
    """Moments (N, 2, 3) from sums (N, parts, 6) of unit * y and of its square, three channels each."""
    N, count, _ = parts.shape
    out = torch.empty((N, 2, 3), dtype=torch.float64, device=parts.device)
    if N:
        with torch.cuda.device_of(parts):
            _mean[(N,)](parts, out, count, pixels, UNIT=unit, R=256, num_warps=4)
    return out


@triton.jit(do_not_specialize=["count", "pixels"])
def _mean(parts, out, count, pixels, UNIT: tl.constexpr, R: tl.constexpr):
    i_n, o_r, o_m = tl.program_id(0), tl.arange(0, R), tl.arange(0, 8)
    p_parts = parts + i_n.to(tl.int64) * count * 6 + o_r[:, None] * 6 + o_m[None, :]
    b_sum = tl.zeros([R, 8], tl.float64)
    for j in range(0, count, R):
        m_part = (o_m < 6)[None, :] & (j + o_r < count)[:, None]
        b_sum += tl.load(p_parts + j * 6, mask=m_part, other=0).to(tl.float64)
    b_count = pixels.to(tl.float64) * tl.where(o_m < 3, UNIT, UNIT * UNIT).to(tl.float64)  # [8]
    tl.store(out + i_n * 6 + o_m, tl.sum(b_sum, 0) / b_count, mask=o_m < 6)


@triton.jit
def _weighted(b_0, b_1, b_2, b_3, k):
    """Four values [N] by four weights, rounded and clipped to 0...255 as Pillow does."""
    b_sum = b_0 * k[0] + b_1 * k[1] + b_2 * k[2] + b_3 * k[3] + HALF
    return tl.minimum(tl.maximum(b_sum >> ROUND, 0), 255)


@triton.jit
def _across(p_row, o, k):
    """One input row enlarged horizontally: [N] integers from its values at the offsets o with weights k."""
    return _weighted(tl.load(p_row + o[0]).to(tl.int32), tl.load(p_row + o[1]).to(tl.int32),
                     tl.load(p_row + o[2]).to(tl.int32), tl.load(p_row + o[3]).to(tl.int32), k)


@triton.jit
def _load_taps(taps, i, n, phase):
    """Weights of the taps of an output phase of input position i, of n."""
    p_taps = taps + ((tl.minimum(i, 2) * 3 + tl.minimum(n - 1 - i, 2)) * 4 + phase) * 4
    return tl.load(p_taps), tl.load(p_taps + 1), tl.load(p_taps + 2), tl.load(p_taps + 3)


@triton.jit
def _inside(i, n):
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit(do_not_specialize=["h"])
def _enlarge(frames, taps, out, parts, st, sy, sx, sc, h, w, N: tl.constexpr, OFFSET: tl.constexpr):
    """One program makes N values of the four output rows of one input row.

    Taps outside the picture have weight 0; they are read at its border.
    OFFSET: type of offsets inside a row of pixels
    """
    i_tile, i_y, i_t = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_value = i_tile * N + tl.arange(0, N)  # [N], of an output row
    o_out, o_channel = o_value // 3, o_value % 3
    i_x = tl.minimum(o_out // 4, w - 1)
    k = _load_taps(taps, i_x, w, o_out % 4)
    i_first = (i_x - 2 + o_out % 4 // 2).to(OFFSET)
    o_c = o_channel.to(OFFSET) * sc
    o = (_inside(i_first, w) * sx + o_c, _inside(i_first + 1, w) * sx + o_c,
         _inside(i_first + 2, w) * sx + o_c, _inside(i_first + 3, w) * sx + o_c)
    p_frame = frames + i_t * st
    b_0 = _across(p_frame + _inside(i_y - 2, h) * sy, o, k)  # [N]
    b_1 = _across(p_frame + _inside(i_y - 1, h) * sy, o, k)
    b_2 = _across(p_frame + i_y * sy, o, k)
    b_3 = _across(p_frame + _inside(i_y + 1, h) * sy, o, k)
    b_4 = _across(p_frame + _inside(i_y + 2, h) * sy, o, k)
    m_value = o_value < 12 * w
    p_out = out + (i_t * h + i_y) * 48 * w + o_value
    b_sum = tl.zeros([N], tl.int32)
    b_square = tl.zeros([N], tl.int32)
    for phase in tl.static_range(4):
        k = _load_taps(taps, i_y, h, phase)
        if phase < 2:
            b_y = _weighted(b_0, b_1, b_2, b_3, k)  # [N]
        else:
            b_y = _weighted(b_1, b_2, b_3, b_4, k)
        tl.store(p_out + phase * 12 * w, b_y.to(tl.uint8), mask=m_value)
        b_y = 2 * b_y - 255
        b_sum += b_y
        b_square += b_y * b_y
    p_part = parts + ((i_t * h + i_y) * tl.num_programs(0) + i_tile) * 6
    for i in tl.static_range(3):
        m_channel = m_value & (o_channel == i)
        tl.store(p_part + i, tl.sum(tl.where(m_channel, b_sum, 0), 0))
        tl.store(p_part + 3 + i, tl.sum(tl.where(m_channel, b_square, 0), 0))


@triton.jit(do_not_specialize=["w"])
def _unshuffle(frames, out, sn, st, sy, sx, sc, son, soy, sox, w, bound, S: tl.constexpr, T: tl.constexpr,
               EIGHT_BIT: tl.constexpr, K: tl.constexpr, G: tl.constexpr):
    """One program makes G cells of a row: for each colour K values, T pictures of S x S pixels."""
    i_y, i_n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_cell, o_k = tl.program_id(0) * G + tl.arange(0, G), tl.arange(0, K)
    m = (o_cell < w)[:, None] & (o_k < T * S * S)[None, :]
    o_frame = (o_k // (S * S)).to(tl.int64) * st + (i_y * S + o_k // S % S) * sy  # [K]
    o_pixel = (o_cell * S)[:, None] + (o_k % S)[None, :]  # [G, K]
    p_frame = frames + i_n * sn + o_frame[None, :] + o_pixel.to(tl.int64) * sx
    p_out = out + i_n * son + i_y * soy + o_cell.to(tl.int64)[:, None] * sox + o_k[None, :]
    for i in tl.static_range(3):
        b = tl.load(p_frame, mask=m, other=0).to(tl.float32)  # [G, K]
        if EIGHT_BIT:
            b = tl.div_rn(b, 127.5) - 1
        if bound is not None:
            b = bound - 2 * bound / (tl.exp(b * (2 / bound)) + 1)  # bound * tanh(b / bound)
        tl.store(p_out + i * (T * S * S), b.to(out.dtype.element_ty), mask=m)
        p_frame += sc


@triton.jit(do_not_specialize=["H", "W", "top", "left", "h", "w", "R"])
def _rgb_conv(x, weight, bias, out, parts, sxn, sxy, sxx, swo, swc, swy, swx, sb, H, W, top, left, h, w, C, R,
              K: tl.constexpr, P: tl.constexpr):
    """One program makes R rows of P - 2 pixels and reads each pixel that it needs once.

    It goes down the rows of x. Each is multiplied with the weights of all nine taps: what it gives to the
    rows below waits in two accumulators, what it gives to the columns beside is moved there when a row is
    complete. Rows of an accumulator are 4 * (tap x) + channel: nine of the 16 are used, as the smallest
    tensor core instruction has 16, and is far from being what the kernel waits for.
    """
    i_tile, i_strip, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k, o_p, o_m, o_c = tl.arange(0, K), tl.arange(0, P), tl.arange(0, 16), tl.arange(0, 4)
    m_w = ((o_m // 4 < 3) & (o_m % 4 < 3))[:, None] & (o_k < C)[None, :]
    p_w = weight + (o_m % 4 * swo + o_m // 4 * swx)[:, None] + o_k[None, :] * swc
    b_top = tl.load(p_w, mask=m_w, other=0.0)  # [16, K]
    b_middle = tl.load(p_w + swy, mask=m_w, other=0.0)  # [16, K]
    b_bottom = tl.load(p_w + 2 * swy, mask=m_w, other=0.0)  # [16, K]
    b_bias = tl.load(bias + o_c * sb, mask=o_c < 3, other=0.0).to(tl.float32)  # [4]
    o_out = i_tile * (P - 2) + o_p  # [P], columns of out
    o_x = left - 1 + o_out  # [P], columns of x
    m_x = (o_k < C)[:, None] & ((o_x >= 0) & (o_x < W))[None, :]
    p_x = x + i_n * sxn + o_x.to(tl.int64)[None, :] * sxx + o_k[:, None]  # [K, P]
    o_from = tl.minimum(o_p[None, :] + o_m[:, None] // 4 % 3, P - 1)  # [16, P]
    p_out = out + o_out[None, :] * 3 + o_c[:, None]  # [4, P]
    m_out = (o_c < 3)[:, None] & ((o_p < P - 2) & (o_out < w))[None, :]
    i_first = i_strip * R
    b_next = tl.zeros([16, P], tl.float32)  # row i, from the rows above i
    b_after = tl.zeros([16, P], tl.float32)  # row i + 1, likewise
    b_sum = tl.zeros([4, P], tl.float32)
    b_square = tl.zeros([4, P], tl.float32)
    for i in range(i_first - 1, tl.minimum(i_first + R, h) + 1):
        i_x = top + i
        m_i = m_x & (i_x >= 0) & (i_x < H)
        b_x = tl.load(p_x + i_x.to(tl.int64) * sxy, mask=m_i, other=0.0)  # [K, P]
        b_done = tl.dot(b_bottom, b_x, b_next)  # [16, P], row i - 1
        b_next = tl.dot(b_middle, b_x, b_after)
        b_after = tl.dot(b_top, b_x)
        b_done = tl.reshape(tl.gather(b_done, o_from, 1), [4, 4, P])
        b_rgb = (tl.sum(b_done, 0) + b_bias[:, None]).to(out.dtype.element_ty)  # [4, P]
        m_done = m_out & (i > i_first)
        tl.store(p_out + (i_n * h + i - 1) * w * 3, b_rgb, mask=m_done)
        b_y = tl.where(m_done, 2 * b_rgb.to(tl.float32) - 1, 0.0)
        b_sum += b_y
        b_square += b_y * b_y
    p_part = parts + ((i_n * tl.num_programs(1) + i_strip) * tl.num_programs(0) + i_tile) * 6 + o_c
    tl.store(p_part, tl.sum(b_sum, 1), mask=o_c < 3)
    tl.store(p_part + 3, tl.sum(b_square, 1), mask=o_c < 3)


@triton.jit
def _mean_std(p_moments):
    """Of one channel, in float32. The difference of the moments needs float64."""
    mean = tl.load(p_moments)
    return mean.to(tl.float32), tl.sqrt((tl.load(p_moments + 3) - mean * mean).to(tl.float32) + EPS)


@triton.jit
def _adain(rgb, moments, source, out, sn, sy, length, EIGHT_BIT: tl.constexpr, TRUNCATE: tl.constexpr,
           N: tl.constexpr):
    """One program makes N values of a row."""
    i_row, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_value = tl.program_id(0) * N + tl.arange(0, N)  # [N]
    o_channel, m_value = o_value % 3, o_value < length
    p_rgb = rgb + i_n * sn + i_row.to(tl.int64) * sy + o_value
    b_y = 2 * tl.load(p_rgb, mask=m_value, other=0.0).to(tl.float32) - 1  # [N]
    b_mean = tl.zeros([N], tl.float32)
    b_gain = tl.zeros([N], tl.float32)
    b_to = tl.zeros([N], tl.float32)
    for i in tl.static_range(3):
        mean, std = _mean_std(moments + i_n * 6 + i)
        source_mean, source_std = _mean_std(source + i_n * 6 + i)
        b_mean = tl.where(o_channel == i, mean, b_mean)
        b_gain = tl.where(o_channel == i, source_std / std, b_gain)
        b_to = tl.where(o_channel == i, source_mean, b_to)
    b_out = (b_y - b_mean) * b_gain + b_to + 1  # [N], 0 to 2
    p_out = out + (i_n * tl.num_programs(1) + i_row) * length + o_value
    if EIGHT_BIT:
        b_out = tl.minimum(tl.maximum(b_out * 127.5, 0.0), 255.0)
        if not TRUNCATE:
            b_out = (b_out + 8388608.0) - 8388608.0  # 2^23, whose neighbours are integers: ties to even
        tl.store(p_out, b_out.to(tl.int32).to(tl.uint8), mask=m_value)
    else:
        tl.store(p_out, tl.minimum(tl.maximum(b_out / 2, 0.0), 1.0), mask=m_value)
