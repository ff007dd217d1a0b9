"""The feed-forward's first product, with the activation in the same kernel."""
import torch
from torch import Tensor

from . import reference
from ._operator import define_differentiable
from .backends import Backend, pick, register


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """GELU of x @ weight.T + bias, in its approximation by tanh.

    x: (..., C), contiguous for "cublas"    weight: (O, C)    bias: (O,)    one floating dtype and device
    backend: "cublas" (bias and GELU in the epilogue; CUDA; bf16, fp16), "reference" (PyTorch); None for the first that
       can run the call
    Returns (..., O). Differentiable by way of the reference.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the call.
    """
    if not x.ndim or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        raise ValueError(f"x must be (..., C), weight (O, C) and bias (O,), got {tuple(x.shape)}, "
                         f"{tuple(weight.shape)} and {tuple(bias.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    for name, other in (("weight", weight), ("bias", bias)):
        if (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {other.dtype} on {other.device}")
    return torch.ops.flashvsr.linear_gelu(x, weight, bias, backend)


def _run_cublas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # cuBLAS's own GELU is the approximation by tanh; PyTorch reaches it by this function alone.
    y = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
    return y.view(*x.shape[:-1], -1)


def _cublas_supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"runs on a CUDA device, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"has no {x.dtype}"
    if x.ndim < 2 or not x.numel() or not all(y.is_contiguous() for y in (x, weight, bias)):
        return f"x must be (..., n, C), not empty, and all contiguous, x is {tuple(x.shape)} with strides {x.stride()}"
    return None


def _cublas_available() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device, or this torch is built without CUDA"


register("linear_gelu", Backend("cublas", _run_cublas, _cublas_available, _cublas_supports),
         Backend("reference", reference.linear_gelu))
define_differentiable(
    "linear_gelu", "Tensor x, Tensor weight, Tensor bias", 1,
    lambda x, weight, bias, backend: pick("linear_gelu", backend, x, weight, bias).run(x, weight, bias),
    lambda x, weight, bias, backend: x.new_empty((*x.shape[:-1], weight.shape[0])), reference.linear_gelu)
