"""CUDA C++ kernels on a CPU: their source, compiled for the host with cuda_on_fibers.h in the place of CUDA.

What a barrier or a wait protects is seen: copies arrive as late as they may, or as early as they can, and a warp runs
as far as the barriers let it. What ptxas makes of the source is not.
"""
import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CXX = shutil.which(os.environ.get("CXX", "c++"))


def build(source: str, folder: Path, *plants: tuple[str, str]) -> ctypes.CDLL:
    """csrc/cuda/source as a library, with each plant's first text, there or in conv_tile.h, replaced by its second.

    Its fibers_are_late(bool) says when copies arrive.
    """
    tile = (CSRC / "cuda/conv_tile.h").read_text()
    text = (CSRC / "cuda" / source).read_text().replace('#include "conv_tile.h"', tile)
    for right, wrong in plants:
        assert text.count(right) == 1, f"{right!r} is not once in {source}"
        text = text.replace(right, wrong)
    text = text.replace("#include <cuda_runtime.h>", "").replace('#include "ptx.h"', '#include "cuda_on_fibers.h"')
    text = re.sub(r"extern __shared__ .*? shared\[\];", "", text)
    text, launches = re.subn(r"(\w+)<<<(\w+), (\w+), (\w+), \w+>>>\((\w+)\);",
                             r"fibers::launch(\1, \2, \3, \4, \5);", text)
    assert launches
    text += "\nextern \"C\" void fibers_are_late(bool late) { fibers::late = late; }\n"
    (folder / "kernel.cpp").write_text(text)
    include = [f"-I{CSRC / 'cuda'}", f"-I{Path(__file__).parent}"]
    subprocess.run([CXX, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", *include,
                    folder / "kernel.cpp", "-o", folder / "kernel.so"], check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))
