"""Builds flashvsr_kernels._C (ops, torch's stable ABI) and flashvsr_kernels._build (build facts, pybind11).

FLASHVSR_BUILD_CPU, FLASHVSR_BUILD_CUDA: auto (the default: if possible), 1 (or fail), 0
FLASHVSR_CUDA_ARCHS: such as "80;90;90+PTX"    FLASHVSR_NVCC, CXX: compilers    MAX_JOBS: how many at a time
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"  # kept between builds; a name holds the hash of all that made the object
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "flashvsr_kernels/__init__.py").read_text(), re.M)[1]
ARCHS = "80;86;89;90;100;120;80+PTX"
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall",
             "-Wno-unused-function"]
ISA_FLAGS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = ["-mavx512f", "-mfma"]
    ISA_FLAGS |= {"avx2": ["-mavx2", "-mfma"], "avx512": avx512,
                  "avx512bf16": [*avx512, "-mavx512vl", "-mavx512bf16"]}
# Each C++ kernel and its builds: avx512bf16 multiplies pairs of bfloat16, convolutions only float32.
CPU_KERNELS = {"sparse_attn": list(ISA_FLAGS), "conv3x3": [isa for isa in ISA_FLAGS if isa != "avx512bf16"]}


def fail(message):
    raise SystemExit(f"flashvsr: {message}")


def setting(name):
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        fail(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


def found_torch():
    """(folder, version, None) or (None, "", reason)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, "", ("torch is not importable here, as in pip's isolated builds: pip install torch "
                          "'setuptools>=77', then pip install --no-build-isolation .")
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        return None, "", f"torch {version} is older than 2.11: pip install --upgrade torch"
    return Path(spec.origin).parent, version, None


def found_cxx():
    """(path, version line, None) or (None, "", reason)."""
    asked = os.environ.get("CXX")
    path = next(filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None)
    if sys.platform != "linux":
        return None, "", f"the native kernels are built on Linux only, this is {sys.platform}"
    if path is None:
        tried = asked or "c++, g++, clang++"
        return None, "", f"no C++ compiler ({tried}): install one (Debian: g++) or set CXX"
    version = subprocess.run([path, "--version"], capture_output=True, text=True)
    if version.returncode:
        return None, "", f"{path} --version fails: install a C++ compiler (Debian: g++) or set CXX"
    return path, (version.stdout.splitlines() or ["unknown"])[0], None


def found_nvcc():
    """(path, version, None) or (None, "", reason)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    asked = os.environ.get("FLASHVSR_NVCC")
    places = [asked] if asked else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    path = next(filter(None, map(shutil.which, places)), None)
    if path is None:
        return None, "", (f"no nvcc ({', '.join(places)}): install the CUDA toolkit, set FLASHVSR_NVCC, "
                          "or set FLASHVSR_BUILD_CUDA=0")
    told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    version = next(iter(re.findall(r"release (\d+\.\d+)", told)), "0.0")
    if tuple(map(int, version.split("."))) < (12, 8):
        return None, "", f"nvcc {version} is older than 12.8: update the CUDA toolkit or set FLASHVSR_NVCC"
    return path, version, None


class Plan:
    """What is built here and, for each part that is not, why."""

    def __init__(self):
        self.torch, self.torch_version, no_torch = found_torch()
        self.cxx, self.cxx_version, no_cxx = found_cxx()
        self.nvcc, self.nvcc_version, no_nvcc = found_nvcc()
        self.skipped = {}
        self.cpu = self.wanted("C++ kernels", "FLASHVSR_BUILD_CPU", no_torch or no_cxx)
        self.cuda = self.wanted("CUDA kernels", "FLASHVSR_BUILD_CUDA", no_torch or no_cxx or no_nvcc)
        self.archs = os.environ.get("FLASHVSR_CUDA_ARCHS", ARCHS).split(";") if self.cuda else []
        self.isas = list(ISA_FLAGS) if self.cpu else []
        python = Path(sysconfig.get_paths()["include"])
        self.facts = self.cpu or self.cuda
        if self.facts:
            # torch carries pybind11's headers; a pybind11 of its own is taken first.
            pybind = importlib.util.find_spec("pybind11")
            self.pybind = (Path(pybind.origin).parent if pybind else self.torch) / "include"
            if not (python / "Python.h").exists():
                self.skipped["build facts"] = "no Python.h: install Python's headers (Debian: python3-dev)"
            elif not (self.pybind / "pybind11/pybind11.h").exists():
                self.skipped["build facts"] = "no pybind11: pip install pybind11"
            self.facts = "build facts" not in self.skipped

    def wanted(self, part, name, reason):
        value = setting(name)
        if value == "1" and reason:
            fail(f"{name}=1, but {part} cannot be built: {reason}")
        if value == "0" or reason:
            self.skipped[part] = f"{name}=0" if value == "0" else reason
        return part not in self.skipped

    def summary(self):
        built = []
        if self.cpu:
            built.append(f"C++ kernels ({', '.join(self.isas)}; {self.cxx_version})")
        if self.cuda:
            built.append(f"CUDA kernels ({', '.join(self.archs)}; nvcc {self.nvcc_version})")
        if self.facts:
            built.append("build facts")
        reasons = dict.fromkeys(self.skipped.values())
        skipped = [f"{' and '.join(part for part, why in self.skipped.items() if why == reason)} ({reason})"
                   for reason in reasons]
        return (f"flashvsr {VERSION}: built {', '.join(built) or 'pure Python only'}"
                + (f"; not built: {'; '.join(skipped)}" if skipped else ""))

    def objects(self):
        """For each extension its (source, compiler command without output)."""
        if not (self.cpu or self.cuda):
            return {}
        cxx = [self.cxx, *CXX_FLAGS]
        parts = ["-DFLASHVSR_CPU"] * self.cpu + ["-DFLASHVSR_CUDA"] * self.cuda
        stable = ["-DTORCH_TARGET_VERSION=0x020B000000000000", "-DTORCH_STABLE_ONLY",  # 2.11
                  f"-I{self.torch / 'include'}"]
        ops = [(CSRC / name, [*cxx, *stable, *parts]) for name in ("bindings.cpp", "bindings_conv3x3.cpp")]
        if self.cpu:
            for kernel, isas in CPU_KERNELS.items():
                name = f"-DFLASHVSR_{kernel.upper()}={kernel}_"
                ops.append((CSRC / f"cpu/run_{kernel}.cpp", cxx))
                ops += [(CSRC / f"cpu/{kernel}.cpp", [*cxx, *ISA_FLAGS[isa], name + isa]) for isa in isas]
        if self.cuda:
            ops.append((CSRC / "bindings_conv3d.cpp", [*cxx, *stable, *parts]))
            nvcc = [self.nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas",
                    "-warn-spills", "--threads", "2", "-ccbin", self.cxx, *map(gencode, self.archs)]
            ops += [(source, nvcc) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        extensions = {"flashvsr_kernels._C": ops}
        if self.facts:
            facts = {"VERSION": VERSION, "TORCH": self.torch_version, "COMPILER": self.cxx_version,
                     "NVCC_VERSION": self.nvcc_version if self.cuda else "", "CPU_ISAS": " ".join(self.isas),
                     "CUDA_ARCHS": " ".join(self.archs)}
            include = [f"-I{self.pybind}", f"-I{sysconfig.get_paths()['include']}"]
            defines = [f'-DFLASHVSR_{name}="{value}"' for name, value in facts.items()]
            extensions["flashvsr_kernels._build"] = [(CSRC / "build_facts.cpp", [*cxx, *include, *defines])]
        return extensions

    def libraries(self, name):
        # The C++ runtime that torch uses. Errors are thrown into torch, and a private copy of the runtime, as
        # a compiler told -static-libstdc++ -static-libgcc links it, crashes in std::ostream and in throw.
        runtime = ["-Wl,-l:libstdc++.so.6,-l:libgcc_s.so.1"]
        if name == "flashvsr_kernels._build":
            return runtime
        cudart = []
        if self.cuda:
            dryrun = subprocess.run([self.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
            folders = shlex.split(re.search(r"LIBRARIES=(.*)", dryrun.stdout + dryrun.stderr)[1])
            cudart = [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return [f"-L{self.torch / 'lib'}", "-ltorch_cpu", *runtime, *cudart]


def gencode(arch):
    # The kernels use what sm_80 has: their PTX is made once, and machine code for each architecture from it.
    number, _, ptx = arch.partition("+")
    return f"-gencode=arch=compute_{number if ptx else 80},code={'compute' if ptx else 'sm'}_{number}"


def object_file(source, command, plan):
    """Where the object lies: its name tells all that it was made from, so one that exists is up to date."""
    versions = (plan.cxx_version, plan.torch_version, plan.nvcc_version if command[0] == plan.nvcc else None)
    made_from = hashlib.sha256(repr((command, versions)).encode())
    for path in (source, *sorted(CSRC.rglob("*.h"))):
        made_from.update(path.read_bytes())
    return OBJECTS / f"{source.stem}-{made_from.hexdigest()[:16]}.o"


def compile_all(commands):
    """Runs the commands (output file -> shell command) side by side, through ninja where there is one."""
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    if ninja[0] != "ninja" or shutil.which("ninja"):
        rules = [f"builddir = {OBJECTS}", "rule run", "  command = $line", "  description = $out"]
        for path, command in commands.items():
            name = str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            rules += [f"build {name}: run", "  line = " + command.replace("$", "$$")]
        (OBJECTS / "build.ninja").write_text("\n".join(rules) + "\n")
        codes = [subprocess.run([*ninja, "-f", OBJECTS / "build.ninja", "-j", str(jobs)]).returncode]
    else:
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(lambda x: subprocess.run(x, shell=True).returncode, commands.values()))
    if any(codes):
        fail("a compiler failed (see above); FLASHVSR_BUILD_CPU=0 FLASHVSR_BUILD_CUDA=0 builds pure Python")


class BuildNative(build_ext):
    def run(self):
        OBJECTS.mkdir(parents=True, exist_ok=True)
        missing = {}
        self.linked = {}
        for name, sources in PLAN.objects().items():
            self.linked[name] = [object_file(source, command, PLAN) for source, command in sources]
            for path, (source, command) in zip(self.linked[name], sources):
                if not path.exists():
                    part = str(path.with_suffix(".part"))  # an interrupted compiler must not leave a .o
                    line = shlex.join([*command, "-c", str(source), "-o", part])
                    missing[path] = f"{line} && {shlex.join(['mv', part, str(path)])}"
        if missing:
            compile_all(missing)
        super().run()
        print(PLAN.summary(), file=sys.stderr)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [PLAN.cxx, "-shared", *self.linked[ext.name], "-o", target, *PLAN.libraries(ext.name)]
        if subprocess.run(command).returncode:
            fail(f"linking {ext.name} failed (see above)")


class BuildPython(build_py):
    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            print(PLAN.summary(), file=sys.stderr)


PLAN = Plan()
setup(ext_modules=[Extension(name, []) for name in PLAN.objects()],
      cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
