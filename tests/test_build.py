"""setup.py: what it builds, what it says, and its one-line errors; the facts of the build in use."""
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashvsr_kernels
from flashvsr_kernels import BlockMask, _native

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")
# Runs setup.py as pip's isolated builds do: there is no torch.
NO_TORCH = """import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
runpy.run_path("setup.py", run_name="__main__")"""


def run_setup(*words, cwd=ROOT, torch=True, **environment):
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith("FLASHVSR_") and k not in ("CXX", "MAX_JOBS")}
    script = ["setup.py"] if torch else ["-c", NO_TORCH]
    return subprocess.run([sys.executable, "-W", "ignore", *script, "-q", *words], cwd=cwd,
                          capture_output=True, text=True, env=kept | environment)


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, so that nothing of the tree in use changes."""
    for name in ("csrc", "flashvsr_kernels", "flashvsr_model"):
        skipped = shutil.ignore_patterns("*.so", "__pycache__", "data")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("FlashVSR\n")
    return tmp_path


ERRORS = {
    "cuda-without-nvcc": ({"FLASHVSR_BUILD_CUDA": "1", "FLASHVSR_NVCC": "/no/nvcc"}, True,
                          "no nvcc (/no/nvcc)"),
    "cpu-without-compiler": ({"FLASHVSR_BUILD_CPU": "1", "CXX": "/no/c++"}, True,
                             "no C++ compiler (/no/c++)"),
    "cpu-with-broken-compiler": ({"FLASHVSR_BUILD_CPU": "1", "CXX": "false"}, True, "--version fails"),
    "cpu-without-torch": ({"FLASHVSR_BUILD_CPU": "1"}, False, "--no-build-isolation"),
    "cuda-without-torch": ({"FLASHVSR_BUILD_CUDA": "1"}, False, "--no-build-isolation"),
    "unknown-setting": ({"FLASHVSR_BUILD_CPU": "yes"}, True,
                        "FLASHVSR_BUILD_CPU must be auto, 1 or 0, got 'yes'"),
}


@pytest.mark.parametrize("environment, torch, words", ERRORS.values(), ids=ERRORS.keys())
def test_impossible_request_is_one_line(environment, torch, words):
    done = run_setup("--version", torch=torch, **environment)
    assert done.returncode == 1
    assert re.fullmatch(r"flashvsr: .*\n", done.stderr) and words in done.stderr, done.stderr


PURE = {
    "no-torch": ({}, False, "not built: C++ kernels and CUDA kernels (torch is not importable here"),
    "no-compiler": ({"CXX": "/no/c++"}, True,
                    "not built: C++ kernels and CUDA kernels (no C++ compiler (/no/c++)"),
    "switched-off": ({"FLASHVSR_BUILD_CPU": "0", "FLASHVSR_BUILD_CUDA": "0"}, True,
                     "not built: C++ kernels (FLASHVSR_BUILD_CPU=0); CUDA kernels (FLASHVSR_BUILD_CUDA=0)"),
}


@pytest.mark.parametrize("environment, torch, words", PURE.values(), ids=PURE.keys())
def test_pure_python_build_says_so(tree, environment, torch, words):
    done = run_setup("build", "--build-lib", "out", cwd=tree, torch=torch, **environment)
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stderr.splitlines() if line.startswith("flashvsr ")]
    assert len(notices) == 1 and words in notices[0] and "built pure Python only" in notices[0], done.stderr
    assert (tree / "out/flashvsr_kernels/backends.py").exists() and not list((tree / "out").rglob("*.so"))


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_native_build_without_nvcc(tree):
    """Objects of the tree in use serve here too, where they are the same: kernels are not compiled a second time."""
    if (ROOT / "build/objects").exists():
        shutil.copytree(ROOT / "build/objects", tree / "build/objects")
    words, environment = ("build", "--build-lib", "out"), {"FLASHVSR_BUILD_CPU": "1",
                                                           "FLASHVSR_NVCC": "/no/nvcc"}
    done = run_setup(*words, cwd=tree, **environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"flashvsr \S+: built C\+\+ kernels \(generic.*not built: CUDA kernels \(no nvcc",
                     done.stderr)
    objects = {path: path.stat().st_mtime_ns for path in (tree / "build/objects").glob("*.o")}
    again = run_setup(*words, cwd=tree, **environment)
    assert again.returncode == 0, again.stderr
    assert objects == {path: path.stat().st_mtime_ns for path in (tree / "build/objects").glob("*.o")}
    script = ("from flashvsr_kernels import _native; "
              "print(_native.available(), _native.facts().get('cuda', []))")
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tree / "out", capture_output=True, text=True)
    assert loaded.stdout.split() == ["None", "[]"], loaded.stderr


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_this_tree_has_its_native_part():
    assert _native.available() is None
    facts = _native.facts()
    if "missing" in facts:
        assert "Python.h" in facts["missing"]
        pytest.skip(facts["missing"])
    assert facts["version"] == flashvsr_kernels.__version__
    assert "generic" in facts["cpu"] and facts["compiler"]
    assert bool(facts["cuda"]) == bool(facts["nvcc"])


@pytest.mark.skipif(_native.available() is not None, reason=str(_native.available()))
@pytest.mark.parametrize("archs, capability, runs", [
    ("90", (9, 0), True), ("90a", (9, 0), True), ("90", (8, 9), False), ("90", (10, 0), False), ("86", (8, 0), False),
    ("80", (8, 7), True), ("86;100", (10, 3), True), ("90;80+PTX", (12, 0), True), ("90+PTX", (8, 6), False)])
def test_which_gpus_run_what_was_built(monkeypatch, archs, capability, runs):
    monkeypatch.setattr(_native, "facts", lambda: {"cuda": archs.split(";")})
    monkeypatch.setattr(_native, "_has", lambda *part: None)
    for name, value in dict(is_available=True, get_device_capability=capability, get_device_name="GPU").items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    _native._made_for.cache_clear()
    reason = _native.cuda_available()
    _native._made_for.cache_clear()
    assert (reason is None) == runs and (runs or f"is built for {archs.replace(';', ', ')}" in reason)


class MallocInfo(ctypes.Structure):
    """<malloc.h>'s mallinfo2."""
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the C library glibc 2.33")
@pytest.mark.skipif(_native.available() is not None, reason=str(_native.available()))
def test_calls_leave_nothing_in_memory():
    """Not even 48 bytes each, as string arguments of these ops did, between which the heap could not be joined."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = MallocInfo
    x, weight = torch.ones(1, 8, 8, 16), torch.ones(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    q, lists = torch.ones(1, 128, 1, 64), BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    folded = torch.ones(1, 2, 2, 16, 2, 2, 16)

    def calls(n):
        for _ in range(n):
            torch.ops.flashvsr.conv3x3_cpu(x, weight, x[0, 0, 0], None, x, True)
            torch.ops.flashvsr.upsample_conv_cpu(x, folded, False)
            torch.ops.flashvsr.sparse_attn_cpu(q, q, q, lists.index, lists.count, 1.0)
        return count().uordblks
    calls(100)
    before = calls(100)
    assert calls(400) - before < 400 * 16
