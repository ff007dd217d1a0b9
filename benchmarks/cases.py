"""What the attention benchmarks run: shapes, masks, and the inputs of a case."""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flashvsr_kernels import BLOCK, BlockMask

from .masks import SLICES, make_mask, spread

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS = {"fwd": 2, "bwd": 5}  # matrix products of 2 D 128^2 FLOP a block; repeated ones do not count
TILE = 128                       # output pixels a block covers in each direction
MODEL_DENSITY = 120              # key blocks a query block keeps on average, at any size (sparse_ratio 2)


@dataclass(frozen=True)
class Case:
    """One shape, mask and direction, for B = 1.

    picture: output "HEIGHTxWIDTH", so S = H W / 16384 query blocks and 4 S key blocks    dtype: key of DTYPES
    """
    picture: str
    density: float
    cv: float
    direction: str = "fwd"
    heads: int = 12
    D: int = 128
    dtype: str = "bf16"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks in a slice."""
        height, width = (int(side) for side in self.picture.split("x"))
        return height // TILE, width // TILE

    @property
    def key(self) -> str:
        """Names the case, the same in every run."""
        return (f"{self.direction}/{self.picture}/h{self.heads}/d{self.D}/{self.dtype}"
                f"/density{self.density:g}/cv{self.cv:g}")


def model_density(picture: str) -> float:
    """Fraction of blocks that the model keeps at this size."""
    rows, cols = Case(picture, 1, 0).grid
    return MODEL_DENSITY / (SLICES * rows * cols)


def grid(device: str, quick: bool = False) -> list[Case]:
    """The cases of a device, "cuda" or "cpu", all or a few."""
    if device == "cpu":
        shape = dict(picture="256x384", heads=2)
        spots = [(.45, .175)] if quick else [(.13, .175), (.45, 0), (.45, .175), (1, 0)]
        return [Case(**shape, density=d, cv=cv, direction=direction, dtype=dtype)
                for direction in PRODUCTS for d, cv in spots for dtype in ("fp32", "bf16")]
    main, larger = "768x1408", ("1408x2560", "2048x3840")
    model = round(model_density(main), 4)
    densities = (model,) if quick else (.06, .13, .25, model, 1)
    spreads = (.05, .175) if quick else (0, .05, .175, .3)
    cases = [Case(main, d, cv, direction) for direction in PRODUCTS for d in densities for cv in spreads
             if d < 1 or cv == 0]
    cases += [Case(picture, round(model_density(picture), 4), .175, direction)
              for direction in PRODUCTS for picture in larger if not quick or direction == "fwd"]
    if not quick:
        cases += [Case(main, model, .23)]  # attention's goal names it
        cases += [Case(main, model, .175, direction, D=D, dtype=dtype) for direction in PRODUCTS
                  for D, dtype in ((128, "fp16"), (64, "bf16"), (64, "fp16"))]
    return cases


@dataclass(frozen=True, eq=False)
class Work:
    """The inputs of a case, made once and shared by all contestants.

    q, grad: (1, Lq, H, D)    k, v: (1, Lk, H, D)    all normal random
    dense: bool (1, H, Mq, Mk), on the device    mask: our lists of it
    """
    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    dense: Tensor
    mask: BlockMask

    @classmethod
    def of(cls, case: Case, device: str) -> "Work":
        dense = make_mask(*case.grid, case.heads, case.density, case.cv).to(device)
        generator = torch.Generator(device).manual_seed(1)
        Mq, Mk = dense.shape[2:]
        q, k, v, grad = (
            torch.randn(1, blocks * BLOCK, case.heads, case.D, device=device, generator=generator)
            .to(DTYPES[case.dtype]) for blocks in (Mq, Mk, Mk, Mq))
        return cls(case, q, k, v, grad, dense, BlockMask.from_dense(dense, columns=case.grid[1]))

    @cached_property
    def density(self) -> float:
        return self.dense.float().mean().item()

    @cached_property
    def cv(self) -> float:
        return spread(self.dense)

    @property
    def flop(self) -> float:
        """Of the kept blocks alone: 4 D 128^2 a block forward, 2.5 times that backward."""
        return PRODUCTS[self.case.direction] * 2 * self.case.D * BLOCK * BLOCK * self.dense.sum().item()

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """index (1, H, Mq, Mk), count (1, H, Mq), int32: for peers; past count, the other blocks."""
        return lists(self.dense)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """index (1, H, Mk, Mq), count (1, H, Mk), int32."""
        return lists(self.dense.transpose(2, 3))


def lists(dense: Tensor) -> tuple[Tensor, Tensor]:
    """index (..., columns) and count (...), int32, of a bool mask: kept columns ascending, packed left."""
    index = (~dense).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return index.contiguous(), dense.sum(-1, dtype=torch.int32).contiguous()
