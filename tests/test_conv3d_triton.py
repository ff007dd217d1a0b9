"""The Triton convolution of the projector against float64: in the interpreter on CPU tensors, and on a GPU."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import conv3d_triton, reference
from tests.error_rule import check
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# B, T, H, W, C, O
SHAPES = {"whole tiles": (1, 4, 8, 16, 64, 128), "partial tiles": (2, 2, 7, 11, 40, 96),
          "one pixel": (1, 2, 1, 1, 8, 8), "odd": (1, 2, 5, 3, 7, 5), "wide": (1, 2, 2, 70, 32, 300)}


def make(device, B=1, T=4, H=4, W=5, C=24, O=40, dtype=torch.bfloat16, context=True, norm=True):
    x, tail = (torch.randn(B, t, H, W, C).to(device, dtype) for t in (T, 2))
    weight = torch.randn(O, C, 4 if context else 2, 3, 3) / (C * 20) ** 0.5
    weight = weight.to(device, dtype).to(memory_format=torch.channels_last_3d)
    bias, gamma = torch.randn(O).to(device, dtype), torch.rand(O).add(0.5).to(device, dtype)
    return x, weight, bias, tail if context else None, gamma if norm else None


def check_call(*call):
    out = conv3d_triton.forward(*call)
    assert out.dtype == call[0].dtype and out.is_contiguous()
    exact = reference.causal_conv3d(*(None if x is None else x.double() for x in call))
    # What is rounded in front of the norm, whose scale is of what was not. Where one of few channels has nearly all of
    # a pixel, that cancels in plain PyTorch, whose scale is of what was rounded.
    few = call[4] is not None and len(call[4]) < 5
    check(out, reference.causal_conv3d(*call), exact, allowed=torch.finfo(out.dtype).eps / 2 * exact.abs() * few)
    return out


@pytest.mark.parametrize("context, norm", [(True, True), (False, False)], ids=["context and norm", "neither"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_float64_reference(device, dtype, shape, context, norm):
    check_call(*make(device, *shape, dtype, context, norm))


@pytest.mark.parametrize("capability, O", [(80, 40), (80, 136), (90, 100), (90, 264), (100, 72)])
def test_configurations(device, capability, O, monkeypatch):
    chosen = conv3d_triton.config(capability, O)
    monkeypatch.setattr(conv3d_triton, "config", lambda *_: chosen)
    check_call(*make(device, T=2, O=O, C=72))


@pytest.mark.parametrize("layout", ["tail of the same clip", "padded rows", "channels before columns", "unaligned",
                                    "one picture for all"])
def test_strides(device, layout):
    x, weight, bias, tail, gamma = make(device, B=2, C=16)
    if layout == "tail of the same clip":
        tail = x[:, 2:]
    elif layout == "padded rows":
        x, tail = (F.pad(value, (8, 16), value=NAN)[..., 8:-16] for value in (x, tail))
    elif layout == "channels before columns":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        tail = tail.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "unaligned":
        x = F.pad(x, (3, 0), value=NAN)[..., 3:]
    else:
        x, tail = x[:, :1].expand(-1, 4, -1, -1, -1), x[:, :1].expand(-1, 2, -1, -1, -1)
    assert torch.equal(conv3d_triton.forward(x, weight, bias, tail, gamma),
                       check_call(x.contiguous(), weight, bias, tail.contiguous(), gamma))


def test_nothing_outside_is_read(device):
    def surrounded(x, order):
        memory = torch.full((x.numel() + 2 ** 14,), NAN, dtype=x.dtype, device=x.device)
        inside = memory[2 ** 13:2 ** 13 + x.numel()].view([x.shape[i] for i in order])
        return inside.copy_(x.permute(order)).permute([order.index(i) for i in range(x.ndim)])
    call = make(device, 1, 2, 3, 5, 40, 72)
    orders = (0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0,), (0, 1, 2, 3, 4), (0,)
    assert torch.equal(conv3d_triton.forward(*map(surrounded, call, orders)), conv3d_triton.forward(*call))


def test_nan_reaches_its_neighbours_alone(device):
    x, weight, bias, tail, _ = make(device, 1, 4, 6, 7, 16, 24)
    clean = conv3d_triton.forward(x, weight, bias, tail, None)
    x[0, 1, 3, 4, 3] = NAN
    out = conv3d_triton.forward(x, weight, bias, tail, None)
    assert out[0, :, 2:5, 3:6].isnan().all() and out.isnan().sum() == 2 * 9 * 24
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_norm_of_zeros_is_zero(device):
    x, weight, bias, tail, gamma = make(device, T=2)
    assert not conv3d_triton.forward(x, weight * 0, bias * 0, tail, gamma).any()


def test_a_clip_alone_gives_the_same_bits(device):
    """A batch, and a long clip: each step's context is what lies before it."""
    x, weight, bias, tail, gamma = make(device, B=2, C=16)
    whole = conv3d_triton.forward(x, weight, bias, tail, gamma)
    for b in range(2):
        first = conv3d_triton.forward(x[b:b + 1, :2], weight, bias, tail[b:b + 1], gamma)
        second = conv3d_triton.forward(x[b:b + 1, 2:], weight, bias, x[b:b + 1, :2], gamma)
        assert torch.equal(torch.cat([first, second], 1), whole[b:b + 1])


@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 2), T=st.sampled_from([2, 4]), H=st.integers(1, 9), W=st.integers(1, 9), C=st.integers(1, 40),
       O=st.integers(1, 140), dtype=st.sampled_from(sorted(DTYPES)), context=st.booleans(), norm=st.booleans())
def test_any_size(device, B, T, H, W, C, O, dtype, context, norm):
    check_call(*make(device, B, T, H, W, C, O, DTYPES[dtype], context, norm))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(8, 768, 2048), (2, 2048, 3072)], ids=["layer 1", "layer 2"])
def test_real_sizes(sizes):
    """Some channels against float64, as all would take minutes."""
    T, C, O = sizes
    x, weight, bias, tail, _ = make("cuda", 1, T, 48, 88, C, O)
    out, few = conv3d_triton.forward(x, weight, bias, tail, None), [0, 1, 127, 128, O // 2 + 1, O - 1]
    call = x, weight[few].contiguous(memory_format=torch.channels_last_3d), bias[few], tail, None
    exact = reference.causal_conv3d(*(None if value is None else value.double() for value in call))
    check(out[..., few], reference.causal_conv3d(*call), exact)


@pytest.mark.gpu
@with_and_without_others
def test_same_bits_500_times(others):
    call = make("cuda", 1, 4, 48, 88, 256, 512)
    assert changed(lambda: conv3d_triton.forward(*call), others) == 0


@pytest.mark.gpu
def test_far_apart():
    """Rows, steps and batches 2^31 elements and more apart."""
    near = make("cuda", 2, 2, 2, 2, 16, 16)
    for strides in ((2 ** 31, 128, 64, 16, 1), (128, 2 ** 31, 64, 16, 1), (256, 128, 2 ** 31, 16, 1),
                    (256, 128, 64, 2 ** 31, 1)):
        memory = torch.full((2 ** 31 + 2 ** 12,), NAN, dtype=torch.bfloat16, device="cuda")
        far = memory.as_strided(near[0].shape, strides).copy_(near[0])
        assert torch.equal(conv3d_triton.forward(far, *near[1:]), conv3d_triton.forward(*near))
