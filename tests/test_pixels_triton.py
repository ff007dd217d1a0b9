"""The pixel kernels, interpreted on CPU tensors and on a GPU, by the rules of test_pixels."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import adain_uint8, enlarge, pixels_triton, reference, rgb_conv
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others
from tests.test_pixels import (PICTURES, RANGES, SIZES, UNSHUFFLED, check_enlarged, check_matched, check_rgb,
                               check_unshuffled, unshuffled_frames)

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture
def short(monkeypatch):
    """Few rows a program and narrow tiles: small pictures have many of them."""
    monkeypatch.setattr(pixels_triton, "ROWS", [4])
    monkeypatch.setattr(pixels_triton, "ENLARGED", 64)
    monkeypatch.setattr(pixels_triton, "MATCHED", 64)


def make(device, N=1, H=7, W=9, C=16, dtype=torch.bfloat16):
    """x, weight and bias of rgb_conv; the result is about 0.5 +- 0.3."""
    sizes = (N, H, W, C), (3, C, 3, 3), (3,)
    x, weight, bias = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    return x, weight * (0.1 / C ** 0.5), bias * 0.1 + 0.5


def assert_same_bits(results, expected):
    for got, wanted in zip(results, expected):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("size", SIZES[:-2], ids=lambda size: "x".join(map(str, size)))
def test_enlargement_is_pillows(device, size, picture):
    frames = picture(1, *size, 3).byte().to(device)
    result = pixels_triton.enlarge(frames)
    check_enlarged(lambda frames: result, frames)
    (large, moments), (same, close) = result, reference.enlarge(frames)
    assert torch.equal(large, same)
    torch.testing.assert_close(moments, close, rtol=1e-15, atol=0)  # PyTorch multiplies by a reciprocal on a GPU


@pytest.mark.parametrize("bound", [None, 3.0, 0.25], ids=["", "bound 3", "bound .25"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", UNSHUFFLED.values(), ids=UNSHUFFLED.keys())
def test_unshuffling(device, shape, kind, bound):
    frames = unshuffled_frames(shape, kind).to(device)

    def call(frames, size):
        N, T, H, W, _ = frames.shape
        whole = torch.empty(N, H // size, W // size, 3 * T * size ** 2 + 5, device=device, dtype=torch.float16)
        pixels_triton.pixel_unshuffle(frames, size, bound, whole[..., 2:-3])
        assert whole[..., :2].isnan().all() and whole[..., -3:].isnan().all()
        return whole[..., 2:-3]
    check_unshuffled(call, frames, shape[4], torch.float16, bound)


def test_many_tiles_of_an_enlargement(device, short):
    check_enlarged(pixels_triton.enlarge, torch.randint(0, 256, (2, 4, 11, 3), dtype=torch.uint8).to(device))


def test_enlargement_of_any_strides(device):
    frames = torch.randint(0, 256, (3, 9, 8, 10), dtype=torch.uint8).to(device)
    frames = frames.permute(1, 2, 3, 0)[::4, 1:, ::3]
    check_enlarged(pixels_triton.enlarge, frames)
    assert pixels_triton.enlarge(frames[:0])[0].shape == (0, 28, 16, 3)


SHAPES = {"one pixel": (1, 1, 1, 16), "tiles": (2, 9, 300, 16), "C 128": (1, 6, 130, 128),
          "C 5": (1, 5, 131, 5), "C 20": (1, 5, 40, 20), "C 256": (1, 3, 70, 256), "column": (1, 70, 1, 16),
          "a tile is full": (1, 3, 126, 16)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@with_dtypes
def test_rgb_conv(device, dtype, shape):
    call, box = make(device, *shape, dtype), (0, 0, *shape[1:3])
    for out_dtype in (dtype, torch.float32):
        check_rgb(pixels_triton.rgb_conv, *call, box, out_dtype)


@pytest.mark.parametrize("box", [(0, 0, 17, 140), (3, 5, 11, 130), (16, 139, 1, 1), (4, 0, 4, 7),
                                 (0, 13, 17, 127)], ids=lambda box: ",".join(map(str, box)))
def test_boxes_and_strips(device, short, box):
    call = make(device, 2, 17, 140)
    check_rgb(pixels_triton.rgb_conv, *call, box, torch.bfloat16)


@pytest.mark.parametrize("C", [16, 64, 128, 256])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_configurations(device, capability, C, monkeypatch):
    chosen = pixels_triton.config(capability, C)
    monkeypatch.setattr(pixels_triton, "config", lambda *_: chosen)
    check_rgb(pixels_triton.rgb_conv, *make(device, 1, 4, 135, C), (0, 0, 4, 135), torch.float32)


@pytest.mark.parametrize("layout", ["every other picture", "part of a picture", "some of the channels",
                                    "weights channels last", "planes of weights"])
def test_strides(device, layout):
    x, weight, bias = make(device, 2, 6, 9)
    if layout == "every other picture":
        x = x.repeat_interleave(2, 0)[::2]
    elif layout == "part of a picture":
        x = F.pad(x, (0, 0, 1, 2, 3, 4), value=NAN)[:, 3:-4, 1:-2]
    elif layout == "some of the channels":
        x = F.pad(x, (3, 5), value=NAN)[..., 3:-5]
    elif layout == "weights channels last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    else:
        weight = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        bias = bias.repeat_interleave(2)[::2]
    check_rgb(pixels_triton.rgb_conv, x, weight, bias, (0, 0, 6, 9), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
def test_one_bad_pixel_is_seen_by_its_neighbours_alone(device):
    call = make(device, 1, 9, 11)
    wanted = pixels_triton.rgb_conv(*call, (0, 0, 9, 11), torch.bfloat16)[0]
    for bad in (NAN, float("inf")):
        call[0][0, 4, 6, 3] = bad
        rgb = pixels_triton.rgb_conv(*call, (0, 0, 9, 11), torch.bfloat16)[0]
        seen = torch.zeros(9, 11, dtype=torch.bool, device=device)
        seen[3:6, 5:8] = True
        assert not rgb[0, seen].isfinite().any() and torch.equal(rgb[0, ~seen], wanted[0, ~seen])


@pytest.mark.parametrize("truncate", [False, True], ids=["rounded", "truncated"])
@pytest.mark.parametrize("spread, middle", RANGES.values(), ids=RANGES.keys())
def test_adain_is_match_color(device, spread, middle, truncate):
    rgb, source = torch.randn(3, 20, 24, 3) * spread + middle, torch.rand(3, 20, 24, 3) * 0.8 - 0.5
    check_matched(pixels_triton.adain_uint8, rgb.to(device), source.to(device), truncate)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES.values()], ids=["fp32", *DTYPES])
@pytest.mark.parametrize("part", [slice(0, 40), slice(5, 38)], ids=["rows", "parts of rows"])
def test_adain_of_a_part_of_a_picture(device, short, dtype, part):
    rgb, source = torch.rand(2, 2, 9, 40, 3).to(device)
    rgb = F.pad(rgb.to(dtype), (0, 0, 0, 0, 2, 2), value=NAN)[:, 2:-2, part]
    check_matched(pixels_triton.adain_uint8, rgb, source, False)


@settings(max_examples=10, deadline=None)
@given(N=st.integers(1, 2), H=st.integers(1, 9), W=st.integers(1, 140), C=st.integers(1, 40),
       dtype=st.sampled_from(sorted(DTYPES)), data=st.data())
def test_any_size(device, N, H, W, C, dtype, data):
    top, left = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, W - 1))
    box = top, left, data.draw(st.integers(1, H - top)), data.draw(st.integers(1, W - left))
    check_rgb(pixels_triton.rgb_conv, *make(device, N, H, W, C, DTYPES[dtype]), box, torch.float32)
    frames = torch.randint(0, 256, (1, min(H, 4), min(W, 30), 3), dtype=torch.uint8)
    check_enlarged(pixels_triton.enlarge, frames.to(device))


LARGE = {"768x1408": (4, 768, 1408, 128, (0, 0, 768, 1408)),
         "compact 720x1280": (4, 768, 1280, 16, (0, 0, 720, 1280)),
         "2176x3840": (2, 2176, 3840, 128, (0, 0, 2160, 3840))}


@pytest.mark.gpu
@pytest.mark.parametrize("N, H, W, C, box", LARGE.values(), ids=LARGE.keys())
def test_large(N, H, W, C, box):
    """From frames to bytes. A part gives a part of what the whole gives, so float64 is needed for that only."""
    x, weight, bias = make("cuda", N, H, W, C)
    rgb, moments = rgb_conv(x, weight, bias, box=box, backend="triton")
    below = x[-1:, box[2] - 71:box[2] + 1]
    last = check_rgb(pixels_triton.rgb_conv, below, weight, bias, (1, 1, 70, box[3] - 1), torch.bfloat16)[0]
    assert torch.equal(rgb[-1:, -70:, 1:], last)
    torch.testing.assert_close(moments, reference.color_moments(2 * rgb.double() - 1), rtol=1e-6, atol=1e-6)
    frames = torch.randint(0, 256, (N, box[2] // 4, box[3] // 4, 3), dtype=torch.uint8, device="cuda")
    check_enlarged(lambda frames: enlarge(frames, return_moments=True, backend="triton"), frames)
    source = enlarge(frames) / 127.5 - 1
    check_matched(lambda rgb, moments, source, out_dtype, truncate: adain_uint8(
        rgb, moments, source, out_dtype=out_dtype, truncate=truncate, backend="triton"), rgb, source, False)


@pytest.mark.gpu  # the interpreter copies all of the memory
def test_far_apart():
    """Channels, rows, pixels and pictures 2^30 elements and more apart."""
    near = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8, device="cuda")
    shuffled, wanted = (torch.full((1, 1, 2, 24), NAN, device="cuda") for _ in range(2))
    pixels_triton.pixel_unshuffle(near[None, :, :2], 2, None, wanted)
    memory = torch.empty(2 ** 32, dtype=torch.uint8, device="cuda")
    for strides in ((64, 16, 4, 2 ** 30 + 2 ** 12), (64, 2 ** 30 + 2 ** 12, 4, 1), (64, 16, 2 ** 30 + 2 ** 12, 1),
                    (2 ** 31 + 2 ** 12, 16, 4, 1)):
        far = memory.as_strided(near.shape, strides).copy_(near)
        assert_same_bits(pixels_triton.enlarge(far), pixels_triton.enlarge(near))
        pixels_triton.pixel_unshuffle(far[None, :, :2], 2, None, shuffled)
        assert torch.equal(shuffled, wanted)


@pytest.mark.gpu
@with_and_without_others
@with_dtypes
def test_same_bits_500_times(dtype, others):
    call = *make("cuda", 4, 768, 1408, 128, dtype), (0, 0, 768, 1408), dtype
    frames = torch.randint(0, 256, (4, 192, 352, 3), dtype=torch.uint8, device="cuda")
    shuffled = torch.empty(1, 96, 176, 4 * 3 * 64, dtype=dtype, device="cuda")

    def ends():
        large, source = pixels_triton.enlarge(frames)
        rgb, moments = pixels_triton.rgb_conv(*call)
        matched = pixels_triton.adain_uint8(rgb, moments, source, torch.uint8, False)
        pixels_triton.pixel_unshuffle(large[None], 8, 3.0, shuffled)
        return large, source, rgb, moments, matched, shuffled.clone()
    assert changed(ends, others) == 0


@pytest.mark.gpu
def test_graph_with_other_frames():
    x, weight, bias = make("cuda", 2, 64, 160, 32)
    frames = torch.randint(0, 256, (2, 16, 40, 3), dtype=torch.uint8, device="cuda")

    def ends():
        large, source = enlarge(frames, return_moments=True, backend="triton")
        rgb, moments = rgb_conv(x, weight, bias, backend="triton")
        return large, rgb, adain_uint8(rgb, moments, source, backend="triton")
    ends()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ends()
    for _ in range(3):
        x.normal_()
        frames.random_(0, 256)
        graph.replay()
        assert_same_bits(captured, ends())


@pytest.mark.gpu
def test_operators_on_a_gpu():
    ops = torch.ops.flashvsr
    call = [y.requires_grad_() for y in make("cuda", 2, 9, 11)]
    torch.library.opcheck(ops.rgb_conv.default, (*call, [1, 2, 5, 6], torch.float32, True, "triton"))
    frames = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, device="cuda")
    torch.library.opcheck(ops.enlarge.default, (frames, "triton"))
    moments = enlarge(frames, return_moments=True, backend="triton")[1]
    rgb = torch.rand(2, 5, 7, 3, device="cuda")[:, 1:, 1:]
    torch.library.opcheck(ops.adain_uint8.default, (rgb, moments, moments, torch.uint8, False, "triton"))
