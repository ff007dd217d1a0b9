"""Drop-in for what FlashVSR's own code calls of the package Block-Sparse-Attention: only the import changes.

    from flashvsr_kernels.compat import block_sparse_attn_func
"""
from torch import Tensor

from .sparse_attn import sparse_attn


def block_sparse_attn_func(q_unpad: Tensor, k_unpad: Tensor, v_unpad: Tensor, cu_seqlens_q: Tensor,
                           cu_seqlens_k: Tensor, head_mask_type: Tensor, streaming_info: Tensor | None,
                           base_blockmask: Tensor, max_seqlen_q_: int, max_seqlen_k_: int, p_dropout: float,
                           deterministic: bool = False, softmax_scale: float | None = None,
                           is_causal: bool = False, exact_streaming: bool = False,
                           return_attn_probs: bool = False) -> Tensor:
    """Attention over the 128x128 blocks that base_blockmask marks, for B sequences of one length, end to end.

    q_unpad: (B * Lq, H, D)    k_unpad, v_unpad: (B * Lk, H, D)    dtypes and D as in sparse_attn
    cu_seqlens_q, cu_seqlens_k: (B + 1,), where each sequence begins, and the total
    head_mask_type: (H,), all 1: every head has its block mask
    base_blockmask: bool (B, H, ceil(Lq / 128), ceil(Lk / 128))
    max_seqlen_q_, max_seqlen_k_: Lq and Lk    softmax_scale: of the scores, 1 / sqrt(D) if None
    deterministic: either; the same bits come out every time
    streaming_info, p_dropout, is_causal, exact_streaming, return_attn_probs: None, 0, False, False and False
    Returns (B * Lq, H, D). Differentiable in q_unpad, k_unpad and v_unpad.
    Values of cu_seqlens_* and head_mask_type are not read, which would wait for the device. Shapes tell: B
    times the longest sequence is the total only if all are as long, and a mask for each of H heads leaves no
    other.
    Raises NotImplementedError for what that package can do and this function cannot, and sparse_attn's
    ValueError for shapes and dtypes that do not fit together.
    """
    unsupported = {"streaming_info": (streaming_info, None), "p_dropout": (p_dropout, 0),
                   "is_causal": (is_causal, False), "exact_streaming": (exact_streaming, False),
                   "return_attn_probs": (return_attn_probs, False)}
    for name, (given, supported) in unsupported.items():
        if isinstance(given, Tensor) or given != supported:
            raise NotImplementedError(f"{name} must be {supported}, got {given}")
    if base_blockmask is None:
        raise NotImplementedError("base_blockmask must be a mask for every head, got None")
    for name, x in (("q_unpad", q_unpad), ("k_unpad", k_unpad), ("v_unpad", v_unpad)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be (tokens of all sequences, H, D), got {tuple(x.shape)}")
    H = q_unpad.shape[1]
    if head_mask_type.shape != (H,) or base_blockmask.ndim != 4 or base_blockmask.shape[1] != H:
        raise NotImplementedError(
            f"base_blockmask must be (B, {H}, Mq, Mk) and head_mask_type 1 for each of {H} heads, got "
            f"{tuple(base_blockmask.shape)} and {tuple(head_mask_type.shape)}")
    B = base_blockmask.shape[0]
    for name, x, longest in (("q", q_unpad, max_seqlen_q_), ("k", k_unpad, max_seqlen_k_)):
        starts = cu_seqlens_q if name == "q" else cu_seqlens_k
        if starts.shape != (B + 1,) or x.shape[0] != B * longest:
            raise NotImplementedError(
                f"sequences must have one length: cu_seqlens_{name} must be ({B + 1},) for base_blockmask "
                f"{tuple(base_blockmask.shape)}, and {name}_unpad have {B} times max_seqlen_{name}_ = "
                f"{longest} tokens, got {tuple(starts.shape)} and {x.shape[0]}")
    q, k, v = (x.unflatten(0, (B, -1)) for x in (q_unpad, k_unpad, v_unpad))
    return sparse_attn(q, k, v, base_blockmask, scale=softmax_scale).flatten(0, 1)
