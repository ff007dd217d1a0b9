"""The decoder's end for Hopper: two kernels of conv3x3_hopper and a sum in Triton.

The layer before the last convolution never is in memory: the kernel that makes it multiplies each of its pixels with
the last convolution's 27 taps, three channels of 3x3, and writes the products as float32 planes, 108 bytes a pixel
instead of 256, or the twice 256 of a layer that is written and read. What is left of the last convolution is to add
nine planes, each moved by its tap, for each channel.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3x3_hopper
from .pixels_triton import means
from .rgb_head import bands

PIXELS = 256  # of a row that a program of _add_taps makes


def supports(x: Tensor, folded: Tensor, hidden: Tensor, weight: Tensor) -> str | None:
    """None if rgb_head can run tensors like these, of memory formats and dtypes as conv3x3 wants them, else the reason."""
    if reason := conv3x3_hopper.supports(x, folded, hidden, weight):
        return reason
    if not {*hidden.shape[:2]} <= {64, 128}:
        return f"takes 64 or 128 channels, hidden_weight is {tuple(hidden.shape)}"
    return None if x.shape[2] % 2 == 0 else f"x must have an even width, has {x.shape[2]}"


def rgb_head(x: Tensor, folded: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, box: list[int],
             out_dtype: torch.dtype, moments: bool) -> tuple[Tensor, Tensor]:
    """As the public rgb_head, x contiguous, weights channels last. No moments: none of no picture."""
    (N, h, w, _), (top, left, height, width) = x.shape, box
    first, end = max(0, top - 1), min(2 * h, top + height + 1)  # rows of the hidden layer
    planes = torch.empty((27, N, end - first, 2 * w), dtype=torch.float32, device=x.device)
    for start, stop, rows, part, at in bands(N, h, first, end, 1):
        large = conv3x3_hopper.upsample_conv(x[:, rows], folded, True)
        conv3x3_hopper.tap_planes(large[:, part], hidden, weight, planes[:, :, start - first:stop - first], at)
        del large  # before the next
    out = torch.empty((N, height, width, 3), dtype=out_dtype, device=x.device)
    tiles = triton.cdiv(width, PIXELS)
    parts = torch.empty((N, height * tiles, 6), dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _add_taps[(tiles, height, N)](planes, bias, out, parts, *planes.stride()[:3], *bias.stride(), end - first,
                                          2 * w, top - first, left, height, width, P=PIXELS, num_warps=4)
    return out, means(parts if moments else parts[:0], height * width, 1)


@triton.jit(do_not_specialize=["rows", "W", "top", "left", "h", "w"])
def _add_taps(planes, bias, out, parts, sp, sn, sy, sb, rows, W, top, left, h, w, P: tl.constexpr):
    """One program makes P pixels of a row, and their sums and sums of squares.

    rows, W: of the planes, whose borders are the picture's where the result comes near them
    top, left: of the result in the planes    h, w: its size
    """
    i_tile, i_y, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_x = i_tile * P + tl.arange(0, P)
    m = o_x < w
    p_plane = planes + i_n * sn + (top + i_y - 1).to(tl.int64) * sy + (left - 1) + o_x
    p_out = out + ((i_n * h + i_y) * w + o_x) * 3
    p_part = parts + ((i_n * h + i_y) * tl.num_programs(0) + i_tile) * 6
    for i in tl.static_range(3):
        b_sum = tl.zeros([P], tl.float32)
        for j in tl.static_range(9):
            y, x = top + i_y - 1 + j // 3, left + o_x - 1 + j % 3
            m_tap = m & (y >= 0) & (y < rows) & (x >= 0) & (x < W)
            b_sum += tl.load(p_plane + j // 3 * sy + j % 3, mask=m_tap, other=0.0)
            p_plane += sp
        b_rgb = (b_sum + tl.load(bias + i * sb).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(p_out + i, b_rgb, mask=m)
        b_y = tl.where(m, 2 * b_rgb.to(tl.float32) - 1, 0.0)
        tl.store(p_part + i, tl.sum(b_y, 0))
        tl.store(p_part + 3 + i, tl.sum(b_y * b_y, 0))
