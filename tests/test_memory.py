"""keep_freed_memory, in processes of its own."""
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from flashvsr_model import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(31_000_000)
before = faults()
for _ in range(5): torch.ones(30_000_000)
print(int(kept), faults() - before)
"""


def run(word: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return int(kept), int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_used_again():
    """In one of a few processes: a small block that lands in the gap sends the next large one elsewhere."""
    plain = run("plain")[1]
    runs = (run("keep") for _ in range(12))
    assert any(kept == 1 and faults < plain / 4 for kept, faults in runs)
