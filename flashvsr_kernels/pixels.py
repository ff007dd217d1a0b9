"""Both ends of the model: the enlargement of its input, and colours and bytes of its output.

Moments are what colours are matched by, float64 (N, 2, 3): the means over a picture of y and of y^2, for red,
green and blue, with y in [-1, 1]: 2 * rgb - 1, or level / 127.5 - 1.
"""
import torch
from torch import Tensor

from . import _native, _triton, reference
from ._operator import define
from .backends import Backend, pick, register

Box = tuple[int, int, int, int]
GPU_KINDS = torch.bfloat16, torch.float16, torch.float32

_lib = torch.library.Library("flashvsr", "FRAGMENT")


def enlarge(frames: Tensor, *, return_moments: bool = False,
            backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Frames four times as high and wide, bit for bit as Pillow's 8-bit bicubic resize makes them.

    frames: uint8 (T, h, w, 3), any strides
    backend: "triton" (sm_80 up), "reference" (PyTorch); None for the first that can run the call
    Returns uint8 (T, 4 h, 4 w, 3), contiguous, and with return_moments its moments.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the
    call.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames must be uint8 (T, h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
    large, moments = torch.ops.flashvsr.enlarge(frames, backend)
    return (large, moments) if return_moments else large


def pixel_unshuffle(frames: Tensor, size: int, *, bound: float | None = None, dtype: torch.dtype | None = None,
                    out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Cells of size x size pixels, of all frames that go together, as one pixel of many channels.

    frames: (N, T, H, W, 3), any strides, H and W multiples of size: uint8, of which level / 127.5 - 1 is taken, or
       floating, taken as they are
    bound: of these values, bound * tanh(value / bound) is given; positive, None: the values
    dtype: of the result, frames' if None; floating
    out: (N, H / size, W / size, 3 * T * size^2) of that dtype to write into, its channels contiguous, such as a part of
       the channels of a larger tensor; allocated if None
    backend: "triton" (sm_80 up; uint8, bf16, fp16 and float32 to bf16, fp16 and float32), "reference" (PyTorch); None
       for the first that can run the call
    Returns out: channels by (colour, frame, row, column), as torch.nn.functional.pixel_unshuffle has them for T = 1.
    Raises as enlarge does, and ValueError where gradients of frames are recorded.
    """
    if frames.ndim != 5 or frames.shape[4] != 3 or size < 1 or frames.shape[2] % size or frames.shape[3] % size:
        raise ValueError(f"frames must be (N, T, H, W, 3) with H and W multiples of {size}, got {tuple(frames.shape)}")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(f"frames must be uint8 or floating, got {frames.dtype}")
    if bound is not None and not bound > 0:
        raise ValueError(f"bound must be positive or None, got {bound}")
    if torch.is_grad_enabled() and frames.requires_grad:
        raise ValueError("frames must not require gradients: pixel_unshuffle has none")
    N, T, H, W, _ = frames.shape
    shape = N, H // size, W // size, 3 * T * size ** 2
    if out is None:
        out = torch.empty(shape, dtype=dtype or frames.dtype, device=frames.device)
    elif out.shape != shape or dtype not in (None, out.dtype) or out.device != frames.device or out.stride(3) != 1:
        raise ValueError(f"out must be {shape} {dtype or ''} on {frames.device} with contiguous channels, got "
                         f"{tuple(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}")
    if not out.is_floating_point():
        raise ValueError(f"dtype must be floating, got {out.dtype}")
    torch.ops.flashvsr.pixel_unshuffle_into(frames, size, bound, out, backend)
    return out


def rgb_conv(x: Tensor, weight: Tensor, bias: Tensor, *, box: Box | None = None,
             out_dtype: torch.dtype | None = None, return_moments: bool = True,
             backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The decoder's last convolution, 3x3 to three channels with zero padding 1, and moments of its result.

    x: (N, H, W, C)    weight: (3, C, 3, 3)    bias: (3,)    one floating dtype and device
    box: (top, left, height, width) of the part of the result that is wanted, None for all of it
    out_dtype: of the result, x's if None
    backend: "triton" (sm_80 up; bf16 and fp16, C at most 256 and contiguous), "cpu" (conv3x3's), "reference"
       (PyTorch); None for the first that can run the call
    Returns rgb (N, height, width, 3), contiguous, and with return_moments the moments of 2 * rgb - 1, rgb as
    rounded: on a GPU they cost nothing. rgb is differentiable in x, weight and bias.
    Raises as enlarge does.
    """
    if x.ndim != 4 or not x.shape[3] or weight.shape != (3, x.shape[3], 3, 3) or bias.shape != (3,):
        raise ValueError("x must be (N, H, W, C) with channels, weight (3, C, 3, 3) and bias (3,), "
                         f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}")
    if not x.dtype == weight.dtype == bias.dtype or not x.is_floating_point():
        raise ValueError("x, weight and bias must have one floating dtype, "
                         f"got {x.dtype}, {weight.dtype} and {bias.dtype}")
    if not x.device == weight.device == bias.device:
        raise ValueError("x, weight and bias must be on one device, "
                         f"got {x.device}, {weight.device} and {bias.device}")
    H, W = x.shape[1:3]
    box = (0, 0, H, W) if box is None else box
    check_part(box, H, W, out_dtype)
    call = x, weight, bias, box, out_dtype or x.dtype, return_moments, backend
    rgb, moments = torch.ops.flashvsr.rgb_conv(*call)
    return (rgb, moments) if return_moments else rgb


def check_part(box: Box, H: int, W: int, out_dtype: torch.dtype | None) -> None:
    """Raises ValueError if rgb_conv cannot give this part of a result of H x W in this dtype."""
    top, left, height, width = box
    if min(top, left, height - 1, width - 1) < 0 or top + height > H or left + width > W:
        raise ValueError(f"box must be (top, left, height, width) inside {H}x{W}, got {tuple(box)}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be floating or None, got {out_dtype}")


def color_moments(frames: Tensor) -> Tensor:
    """Moments of frames (N, H, W, 3), about [-1, 1], any floating dtype."""
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.is_floating_point():
        raise ValueError(f"frames must be floating (N, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    return pick("color_moments", None).run(frames)


def adain_uint8(rgb: Tensor, moments: Tensor, source_moments: Tensor, *, out_dtype: torch.dtype = torch.uint8,
                truncate: bool = False, backend: str | None = None) -> Tensor:
    """Pictures whose channels have been given the mean and standard deviation of their sources, as bytes.

    y = 2 * rgb - 1 becomes (y - mean) / std * source_std + source_mean with std = sqrt(variance + 1e-5), in
    float32, then 0...255.
    rgb: (N, H, W, 3) floating, about [0, 1], any strides    moments: those of 2 * rgb - 1, from rgb_conv
    source_moments: from enlarge or color_moments
    out_dtype: torch.uint8, or torch.float32 in [0, 1] for more than 8 bits
    truncate: towards 0, as the official code does, not to the nearest of the 256 levels
    backend: "triton" (sm_80 up; bf16, fp16 and float32; pixels of a row next to one another, rows and
       pictures anywhere), "reference" (PyTorch); None for the first that can run the call
    Returns (N, H, W, 3), contiguous. Raises as enlarge does.
    """
    if rgb.ndim != 4 or rgb.shape[3] != 3 or not rgb.is_floating_point():
        raise ValueError(f"rgb must be floating (N, H, W, 3), got {rgb.dtype} {tuple(rgb.shape)}")
    for name, given in (("moments", moments), ("source_moments", source_moments)):
        if given.dtype != torch.float64 or given.shape != (len(rgb), 2, 3) or given.device != rgb.device:
            raise ValueError(f"{name} must be float64 ({len(rgb)}, 2, 3) on {rgb.device}, "
                             f"got {given.dtype} {tuple(given.shape)} on {given.device}")
    if out_dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"out_dtype must be torch.uint8 or torch.float32, got {out_dtype}")
    return torch.ops.flashvsr.adain_uint8(rgb, moments, source_moments, out_dtype, truncate, backend)


# Kernels are imported when they first run: Triton is optional, and takes a second to import.

def _enlarge_triton(frames: Tensor) -> tuple[Tensor, Tensor]:
    from . import pixels_triton
    return pixels_triton.enlarge(frames)


def _unshuffle_triton(frames: Tensor, size: int, bound: float | None, out: Tensor) -> None:
    from . import pixels_triton
    pixels_triton.pixel_unshuffle(frames, size, bound, out)


def _rgb_conv_triton(*call: Tensor | list[int] | torch.dtype | bool) -> tuple[Tensor, Tensor]:
    from . import pixels_triton
    return pixels_triton.rgb_conv(*call)


def _rgb_conv_cpu(x: Tensor, weight: Tensor, bias: Tensor, box: list[int], out_dtype: torch.dtype,
                  moments: bool) -> tuple[Tensor, Tensor]:
    whole = torch.ops.flashvsr.conv3x3_cpu(x, weight, bias, None, None, False)
    return reference.part_and_moments(whole, box, out_dtype, moments)


def _adain_triton(rgb: Tensor, moments: Tensor, source_moments: Tensor, out_dtype: torch.dtype,
                  truncate: bool) -> Tensor:
    from . import pixels_triton
    return pixels_triton.adain_uint8(rgb, moments, source_moments, out_dtype, truncate)


def _on_gpu(x: Tensor) -> str | None:
    return None if x.device.type == "cuda" else f"runs on a CUDA device, the pictures are on {x.device}"


def _unshuffle_supports(frames: Tensor, out: Tensor) -> str | None:
    for x, kinds in ((frames, (torch.uint8, *GPU_KINDS)), (out, GPU_KINDS)):
        if x.dtype not in kinds:
            return _on_gpu(x) or f"has no {x.dtype}"
    return _on_gpu(frames)


def _rgb_conv_cpu_available() -> str | None:
    return _native.available() or _native.built("conv3x3_cpu")


def _rgb_conv_cpu_supports(x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> str | None:
    if out_dtype != x.dtype and x.dtype != torch.float32:
        return f"rounds to {x.dtype} before {out_dtype}"
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bf16 on a CPU, x is {x.dtype} on {x.device}"
    if not (x.is_contiguous() and bias.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)):
        return ("x and bias must be contiguous and weight channels_last, "
                f"their strides are {x.stride()}, {bias.stride()} and {weight.stride()}")
    return None


def _rgb_conv_supports(x: Tensor, *_: Tensor | torch.dtype) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return _on_gpu(x) or f"has no {x.dtype}"
    if x.shape[3] > 256 or x.stride(3) != 1:
        return f"takes at most 256 channels, contiguous; x is {tuple(x.shape)} with strides {x.stride()}"
    return _on_gpu(x)


def _adain_supports(rgb: Tensor) -> str | None:
    if rgb.dtype not in GPU_KINDS:
        return _on_gpu(rgb) or f"has no {rgb.dtype}"
    if rgb.stride()[2:] != (3, 1):
        return f"pixels of a row must be next to one another, the strides of rgb are {rgb.stride()}"
    return _on_gpu(rgb)


register("enlarge", Backend("triton", _enlarge_triton, _triton.available, _on_gpu),
         Backend("reference", reference.enlarge))
register("pixel_unshuffle", Backend("triton", _unshuffle_triton, _triton.available, _unshuffle_supports),
         Backend("reference", reference.pixel_unshuffle))
register("rgb_conv", Backend("triton", _rgb_conv_triton, _triton.available, _rgb_conv_supports),
         Backend("cpu", _rgb_conv_cpu, _rgb_conv_cpu_available, _rgb_conv_cpu_supports),
         Backend("reference", reference.rgb_conv))
register("color_moments", Backend("reference", reference.color_moments))
register("adain_uint8", Backend("triton", _adain_triton, _triton.available, _adain_supports),
         Backend("reference", reference.adain_uint8))

_lib.define("enlarge(Tensor frames, str? backend) -> (Tensor, Tensor)")
_lib.define("rgb_conv(Tensor x, Tensor weight, Tensor bias, SymInt[] box, ScalarType out_dtype, "
            "bool moments, str? backend) -> (Tensor, Tensor)")
_lib.define("adain_uint8(Tensor rgb, Tensor moments, Tensor source_moments, ScalarType out_dtype, "
            "bool truncate, str? backend) -> Tensor")


define("pixel_unshuffle_into", "Tensor frames, int size, float? bound, Tensor(a!) out, str? backend", "()",
       lambda *call: pick("pixel_unshuffle", call[4], call[0], call[3]).run(*call[:4]), lambda *_: None)


@torch.library.impl(_lib, "enlarge", "CompositeExplicitAutograd")
def _enlarge(frames, backend):
    return pick("enlarge", backend, frames).run(frames)


@torch.library.impl(_lib, "rgb_conv", "CompositeExplicitAutograd")
def _rgb_conv(x, weight, bias, box, out_dtype, moments, backend):
    chosen = pick("rgb_conv", backend, x, weight, bias, out_dtype)
    return chosen.run(x, weight, bias, box, out_dtype, moments)


@torch.library.impl(_lib, "adain_uint8", "CompositeExplicitAutograd")
def _adain_uint8(rgb, moments, source_moments, out_dtype, truncate, backend):
    return pick("adain_uint8", backend, rgb).run(rgb, moments, source_moments, out_dtype, truncate)


def _moments_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 2, 3), dtype=torch.float64)


@torch.library.register_fake("flashvsr::enlarge", lib=_lib)
def _enlarge_fake(frames, backend):
    T, h, w, _ = frames.shape
    return frames.new_empty((T, 4 * h, 4 * w, 3)), _moments_fake(frames)


@torch.library.register_fake("flashvsr::rgb_conv", lib=_lib)
def _rgb_conv_fake(x, weight, bias, box, out_dtype, moments, backend):
    rgb = x.new_empty((x.shape[0], *box[2:], 3), dtype=out_dtype)
    return rgb, _moments_fake(x[:len(x) if moments else 0])


@torch.library.register_fake("flashvsr::adain_uint8", lib=_lib)
def _adain_uint8_fake(rgb, moments, source_moments, out_dtype, truncate, backend):
    return rgb.new_empty(rgb.shape, dtype=out_dtype)


def _rgb_conv_context(ctx, inputs, output):
    x, weight, _, ctx.box, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])


def _rgb_conv_autograd(ctx, grad, _):
    x, weight = ctx.saved_tensors
    top, left, height, width = ctx.box
    whole = x.new_zeros((*x.shape[:3], 3))
    whole[:, top:top + height, left:left + width] = grad
    wanted = (*ctx.needs_input_grad[:3], False, False)
    return *reference.conv3x3_backward(whole, x, weight, None, None, wanted)[:3], None, None, None, None


torch.library.register_autograd("flashvsr::rgb_conv", _rgb_conv_autograd, setup_context=_rgb_conv_context,
                                lib=_lib)
