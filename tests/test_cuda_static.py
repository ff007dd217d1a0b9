"""What ptxas made of the CUDA kernels of the extension in use, for every architecture: no local memory, so no spills;
registers within bounds.

Needs no GPU, but an extension with CUDA kernels, and cuobjdump, which Triton brings. Shared memory is held to the
smallest architecture's limit by a static_assert in the source.
"""
import importlib.util
import re
import subprocess

import pytest

from flashvsr_kernels import _native

triton = pytest.importorskip("triton", "3.6")
ARCHS = {"80", "86", "89", "90", "100", "120"}
BUILT = set(_native.facts().get("cuda", []))
pytestmark = pytest.mark.skipif(not BUILT, reason="the extension has no CUDA kernels")
# Of a thread, by the kernel's last template argument: D of attention. With 128 it is all there are, and two blocks of
# 128 threads share 65536: there the gate is that nothing spills. With 64 it is 203 to 223, by architecture. Of
# convolutions halves of 64 channels, for blocks of 128 threads each; the norm behind causal_conv3d has none: 0.
REGISTERS = {("sparse_attn", 128): 255, ("sparse_attn", 64): 232, ("conv3x3", 1): 224, ("conv3x3", 2): 224,
             ("conv3d", 1): 232, ("conv3d", 2): 232, ("normalise", 0): 48}


def resources():
    """Kernel, last argument, architecture, registers, bytes of stack and other local memory of all there are."""
    library = importlib.util.find_spec("flashvsr_kernels._C").origin
    told = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", library], capture_output=True, text=True,
                          check=True).stdout
    codes = re.findall(r"Fatbin elf code:\n=+\narch = sm_(\d+)\n(.*?)(?=\nFatbin |\Z)", told, re.S)
    names = "|".join(name for name, _ in REGISTERS)
    found = [(name, int(by or 0), arch, *map(int, sizes)) for arch, code in codes for name, by, *sizes in re.findall(
        rf"Function \w*\d({names})ILb[01](?:ELi\d)??(?:ELi(\d+))?EE\w*:\n +REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", code)]
    assert len(found) == told.count("Function ")
    return found


def test_resources():
    if not ARCHS <= BUILT:
        pytest.skip(f"the extension is built for {sorted(BUILT)} alone")
    found = resources()
    assert {one[:3] for one in found} == {(*kernel, arch) for kernel in REGISTERS for arch in ARCHS}
    for name, by, arch, registers, stack, local in found:
        assert (stack, local) == (0, 0) and registers <= REGISTERS[name, by], (name, by, arch)
