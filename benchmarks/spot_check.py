"""Is what was timed right? A few tiles of a result against float32 attention from the bool mask alone."""
import math

import torch
from torch import Tensor

from flashvsr_kernels import BLOCK

from .cases import Work

WORST = .03  # of the RMS: bf16 attention has 2e-3 to 5e-3, a wrong list or scale 0.1 to 1


def error(result: Tensor | tuple[Tensor, ...], heads_first: bool, work: Work) -> float:
    """RMS error over RMS, the worst of the first, middle and last query tile; backward also a tile of dk, dv. Infinite
    if something is not a number.
    """
    found = result if isinstance(result, tuple) else (result,)
    if heads_first:
        found = [x.transpose(1, 2) for x in found]
    H, Mq = work.dense.shape[1:3]
    pairs = []
    for h, m in ((0, 0), (H // 2, Mq // 2), (H - 1, Mq - 1)):
        row = _Row(work, h, m)
        pairs.append((found[0][0, _tokens(m), h], row.out if len(found) == 1 else row.dq))
    if len(found) == 3:
        h = H - 1
        n = work.dense[0, h].sum(0).argmax().item()  # the key block with most rows
        rows = [_Row(work, h, m) for m in work.dense[0, h, :, n].nonzero().flatten().tolist()]
        for i, x in enumerate(found[1:]):
            true = sum((row.of_key(n)[i] for row in rows), torch.zeros(1, device=x.device))
            pairs.append((x[0, _tokens(n), h], true))
    worst = torch.stack([((got.float() - true).square().mean() / true.square().mean().clamp(min=1e-20)).sqrt()
                         for got, true in pairs]).max()  # of torch: NaN if one is
    return math.inf if worst.isnan() else worst.item()


def _tokens(block: int) -> slice:
    return slice(block * BLOCK, (block + 1) * BLOCK)


class _Row:
    """Attention of one query block: out and dq (128, D)."""

    def __init__(self, work: Work, h: int, m: int):
        self.keys = work.dense[0, h, m].nonzero().flatten()
        self.q, self.grad = work.q[0, _tokens(m), h].float(), work.grad[0, _tokens(m), h].float()
        k, v = (x[0, :, h].view(-1, BLOCK, x.shape[3])[self.keys].flatten(0, 1).float()
                for x in (work.k, work.v))
        self.scale = work.case.D ** -0.5
        self.p = (self.q @ k.T * self.scale).softmax(-1)
        self.out = self.p @ v
        self.ds = self.p * (self.grad @ v.T - (self.grad * self.out).sum(-1, keepdim=True))
        self.dq = self.ds @ k * self.scale

    def of_key(self, n: int) -> tuple[Tensor, Tensor]:
        """What this row adds to dk and dv of key block n."""
        at = _tokens((self.keys == n).nonzero().item())
        return self.ds[:, at].T @ self.q * self.scale, self.p[:, at].T @ self.grad
