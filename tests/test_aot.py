"""Every Triton and Gluon kernel, compiled for each architecture: it fits, it does not spill, and it uses what
makes the architecture fast. Needs no GPU.
"""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashvsr_kernels import _triton, aot
from flashvsr_kernels.aot_facts import gate_static, static_facts

triton = pytest.importorskip("triton", "3.6")
tl = pytest.importorskip("triton.language")

from flashvsr_kernels import conv3x3_hopper

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")


@pytest.fixture(scope="module")
def found():
    """About five minutes of two processors."""
    return aot.compiled(list(aot.SHARED))


def kernels(found, arch, launch=""):
    of = [x for x in found if isinstance(x, aot.Kernel) and x.arch == arch and x.launch.startswith(launch)]
    assert of
    return of


@pytest.mark.parametrize("arch", aot.SHARED)
def test_compiles_fits_and_does_not_spill(found, arch):
    problems = [f"{one.launch}: {problem}" for one in found if one.arch == arch for problem in one.problems()]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", aot.SHARED)
def test_every_op_has_kernels(found, arch):
    ops = {one.launch.split()[0] for one in kernels(found, arch)}
    assert ops - {"hopper"} == {"forward", "backward", "selection", "lists", "transposed", "conv3x3", "conv3d",
                                "enlarge", "pixel_unshuffle", "rgb_conv", "adain_uint8", "rms_norm",
                                "layer_norm_modulate", "gated_add", "gated_add_norm", "qk_norm_rope", "qkv_norm_rope"}
    assert ("hopper" in ops) == (arch == 90)


def test_nothing_compiles_to_worse_than_committed(found):
    """The gate of benchmarks.check --part static, on what is compiled already."""
    committed = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "static.json").read_text())
    facts = static_facts([one for one in found if one.arch in (80, 90)])
    assert gate_static(facts, committed["facts"], committed["triton"] == ".".join(triton.__version__.split(".")[:2])) == []


@pytest.mark.parametrize("launch, names", [("hopper", {"forward_kernel", "dkv_kernel", "dq_kernel"}),
                                           ("hopper backward", {"dkv_kernel", "dq_kernel"}),
                                           ("hopper conv3x3", {"conv3x3_kernel"}), ("hopper rgb_head", {"conv3x3_kernel"}),
                                           ("hopper conv3d", {"conv3d_kernel"})])
def test_hopper_kernels_use_wgmma_and_tma(found, launch, names):
    used = [one for one in kernels(found, 90, launch) if one.name in names]
    assert {one.name for one in used} == names
    for one in used:
        assert {"wgmma", "tma"} <= set(one.instructions), one


# Of each launch's kernels: whether tiles are wide, taps, channels of a block, whether residual, whether head.
LAYOUTS = {"conv3x3 128 fused": [(False, 3, 128, True, False)], "conv3x3 128 biased": [(True, 3, 128, False, False)],
           "conv3x3 64 fused": [(False, 3, 64, True, False)], "conv3x3 136 to 64": [(False, 3, 64, False, False)],
           "conv3x3 784 to 512": [(False, 3, 128, False, False)],
           "conv3x3 512 to 256 enlarged": [(False, 2, 128, False, False)],
           "rgb_head 128 to 128": [(True, 2, 128, False, False), (True, 3, 128, False, True)],
           "rgb_head 128 to 64": [(True, 2, 128, False, False), (True, 3, 64, False, True)]}


@pytest.mark.parametrize("launch, layouts", LAYOUTS.items(), ids=LAYOUTS.keys())
def test_no_barrier_lies_where_a_convolution_has_data(found, launch, layouts):
    """One would if no partition used it: Triton then puts pixels, weights or results there too, and what the barrier
    leaves could surface.
    """
    used = [one for one in kernels(found, 90, f"hopper {launch}") if one.name == "conv3x3_kernel"]
    for one, (is_wide, side, block, residual, head) in zip(used, layouts, strict=True):
        chosen = conv3x3_hopper.config(is_wide, side, residual, head)
        stage = (side + 3) * 72 if is_wide else (side + 15) * 16
        staging = 2 * 64 * 32 * 4 if head else 2 * 64 * block * 2
        data = 128 * (chosen["STAGES"] * stage + chosen["SLOTS"] * block)
        data += chosen["HALVES"] * staging + head * 64 * block
        assert len(set(one.barriers)) == chosen["STAGES"] + chosen["SLOTS"] + 2 * residual + head
        assert all(data <= barrier <= one.shared - 8 for barrier in one.barriers)


@pytest.mark.parametrize("launch", ["forward", "backward", "conv3x3 128", "conv3x3 784", "conv3d 768"])
@pytest.mark.parametrize("arch, multiply", [(80, "mma"), (86, "mma"), (89, "mma"), (90, "wgmma"),
                                            (100, "tcgen05"), (120, "mma")])
def test_tensor_cores_are_fed_asynchronously(found, arch, multiply, launch):
    used = [set(one.instructions) for one in kernels(found, arch, launch)]
    used = [one for one in used if one & {"mma", "wgmma", "tcgen05"}]  # others only prepare
    assert used
    for instructions in used:
        assert multiply in instructions and instructions & {"cp.async", "tma"}


@pytest.mark.gpu
def test_real_launches_are_the_compiled_ones(found, tmp_path):
    """The same launches on this GPU, with memory: Triton keeps their kernels under the same hashes."""
    arch = _triton.capability()
    if arch not in aot.SHARED:
        pytest.skip(f"sm_{arch} is not one that is compiled for")
    program = f"""if True:
        import itertools, sys, torch, triton
        from flashvsr_kernels import aot_launches
        part, parts = map(int, sys.argv[1:])
        triton.knobs.cache.dir = f"{tmp_path}/{{part}}"
        aot_launches.meta = lambda dtype, *shape: torch.zeros(shape, dtype=dtype, device="cuda")
        for _, call in itertools.islice(aot_launches.launches({arch}), part, None, parts):
            call()
        torch.cuda.synchronize()"""
    parts = min(aot.MOST_PARTS, os.cpu_count())
    running = [subprocess.Popen([sys.executable, "-c", program, str(part), str(parts)]) for part in range(parts)]
    assert [one.wait() for one in running] == [0] * parts
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/*.json")]
    launched = {entry["hash"]: entry["name"] for entry in kept if "hash" in entry}
    known = {kernel.hash: f"{kernel.launch}: {kernel.name}" for kernel in kernels(found, arch)}
    assert launched
    assert not {name for key, name in launched.items() if key not in known}  # launched, not compiled ahead of time
    assert not {name for key, name in known.items() if key not in launched}  # compiled ahead of time, not launched


@triton.jit
def _greedy(x, y, N: tl.constexpr):
    """Wants more registers and shared memory than there are."""
    p = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_y = tl.zeros([N, N], tl.float32)
    for i in range(10):
        b_x = tl.load(x + p + i * N * N)
        b_y = tl.dot(b_y.to(tl.bfloat16), b_x, b_y)
    tl.store(y + p, b_y)


def bad_launches(arch):
    x = torch.empty(10 * 256 * 256, dtype=torch.bfloat16, device="meta")
    yield "greedy", lambda: _greedy[(1,)](x, x.float(), N=256, num_warps=4)
    yield "idle", lambda: None
    yield "wrong", lambda: _greedy[(1,)](x, x.float())
    yield "abort", os.abort
    yield "never", lambda: None


def test_the_gates_can_fail(monkeypatch):
    monkeypatch.setattr(aot, "MOST_PARTS", 1)
    greedy, *failures = aot.compiled([90], "tests.test_aot:bad_launches")
    spills, shared, serialized = greedy.problems()
    assert spills.startswith("_greedy spills: ") and "bytes of shared memory, of 232448" in shared
    assert serialized == "ptxas serializes the wgmma instructions of _greedy"
    assert [one.launch for one in failures] == ["idle", "wrong", "abort"]
    assert failures[0].problems() == ["launched no Triton kernel"]
    assert failures[1].message.startswith("test_aot.py:")
    assert failures[1].message.endswith("missing 1 required positional argument: 'N'")
    assert failures[2].message.startswith("SIGABRT")


@triton.jit
def _copy(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))


def small_launches(arch):
    x = torch.empty(1024, dtype=torch.bfloat16, device="meta")
    for N in 128, 256, 512:
        yield f"copy {N}", lambda: _copy[(1,)](x, x, N=N)


def test_processes_share_the_launches(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = aot.compiled([80], "tests.test_aot:small_launches")
    assert [one.launch for one in found] == ["copy 128", "copy 512", "copy 256"]
    assert len({one.hash for one in found}) == 3 and not any(one.problems() for one in found)


GOOD = aot.Kernel(90, "forward", "kernel", 384, 168, 0, 0, 232_448, 512, ("wgmma",), False, 1.0, "")


@pytest.mark.parametrize("change, message", [
    ({"registers": 176}, "kernel needs 67584 registers, of 65536"),
    ({"arch": 86}, "kernel needs 232448 bytes of shared memory, of 101376"),
    ({"tensor_memory": 513}, "kernel needs 513 columns of tensor memory, of 512"),
    ({"stack": 8}, "kernel spills: 8 bytes of stack, 0 spilled"),
    ({"spilled": 8}, "kernel spills: 0 bytes of stack, 8 spilled"),
    ({"serialized": True}, "ptxas serializes the wgmma instructions of kernel"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_each_limit(change, message):
    assert GOOD.problems() == []
    assert dataclasses.replace(GOOD, **change).problems() == [message]


@pytest.mark.parametrize("stack, code", [(0, 0), (8, 1)], ids=["good", "bad"])
def test_command_line(monkeypatch, capsys, stack, code):
    kernel = dataclasses.replace(GOOD, stack=stack)
    monkeypatch.setattr(aot, "compiled", lambda archs: [kernel] if archs == [90] else [])
    monkeypatch.setattr("sys.argv", ["aot", "--arch", "90"])
    assert aot.main() == code
    assert ("FAILED: kernel spills" in capsys.readouterr().out) == bool(code)
    monkeypatch.setattr("sys.argv", ["aot", "--arch", "90", "--json"])
    assert aot.main() == code
    assert json.loads(capsys.readouterr().out)[0]["registers"] == 168
