"""BlockMask, the window, and the selection against a slow one written from the definition."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_kernels import BlockMask, _triton, block_mask, lcsa_mask, local_window


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.floats(0, 1),
       st.integers(0, 999))
def test_lists_and_back(B, H, Mq, Mk, density, seed):
    dense = torch.rand(B, H, Mq, Mk, generator=torch.Generator().manual_seed(seed)) < density
    mask = BlockMask.from_dense(dense)
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.transposed().to_dense(), dense.transpose(-1, -2))
    for lists in (mask, mask.transposed(), BlockMask.from_dense(dense.transpose(1, 2))):
        assert lists.index.is_contiguous() and lists.count.is_contiguous()
    assert mask.density() == pytest.approx(dense.float().mean().item())
    for row, count in zip(mask.index.view(-1, Mk), mask.count.flatten()):
        assert (row[:count].diff() > 0).all()


@pytest.mark.parametrize("B, H, Mq, groups", [(1, 12, 66, [132, 132, 132, 132, 264]), (3, 3, 50, [132, 132, 186]),
                                              (1, 1, 300, [132, 168]), (1, 7, 66, [132, 132, 198]), (1, 1, 5, [5]),
                                              (2, 2, 1, [4]), (1, 2, 66, [132]), (1, 4, 66, [264])], ids=str)
def test_order_takes_neighbours_in_turn(B, H, Mq, groups):
    """Inside a group the longest lists come first, equal ones by their number."""
    mask = BlockMask.from_dense(torch.rand(B, H, Mq, 20) < torch.rand(B, H, Mq, 1))
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups)).tolist()
    count = mask.count.flatten().tolist()
    wanted = sorted(range(B * H * Mq), key=lambda tile: (group[tile], -count[tile], tile))
    assert mask.order.dtype == torch.int32 and mask.order.tolist() == wanted


@pytest.mark.parametrize("rows, columns", [(6, 11), (16, 30), (3, 8), (5, 1), (1, 20)], ids=str)
def test_neighbours_are_those_of_strips(rows, columns):
    """With lists of one length, order is the picture strip by strip, 8 columns wide, of each head and slice."""
    wanted = sorted(range(rows * columns), key=lambda at: (at % columns // 8, at // columns, at % columns))
    dense = torch.ones(1, 1, rows * columns, 4, dtype=torch.bool)
    assert BlockMask.from_dense(dense, columns=columns).order.tolist() == wanted
    heads = BlockMask.from_dense(dense.expand(1, 3, -1, -1), columns=columns).order.view(3, -1)
    assert torch.equal(heads, torch.tensor(wanted) + rows * columns * torch.arange(3)[:, None])
    q = torch.randn(1, 1, rows * columns, 64)
    local = torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    mask = lcsa_mask(q, q, local, slices=1, topk=rows * columns * 2, columns=columns)
    again = BlockMask.from_dense(mask.to_dense(), columns=columns)
    assert torch.equal(mask.order, again.order)


def test_a_larger_gpu_takes_more_at_a_time(monkeypatch):
    monkeypatch.setattr(_triton, "PROCESSORS", 148)
    assert block_mask.waves(792, torch.device("cpu")) == (148, 5)


def test_operators_are_registered_right():
    ops, check = torch.ops.flashvsr, torch.library.opcheck
    q, k = torch.randn(2, 2, 12, 64, requires_grad=True), torch.randn(2, 2, 18, 64)
    check(ops.lcsa_mask.default, (q, k, local_window(3, 2, 3), 2, 30, 2, None))
    dense = torch.rand(2, 2, 12, 18) < 0.5
    check(ops.block_lists.default, (dense, 12, None))
    check(ops.transposed_lists.default, (*ops.block_lists(dense, 12, None)[:2], 18, None))


def test_compiles_to_one_graph():
    def masks(q, k, local):
        mask = lcsa_mask(q, k, local, slices=2, topk=30)
        return mask.to_dense(), mask.order, mask.transposed().to_dense(), mask.transposed().order
    call = torch.randn(1, 2, 12, 64), torch.randn(1, 2, 18, 64), local_window(3, 2, 3)
    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(compiled(*call), masks(*call)):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("edge", ["truncate", "shift"])
@pytest.mark.parametrize("rows, cols, window", [(6, 11, 11), (5, 4, 3), (4, 4, 2), (1, 1, 9), (3, 2, 4)])
def test_window(rows, cols, window, edge):
    def allowed(at: int, other: int, size: int) -> bool:
        first = at - window // 2
        if edge == "shift":
            first = min(max(first, 0), max(size - window, 0))
        return first <= other < first + window
    mask = local_window(rows, cols, window, edge=edge).view(rows, cols, rows, cols)
    for r in range(rows):
        for c in range(cols):
            for r2 in range(rows):
                for c2 in range(cols):
                    assert mask[r, c, r2, c2] == (allowed(r, r2, rows) and allowed(c, c2, cols))


def test_local_coverage_at_the_paper_size():
    assert local_window(6, 11, 11).float().mean().item() == pytest.approx(0.752, abs=5e-4)


def slow_selection(q, k, local, slices, topk):
    B, H, Mq, D = q.shape
    S, Mk = Mq // slices, k.shape[2]
    kept = torch.zeros(B, H, Mq, Mk, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for s in range(slices):
                p = []
                for a in range(s * S, s * S + S):
                    scores = [float(q[b, h, a] @ k[b, h, c]) / math.sqrt(D)
                              if local[a % S, c % S] else -math.inf
                              for c in range(Mk)]
                    top = max(scores)
                    weights = [math.exp(x - top) for x in scores]
                    p += [w / sum(weights) for w in weights]
                threshold = sorted(p, reverse=True)[min(len(p) - 1, topk)]
                kept[b, h, s * S:s * S + S] = torch.tensor([x > threshold for x in p]).view(S, Mk)
    return kept


@pytest.mark.parametrize("slices, seen, topk", [(1, 4, 30), (3, 3, 25), (1, 2, 1), (1, 4, 143),
                                                (2, 3, 10_000)])
def test_selection(slices, seen, topk):
    local = local_window(3, 2, 3)
    q, k = (torch.randn(2, 2, slices * 6, 64, dtype=torch.float64),
            torch.randn(2, 2, seen * 6, 64, dtype=torch.float64))
    mask = lcsa_mask(q, k, local, slices=slices, topk=topk)
    assert torch.equal(mask.to_dense(), slow_selection(q, k, local, slices, topk))


def test_ties_at_the_threshold_all_go():
    q, k = torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 16, 64)
    assert lcsa_mask(q, k, local_window(2, 2, 3), slices=1, topk=10).count.sum() == 0


def test_underflowed_probability_is_never_kept():
    q, k = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 4, 64)
    q[..., 0], k[0, 0, 0, 0] = 100, 100
    assert lcsa_mask(q, k, local_window(1, 1, 1), slices=1,
                     topk=3).to_dense().flatten().tolist() == [True] + 3 * [False]


@pytest.mark.parametrize("call, message", [
    (lambda: BlockMask.from_dense(torch.ones(1, 1, 6, 2, dtype=torch.bool), columns=4),
     "columns must divide the 6 blocks, got 4"),
    (lambda: lcsa_mask(torch.zeros(1, 1, 8, 64), torch.zeros(1, 1, 4, 64), local_window(2, 2, 3), slices=2, topk=3,
                       columns=8), "columns must divide the 4 blocks, got 8"),
    (lambda: BlockMask.from_dense(torch.zeros(2, 2)),
     r"dense must be bool \(B, H, Mq, Mk\), got torch.float32 \(2, 2\)"),
    (lambda: local_window(0, 2, 3), "rows, cols and window must be at least 1, got 0, 2 and 3"),
    (lambda: local_window(2, 2, 3, edge="wrap"), 'edge must be "truncate" or "shift", got \'wrap\''),
    (lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 2, 4, 64), local_window(2, 2, 3),
                       slices=1, topk=3), "q_mean and k_mean must be"),
    (lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 64), local_window(2, 2, 3),
                       slices=2, topk=3), "slices 2"),
    (lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 64), local_window(2, 2, 3),
                       slices=1, topk=0), "topk must be at least 1, got 0"),
    (lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 64).half(), local_window(2, 2, 3),
                       slices=1, topk=1), "one dtype .* got torch.float32 and torch.float16 on cpu, cpu"),
    (lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 64), local_window(2, 2, 3), slices=1,
                       topk=1, backend="cuda"), "backend of lcsa_mask must be one of triton, reference or"),
], ids=["columns", "columns of a slice", "dtype", "size", "edge", "heads", "slices", "topk", "dtypes", "backend"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_that_cannot_says_why():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    for call in (lambda: BlockMask.from_dense(mask.to_dense(), backend="triton"),
                 lambda: mask.transposed(backend="triton"),
                 lambda: lcsa_mask(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 64), local_window(2, 2, 3),
                                   slices=1, topk=1, backend="triton")):
        with pytest.raises(NotImplementedError, match="triton: .*\n.*reference: can run it"):
            call()
