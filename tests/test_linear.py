"""linear_gelu against float64, its operator, and what it refuses."""
import pytest
import torch

from flashvsr_kernels import linear_gelu
from tests.error_rule import check


def make(device="cpu", dtype=torch.float32, rows=(2, 7), C=24, O=40):
    return [torch.randn(shape, device=device).mul(scale).to(dtype)
            for shape, scale in (((*rows, C), 1), ((O, C), C ** -0.5), ((O,), 1))]


def exact(x, weight, bias):
    y = x.double() @ weight.double().T + bias.double()
    return 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y ** 3)))


@pytest.mark.parametrize("rows", [(5,), (2, 7), (1, 0), ()], ids=str)
def test_formula(rows):
    call = make(dtype=torch.float64, rows=rows)
    torch.testing.assert_close(linear_gelu(*call), exact(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows, C, O", [((1, 8448), 1536, 8960), ((1, 300), 128, 512), ((1, 1), 64, 64)], ids=str)
def test_cublas(dtype, rows, C, O):
    call = make("cuda", dtype, rows, C, O)
    out = linear_gelu(*call, backend="cublas")
    assert out.shape == (*rows, O) and torch.equal(out, linear_gelu(*call))
    check(out, linear_gelu(*call, backend="reference"), exact(*call))


def test_operator():
    call = [x.requires_grad_() for x in make(dtype=torch.float64)]
    torch.library.opcheck(torch.ops.flashvsr.linear_gelu.default, (*call, None))
    assert torch.autograd.gradcheck(linear_gelu, call)
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), linear_gelu(*call))


@pytest.mark.parametrize("change, message", [
    (lambda x, w, b: (x[..., 1:], w, b), r"got \(2, 7, 23\), \(40, 24\) and \(40,\)"),
    (lambda x, w, b: (x, w, b[1:]), r"bias \(O,\), got .* \(39,\)"),
    (lambda x, w, b: (x, w.half(), b), "weight must be torch.float32 on cpu as x, got torch.float16"),
    (lambda x, w, b: (x.int(), w, b), "x must have a floating dtype, got torch.int32"),
], ids=["channels", "bias", "dtype", "integers"])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        linear_gelu(*change(*make()))


def test_reasons_are_given():
    with pytest.raises(NotImplementedError, match="cublas: (no CUDA device|runs on a CUDA device, x is on cpu)"):
        linear_gelu(*make(), backend="cublas")
