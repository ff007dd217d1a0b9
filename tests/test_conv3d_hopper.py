"""The Gluon convolution for sm_90 against float64: its source on a CPU, on threads, and the kernel on a GPU."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", "3.6")

from flashvsr_kernels import backends, causal_conv3d, conv3d_hopper, reference
from tests import gluon_on_threads, interpreter
from tests.error_rule import check
from tests.other_work import changed, with_and_without_others
from tests.replayed import check_replays

NAN = float("nan")
# B, T, H, W, C, O
SHAPES = {"whole tiles": (1, 2, 32, 16, 64, 128), "partial tiles": (2, 4, 19, 13, 72, 200),
          "least": (1, 2, 16, 8, 8, 8), "odd number of tiles": (1, 2, 48, 8, 64, 264)}
REFUSAL = backends()["causal_conv3d"]["hopper"]
WAYS = {"pixels": dict(PT=2, OT=1, WS=6), "channels": dict(PT=1, OT=2, WS=5)}


def needs_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


def make(B, T, H, W, C, O, dtype, device, context=True, norm=True):
    x, tail = (torch.randn(B, t, H, W, C, device=device).to(dtype) for t in (T, 2))
    weight = torch.randn(O, C, 4 if context else 2, 3, 3, device=device) / (C * 20) ** 0.5
    weight = weight.to(dtype).to(memory_format=torch.channels_last_3d)
    bias, gamma = torch.randn(O, device=device).to(dtype), torch.rand(O, device=device).add(0.5).to(dtype)
    return x, weight, bias, tail if context else None, gamma if norm else None


def border(x, tail, edges, *sizes, **constants):
    """What _edges does."""
    whole = x if tail is x else torch.cat([tail, x], 1)
    W = whole.shape[3]
    left, right = [0, *range(7)], [*range(W - 7, W), W - 1]
    edges.copy_(torch.stack([whole[:, :, :, left], whole[:, :, :, right]], 2).flatten(0, 1))


def normalise(out, squares, gamma):
    """What normalise does."""
    y = out.float() / (squares.sum(0).view(out.shape[:-1]) / out.shape[-1] + 1e-24).sqrt()[..., None] * gamma.float()
    out.copy_(F.silu(y))


def language():
    """What gluon_on_threads has of Gluon, and what else this kernel uses."""
    def load(pointer, mask, other):
        return torch.where(mask, pointer.elements[torch.where(mask, pointer.offset, 0)], other)

    def store(pointer, values, mask=torch.tensor(True)):
        mask = mask.expand(values.shape)
        pointer.elements[pointer.offset.expand(values.shape)[mask]] = values[mask]

    def assembly(text, constraints, arguments, **_):
        return arguments[0] if text.startswith("mov") else gluon_on_threads.LANGUAGE.inline_asm_elementwise(
            text, constraints, arguments)
    more = dict(load=load, store=store, inline_asm_elementwise=assembly, minimum=min, maximum=max, sum=torch.sum,
                cast=lambda value, dtype: int(value))
    return SimpleNamespace(**vars(gluon_on_threads.LANGUAGE) | more)


def on_threads(module, late):
    """What lets module's launcher run on CPU tensors: names and their stand-ins."""
    kernel = gluon_on_threads.Launcher(module, "conv3d_kernel", late)
    kernel.function.__globals__["gl"] = language()
    edges = type("Launcher", (), {"__getitem__": lambda self, grid: border})()
    return dict(conv3d_kernel=kernel, _edges=edges, normalise=normalise,
                processors=lambda device: kernel.programs)


def replace(monkeypatch, module, names):
    for name, value in names.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture(params=["late products", "late copies", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        return pytest.skip(str(REFUSAL)) if REFUSAL else "cuda"
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    replace(monkeypatch, conv3d_hopper, on_threads(conv3d_hopper, request.param.split()[1]))
    return "cpu"


def check_call(*call):
    out = conv3d_hopper.forward(*call)
    assert out.dtype == call[0].dtype and out.is_contiguous()
    exact = reference.causal_conv3d(*(None if x is None else x.double() for x in call))
    check(out, reference.causal_conv3d(*call), exact)


@pytest.mark.parametrize("context", [True, False], ids=["context and norm", "neither"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64_reference(device, monkeypatch, shape, way, context):
    monkeypatch.setattr(conv3d_hopper, "config", lambda *_: way)
    check_call(*make(*shape, torch.bfloat16, device, context, context))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_fp16(device, monkeypatch, way):
    monkeypatch.setattr(conv3d_hopper, "config", lambda *_: way)
    check_call(*make(*SHAPES["least"], torch.float16, device))


MISTAKES = {
    "none": ("", ""),
    "pixels overwritten while they are read": ("PT=2, OT=1, WS=6", "PT=2, OT=1, WS=7"),
    "weights overwritten while they are read": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "weights read before they are there": ("mbarrier.wait(w_full.index(k % WS), k // WS & 1)", "pass"),
    "pixels read before they are there": ("mbarrier.wait(x_full.index(step % X_SLOTS), step // X_SLOTS & 1)", "pass"),
    "another view": ("* 18 + dy)", "* 18 + 2 - dy)"),
    "the wrong border": ("gl.cast(right, gl.int32)", "0"),
    "no border": ("if left | right:", "if left & right:")}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_threads_find_mistakes(mistake, tmp_path, monkeypatch):
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    (right, wrong), found = mistake, []
    mistaken = gluon_on_threads.planted(conv3d_hopper, right, wrong, tmp_path, monkeypatch)
    call = make(1, 2, 17, 9, 128, 24, torch.float16, "cpu")
    # Whether a mistake shows can depend on which thread runs when: more than one try.
    for names in [on_threads(mistaken, late) for late in ("products", "copies")] * (10 if right != wrong else 1):
        if any(found):
            break
        replace(monkeypatch, mistaken, names)
        try:
            found.append(not torch.allclose(mistaken.forward(*call), reference.causal_conv3d(*call), atol=0.02))
        except (AssertionError, RuntimeError):
            found.append(True)
    assert any(found) == (right != wrong)


@pytest.mark.interpret
@pytest.mark.parametrize("context", [True, False], ids=["context", "no context"])
def test_edges(context):
    interpreter.repair()
    x, _, _, tail, _ = make(2, 4, 3, 9, 24, 8, torch.float16, "cpu", context)
    x = F.pad(x, (0, 8), value=NAN)[..., :24]
    tail = x if tail is None else tail
    got, wanted = torch.empty(2, 2 * (6 if context else 4), 2, 3, 8, 24, dtype=x.dtype)
    conv3d_hopper._edges[(len(got) * 2, 3)](x, tail, got, *x.stride()[:4], *tail.stride()[:4], 2 if context else 0,
                                            6 if context else 4, 3, 9, 24, N=16)
    border(x, tail, wanted)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("tiles, O, chosen", [(132, 2048, 2), (66, 3072, 2), (66, 2048, 2), (33, 3072, 1)],
                         ids=["two clips, layer 1", "two clips, layer 2", "one clip, layer 1", "one clip, layer 2"])
def test_real_sizes_fill_an_h100_evenly(tiles, O, chosen):
    found = conv3d_hopper.config(tiles, O, 132)
    assert found["PT"] == chosen
    assert -(-tiles // found["PT"]) * -(-O // (128 * found["OT"])) % 132 == 0


def test_strided_input_and_tail_of_the_same_clip(device):
    x, weight, bias, _, gamma = make(2, 4, 20, 8, 72, 24, torch.bfloat16, device)
    wide = F.pad(x, (8, 16), value=NAN)[..., 8:-16]
    for one, other in ((x, wide), (wide, x)):
        results = [conv3d_hopper.forward(clip, weight, bias, clip[:, 2:], gamma) for clip in (one, other)]
        assert results[0].isfinite().all() and torch.equal(*results)


def test_nothing_outside_is_read(device):
    """All tensors lie in NaN; what the kernel reads beyond them shows."""
    def surrounded(x, order):
        memory = torch.full((x.numel() + 2 ** 16,), NAN, dtype=x.dtype, device=x.device)
        inside = memory[2 ** 15:2 ** 15 + x.numel()].view([x.shape[i] for i in order])
        return inside.copy_(x.permute(order)).permute([order.index(i) for i in range(x.ndim)])
    call = make(1, 2, 17, 9, 72, 136, torch.bfloat16, device)
    orders = (0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0,), (0, 1, 2, 3, 4), (0,)
    wanted = conv3d_hopper.forward(*call)
    assert wanted.isfinite().all() and torch.equal(conv3d_hopper.forward(*map(surrounded, call, orders)), wanted)


def test_nan_reaches_its_neighbours_alone(device):
    x, weight, bias, tail, _ = make(1, 4, 32, 24, 64, 24, torch.bfloat16, device)
    clean = conv3d_hopper.forward(x, weight, bias, tail, None)
    x[0, 1, 20, 9, 3] = NAN  # both outputs have this step among their four
    out = conv3d_hopper.forward(x, weight, bias, tail, None)
    assert out[0, :, 19:22, 8:11].isnan().all() and out.isnan().sum() == 2 * 9 * 24
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_bits_depend_neither_on_the_way_nor_on_other_clips(device, monkeypatch):
    x, weight, bias, tail, gamma = make(2, 4, 16, 16, 64, 136, torch.bfloat16, device)
    results = []
    for way in WAYS.values():
        monkeypatch.setattr(conv3d_hopper, "config", lambda *_: way)
        results.append(conv3d_hopper.forward(x, weight, bias, tail, gamma))
    second = conv3d_hopper.forward(x[1:, 2:], weight, bias, x[1:, :2], gamma)
    assert torch.equal(*results) and torch.equal(second, results[0][1:, 1:])


@needs_hopper
@pytest.mark.parametrize("sizes", [(1, 8, 768, 2048), (1, 4, 2048, 3072), (1, 2, 2048, 3072)],
                         ids=["layer 1", "layer 2", "layer 2, one clip"])
def test_real_sizes(sizes):
    """Some channels against float64, as all would take minutes."""
    B, T, C, O = sizes
    x, weight, bias, tail, _ = make(B, T, 48, 88, C, O, torch.bfloat16, "cuda")
    out, few = conv3d_hopper.forward(x, weight, bias, tail, None), [0, 1, 127, 128, O // 2 + 1, O - 1]
    call = x, weight[few].contiguous(memory_format=torch.channels_last_3d), bias[few], tail, None
    exact = reference.causal_conv3d(*(None if value is None else value.double() for value in call))
    check(out[..., few], reference.causal_conv3d(*call), exact)


@needs_hopper
@with_and_without_others
@pytest.mark.parametrize("T, O, context", [(4, 512, True), (2, 3072, True), (4, 512, False)],
                         ids=["pixels", "channels", "no context"])
def test_same_bits_500_times(T, O, context, others):
    call = make(1, T, 48, 88, 256, O, torch.bfloat16, "cuda", context)
    assert changed(lambda: conv3d_hopper.forward(*call), others) == 0


@needs_hopper
def test_graph():
    x, weight, bias, tail, gamma = make(1, 4, 32, 24, 64, 128, torch.bfloat16, "cuda")
    check_replays(lambda: (conv3d_hopper.forward(x, weight, bias, tail, gamma),), (x, tail))


@needs_hopper
@pytest.mark.parametrize("change, message", [
    (lambda x: F.pad(x, (0, 1))[..., :-1], "rows of x must be 16-byte aligned"),
    (lambda x: x[:, :, :15], "pictures must have 16 rows and 8 columns at least"),
], ids=["alignment", "height"])
def test_what_cannot_run_is_refused_with_the_reason(change, message):
    x, weight, bias, tail, _ = make(1, 2, 16, 8, 64, 64, torch.bfloat16, "cuda")
    with pytest.raises(NotImplementedError, match=message):
        causal_conv3d(change(x), weight, bias, change(tail), backend="hopper")
