"""What stands between the q, k, v projection and attention: normalisation, rotary position; and window order."""
import torch
from torch import Tensor

from . import _triton, reference
from ._operator import define, define_differentiable
from .backends import Backend, pick, register
from .block_mask import BLOCK

Grid = tuple[int, int, int]  # latents, token rows, token columns
Tables = tuple[Tensor, Tensor, Tensor]
HEADS = 16  # for which the kernel has registers


def rope_table(positions: Tensor, pairs: int) -> Tensor:
    """Rotations of one axis: complex64 (n, pairs), exp(i * p * 10000^(-2j / (2 * pairs))) for integer
    positions p.

    Angles are taken in float64: up to position 2^29 a table is exact to complex64's rounding.
    """
    theta = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = positions.double().cpu()[:, None] * theta
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(positions.device)


def qk_norm_rope(x: Tensor, weight: Tensor, tables: Tables, head_dim: int, *, eps: float = 1e-6,
                 out: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """RMS norm over all heads and 3D rotary position of a query or key projection, and its block means.

    x: (B, L, H * head_dim), tokens in window order    weight: (H * head_dim,)
    tables: rotations (rope_table) of the latents, rows and columns, complex64 (f, a), (h, b), (w, c) with
       L = f * h * w and a + b + c = head_dim / 2; f even, h and w multiples of 8
    out: (B, L, H, head_dim) to write into, such as a slot of the key ring, while no gradients are recorded;
       allocated if None
    backend: "triton" (sm_80 up; bf16, fp16 and float32, head_dim 64 or 128, H at most 16, last dimensions
       contiguous), "reference" (PyTorch); None for the first that can run the call
    Returns out and the mean of each of its blocks of 128 tokens, (B, H, L / 128, head_dim). Differentiable in x and
    weight, by way of the reference.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the call.
    """
    shape = _check(x, 1, tables, head_dim, weight=weight)
    if out is None:
        return torch.ops.flashvsr.qk_norm_rope(x, weight, *tables, head_dim, eps, backend)
    _check_out("out", out, x, shape, (x, weight))
    return out, torch.ops.flashvsr.qk_norm_rope_into(x, weight, *tables, head_dim, eps, out, backend)


def qkv_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, tables: Tables, head_dim: int, *,
                  eps: float = 1e-6, out: tuple[Tensor, Tensor] | None = None, backend: str | None = None
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qk_norm_rope of q and of k out of their common projection, and v in its place, all in one pass.

    qkv: (B, L, 3 * H * head_dim): q, k and v side by side, tokens in window order
    q_weight, k_weight: (H * head_dim,)    tables, backend: as for qk_norm_rope
    out: what k and v are written into, (B, L, H, head_dim) each, such as their slots of the ring, while no gradients
       are recorded; allocated if None
    Returns q, k and v, (B, L, H, head_dim) each, and the block means of q and k. Differentiable in qkv and weights.
    Raises as qk_norm_rope does.
    """
    shape = _check(qkv, 3, tables, head_dim, q_weight=q_weight, k_weight=k_weight)
    call = qkv, q_weight, k_weight, *tables, head_dim, eps
    if out is None:
        return torch.ops.flashvsr.qkv_norm_rope(*call, backend)
    k, v = out
    for name, place in (("k of out", k), ("v of out", v)):
        _check_out(name, place, qkv, shape, call[:3])
    q, q_mean, k_mean = torch.ops.flashvsr.qkv_norm_rope_into(*call, k, v, backend)
    return q, k, v, q_mean, k_mean


def window_order(x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, L, C) from (latent, row, column) order into attention's blocks of 2 x 8 x 8 tokens: by
    (slice, block row, block column, latent, row, column). Differentiable.
    """
    _check_grid(x, grid)
    return torch.ops.flashvsr.window_order(x, *grid, None)


def _check(x: Tensor, parts: int, tables: Tables, head_dim: int, **weights: Tensor) -> tuple[int, ...]:
    """The shape of out for x, which has that many parts."""
    name = "x" if parts == 1 else "qkv"
    _check_grid(x, tuple(table.shape[0] for table in tables))
    B, L, width = x.shape
    if width % (parts * head_dim) or any(weight.shape != (width // parts,) for weight in weights.values()):
        raise ValueError(f"{name} must be (B, L, {f'{parts} * ' * (parts > 1)}H * {head_dim}) and "
                         f"{' and '.join(weights)} (H * {head_dim},), got {tuple(x.shape)} and "
                         f"{' and '.join(str(tuple(weight.shape)) for weight in weights.values())}")
    if sum(table.shape[1] for table in tables) != head_dim // 2:
        raise ValueError(f"tables must have {head_dim // 2} pairs in all, got {[t.shape[1] for t in tables]}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {x.dtype}")
    for table in tables:
        if table.dtype != torch.complex64 or table.device != x.device:
            raise ValueError(f"tables must be torch.complex64 on {x.device}, got {table.dtype} on {table.device}")
    for which, weight in weights.items():
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(f"{which} must be {x.dtype} on {x.device} as {name}, "
                             f"got {weight.dtype} on {weight.device}")
    return B, L, width // parts // head_dim, head_dim


def _check_out(name: str, out: Tensor, x: Tensor, shape: tuple[int, ...], inputs: tuple[Tensor, ...]) -> None:
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"{name} must be {shape} {x.dtype} on {x.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")
    if torch.is_grad_enabled() and any(y.requires_grad for y in (*inputs, out)):
        raise ValueError("out must be None where gradients are recorded")


def _check_grid(x: Tensor, grid: Grid) -> None:
    f, h, w = grid
    if f % 2 or h % 8 or w % 8:
        raise ValueError(f"grid must be a multiple of (2, 8, 8), got {grid}")
    if x.ndim != 3 or x.shape[1] != f * h * w:
        raise ValueError(f"x must be (B, {f * h * w}, C) for grid {grid}, got {tuple(x.shape)}")


# Implementations of qk_norm_rope take (x, weight, tables, head_dim, eps, out), those of qkv_norm_rope (qkv, q_weight,
# k_weight, tables, head_dim, eps, q, k, v): they write the last, and return the means. The kernels' module is imported
# when it first runs: Triton is optional, and takes a second to import.

def _qk_reference(x: Tensor, weight: Tensor, tables: Tables, head_dim: int, eps: float, out: Tensor) -> Tensor:
    turned, mean = reference.qk_norm_rope(x, weight, tables, head_dim, eps)
    out.copy_(turned)
    return mean.contiguous()


def _qkv_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, tables: Tables, head_dim: int, eps: float,
                   *out: Tensor) -> tuple[Tensor, Tensor]:
    *made, q_mean, k_mean = reference.qkv_norm_rope(qkv, q_weight, k_weight, tables, head_dim, eps)
    for place, value in zip(out, made):
        place.copy_(value)
    return q_mean.contiguous(), k_mean.contiguous()


def _qk_triton(*call) -> Tensor:
    from . import rope_triton
    return rope_triton.qk_norm_rope(*call)


def _qkv_triton(*call) -> tuple[Tensor, Tensor]:
    from . import rope_triton
    return rope_triton.qkv_norm_rope(*call)


def _gpu_supports(x: Tensor, weights: tuple[Tensor, ...], tables: Tables, *out: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"runs on a CUDA device, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {x.dtype}"
    H, D = out[0].shape[2:]
    if D not in (64, 128) or H > HEADS:
        return f"needs head_dim 64 or 128 and at most {HEADS} heads, here are {H} of {D}"
    if any(y.stride(-1) != 1 for y in (x, *out)) or not all(y.is_contiguous() for y in (*weights, *tables)):
        return "x and out must be contiguous in their last dimension, and weights and tables in all"
    return None


register("qk_norm_rope", Backend("triton", _qk_triton, _triton.available, _gpu_supports),
         Backend("reference", _qk_reference))
register("qkv_norm_rope", Backend("triton", _qkv_triton, _triton.available, _gpu_supports),
         Backend("reference", _qkv_reference))
register("window_order", Backend("reference", reference.window_order))


def _outs(x: Tensor, parts: int, head_dim: int, count: int) -> list[Tensor]:
    B, L, width = x.shape
    return [x.new_empty((B, L, width // parts // head_dim, head_dim)) for _ in range(count)]


def _means(x: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    B, L, width = x.shape
    made = [x.new_empty((B, width // parts // head_dim, L // BLOCK, head_dim)) for _ in range(min(parts, 2))]
    return tuple(made)


def _qk_into(x, weight, t, h, w, head_dim, eps, out, backend):
    tables = t, h, w
    return pick("qk_norm_rope", backend, x, (weight,), tables, out).run(x, weight, tables, head_dim, eps, out)


def _qk(x, weight, t, h, w, head_dim, eps, backend):
    out, = _outs(x, 1, head_dim, 1)
    return out, _qk_into(x, weight, t, h, w, head_dim, eps, out, backend)


def _qkv_into(qkv, q_weight, k_weight, t, h, w, head_dim, eps, k, v, backend):
    tables, (q,) = (t, h, w), _outs(qkv, 3, head_dim, 1)
    chosen = pick("qkv_norm_rope", backend, qkv, (q_weight, k_weight), tables, q, k, v)
    return q, *chosen.run(qkv, q_weight, k_weight, tables, head_dim, eps, q, k, v)


def _qkv(qkv, q_weight, k_weight, t, h, w, head_dim, eps, backend):
    k, v = _outs(qkv, 3, head_dim, 2)
    q, *means = _qkv_into(qkv, q_weight, k_weight, t, h, w, head_dim, eps, k, v, backend)
    return q, k, v, *means


define_differentiable(
    "window_order", "Tensor x, SymInt f, SymInt h, SymInt w", 1,
    lambda x, f, h, w, backend: pick("window_order", backend).run(x, (f, h, w)),
    lambda x, f, h, w, backend: x.new_empty(x.shape), lambda x, f, h, w: reference.window_order(x, (f, h, w)))
_QK = "Tensor x, Tensor weight, Tensor t, Tensor h, Tensor w, int head_dim, float eps"
_QKV = "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor t, Tensor h, Tensor w, int head_dim, float eps"
define_differentiable(
    "qk_norm_rope", _QK, 2, _qk,
    lambda x, weight, t, h, w, D, eps, backend: (*_outs(x, 1, D, 1), *_means(x, 1, D)),
    lambda x, weight, t, h, w, *rest: reference.qk_norm_rope(x, weight, (t, h, w), *rest))
define_differentiable(
    "qkv_norm_rope", _QKV, 5, _qkv,
    lambda x, q_weight, k_weight, t, h, w, D, eps, backend: (*_outs(x, 3, D, 3), *_means(x, 3, D)),
    lambda x, q_weight, k_weight, t, h, w, *rest: reference.qkv_norm_rope(x, q_weight, k_weight, (t, h, w), *rest))
define("qk_norm_rope_into", f"{_QK}, Tensor(a!) out, str? backend", "Tensor", _qk_into,
       lambda x, weight, t, h, w, D, eps, out, backend: _means(x, 1, D)[0])
define("qkv_norm_rope_into", f"{_QKV}, Tensor(a!) k, Tensor(b!) v, str? backend", "(Tensor, Tensor, Tensor)",
       _qkv_into, lambda x, q_weight, k_weight, t, h, w, D, eps, k, v, backend: (*_outs(x, 3, D, 1), *_means(x, 3, D)))
