"""Block masks like FlashVSR's, with a wanted density and a wanted spread of the counts from row to row."""
import torch
from torch import Tensor

from flashvsr_kernels import local_window

SLICES = 4   # of keys: three cached and the current one, for one slice of queries
WINDOW = 11  # blocks, the model's local_range


def make_mask(rows: int, cols: int, heads: int, density: float, cv: float, seed: int = 0) -> Tensor:
    """Bool (1, heads, rows * cols, 4 * rows * cols), on the CPU, the same for the same arguments.

    rows, cols: blocks of one slice, as 768x1408 is 6 x 11
    density: rounded so that the mean count of a query block is a whole number; every head keeps the same
    total, as FlashVSR's budget is one of a head and slice
    cv: standard deviation of the counts over their mean, met within .005 where the mean is at least 16 and
    there are 256 query blocks or more. 0 gives equal counts.
    A row's count is mean * (1 + amplitude * z), z normal, held between 0 and what the local window (11 blocks
    a side, cut off at borders) allows it, and shifted per head to the wanted total; the amplitude is
    bisected until the spread is met. Within the window nearer blocks are more likely; which, is random. A
    density that the window cannot hold has none.
    Raises ValueError where no counts have that spread, such as any but 0 at density 1.
    """
    S, generator = rows * cols, torch.Generator().manual_seed(seed)
    local = local_window(rows, cols, WINDOW)
    mean = round(density * SLICES * S)
    if mean * S > SLICES * local.sum().item() or cv == 0 and mean > SLICES * local.sum(1).min().item():
        local = torch.ones_like(local)
    counts = _counts(torch.randn(heads, S, generator=generator, dtype=torch.float64),
                     SLICES * local.sum(1).expand(heads, S), mean, cv)
    y, x = torch.arange(S) // cols, torch.arange(S) % cols
    distance = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    score = torch.rand(heads, S, SLICES * S, generator=generator)
    score -= (distance / (2 * WINDOW)).repeat(1, SLICES)
    rank = score.masked_fill(~local.repeat(1, SLICES), -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < counts[..., None])[None]


def spread(mask: Tensor) -> float:
    """Standard deviation of the rows' counts over their mean."""
    count = mask.sum(-1, dtype=torch.float64)
    return (count.std(correction=0) / count.mean()).item()


def _counts(z: Tensor, most: Tensor, mean: int, cv: float) -> Tensor:
    """Whole counts (heads, S) between 0 and most, mean on average in every head, of the wanted spread."""
    def at(amplitude: float) -> Tensor:
        return _to_total(mean * (1 + amplitude * z), most, mean * z.shape[1])

    def found(counts: Tensor) -> float:
        return (counts.double().std(correction=0) / mean).item()
    if mean == 0 or cv == 0:
        return at(0)
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(at(middle)) < cv else (low, middle)
    best = min((at(low), at(high)), key=lambda counts: abs(found(counts) - cv))
    if abs(found(best) - cv) > max(.005, .2 * cv):
        raise ValueError(f"cv must be one that counts of mean {mean}, at most {most.min()} to {most.max()}, "
                         f"can have; got {cv}, nearest is {found(best):.3f}")
    return best


def _to_total(wanted: Tensor, most: Tensor, total: int) -> Tensor:
    """wanted + a shift per head, held to 0 ... most and rounded so that each head's sum is total."""
    low, high = -wanted.amax(1, keepdim=True), most.amax(1, keepdim=True) - wanted.amin(1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        less = (wanted + middle).clamp(min=0).minimum(most).sum(1, keepdim=True) < total
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    real = (wanted + high).clamp(min=0).minimum(most)
    whole = real.floor()
    # The largest remainders are rounded up, as many as the total lacks.
    up = (real - whole).argsort(1, descending=True).argsort(1)
    return (whole + (up < total - whole.sum(1, keepdim=True))).long()
