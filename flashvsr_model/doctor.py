"""flashvsr doctor: what this machine has, which backend of every op runs, and what to install to change that.
"""
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata, util

import torch

from flashvsr_kernels import __version__, backends


def report() -> list[str]:
    """The lines of `flashvsr doctor`."""
    table = backends()
    lines = [f"{name:<10}{text}" for name, text in _facts()]
    lines += ["", f"{'op':<22}{'runs':<12}why not the others"]
    for op, state in table.items():
        lines += _op_lines(op, state)
    return lines + ["", "to change that"] + [f"- {line}" for line in _advice(table)]


def _facts() -> list[tuple[str, str]]:
    facts = [("flashvsr", f"{__version__} ({os.cpu_count()} CPU cores, "
                          f"{torch.get_num_threads()} threads in torch)"),
             ("python", f"{platform.python_version()} on {platform.platform()}"),
             ("torch", f"{torch.__version__}" + (f", built for CUDA {torch.version.cuda}"
                                                 if torch.version.cuda else ", built without CUDA")),
             ("triton", metadata.version("triton") if util.find_spec("triton") else "not installed"),
             ("compiler", _tool("c++", "--version")), ("nvcc", _tool("nvcc", "--version")),
             ("PyAV", metadata.version("av"))]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, "
                                      f"{gpu.total_memory / 2**30:.0f} GiB"))
    return facts if torch.cuda.device_count() else facts + [("GPU", _no_gpu())]


def _no_gpu() -> str:
    if shutil.which("nvidia-smi"):
        return "none that torch can use, but nvidia-smi is here"
    return "none"


def _tool(name: str, flag: str) -> str:
    """The tool's path and the line of its answer that has the version, or that it is missing or does not run.
    """
    path = shutil.which(name)
    if path is None:
        return f"no {name} on PATH"
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    version = next((line for line in lines if "release" in line),
                   lines[0] if lines else f"exit {done.returncode}")
    return f"{path}: {version}"


def _op_lines(op: str, state: dict[str, str | None]) -> list[str]:
    """What runs op where the model would be loaded: on a GPU if there is one. "cpu" is for tensors on the CPU
    alone.
    """
    gpu = torch.cuda.is_available()
    usable = {name: reason or ("for tensors on the CPU" if gpu and name == "cpu" else None)
              for name, reason in state.items()}
    runs = next((name for name, reason in usable.items() if reason is None), None)
    lines, label = [], f"{op:<22}{runs or 'NONE':<12}"
    for name, reason in usable.items():
        if name != runs:
            lines.append(f"{label}{name}: {reason or f'can run too; {runs} goes first'}")
            label = " " * len(label)
    return lines or [label.rstrip()]


def _advice(table: dict[str, dict[str, str | None]]) -> list[str]:
    refused = {name for state in table.values() for name, reason in state.items() if reason is not None}
    lines = []
    if not torch.cuda.is_available():
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            lines.append("this torch has no CUDA: install the one that pytorch.org names for your driver")
        elif torch.version.cuda is not None and shutil.which("nvidia-smi"):
            lines.append("torch has CUDA but sees no GPU: check the driver with nvidia-smi")
        else:
            lines.append("GPU backends: an NVIDIA GPU (compute capability 8.0 or later), its driver, "
                         "a torch with CUDA")
    if "cpu" in refused:
        compiler = "" if shutil.which("c++") else "a C++ compiler (Debian: apt install g++), then "
        lines.append(f"C++ kernels: {compiler}pip install --no-build-isolation . in the source folder")
    if "cuda" in refused and torch.cuda.is_available():
        nvcc = "" if shutil.which("nvcc") else "the CUDA toolkit's nvcc on PATH, then "
        lines.append(f"CUDA kernels: {nvcc}pip install --no-build-isolation . in the source folder")
    if torch.cuda.is_available():
        lines += sorted({f"Triton kernels: {reason}" for state in table.values() for name, reason in state.items()
                         if name == "triton" and reason is not None})
    return lines or ["nothing: " + ("the others need another GPU" if refused else "every backend runs here")]
