"""TMA descriptors of the Hopper kernels."""
import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

from triton.experimental.gluon import language as gl

from flashvsr_kernels._gluon import descriptor


@pytest.mark.parametrize("dtype, element", [(torch.bfloat16, gl.bfloat16), (torch.float16, gl.float16),
                                            (torch.float32, gl.float32)], ids=str)
def test_a_descriptor_of_a_view(dtype, element):
    x = torch.zeros(3, 40, 5, 128, dtype=dtype)[:, 8:, :, 64:]
    made = descriptor(x, [1, 16, 1, 64])
    assert made.base is x and made.shape == [3, 32, 5, 64] and made.strides == list(x.stride())
    assert made.layout == gl.NVMMASharedLayout.get_default_for([1, 16, 1, 64], element)
    assert made.layout.swizzle_byte_width == 128 and made.block_shape == [1, 16, 1, 64]


def test_dimensions_of_one_element_have_aligned_strides():
    x = torch.zeros(2 * 64, dtype=torch.bfloat16).as_strided((1, 2, 1, 64), (3, 64, 7, 1))
    assert descriptor(x, [1, 2, 1, 64]).strides == [8, 64, 8, 1]


def test_a_last_dimension_with_gaps_is_refused():
    with pytest.raises(AssertionError, match="Last dimension must be contiguous"):
        descriptor(torch.zeros(4, 128, dtype=torch.bfloat16)[:, ::2], [4, 64])
