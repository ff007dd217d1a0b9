"""Every public op in plain PyTorch: what the other backends are measured against, and what runs where none of
them can.

Shapes, layouts and meanings are those of the public functions; arguments have been checked by them.
"""
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128       # tokens of an attention block
SCORES = 2 ** 23  # attention scores that exist at a time, 32 MB in float32
ROUND = 22        # fractional bits of Pillow's weights: 32 less 8 of a pixel and 2 to spare
EPS = 1e-5        # added to a variance by adain_uint8


def local_window(rows: int, cols: int, window: int, edge: str, device: torch.device) -> Tensor:
    def axis(n: int) -> Tensor:
        first = torch.arange(n, device=device) - window // 2
        if edge == "shift":
            first = first.clamp(0, max(n - window, 0))
        at = torch.arange(n, device=device)
        return (at >= first[:, None]) & (at < first[:, None] + window)
    near_row, near_col = axis(rows), axis(cols)
    return (near_row[:, None, :, None] & near_col[None, :, None, :]).view(rows * cols, rows * cols)


def lcsa_mask(q_mean: Tensor, k_mean: Tensor, local: Tensor, slices: int, topk: int) -> Tensor:
    """Bool (B, H, Mq, Mk) of kept block pairs (spec: strictly above the (topk + 1)-th largest of the head and
    query slice).
    """
    B, H, Mq, D = q_mean.shape
    S = Mq // slices
    score = (q_mean @ k_mean.transpose(-1, -2)) / D ** 0.5
    Mk = k_mean.shape[2]
    score = score.view(B, H, slices, S, Mk // S, S).float()
    score = score.masked_fill(~local.view(S, 1, S), -torch.inf)
    p = score.flatten(-2).softmax(-1).view(B, H, slices, S * Mk)
    kept = min(S * Mk - 1, topk)
    threshold = p.kthvalue(S * Mk - kept, dim=-1, keepdim=True).values
    return (p > threshold).view(B, H, Mq, Mk)


def sparse_attn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """mask: bool (B, H, Mq, Mk). One head and some query blocks at a time: all scores need gigabytes."""
    B, Lq, H, _ = q.shape
    # Results are allocated first: small ones between the scores would break up what is freed for the next.
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, Lq), dtype=torch.float32)
    for h, part, m in _parts(q, k, mask):
        p, lse[:, h, part] = _probabilities(q[:, part, h], k[:, :, h], m, scale)
        # What is not a number in v would show in rows without keys too.
        out[:, part, h] = (p.to(q.dtype) @ v[:, :, h]).masked_fill(~m.any(-1, keepdim=True), 0)
    return out, lse


def sparse_attn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                         scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of sparse_attn for grad (B, Lq, H, D), in the same parts."""
    dq, (dk, dv) = q.new_empty(q.shape), (x.new_zeros(x.shape, dtype=_accumulate(x)) for x in (k, v))
    for h, part, m in _parts(q, k, mask):
        p, _ = _probabilities(q[:, part, h], k[:, :, h], m, scale)
        dp = (grad[:, part, h] @ v[:, :, h].transpose(-1, -2)).to(p.dtype)
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
        dq[:, part, h] = ds @ k[:, :, h]
        dk[:, :, h] += ds.transpose(-1, -2) @ q[:, part, h]
        dv[:, :, h] += p.to(q.dtype).transpose(-1, -2) @ grad[:, part, h]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _parts(q: Tensor, k: Tensor, mask: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Head, rows and their mask (B, rows, Lk), at most SCORES scores at a time."""
    B, Lq, H, _ = q.shape
    Lk = k.shape[1]
    rows = BLOCK * max(1, SCORES // (BLOCK * B * max(Lk, 1)))
    for h in range(H):
        for at in range(0, Lq, rows):
            m = mask[:, h, at // BLOCK:(at + rows) // BLOCK].repeat_interleave(BLOCK, 1)[:, :Lq - at]
            yield h, slice(at, at + rows), m.repeat_interleave(BLOCK, 2)[:, :, :Lk]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of one head's scores (B, rows, Lk), 0 where mask is not, and its log-sum-exp (B, rows)."""
    s = (q @ k.transpose(-1, -2)).to(_accumulate(q)) * scale
    s, empty = s.masked_fill(~mask, -torch.inf), ~mask.any(-1, keepdim=True)
    # A row without a key has no softmax: it is given finite scores, so that autograd's gradients are finite.
    return s.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0), s.detach().logsumexp(-1)


def window_order(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    f, h, w = grid
    B, L, C = x.shape
    out = x.new_empty(x.shape)  # never a view of x, however small the grid
    x = x.view(B, f // 2, 2, h // 8, 8, w // 8, 8, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    out.view(x.shape).copy_(x)
    return out


def qk_norm_rope(x: Tensor, weight: Tensor, tables: tuple[Tensor, Tensor, Tensor], head_dim: int,
                 eps: float) -> tuple[Tensor, Tensor]:
    t, h, w = tables
    grid = (t.shape[0], h.shape[0], w.shape[0])
    B, L, C = x.shape
    x = rms_norm(x, weight, eps).view(B, L, C // head_dim, head_dim // 2, 2)
    angle = torch.cat([t[:, None, None].expand(*grid, -1), h[None, :, None].expand(*grid, -1),
                       w[None, None].expand(*grid, -1)], -1)
    angle = window_order(angle.view(1, L, -1), grid)[:, :, None]
    out = torch.view_as_real(torch.view_as_complex(x.to(_accumulate(x))) * angle).flatten(-2).to(x.dtype)
    return out, block_mean(out)


def qkv_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, tables: tuple[Tensor, Tensor, Tensor],
                  head_dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, -1)
    q, q_mean = qk_norm_rope(q, q_weight, tables, head_dim, eps)
    k, k_mean = qk_norm_rope(k, k_weight, tables, head_dim, eps)
    return q, k, v.reshape(k.shape), q_mean, k_mean


def block_mean(x: Tensor) -> Tensor:
    """(B, L, H, D) in window order -> (B, H, L/128, D), averaged in float32."""
    B, L, H, D = x.shape
    return x.view(B, L // BLOCK, BLOCK, H, D).mean(2, dtype=_accumulate(x)).to(x.dtype).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_accumulate(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    acc = _accumulate(x)
    return F.layer_norm(x.to(acc), x.shape[-1:], 1 + scale.to(acc), shift.to(acc), eps).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else torch.addcmul(x, y, gate)


def gated_add_norm(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor,
                   eps: float) -> tuple[Tensor, Tensor]:
    total = gated_add(x, y, gate)
    return total, layer_norm_modulate(total, scale, shift, eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: Tensor | None,
            relu: bool) -> Tensor:
    if past is not None:
        x = torch.cat([x, past], -1)
    with _full_float32():
        # NHWC memory is what PyTorch calls channels_last
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    if residual is not None:
        y = y.add_(residual)  # in place: nothing else holds the convolution's output
    return (y.relu_() if relu else y).contiguous()


def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, past: Tensor | None, out: Tensor | None,
                     wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, past and residual, where wanted; out is conv3x3's if it had relu."""
    if out is not None:
        grad = torch.where(out > 0, grad, 0)
    whole = x if past is None else torch.cat([x, past], -1)
    of_whole, of_weight, of_bias = _convolution_backward(
        grad, whole, weight, 1, (wanted[0] or wanted[3], wanted[1], wanted[2]))
    of_x = of_past = None
    if of_whole is not None:
        of_x, of_past = (of_whole, None) if past is None else of_whole.chunk(2, -1)
    return of_x, of_weight, of_bias, of_past, grad if wanted[4] else None


def upsample_conv(x: Tensor, folded: Tensor, relu: bool) -> Tensor:
    N, H, W, _ = x.shape
    with _full_float32():
        y = F.conv_transpose2d(x.permute(0, 3, 1, 2), _transposed_4x4(folded), stride=2, padding=1)
    y = y.unflatten(1, (folded.shape[0], -1)).permute(0, 1, 3, 4, 2)
    y = y.reshape(-1, 2 * H, 2 * W, folded.shape[3])
    return (y.relu() if relu else y).contiguous()


def upsample_conv_backward(grad: Tensor, x: Tensor, folded: Tensor, out: Tensor | None,
                           wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and folded, where wanted; out is upsample_conv's if it had relu."""
    if out is not None:
        grad = torch.where(out > 0, grad, 0)
    T, O = folded.shape[0], folded.shape[3]
    grad = grad.unflatten(0, (-1, T)).permute(0, 2, 3, 1, 4).flatten(3)
    of_x, of_taps, _ = _convolution_backward(grad, x, _transposed_4x4(folded), 2, (*wanted, False))
    if of_taps is not None:
        of_taps = of_taps.flip(2, 3).view(-1, T, O, 2, 2, 2, 2).permute(1, 4, 6, 2, 3, 5, 0)
    return of_x, of_taps


def _transposed_4x4(folded: Tensor) -> Tensor:
    """(T, 2, 2, O, 2, 2, C) as (C, T * O, 4, 4) of a transposed convolution with stride 2 and padding 1: tap
    t of phase p is its tap 3 - 2 t - p.
    """
    T, _, _, O, _, _, C = folded.shape
    return folded.permute(6, 0, 3, 4, 1, 5, 2).reshape(C, T * O, 4, 4).flip(2, 3)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int,
                          wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias of a convolution of NHWC pictures, padding 1, transposed if stride is 2."""
    grad, x = (y.permute(0, 3, 1, 2) for y in (grad, x))
    with _full_float32():
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [grad.shape[1]], [stride] * 2, [1, 1], [1, 1], stride == 2, [0, 0], 1, wanted)
    return None if of_x is None else of_x.permute(0, 2, 3, 1), of_weight, of_bias


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> Tensor:
    (B, T, H, W, C), context = x.shape, 0 if tail is None else 2
    whole = x.new_empty((B, context + T, H + 2, W + 2, C))  # F.pad and torch.cat take five times as long on a CPU
    inside = whole[:, :, 1:-1, 1:-1]
    if tail is not None:
        inside[:, :2] = tail
    inside[:, context:] = x
    whole[:, :, 0, 1:-1], whole[:, :, -1, 1:-1] = inside[:, :, 0], inside[:, :, -1]
    whole[:, :, :, 0], whole[:, :, :, -1] = whole[:, :, :, 1], whole[:, :, :, -2]
    with _full_float32():
        y = F.conv3d(whole.permute(0, 4, 1, 2, 3), weight, bias, stride=(2, 1, 1)).permute(0, 2, 3, 4, 1)
    return y if gamma is None else F.silu(rms_norm(y, gamma, 1e-24))


def enlarge(frames: Tensor) -> tuple[Tensor, Tensor]:
    large = _resampled(_resampled(frames, 2), 1)  # along rows first, as Pillow does: there is a rounding in between
    y, pixels = 2 * large.int() - 255, large.shape[1] * large.shape[2]
    return large, torch.stack([y.sum((1, 2)).double() / (255 * pixels),
                               y.square_().sum((1, 2)).double() / (255 ** 2 * pixels)], 1)


def _resampled(x: Tensor, axis: int) -> Tensor:
    """uint8 enlarged 4 times along axis, in Pillow's fixed-point arithmetic."""
    n = x.shape[axis]
    at = torch.arange(4 * n, device=x.device)
    i, phase = at // 4, at % 4
    taps = bicubic_taps(x.device)[i.clamp(max=2), (n - 1 - i).clamp(max=2), phase].T
    total = torch.tensor(1 << ROUND - 1, dtype=torch.int32, device=x.device)
    for j, tap in enumerate(taps):
        near = x.index_select(axis, (i - 2 + phase // 2 + j).clamp(0, n - 1))
        total = total + near * tap.view(-1, *[1] * (x.ndim - 1 - axis))
    return (total >> ROUND).clamp_(0, 255).to(torch.uint8)


@functools.cache
def bicubic_taps(device: torch.device) -> Tensor:
    """Weights of an enlargement by 4 as int32 (3, 3, 4, 4), times 2^22: by the positions left and right of the
    input position (2 and more are as 2), output phase, tap; of position i and phase p the taps are i - 2 + p // 2
    and the three behind. Those outside the picture weigh 0, and the others as much more.
    """
    left, right, phase, tap = torch.meshgrid(*(torch.arange(n) for n in (3, 3, 4, 4)), indexing="ij")
    at = phase // 2 + tap - 2  # counted from the input position
    x = (at + 0.5 - (phase + 0.5).double() / 4).abs()
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    cubic = cubic.masked_fill((x >= 2) | (at < -left) | (at > right), 0)
    return (cubic / cubic.sum(-1, keepdim=True) * 2 ** ROUND).round().int().to(device)


def pixel_unshuffle(frames: Tensor, size: int, bound: float | None, out: Tensor) -> None:
    if frames.dtype == torch.uint8:
        frames = frames.float().div_(127.5).sub_(1)
    if bound is not None:
        frames = (frames.to(torch.promote_types(frames.dtype, torch.float32)) / bound).tanh_().mul_(bound)
    cells = frames.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 6, 1, 3, 5)
    out.unflatten(3, (3, frames.shape[1], size, size)).copy_(cells)


def rgb_conv(x: Tensor, weight: Tensor, bias: Tensor, box: Sequence[int], out_dtype: torch.dtype,
             moments: bool = True) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(x.dtype, out_dtype)  # rounded once, if at all
    rgb = conv3x3(x.to(kind), weight.to(kind), bias.to(kind), None, None, False)
    return part_and_moments(rgb, box, out_dtype, moments)


def part_and_moments(rgb: Tensor, box: Sequence[int], out_dtype: torch.dtype,
                     moments: bool) -> tuple[Tensor, Tensor]:
    top, left, height, width = box
    rgb = rgb[:, top:top + height, left:left + width]
    rgb = rgb.to(out_dtype, memory_format=torch.contiguous_format, copy=True)
    return rgb, color_moments(2 * rgb[:len(rgb) if moments else 0].double() - 1)


def rgb_head(x: Tensor, folded: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, box: Sequence[int],
             out_dtype: torch.dtype, moments: bool = True) -> tuple[Tensor, Tensor]:
    y = conv3x3(upsample_conv(x, folded, True), hidden, None, None, None, True)
    return rgb_conv(y, weight, bias, box, out_dtype, moments)


def color_moments(frames: Tensor) -> Tensor:
    y = frames.double()
    return torch.stack([y.mean((1, 2)), y.square().mean((1, 2))], 1)


def adain_uint8(rgb: Tensor, moments: Tensor, source_moments: Tensor, out_dtype: torch.dtype,
                truncate: bool) -> Tensor:
    def mean_std(of: Tensor) -> tuple[Tensor, Tensor]:
        mean, square = of[:, :, None, None].unbind(1)
        return mean.to(rgb_type), (square - mean * mean + EPS).sqrt().to(rgb_type)
    rgb_type = _accumulate(rgb)
    mean, std = mean_std(moments)
    source_mean, source_std = mean_std(source_moments)
    out = (2 * rgb.to(rgb_type) - 1 - mean).div_(std).mul_(source_std).add_(source_mean).add_(1)
    if out_dtype == torch.float32:
        return out.div_(2).clamp_(0, 1).float().contiguous()
    out.mul_(127.5)
    return (out if truncate else out.round_()).clamp_(0, 255).to(torch.uint8).contiguous()


def _full_float32():
    """cuDNN rounds float32 operands to TF32 unless told not to."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark,
                       benchmark_limit=cudnn.benchmark_limit, deterministic=cudnn.deterministic,
                       allow_tf32=False)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
