"""Attention over the 128x128 blocks that a mask marks."""
import torch
from torch import Tensor

from . import _native, _triton, reference
from .backends import Backend, pick, register
from .block_mask import BLOCK, BlockMask

_lib = torch.library.Library("flashvsr", "FRAGMENT")


def sparse_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, *, scale: float | None = None,
                return_lse: bool = False, backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the key blocks that mask marks; a query block with none gives zeros.

    q: (B, Lq, H, D), D 64 or 128    k, v: (B, Lk, H, D)    any strides with a contiguous last dimension
       bf16 or fp16; on a CPU also float32 and float64. The last block of queries or keys may be partial.
    mask: BlockMask or bool (B, H, ceil(Lq / 128), ceil(Lk / 128))
    scale: of the scores, 1 / sqrt(D) if None
    backend: "hopper" (Gluon, sm_90), "triton" (sm_80 up), "cuda" (CUDA C++, sm_80 up), all three bf16 and
       fp16, hopper and cuda with scale > 0 and rows 16-byte aligned; "cpu" (C++; float32, float64 and bf16);
       "reference" (PyTorch); None for the first of them that can run the call
    Returns (B, Lq, H, D), and with return_lse the natural log of each row's sum of exponentials, float32
    (B, H, Lq), -inf where a row has no key. Differentiable in q, k and v, not through lse: by the backend of the
    call or, as cuda and cpu have no backward, by the first that has one. Gradients on a GPU are made from
    the result as rounded to q's dtype, with two keys about 1.2 times plain PyTorch's error, less than it from five.
    Raises ValueError on a bad argument, NotImplementedError with each backend's reason if none can run the
    call.
    """
    if q.ndim != 4 or q.shape[3] not in (64, 128):
        raise ValueError(f"q must be (B, Lq, H, D) with D 64 or 128, got {tuple(q.shape)}")
    B, Lq, H, D = q.shape
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (B, H, D):
        raise ValueError(f"k and v must both be ({B}, Lk, {H}, {D}) for q {tuple(q.shape)}, "
                         f"got {tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q, k and v must be contiguous in their last dimension, got strides "
                         f"{q.stride()}, {k.stride()} and {v.stride()}")
    blocks = (B, H, -(-Lq // BLOCK), -(-k.shape[1] // BLOCK))
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.shape != blocks:
            raise ValueError(f"mask must be bool {blocks} for q {tuple(q.shape)} and k {tuple(k.shape)}, "
                             f"got {mask.dtype} {tuple(mask.shape)}")
        mask = BlockMask.from_dense(mask)
    elif not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask or a bool tensor {blocks}, got {type(mask).__name__}")
    elif (*mask.count.shape, mask.key_blocks) != blocks:
        raise ValueError(f"mask must be for {blocks} blocks, "
                         f"got one for {(*mask.count.shape, mask.key_blocks)}")
    _check_lists(mask, q.device)
    out, lse = torch.ops.flashvsr.sparse_attn(q, k, v, mask.index, mask.count, mask.order,
                                              D ** -0.5 if scale is None else scale, backend)
    return (out, lse) if return_lse else out


def _check_lists(mask: BlockMask, device: torch.device) -> None:
    """Kernels read them where they expect them to be."""
    of = tuple(mask.count.shape)
    for name, found, shape in (("index", mask.index, (*of, *mask.index.shape[-1:])), ("count", mask.count, of),
                               ("order", mask.order, (mask.count.numel(),))):
        if (found.shape, found.dtype) != (shape, torch.int32) or not found.is_contiguous():
            raise ValueError(f"mask.{name} must be int32 {shape}, contiguous, "
                             f"got {found.dtype} {tuple(found.shape)} with strides {found.stride()}")
        if found.device != device:
            raise ValueError(f"mask must be on {device}, got {name} on {found.device}")


# Implementations take (q, k, v, index, count, order, scale) and return (out, lse). Kernel modules are
# imported when they first run: Triton is optional, and takes a second to import.

def _run_reference(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, order: Tensor,
                   scale: float) -> tuple[Tensor, Tensor]:
    dense = BlockMask(index, count, order, -(-k.shape[1] // BLOCK)).to_dense()
    return reference.sparse_attn(q, k, v, dense, scale)


def _run_cpu(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, order: Tensor,
             scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.flashvsr.sparse_attn_cpu(q, k, v, index, count, scale)


def _run_cuda(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, order: Tensor,
              scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.flashvsr.sparse_attn_cuda(q, k, v, index, count, order, scale)


def _run_triton(*call: Tensor | float) -> tuple[Tensor, Tensor]:
    from . import sparse_attn_triton
    return sparse_attn_triton.forward(*call)


def _run_hopper(*call: Tensor | float) -> tuple[Tensor, Tensor]:
    from . import sparse_attn_hopper
    return sparse_attn_hopper.forward(*call)


def _cpu_supports(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if q.device.type != "cpu":
        return f"runs on a CPU, q is on {q.device}"
    return None if q.dtype in (torch.float32, torch.float64, torch.bfloat16) else f"has no {q.dtype}"


def _gpu_supports(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if q.device.type != "cuda":
        return f"runs on a CUDA device, q is on {q.device}"
    return None if q.dtype in (torch.bfloat16, torch.float16) else f"has no {q.dtype}"


def _aligned(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """For kernels that copy rows in pieces of 16 bytes."""
    if reason := _gpu_supports(q, k, v, scale):
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [stride for size, stride in zip(x.shape, x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(stride % 8 or stride <= 0 for stride in strides):
            return f"rows of {name} must be distinct and 16-byte aligned, its strides are {x.stride()}"
    return None


def _aligned_and_positive(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """For kernels that look for the maximum before they scale."""
    return _aligned(q, k, v, scale) or (None if scale > 0 else f"scale must be positive, is {scale}")


register("sparse_attn", Backend("hopper", _run_hopper, _triton.hopper_available, _aligned_and_positive),
         Backend("triton", _run_triton, _triton.available, _gpu_supports),
         Backend("cuda", _run_cuda, _native.cuda_available, _aligned_and_positive),
         Backend("cpu", _run_cpu, _native.available, _cpu_supports),
         Backend("reference", _run_reference))

_lib.define("sparse_attn(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, Tensor order, "
            "float scale, str? backend) -> (Tensor, Tensor)")
_lib.define("sparse_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            "Tensor index, Tensor count, Tensor order, float scale, str? backend) "
            "-> (Tensor, Tensor, Tensor)")


@torch.library.impl(_lib, "sparse_attn", "CompositeExplicitAutograd")
def _forward(q, k, v, index, count, order, scale, backend):
    chosen = pick("sparse_attn", backend, q, k, v, scale)
    if not q.numel() or not k.numel():  # nothing to launch
        return q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
    return chosen.run(q, k, v, index, count, order, scale)


@torch.library.register_fake("flashvsr::sparse_attn", lib=_lib)
def _forward_fake(q, k, v, index, count, order, scale, backend):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _backward_reference(grad, q, k, v, out, lse, index, count, order, scale):
    dense = BlockMask(index, count, order, -(-k.shape[1] // BLOCK)).to_dense()
    return reference.sparse_attn_backward(grad, q, k, v, dense, scale)


def _backward_triton(*call):
    from . import sparse_attn_backward
    return sparse_attn_backward.backward(*call)


def _backward_hopper(*call):
    from . import sparse_attn_backward_hopper
    return sparse_attn_backward_hopper.backward(*call)


register("sparse_attn_backward", Backend("hopper", _backward_hopper, _triton.hopper_available, _aligned),
         Backend("triton", _backward_triton, _triton.available, _gpu_supports),
         Backend("reference", _backward_reference))


@torch.library.impl(_lib, "sparse_attn_backward", "CompositeExplicitAutograd")
def _backward(grad, q, k, v, out, lse, index, count, order, scale, backend):
    chosen = pick("sparse_attn_backward", backend, q, k, v, scale)
    if not q.numel() or not k.numel():
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    return chosen.run(grad, q, k, v, out, lse, index, count, order, scale)


@torch.library.register_fake("flashvsr::sparse_attn_backward", lib=_lib)
def _backward_fake(grad, q, k, v, out, lse, index, count, order, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, index, count, order, scale, backend = inputs
    ctx.save_for_backward(q, k, v, *output, index, count, order)
    ctx.scale, ctx.backend = scale, backend if backend in ("hopper", "triton", "reference") else None
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    return (*torch.ops.flashvsr.sparse_attn_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend),
            None, None, None, None, None)


torch.library.register_autograd("flashvsr::sparse_attn", _autograd, setup_context=_setup_context, lib=_lib)
