"""What a measurement ran on: said first by every benchmark, kept in its JSON."""
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "av", "pillow", "scipy", "imageio-ffmpeg",
            "flash-attn-4", "fastvideo-kernel", "flashinfer-python", "block-sparse-attn")  # the last four: attention's peers


def describe() -> dict[str, str]:
    """Processor and GPU, thread count, versions of what was installed, and the repository's commit."""
    facts = {"cpu": f"{cpu_name()} ({os.cpu_count()} threads, torch uses {torch.get_num_threads()})"}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts | {"commit": commit()}


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the machine type."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.machine()


def instructions() -> str:
    """The best of the instruction sets that our C++ is built for, by what Linux says of the processor: "avx512bf16",
    "avx512", "avx2" or "generic".
    """
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    known = (("avx512bf16", {"avx512_bf16", "avx512vl"}), ("avx512", {"avx512f"}), ("avx2", {"avx2", "fma"}))
    return next((name for name, needed in known if needed <= flags), "generic")


def commit() -> str:
    """The short commit, with "+" if tracked files differ from it, or "unknown" outside a git repository."""
    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    if head.returncode:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def gpu_state() -> dict[str, float | str]:
    """SM clock (MHz), power drawn and allowed (W), degrees C of the current GPU, or why they are unknown."""
    fields = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    gpu = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return {"unknown": "no nvidia-smi here"}
    if told.returncode:
        return {"unknown": (told.stderr or told.stdout).strip()}
    return dict(zip(fields, (_number(word) for word in told.stdout.split(","))))


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word.strip()  # nvidia-smi says [N/A] for what a GPU cannot tell
