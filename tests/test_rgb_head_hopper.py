"""The decoder's end for sm_90 against float64: planes on a GPU and on threads, their sum interpreted, both on a GPU."""
import re
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

from flashvsr_kernels import backends, conv3x3_hopper, reference, rgb_head, rgb_head_hopper
from tests import interpreter
from tests.error_rule import check
from tests.other_work import changed, with_and_without_others
from tests.test_conv3x3_hopper import device, needs_hopper  # noqa: F401: a fixture
from tests.test_conv3x3_triton import NAN, among
from tests.test_rgb_head import make

REFUSAL = backends()["rgb_head"]["hopper"]
BF16, FP16 = torch.bfloat16, torch.float16
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
# N, H, W, C, E, first row
SHAPES = {"whole tiles": (1, 8, 128, 64, 64, 0), "odd": (2, 9, 72, 128, 128, 0), "from row 1": (1, 7, 68, 64, 64, 1),
          "from row 5": (1, 11, 4, 40, 128, 5), "one row": (1, 1, 132, 64, 64, 0), "narrow": (3, 5, 4, 128, 64, 1)}


def hidden_and_head(device, N, H, W, C, E, dtype=BF16):
    x, weight, head = (torch.randn(shape).mul(scale).to(device, dtype).contiguous(memory_format=form)
                       for shape, scale, form in (((N, H, W, C), 1, torch.contiguous_format),
                                                  ((E, C, 3, 3), (9 * C) ** -.5, torch.channels_last),
                                                  ((3, E, 3, 3), E ** -.5, torch.channels_last)))
    return x, weight, head


def reference_planes(x, weight, head, first):
    hidden = reference.conv3x3(x, weight, None, None, None, True)[:, first:]
    return torch.einsum("nhwc,ocyx->oyxnhw", hidden, head).flatten(0, 2)


def planes_of(x, weight, head, first):
    """Into the middle of a larger tensor, which must stay as it is around them."""
    N, H, W, _ = x.shape
    around = torch.full((27, N, H + 3, W), NAN, device=x.device)
    planes = around[:, :, 2:H + 2 - first]
    conv3x3_hopper.tap_planes(x, weight, head, planes, first)
    assert around[:, :, :2].isnan().all() and around[:, :, H + 2 - first:].isnan().all()
    return planes


@compiled
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_planes(device, shape):
    *sizes, first = shape
    call = *hidden_and_head(device, *sizes), first
    wide = *(x.double() for x in call[:3]), first
    check(planes_of(*call), reference_planes(*call), reference_planes(*wide))


@compiled
def test_planes_in_fp16_and_nan(device):
    x, weight, head = hidden_and_head(device, 1, 9, 68, 64, 128, FP16)
    wanted = planes_of(x, weight, head, 2)
    check(wanted, reference_planes(x, weight, head, 2),
          reference_planes(x.double(), weight.double(), head.double(), 2))
    assert torch.equal(planes_of(*(among(NAN, y) for y in (x, weight, head)), 2), wanted)
    x[0, 6, 66, 5] = NAN
    near = torch.zeros(7, 68, dtype=torch.bool, device=device)
    near[3:6, 65:68] = True
    assert torch.equal(planes_of(x, weight, head, 2).isnan(), near.expand(27, 1, 7, 68))


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)])
def adds(request):
    """Where _add_taps runs."""
    if request.param == "cpu":
        interpreter.repair()
    elif REFUSAL is not None:
        pytest.skip(REFUSAL)
    return request.param


@pytest.mark.parametrize("N, box", [(1, (0, 0, 10, 12)), (2, (3, 2, 5, 9)), (1, (9, 11, 1, 1)), (2, (0, 5, 1, 7))],
                         ids=str)
def test_taps_are_added(adds, monkeypatch, N, box):
    """Planes of whole numbers: sums are exact, so that results and moments must be equal."""
    monkeypatch.setattr(rgb_head_hopper, "PIXELS", 8)
    x = torch.zeros(N, 5, 6, 64, device=adds)
    rows = []

    def planes_instead(large, hidden, weight, planes, first):
        planes.copy_(torch.randint(-99, 99, planes.shape))
        rows.append(planes)
    monkeypatch.setattr(conv3x3_hopper, "tap_planes", planes_instead)
    monkeypatch.setattr(conv3x3_hopper, "upsample_conv", lambda x, folded, relu: x.repeat_interleave(2, 1))
    bias = torch.tensor([1, 2, 3.], device=adds)
    rgb, moments = rgb_head_hopper.rgb_head(x, None, None, None, bias, box, torch.float32, True)
    top, left, height, width = box
    first = max(0, top - 1)
    planes = torch.zeros(27, N, 12, 14, device=adds)  # the whole picture and a border
    planes[:, :, 1 + first:1 + first + sum(part.shape[2] for part in rows), 1:13] = torch.cat(rows, 2)
    taps = [[planes[9 * i + 3 * y + x, :, y:y + 10, x:x + 12] for y in range(3) for x in range(3)] for i in range(3)]
    whole = torch.stack([sum(taps[i]) + bias[i] for i in range(3)], -1)
    wanted = whole[:, top:top + height, left:left + width]
    assert torch.equal(rgb, wanted)
    torch.testing.assert_close(moments, reference.color_moments(2 * wanted - 1), rtol=1e-6, atol=0)
    none = rgb_head_hopper.rgb_head(x, None, None, None, bias, box, torch.float32, False)[1]
    assert none.shape == (0, 2, 3)


@needs_hopper
@pytest.mark.parametrize("size, box", [((1, 384, 704, 128, 128, 128), None), ((1, 90, 160, 128, 128, 64), (5, 7, 150, 301)),
                                       ((2, 33, 34, 64, 64, 128), (0, 0, 65, 68))], ids=["real", "part", "two"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_whole_op(size, box, dtype):
    call = make("cuda", *size, dtype)
    box = box or (0, 0, 2 * size[1], 2 * size[2])
    rgb, moments = rgb_head(*call, box=box, out_dtype=torch.float32, backend="hopper")
    native, exact = (reference.rgb_head(*(y.to(kind) for y in call), box, torch.promote_types(kind, torch.float32))[0]
                     for kind in (dtype, torch.float64))
    check(rgb, native, exact)
    torch.testing.assert_close(moments, reference.color_moments(2 * rgb.double() - 1), rtol=1e-5, atol=1e-6)


@needs_hopper
@with_and_without_others
@pytest.mark.parametrize("hidden", [128, 64])
def test_same_bits_500_times(hidden, others):
    call = make("cuda", 1, 384, 704, 128, 128, hidden, BF16)
    launch = partial(rgb_head, *call, out_dtype=torch.float32, backend="hopper")
    assert changed(launch, others) == 0


def test_refusals():
    call = make("cpu", 1, 4, 6, 64, 64, 64, BF16)
    assert rgb_head_hopper.supports(*call[:4]) is None
    for size, reason in (((1, 4, 5, 64, 64, 64), "x must have an even width, has 5"),
                         ((1, 4, 6, 64, 64, 256), "takes 64 or 128 channels, hidden_weight is .256, 64"),
                         ((1, 4, 6, 64, 192, 64), "takes 64 or 128 channels, hidden_weight is .64, 192"),
                         ((1, 4, 6, 64, 64, 48), "takes 64 or 128 channels, hidden_weight is .48, 64"),
                         ((1, 4, 6, 64, 40, 64), "the output must have a multiple of 64 channels, has 40"),
                         ((1, 4, 6, 12, 64, 64), "x must have a multiple of 8 channels, .*, has 12")):
        assert re.match(reason, rgb_head_hopper.supports(*make("cpu", *size, BF16)[:4]))
