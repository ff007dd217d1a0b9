"""Norms and the adds around them."""
from torch import Tensor

from . import reference
from .backends import Backend, pick, register


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 inside. x (..., C), weight (C,)."""
    _check_width("weight", weight, x)
    return pick("rms_norm", None).run(x, weight, eps)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift over the last dimension; float32 inside. x (..., C),
    scale and shift (C,).
    """
    _check_width("scale", scale, x)
    _check_width("shift", shift, x)
    return pick("layer_norm_modulate", None).run(x, scale, shift, eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * y, x + y without a gate. x and y (..., C), gate (C,)."""
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    if gate is not None:
        _check_width("gate", gate, x)
    return pick("gated_add", None).run(x, y, gate)


def _check_width(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(value.shape)}")


register("rms_norm", Backend("reference", reference.rms_norm))
register("layer_norm_modulate", Backend("reference", reference.layer_norm_modulate))
register("gated_add", Backend("reference", reference.gated_add))
