"""Every public op in plain PyTorch: what the other backends are measured against, and what runs where none of
them can.

Shapes, layouts and meanings are those of the public functions; arguments have been checked by them.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128       # tokens of an attention block
SCORES = 2 ** 23  # attention scores that exist at a time, 32 MB in float32


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
    x = x.view(B, f // 2, 2, h // 8, 8, w // 8, 8, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, L, C)


def raster_order(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    f, h, w = grid
    B, L, C = x.shape
    x = x.view(B, f // 2, h // 8, w // 8, 2, 8, 8, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, L, C)


def qk_norm_rope(x: Tensor, weight: Tensor, tables: tuple[Tensor, Tensor, Tensor], head_dim: int,
                 eps: float) -> tuple[Tensor, Tensor]:
    t, h, w = tables
    grid = (t.shape[0], h.shape[0], w.shape[0])
    B, L, C = x.shape
    x = rms_norm(x, weight, eps)
    x = x.view(B, *grid, C // head_dim, head_dim // 2, 2)
    angle = torch.cat([t[:, None, None].expand(*grid, -1), h[None, :, None].expand(*grid, -1),
                       w[None, None].expand(*grid, -1)], -1)[:, :, :, None]
    turned = torch.view_as_real(torch.view_as_complex(x.to(angle.real.dtype)) * angle).to(x.dtype)
    out = window_order(turned.reshape(B, L, C), grid).view(B, L, C // head_dim, head_dim)
    return out, block_mean(out)


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


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: Tensor | None,
            upsample: int, relu: bool) -> Tensor:
    if past is not None:
        x = torch.cat([x, past], -1)
    x = x.permute(0, 3, 1, 2)  # NHWC memory is what PyTorch calls channels_last
    with _full_float32():
        if upsample == 2:
            y = F.conv_transpose2d(x, _fold_nearest(weight), bias, stride=2, padding=1)
        else:
            y = F.conv2d(x, weight, bias, padding=1)
    y = y.permute(0, 2, 3, 1)
    if residual is not None:
        y = y.add_(residual)  # in place: nothing else holds the convolution's output
    return y.relu_() if relu else y


def _fold_nearest(weight: Tensor) -> Tensor:
    """Nearest enlargement by 2 and a 3x3 convolution are one transposed 4x4 convolution: 4 taps a pixel
    instead of 9.
    """
    O, C = weight.shape[:2]
    taps = weight.to(_accumulate(weight)).reshape(O * C, 1, 3, 3).flip(2, 3)
    return (F.conv2d(taps, taps.new_ones(1, 1, 2, 2), padding=1).view(O, C, 4, 4).transpose(0, 1)
            .to(weight.dtype))


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
    x = torch.cat([tail, x], 1).permute(0, 4, 1, 2, 3)
    x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
    with _full_float32():
        return F.conv3d(x, weight, bias, stride=(2, 1, 1)).permute(0, 2, 3, 4, 1)


def _full_float32():
    """cuDNN rounds float32 operands to TF32 unless told not to."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark,
                       benchmark_limit=cudnn.benchmark_limit, deterministic=cudnn.deterministic,
                       allow_tf32=False)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
