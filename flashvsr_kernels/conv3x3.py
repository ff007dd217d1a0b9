"""The decoder's convolutions: 3x3 with what surrounds it, and time growth, enlargement and 3x3 as one."""
from functools import partial

import torch
from torch import Tensor

from . import _native, _triton, reference
from ._operator import define
from .backends import Backend, pick, register

_lib = torch.library.Library("flashvsr", "FRAGMENT")


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, past: Tensor | None = None,
            residual: Tensor | None = None, upsample: int = 1, relu: bool = False, out: Tensor | None = None,
            backend: str | None = None) -> Tensor:
    """3x3 convolution of NHWC pictures, zero padding 1, with what surrounds it in the decoder.

    x: (N, H, W, C), one floating dtype and device with all other tensors
    weight: (O, C, 3, 3), or (O, 2 C, 3, 3) with past    bias: (O,) or None
    past: (N, H, W, C), the second half of the input channels: the picture one step before
    upsample: 2 doubles the picture (nearest neighbour) before the convolution, as upsample_conv with weights
       folded in each call, a joined copy of x and past, and bias, residual and relu behind it, each rounded
    residual: (N, upsample * H, upsample * W, O), added before relu
    out: the result's memory, contiguous and of none of the others, while no gradients are recorded; allocated if None
    backend: "hopper" (Gluon, sm_90), "triton" and "cuda" (CUDA C++), both sm_80 up, all three bf16 and fp16; "cpu"
       (C++, float32 and bf16); "reference" (PyTorch); None for the first of them that can run the call. All but the
       reference want contiguous pictures and weights in memory format channels_last; hopper and cuda also C a
       multiple of 8, O of 64 (hopper) or 8 (cuda), and tensors that begin at 16 bytes. cpu is Winograd's
       form: one value that is not finite makes whole tiles of 4x4 results NaN.
    Returns (N, upsample * H, upsample * W, O), contiguous. Differentiable in all tensors.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the
    call.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError("x must be (N, H, W, C) and weight (O, C, 3, 3), "
                         f"got {tuple(x.shape)} and {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have at least one channel in and one out, got {tuple(weight.shape)}")
    if past is not None and past.shape != x.shape:
        raise ValueError(f"past must have x's shape {tuple(x.shape)}, got {tuple(past.shape)}")
    channels = x.shape[3] * (1 if past is None else 2)
    if weight.shape[1] != channels:
        raise ValueError(f"weight must take {channels} channels for x {tuple(x.shape)}"
                         f"{'' if past is None else ' with past'}, got {tuple(weight.shape)}")
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {upsample}")
    N, H, W, _ = x.shape
    O = weight.shape[0]
    if bias is not None and bias.shape != (O,):
        raise ValueError(f"bias must be ({O},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (N, upsample * H, upsample * W, O):
        raise ValueError(f"residual must be {(N, upsample * H, upsample * W, O)}, got {tuple(residual.shape)}")
    _check_kinds(x, weight=weight, bias=bias, past=past, residual=residual)
    _check_out(out, (N, upsample * H, upsample * W, O), x, weight, bias, past, residual)
    if upsample == 1 and out is None:
        return torch.ops.flashvsr.conv3x3(x, weight, bias, past, residual, relu, backend)
    if upsample == 1:
        torch.ops.flashvsr.conv3x3_into(x, weight, bias, past, residual, relu, out, backend)
        return out
    y = upsample_conv(x if past is None else torch.cat([x, past], -1), fold_upsample(weight), backend=backend)
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return y if out is None else out.copy_(y)


def fold_upsample(weight: Tensor, grow: Tensor | None = None) -> Tensor:
    """Weights for upsample_conv: growth in time, nearest enlargement by 2 and a 3x3 convolution as one.

    weight: (O, D, 3, 3), the convolution's    grow: (T * C, C) with D = C, whose rows t * C to (t + 1) * C
    make step t of a pixel; None for no growth, T = 1
    Returns (T, 2, 2, O, 2, 2, C) by step, output phase y and x, channel, tap y and x, contiguous, in weight's
    dtype; computed in float32 or wider. Differentiable.
    Raises ValueError for other shapes.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be (O, C, 3, 3), got {tuple(weight.shape)}")
    C = weight.shape[1]
    if grow is not None and (grow.ndim != 2 or grow.shape[1] != C or grow.shape[0] % C or not grow.shape[0]):
        raise ValueError(f"grow must be (T * {C}, {C}) for weight {tuple(weight.shape)}, "
                         f"got {tuple(grow.shape)}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Pixels 2i - 1 to 2i + 2 of the enlarged picture are i - 1, i, i and i + 1: phase 0 sees the first three,
    # phase 1 the last three.
    for axis in 2, 4:
        first, middle, last = wide.unbind(axis)
        phases = [torch.stack(taps, axis) for taps in ((first, middle + last), (first + middle, last))]
        wide = torch.stack(phases, axis)
    wide = wide.permute(2, 4, 0, 3, 5, 1).unsqueeze(0)  # (1, phase y, phase x, O, tap y, tap x, C)
    if grow is not None:
        steps = grow.to(wide.dtype).view(-1, C, C)
        wide = (wide.reshape(1, -1, C) @ steps).view(len(steps), *wide.shape[1:])
    return wide.to(weight.dtype).contiguous()


def upsample_conv(x: Tensor, folded: Tensor, *, relu: bool = False, out: Tensor | None = None,
                  backend: str | None = None) -> Tensor:
    """Growth in time without bias, nearest enlargement by 2 and a 3x3 convolution with zero padding 1.

    x: (N, H, W, C)    folded: (T, 2, 2, O, 2, 2, C) from fold_upsample, of x's dtype and device
    backend: as for conv3x3; all but the reference want x and folded contiguous
    relu: what is negative becomes 0    out: as for conv3x3
    Returns (N * T, 2 H, 2 W, O), step t of picture n at n * T + t, contiguous: before relu channel o of pixel
    (2 i + py, 2 j + px) is the sum over ty, tx and c of folded[t, py, px, o, ty, tx, c] and
    x[n, i + ty - 1 + py, j + tx - 1 + px, c], zero outside the picture. Differentiable in x and folded.
    Raises as conv3x3 does.
    """
    if x.ndim != 4 or folded.ndim != 7 or (*folded.shape[1:3], *folded.shape[4:]) != (2, 2, 2, 2, x.shape[3]):
        raise ValueError("x must be (N, H, W, C) and folded (T, 2, 2, O, 2, 2, C), "
                         f"got {tuple(x.shape)} and {tuple(folded.shape)}")
    if 0 in folded.shape:
        raise ValueError(f"folded must have at least one step and one channel in and one out, got {tuple(folded.shape)}")
    _check_kinds(x, folded=folded)
    N, H, W, _ = x.shape
    _check_out(out, (N * folded.shape[0], 2 * H, 2 * W, folded.shape[3]), x, folded)
    if out is None:
        return torch.ops.flashvsr.upsample_conv(x, folded, relu, backend)
    torch.ops.flashvsr.upsample_conv_into(x, folded, relu, out, backend)
    return out


def _check_kinds(x: Tensor, **others: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    for name, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} like x, "
                             f"got {other.dtype} on {other.device}")


def _check_out(out: Tensor | None, shape: tuple[int, ...], x: Tensor, *others: Tensor | None) -> None:
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (shape, x.dtype, x.device) or not out.is_contiguous():
        raise ValueError(f"out must be {shape} {x.dtype} on {x.device}, contiguous, got {tuple(out.shape)} {out.dtype} on "
                         f"{out.device} with strides {out.stride()}")
    given = [y for y in (x, *others) if y is not None]
    if torch.is_grad_enabled() and any(y.requires_grad for y in (out, *given)):
        raise ValueError("out must be None where gradients are recorded")
    if any(torch._C._is_alias_of(y, out) for y in given):
        raise ValueError("out must share no memory with the other tensors")


# Implementations of conv3x3 take (x, weight, bias, past, residual, relu), those of upsample_conv (x, folded,
# relu), and with the name out where the result goes, if not into memory of its own.
# Kernel modules are imported when they first run: Triton is optional, and takes a second to import.

def _run_reference(function: str, *call: Tensor | bool | None, out: Tensor | None = None) -> Tensor:
    """What comes out owns its memory: autograd forbids to change a view in place that an operator returns."""
    y = getattr(reference, function)(*call)
    if out is not None:
        return out.copy_(y)
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _run_triton(function: str, *call: Tensor | bool | None, out: Tensor | None = None) -> Tensor:
    from . import conv3x3_triton
    return getattr(conv3x3_triton, function)(*call, out=out)


def _run_hopper(function: str, *call: Tensor | bool | None, out: Tensor | None = None) -> Tensor:
    from . import conv3x3_hopper
    return getattr(conv3x3_hopper, function)(*call, out=out)


def _run_cuda(function: str, x: Tensor, weight: Tensor, *call: Tensor | bool | None,
              out: Tensor | None = None) -> Tensor:
    if out is None:
        N, H, W, _ = x.shape
        out = x.new_empty((N, H, W, len(weight)) if weight.ndim == 4 else
                          (N * len(weight), 2 * H, 2 * W, weight.shape[3]))
    getattr(torch.ops.flashvsr, f"{function}_cuda")(x, weight, *call, out)
    return out


def _run_cpu(function: str, *call: Tensor | bool | None, out: Tensor | None = None) -> Tensor:
    y = getattr(torch.ops.flashvsr, f"{function}_cpu")(*call)
    return y if out is None else out.copy_(y)


def _cpu_available(function: str) -> str | None:
    return _native.available() or _native.built(f"{function}_cpu")


def _cuda_available(function: str) -> str | None:
    return _native.cuda_available() or _native.built(f"{function}_cuda")


def _layout(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Whether pictures, bias and weights (of either op) lie in memory as the kernels read them."""
    if not all(y is None or y.is_contiguous() for y in (x, *others)):
        return "pictures and bias must be contiguous"
    form = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    if weight.is_contiguous(memory_format=form):
        return None
    return f"weights must be {form}, their strides are {weight.stride()}"


def _cpu_supports(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    if x.device.type != "cpu":
        return f"runs on a CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"has no {x.dtype}"
    return _layout(x, weight, *others)


def gpu_supports(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """None if a GPU's kernels can take tensors of these places, dtypes and memory formats, else the reason."""
    if x.device.type != "cuda":
        return f"runs on a CUDA device, x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"has no {x.dtype}"
    return _layout(x, weight, *others)


def _cuda_supports(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    if reason := gpu_supports(x, weight, *others):
        return reason
    C, O = x.shape[3], weight.shape[0 if weight.ndim == 4 else 3]
    if C % 8 or O % 8:
        return f"channels must be multiples of 8, are {C} and {O}"
    if any(y is not None and y.data_ptr() % 16 for y in (x, weight, *others)):
        return "tensors must begin at a multiple of 16 bytes"
    N, H, W, _ = x.shape
    across = (W // 16 + 1) * (O // 64 + 1) * (1 if weight.ndim == 4 else 4 * len(weight))
    if N > 65535 or H > 65535 * 16 or H * W >= 2 ** 31 or across >= 2 ** 31:  # blocks of a launch, and places in int32
        return f"pictures are too many or too large for it: x is {tuple(x.shape)}, output channels are {O}"
    return None


def _hopper_supports(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    if reason := gpu_supports(x, weight, *others):
        return reason
    from . import conv3x3_hopper
    return conv3x3_hopper.supports(x, weight, *others)


for _op in "conv3x3", "upsample_conv":
    register(_op, Backend("hopper", partial(_run_hopper, _op), _triton.hopper_available, _hopper_supports),
             Backend("triton", partial(_run_triton, _op), _triton.available, gpu_supports),
             Backend("cuda", partial(_run_cuda, _op), partial(_cuda_available, _op), _cuda_supports),
             Backend("cpu", partial(_run_cpu, _op), partial(_cpu_available, _op), _cpu_supports),
             Backend("reference", partial(_run_reference, _op)))

_lib.define("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? residual, bool relu, "
            "str? backend) -> Tensor")
_lib.define("upsample_conv(Tensor x, Tensor folded, bool relu, str? backend) -> Tensor")


def _conv3x3_into(x, weight, bias, past, residual, relu, out, backend):
    pick("conv3x3", backend, x, weight, bias, past, residual, out).run(x, weight, bias, past, residual, relu, out=out)


def _upsample_conv_into(x, folded, relu, out, backend):
    pick("upsample_conv", backend, x, folded, out).run(x, folded, relu, out=out)


define("conv3x3_into", "Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? residual, bool relu, "
       "Tensor(a!) out, str? backend", "()", _conv3x3_into, lambda *call: None)
define("upsample_conv_into", "Tensor x, Tensor folded, bool relu, Tensor(a!) out, str? backend", "()",
       _upsample_conv_into, lambda *call: None)


@torch.library.impl(_lib, "conv3x3", "CompositeExplicitAutograd")
def _conv3x3(x, weight, bias, past, residual, relu, backend):
    chosen = pick("conv3x3", backend, x, weight, bias, past, residual)
    return chosen.run(x, weight, bias, past, residual, relu)


@torch.library.impl(_lib, "upsample_conv", "CompositeExplicitAutograd")
def _upsample_conv(x, folded, relu, backend):
    return pick("upsample_conv", backend, x, folded).run(x, folded, relu)


@torch.library.register_fake("flashvsr::conv3x3", lib=_lib)
def _conv3x3_fake(x, weight, bias, past, residual, relu, backend):
    return x.new_empty((*x.shape[:3], weight.shape[0]))


@torch.library.register_fake("flashvsr::upsample_conv", lib=_lib)
def _upsample_conv_fake(x, folded, relu, backend):
    N, H, W, _ = x.shape
    return x.new_empty((N * folded.shape[0], 2 * H, 2 * W, folded.shape[3]))


def _conv3x3_context(ctx, inputs, output):
    x, weight, _, past, _, relu, _ = inputs
    ctx.save_for_backward(x, weight, past, output if relu else None)


def _conv3x3_autograd(ctx, grad):
    return *reference.conv3x3_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[:5]), None, None


def _upsample_conv_context(ctx, inputs, output):
    x, folded, relu, _ = inputs
    ctx.save_for_backward(x, folded, output if relu else None)


def _upsample_conv_autograd(ctx, grad):
    return *reference.upsample_conv_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[:2]), None, None


torch.library.register_autograd("flashvsr::conv3x3", _conv3x3_autograd, setup_context=_conv3x3_context,
                                lib=_lib)
torch.library.register_autograd("flashvsr::upsample_conv", _upsample_conv_autograd,
                                setup_context=_upsample_conv_context, lib=_lib)
