"""The CUDA C++ convolutions (sm_80 and newer) against float64: on a GPU, and their source on a CPU, on fibers."""
import ctypes

import pytest
import torch

pytest.importorskip("triton", "3.6")  # of which test_conv3x3_triton's inputs are

from flashvsr_kernels import backends, conv3x3, reference, upsample_conv
from tests import cuda_on_fibers
from tests.error_rule import check
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays
from tests.test_conv3x3_triton import NAN, among, make, make_folded, wide

REFUSAL = backends()["conv3x3"]["cuda"]
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {"whole tiles": (1, 8, 32, 64, 64, BF16), "odd": (1, 9, 17, 72, 136, BF16),
          "one pixel": (3, 1, 1, 64, 128, BF16), "one row": (1, 1, 40, 8, 8, BF16),
          "one column": (1, 17, 1, 16, 72, BF16), "fp16": (1, 9, 18, 64, 128, FP16)}
REAL = {"A": (4, 768, 1408, 128, 128), "B": (4, 384, 704, 128, 128), "C": (2, 192, 352, 256, 256),
        "D": (2, 96, 176, 512, 512), "first": (2, 96, 176, 784, 512), "compact": (2, 360, 640, 16, 16)}


class Params(ctypes.Structure):
    """Conv3x3Params of csrc/params.h."""
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "past", "weight", "bias", "residual", "out")] + [
        (name, ctypes.c_int64) for name in ("pictures", "height", "width")] + [
        (name, ctypes.c_int) for name in ("channels", "outputs", "steps")] + [
        ("enlarge", ctypes.c_bool), ("relu", ctypes.c_bool), ("dtype", ctypes.c_int)]


class Fibers:
    """The ops on a CPU, from the kernels' source."""

    def __init__(self, library):
        self.library = library

    def run(self, x, weight, bias, past, residual, relu, out, steps=1):
        places = (None if y is None else y.data_ptr() for y in (x, past, weight, bias, residual, out))
        params = Params(*places, *x.shape, out.shape[3], steps, weight.ndim == 7, relu, {BF16: 2, FP16: 3}[x.dtype])
        self.library.flashvsr_conv3x3_cuda.restype = ctypes.c_char_p
        assert self.library.flashvsr_conv3x3_cuda(ctypes.byref(params), 0, None) is None
        return out

    def conv3x3(self, x, weight, bias, past, residual, relu):
        return self.run(x, weight, bias, past, residual, relu, x.new_full((*x.shape[:3], len(weight)), NAN))

    def upsample_conv(self, x, folded, relu):
        N, H, W, _ = x.shape
        out = x.new_full((N * len(folded), 2 * H, 2 * W, folded.shape[3]), NAN)
        return self.run(x, folded, None, None, None, relu, out, len(folded))


class Card:
    """The ops on a GPU."""
    def conv3x3(self, x, weight, bias, past, residual, relu):
        return conv3x3(x, weight, bias, past=past, residual=residual, relu=relu, backend="cuda")

    def upsample_conv(self, x, folded, relu):
        return upsample_conv(x, folded, relu=relu, backend="cuda")


needs_compiler = pytest.mark.skipif(cuda_on_fibers.CXX is None or not cuda_on_fibers.CSRC.exists(),
                                    reason="needs a C++ compiler and the source")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_on_fibers.build("conv3x3.cu", tmp_path_factory.mktemp("fibers"))


@pytest.fixture(params=[*(pytest.param(f"{when} copies", marks=needs_compiler) for when in ("late", "early")),
                        pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Device and ops."""
    if request.param == "cuda":
        if REFUSAL is not None:
            pytest.skip(REFUSAL)
        return "cuda", Card()
    library = request.getfixturevalue("library")
    library.fibers_are_late(ctypes.c_bool(request.param == "late copies"))
    return "cpu", Fibers(library)


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


def check_conv3x3(ops, *call):
    out = ops.conv3x3(*call)
    assert out.shape == (*call[0].shape[:3], len(call[1])) and out.is_contiguous() and out.dtype == call[0].dtype
    check(out, reference.conv3x3(*call), reference.conv3x3(*wide(call)))


def check_upsample_conv(ops, *call):
    out = ops.upsample_conv(*call)
    exact = reference.upsample_conv(*wide(call))
    assert out.shape == exact.shape and out.is_contiguous() and out.dtype == call[0].dtype
    check(out, reference.upsample_conv(*call), exact)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_conv3x3(place, shape):
    device, ops = place
    check_conv3x3(ops, *make(device, *shape))


@pytest.mark.parametrize("T, shape", [(1 + i % 2, shape) for i, shape in enumerate(SHAPES.values())], ids=SHAPES.keys())
def test_upsample_conv(place, T, shape):
    device, ops = place
    N, H, W, *rest = shape
    check_upsample_conv(ops, *make_folded(device, N, -(-H // 2), -(-W // 2), *rest, T=T))


@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("bias, residual, relu", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)],
                         ids=["bare", "bias", "residual", "relu"])
def test_what_surrounds_it(place, bias, residual, relu, past):
    device, ops = place
    x, weight, b, before, r, _ = make(device, 1, 5, 6, 24, 16, past=past)
    check_conv3x3(ops, x, weight, b if bias else None, before, r if residual else None, bool(relu))


def test_what_must_not_be_read_is_nan(place):
    device, ops = place
    for make_call, launch in (make, ops.conv3x3), (make_folded, ops.upsample_conv):
        call = make_call(device, 2, 5, 7, 40, 24)
        poisoned = [among(NAN, x) if isinstance(x, torch.Tensor) else x for x in call]
        wanted = launch(*call)
        assert wanted.isfinite().all() and torch.equal(launch(*poisoned), wanted)


def test_nan_that_is_read_shows(place):
    """With relu too, and only in the neighbourhood of the pixel."""
    device, ops = place
    x, weight, bias, _, residual, _ = make(device, 1, 9, 9, 16, 16, past=False)
    x[0, 4, 0, 3] = NAN
    near = torch.zeros(1, 9, 9, dtype=torch.bool, device=device)
    near[0, 3:6, 0:2] = True
    assert torch.equal(ops.conv3x3(x, weight, bias, None, residual, True).isnan(), near[..., None].expand(1, 9, 9, 16))


ONLY_BF16 = "error = p.enlarge ? launch<false, 2>(p, on) : launch<false, 3>(p, on)", "return \"\""  # compiles faster
MISTAKES = {
    "no barrier": ("      __syncthreads();  // this tap's", "      // this tap's"),
    "copies not waited for": ("wait_for_copies<kAhead - 1>();", "wait_for_copies<kAhead>();"),
    "weights over those in use": ("copy_weights((tap + kAhead)", "copy_weights(tap"),
    "pixels too late": ("kTaps - kAhead + 1, kLoadsOfTap", "kTaps, kLoadsOfTap"),
    "results over what is read": ("  __syncthreads();  // every warp is done", "  // every warp is done"),
    "the picture's border": ("x >= 0 && x < p.width", "x < p.width")}


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_fibers_find_mistakes(mistake, tmp_path):
    library = cuda_on_fibers.build("conv3x3.cu", tmp_path, mistake, ONLY_BF16)
    calls = {"conv3x3": make("cpu", 1, 9, 17, 72, 72), "upsample_conv": make_folded("cpu", 1, 17, 4, 72, 72, T=1)}

    def shows(late, op):
        library.fibers_are_late(ctypes.c_bool(late))
        x, *rest = calls[op]
        out = getattr(Fibers(library), op)(among(NAN, x), *rest)
        return not torch.allclose(out, getattr(reference, op)(x, *rest), atol=.1, rtol=.05)
    assert any(shows(late, op) for late in (True, False) for op in calls)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_real_shapes(shape, dtype):
    call = make("cuda", *shape, dtype, past=False)
    out = Card().conv3x3(*call)
    for n in range(len(out)):  # a picture at a time: float64 is large
        one = [x if x is None or i not in (0, 4) else x[n:n + 1] for i, x in enumerate(call)]
        check(out[n:n + 1], reference.conv3x3(*one), reference.conv3x3(*wide(one)))


@needs_gpu
@with_and_without_others
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("outputs", [(256, 64), (64, 128)], ids=lambda outputs: f"{outputs[0]}, enlarged {outputs[1]}")
def test_same_bits_500_times(others, dtype, outputs):
    call = make("cuda", 2, 192, 352, 256, outputs[0], dtype)
    folded = make_folded("cuda", 2, 96, 176, 128, outputs[1], dtype)
    assert changed(lambda: (Card().conv3x3(*call), Card().upsample_conv(*folded)), others, held=4) == 0


@needs_gpu
def test_graph():
    call, folded = make("cuda", 2, 20, 70, 64, 64), make_folded("cuda", 2, 20, 70, 64, 64)
    check_replays(lambda: (Card().conv3x3(*call), Card().upsample_conv(*folded)), (*call[:5], *folded[:2]))


@needs_gpu
def test_more_than_2_to_the_31_elements():
    rows = 2 ** 31 // (4096 * 64) + 3
    x, weight, *_ = make("cuda", 1, rows, 4096, 64, 64, past=False)
    out = Card().conv3x3(x, weight, None, None, x, False)
    part = x[:, -4:].contiguous()
    assert torch.equal(out[:, -3:], Card().conv3x3(part, weight, None, None, part, False)[:, -3:])


@needs_gpu
def test_into_memory_that_is_given():
    x, weight, bias, past, residual, relu = make("cuda", 2, 20, 70, 64, 72)
    wanted, out = Card().conv3x3(x, weight, bias, past, residual, relu), x.new_full((2, 20, 70, 72), NAN)
    conv3x3(x, weight, bias, past=past, residual=residual, relu=relu, out=out, backend="cuda")
    assert torch.equal(out, wanted)


@needs_gpu
@pytest.mark.parametrize("change, reason", [
    (lambda x: x[..., :60].contiguous(), "channels must be multiples of 8, are 60 and 64"),
    (lambda x: among(0, x, 4097), "tensors must begin at a multiple of 16 bytes"),
    (lambda x: x.new_zeros(65536, 1, 1, 64), "pictures are too many or too large for it"),
    (lambda x: x.float(), "has no torch.float32")], ids=["channels", "address", "pictures", "dtype"])
def test_what_it_cannot_run_has_its_reason(change, reason):
    x = change(make("cuda", 1, 4, 4, 64, 64, past=False)[0])
    weight = x.new_zeros(64, x.shape[3], 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(NotImplementedError, match=f"cuda: {reason}"):
        conv3x3(x, weight, backend="cuda")
