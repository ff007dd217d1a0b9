"""The model on plain PyTorch, and block masks that are laid down instead of chosen: what exactness is measured by."""
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from flashvsr_kernels import BlockMask, lcsa_mask
from flashvsr_model import dit

_backends = sys.modules["flashvsr_kernels.backends"]  # the package's attribute of that name is a function


@contextmanager
def references() -> Iterator[None]:
    """Every op whose backend is not named runs its reference."""
    first = {op: tuple(sorted(table, key=lambda b: b.name != "reference")) for op, table in _backends._tables.items()}
    with mock.patch.dict(_backends._tables, first):
        yield


@contextmanager
def masks_recorded() -> Iterator[list[BlockMask]]:
    """The masks that the transformer chooses meanwhile."""
    chosen = []

    def record(*call, **options) -> BlockMask:
        chosen.append(lcsa_mask(*call, **options))
        return chosen[-1]
    with mock.patch.object(dit, "lcsa_mask", record):
        yield chosen


@contextmanager
def masks_imposed(masks: list[BlockMask]) -> Iterator[None]:
    """The transformer gets these masks, in this order, and takes them all."""
    rest = iter(masks)
    with mock.patch.object(dit, "lcsa_mask", lambda *call, **options: next(rest)):
        yield
    assert next(rest, None) is None
