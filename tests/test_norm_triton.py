"""Norms and gated adds in Triton against float64: in the interpreter on CPU tensors, and on a GPU."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import gated_add_norm, layer_norm_modulate, norm, norm_triton, reference, rms_norm
from tests.error_rule import check
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {"official": (3, 1536), "compact": (2, 9, 128), "three batches": (3, 5, 384), "one row": (1, 256),
          "a vector": (512,), "no power of two": (5, 100), "odd": (33, 97), "narrow": (70, 7), "one channel": (4, 1),
          "wide": (2, 5000), "33 rows": (33, 96)}
REAL = {"official": (1, 8448, 1536), "first chunk": (1, 25344, 1536), "compact": (1, 7680, 128), "odd": (1, 8447, 1530)}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def calls(device, dtype, *shape):
    """Arguments of each op."""
    x, y = ((3 * torch.randn(shape) + 1).to(device, dtype) for _ in range(2))
    gate, scale, shift = torch.randn(3, shape[-1]).to(device, dtype)
    return {"rms_norm": (x, scale, 1e-6), "layer_norm_modulate": (x, scale, shift, 1e-6),
            "gated_add": (x, y, gate), "gated_add_norm": (x, y, gate, scale, shift, 1e-6)}


def results(module, op, call, dtype=None):
    call = [x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) else x for x in call]
    made = getattr(module, op)(*call)
    return made if isinstance(made, tuple) else (made,)


def check_all(calls):
    for op, call in calls.items():
        ours = results(norm_triton, op, call)
        for result, native, exact in zip(ours, results(reference, op, call),
                                         results(reference, op, call, torch.float64), strict=True):
            assert result.shape == call[0].shape and result.dtype == call[0].dtype and result.is_contiguous()
            check(result, native, exact, op)


@with_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64_reference(device, dtype, shape):
    check_all(calls(device, dtype, *shape))


@pytest.mark.interpret
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(0, 40), C=st.integers(1, 700))
def test_any_size(rows, C):
    for op, call in calls("cpu", torch.float16, rows, C).items():
        for result in results(norm_triton, op, call):
            assert result.shape == (rows, C) and result.isfinite().all()
    check_all(calls("cpu", torch.float32, rows, C) if rows else {})


@pytest.mark.gpu
@with_dtypes
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_real_sizes(shape, dtype):
    check_all(calls("cuda", dtype, *shape))


@with_dtypes
def test_without_a_gate(device, dtype):
    op, call = "gated_add_norm", calls(device, dtype, 5, 384)["gated_add_norm"]
    check_all({"gated_add": (*call[:2], None), op: (*call[:2], None, *call[3:])})


@with_dtypes
def test_one_pass_has_the_bits_of_two(device, dtype):
    """Rounding of the sum included: what is normed is what is stored."""
    x, y, gate, scale, shift, eps = calls(device, dtype, 11, 384)["gated_add_norm"]
    total, normed = norm_triton.gated_add_norm(x, y, gate, scale, shift, eps)
    assert torch.equal(total, norm_triton.gated_add(x, y, gate))
    assert torch.equal(normed, norm_triton.layer_norm_modulate(total, scale, shift, eps))


@with_dtypes
def test_parts_of_a_projection(device, dtype):
    """Rows at any distance, with NaN between them, and at odd addresses."""
    for op, call in calls(device, dtype, 2, 5, 96).items():
        parts = []
        for value in call:
            if isinstance(value, torch.Tensor) and value.ndim == 3:
                whole = torch.full((2, 5, 300), NAN, dtype=dtype, device=device)
                for first in (96, 101):
                    whole[..., first:first + 96] = value
                    parts.append(whole[..., first:first + 96])
                    check_all({op: [parts[-1] if other is value else other for other in call]})


def test_large_mean(device):
    """The mean's square is 10^10 times the variance."""
    x = 1e5 + torch.randn(6, 1536, device=device)
    scale, shift = torch.randn(2, 1536, device=device)
    exact = reference.layer_norm_modulate(x.double(), scale.double(), shift.double(), 1e-6)
    assert (norm_triton.layer_norm_modulate(x, scale, shift, 1e-6) - exact).abs().max() < 0.05


def test_nan_stays_in_its_row(device):
    for op, call in calls(device, torch.float32, 9, 384).items():
        wanted = results(norm_triton, op, call)
        call[0][4, 7] = NAN
        for result, before in zip(results(norm_triton, op, call), wanted):
            assert result[4].isnan().any()
            assert torch.equal(result[[0, 1, 2, 3, 5, 6, 7, 8]], before[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("C", [1, 16, 128, 1536, 2048, 5120, 16384])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_registers_hold_a_tile(C, itemsize):
    chosen = norm_triton.config(C, itemsize)
    pieces = -(-C // chosen["W"])
    assert pieces <= norm_triton.PIECES
    assert pieces * chosen["W"] * chosen["R"] / (32 * chosen["num_warps"]) <= 64  # values of a thread


@pytest.mark.gpu
def test_what_the_kernels_do_not_take():
    x, v = torch.randn(2, 5, 96, device="cuda"), torch.randn(96, device="cuda")
    for bad in x[:, :3], x.transpose(0, 1), x.repeat_interleave(2, 2)[..., ::2]:
        with pytest.raises(NotImplementedError, match="triton: rows must be contiguous and evenly spaced"):
            rms_norm(bad, v, backend="triton")
        rms_norm(bad, v, backend="reference")
    with pytest.raises(NotImplementedError, match="triton: has no torch.float64"):
        layer_norm_modulate(x.double(), v.double(), v.double(), backend="triton")
    wide = torch.zeros(2, norm.WIDEST + 1, device="cuda")
    with pytest.raises(NotImplementedError, match="triton: rows must have 1 to 16384 channels"):
        rms_norm(wide, wide[0], backend="triton")


@pytest.mark.gpu
def test_operators_with_kernels():
    for op, call in calls("cuda", torch.bfloat16, 3, 5, 384).items():
        for training in False, True:
            given = [x.detach().requires_grad_(training) if isinstance(x, torch.Tensor) else x for x in call]
            torch.library.opcheck(getattr(torch.ops.flashvsr, op).default, (*given, "triton"))


@pytest.mark.gpu
@with_and_without_others
def test_same_bits_500_times(others):
    made = calls("cuda", torch.bfloat16, 1, 8448, 1536)

    def launch():
        results = [getattr(torch.ops.flashvsr, op)(*call, "triton") for op, call in made.items()]
        return [x for result in results for x in (result if isinstance(result, tuple) else (result,))]
    assert changed(launch, others, held=4) == 0


@pytest.mark.gpu
def test_in_a_graph():
    x, y, gate, scale, shift, _ = calls("cuda", torch.bfloat16, 1, 300, 1536)["gated_add_norm"]
    check_replays(lambda: gated_add_norm(x, y, gate, scale, shift, backend="triton"), (x,))
