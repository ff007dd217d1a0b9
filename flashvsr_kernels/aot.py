"""Compiles every Triton and Gluon kernel without a GPU, and says what each architecture would be given.

    python -m flashvsr_kernels.aot [--arch 80 90 ...] [--json]

An op's own launcher runs on meta tensors (shapes without memory), and what it launches is compiled, not run:
signature, constants, divisibility, warps and stages are those of the real call, whatever becomes of it. Each
architecture has processes of its own, as LLVM aborts on code that it cannot translate.
"""
import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

# Bytes of shared memory that a thread block may ask for, by compute capability (CUDA programming guide).
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTERS = 65_536   # of a multiprocessor, so of a thread block
TENSOR_MEMORY = 512  # columns of a multiprocessor
MOST_PARTS = 8       # of an architecture's launches, each of which has a process that imports torch
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync.aligned.m",
                "tma": "cp.async.bulk.tensor", "cp.async": "cp.async.c"}  # and how the PTX has them


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    launch: the call of the package that made it    threads: of a block, in all warp partitions
    registers: of a thread    stack, spilled: bytes of local memory of a thread
    shared: bytes of a block    tensor_memory: columns, 0 before sm_100
    instructions: those keys of INSTRUCTIONS that the PTX has
    serialized: ptxas says that each wgmma waits for the one before
    hash: Triton's, under which it would keep the kernel
    barriers: where in shared memory the mbarriers lie that it initialises, in bytes
    """
    arch: int
    launch: str
    name: str
    threads: int
    registers: int
    stack: int
    spilled: int
    shared: int
    tensor_memory: int
    instructions: tuple[str, ...]
    serialized: bool
    seconds: float
    hash: str
    barriers: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        """Why this kernel could not be launched or would be slow; empty if all is well."""
        found = []
        if self.stack or self.spilled:
            found.append(f"{self.name} spills: {self.stack} bytes of stack, {self.spilled} spilled")
        for what, used, limit in (("registers", self.threads * self.registers, REGISTERS),
                                  ("bytes of shared memory", self.shared, SHARED[self.arch]),
                                  ("columns of tensor memory", self.tensor_memory, TENSOR_MEMORY)):
            if used > limit:
                found.append(f"{self.name} needs {used} {what}, of {limit}")
        if self.serialized:
            found.append(f"ptxas serializes the wgmma instructions of {self.name}")
        return found


@dataclass(frozen=True)
class Failure:
    """What did not compile: the launch (the last that was begun, if the process died) and the message."""
    arch: int
    launch: str
    message: str

    def problems(self) -> list[str]:
        return [self.message]


def compiled(archs: list[int],
             source: str = "flashvsr_kernels.aot_launches:launches") -> list[Kernel | Failure]:
    """What came of each launch on each architecture; as many processes at a time as there are processors.

    archs: keys of SHARED    source: "module:function" that yields what to launch, as launches does
    """
    parts = min(MOST_PARTS, max(1, os.cpu_count() // len(archs)))
    jobs = [(arch, part) for arch in archs for part in range(parts)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(lambda job: _in_a_process(*job, parts, source), jobs), [])


def _in_a_process(arch: int, part: int, parts: int, source: str) -> list[Kernel | Failure]:
    """What came of each parts-th launch, from number part on."""
    command = [sys.executable, "-m", "flashvsr_kernels.aot", "--worker", source, str(part), str(parts),
               "--arch", str(arch)]
    told = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    found, launch = [], "start"
    for line in map(json.loads, told.stdout.splitlines()):
        launch = line["launch"]
        if "message" in line:
            found.append(Failure(**line))
        elif "name" in line:
            found.append(Kernel(**line | {key: tuple(line[key]) for key in ("instructions", "barriers")}))
    if told.returncode:
        cause = signal.Signals(-told.returncode).name if told.returncode < 0 else f"exit {told.returncode}"
        found.append(Failure(arch, launch, f"{cause}: {' '.join(told.stderr.splitlines()[-3:])}"))
    return found


def _worker(arch: int, source: str, part: int, parts: int) -> None:
    """Prints a line of JSON for each launch that is begun, each kernel and each failure."""
    module, function = source.split(":")
    launches = getattr(importlib.import_module(module), function)
    with tempfile.TemporaryDirectory() as cache:
        made = _compile_instead_of_launching(arch, cache)
        for launch, call in itertools.islice(launches(arch), part, None, parts):
            print(json.dumps({"launch": launch}), flush=True)
            made.clear()
            message = None
            try:
                call()
            except Exception as error:  # one launch that cannot be compiled is one line of the report
                message = _explain(error)
            if not made and message is None:
                message = "launched no Triton kernel"
            failures = [] if message is None else [Failure(arch, launch, message)]
            for one in [Kernel(arch, launch, *facts) for facts in made.values()] + failures:
                print(json.dumps(asdict(one)), flush=True)


class _Driver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, target: object):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def _compile_instead_of_launching(arch: int, cache: str) -> dict[str, tuple]:
    """Makes this process take arch for its GPU's architecture, and Triton compile what it is asked to launch.

    Returns where each launch puts the facts of its kernel, as Kernel has them, by Triton's hash.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: what is interpreted is not compiled")
    knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    made, known, run = {}, {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        start, log = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(log):  # where Triton prints what ptxas -v said
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            known[kernel.hash] = _facts(kernel, log.getvalue(), time.perf_counter() - start)
        made[kernel.hash] = known[kernel.hash]
        return kernel
    JITFunction.run = compile_only
    return made


def _facts(kernel: object, log: str, seconds: float) -> tuple:
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    threads, = re.search(r"\.(?:req|max)ntid (\d+)", ptx).groups()
    registers, = re.search(r"Used (\d+) registers", log).groups()
    stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
                                     r"(\d+) bytes spill loads", log).groups()
    used = tuple(name for name, text in INSTRUCTIONS.items() if text in ptx)
    bases = re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx)
    sums = re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx)
    places = {base: 0 for base in bases} | {to: int(offset) for to, base, offset in sums if base in bases}
    barriers = tuple(places[register] for register in re.findall(r"mbarrier\.init\S+ \[(%r\d+)\]", ptx))
    return (metadata.name, int(threads), int(registers), int(stack), int(stores) + int(loads),
            metadata.shared, getattr(metadata, "tmem_size", None) or 0, used, "serializ" in log,
            round(seconds, 2), kernel.hash, barriers)


def _explain(error: BaseException | None) -> str:
    """Where in the launcher, and the errors from the first cause on; Triton's quote the kernel's line."""
    frames, chain = traceback.extract_tb(error.__traceback__), []
    while error:
        chain.insert(0, f"{type(error).__name__}: {error}")
        error = error.__cause__
    at = next((f for f in reversed(frames) if f"{os.sep}triton{os.sep}" not in f.filename
               and f.name != "compile_only"), frames[-1])
    return f"{os.path.basename(at.filename)}:{at.lineno}: " + "\n".join(chain)


def _table(found: list[Kernel | Failure]) -> Iterator[str]:
    for one in found:
        if isinstance(one, Kernel):
            yield (f"sm_{one.arch:<4} {one.launch:36} {one.name:16} {one.threads:4} threads "
                   f"{one.registers:4} registers {one.shared:7} bytes shared  {' '.join(one.instructions)}")
        for problem in one.problems():
            yield f"sm_{one.arch:<4} {one.launch:36} FAILED: {problem}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m flashvsr_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--json", action="store_true", help="all that is known of each kernel")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # source, part, parts
    given = parser.parse_args()
    if given.worker:
        source, *part = given.worker
        _worker(given.arch[0], source, *map(int, part))
        return 0
    found = compiled(given.arch)
    print(json.dumps([asdict(one) for one in found], indent=1) if given.json else "\n".join(_table(found)))
    return int(any(one.problems() for one in found))


if __name__ == "__main__":
    sys.exit(main())
