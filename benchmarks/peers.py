"""What can be timed on a case: our backends, dense attention, and other packages' block-sparse kernels.

A contestant is made from a Work by a builder, which returns a function of q, k, v, the tensors it wants as q,
k, v (its own layout, made outside the clock) and whether those put heads first. The backward is the
function's, through autograd. All get the same lists. Packages are imported when they are asked for.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr_kernels import BLOCK, backends, sparse_attn

from .cases import DTYPES, Work, lists

OURS = ("hopper", "triton", "cuda", "cpu", "reference")
GEMM = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product's rate others are held against
DENSE = {"cuda": "cudnn", "cpu": "sdpa"}  # dense attention on all keys: ideal is its time x the density
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Built = tuple[Attention, tuple[Tensor, Tensor, Tensor], bool]


@dataclass(frozen=True)
class Contestant:
    """call: starts one run, returns out (fwd) or dq, dk, dv (bwd)    heads_first: their layout"""
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    heads_first: bool


def missing(name: str) -> str | None:
    """Why a peer cannot be imported, or None."""
    module = PEERS[name][0]
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        if importlib.util.find_spec(".".join(parts[:end])) is None:
            return f"{name}: {module} is not installed"
    return None


def contestant(name: str, work: Work) -> Contestant:
    """One of OURS or PEERS on this case.

    Raises NotImplementedError with the reason if it cannot run it, ImportError if it is not installed, and
    whatever another package raises for a call it does not take.
    """
    if name in OURS:
        call, tensors, heads_first = _ours(name, work)
    elif reason := missing(name):
        raise ImportError(reason)
    else:
        call, tensors, heads_first = PEERS[name][1](work)
    if work.case.direction == "fwd":
        return Contestant(lambda: call(*tensors), heads_first)
    if name in FORWARD_ONLY:
        raise NotImplementedError(f"{name} has no backward")
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    grad = _heads_first(work.grad) if heads_first else work.grad
    return Contestant(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), heads_first)


def gemm(device: str, dtype: str) -> tuple[Callable[[], Tensor], float]:
    """The product of two square matrices, and its FLOP: bf16 on a GPU, the case's dtype on a CPU."""
    n, kind = GEMM[device], DTYPES["bf16" if device == "cuda" else dtype]
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n ** 3


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _ours(name: str, work: Work) -> Built:
    if work.case.direction == "bwd":
        table = backends()["sparse_attn_backward"]
        if reason := table.get(name, "has no backward of its own"):
            raise NotImplementedError(f"{name}: {reason}")
    return (lambda q, k, v: sparse_attn(q, k, v, work.mask, backend=name)), (work.q, work.k, work.v), False


def _dense(work: Work) -> Built:
    return F.scaled_dot_product_attention, tuple(map(_heads_first, (work.q, work.k, work.v))), True


def _cudnn(work: Work) -> Built:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)
    return attend, _dense(work)[1], True


def _masked(work: Work) -> Built:
    """Dense attention with the mask spread over tokens: PyTorch's way of saying the same."""
    tokens = work.dense.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    return (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=tokens)), _dense(work)[1], True


def _flex(work: Work) -> Built:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    # One compiled function serves all cases: shapes, dtypes and directions add up to more than the default of
    # 8. The backward is run again and again on one graph, so it may not hand its saved tensors' memory on.
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False
    index, count = work.lists
    none = torch.zeros_like(count), torch.zeros_like(index)
    mask = BlockMask.from_kv_blocks(*none, count, index, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return (lambda q, k, v: compiled(q, k, v, block_mask=mask)), _dense(work)[1], True


def _fa4(work: Work) -> Built:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    def tensors(index: Tensor, count: Tensor) -> BlockSparseTensorsTorch:
        return BlockSparseTensorsTorch(mask_block_cnt=torch.zeros_like(count), mask_block_idx=index,
                                       full_block_cnt=count, full_block_idx=index, block_size=(BLOCK, BLOCK))
    forward, backward = tensors(*work.lists), tensors(*work.transposed)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, block_sparse_tensors=forward, block_sparse_tensors_bwd=backward)[0]
    return attend, (work.q, work.k, work.v), False


def _fastvideo(work: Work) -> Built:
    from fastvideo_kernel import block_sparse_attn_from_indices
    # Its blocks are 64 x 64. The wheel bundles a libcuda: beside another driver, link it to the system's.
    index, count = lists(work.dense.repeat_interleave(2, 2).repeat_interleave(2, 3))
    sizes = torch.full((index.shape[3],), BLOCK // 2, dtype=torch.int32, device=index.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attn_from_indices(q, k, v, index, count, sizes)[0]
    return attend, _copies(work), True


def _flashinfer(work: Work) -> Built:
    from flashinfer import VariableBlockSparseAttentionWrapper
    (H, Mq, Mk), device = work.dense.shape[1:], work.q.device
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(2 ** 28, dtype=torch.uint8, device=device))
    rows, cols = (torch.full((H, blocks), BLOCK, dtype=torch.int32, device=device) for blocks in (Mq, Mk))
    wrapper.plan(work.dense[0], rows, cols, H, H, work.case.D, q_data_type=work.q.dtype)
    return (lambda q, k, v: wrapper.run(q[0], k[0], v[0])[None]), _copies(work), True


def _block_sparse_attention(work: Work) -> Built:
    from block_sparse_attn import block_sparse_attn_func
    (_, Lq, H, _), Lk, device = work.q.shape, work.k.shape[1], work.q.device
    at_q, at_k = (torch.tensor([0, L], dtype=torch.int32, device=device) for L in (Lq, Lk))
    types = torch.ones(H, dtype=torch.int32, device=device)  # every head by its own block mask
    rest = at_q, at_k, types, None, work.dense, Lq, Lk, 0.0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attn_func(q[0], k[0], v[0], *rest)[None]
    return attend, (work.q, work.k, work.v), False


def _copies(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_heads_first(x).contiguous() for x in (work.q, work.k, work.v))


PEERS: dict[str, tuple[str, Callable[[Work], Built]]] = {
    "cudnn": ("torch", _cudnn), "sdpa": ("torch", _dense), "sdpa-masked": ("torch", _masked),
    "flex": ("torch", _flex), "fa4": ("flash_attn.cute", _fa4), "fastvideo": ("fastvideo_kernel", _fastvideo),
    "flashinfer": ("flashinfer", _flashinfer), "bsa": ("block_sparse_attn", _block_sparse_attention)}
FORWARD_ONLY = ("flashinfer",)
EXACT = ("cudnn", "sdpa")  # attend to all keys: no mask, so not compared with our results
