"""The decoder's end as one: the last enlargement and the two convolutions behind it, to red, green and blue.

But for block_mask's, an op file imports no other op; this one does, as its op is three in one, and compat.
"""
import torch
from torch import Tensor

from . import _triton, reference
from ._operator import define
from .backends import Backend, pick, register
from .conv3x3 import conv3x3, gpu_supports, upsample_conv
from .pixels import Box, check_part, rgb_conv


def rgb_head(x: Tensor, folded: Tensor, hidden_weight: Tensor, weight: Tensor, bias: Tensor, *, box: Box | None = None,
             out_dtype: torch.dtype | None = None, return_moments: bool = True,
             backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Pictures twice as high and wide in three channels: rgb_conv of conv3x3 of upsample_conv, a ReLU behind the
    latter two. What lies in between is not kept, and of a single picture made a third after the other.

    x: (N, H, W, C)    folded: (1, 2, 2, D, 2, 2, C) from fold_upsample    hidden_weight: (E, D, 3, 3)
    weight: (3, E, 3, 3)    bias: (3,)    one floating dtype and device
    box, out_dtype, return_moments: as for rgb_conv; the picture is 2 H x 2 W
    backend: "hopper" (sm_90; bf16 and fp16; D and E 64 or 128, W even; where conv3x3's can run), "apart" (the three
       ops with the first backend of each that can run), "reference" (PyTorch); None for the first that can run
    Returns rgb (N, height, width, 3), contiguous, and with return_moments the moments of 2 * rgb - 1, rgb as rounded.
    rgb is differentiable in all tensors; where gradients are recorded, the three ops run and keep their results.
    Raises as rgb_conv does, and ValueError for backend "hopper" where gradients are recorded.
    """
    D = folded.shape[3] if folded.ndim == 7 else 0
    if x.ndim != 4 or 0 in folded.shape or folded.shape != (1, 2, 2, D, 2, 2, x.shape[3]):
        raise ValueError("x must be (N, H, W, C) and folded (1, 2, 2, D, 2, 2, C), "
                         f"got {tuple(x.shape)} and {tuple(folded.shape)}")
    E = len(hidden_weight) if hidden_weight.ndim == 4 else 0
    if not E or hidden_weight.shape != (E, D, 3, 3) or weight.shape != (3, E, 3, 3) or bias.shape != (3,):
        raise ValueError(f"hidden_weight must be (E, {D}, 3, 3), weight (3, E, 3, 3) and bias (3,), got "
                         f"{tuple(hidden_weight.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}")
    for name, other in (("folded", folded), ("hidden_weight", hidden_weight), ("weight", weight), ("bias", bias)):
        if other.dtype != x.dtype or other.device != x.device or not x.is_floating_point():
            raise ValueError(f"{name} and x must have one floating dtype and one device, got {other.dtype} on "
                             f"{other.device} and {x.dtype} on {x.device}")
    box = (0, 0, 2 * x.shape[1], 2 * x.shape[2]) if box is None else box
    check_part(box, 2 * x.shape[1], 2 * x.shape[2], out_dtype)
    tensors = x, folded, hidden_weight, weight, bias
    if torch.is_grad_enabled() and any(y.requires_grad for y in tensors):
        if backend not in (None, "apart", "reference"):
            raise ValueError("backend of rgb_head must be apart, reference or None where gradients are recorded, "
                             f"got {backend!r}")
        each = None if backend == "apart" else backend
        y = upsample_conv(x, folded, relu=True, backend=each)
        y = conv3x3(y, hidden_weight, relu=True, backend=each)
        return rgb_conv(y, weight, bias, box=box, out_dtype=out_dtype, return_moments=return_moments, backend=each)
    rgb, moments = torch.ops.flashvsr.rgb_head(*tensors, box, out_dtype or x.dtype, return_moments, backend)
    return (rgb, moments) if return_moments else rgb


def bands(N: int, H: int, first: int, end: int, halo: int) -> list[tuple[int, int, slice, slice, int]]:
    """Thirds of the rows first to end of pictures of 2 H rows, for what they are made of would take most of the
    decoder's memory. Of several pictures a part is not contiguous: they are taken whole.

    Of each: where it starts and stops; the rows of the pictures of H rows to enlarge; the part of what comes out of
    that which has halo rows around the third, inside the picture; and which row of it the third starts at
    """
    if N != 1:
        return [(first, end, slice(0, H), slice(0, 2 * H), first)]
    size, found = -(-(end - first) // 3), []
    for start in range(first, end, size):
        stop = min(start + size, end)
        above, below = max(0, start - halo), min(2 * H, stop + halo)
        rows = slice(max(0, above // 2 - 1), min(H, (below + 1) // 2 + 1))  # a 3x3 convolution of enlarged pixels
        found.append((start, stop, rows, slice(above - 2 * rows.start, below - 2 * rows.start), start - above))
    return found


def _run_hopper(*call: Tensor | list[int] | torch.dtype | bool) -> tuple[Tensor, Tensor]:
    from . import rgb_head_hopper  # Triton is optional
    return rgb_head_hopper.rgb_head(*call)


def _run_apart(x: Tensor, folded: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, box: list[int],
               out_dtype: torch.dtype, moments: bool) -> tuple[Tensor, Tensor]:
    top, left, height, width = box
    done, mean = [], x.new_zeros((len(x) if moments else 0, 2, 3), dtype=torch.float64)
    for start, stop, rows, part, at in bands(len(x), x.shape[1], top, top + height, 2):
        y = upsample_conv(x[:, rows], folded, relu=True)
        y = conv3x3(y[:, part], hidden, relu=True)
        its_box = at, left, stop - start, width
        rgb, its_moments = torch.ops.flashvsr.rgb_conv(y, weight, bias, its_box, out_dtype, moments, None)
        del y  # before the next
        done.append(rgb)
        mean.add_(its_moments, alpha=(stop - start) / height)
    return torch.cat(done, 1), mean


def _hopper_supports(x: Tensor, folded: Tensor, hidden: Tensor, weight: Tensor) -> str | None:
    for call in (x, folded), (x, hidden), (x, weight):
        if reason := gpu_supports(*call):
            return reason
    from . import rgb_head_hopper
    return rgb_head_hopper.supports(x, folded, hidden, weight)


register("rgb_head", Backend("hopper", _run_hopper, _triton.hopper_available, _hopper_supports),
         Backend("apart", _run_apart), Backend("reference", reference.rgb_head))


def _rgb_head(x, folded, hidden, weight, bias, box, out_dtype, moments, backend):
    chosen = pick("rgb_head", backend, x, folded, hidden, weight)
    return chosen.run(x, folded, hidden, weight, bias, box, out_dtype, moments)


def _fake(x, folded, hidden, weight, bias, box, out_dtype, moments, backend):
    rgb = x.new_empty((len(x), *box[2:], 3), dtype=out_dtype)
    return rgb, x.new_empty((len(x) if moments else 0, 2, 3), dtype=torch.float64)


define("rgb_head", "Tensor x, Tensor folded, Tensor hidden_weight, Tensor weight, Tensor bias, SymInt[] box, "
       "ScalarType out_dtype, bool moments, str? backend", "(Tensor, Tensor)", _rgb_head, _fake)
