"""The Gluon convolutions for sm_90 against float64: on a GPU, and their source on a CPU, on threads."""
import re
from functools import partial
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

from flashvsr_kernels import backends, conv3x3, conv3x3_hopper, reference, upsample_conv
from tests.error_rule import check
from tests.gluon_on_threads import Launcher, planted
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays
from tests.test_conv3x3_triton import NAN, among, make, make_folded, wide

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
REFUSAL = backends()["conv3x3"]["hopper"]
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {"whole tiles": (1, 16, 64, 64, 64, BF16), "odd": (2, 9, 70, 128, 128, BF16),
          "one pixel": (3, 1, 1, 64, 64, BF16), "one row": (1, 1, 130, 64, 64, BF16),
          "one column": (1, 41, 1, 64, 64, BF16), "784 channels": (1, 6, 5, 784, 64, BF16),
          "40 channels": (1, 5, 7, 40, 192, BF16), "less than a round": (1, 3, 66, 8, 320, BF16),
          "many": (2, 19, 67, 64, 128, BF16), "fp16": (1, 9, 70, 64, 128, FP16)}
# N, H, W, C, O of a chunk at 768x1408, with past, with residual. The model adds no residual where it has a past, but such
# a call is another kernel.
REAL = {"A": (4, 768, 1408, 128, 128, False, False), "A + residual": (4, 768, 1408, 128, 128, False, True),
        "B": (4, 384, 704, 128, 128, False, True), "B past": (4, 384, 704, 128, 128, True, False),
        "B past + residual": (4, 384, 704, 128, 128, True, True),
        "C": (2, 192, 352, 256, 256, False, True), "C past": (2, 192, 352, 256, 256, True, False),
        "D": (2, 96, 176, 512, 512, False, True), "D past": (2, 96, 176, 512, 512, True, False),
        "first": (2, 96, 176, 784, 512, False, False)}
FOLDED = {"1": (2, 96, 176, 512, 256, 1), "2": (2, 192, 352, 256, 128, 2), "3": (4, 384, 704, 128, 128, 2)}
LAUNCHER = partial(Launcher, name="conv3x3_kernel", _plus=lambda b_sum, b_half: b_sum + b_half.float())
THREADS = {late: LAUNCHER(conv3x3_hopper, late=late) for late in ("products", "copies")}
with_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


def needs_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


@pytest.fixture(params=["late products", "late copies", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if REFUSAL is not None:
            pytest.skip(REFUSAL)
        return "cuda"
    monkeypatch.setattr(conv3x3_hopper, "conv3x3_kernel", THREADS[request.param.split()[1]])
    return "cpu"


@pytest.fixture(params=["wide", "square"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(conv3x3_hopper, "prefers_wide", lambda *size: request.param == "wide")


def check_conv3x3(*call):
    out = conv3x3_hopper.conv3x3(*call)
    assert out.shape == (*call[0].shape[:3], len(call[1])) and out.is_contiguous()
    assert out.dtype == call[0].dtype
    for n in range(len(out)):  # a picture at a time: float64 is large
        one = [x if x is None or i not in (0, 3, 4) else x[n:n + 1] for i, x in enumerate(call)]
        check(out[n:n + 1], reference.conv3x3(*one), reference.conv3x3(*wide(one)))


def check_upsample_conv(x, folded, relu):
    out, T = conv3x3_hopper.upsample_conv(x, folded, relu), len(folded)
    assert out.shape == (len(x) * T, 2 * x.shape[1], 2 * x.shape[2], folded.shape[3]) and out.is_contiguous()
    for n in range(len(x)):
        one = x[n:n + 1], folded, relu
        check(out[n * T:n * T + T], reference.upsample_conv(*one), reference.upsample_conv(*wide(one)))


def real(device, N, H, W, C, O, past, residual, dtype=BF16):
    x, weight, bias, past, rest, relu = make(device, N, H, W, C, O, dtype, past)
    return x, weight, bias, past, rest if residual else None, relu


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_conv3x3(device, tiles, shape):
    check_conv3x3(*make(device, *shape))


@pytest.mark.parametrize("T, shape", [(1 + i % 2, shape) for i, shape in enumerate(SHAPES.values())], ids=SHAPES.keys())
def test_upsample_conv(device, tiles, T, shape):
    check_upsample_conv(*make_folded(device, *shape, T))


@pytest.mark.parametrize("past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("bias, residual, relu", [
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)],
    ids=["bare", "bias", "residual", "relu", "bias+relu", "bias+residual+relu"])
def test_what_surrounds_it(device, tiles, bias, residual, relu, past):
    x, weight, b, before, r, _ = make(device, 1, 18, 33, 72, 128, past=past)
    check_conv3x3(x, weight, b if bias else None, before, r if residual else None, bool(relu))


@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_real_shapes_made_small(device, tiles, shape):
    N, H, W, *rest = shape
    check_conv3x3(*real(device, 1, H // 32, W // 32, *rest))


@needs_hopper
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
@with_dtypes
def test_real_shapes(tiles, dtype, shape):
    check_conv3x3(*real("cuda", *shape, dtype))


@needs_hopper
@pytest.mark.parametrize("shape", FOLDED.values(), ids=FOLDED.keys())
@with_dtypes
def test_real_enlargements(tiles, dtype, shape):
    check_upsample_conv(*make_folded("cuda", *shape[:5], dtype, shape[5]))


@pytest.mark.parametrize("shape", [(2, 5, 7, 48, 64), (1, 16, 64, 64, 64), (1, 19, 67, 64, 128)], ids=str)
def test_what_must_not_be_read_is_nan(device, tiles, shape):
    for make_call, launch in ((make, conv3x3_hopper.conv3x3), (make_folded, conv3x3_hopper.upsample_conv)):
        call = make_call(device, *shape)
        poisoned = [among(NAN, x) if isinstance(x, torch.Tensor) else x for x in call]
        wanted = launch(*call)
        assert wanted.isfinite().all() and torch.equal(launch(*poisoned), wanted)


def test_nan_that_is_read_shows(device, tiles):
    """With relu too, and only in the neighbourhood of the pixel."""
    x, weight, bias, past, residual, relu = make(device, 2, 9, 66, 64, 64)
    past[1, 4, 0, 3] = NAN
    near = torch.zeros(2, 9, 66, dtype=torch.bool, device=device)
    near[1, 3:6, 0:2] = True
    out = conv3x3_hopper.conv3x3(x, weight, bias, past, residual, relu)
    assert torch.equal(out.isnan(), near[..., None].expand(2, 9, 66, 64))
    _, folded, _ = make_folded(device, 2, 9, 66, 64, 64)
    large = torch.zeros(4, 18, 132, dtype=torch.bool, device=device)
    large[2:, 7:11, 0:3] = True
    out = conv3x3_hopper.upsample_conv(past, folded, False)
    assert torch.equal(out.isnan(), large[..., None].expand(4, 18, 132, 64))


def test_bits_depend_neither_on_tiles_nor_on_other_pictures(device, monkeypatch):
    x, weight, bias, past, residual, relu = make(device, 2, 18, 70, 64, 128)
    folded = make_folded(device, 1, 1, 1, 64, 128)[1]
    results = []
    for preferred in True, False:
        monkeypatch.setattr(conv3x3_hopper, "prefers_wide", lambda *size: preferred)
        results.append((conv3x3_hopper.conv3x3(x, weight, bias, past, residual, relu),
                        conv3x3_hopper.upsample_conv(x, folded, False)))
    assert all(torch.equal(*pair) for pair in zip(*results))
    alone = conv3x3_hopper.conv3x3(x[1:], weight, bias, past[1:], residual[1:], relu)
    assert torch.equal(alone, results[0][0][1:])
    assert torch.equal(conv3x3_hopper.upsample_conv(x[1:], folded, False), results[0][1][2:])


def test_past_may_be_the_same_frames_one_step_earlier(device, tiles):
    frames, weight, *_ = make(device, 4, 6, 7, 64, 64)
    check_conv3x3(frames[1:], weight, None, frames[:-1], frames[1:], True)


MISTAKES = {
    "none": ("", ""),
    "a slot freed while it is read": ("warpgroup_mma_wait(2,", "warpgroup_mma_wait(4,"),
    "no fence before a store": ("fence_async_shared()\n    _meet", "_meet"),
    "a store's source overwritten": ("HALVES == 1):\n        tma.store_wait(0)", "HALVES == 1):\n        pass"),
    "a residual over what has not left": ("    tma.store_wait(0)\n    _meet()\n    mbarrier.expect(full",
                                          "    mbarrier.expect(full"),
    "a result goes where the next one belongs": ("b_upper, left, out", "b_upper, place, out"),
    "weights read before they are there": ("mbarrier.wait(w_full.index(slot), slots // SLOTS & 1)", "pass"),
    "a head read before it is there": ("mbarrier.wait(head_full.index(0), 0)", "pass"),
    "residual's phase": ("served & 1", "1 - served & 1"),
    "another view": ("(W * 2 * ROWS + j % SIDE) * PITCH", "(W * 2 * ROWS + j // SIDE) * PITCH")}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_threads_find_mistakes(mistake, tmp_path, monkeypatch):
    right, wrong = mistake
    mistaken = planted(conv3x3_hopper, right, wrong, tmp_path, monkeypatch)
    launchers = [LAUNCHER(mistaken, late=late) for late in ("products", "copies")]
    call, found = make("cpu", 1, 33, 66, 64, 64), []
    head, planes = (torch.randn(3, 64, 3, 3) / 8).to(BF16, memory_format=torch.channels_last), torch.empty(27, 1, 32, 64)
    x, weight = call[0][:, :32, :64].contiguous(), call[1][:, :64].contiguous(memory_format=torch.channels_last)
    hidden = reference.conv3x3(x, weight, None, None, None, True)
    of_head = torch.einsum("nhwc,ocyx->oyxnhw", hidden, head).flatten(0, 2).float()
    # Whether a mistake shows can depend on which thread runs when: more than one try.
    for launcher, residual in [*product(launchers, (None, call[4], "head"))] * (5 if right != wrong else 1):
        if any(found):
            break
        monkeypatch.setattr(mistaken, "conv3x3_kernel", launcher)
        try:
            if isinstance(residual, str):
                mistaken.tap_planes(x, weight, head, planes, 0)
                out, wanted = planes, of_head
            else:
                out, wanted = (op.conv3x3(*call[:4], residual, True) for op in (mistaken, reference))
            found.append(not torch.allclose(out, wanted, atol=0.05, rtol=0.02))
        except (AssertionError, RuntimeError):
            found.append(True)
    assert any(found) == (right != wrong)


@pytest.mark.parametrize("call, reason", [
    (make("cpu", 1, 2, 2, 12, 64), "x must have a multiple of 8 channels, .*, has 12"),
    (make("cpu", 1, 2, 2, 64, 96), "the output must have a multiple of 64 channels, has 96"),
    (make_folded("cpu", 1, 2, 2, 64, 3), "the output must have a multiple of 64 channels, has 3"),
    (make("cpu", 1, 2, 0, 64, 64), r"x is empty: \(1, 2, 0, 64\)"),
    ([among(0, make_folded("cpu", 1, 2, 2, 64, 64)[0], 4097), make_folded("cpu", 1, 2, 2, 64, 64)[1]],
     "tensors must begin at a multiple of 16 bytes"),
], ids=["12 channels", "to 96", "enlarged to 3", "empty", "odd address"])
def test_refusals(call, reason):
    pictures_and_weights = [x for i, x in enumerate(call) if i in (0, 1, 3, 4)]
    assert re.fullmatch(reason, conv3x3_hopper.supports(*pictures_and_weights))


def test_784_channels_are_supported():
    assert conv3x3_hopper.supports(torch.empty(1, 1, 1, 784), torch.empty(512, 784, 3, 3)) is None


@needs_hopper
@with_and_without_others
@pytest.mark.parametrize("shape", [*REAL.values(), (4, 384, 704, 64, 64, True, True), *FOLDED.values(),
                                   (2, 384, 704, 64, 64, 2)],
                         ids=[*REAL.keys(), "64", *(f"enlarged {name}" for name in FOLDED), "enlarged 64"])
def test_same_bits_500_times(tiles, shape, others):
    if len(shape) == 6:
        launch = partial(conv3x3_hopper.upsample_conv, *make_folded("cuda", *shape[:5], T=shape[5]))
    else:
        launch = partial(conv3x3_hopper.conv3x3, *real("cuda", *shape))
    assert changed(launch, others, held=4) == 0  # some of the results have 1.1 GB, and tests run side by side


@needs_hopper
def test_graph(tiles):
    call, folded = make("cuda", 2, 20, 70, 64, 64), make_folded("cuda", 2, 20, 70, 64, 64)
    check_replays(lambda: (conv3x3_hopper.conv3x3(*call), conv3x3_hopper.upsample_conv(*folded)),
                  (*call[:5], *folded[:2]))


@needs_hopper
def test_more_than_2_to_the_31_elements(tiles):
    rows = 2 ** 31 // (4096 * 64) + 3
    x, weight, *_ = make("cuda", 1, rows, 4096, 64, 64, past=False)
    out = conv3x3_hopper.conv3x3(x, weight, None, None, x, False)
    last = conv3x3_hopper.conv3x3(x[:, -4:].contiguous(), weight, None, None, x[:, -4:].contiguous(), False)
    assert torch.equal(out[:, -3:], last[:, -3:])
    del out
    _, folded, _ = make_folded("cuda", 1, 1, 1, 64, 64, T=1)
    part = x[:, :rows // 4 + 1].contiguous()
    out, last = (conv3x3_hopper.upsample_conv(y, folded, False) for y in (part, part[:, -4:].contiguous()))
    assert out.numel() > 2 ** 31 and torch.equal(out[:, -6:], last[:, -6:])


@needs_hopper
def test_as_a_backend():
    x, weight, bias, past, residual, relu = make("cuda", 2, 20, 70, 64, 64)
    out = conv3x3(x, weight, bias, past=past, residual=residual, relu=relu, backend="hopper")
    assert torch.equal(out, conv3x3_hopper.conv3x3(x, weight, bias, past, residual, relu))
    _, folded, _ = make_folded("cuda", 2, 20, 70, 64, 64)
    assert torch.equal(upsample_conv(x, folded, backend="hopper"), conv3x3_hopper.upsample_conv(x, folded, False))
    with pytest.raises(NotImplementedError, match="hopper: the output must have a multiple of 64 channels"):
        conv3x3(x, weight[:3].contiguous(memory_format=torch.channels_last), past=past, backend="hopper")
