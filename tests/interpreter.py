"""Makes Triton's interpreter (TRITON_INTERPRET=1) fit for tests: repair() before the first kernel.

As it is, it calculates with the bits of bf16, taken for integers, and Triton 3.6's cannot count a loop whose
bound is a tensor with numpy >= 2.4. After repair() casts between bf16 and float32, dots of bf16 and
arithmetic on it are right; reductions and functions of bf16 are still wrong: kernels take those in float32.
"""
from functools import cache

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from flashvsr_kernels import _triton


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """The bf16 bits of float32 values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


@cache
def repair() -> None:
    """Repairs the interpreter of this process; once is enough."""
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    dot, binary = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrowed(data)
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, *rest):
        return dot(self, _wide(a), _wide(b), *rest)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(_wide(lhs).data, _wide(rhs).data)
        return TensorHandle(result if result.dtype == bool else narrowed(result), tl.bfloat16)

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_tensor, convert_float
    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = create_dot, binary_op


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.interpret),
                                        pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a Triton kernel runs: interpreted, on CPU tensors, or on a GPU."""
    if request.param == "cpu":
        repair()
    elif _triton.available() is not None:
        pytest.skip(_triton.available())
    return request.param
