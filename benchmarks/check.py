"""Have attention, the decoder's calls, a block's or the whole model become slower than what is committed? Exit 1 if so.

    python -m benchmarks.check            --update records this machine's figures instead

Five gates. Four of ratios measured in turn in one run, against those committed for this GPU, or on a machine
without one for the C++ ops on one thread of a CPU with these instructions: attention's ideal time to its time
(bench_attention); of the decoder's calls (bench_decoder) the rate to that of a large matrix product, or where memory
binds, the time of PyTorch's operators to that of ours, and on a CPU that of oneDNN's convolutions; on a GPU the
reference's time to ours of what surrounds attention in a block (bench_block); and of the whole model's steady chunk the
floor to its time (bench_upscaler). And what the compilers made of the Triton and Gluon kernels (registers, shared
memory, spills, wgmma and TMA), which needs Triton but no GPU. What has no committed figures, or on a GPU those of
other versions of torch or Triton, is reported, not gated.
"""
import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flashvsr_kernels import aot
from flashvsr_kernels.aot_facts import gate_static, static_facts

from . import bench_block, bench_decoder, bench_upscaler, decoder_cases, decoder_peers, machine, upscaler_stream
from .bench_attention import BACKENDS, line, run, save, wrong
from .cases import Case, grid
from .peers import OURS

PARTS = ("ratios", "decoder", "block", "upscaler", "static")
RESULTS = Path(__file__).parent / "results"
Ratios = Callable[[str, float], tuple[dict[str, float], list[str]]]
# A ratio within a run repeats within 3 % on one H100, between cards of one name by a little more; 8 % is
# beyond both and finds a planted 10 %. On a CPU the bound is wide: CI's processors differ, and its neighbours
# disturb.
BOUND = {"cuda": 1.08, "cpu": 1.5}
ARCHS = (80, 90)  # of the static facts: what the cp.async and the TMA kernels were made for


def cases(device: str) -> list[Case]:
    """The model's main shape on a GPU; a small one on a CPU, forward alone (its op has no backward)."""
    return [case for case in grid(device, quick=True) if device == "cuda" and case.picture == "768x1408"
            or device == "cpu" and case.direction == "fwd"]


def ratios(device: str, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Ideal time over time of each "case/backend" of ours that runs here, and what was wrong with results."""
    found, bad = {}, []
    for case in cases(device):
        rows, refused = run(case, [name for name in BACKENDS[device] if name != "reference"], device, seconds)
        for row in rows + refused:
            print(line(row), flush=True)
        ours = [row for row in rows if row["contestant"] in OURS]
        found |= {f"{row['case']}/{row['contestant']}": row["of_ideal"] for row in ours if "of_ideal" in row}
        bad += [f"{row['case']}/{row['contestant']}: {row.get('refused', 'error ' + str(row.get('error')))}"
                for row in wrong(rows, refused)]
    return found, bad


def decoder_ratios(device: str, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Of each "case/backend" of ours that runs here the time of PyTorch's own, first in decoder_peers.peers, over ours,
    and what was wrong with results. The calls that take most of decoder and projector. cuDNN picks its algorithms
    anew in each process, whose times differ by 10 %: on a GPU ours are held against the product where computing binds,
    and take turns with it alone.
    """
    found, wrong, names = {}, [], [name for name in decoder_peers.BACKENDS[device] if name != "reference"]
    for case in decoder_cases.grid(device, quick=True):
        computes = device == "cuda" and case.op not in decoder_cases.BYTES
        peer = decoder_peers.peers(case, device)[0]
        rows, refused = bench_decoder.run(case, names, [] if computes else [peer], device, seconds)
        for row in rows + refused:
            print(bench_decoder.line(row), flush=True)
        found |= {f"{row['case']}/{row['contestant']}": row["of_gemm"] if computes else row["of_peer"][peer]
                  for row in rows if row["contestant"] in names and (computes or peer in row["of_peer"])}
        wrong += [f"{row['case']}/{row['contestant']}: {row.get('refused', 'error ' + str(row.get('error')))}"
                  for row in bench_decoder.wrong(rows, refused, bench_decoder.WORST)]
    return found, wrong


def block_ratios(device: str, seconds: float) -> tuple[dict[str, float], list[str]]:
    """The reference's time over that of each "case/backend" of ours that runs here, and what was wrong with results;
    nothing on a CPU, where the reference is all there is.
    """
    found, wrong = {}, []
    for case in bench_block.grid(device) if device == "cuda" else []:
        rows = bench_block.run(case, device, seconds)
        print("\n".join(map(bench_decoder.line, rows)), flush=True)
        found |= {f"{row['case']}/{row['contestant']}": row["of_peer"]["reference"] for row in rows
                  if "of_peer" in row and row["contestant"] != "reference"}
        wrong += bench_block.wrong(rows)
    return found, wrong


def upscaler_ratios(device: str, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Floor over time of a steady chunk of the device's usual case; nothing can be wrong with it."""
    case = upscaler_stream.usual(device)
    model = upscaler_stream.random_model(case.config, case.dtype, device)
    stream = upscaler_stream.Stream(case, model, upscaler_stream.FEWEST)
    found = {case.key: float(f"{bench_upscaler.of_floor(stream, seconds):.5g}")}
    print(f"{case.key}: steady chunk at {found[case.key]:.3f} of the floor", flush=True)
    return found, []


def gate(found: dict[str, float], committed: dict[str, float], bound: float) -> list[str]:
    """Which ratios fell below committed / bound, or are gone, one line each; empty if none."""
    worse = []
    for key, before in committed.items():
        if key not in found:
            worse.append(f"{key}: was {before:.3f}, did not run")
        elif found[key] * bound < before:
            worse.append(f"{key}: {found[key]:.3f}, was {before:.3f}: takes "
                         f"{before / found[key]:.2f}x as long, allowed {bound}x")
    return worse


def versions() -> dict[str, str]:
    """Major and minor version of torch and Triton."""
    found = {}
    for package in ("torch", "triton"):
        try:
            found[package] = ".".join(version(package).split(".")[:2])
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def check_ratios(ratios: Ratios, device: str, seconds: float, path: Path, record: str | None) -> list[str]:
    """Measures, prints, and gates or, as of the commit record, writes; what is worse, one line each."""
    # Which of the op's builds runs on a CPU decides more than anything else: figures are of an instruction set.
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {machine.instructions()}"
    everything = json.loads(path.read_text()) if path.exists() else {}
    found, wrong = ratios(device, seconds)
    committed = everything.get(name)
    if record and not found:
        print(f"check: no backend of ours ran on {name}: nothing recorded")
    elif record:
        about = {"cpu": machine.cpu_name(), "commit": record, **versions()}
        save(path, everything | {name: {"about": about, "ratios": found}})
        print(f"check: recorded {len(found)} ratios of {name}")
    elif committed is None:
        print(f"check: no figures are committed for {name}: reported only (--update records them)")
    elif device == "cuda" and any(committed["about"][key] != value for key, value in versions().items()):
        print(f"check: figures of {name} are of {committed['about']}, here is {versions()}: reported only")
    else:
        about = committed["about"]
        print(f"check: {name} against commit {about['commit']} ({about['cpu']}, torch {about['torch']})")
        wrong += gate(found, committed["ratios"], BOUND[device])
    return wrong


def check_static(path: Path, update: bool) -> list[str]:
    """Compiles for ARCHS, and gates or records; what is worse, one line each."""
    triton = versions()["triton"]
    if triton == "not installed":
        print("check: Triton is not installed (pip install 'triton>=3.6'): its kernels were not compiled")
        return []
    found = static_facts(aot.compiled(list(ARCHS)))
    if update:
        save(path, {"triton": triton, "facts": found})
        print(f"check: recorded the facts of {len(found)} kernels")
        return []
    committed = json.loads(path.read_text())
    worse = gate_static(found, committed["facts"], committed["triton"] == triton)
    print(f"check: {len(found)} kernels compiled by Triton {triton}, committed {len(committed['facts'])} by "
          f"{committed['triton']}")
    return worse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="record figures instead of gating")
    parser.add_argument("--commit", default=machine.commit(), help="to record, where there is no git")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="some gates alone: "
                        "ratios of attention, the decoder, what surrounds attention in a block (on a GPU), the whole "
                        "model, or the compilers' facts")
    parser.add_argument("--baseline", type=Path, default=RESULTS / "attention_ratios.json")
    parser.add_argument("--decoder-baseline", type=Path, default=RESULTS / "decoder_ratios.json")
    parser.add_argument("--block-baseline", type=Path, default=RESULTS / "block_ratios.json")
    parser.add_argument("--upscaler-baseline", type=Path, default=RESULTS / "upscaler_ratios.json")
    parser.add_argument("--static", type=Path, default=RESULTS / "static.json")
    parser.add_argument("--seconds", type=float, default=2, help="of timing for a case, at least")
    args = parser.parse_args(argv)
    worse = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.part != ["static"]:
        torch.set_num_threads(1)
    record = args.commit if args.update else None
    for part, measured, path in (("ratios", ratios, args.baseline),
                                 ("decoder", decoder_ratios, args.decoder_baseline),
                                 ("block", block_ratios, args.block_baseline),
                                 ("upscaler", upscaler_ratios, args.upscaler_baseline)):
        if part in args.part:
            worse += check_ratios(measured, device, args.seconds, path, record)
    if "static" in args.part:
        worse += check_static(args.static, args.update)
    for one in worse:
        print(f"check: WORSE: {one}")
    print("check: " + (f"{len(worse)} failed" if worse else "all within bounds"))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
