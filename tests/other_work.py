"""Other processes on the card, so that kernels under test are preempted anywhere."""
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def other_work(processes: int = 3) -> Iterator[None]:
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
