"""Runs the source of a warp-specialised Gluon kernel for Hopper on a CPU: a thread for each partition.

Triton's interpreter knows no Gluon. Here a kernel's own functions are executed as Python, with stand-ins for
what Gluon offers that are made to find mistakes: shared memory begins as NaN, copies by TMA and products by
wgmma happen as early or as late as they may, barriers check who arrives, and staging buffers that nobody has
fenced or waited for are refused. What the threads of a partition do among themselves is not seen: a partition
is one thread. Nor are swizzling and layouts: views are what they say.
"""
import importlib.util
import inspect
import linecache
import math
import random
import threading
import types
from functools import partial

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from flashvsr_kernels import _gluon

PATIENCE = 30  # seconds until a wait counts as a deadlock


class Shared:
    """A view of shared memory: shape elements from offset on."""

    def __init__(self, memory, offset, shape, layout=None):
        self.memory, self.offset, self.shape, self.layout = memory, offset, tuple(shape), layout
        self.dtype, self.size = memory.dtype, math.prod(shape)
        assert 0 <= offset and offset + self.size <= len(memory), "a view leaves its buffer"

    def index(self, i):
        assert 0 <= i < self.shape[0]
        size = self.size // self.shape[0]
        return Shared(self.memory, self.offset + i * size, self.shape[1:], self.layout)

    def reshape(self, shape):
        assert math.prod(shape) == self.size
        return Shared(self.memory, self.offset, shape, self.layout)

    def _reinterpret(self, dtype, shape, layout):
        assert dtype == self.dtype
        return Shared(self.memory, self.offset, shape, layout)

    def permute(self, order):
        assert order == (1, 0)
        view = Shared(self.memory, self.offset, self.shape)
        view.values = lambda: self.values().T
        return view

    def values(self):
        return self.memory[self.offset:self.offset + self.size].view(self.shape)

    def overlaps(self, other):
        return (self.memory is other.memory and self.offset < other.offset + other.size
                and other.offset < self.offset + self.size)

    def load(self, layout):
        return self.values().clone()

    def store(self, value):
        thread = _thread()
        assert not thread.unmet, "written before all threads know that TMA has read"
        assert not any(self.overlaps(source) for source, _ in thread.stores), "written while TMA reads"
        self.values().copy_(value)
        thread.unfenced = thread.apart = True


class MBarrier:
    """A ring of them, or one. needed: arrivals that end a phase, once all bytes have come that were expected"""

    def __init__(self):
        self.phases = self.expected = self.arrived = self.arrivals = self.needed = 0
        self.loads = []

    def index(self, i):
        return self.all[i]


class Descriptor:
    def __init__(self, host):
        self.pixels = host.base.as_strided(host.shape, host.strides)
        self.block_shape, self.layout, self.dtype = list(host.block_shape), host.layout, host.base.dtype

    def inside(self, at):
        """The part of the box at these coordinates that exists: in the tensor and in the box."""
        spans = [(max(a, 0), min(a + b, n)) for a, b, n in zip(at, self.block_shape, self.pixels.shape)]
        spans = [(low, max(low, high)) for low, high in spans]
        return (tuple(slice(low, high) for low, high in spans),
                tuple(slice(low - a, high - a) for (low, high), a in zip(spans, at)))


class Pointer:
    def __init__(self, elements, offset=0):
        self.elements, self.offset = elements, offset

    def __add__(self, offset):
        return Pointer(self.elements, self.offset + offset)

    def __sub__(self, offset):
        return self + -offset

    def load(self):
        return self.elements[self.offset]

    def store(self, value, mask=None):
        here = slice(None) if mask is None else mask
        self.elements[self.offset if mask is None else self.offset[here]] = value if mask is None else value[here]


class Sum:
    """An accumulator with products that have been asked for."""

    def __init__(self, value):
        self.value, self.running = value, 0


class Program:
    """One program: its barriers, and when things happen.

    late: "products" and stores as late as they may and copies at once, or "copies" late and the rest at once
    """

    def __init__(self, number, programs, late, seed):
        self.number, self.programs, self.late = number, programs, late
        self.random, self.named, self.failed = random.Random(seed), {}, []
        self.changed = threading.Condition()

    def wait(self, ready, what):
        with self.changed:
            if self.random.random() < 0.2:
                self.changed.wait(0.0005)  # let others run ahead
            if not self.changed.wait_for(lambda: self.failed or ready(), PATIENCE):
                raise RuntimeError(f"deadlock: {_thread().name} waits for {what}")
            if self.failed:
                raise RuntimeError("another partition failed")

    def wait_phase(self, barrier, parity):
        def complete():
            while barrier.loads and barrier.phases & 1 == parity:  # late copies happen when somebody waits
                barrier.loads.pop(0)()
            return barrier.phases & 1 != parity
        self.wait(complete, "an mbarrier")

    def count(self, barrier, expected=0, arrived=0, arrivals=0):
        """expected, arrived: bytes"""
        with self.changed:
            barrier.arrivals += arrivals
            assert barrier.arrivals <= barrier.needed, "too many arrivals in a phase"
            barrier.expected += expected
            barrier.arrived += arrived
            if barrier.arrivals == barrier.needed and barrier.expected == barrier.arrived:
                barrier.phases += 1
                barrier.expected = barrier.arrived = barrier.arrivals = 0
                self.changed.notify_all()

    def load(self, desc, at, barrier, target):
        width = desc.layout.swizzle_byte_width
        assert target.offset * target.dtype.itemsize % max(8 * width, 128) == 0, "TMA writes to a swizzled pattern's begin"
        assert target.size == math.prod(desc.block_shape)
        thread = _thread()
        assert not thread.unmet and not any(target.overlaps(source) for source, _ in thread.stores)

        def copy():
            box = torch.zeros(desc.block_shape, dtype=desc.dtype)
            there, here = desc.inside(at)
            box[here] = desc.pixels[there]
            target.values().copy_(box.view(target.shape))
            self.count(barrier, arrived=target.size * target.dtype.itemsize)
        with self.changed:
            barrier.loads.append(copy) if self.late == "copies" else copy()
            self.changed.notify_all()

    def bar(self, instruction, barrier=None):
        """barrier: its number, if it is not in the instruction"""
        kind, operands = instruction.split(";")[0].split(maxsplit=1)
        number, threads = operands.split(",")
        barrier, threads = int(number if barrier is None else barrier), int(threads)
        with self.changed:
            arrived, times = self.named.get(barrier, (0, 0))
            arrived += _thread().size
            assert arrived <= threads, "a named barrier counts too many threads"
            done = times + (arrived == threads)
            self.named[barrier] = (arrived % threads, done)
            self.changed.notify_all()
            if kind == "bar.arrive" and self.random.random() < 0.2:
                self.changed.wait_for(lambda: False, 0.002)  # let those run ahead who waited for this
        if kind == "bar.sync":
            self.wait(lambda: self.named[barrier][1] > times, f"named barrier {barrier}")


def _thread():
    return threading.current_thread()


def _program():
    return _thread().program


def _mma(a, b, acc, is_async, use_acc=True):
    acc = acc if isinstance(acc, Sum) else Sum(acc if use_acc else torch.zeros_like(acc))
    acc.running += 1

    def multiply():
        left = a.values() if isinstance(a, Shared) else a  # or registers
        acc.value += left.float() @ b.values().float()
        acc.running -= 1
    if _program().late == "copies":
        multiply()
    _thread().products.append(multiply if _program().late == "products" else lambda: None)
    return acc


def _mma_wait(running, deps):
    products = _thread().products
    while len(products) > running:
        products.pop(0)()
    deps = [acc.value if isinstance(acc, Sum) and not acc.running else acc for acc in deps]
    return deps[0] if len(deps) == 1 else tuple(deps)


def _store(desc, at, source):
    thread = _thread()
    assert not thread.unfenced and not thread.apart, "TMA reads what no fence or barrier shows it"

    def copy():
        there, here = desc.inside(at)
        desc.pixels[there] = source.values().view(desc.block_shape)[here]
    if _program().late == "copies":
        copy()
    thread.stores.append((source, copy))


def _store_wait(running):
    thread = _thread()
    thread.unmet = thread.unmet or bool(thread.stores)
    while len(thread.stores) > running:
        source, copy = thread.stores.pop(0)
        if _program().late == "products":
            copy()


def _fence():
    _thread().unfenced = False


def _meet():
    thread = _thread()
    thread.apart = thread.unfenced
    thread.unmet = False


def _init(barrier, count):
    barrier.needed = count


def _allocate(dtype, shape, layout):
    if isinstance(layout, mbarrier.MBarrierLayout):
        ring = MBarrier()
        ring.all, ring.shape = [MBarrier() for _ in range(shape[0])], tuple(shape)
        return ring
    poison = math.nan if dtype.is_floating_point else -9999
    return Shared(torch.full((math.prod(shape),), poison, dtype=dtype), 0, shape, layout)


def _partition(program, name, warps, function, arguments):
    def run():
        try:
            function(*arguments)
            assert not _thread().products and not _thread().stores, "ended with work under way"
        except BaseException as error:
            with program.changed:
                program.failed.append(error)
                program.changed.notify_all()
    thread = threading.Thread(target=run, name=name)
    thread.program, thread.size, thread.products, thread.stores = program, 32 * warps, [], []
    thread.unfenced = thread.apart = thread.unmet = False
    return thread


def _specialize(partitions, warps, registers):
    program = _program()
    threads = [_partition(program, f"partition {i}", size, *partition)
               for i, (partition, size) in enumerate(zip(partitions, [4, *warps]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if program.failed:
        raise program.failed[0]


def _where(condition, a, b):
    if isinstance(condition, torch.Tensor) and condition.ndim:
        return torch.where(condition, a, b)
    return a if condition else b


def _maximum(a, b, propagate_nan=None):
    """Drops NaN if not told otherwise, as the instruction does."""
    larger = torch.fmax if propagate_nan is None else torch.maximum
    return larger(*torch.broadcast_tensors(*map(torch.as_tensor, (a, b))))


def _max(x, axis):
    """Drops NaN too, unless there is nothing else."""
    if not x.is_floating_point():
        return torch.amax(x, axis)
    return torch.where(x.isnan().all(axis), torch.nan, torch.where(x.isnan(), -torch.inf, x).amax(axis))


LANGUAGE = types.SimpleNamespace(
    static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    program_id=lambda axis: _program().number, num_programs=lambda axis: _program().programs,
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    arange=lambda start, end, layout: torch.arange(start, end), where=_where, load=Pointer.load, store=Pointer.store,
    maximum=_maximum, minimum=lambda a, b: torch.minimum(*map(torch.as_tensor, (a, b))), abs=torch.abs,
    exp2=torch.exp2, log2=torch.log2, max=_max, sum=torch.sum, reshape=torch.reshape,
    convert_layout=lambda x, layout: x, allocate_shared_memory=_allocate, warp_specialize=_specialize,
    inline_asm_elementwise=lambda asm, constraints, arguments, **_: _program().bar(asm, *arguments),
    **{name: getattr(gl, name) for name in ("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout",
                                            "SliceLayout", "BlockedLayout", "SwizzledSharedLayout")})
STAND_INS = [
    (gl, LANGUAGE), (hopper.fence_async_shared, _fence), (hopper.warpgroup_mma, _mma),
    (hopper.warpgroup_mma_wait, _mma_wait), (_gluon.meet, _meet),
    (_gluon.load, lambda *copy: _program().load(*copy)), (_gluon.store, _store),
    (tma, types.SimpleNamespace(store_wait=_store_wait)),
    (mbarrier, types.SimpleNamespace(
        MBarrierLayout=mbarrier.MBarrierLayout, init=_init,
        expect=lambda barrier, size: _program().count(barrier, expected=size, arrivals=1),
        arrive=lambda barrier, count: _program().count(barrier, arrivals=count),
        wait=lambda barrier, parity: _program().wait_phase(barrier, parity)))]


def _as_python(module, **others):
    """The module's functions as Python, seeing the stand-ins, or others by their name."""
    scope = dict(vars(module))
    for name, value in scope.items():
        scope[name] = next((ours for theirs, ours in STAND_INS if value is theirs), value)
        if isinstance(value, gl.constexpr):
            scope[name] = value.value
        elif isinstance(value, JITFunction):
            scope[name] = types.FunctionType(value.fn.__code__, scope, name)
    scope |= others
    return scope


class Launcher:
    """Stands for a jitted kernel of a module: kernel[grid](...) runs programs one after the other.

    late: as in Program    programs: how many, of a kernel whose programs share the work out; None: as many as it asks
    others: functions that stand for the module's of those names
    """

    def __init__(self, module, name, late, programs=3, **others):
        self.function, self.late, self.programs = _as_python(module, **others)[name], late, programs

    def __getitem__(self, grid):
        return partial(self._run, self.programs or grid[0])

    def _run(self, programs, *arguments, num_warps, **constants):
        arguments = [Descriptor(x) if isinstance(x, TensorDescriptor) else
                     Pointer(x.flatten()) if isinstance(x, torch.Tensor) else x for x in arguments]
        for number in range(programs):
            program = Program(number, programs, self.late, number)
            main = _partition(program, "program", 4, partial(self.function, **constants), arguments)
            main.start()
            main.join()
            if program.failed:
                raise program.failed[0]


def planted(module, right, wrong, folder, monkeypatch):
    """The module with wrong where its source has right, loaded from a file in folder; waits that last count as deadlocks
    soon.
    """
    source = inspect.getsource(module).replace("from .", "from flashvsr_kernels.")
    assert right in source
    path = folder / f"mistaken_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(right, wrong))
    monkeypatch.setattr(f"{__name__}.PATIENCE", 2)
    linecache.clearcache()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mistaken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mistaken)
    return mistaken
