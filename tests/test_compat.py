"""block_sparse_attn_func, called as FlashVSR's code calls it, against sparse_attn."""
import inspect

import pytest
import torch

from flashvsr_kernels import sparse_attn
from flashvsr_kernels.compat import block_sparse_attn_func

Lq, Lk, H, D = 200, 390, 3, 64


def arguments(B=1):
    """Positional arguments, as FlashVSR's code makes them."""
    q, k, v = (torch.randn(B * L, H, D) for L in (Lq, Lk, Lk))
    starts = [torch.arange(0, B * L + 1, L, dtype=torch.int32) for L in (Lq, Lk)]
    mask = torch.rand(B, H, 2, 4) < 0.5
    return [q, k, v, *starts, torch.ones(H, dtype=torch.int32), None, mask, Lq, Lk, 0.0]


OPTIONS = dict(deterministic=False, softmax_scale=None, is_causal=False, exact_streaming=False,
               return_attn_probs=False)


def expected(q, k, v, mask, **options):
    q, k, v = (x.unflatten(0, (len(mask), -1)) for x in (q, k, v))
    return sparse_attn(q, k, v, mask, **options).flatten(0, 1)


def test_names_and_order_are_the_packages():
    assert list(inspect.signature(block_sparse_attn_func).parameters) == [
        "q_unpad", "k_unpad", "v_unpad", "cu_seqlens_q", "cu_seqlens_k", "head_mask_type", "streaming_info",
        "base_blockmask", "max_seqlen_q_", "max_seqlen_k_", "p_dropout", "deterministic", "softmax_scale",
        "is_causal", "exact_streaming", "return_attn_probs"]


@pytest.mark.parametrize("B", [1, 2])
def test_as_flashvsr_calls_it(B):
    args = arguments(B)
    out = block_sparse_attn_func(*args, **OPTIONS)
    assert out.shape == (B * Lq, H, D)
    assert torch.equal(out, expected(*args[:3], args[7]))


def test_scale_and_deterministic():
    args = arguments()
    out = block_sparse_attn_func(*args, **OPTIONS | {"softmax_scale": 0.3, "deterministic": True})
    assert torch.equal(out, expected(*args[:3], args[7], scale=0.3))


def test_gradients():
    args = arguments(2)
    ours, theirs = ([x.clone().requires_grad_() for x in args[:3]] for _ in range(2))
    block_sparse_attn_func(*ours, *args[3:]).sin().sum().backward()
    expected(*theirs, args[7]).sin().sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_values_on_the_device_are_not_read():
    """Meta tensors have shapes and no values."""
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments()]
    assert block_sparse_attn_func(*args, **OPTIONS).shape == (Lq, H, D)


@pytest.mark.parametrize("option, value", [("is_causal", True), ("exact_streaming", True),
                                           ("return_attn_probs", True)])
def test_options_that_are_not_supported_are_named(option, value):
    with pytest.raises(NotImplementedError, match=f"{option} must be False, got {value}"):
        block_sparse_attn_func(*arguments(), **OPTIONS | {option: value})


REFUSED = {
    "dropout": (10, 0.1, NotImplementedError, "p_dropout must be 0, got 0.1"),
    "streaming": (6, torch.tensor([1, 3] * H), NotImplementedError,
                  "streaming_info must be None, got tensor"),
    "no mask": (7, None, NotImplementedError, "base_blockmask must be a mask for every head, got None"),
    "a dense head": (7, torch.ones(1, H - 1, 2, 4, dtype=torch.bool), NotImplementedError,
                     r"base_blockmask must be \(B, 3, Mq, Mk\) .* got \(1, 2, 2, 4\)"),
    "head types": (5, torch.ones(H + 1, dtype=torch.int32), NotImplementedError, r"got .* and \(4,\)"),
    "two sequences": (3, torch.tensor([0, 120, Lq]), NotImplementedError,
                      r"cu_seqlens_q must be \(2,\) .* got \(3,\) and 200"),
    "a shorter sequence": (9, Lk + 1, NotImplementedError,
                           "k_unpad have 1 times max_seqlen_k_ = 391 tokens, got .* and 390"),
    "padded": (0, torch.zeros(1, Lq, H, D), ValueError, r"q_unpad must be .* got \(1, 200, 3, 64\)"),
    "mask of bytes": (7, torch.ones(1, H, 2, 4, dtype=torch.uint8), ValueError, "mask must be bool"),
    "mask of other blocks": (7, torch.ones(1, H, 2, 5, dtype=torch.bool), ValueError,
                             r"mask must be bool \(1, 3, 2, 4\)"),
}


@pytest.mark.parametrize("at, value, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(at, value, error, message):
    args = arguments()
    args[at] = value
    with pytest.raises(error, match=message):
        block_sparse_attn_func(*args, **OPTIONS)
