"""The projector's convolution, and the norm behind it."""
import torch
from torch import Tensor

from . import _native, _triton, reference
from ._operator import define_differentiable
from .backends import Backend, pick, register


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, *, gamma: Tensor | None = None,
                  backend: str | None = None) -> Tensor:
    """(4, 3, 3) convolution with stride (2, 1, 1) behind two steps of context; borders of the picture are
    replicated.

    x: (B, T, H, W, C), T even    tail: (B, 2, H, W, C), the two steps before x; None for taps without context
       float32, bf16 or fp16, float64 on a CPU; any strides with a contiguous last dimension
    weight: (O, C, 4, 3, 3), or without tail (O, C, 2, 3, 3); kernels want it channels_last_3d in memory, as they
       never copy it    bias: (O,), contiguous for kernels, as gamma
    gamma: (O,) adds SiLU(y / sqrt(mean(y^2) + 1e-24) * gamma) over the channels, float32 inside
    backend: "hopper" (Gluon, sm_90), "triton" and "cuda" (CUDA C++), both sm_80 up, all three bf16 and fp16;
       "reference" (PyTorch); None for the first that can run the call. hopper and cuda want C and O multiples of 8 and
       rows 16-byte aligned, hopper also pictures of 16 rows and 8 columns at least
    Returns (B, T / 2, H, W, O), contiguous. Differentiable by way of the reference.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the call.
    """
    if x.ndim != 5 or x.shape[1] % 2 or not x.numel():
        raise ValueError(f"x must be (B, T, H, W, C), not empty, with even T, got {tuple(x.shape)}")
    B, _, H, W, C = x.shape
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if tail is not None and tail.shape != (B, 2, H, W, C):
        raise ValueError(f"tail must be {(B, 2, H, W, C)} for x {tuple(x.shape)}, got {tuple(tail.shape)}")
    taps = 2 if tail is None else 4
    if weight.ndim != 5 or weight.shape[1:] != (C, taps, 3, 3):
        raise ValueError(f"weight must be (O, {C}, {taps}, 3, 3) with{'out' * (tail is None)} tail, "
                         f"got {tuple(weight.shape)}")
    if not len(weight):
        raise ValueError(f"weight must have at least one channel out, got {tuple(weight.shape)}")
    for name, vector in (("bias", bias), ("gamma", gamma)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, "
                             f"got {tuple(vector.shape)}")
    for name, other in (("weight", weight), ("bias", bias), ("tail", tail), ("gamma", gamma)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {other.dtype} on {other.device}")
    return torch.ops.flashvsr.causal_conv3d(x, weight, bias, tail, gamma, backend)


def fold_repeat(weight: Tensor) -> Tensor:
    """Weight (O, C, 2, 3, 3) that does on x alone what weight (O, C, 4, 3, 3) does on x of two steps with x as its
    tail: half the work. Summed in float32 or wider, channels_last_3d in memory, in weight's dtype.

    Raises ValueError for a weight of another shape.
    """
    if weight.ndim != 5 or weight.shape[2:] != (4, 3, 3):
        raise ValueError(f"weight must be (O, C, 4, 3, 3), got {tuple(weight.shape)}")
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return (wide[:, :, :2] + wide[:, :, 2:]).to(weight.dtype, memory_format=torch.channels_last_3d)


# Implementations take (x, weight, bias, tail, gamma). Kernel modules are imported when they first run: Triton is
# optional, and takes a second to import.

def _run_reference(*call: Tensor | None) -> Tensor:
    return reference.causal_conv3d(*call).contiguous()


def _run_triton(*call: Tensor | None) -> Tensor:
    from . import conv3d_triton
    return conv3d_triton.forward(*call)


def _run_hopper(*call: Tensor | None) -> Tensor:
    from . import conv3d_hopper
    return conv3d_hopper.forward(*call)


def _run_cuda(x: Tensor, weight: Tensor, *call: Tensor | None) -> Tensor:
    B, T, H, W, _ = x.shape
    out = x.new_empty((B, T // 2, H, W, len(weight)))
    torch.ops.flashvsr.causal_conv3d_cuda(x, weight, *call, out)
    return out


def _cuda_available() -> str | None:
    return _native.cuda_available() or _native.built("causal_conv3d_cuda")


def _gpu_supports(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> str | None:
    if x.device.type != "cuda":
        return f"runs on a CUDA device, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"has no {x.dtype}"
    if not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        return f"weight must be channels_last_3d, its strides are {weight.stride()}"
    for name, value in (("x", x), ("tail", tail)):
        if value is not None and value.stride(4) != 1:
            return f"{name} must be contiguous in its last dimension, its strides are {value.stride()}"
    if not all(value is None or value.is_contiguous() for value in (bias, gamma)):
        return "bias and gamma must be contiguous"
    return None


def _hopper_supports(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> str | None:
    if reason := _gpu_supports(x, weight, bias, tail, gamma):
        return reason
    if x.shape[2] < 16 or x.shape[3] < 8:
        return f"pictures must have 16 rows and 8 columns at least, x is {tuple(x.shape)}"
    if reason := _chunked(x=x, weight=weight, tail=tail):
        return reason
    for name, value in (("x", x), ("tail", tail)):
        if value is not None and any(n > 1 and s <= 0 for n, s in zip(value.shape[:4], value.stride())):
            return f"rows of {name} must be distinct, its strides are {value.stride()}"
    return None


def _cuda_supports(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, gamma: Tensor | None) -> str | None:
    if reason := _gpu_supports(x, weight, bias, tail, gamma):
        return reason
    if reason := _chunked(x=x, weight=weight, tail=tail, bias=bias, gamma=gamma):
        return reason
    (B, T, H, W, _), O = x.shape, weight.shape[0]
    tiles = B * T // 2 * (H // 16 + 1) * (W // 16 + 1) * (O // 64 + 1)
    if B * T * H * W >= 2 ** 31 or tiles >= 2 ** 31:  # blocks of a launch, and places in int32
        return f"pictures are too many or too large for it: x is {tuple(x.shape)}, output channels are {O}"
    return None


def _chunked(x: Tensor, weight: Tensor, tail: Tensor | None, **vectors: Tensor | None) -> str | None:
    """None if channels can be read 8 at a time, 16 bytes, else the reason."""
    if x.shape[4] % 8 or weight.shape[0] % 8:
        return f"channels must be multiples of 8, weight is {tuple(weight.shape)}"
    for name, value in dict(x=x, weight=weight, tail=tail, **vectors).items():
        if value is not None and value.data_ptr() % 16:
            return f"{name} must begin at a multiple of 16 bytes"
    for name, value in (("x", x), ("tail", tail)):
        if value is not None and any(n > 1 and s % 8 for n, s in zip(value.shape[:4], value.stride())):
            return f"rows of {name} must be 16-byte aligned, its strides are {value.stride()}"
    return None


register("causal_conv3d", Backend("hopper", _run_hopper, _triton.hopper_available, _hopper_supports),
         Backend("triton", _run_triton, _triton.available, _gpu_supports),
         Backend("cuda", _run_cuda, _cuda_available, _cuda_supports),
         Backend("reference", _run_reference))


def _run(x, weight, bias, tail, gamma, backend):
    return pick("causal_conv3d", backend, x, weight, bias, tail, gamma).run(x, weight, bias, tail, gamma)


def _fake(x, weight, bias, tail, gamma, backend):
    B, T, H, W, _ = x.shape
    return x.new_empty((B, T // 2, H, W, weight.shape[0]))


define_differentiable("causal_conv3d", "Tensor x, Tensor weight, Tensor bias, Tensor? tail, Tensor? gamma", 1, _run,
                      _fake, reference.causal_conv3d)
