"""Block lists and the selection in Triton, interpreted and on a GPU, against PyTorch and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from flashvsr_kernels import BlockMask, block_mask, block_mask_triton, lcsa_mask, local_window, reference
from tests import interpreter
from tests.other_work import changed, with_and_without_others

on_each_device = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# B, H, D, rows and columns of a slice, window, slices, seen slices, topk
SIZES = {"66x264": (1, 1, 128, 6, 11, 11, 1, 4, 7919), "two batches, 3 slices": (2, 2, 64, 3, 2, 3, 3, 3, 25),
         "odd D": (1, 2, 48, 5, 4, 3, 2, 3, 100), "one pair": (1, 1, 64, 1, 1, 1, 1, 1, 1),
         "budget 1": (1, 3, 64, 2, 2, 2, 1, 3, 1),
         "budget beyond the pairs": (1, 2, 64, 3, 2, 3, 1, 2, 10 ** 10),
         "budget one below the pairs": (1, 2, 64, 3, 2, 9, 1, 2, 71),
         "more keys than a tile": (1, 1, 64, 10, 13, 11, 1, 4, 15_599)}


@pytest.fixture(autouse=True, scope="module")
def interpreter_fit_for_tests():
    interpreter.repair()


def same_lists(ours, theirs, key_blocks):
    """index as far as it is listed, count and order are equal."""
    listed = torch.arange(ours[0].shape[-1], device=ours[0].device) < theirs[1][..., None]
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in ours)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    assert torch.equal(ours[0].where(listed, key_blocks), theirs[0].where(listed, key_blocks))


def check_lists(dense):
    Mq = dense.shape[2]
    for columns in {None, *(n for n in (1, 2, 9, 11, 30) if Mq and Mq % n == 0)}:
        same_lists(block_mask_triton.block_lists(dense, columns), block_mask._lists_reference(dense, columns),
                   dense.shape[-1])


@on_each_device
@settings(max_examples=12, deadline=None)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
       density=st.sampled_from([0, 0.1, 0.5, 0.9, 1]), seed=st.integers(0, 999))
def test_any_mask(device, shape, density, seed):
    dense = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).to(device)
    dense[:, :, 0] = False
    dense[:, :, -1] |= density > 0
    check_lists(dense)
    lists = block_mask._lists_reference(dense)
    lists[0].masked_fill_(torch.arange(shape[3], device=device) >= lists[1][..., None], 2 ** 31 - 1)
    same_lists(block_mask_triton.transpose_lists(*lists[:2], shape[3]),
               block_mask._lists_reference(dense.transpose(2, 3)), shape[2])


@on_each_device
@pytest.mark.parametrize("shape", [(1, 12, 66, 264), (1, 2, 200, 33), (1, 1, 3, 1100), (2, 5, 0, 7),
                                   (1, 2, 3, 0)], ids=lambda shape: "x".join(map(str, shape)))
def test_real_and_odd_shapes(device, shape):
    """Interpreted, the real one with four heads: the ranks of one group, which take two rounds."""
    B, H, *blocks = shape
    check_lists(torch.rand(B, H if device == "cuda" else min(H, 4), *blocks, device=device) < 0.45)


@on_each_device
def test_strided_mask(device):
    dense = torch.rand(3, 10, 70, 4, device=device) < 0.45
    check_lists(dense.permute(3, 0, 1, 2)[:, 1:, ::3, 5:])
    check_lists(dense[:1, :4].expand(2, -1, -1, -1))  # three groups of ranks


def make(B, H, D, rows, cols, window, slices, seen, topk, dtype, device, exact=False):
    """Arguments of lcsa_mask. exact: float32 holds each sum of products, so that no order of summation shows,
    but bf16 does not.
    """
    sizes = [(B, H, n * rows * cols, D) for n in (slices, seen)]
    if exact:
        q, k = torch.randint(-9, 10, sizes[0]), torch.randint(-9, 10, sizes[1]) / 16
    else:
        q, k = (torch.randn(size) for size in sizes)
        q *= torch.rand(B, H, slices * rows * cols, 1) * 3  # peaked and flat rows
    local = local_window(rows, cols, window, device=device)
    return q.to(device, dtype), k.to(device, dtype), local, slices, topk


def check_selection(lists, q, k, local, slices, topk, ulps):
    """Kept is what float64 keeps, unless a probability is as large as the threshold up to the rounding of a
    softmax in float32 and ulps of the scores in their dtype. The lists are those of what is kept.
    """
    B, H, Mq, D = q.shape
    kept = BlockMask(*lists, k.shape[2]).to_dense()
    same_lists(lists, block_mask._lists_reference(kept), k.shape[2])
    score = ((q.cpu() @ k.cpu().transpose(-1, -2)) / D ** 0.5).double()
    slack = 1e-5 + ulps * torch.finfo(q.dtype).eps * (score.abs() + score.abs().amax(-1, keepdim=True))
    score = score.masked_fill(~local.cpu().repeat(slices, k.shape[2] // len(local)), -torch.inf)
    p, slack, kept = (x.reshape(B, H, slices, -1) for x in (score.log_softmax(-1), slack, kept.cpu()))
    rank = p.shape[-1] - min(p.shape[-1] - 1, topk)
    threshold, at = p.kthvalue(rank, dim=-1, keepdim=True)
    tie = (p - threshold).abs() <= slack + slack.gather(-1, at)
    assert torch.equal(kept | tie, (p > threshold) | tie)
    assert (kept.sum(-1) <= topk).all()
    assert not kept[p == -torch.inf].any()


@on_each_device
@pytest.mark.parametrize("dtype, exact", [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False),
                                          (torch.bfloat16, True), (torch.float32, True)],
                         ids=["bf16", "fp16", "fp32", "bf16, exact sums", "fp32, exact sums"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_selection(device, size, dtype, exact):
    call = make(*size, dtype, device, exact)
    check_selection(block_mask_triton.lcsa_mask(*call), *call, ulps=0 if exact else 1)


@on_each_device
@pytest.mark.parametrize("tile", [(16, 32, 8), (32, 64, 4), (64, 128, 8)], ids=lambda x: f"{x[0]}x{x[1]}")
def test_every_tile(device, tile, monkeypatch):
    monkeypatch.setattr(block_mask_triton, "_score_tile", lambda *call: tile)
    call = make(1, 1, 64, 7, 10, 5, 1, 2, 3000, torch.float16, device, exact=True)
    check_selection(block_mask_triton.lcsa_mask(*call), *call, ulps=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("size", [(1, 12, 128, 6, 11, 11, 1, 4, 7919), (1, 12, 128, 6, 11, 11, 3, 3, 7919),
                                  (1, 12, 128, 15, 32, 11, 1, 4, 57_599),
                                  (2, 12, 128, 15, 32, 9, 3, 3, 57_599)],
                         ids=["768x1408", "768x1408 first chunk", "2048x3840", "2048x3840 first chunk"])
def test_selection_at_full_size(size, dtype):
    call = make(*size, dtype, "cuda")
    lists = block_mask_triton.lcsa_mask(*call)
    check_selection(lists, *call, ulps=1)
    for _ in range(3):
        same_lists(block_mask_triton.lcsa_mask(*call), lists, call[1].shape[2])


@on_each_device
def test_strided_means_and_local_window(device):
    q, k, local, slices, topk = make(2, 2, 64, 3, 2, 3, 2, 3, 25, torch.float32, device)
    wanted = block_mask_triton.lcsa_mask(q, k, local, slices, topk)
    views = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (q, k)]
    views.append(torch.stack([local, ~local], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0])
    assert not any(x.is_contiguous() for x in views)
    same_lists(block_mask_triton.lcsa_mask(*views, slices, topk), wanted, k.shape[2])


@on_each_device
@pytest.mark.parametrize("topk", [1, 40, 200])
def test_many_ties(device, topk):
    q, k = (torch.randint(0, 2, (1, 3, n, 4)).to(device, torch.float16) for n in (12, 24))
    call = q, k, local_window(3, 4, 3, device=device), 1, topk
    check_selection(block_mask_triton.lcsa_mask(*call), *call, ulps=0)


@on_each_device
@pytest.mark.parametrize("window, topk", [(9, 10), (9, 10 ** 6), (2, 10), (3, 70)])
def test_all_scores_equal(device, window, topk):
    """Then probabilities are 1 / allowed keys: what is equal to the threshold goes, all of it."""
    q, k = torch.zeros(1, 2, 6, 64, device=device), torch.zeros(1, 2, 24, 64, device=device)
    local = local_window(2, 3, window, device=device)
    kept = BlockMask(*block_mask_triton.lcsa_mask(q, k, local, 1, topk), 24).to_dense()
    assert torch.equal(kept, reference.lcsa_mask(q, k, local, 1, topk))
    assert kept.any() == (window != 9)


@on_each_device
@pytest.mark.parametrize("topk", [1, 300, 1151, 10 ** 6])
def test_more_candidates_than_a_chunk(device, topk):
    """Probabilities so close that all have one first digit: the others tell them apart, chunk by chunk."""
    q, k = torch.randn(1, 2, 24, 64) / 1000, torch.randn(1, 2, 48, 64)
    call = q.to(device), k.to(device), torch.ones(24, 24, dtype=torch.bool, device=device), 1, topk
    p = (q @ k.transpose(-1, -2) / 8).softmax(-1)
    assert len((p.view(torch.int32) >> block_mask_triton.TOP.value).unique()) == 1
    assert p[0, 0].numel() > 4 * block_mask_triton.CHUNK
    lists = block_mask_triton.lcsa_mask(*call)
    check_selection(lists, *call, ulps=0)
    left_out = min(topk, 1151) - lists[1].sum((0, 2))  # only those that are equal in float32
    assert ((left_out >= 0) & (left_out <= 3)).all()


@on_each_device
def test_probability_too_small_for_a_normal_number_is_kept(device):
    q, k = torch.zeros(1, 1, 1, 64, device=device), torch.zeros(1, 1, 4, 64, device=device)
    q[..., 0], k[0, 0, :, 0] = 8, torch.tensor([200, 110, 103, 0], device=device)  # exp of 0, -90, -97, -200
    index, count, order = block_mask_triton.lcsa_mask(q, k, local_window(1, 1, 1, device=device), 1, 3)
    assert (count.item(), index[0, 0, 0, :3].tolist()) == (3, [0, 1, 2])


@on_each_device
def test_underflowed_probability_is_never_kept(device):
    q, k = torch.zeros(1, 1, 1, 64, device=device), torch.zeros(1, 1, 4, 64, device=device)
    q[..., 0], k[0, 0, 0, 0] = 100, 100
    index, count, order = block_mask_triton.lcsa_mask(q, k, local_window(1, 1, 1, device=device), 1, 3)
    assert (count.item(), index[..., 0].item(), order.item()) == (1, 0, 0)


@on_each_device
@pytest.mark.parametrize("what", ["no allowed key", "NaN", "infinity"])
@pytest.mark.parametrize("topk", [5, 23, 24, 25, 60])
def test_rows_without_probabilities(device, topk, what):
    """Their NaN counts as the largest probability, as in PyTorch: it uses up the budget and is not kept."""
    q, k, local, slices, _ = make(1, 2, 64, 2, 2, 2, 2, 3, 0, torch.float32, device)
    if what == "no allowed key":
        local[1:3] = False  # 24 NaN in each slice
    else:
        q[:, 0, 1], q[:, 0, 5:8:2] = float(what[:3].lower()), float(what[:3].lower())
    kept = BlockMask(*block_mask_triton.lcsa_mask(q, k, local, slices, topk), 12).to_dense()
    assert torch.equal(kept, reference.lcsa_mask(q, k, local, slices, topk))


@pytest.mark.gpu
def test_a_cuda_graph_sees_new_contents_and_nothing_waits():
    calls = [make(1, 12, 128, 6, 11, 11, 1, 4, 7919, torch.bfloat16, "cuda") for _ in range(3)]
    q, k, local, slices, topk = (x.clone() if isinstance(x, torch.Tensor) else x for x in calls[0])

    def masks():
        mask = lcsa_mask(q, k, local, slices=slices, topk=topk)
        return mask, mask.transposed(), BlockMask.from_dense(mask.to_dense())
    masks()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = masks()
    for call in calls + calls[:1]:
        q.copy_(call[0])
        k.copy_(call[1])
        graph.replay()
        for ours, wanted in zip(replayed, masks()):
            same_lists(*((x.index, x.count, x.order) for x in (ours, wanted)), wanted.key_blocks)


@pytest.mark.gpu
@with_and_without_others
def test_same_bits_500_times(others):
    """Entries past count are whatever the memory held."""
    q, k, local, slices, topk = make(1, 12, 128, 6, 11, 11, 1, 4, 7919, torch.bfloat16, "cuda")

    def launch():
        results = []
        mask = lcsa_mask(q, k, local, slices=slices, topk=topk, backend="triton")
        for lists in (mask, mask.transposed(), BlockMask.from_dense(mask.to_dense(), backend="triton")):
            past = torch.arange(lists.index.shape[-1], device="cuda") >= lists.count[..., None]
            results += [lists.index.masked_fill(past, 0), lists.count, lists.order]
        return results
    assert changed(launch, others) == 0


@pytest.mark.gpu
def test_operators_on_a_gpu():
    q, k, local, slices, topk = make(1, 2, 64, 3, 2, 3, 3, 3, 25, torch.bfloat16, "cuda")
    ops = torch.ops.flashvsr
    torch.library.opcheck(ops.lcsa_mask.default, (q.requires_grad_(), k, local, slices, topk, 3, "triton"))
    mask = lcsa_mask(q, k, local, slices=slices, topk=topk, backend="triton")
    torch.library.opcheck(ops.transposed_lists.default, (mask.index, mask.count, k.shape[2], "triton"))
    torch.library.opcheck(ops.block_lists.default, (torch.rand(1, 2, 18, 20, device="cuda") < 0.5, 6, "triton"))
