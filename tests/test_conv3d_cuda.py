"""The CUDA C++ convolution of the projector (sm_80 and newer) against float64: on a GPU, and its source on a CPU, on
fibers.
"""
import ctypes

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", "3.6")  # of which the other tests' inputs are

from flashvsr_kernels import backends, causal_conv3d, conv3d, reference
from tests import cuda_on_fibers
from tests.error_rule import check
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays
from tests.test_conv3d_triton import NAN, make
from tests.test_conv3x3_cuda import needs_compiler
from tests.test_conv3x3_triton import among

REFUSAL = backends()["causal_conv3d"]["cuda"]
BF16, FP16 = torch.bfloat16, torch.float16
# B, T, H, W, C, O, dtype, context, norm
SHAPES = {"whole tile": (1, 2, 16, 16, 32, 64, BF16, True, True), "odd": (1, 2, 5, 17, 72, 136, BF16, True, True),
          "clips": (2, 4, 5, 1, 8, 72, BF16, True, False), "no context": (1, 4, 17, 1, 40, 72, BF16, False, False),
          "norm alone": (2, 2, 1, 5, 8, 8, BF16, False, True), "one pixel": (1, 2, 1, 1, 8, 8, BF16, True, False),
          "many channels": (1, 2, 1, 1, 8, 2120, BF16, False, True), "fp16": (1, 2, 5, 17, 40, 72, FP16, True, True)}


class Params(ctypes.Structure):
    """CausalConv3dParams of csrc/params.h."""
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "tail", "weight", "bias", "gamma", "out", "squares")] + [
        (name, ctypes.c_int64 * 4) for name in ("x_strides", "tail_strides")] + [
        (name, ctypes.c_int64) for name in ("batches", "steps", "height", "width")] + [
        (name, ctypes.c_int) for name in ("channels", "outputs", "dtype")]


class Fibers:
    """The op on a CPU, from the kernels' source."""

    def __init__(self, library):
        self.library = library

    def __call__(self, x, weight, bias, tail, gamma):
        B, T, H, W, C = x.shape
        out = x.new_full((B, T // 2, H, W, len(weight)), NAN)
        squares = x.new_full((-(-len(weight) // 64), B * T // 2 * H * W), NAN, dtype=torch.float32)
        places = (None if y is None else y.data_ptr() for y in (x, tail, weight, bias, gamma, out, squares))
        strides = ((ctypes.c_int64 * 4)(*(x if y is None else y).stride()[:4]) for y in (x, tail))
        params = Params(*places, *strides, B, T // 2, H, W, C, len(weight), {BF16: 2, FP16: 3}[x.dtype])
        self.library.flashvsr_causal_conv3d_cuda.restype = ctypes.c_char_p
        assert self.library.flashvsr_causal_conv3d_cuda(ctypes.byref(params), 0, None) is None
        return out


def card(x, weight, bias, tail, gamma):
    """The op on a GPU."""
    return causal_conv3d(x, weight, bias, tail, gamma=gamma, backend="cuda")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_on_fibers.build("conv3d.cu", tmp_path_factory.mktemp("fibers"))


@pytest.fixture(params=[*(pytest.param(f"{when} copies", marks=needs_compiler) for when in ("late", "early")),
                        pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Device and op."""
    if request.param == "cuda":
        if REFUSAL is not None:
            pytest.skip(REFUSAL)
        return "cuda", card
    library = request.getfixturevalue("library")
    library.fibers_are_late(ctypes.c_bool(request.param == "late copies"))
    return "cpu", Fibers(library)


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


def check_call(op, *call):
    out, exact = op(*call), reference.causal_conv3d(*(None if x is None else x.double() for x in call))
    assert out.shape == exact.shape and out.is_contiguous() and out.dtype == call[0].dtype
    check(out, reference.causal_conv3d(*call), exact)
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64_reference(place, shape):
    device, op = place
    check_call(op, *make(device, *shape))


@pytest.mark.parametrize("layout", ["tail of the same clip", "padded rows", "columns before rows",
                                    "one picture for all"])
def test_strides(place, layout):
    device, op = place
    x, weight, bias, tail, gamma = make(device, 2, 4, 3, 4, 16, 24)
    if layout == "tail of the same clip":
        tail = x[:, 2:]
    elif layout == "padded rows":
        x, tail = (F.pad(value, (8, 16), value=NAN)[..., 8:-16] for value in (x, tail))
    elif layout == "columns before rows":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        tail = tail.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x, tail = x[:, :1].expand(-1, 4, -1, -1, -1), x[:, :1].expand(-1, 2, -1, -1, -1)
    assert torch.equal(op(x, weight, bias, tail, gamma),
                       check_call(op, x.contiguous(), weight, bias, tail.contiguous(), gamma))


@pytest.mark.parametrize("context", [True, False], ids=["context", "no context"])
def test_what_must_not_be_read_is_nan(place, context):
    device, op = place
    call = make(device, 1, 2, 3, 5, 40, 72, BF16, context)
    wanted = op(*call)
    poisoned = [x if x is None else among(NAN, x, 2 ** 15) for x in call]
    assert wanted.isfinite().all() and torch.equal(op(*poisoned), wanted)


def test_nan_reaches_its_neighbours_alone(place):
    device, op = place
    x, weight, bias, tail, gamma = make(device, 1, 4, 6, 7, 16, 24)
    clean = op(x, weight, bias, tail, gamma)
    x[0, 1, 3, 4, 3] = NAN  # both results have this step among their four
    out = op(x, weight, bias, tail, gamma)
    assert out[0, :, 2:5, 3:6].isnan().all() and out.isnan().sum() == 2 * 9 * 24
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_norm_of_zeros_is_zero(place):
    device, op = place
    x, weight, bias, tail, gamma = make(device, T=2)
    assert not op(x, weight * 0, bias * 0, tail, gamma).any()


def test_a_clip_alone_gives_the_same_bits(place):
    """A batch, and a long clip: each step's context is what lies before it."""
    device, op = place
    x, weight, bias, tail, gamma = make(device, 2, 4, 3, 4, 16, 24)
    whole = op(x, weight, bias, tail, gamma)
    for b in range(2):
        first = op(x[b:b + 1, :2], weight, bias, tail[b:b + 1], gamma)
        second = op(x[b:b + 1, 2:], weight, bias, x[b:b + 1, :2], gamma)
        assert torch.equal(torch.cat([first, second], 1), whole[b:b + 1])


ONLY_BF16 = "? launch<true>(p, on) : launch<false>(p, on)", "? launch<true>(p, on) : cudaSuccess"  # compiles faster
MISTAKES = {  # of the tile, which test_conv3x3_cuda plants in, none
    "the picture's border": ("min(max(column, 0), width - 1)", "min(max(column, 1), width - 1)"),
    "the frame": ("const int frame = 2 * step", "const int frame = step"),
    "the frame of tail": ("(frame + 2) * p.tail_strides", "(-1 - frame) * p.tail_strides"),
    "a sum of squares": ("square += __shfl_xor_sync(~0u, square, 2);", ""),
    "the place of a sum of squares": ("first / 64 * pixels_of", "tile.first / 64 * pixels_of")}


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_fibers_find_mistakes(mistake, tmp_path):
    op = Fibers(cuda_on_fibers.build("conv3d.cu", tmp_path, mistake, ONLY_BF16))
    call = make("cpu", 1, 4, 13, 5, 40, 72)
    wanted = reference.causal_conv3d(*call)

    def shows(late):
        op.library.fibers_are_late(ctypes.c_bool(late))
        return not torch.allclose(op(*call), wanted, atol=.1, rtol=.05)
    assert any(map(shows, (True, False)))


# For x (1, 2, 4, 4, 64) without tail, O 64
ITS_REASONS = {
    "channels in": (lambda x, w, b: (x[..., :60].contiguous(), w[:, :60], b), "channels must be multiples of 8"),
    "channels out": (lambda x, w, b: (x, w[:60], b[:60]), "channels must be multiples of 8"),
    "address": (lambda x, w, b: (among(0, x, 4097), w, b), "x must begin at a multiple of 16 bytes"),
    "bias's address": (lambda x, w, b: (x, w, among(0, b, 4097)), "bias must begin at a multiple of 16 bytes"),
    "rows": (lambda x, w, b: (F.pad(x, (0, 4))[..., :-4], w, b), "rows of x must be 16-byte aligned"),
    "size": (lambda x, w, b: (x[:, :, :1, :1].expand(-1, -1, 2 ** 15, 2 ** 15, -1), w, b),
             "pictures are too many or too large for it: x is")}
REASONS = ITS_REASONS | {
    "last dimension": (lambda x, w, b: (x.mT.contiguous().mT, w, b), "x must be contiguous in its last dimension"),
    "weight": (lambda x, w, b: (x, w.contiguous(), b), "weight must be channels_last_3d"),
    "bias": (lambda x, w, b: (x, w, b.repeat(2)[::2]), "bias and gamma must be contiguous"),
    "dtype": (lambda x, w, b: (x.float(), w.float(), b.float()), "has no torch.float32")}


def changed_call(device, change):
    x, weight, bias, *_ = make(device, 1, 2, 4, 4, 64, 64, BF16, False)
    x, weight, bias = change(x, weight, bias)
    if weight.stride(1) == 1:  # but of less channels
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return x, weight, bias


@needs_gpu
@pytest.mark.parametrize("change, reason", REASONS.values(), ids=REASONS.keys())
def test_what_it_cannot_run_has_its_reason(change, reason):
    with pytest.raises(NotImplementedError, match=f"cuda: {reason}"):
        causal_conv3d(*changed_call("cuda", change), None, backend="cuda")


@pytest.mark.parametrize("change, reason", ITS_REASONS.values(), ids=ITS_REASONS.keys())
def test_what_it_alone_cannot_run_has_its_reason(monkeypatch, change, reason):
    """The reasons that are not Triton's too, on a CPU."""
    monkeypatch.setattr(conv3d, "_gpu_supports", lambda *call: None)
    assert conv3d._cuda_supports(*changed_call("cpu", change), None, None).startswith(reason)


def test_what_it_can_run_has_none(monkeypatch):
    monkeypatch.setattr(conv3d, "_gpu_supports", lambda *call: None)
    for shape in SHAPES.values():
        assert conv3d._cuda_supports(*make("cpu", *shape)) is None


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("T, C, O", [(8, 768, 2048), (4, 2048, 3072)], ids=["layer 1", "layer 2"])
def test_real_shapes(T, C, O, dtype):
    """Some channels against float64, as all would take minutes; the norm against that of what is without it."""
    x, weight, bias, tail, gamma = make("cuda", 1, T, 48, 88, C, O, dtype)
    out, few = card(x, weight, bias, tail, None), [0, 1, 63, 64, 127, 128, O // 2 + 1, O - 1]
    call = x, weight[few].contiguous(memory_format=torch.channels_last_3d), bias[few], tail, None
    exact = reference.causal_conv3d(*(None if value is None else value.double() for value in call))
    check(out[..., few], reference.causal_conv3d(*call), exact)
    wanted = F.silu(reference.rms_norm(out.float(), gamma.float(), 1e-24))
    torch.testing.assert_close(card(x, weight, bias, tail, gamma).float(), wanted, atol=1e-2, rtol=1e-2)


@needs_gpu
@with_and_without_others
@pytest.mark.parametrize("O, dtype, context", [(512, BF16, True), (64, FP16, True), (512, FP16, False),
                                               (64, BF16, False)], ids=str)
def test_same_bits_500_times(O, dtype, context, others):
    call = make("cuda", 1, 4, 48, 88, 256, O, dtype, context)
    assert changed(lambda: card(*call), others) == 0


@needs_gpu
def test_graph():
    call = make("cuda", 1, 4, 20, 70, 64, 136)
    check_replays(lambda: (card(*call),), call)


@needs_gpu
@pytest.mark.parametrize("which", [0, 3], ids=["x", "tail"])
def test_far_apart(which):
    """Rows, steps and batches 2^31 elements and more apart."""
    near = make("cuda", 2, 2, 2, 2, 16, 16)
    wanted = card(*near)
    for strides in ((2 ** 31, 128, 64, 16, 1), (128, 2 ** 31, 64, 16, 1), (256, 128, 2 ** 31, 16, 1),
                    (256, 128, 64, 2 ** 31, 1)):
        memory = torch.full((2 ** 31 + 2 ** 12,), NAN, dtype=BF16, device="cuda")
        far = memory.as_strided(near[which].shape, strides).copy_(near[which])
        assert torch.equal(card(*near[:which], far, *near[which + 1:]), wanted)


@needs_gpu
def test_more_than_2_to_the_31_elements():
    """Of the result."""
    H, W = 4096, 2 ** 31 // (4096 * 512) + 16
    x, weight, bias, _, gamma = make("cuda", 1, 2, H, W, 8, 512, BF16, False)
    assert torch.equal(card(x, weight, bias, None, gamma)[:, :, -64:],
                       card(x[:, :, -80:], weight, bias, None, gamma)[:, :, -64:])
