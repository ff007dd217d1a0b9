"""BlockMask, the window, and the selection against a slow one written from the definition."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_kernels import BlockMask, lcsa_mask, local_window


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.floats(0, 1),
       st.integers(0, 999))
def test_lists_and_back(B, H, Mq, Mk, density, seed):
    dense = torch.rand(B, H, Mq, Mk, generator=torch.Generator().manual_seed(seed)) < density
    mask = BlockMask.from_dense(dense)
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.transposed().to_dense(), dense.transpose(-1, -2))
    assert mask.density() == pytest.approx(dense.float().mean().item())
    counts = mask.count.flatten(1).gather(1, mask.order.long())
    assert ((counts.diff(dim=1) <= 0).all()
            and torch.equal(mask.order.sort(-1).values[0], torch.arange(H * Mq).int()))
    for row, count in zip(mask.index.view(-1, Mk), mask.count.flatten()):
        assert (row[:count].diff() > 0).all()


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
], ids=["dtype", "size", "edge", "heads", "slices", "topk"])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
