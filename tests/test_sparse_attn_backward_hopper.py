"""The source of the gradients for sm_90 on a CPU, its partitions as threads, against float64. On a GPU:
test_sparse_attn_backward.
"""
import math

import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

from flashvsr_kernels import BlockMask, reference, sparse_attn_backward_hopper
from tests.error_rule import check_gradients
from tests.gluon_on_threads import Launcher, planted

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"whole blocks": (1, 384, 512, 2, 64), "partial blocks": (2, 300, 515, 1, 64), "one": (1, 1, 1, 1, 64),
          "D 128": (1, 260, 300, 1, 128)}


def prepare(grad, out, lse):
    """Stands for the Triton kernel's: rows without keys and past the end have an infinite lse and no weights."""
    B, L, H, _ = grad.shape
    rows = -(-L // 128) * 128
    delta, lse2 = torch.zeros(B * H, rows), torch.full((B * H, rows), math.inf)
    delta[:, :L] = (grad.float() * out.float()).sum(-1).transpose(1, 2).flatten(0, 1)
    lse2[:, :L] = torch.where(lse == -math.inf, math.inf, lse / math.log(2)).flatten(0, 1)
    return delta, lse2


def transpose_lists(index, count, key_blocks):
    lists = BlockMask(index, count, count.flatten(), key_blocks).transposed(backend="reference")
    return lists.index, lists.count, lists.order


def launchers(module):
    return {late: {name: Launcher(module, name, late, programs=None) for name in ("dkv_kernel", "dq_kernel")}
            for late in ("products", "copies")}


THREADS = launchers(sparse_attn_backward_hopper)


def on_threads(module, kernels, monkeypatch):
    stand_ins = kernels | {"prepare": prepare, "transpose_lists": transpose_lists}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(module, name, stand_in)
    return module


@pytest.fixture(params=["late products", "late copies"])
def kernels(request, monkeypatch):
    return on_threads(sparse_attn_backward_hopper, THREADS[request.param.split()[1]], monkeypatch)


def make(B, Lq, Lk, H, D, dtype=torch.bfloat16, density=.6):
    grad, q, k, v = (torch.randn(B, L, H, D).to(dtype) for L in (Lq, Lq, Lk, Lk))
    return grad, q, k, v, torch.rand(B, H, -(-Lq // 128), -(-Lk // 128)) < density


def check(kernels, grad, q, k, v, mask):
    lists, scale = BlockMask.from_dense(mask), q.shape[-1] ** -.5
    out, lse = reference.sparse_attn(q.float(), k.float(), v.float(), mask, scale)
    got = kernels.backward(grad, q, k, v, out.to(q.dtype), lse, lists.index, lists.count, lists.order, scale)
    check_gradients(got, grad, q, k, v, mask)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_float64_reference(kernels, dtype, shape):
    check(kernels, *make(*shape, dtype))


def test_empty_rows_columns_and_heads(kernels):
    grad, q, k, v, mask = make(1, 300, 500, 3, 64, density=.9)
    mask[:, 1] = mask[:, 0, 1] = mask[:, 2, :, 2] = mask[:, 2, 0] = False
    check(kernels, grad, q, k, v, mask)


MISTAKES = {
    "none": ("", ""),
    "queries freed while they are read": ("dk = warpgroup_mma_wait(2, deps=[dk])\n            _free(before)",
                                          "_free(before)\n            dk = warpgroup_mma_wait(2, deps=[dk])"),
    "keys freed while they are read": ("dq = warpgroup_mma_wait(0, deps=[dq])\n        _free(j & 1)",
                                       "_free(j & 1)\n        dq = warpgroup_mma_wait(0, deps=[dq])"),
    "a slot filled before it is free": ("+ part >= S:", "+ part > S:"),
    "a round of the ring not told from the next": ("phase ^ 1", "phase"),
    "own keys read before they are there": ("mbarrier.wait(own, 0)\n        if W == 1:", "if W == 1:"),
    "no fence before a store": ("fence_async_shared()\n    _meet()\n    _store(dk", "_meet()\n    _store(dk"),
    "a store before all have written": ("_meet()\n    _store(dq", "_store(dq"),
    "keys past the end have weights": ("gl.where(j == n - 1, edge, 128)", "128")}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_threads_find_mistakes(mistake, tmp_path, monkeypatch):
    (right, wrong), found = mistake, []
    mistaken = planted(sparse_attn_backward_hopper, right, wrong, tmp_path, monkeypatch)
    grad, q, k, v, mask = make(1, 700, 900, 1, 64)
    q, k = q.abs() + 3, -k.abs() - 3  # a key past the end, of zeros, would weigh more than float32 can say
    # Whether a mistake shows can depend on which thread runs when: more than one try.
    for made in [*launchers(mistaken).values()] * (10 if right else 1):
        if any(found):
            break
        try:
            check(on_threads(mistaken, made, monkeypatch), grad, q, k, v, mask)
            found.append(False)
        except (AssertionError, RuntimeError, TypeError):  # the last of sums that are not complete
            found.append(True)
    assert any(found) == bool(right)
