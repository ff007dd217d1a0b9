"""What ptxas makes of the CUDA kernels, for every architecture: no spills, no local memory, registers within
bounds.

Needs nvcc but no GPU. Shared memory is held to the smallest architecture's limit by a static_assert in the
source.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
pytestmark = [pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
              pytest.mark.skipif(not SOURCES, reason="not run from a source tree")]
# Of a thread, by the kernel's last template argument: D of attention. With 128 it is all there are, and two blocks of
# 128 threads share 65536: there the gate is that nothing spills. With 64 it is 203 to 223, by architecture. Of
# convolutions halves of 64 channels, for blocks of 128 threads each; a norm, behind causal_conv3d, has none: 0.
REGISTERS = {"sparse_attn": {128: 255, 64: 232}, "conv3x3": {1: 224, 2: 224}, "conv3d": {1: 232, 2: 232, 0: 48}}
ARCHS = {"80", "86", "89", "90", "100", "120"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_resources(source, tmp_path):
    """As setup.py compiles it: PTX of sm_80, and machine code for each architecture from it."""
    command = [NVCC, "-O3", "-std=c++17", "-fatbin", *(f"-gencode=arch=compute_80,code=sm_{arch}" for arch in ARCHS),
               "-Xptxas", "-v", source, "-o", tmp_path / "out.fatbin"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    kernels = re.findall(r"Compiling entry function '\w*ILb[01](?:ELi\d)??(?:ELi(\d+))?EE\w*' for 'sm_(\d+)'.*?"
                         r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
                         r".*?Used (\d+) registers",
                         told.stderr, re.S)
    kernels = [(int(by or 0), *rest) for by, *rest in kernels]
    most = REGISTERS[source.stem]
    assert len(kernels) == told.stderr.count("Compiling entry function")
    assert {(by, arch) for by, arch, *_ in kernels} == {(by, arch) for by in most for arch in ARCHS}
    for by, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), arch
        assert int(registers) <= most[by], arch
