"""Norm, rotary position and block means in Triton: in the interpreter on CPU tensors, and on a GPU."""
import pytest
import torch

pytest.importorskip("triton", "3.6")

from flashvsr_kernels import qk_norm_rope, qkv_norm_rope, reference, rope_table, rope_triton
from tests.error_rule import check
from tests.interpreter import device  # noqa: F401: a fixture
from tests.other_work import changed, with_and_without_others

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# B, H, D, grid
SIZES = {"compact": (1, 2, 64, (2, 8, 16)), "official's heads": (1, 12, 128, (2, 8, 8)),
         "two batches": (2, 3, 64, (4, 8, 8)), "one head": (1, 1, 128, (2, 16, 8)), "16 heads": (1, 16, 64, (2, 8, 8))}
REAL = {"official": (1, 12, 128, (2, 48, 88)), "first chunk": (1, 12, 128, (6, 48, 88)),
        "compact": (1, 2, 64, (2, 48, 80))}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture
def long_steps(device, monkeypatch):
    """The interpreter's time is that of steps, however long."""
    if device == "cpu":
        config = rope_triton.config
        monkeypatch.setattr(rope_triton, "config", lambda D: config(D) | {"R": 64})


def make(device, B, H, D, grid, dtype=torch.float16, first=1000):
    """qkv, q_weight, k_weight, tables, head_dim; the first latent, row and column at position first."""
    side = D // 6
    tables = tuple(rope_table(torch.arange(first, first + n), pairs).to(device)
                   for n, pairs in zip(grid, (D // 2 - 2 * side, side, side)))
    L = grid[0] * grid[1] * grid[2]
    qkv = (2 * torch.randn(B, L, 3 * H * D) + 0.5).to(device, dtype)
    weights = (1 + 0.3 * torch.randn(2, H * D)).to(device, dtype)
    return qkv, *weights, tables, D


def places(qkv, D, count):
    """A slot in the middle of as many rings, NaN all over."""
    B, L, width = qkv.shape
    rings = torch.full((count, B, 3 * L, width // 3 // D, D), NAN, dtype=qkv.dtype, device=qkv.device)
    return rings, rings[:, :, L:2 * L]


def run(qkv, q_weight, k_weight, tables, D, places=None):
    """q, k, v, q_mean, k_mean"""
    if places is None:
        places = [qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3 // D, D)) for _ in range(3)]
    q, k, v = places
    return q, k, v, *rope_triton.qkv_norm_rope(qkv, q_weight, k_weight, tables, D, 1e-6, q, k, v)


def check_all(results, qkv, q_weight, k_weight, tables, D):
    native = reference.qkv_norm_rope(qkv, q_weight, k_weight, tables, D, 1e-6)
    exact = reference.qkv_norm_rope(qkv.double(), q_weight.double(), k_weight.double(), tables, D, 1e-6)
    for name, ours, plain, wide in zip(("q", "k", "v", "q_mean", "k_mean"), results, native, exact, strict=True):
        assert ours.shape == wide.shape and ours.dtype == qkv.dtype
        check(ours, plain, wide, name)
    assert torch.equal(results[2], native[2])


@with_dtypes
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_float64_reference(device, long_steps, size, dtype):
    call = make(device, *size, dtype)
    check_all(run(*call), *call)


@pytest.mark.gpu
@with_dtypes
@pytest.mark.parametrize("size", REAL.values(), ids=REAL.keys())
def test_real_sizes(size, dtype):
    call = make("cuda", *size, dtype)
    results = run(*call)
    check_all(results, *call)
    assert all(torch.equal(*pair) for pair in zip(results, run(*call)))


def test_steps_of_the_gpu(device):
    call = make(device, 1, 1, 128, (2, 8, 8), torch.bfloat16)
    check_all(run(*call), *call)


def test_every_token_has_its_own_position(device, long_steps):
    """All tokens are the same, so that what differs is the position: by the block, then inside it."""
    qkv, q_weight, k_weight, tables, D = make(device, 1, 1, 64, (4, 16, 24), torch.float32, first=3)
    qkv[...] = qkv[:, :1]
    results = run(qkv, q_weight, k_weight, tables, D)
    check_all(results, qkv, q_weight, k_weight, tables, D)
    assert len(results[0].flatten(2).unique(dim=1)[0]) == 4 * 16 * 24


def test_one_of_the_three_has_the_same_bits(device, long_steps):
    qkv, q_weight, k_weight, tables, D = make(device, 2, 3, 64, (2, 8, 16))
    q, k, _, q_mean, k_mean = run(qkv, q_weight, k_weight, tables, D)
    for x, weight, wanted, wanted_mean in zip(qkv.chunk(3, -1), (q_weight, k_weight), (q, k), (q_mean, k_mean)):
        out = torch.empty_like(wanted)
        mean = rope_triton.qk_norm_rope(x, weight, tables, D, 1e-6, out)
        assert torch.equal(out, wanted) and torch.equal(mean, wanted_mean) and mean.is_contiguous()


def test_into_slots(device, long_steps):
    """What is around the input is not read, and around the slots not written."""
    qkv, *rest = call = make(device, 2, 2, 64, (2, 8, 16))
    wide = torch.full((2, qkv.shape[1] + 7, qkv.shape[2] + 24), NAN, dtype=qkv.dtype, device=device)
    wide[:, 3:-4, 8:-16] = qkv
    rings, slots = places(qkv, call[-1], 3)
    results = run(wide[:, 3:-4, 8:-16], *rest, places=slots)
    assert all(torch.equal(*pair) for pair in zip(results, run(*call)))
    L = qkv.shape[1]
    assert rings[:, :, :L].isnan().all() and rings[:, :, 2 * L:].isnan().all()


def test_other_strides(device, long_steps):
    """Heads before tokens, an odd distance between tokens, and an odd first address."""
    qkv, *rest = call = make(device, 2, 2, 64, (2, 8, 8))
    B, L, width = qkv.shape
    q = qkv.new_empty((B, 2, L, 64)).transpose(1, 2)
    k = qkv.new_empty((B, L, 2, 67))[..., 3:]
    v = qkv.new_empty((L, B, 2, 64)).transpose(0, 1)
    x = torch.nn.functional.pad(qkv, (1, 2), value=NAN)[..., 1:-2]
    assert not any(y.is_contiguous() for y in (x, q, k, v))
    for result, wanted in zip(run(x, *rest, places=(q, k, v)), run(*call)):
        assert torch.equal(result, wanted)


def test_means_are_of_what_is_written(device, long_steps):
    q, k, _, q_mean, k_mean = run(*make(device, 1, 2, 64, (2, 8, 16), torch.float16))
    for x, mean in (q, q_mean), (k, k_mean):
        exact = x.double().view(1, 2, 128, 2, 64).mean(2).transpose(1, 2)
        assert (mean.double() - exact).abs().max() <= 2 ** -11 * exact.abs().max() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_operators_with_kernels(training):
    qkv, q_weight, k_weight, tables, D = make("cuda", 1, 2, 64, (2, 8, 16), torch.bfloat16)
    qkv, q_weight, k_weight = (x.detach().requires_grad_(training) for x in (qkv, q_weight, k_weight))
    ops, check = torch.ops.flashvsr, torch.library.opcheck
    check(ops.qkv_norm_rope.default, (qkv, q_weight, k_weight, *tables, D, 1e-6, "triton"))
    check(ops.qk_norm_rope.default, (qkv[..., :128], q_weight, *tables, D, 1e-6, "triton"))
    if not training:
        _, (k, v) = places(qkv, D, 2)
        check(ops.qkv_norm_rope_into.default, (qkv, q_weight, k_weight, *tables, D, 1e-6, k, v, "triton"))


@pytest.mark.gpu
def test_what_the_kernels_do_not_take():
    for size, message in (((1, 17, 64, (2, 8, 8)), "at most 16 heads"), ((1, 4, 32, (2, 8, 8)), "head_dim 64 or 128")):
        with pytest.raises(NotImplementedError, match=message):
            qkv_norm_rope(*make("cuda", *size), backend="triton")
    qkv, q_weight, k_weight, tables, D = make("cuda", 1, 2, 64, (2, 8, 8))
    with pytest.raises(NotImplementedError, match="contiguous in their last dimension"):
        qkv_norm_rope(qkv.repeat_interleave(2, 2)[..., ::2], q_weight, k_weight, tables, D, backend="triton")
    apart = torch.randn_like(q_weight).repeat_interleave(2)[::2]
    for weights in (apart, k_weight), (q_weight, q_weight[:1].expand(128)):
        with pytest.raises(NotImplementedError, match="and weights and tables in all"):
            qkv_norm_rope(qkv, *weights, tables, D, backend="triton")
    with pytest.raises(NotImplementedError, match="and weights and tables in all"):
        qk_norm_rope(qkv[..., :128], apart, tables, D, backend="triton")
    with pytest.raises(NotImplementedError, match="triton: has no torch.float64"):
        qkv_norm_rope(qkv.double(), q_weight.double(), k_weight.double(), tables, D, backend="triton")


@pytest.mark.gpu
@with_and_without_others
def test_same_bits_500_times(others):
    qkv, q_weight, k_weight, tables, D = make("cuda", *REAL["official"], torch.bfloat16)
    rings, slots = places(qkv, D, 2)

    def launch():
        q, k, v, q_mean, k_mean = qkv_norm_rope(qkv, q_weight, k_weight, tables, D, out=tuple(slots), backend="triton")
        return q, k.clone(), v.clone(), q_mean, k_mean, *qk_norm_rope(qkv[..., :1536], q_weight, tables, D,
                                                                     backend="triton")
    assert changed(launch, others, held=4) == 0


@pytest.mark.gpu
def test_in_a_graph():
    """New contents, and new positions in the same tables."""
    qkv, q_weight, k_weight, tables, D = make("cuda", 1, 12, 128, (2, 16, 16), torch.bfloat16)
    rings, slots = places(qkv, D, 2)

    def step():
        q, k, _, q_mean, k_mean = qkv_norm_rope(qkv, q_weight, k_weight, tables, D, out=tuple(slots), backend="triton")
        return q, q_mean, k_mean, qk_norm_rope(qkv[..., :1536], q_weight, tables, D, backend="triton")[0]
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    qkv.normal_()
    tables[0].copy_(rope_table(torch.tensor([7, 8]), 22))
    rings.fill_(NAN)
    graph.replay()
    kept = [x.clone() for x in (*results, slots)]
    assert all(torch.equal(*pair) for pair in zip((*step(), slots), kept)) and slots.isfinite().all()
