"""How close kernels must be to float64."""
import torch

from flashvsr_kernels import reference


def check_attention(out, lse, q, k, v, mask, scale=None, lse_tolerance=2e-6, roundings=0):
    """out by the rule of check, lse within lse_tolerance, absolute or relative.

    roundings: of the exact result that are allowed besides, where plain PyTorch's P needs none
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, exact_lse = reference.sparse_attn(q.double(), k.double(), v.double(), mask, scale)
    allowed = roundings * torch.finfo(out.dtype).eps / 2 * exact.abs()
    check(out, reference.sparse_attn(q, k, v, mask, scale)[0], exact, allowed=allowed)
    torch.testing.assert_close(lse, exact_lse.float(), atol=lse_tolerance, rtol=lse_tolerance)


def check_gradients(gradients, grad, q, k, v, mask, scale=None):
    """Each of the gradients of q, k and v, given that of out, by the rule of check.

    Allowed like the rounding of the result: what rounding the probabilities P and their gradients dS for the tensor
    cores may cost, each on its own, and what it does cost that backward is given out rounded. That is more than twice
    the native error only where rows or keys are few and nothing averages: never with 130 of both.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gradient, queries, keys, values = (x.double().transpose(1, 2) for x in (grad, q, k, v))

    def plain(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(reference.sparse_attn(*leaves, mask, scale)[0], leaves, grad.to(dtype))
    blocks = mask.repeat_interleave(128, 2)[:, :, :q.shape[1]].repeat_interleave(128, 3)[..., :k.shape[1]]
    p = (queries @ keys.mT * scale).masked_fill(~blocks, -torch.inf).softmax(-1).nan_to_num(0)
    out, dp = p @ values, gradient @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    moved = p * (gradient * (out.to(q.dtype) - out)).sum(-1, keepdim=True) * scale
    eps = torch.finfo(q.dtype).eps / 2
    given = [moved @ keys, moved.mT @ queries, torch.zeros_like(values)]
    products = [ds.square() @ keys.square(), ds.mT.square() @ queries.square(), p.mT.square() @ gradient.square()]
    for name, ours, native, exact, rounded_out, squares in zip(
            ("dq", "dk", "dv"), gradients, plain(q.dtype), plain(torch.float64), given, products, strict=True):
        check(ours, native, exact, name, (rounded_out.abs() + eps * squares.sqrt()).transpose(1, 2))


def check(ours, native, exact, name="out", allowed=0):
    """Maximum and RMS error each at most twice those of native, plain PyTorch's at the same dtype, + 1e-5.

    What rounding the exact result to ours' dtype may cost is always allowed: where there are few values, native may
    have hit them all by luck; and so is allowed, a tensor of that shape.
    """
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs() + allowed
    ours, native = ((x.double() - exact).abs() for x in (ours, native))
    for size in torch.Tensor.max, lambda error: error.square().mean().sqrt():
        assert size(ours) <= max(2 * size(native), size(rounding)) + 1e-5, name
