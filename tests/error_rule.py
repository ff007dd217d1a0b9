"""How close kernels must be to float64."""
import torch

from flashvsr_kernels import reference


def check_attention(out, lse, q, k, v, mask, scale=None, lse_tolerance=2e-6):
    """out by the rule of check, lse within lse_tolerance, absolute or relative."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, exact_lse = reference.sparse_attn(q.double(), k.double(), v.double(), mask, scale)
    check(out, reference.sparse_attn(q, k, v, mask, scale)[0], exact)
    torch.testing.assert_close(lse, exact_lse.float(), atol=lse_tolerance, rtol=lse_tolerance)


def check_gradients(gradients, grad, q, k, v, mask, scale=None):
    """Each of the gradients of q, k and v, given that of out, by the rule of check."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def plain(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(reference.sparse_attn(*leaves, mask, scale)[0], leaves, grad.to(dtype))
    for name, ours, native, exact in zip(("dq", "dk", "dv"), gradients, plain(q.dtype), plain(torch.float64)):
        check(ours, native, exact, name)


def check(ours, native, exact, name="out"):
    """Maximum and RMS error each at most twice those of native, plain PyTorch's at the same dtype, + 1e-5.

    What rounding the exact result to ours' dtype may cost is always allowed: where there are few values, native may
    have hit them all by luck.
    """
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs()
    ours, native = ((x.double() - exact).abs() for x in (ours, native))
    for size in torch.Tensor.max, lambda error: error.square().mean().sqrt():
        assert size(ours) <= max(2 * size(native), size(rounding)) + 1e-5, name
