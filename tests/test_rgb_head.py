"""The decoder's end by the rules of the three ops that it is made of."""
from itertools import product

import pytest
import torch

from flashvsr_kernels import reference, rgb_head
from flashvsr_kernels.rgb_head import bands

SIZES = {"odd": (1, 7, 5, 6, 8, 5), "two": (2, 3, 6, 4, 5, 8), "one pixel": (1, 1, 1, 8, 8, 8)}


def make(device, N, H, W, C, D, E, dtype=torch.float32):
    """x, folded, hidden_weight, weight, bias; the result is about 0.5 +- 0.3."""
    shapes = ((N, H, W, C), 1), ((1, 2, 2, D, 2, 2, C), (2 * C) ** -.5), ((E, D, 3, 3), (5 * D) ** -.5), ((3, E, 3, 3), .1 * E ** -.5)
    call = [torch.randn(shape).mul(scale).to(device, dtype) for shape, scale in shapes]
    call[2:] = (w.contiguous(memory_format=torch.channels_last) for w in call[2:])
    return *call, torch.randn(3).mul(.1).add(.5).to(device, dtype)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_the_three_ops(size, dtype):
    call, (H, W) = make("cpu", *size, dtype), (2 * size[1], 2 * size[2])
    out_dtype = torch.promote_types(dtype, torch.float32)
    for box in (None, (0, 0, H, W), (H // 2, W // 3, H - H // 2, 1), (H - 1, W - 1, 1, 1), (0, 0, 1, W)):
        rgb, moments = rgb_head(*call, box=box, out_dtype=out_dtype)
        wanted = reference.rgb_head(*call, box or (0, 0, H, W), out_dtype)[0]
        close = dict(rtol=0, atol={torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])
        torch.testing.assert_close(rgb, wanted, **close)
        assert rgb.is_contiguous()
        torch.testing.assert_close(moments, reference.color_moments(2 * rgb.double() - 1), rtol=1e-12, atol=1e-12)
        assert torch.equal(rgb_head(*call, box=box, out_dtype=out_dtype, return_moments=False), rgb)
    assert rgb_head(*call)[0].dtype == dtype


@pytest.mark.parametrize("halo", [1, 2])
def test_thirds_cover_the_rows_and_what_they_need(halo):
    for H, N in product(range(1, 9), (1, 2)):
        for first, end in ((a, b) for a in range(2 * H) for b in range(a + 1, 2 * H + 1)):
            rows = []
            for start, stop, source, part, at in bands(N, H, first, end, halo):
                made = range(2 * source.start, 2 * source.stop)[part]  # of the picture, by enlarging source
                assert made.start == max(0, start - halo) * (N == 1) and start == made.start + at
                assert made.stop >= min(2 * H, stop + halo)
                assert source.start == 0 or 2 * source.start < made.start  # its border is not the picture's
                assert source.stop == H or 2 * source.stop > made.stop
                assert (source.start, source.stop) == (0, H) or N == 1
                rows += range(start, stop)
            assert rows == list(range(first, end))


def test_gradients():
    call = [x.requires_grad_() for x in make("cpu", 1, 2, 3, 2, 3, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *call: rgb_head(*call, box=(1, 0, 2, 5))[0], call)
    with torch.no_grad():
        wanted = rgb_head(*call)[0]
    for backend in None, "apart", "reference":
        torch.testing.assert_close(rgb_head(*call, backend=backend)[0], wanted, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="must be apart, reference or None where gradients are recorded, got 'hopper'"):
        rgb_head(*call, backend="hopper")


def test_operator_and_one_graph():
    call = make("cpu", 2, 3, 4, 4, 5, 6)
    torch.library.opcheck(torch.ops.flashvsr.rgb_head.default, (*call, [1, 2, 4, 5], torch.float32, True, None))

    def doubled(*call):
        return rgb_head(*call, return_moments=False) * 2
    assert torch.equal(torch.compile(doubled, backend="eager", fullgraph=True)(*call), doubled(*call))


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 3, 4)), r"x must be \(N, H, W, C\) and folded .*, got \(2, 3, 4\) and"),
    (dict(folded=torch.zeros(2, 2, 2, 5, 2, 2, 4)), r"folded \(1, 2, 2, D, 2, 2, C\), got .*\(2, 2, 2, 5, 2, 2, 4\)"),
    (dict(hidden_weight=torch.zeros(6, 4, 3, 3)), r"hidden_weight must be \(E, 5, 3, 3\), .* got \(6, 4, 3, 3\)"),
    (dict(weight=torch.zeros(4, 6, 3, 3)), r"weight \(3, E, 3, 3\) and bias \(3,\), got .*\(4, 6, 3, 3\)"),
    (dict(bias=torch.zeros(3).double()), "bias and x must have one floating dtype and one device, got torch.float64 on"),
    (dict(folded=torch.zeros(1, 2, 2, 5, 2, 2, 4, device="meta")), "folded and x must .*, got torch.float32 on meta"),
    (dict(box=(0, 0, 7, 8)), r"box must be .* inside 6x8, got \(0, 0, 7, 8\)"),
    (dict(out_dtype=torch.uint8), "out_dtype must be floating or None"),
], ids=lambda x: "" if isinstance(x, str) else None)
def test_bad_arguments_are_named(change, message):
    names = "x", "folded", "hidden_weight", "weight", "bias"
    with pytest.raises(ValueError, match=message):
        rgb_head(**dict(zip(names, make("cpu", 2, 3, 4, 4, 5, 6))) | change)


def test_hopper_has_a_reason():
    with pytest.raises(NotImplementedError, match="'hopper' cannot run this call\n  hopper: .+\n  apart: "):
        rgb_head(*make("cpu", 2, 3, 4, 4, 5, 6), backend="hopper")
