"""The compiled part: the ops of flashvsr_kernels._C, and the facts of their build (flashvsr_kernels._build).
"""

import functools
import importlib
import importlib.util
import re

import torch

_BUILD = "install torch>=2.11, setuptools>=77 and a C++ compiler, then: pip install --no-build-isolation ."


def _load() -> str | None:
    spec = importlib.util.find_spec("flashvsr_kernels._C")
    if spec is None:
        return f"flashvsr_kernels._C is not built ({_BUILD})"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"flashvsr_kernels._C does not load ({error}); build it again: {_BUILD}"
    return None


_refusal = _load()


def available() -> str | None:
    """None if the C++ ops (flashvsr::sparse_attn_cpu, ...) can be called, else the reason in one line."""
    return _refusal or _has("sparse_attn_cpu", "C++", "FLASHVSR_BUILD_CPU")


def cuda_available() -> str | None:
    """None if the CUDA ops (flashvsr::sparse_attn_cuda, ...) can run on this GPU, else the reason in one line."""
    reason = _refusal or _has("sparse_attn_cuda", "CUDA", "FLASHVSR_BUILD_CUDA")
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device, or this torch is built without CUDA"
    if reason is None and torch.cuda.get_device_capability() < (8, 0):
        reason = f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
    if reason is None and not _made_for(torch.cuda.get_device_capability()):
        reason = (f"flashvsr_kernels._C is built for {', '.join(facts()['cuda'])}, which {torch.cuda.get_device_name()} "
                  "does not run (build it again, FLASHVSR_CUDA_ARCHS tells for what)")
    return reason


@functools.cache  # asked at each call of an op
def _made_for(capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled: machine code of its major version and no higher minor one, or PTX of no
    higher version. Yes where the facts of the build are missing.
    """
    for arch in facts().get("cuda", ["0+PTX"]):
        number, ptx = re.fullmatch(r"(\d+)[a-z]?(\+PTX)?", arch).groups()
        made_for = divmod(int(number), 10)
        if made_for <= capability and (ptx or made_for[0] == capability[0]):
            return True
    return False


def built(op: str) -> str | None:
    """None if flashvsr::op is in flashvsr_kernels._C, which is here, else the reason in one line."""
    return None if hasattr(torch.ops.flashvsr, op) else f"flashvsr_kernels._C is built without {op} (build it again)"


def _has(op: str, part: str, switch: str) -> str | None:
    if hasattr(torch.ops.flashvsr, op):
        return None
    return f"flashvsr_kernels._C is built without {part} kernels (build it again with {switch}=1)"


def facts() -> dict[str, str | list[str]]:
    """What was compiled: version, torch, compiler, cpu (instruction sets), nvcc and cuda (architectures).

    "" or [] where a part is not built; {"missing": the reason} where the module with the facts is not built.
    """
    if importlib.util.find_spec("flashvsr_kernels._build") is None:
        return {"missing": f"flashvsr_kernels._build is not built (it also needs Python.h: {_BUILD})"}
    return importlib.import_module("flashvsr_kernels._build").facts()
