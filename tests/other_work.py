"""Launches again and again, alone on the card and beside other processes, by which they are preempted anywhere."""
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

_PROGRAM = """
import torch
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
print("started", flush=True)
while True:
    for _ in range(20):
        x @ x
    torch.cuda.synchronize()
"""
with_and_without_others = pytest.mark.parametrize("others", [0, 3], ids=["alone", "other work on the card"])


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """As many processes that multiply matrices without end; they take turns with this one."""
    running = [subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE)
               for _ in range(processes)]
    try:
        assert all(one.stdout.readline() == b"started\n" for one in running)
        yield
    finally:
        for one in running:
            one.kill()
            one.communicate()


def changed(launch: Callable[[], Tensor | tuple[Tensor, ...]], others: int, held: int = 10) -> int:
    """How many results of 500 launches have other bits than the first's.

    held: launches back to back whose results lie side by side, which the memory must allow: nothing waits for a
    comparison, and none is made between them
    """
    def results() -> tuple[Tensor, ...]:
        made = launch()
        return (made,) if isinstance(made, Tensor) else tuple(made)
    wanted, count = results(), torch.zeros((), dtype=torch.int64, device="cuda")
    assert not any(x.isnan().any() for x in wanted if x.is_floating_point())  # it would differ from itself
    with other_work(others):
        for _ in range(500 // held):
            for made in [results() for _ in range(held)]:
                for x, first in zip(made, wanted, strict=True):
                    count += (x != first).any()
        return count.item()
