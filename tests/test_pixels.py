"""Both ends of the model: enlargement against Pillow, last convolution and colour against their formulas."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flashvsr_kernels import _native, adain_uint8, color_moments, enlarge, pixel_unshuffle, rgb_conv
from flashvsr_model.color import match_color
from tests.error_rule import check

SIZES = [(1, 1), (1, 2), (2, 3), (3, 2), (3, 1), (4, 4), (5, 7), (8, 5), (17, 33), (180, 320)]
PICTURES = {"random": lambda *size: torch.randint(0, 256, size), "black and white": lambda *size:
            255 * torch.randint(0, 2, size), "white": lambda *size: torch.full(size, 255)}


def pillow(frames):
    """Pillow's enlargement of uint8 (T, h, w, 3) on any device."""
    size = 4 * frames.shape[2], 4 * frames.shape[1]
    pictures = [Image.fromarray(frame) for frame in frames.cpu().numpy()]
    large = [np.array(picture.resize(size, Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(large)).to(frames.device)


def check_enlarged(call, frames):
    """call's bytes are Pillow's, its moments those of the bytes."""
    large, moments = call(frames)
    assert large.dtype == torch.uint8 and large.is_contiguous()
    assert torch.equal(large, pillow(frames))
    torch.testing.assert_close(moments, color_moments(large.double() / 127.5 - 1), rtol=0, atol=1e-12)


def check_unshuffled(call, frames, size, dtype, bound=None):
    """PyTorch's own order, levels rounded twice in float32 and then to dtype, on every device; with a bound by check."""
    def plain(frames, kind):
        y = frames.to(kind) / 127.5 - 1 if frames.dtype == torch.uint8 else frames.to(kind)
        y = y if bound is None else bound * torch.tanh(y / bound)
        return F.pixel_unshuffle(y.permute(0, 4, 1, 2, 3).flatten(1, 2), size).permute(0, 2, 3, 1)
    y, got = frames.cpu(), call(frames, size).cpu()
    native = plain(y, torch.float32).to(dtype)
    if bound is None:
        assert torch.equal(got, native)
    else:
        check(got, native, plain(y, torch.float64))


def check_rgb(call, x, weight, bias, box, out_dtype):
    """Errors against float64 of at most twice plain PyTorch's; moments of what came out."""
    top, left, height, width = box
    part = slice(None), slice(top, top + height), slice(left, left + width)

    def plain(*given):
        x, weight, bias = given
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)[part]
    rgb, moments = call(x, weight, bias, box, out_dtype)
    assert rgb.shape == (len(x), height, width, 3) and rgb.dtype == out_dtype and rgb.is_contiguous()
    exact = plain(x.double(), weight.double(), bias.double())
    ours, native = ((y.double() - exact).abs() for y in (rgb, plain(x, weight, bias)))
    assert ours.max() <= 2 * native.max() + 1e-5
    assert ours.square().mean().sqrt() <= 2 * native.square().mean().sqrt() + 1e-5
    torch.testing.assert_close(moments, color_moments(2 * rgb.double() - 1), rtol=2e-6, atol=2e-6)
    return rgb, moments


def check_matched(call, rgb, source, truncate):
    """As match_color has it: bytes may differ where the level lies at the edge of two, floats by rounding."""
    given = rgb, color_moments(2 * rgb.double() - 1), color_moments(source.double())
    exact = _adain(2 * rgb.double() - 1, source.double()) + 1
    theirs = match_color(2 * rgb.float() - 1, source, "adain").double() + 1  # rounds to float32 in between
    torch.testing.assert_close(theirs, exact, rtol=0, atol=1e-4)
    out = call(*given, torch.float32, truncate)
    assert out.dtype == torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.double(), (exact / 2).clamp(0, 1), rtol=0, atol=4e-6)
    out, levels = call(*given, torch.uint8, truncate), (exact * 127.5).clamp(0, 255)
    assert out.dtype == torch.uint8 and out.is_contiguous()
    edge = (levels - (levels.floor() + 0.5 if not truncate else levels.round())).abs() < 1e-3
    assert edge.double().mean() < 0.01 or truncate
    wanted = (levels.floor() if truncate else levels.round()).byte()
    assert torch.equal(out.where(~edge, 0), wanted.where(~edge, 0))
    assert ((out.int() - wanted.int()).abs() <= 1).all()


def _adain(y, source):
    mean, source_mean = (z.mean((1, 2), keepdim=True) for z in (y, source))
    std, source_std = ((z.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt() for z in (y, source))
    return (y - mean) / std * source_std + source_mean


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_enlargement_is_pillows(size, picture):
    check_enlarged(lambda frames: enlarge(frames, return_moments=True), picture(2, *size, 3).byte())


def test_enlargement_of_any_strides():
    frames = torch.randint(0, 256, (3, 9, 8, 10), dtype=torch.uint8).permute(1, 2, 3, 0)[::2, 1:, ::3]
    assert torch.equal(enlarge(frames), pillow(frames))
    assert enlarge(frames[:0]).shape == (0, 28, 16, 3)


UNSHUFFLED = {"projector": (3, 1, 48, 32, 16), "decoder": (1, 4, 16, 24, 8), "odd": (2, 3, 15, 10, 5)}


def unshuffled_frames(shape, kind):
    N, T, H, W, _ = shape
    frames = torch.randint(0, 256, (N, T, H + 3, 2 * W, 3))[:, :, 3:, ::2]
    return frames.byte() if kind == torch.uint8 else (frames / 127.5 - 1).to(kind)


@pytest.mark.parametrize("bound", [None, 3.0, 0.25], ids=["", "bound 3", "bound .25"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", UNSHUFFLED.values(), ids=UNSHUFFLED.keys())
def test_pixel_unshuffle(shape, kind, bound):
    dtype = torch.float32 if kind == torch.uint8 else kind
    check_unshuffled(lambda frames, size: pixel_unshuffle(frames, size, bound=bound, dtype=dtype),
                     unshuffled_frames(shape, kind), shape[4], dtype, bound)
    big = torch.full((shape[0], shape[2] // shape[4], shape[3] // shape[4], 3 * shape[1] * shape[4] ** 2 + 7), 9.0)

    def into(frames, size):
        return pixel_unshuffle(frames, size, out=big[..., 2:-5])
    check_unshuffled(into, unshuffled_frames(shape, kind), shape[4], torch.float32)
    assert (big[..., :2] == 9).all() and (big[..., -5:] == 9).all()


def test_pixel_unshuffle_as_an_operator():
    frames, out = torch.randint(0, 256, (1, 1, 4, 4, 3)).byte(), torch.empty(1, 2, 2, 12)
    torch.library.opcheck(torch.ops.flashvsr.pixel_unshuffle_into.default, (frames, 2, 3.0, out, None))


@pytest.mark.parametrize("change, message", [
    (dict(size=3), r"H and W multiples of 3, got \(1, 2, 4, 8, 3\)"),
    (dict(dtype=torch.int32), "dtype must be floating, got torch.int32"),
    (dict(bound=0.0), "bound must be positive or None, got 0.0"),
    (dict(out=torch.empty(1, 2, 4, 23)), r"out must be \(1, 2, 4, 24\) .* got \(1, 2, 4, 23\)"),
    (dict(out=torch.empty(1, 2, 4, 48)[..., ::2]), "contiguous channels"),
    (dict(frames=torch.zeros(1, 2, 4, 8, 3).int()), "uint8 or floating, got torch.int32"),
    (dict(frames=torch.zeros(1, 2, 4, 8, 3, requires_grad=True)), "must not require gradients"),
], ids=["size", "dtype", "bound", "shape of out", "strides of out", "integers", "gradients"])
def test_bad_unshuffling_is_named(change, message):
    call = dict(frames=torch.zeros(1, 2, 4, 8, 3).byte(), size=2, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        pixel_unshuffle(call.pop("frames"), call.pop("size"), **call)


BOXES = {"whole": (0, 0, 9, 11), "inside": (2, 3, 5, 4), "corner": (8, 10, 1, 1), "row": (0, 0, 1, 11)}


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["x's dtype", "fp32 out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_rgb_conv(box, dtype, out_dtype):
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((2, 9, 11, 5), (3, 5, 3, 3), (3,)))
    before = x.clone()
    check_rgb(lambda x, weight, bias, box, kind: rgb_conv(x, weight, bias, box=box, out_dtype=out_dtype),
              x, weight, bias, box, out_dtype or dtype)
    assert torch.equal(x, before)


@pytest.mark.skipif(_native.available() is not None, reason=str(_native.available()))
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_rgb_conv_in_cpp(box):
    x, weight, bias = torch.randn(2, 9, 11, 16), torch.randn(3, 16, 3, 3) / 12, torch.randn(3)
    weight = weight.contiguous(memory_format=torch.channels_last)
    check_rgb(lambda x, weight, bias, box, kind: rgb_conv(x, weight, bias, box=box, backend="cpu"), x, weight, bias,
              box, torch.float32)
    assert all(map(torch.equal, rgb_conv(x, weight, bias), rgb_conv(x, weight, bias, backend="cpu")))


def test_moments_are_left_out():
    call = torch.randn(2, 9, 11, 5), torch.randn(3, 5, 3, 3), torch.randn(3)
    rgb, _ = rgb_conv(*call)
    assert torch.equal(rgb_conv(*call, return_moments=False), rgb)


def test_no_box_is_the_whole_picture():
    call = torch.randn(2, 9, 11, 5), torch.randn(3, 5, 3, 3), torch.randn(3)
    for ours, wanted in zip(rgb_conv(*call), rgb_conv(*call, box=(0, 0, 9, 11))):
        assert torch.equal(ours, wanted)


def test_gradients_of_rgb_conv():
    sizes = (2, 4, 5, 3), (3, 3, 3, 3), (3,)
    call = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *call: rgb_conv(*call, box=(1, 0, 2, 4))[0], call)
    moments = rgb_conv(*call)[1]
    assert not moments.requires_grad


RANGES = {"usual": (0.2, 0.5), "beyond black and white": (0.6, 0.5), "nearly flat": (1e-3, 0.3),
          "flat": (0, 0.3)}


@pytest.mark.parametrize("truncate", [False, True], ids=["rounded", "truncated"])
@pytest.mark.parametrize("spread, middle", RANGES.values(), ids=RANGES.keys())
def test_adain_is_match_color(spread, middle, truncate):
    rgb, source = torch.randn(3, 40, 48, 3) * spread + middle, torch.rand(3, 40, 48, 3) * 0.8 - 0.5
    check_matched(lambda *call: adain_uint8(*call[:3], out_dtype=call[3], truncate=call[4]), rgb, source,
                  truncate)


def test_adain_of_a_part_of_a_picture():
    whole, source = torch.rand(2, 2, 30, 40, 3)
    call = color_moments(2 * whole - 1), color_moments(source)
    assert torch.equal(adain_uint8(whole[:, 3:20, 5:38], *call), adain_uint8(whole, *call)[:, 3:20, 5:38])


def test_levels_are_rounded_or_truncated():
    levels = torch.tensor([-9, 0.49, 0.51, 1.49, 254.49, 254.51, 300])
    rgb = (levels / 255).view(1, -1, 1, 1).expand(-1, -1, -1, 3)
    same = torch.tensor([0.1, 1]).double()[None, :, None].expand(1, 2, 3)
    assert adain_uint8(rgb, same, same)[0, :, 0, 0].tolist() == [0, 0, 1, 1, 254, 255, 255]
    assert adain_uint8(rgb, same, same, truncate=True)[0, :, 0, 0].tolist() == [0, 0, 0, 1, 254, 254, 255]


def test_operators():
    ops, moments = torch.ops.flashvsr, color_moments(torch.rand(2, 5, 7, 3))
    frames = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    torch.library.opcheck(ops.enlarge.default, (frames, None))
    call = [torch.randn(*size, requires_grad=True) for size in ((2, 9, 11, 5), (3, 5, 3, 3), (3,))]
    torch.library.opcheck(ops.rgb_conv.default, (*call, [1, 2, 5, 6], torch.float32, True, None))
    rgb = torch.rand(2, 5, 7, 3)[:, 1:, 1:]
    for out_dtype in (torch.uint8, torch.float32):
        torch.library.opcheck(ops.adain_uint8.default, (rgb, moments, moments, out_dtype, False, None))


def test_compiles_as_one_graph():
    def ends(frames, weight, bias):
        large, source = enlarge(frames, return_moments=True)
        rgb, moments = rgb_conv(large.float() / 255, weight, bias, box=(1, 2, 6, 8))
        return adain_uint8(rgb, moments, source)
    call = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8), torch.randn(3, 3, 3, 3), torch.randn(3)
    assert torch.equal(torch.compile(ends, backend="eager", fullgraph=True)(*call), ends(*call))


X, W, B, M = torch.zeros(2, 4, 5, 8), torch.zeros(3, 8, 3, 3), torch.zeros(3), torch.zeros(2, 2, 3).double()


@pytest.mark.parametrize("call, message", [
    (lambda: enlarge(X.byte()), r"frames must be uint8 \(T, h, w, 3\), got torch.uint8 \(2, 4, 5, 8\)"),
    (lambda: enlarge(X[..., :3]), "frames must be uint8 .*, got torch.float32"),
    (lambda: enlarge(X[:, :0, :, :3].byte()), r"got torch.uint8 \(2, 0, 5, 3\)"),
    (lambda: rgb_conv(X, W[:2], B), r"weight \(3, C, 3, 3\) and bias \(3,\), got .*\(2, 8, 3, 3\)"),
    (lambda: rgb_conv(X, W.half(), B), "one floating dtype, got torch.float32, torch.float16 and"),
    (lambda: rgb_conv(X, W.to("meta"), B), "on one device, got cpu, meta and cpu"),
    (lambda: rgb_conv(X, W, B, box=(1, 0, 4, 5)), r"box must be .* inside 4x5, got \(1, 0, 4, 5\)"),
    (lambda: rgb_conv(X, W, B, box=(0, 0, 4, 0)), r"got \(0, 0, 4, 0\)"),
    (lambda: rgb_conv(X, W, B, out_dtype=torch.uint8), "out_dtype must be floating or None"),
    (lambda: color_moments(X), r"frames must be floating \(N, H, W, 3\), got torch.float32 \(2, 4, 5, 8\)"),
    (lambda: adain_uint8(X, M, M), r"rgb must be floating \(N, H, W, 3\), got torch.float32 \(2, 4, 5, 8\)"),
    (lambda: adain_uint8(X[..., :3], M.float(), M), r"^moments must be float64 \(2, 2, 3\) on cpu, got"),
    (lambda: adain_uint8(X[..., :3], M, M[:1]), r"source_moments must be .*, got torch.float64 \(1, 2, 3\)"),
    (lambda: adain_uint8(X[..., :3], M, M, out_dtype=torch.half), "out_dtype must be torch.uint8 or"),
], ids=lambda x: "" if isinstance(x, str) else None)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: enlarge(X[..., :3].byte(), backend="triton"),
                                  lambda: rgb_conv(X, W, B, backend="triton"),
                                  lambda: adain_uint8(X[..., :3], M, M, backend="triton")],
                         ids=["enlarge", "rgb_conv", "adain_uint8"])
def test_triton_has_a_reason(call):
    with pytest.raises(NotImplementedError, match="'triton' cannot run this call\n  triton: .+\n(  cpu: .+\n)?  reference: "):
        call()
