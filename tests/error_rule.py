"""How close an attention kernel must be to float64."""
import torch

from flashvsr_kernels import reference


def check_attention(out, lse, q, k, v, mask, scale=None, lse_tolerance=2e-6):
    """Maximum and RMS error of out each at most twice plain PyTorch's at the same dtype, + 1e-5; lse within
    lse_tolerance, absolute or relative.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, exact_lse = reference.sparse_attn(q.double(), k.double(), v.double(), mask, scale)
    native = (reference.sparse_attn(q, k, v, mask, scale)[0].double() - exact).abs()
    ours = (out.double() - exact).abs()
    assert ours.max() <= 2 * native.max() + 1e-5
    assert ours.square().mean().sqrt() <= 2 * native.square().mean().sqrt() + 1e-5
    torch.testing.assert_close(lse, exact_lse.float(), atol=lse_tolerance, rtol=lse_tolerance)
