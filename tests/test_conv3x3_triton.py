"""The Triton convolutions against float64: in the interpreter on CPU tensors, and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import conv3x3_triton, reference
from tests.error_rule import check
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"whole tiles": (2, 16, 16, 64, 64), "odd": (2, 5, 7, 48, 20), "one pixel": (3, 1, 1, 16, 16),
          "one row": (1, 1, 40, 16, 8), "one column": (2, 41, 1, 16, 8), "336 channels": (1, 6, 5, 336, 16),
          "to rgb": (1, 9, 13, 64, 3), "150 channels out": (1, 7, 9, 32, 150),
          "112 channels": (1, 8, 11, 112, 112), "5 channels": (1, 8, 9, 5, 7),
          "many pixels": (2, 19, 17, 16, 16)}
REAL = {"A": (1, 768, 1408, 128, 128), "B": (4, 384, 704, 128, 128), "C": (2, 192, 352, 256, 256),
        "D": (2, 96, 176, 512, 512), "first": (2, 96, 176, 784, 512), "compact": (2, 360, 640, 16, 16)}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def random(device, dtype, *shape, scale=1.0):
    return (torch.randn(shape) * scale).to(device, dtype)


def make(device, N, H, W, C, O, dtype=torch.bfloat16, past=True, tail=True):
    """x, weight, bias, past, residual, relu"""
    channels = 2 * C if past else C
    weight = random(device, dtype, O, channels, 3, 3, scale=(9 * channels) ** -0.5)
    return (random(device, dtype, N, H, W, C), weight.contiguous(memory_format=torch.channels_last),
            random(device, dtype, O) if tail else None, random(device, dtype, N, H, W, C) if past else None,
            random(device, dtype, N, H, W, O) if tail else None, tail)


def make_folded(device, N, H, W, C, O, dtype=torch.bfloat16, T=2):
    """x, folded, relu"""
    folded = random(device, dtype, T, 2, 2, O, 2, 2, C, scale=(4 * C) ** -0.5)
    return random(device, dtype, N, H, W, C), folded, T == 2


def wide(call):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in call]


def check_conv3x3(*call):
    out = conv3x3_triton.conv3x3(*call)
    assert out.shape == (*call[0].shape[:3], call[1].shape[0])
    assert out.dtype == call[0].dtype and out.is_contiguous()
    check(out, reference.conv3x3(*call), reference.conv3x3(*wide(call)))


def check_upsample_conv(*call):
    x, *_ = call
    out = conv3x3_triton.upsample_conv(*call)
    assert out.dtype == x.dtype and out.is_contiguous()
    exact = reference.upsample_conv(*wide(call))
    assert out.shape == exact.shape
    check(out, reference.upsample_conv(*call), exact)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@with_dtypes
def test_conv3x3(device, dtype, shape):
    check_conv3x3(*make(device, *shape, dtype))


@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("bias, residual, relu",
                         [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)],
                         ids=["bare", "bias", "residual", "relu", "bias+relu", "bias+residual+relu"])
def test_what_surrounds_it(device, bias, residual, relu, past):
    x, weight, b, before, r, _ = make(device, 2, 5, 6, 24, 16, past=past)
    check_conv3x3(x, weight, b if bias else None, before, r if residual else None, bool(relu))


@pytest.mark.parametrize("T", [1, 2], ids=["T=1", "T=2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@with_dtypes
def test_upsample_conv(device, dtype, shape, T):
    check_upsample_conv(*make_folded(device, *shape, dtype, T))


@pytest.mark.parametrize("C, O", [(128, 128), (112, 64), (40, 150), (16, 3), (6, 20)])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_configurations(device, capability, C, O, monkeypatch):
    chosen = conv3x3_triton.config(capability, C, O)
    monkeypatch.setattr(conv3x3_triton, "config", lambda *_: chosen)
    check_conv3x3(*make(device, 1, 13, 11, C, O))
    check_upsample_conv(*make_folded(device, 1, 4, 5, C, O))


@settings(max_examples=8, deadline=None)
@given(N=st.integers(1, 3), H=st.integers(1, 20), W=st.integers(1, 20), C=st.integers(1, 70),
       O=st.integers(1, 140), T=st.integers(1, 3), past=st.booleans(), tail=st.booleans(),
       dtype=st.sampled_from(sorted(DTYPES)))
def test_any_shape(device, N, H, W, C, O, T, past, tail, dtype):
    check_conv3x3(*make(device, N, H, W, C, O, DTYPES[dtype], past, tail))
    check_upsample_conv(*make_folded(device, N, H, W, C, O, DTYPES[dtype], T))


def among(value, x, apart=4096):
    """x in the middle of memory that is value; apart elements on each side."""
    strides, size = x.stride(), x.numel()
    memory = torch.full((size + 2 * apart,), value, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides, apart).copy_(x)


@pytest.mark.parametrize("shape", [(2, 5, 7, 48, 20), (1, 16, 16, 64, 64), (2, 3, 3, 5, 3)], ids=str)
def test_what_must_not_be_read_is_nan(device, shape):
    for make_call, launch in ((make, conv3x3_triton.conv3x3), (make_folded, conv3x3_triton.upsample_conv)):
        call = make_call(device, *shape)
        poisoned = [among(NAN, x) if isinstance(x, torch.Tensor) else x for x in call]
        wanted = launch(*call)
        assert wanted.isfinite().all() and torch.equal(launch(*poisoned), wanted)


def test_nan_that_is_read_shows(device):
    """With relu too, and only in the neighbourhood of the pixel."""
    x, weight, bias, _, residual, relu = make(device, 2, 9, 9, 16, 16, past=False)
    x[1, 4, 0, 3] = NAN
    near = torch.zeros(2, 9, 9, dtype=torch.bool, device=device)
    near[1, 3:6, 0:2] = True
    out = conv3x3_triton.conv3x3(x, weight, bias, None, residual, relu)
    assert torch.equal(out.isnan(), near[..., None].expand(2, 9, 9, 16))
    _, folded, _ = make_folded(device, 2, 9, 9, 16, 16)
    large = torch.zeros(4, 18, 18, dtype=torch.bool, device=device)
    large[2:, 7:11, 0:3] = True
    enlarged = conv3x3_triton.upsample_conv(x, folded, False)
    assert torch.equal(enlarged.isnan(), large[..., None].expand(4, 18, 18, 16))


def test_a_picture_alone_gives_the_same_bits(device):
    x, weight, bias, past, residual, relu = make(device, 3, 5, 7, 48, 20)
    folded = make_folded(device, 1, 1, 1, 48, 20)[1]
    together = conv3x3_triton.conv3x3(x, weight, bias, past, residual, relu)
    enlarged = conv3x3_triton.upsample_conv(x, folded, False)
    for n in range(3):
        one = slice(n, n + 1)
        alone = conv3x3_triton.conv3x3(x[one], weight, bias, past[one], residual[one], relu)
        assert torch.equal(alone, together[one])
        assert torch.equal(conv3x3_triton.upsample_conv(x[one], folded, False), enlarged[2 * n:2 * n + 2])


def test_past_may_be_the_same_frames_one_step_earlier(device):
    frames, weight, *_ = make(device, 4, 6, 7, 32, 32)
    check_conv3x3(frames[1:], weight, None, frames[:-1], frames[1:], True)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_unaligned_memory(device, shift):
    call = make(device, 1, 6, 7, 32, 24)
    moved = [among(NAN, x, apart=4096 + shift) if isinstance(x, torch.Tensor) else x for x in call]
    assert torch.equal(conv3x3_triton.conv3x3(*moved), conv3x3_triton.conv3x3(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
@with_dtypes
def test_real_shapes(shape, dtype):
    check_conv3x3(*make("cuda", *shape, dtype, past=shape[3] == shape[4]))
    if shape[3] != 784:
        check_upsample_conv(*make_folded("cuda", shape[0], shape[1] // 2, shape[2] // 2, *shape[3:], dtype))


@pytest.mark.gpu
@with_and_without_others
@pytest.mark.parametrize("shape", [REAL["A"], REAL["D"], REAL["compact"]], ids=["A", "D", "compact"])
def test_same_bits_500_times(shape, others):
    N, H, W, C, O = shape
    call, folded = make("cuda", *shape), make_folded("cuda", N, H // 2, W // 2, C, O)
    launches = (lambda: conv3x3_triton.conv3x3(*call)), (lambda: conv3x3_triton.upsample_conv(*folded))
    assert [changed(launch, others) for launch in launches] == [0, 0]


@pytest.mark.gpu
def test_graph():
    call, folded = make("cuda", 2, 20, 30, 64, 64), make_folded("cuda", 2, 20, 30, 64, 64)
    check_replays(lambda: (conv3x3_triton.conv3x3(*call), conv3x3_triton.upsample_conv(*folded)),
                  (*call[:5], *folded[:2]))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows = 2 ** 31 // (4096 * 64) + 3
    x, weight, *_ = make("cuda", 1, rows, 4096, 64, 64, past=False)
    out = conv3x3_triton.conv3x3(x, weight, None, None, x, False)
    last = conv3x3_triton.conv3x3(x[:, -4:].contiguous(), weight, None, None, x[:, -4:].contiguous(), False)
    assert torch.equal(out[:, -3:], last[:, -3:])
    del out
    _, folded, _ = make_folded("cuda", 1, 1, 1, 64, 64, T=1)
    part = x[:, :rows // 4 + 1].contiguous()
    out, last = (conv3x3_triton.upsample_conv(y, folded, False) for y in (part, part[:, -4:].contiguous()))
    assert out.numel() > 2 ** 31 and torch.equal(out[:, -6:], last[:, -6:])
