"""Norms and the adds around them."""
from functools import partial

import torch
from torch import Tensor

from . import _triton, reference
from ._operator import define_differentiable
from .backends import Backend, pick, register

WIDEST = 16384  # channels of a row that one program of the kernel holds


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 inside, rounded before weight.

    x: (..., C)    weight: (C,)    one floating dtype and device
    backend: "triton" (sm_80 up; bf16, fp16 and float32, C at most 16384, rows of any one distance from each to
       the next), "reference" (PyTorch); None for the first that can run the call
    Returns (..., C), contiguous. Differentiable by way of the reference.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the call.
    """
    _check(x, weight=weight)
    return torch.ops.flashvsr.rms_norm(x, weight, eps, backend)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6,
                        backend: str | None = None) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift over the last dimension; float32 inside.

    x: (..., C)    scale, shift: (C,)    all else as for rms_norm
    """
    _check(x, scale=scale, shift=shift)
    return torch.ops.flashvsr.layer_norm_modulate(x, scale, shift, eps, backend)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x + gate * y, x + y without a gate; float32 inside. x, y: (..., C)    gate: (C,)    all else as for rms_norm"""
    _check_sum(x, y)
    _check(x, gate=gate)
    return torch.ops.flashvsr.gated_add(x, y, gate, backend)


def gated_add_norm(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, eps: float = 1e-6,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The residual stream's next value, sum = gated_add(x, y, gate), and layer_norm_modulate(sum, scale, shift).

    x, y: (..., C)    gate, scale, shift: (C,)    all else as for rms_norm
    Returns sum, rounded as it is before the norm, and its norm.
    """
    _check_sum(x, y)
    _check(x, gate=gate, scale=scale, shift=shift)
    return torch.ops.flashvsr.gated_add_norm(x, y, gate, scale, shift, eps, backend)


def _check_sum(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(f"y must be {x.dtype} on {x.device} as x, got {y.dtype} on {y.device}")


def _check(x: Tensor, **vectors: Tensor | None) -> None:
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"x must be (..., C) with a floating dtype, got {tuple(x.shape)} {x.dtype}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}")
        if vector.dtype != x.dtype or vector.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {vector.dtype} on {vector.device}")


# Implementations have the reference's signatures. The kernels' module is imported when it first runs: Triton is
# optional, and takes a second to import.

def _run_reference(op: str, *call: Tensor | float | None) -> Tensor | tuple[Tensor, Tensor]:
    results = getattr(reference, op)(*call)
    return results.contiguous() if isinstance(results, Tensor) else tuple(y.contiguous() for y in results)


def _run_triton(op: str, *call: Tensor | float | None) -> Tensor | tuple[Tensor, Tensor]:
    from . import norm_triton
    return getattr(norm_triton, op)(*call)


def _gpu_supports(*call: Tensor | float | None) -> str | None:
    x = call[0]
    if x.device.type != "cuda":
        return f"runs on a CUDA device, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {x.dtype}"
    if not 1 <= x.shape[-1] <= WIDEST:
        return f"rows must have 1 to {WIDEST} channels, x is {tuple(x.shape)}"
    for tensor in call:
        if isinstance(tensor, Tensor) and not _evenly_spaced(tensor):
            return ("rows must be contiguous and evenly spaced, "
                    f"strides of a {tuple(tensor.shape)} are {tensor.stride()}")
    return None


def _evenly_spaced(x: Tensor) -> bool:
    """Whether x (..., C) can be seen as (rows, C), its last dimension contiguous."""
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    inner = all(outer == size * stride for (_, outer), (size, stride) in zip(dims, dims[1:]))
    return not x.numel() or inner and (x.shape[-1] == 1 or x.stride(-1) == 1)


def _register(op: str, arguments: str, results: int) -> None:
    """op, whose results are like x, its first argument."""
    register(op, Backend("triton", partial(_run_triton, op), _triton.available, _gpu_supports),
             Backend("reference", partial(_run_reference, op)))

    def run(*call):
        return pick(op, call[-1], *call[:-1]).run(*call[:-1])

    def fake(x, *call):
        return x.new_empty(x.shape) if results == 1 else tuple(x.new_empty(x.shape) for _ in range(results))
    define_differentiable(op, arguments, results, run, fake, getattr(reference, op))


_register("rms_norm", "Tensor x, Tensor weight, float eps", 1)
_register("layer_norm_modulate", "Tensor x, Tensor scale, Tensor shift, float eps", 1)
_register("gated_add", "Tensor x, Tensor y, Tensor? gate", 1)
_register("gated_add_norm", "Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor shift, float eps", 2)
