"""What the Hopper kernels share of Gluon: names that Triton's versions spell differently, and TMA descriptors."""
import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 brought the new names, 3.9 dropped the old; 3.7 renamed the barrier of a partition's threads.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
meet = getattr(gl, "thread_barrier", None) or gl.barrier

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """How TMA moves blocks of x, whose rows begin at multiples of 16 bytes.

    Triton raises AssertionError if x's last dimension is not contiguous.
    """
    # The stride of a dimension of one element can be anything and is never used, but TMA wants it aligned.
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:-1], x.stride())] + [x.stride(-1)]
    return TensorDescriptor(x, list(x.shape), strides, block, _layout(x.dtype, *block))


@functools.cache  # a descriptor takes 5 to 12 us, 30 without; a first chunk of the model has 1,800
def _layout(dtype: torch.dtype, *block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
