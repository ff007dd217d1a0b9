"""The whole model on a stream: frames a second, and how near to what the card's own rates allow.

    python -m benchmarks.bench_upscaler [--size 768x1408 --frames 101 --json FILE.json --profile]

Frames come from the host's memory and are upscaled to uint8 ones on the device; reading and writing video is
not timed. Weights are random, of the preset's shapes (upscaler_stream.py). First a line with the machine;
then for each size and sparse ratio:

whole: a clip of --frames, from the first frame pushed to the last one done, in frames a second (median of
three clips, everything compiled and recorded), and the delay of the first frames beside that of the 25 that
they wait for. What warming up took, in which kernels are compiled or found in their cache, and of that what
recording the CUDA graphs took, which each stream does.
memory: the most that PyTorch allocated and reserved, with what weights and the stream's state are of it.
steady: the time from one chunk of 8 frames to the next while chunks follow one another for --seconds, median,
20th and 80th percentile; what the host needs of it; the GPU's clock and power at the end.
floor: what a chunk cannot do without (roofline.floor), FLOP over the rate of a large matrix product (8192^3
in bf16; on a CPU 1024^3) and bytes over that of a large copy, each sustained alone directly after the steady
chunks. On a CPU it is a yardstick alone: its convolutions multiply less than the FLOP say.
stages: a chunk launched eagerly, its time shared out (upscaler_stages.py), each beside its part of the floor;
and which backend ran each op.

Exit 1 if the pixels that come out are all alike.
"""
import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from flashvsr_model import PRESETS
from flashvsr_model.config import SCALE, SLICE_FRAMES

from . import machine, roofline
from .bench_attention import about, first_line, save
from .cases import DTYPES
from .decoder_peers import yardstick
from .decoder_stages import used
from .timing import measure, summary
from .upscaler_stages import kernels, stage_times
from .upscaler_stream import FEWEST, Case, Stream, random_model, seconds, stamp, usual, wait

AHEAD = 2     # chunks that the host may be in front of the device: it never waits, and never runs far away
CLIPS = 3     # timed whole
CHUNKS = 5    # timed in stages
PROFILED = 3  # chunks in a trace
SECONDS = {"cuda": 60.0, "cpu": 2.0}
TRACE = Path("build/upscaler_trace.json")


def whole(stream: Stream) -> dict:
    """Seconds of clips and of their first frames, and of what was done once before."""
    warm_up = stream.model.warm_up(stream.state)
    times = [stream.whole() for _ in range(CLIPS)]
    delay, total = (median(column) for column in zip(*times))
    frames, graphs = len(stream.clip), stream.state.graphs
    row = {"frames": frames, "seconds": total, "fps": frames / total, "first_frame": delay,
           "warm_up": warm_up}
    return row if graphs is None else row | {"recording": graphs.seconds}


def memory(stream: Stream, weights: int) -> dict:
    """GiB of the GPU's memory up to now. weights: bytes that were held before the stream was made"""
    if stream.device == "cpu":
        return {}
    sizes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
             "weights": weights, "state": stream.state.memory()}
    return {name: size / 2 ** 30 for name, size in sizes.items()}


def steady(stream: Stream, duration: float) -> dict:
    """Times of chunks, in us, over so many seconds of them, and the spread of the last one's pixels."""
    stream.start()
    stamps, hosts = [stamp(stream.device)], []
    end = time.perf_counter() + duration
    while time.perf_counter() < end or len(stamps) < 4:
        began = time.perf_counter()
        done = stream.push()
        hosts.append(time.perf_counter() - began)
        stamps.append(stamp(stream.device))
        wait(stamps[-1 - min(AHEAD, len(stamps) - 1)])
    times = [seconds(*pair) for pair in pairwise(stamps)]
    row = {**summary(times), "chunks": len(times), "host_us": summary(hosts)["us"]}
    if stream.device == "cuda":
        for _ in range(2 * AHEAD):
            done = stream.push()
        row["under_load"] = machine.gpu_state()
    sample = done[-1, ::4, ::4].float()
    return row | {"fps": SLICE_FRAMES / row["us"] * 1e6, "pixel_std": sample.std().item()}


def rates(device: str, dtype: str, duration: float) -> dict[str, float]:
    """FLOP/s of the large product and bytes/s of the large copy, each alone for so many seconds."""
    found = {}
    for bound in ("flop", "bytes"):
        name, call, amount = yardstick(bound, device, dtype)
        call()
        found[bound] = amount / median(measure({name: call}, device, duration)[name])
    return found


def floor(case: Case, rate: dict[str, float]) -> list[dict]:
    """Parts of the floor: stage, FLOP, bytes and us at these rates."""
    parts = roofline.floor(case.config, case.geometry, DTYPES[case.dtype].itemsize)
    return [{"stage": name, "tflop": flop / 1e12, "gb": size / 1e9,
             "floor_us": (flop / rate["flop"] + size / rate["bytes"]) * 1e6} for name, flop, size in parts]


def of_floor(stream: Stream, duration: float) -> float:
    """Floor over steady time, with chunks, products and copies in turn: for check, as it repeats."""
    stream.start()
    case, calls, amounts = stream.case, {"chunk": stream.push}, {}
    for bound in ("flop", "bytes"):
        _, calls[bound], amounts[bound] = yardstick(bound, stream.device, case.dtype)
        calls[bound]()
    times = measure(calls, stream.device, duration)
    found = []
    for chunk, flop, size in zip(*times.values()):
        parts = floor(case, {"flop": amounts["flop"] / flop, "bytes": amounts["bytes"] / size})
        found.append(sum(part["floor_us"] for part in parts) / 1e6 / chunk)
    return median(found)


def stages(stream: Stream, parts: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Rows of the floor's parts with what each took, those of other stages; and runs of each "op backend"."""
    known = {part["stage"]: part for part in parts}
    rows = [{"stage": name, "us": took * 1e6} | known.get(name, {})
            for name, took in stage_times(stream, CHUNKS).items()]
    graphs, stream.state.graphs = stream.state.graphs, None
    try:
        ran = used(stream.push)
    finally:
        stream.state.graphs = graphs
    return rows, ran


def run(stream: Stream, weights: int, duration: float) -> tuple[dict, list[dict]]:
    """The case's row, and those of its stages; printed as they come."""
    case = stream.case
    print(case.key)
    row = {"case": case.key, "whole": _short(whole(stream))}
    print(whole_line(row["whole"]), flush=True)
    row["steady"] = took = _short(steady(stream, duration))
    row["memory"] = _short(memory(stream, weights))
    if row["memory"]:
        print("  memory   peak {allocated:.2f} GiB allocated, {reserved:.2f} reserved; weights {weights:.2f},"
              " state {state:.2f}".format(**row["memory"]))
    print(steady_line(took), flush=True)
    rate = rates(stream.device, case.dtype, duration / 10)
    parts = floor(case, rate)
    bound, flop, size = (sum(part[key] for part in parts) for key in ("floor_us", "tflop", "gb"))
    row["floor"] = _short({"us": bound, "of_floor": bound / took["us"], "tflop": flop, "gb": size,
                           "gemm_tflops": rate["flop"] / 1e12, "copy_gbs": rate["bytes"] / 1e9})
    print(floor_line(row["floor"]), flush=True)
    rows, row["backends"] = stages(stream, parts)
    rows = [{"case": case.key, **_short(stage)} for stage in rows]
    total = sum(stage["us"] for stage in rows)
    ran = ", ".join(f"{name} {count}x" for name, count in row["backends"].items())
    print("\n".join(map(stage_line, rows)))
    print(f"  {'an eager chunk':24} {total:10.1f} us, steady {took['us']:.1f}\n  ran      {ran}", flush=True)
    return row, rows


def whole_line(row: dict) -> str:
    graphs = f", of it recording graphs {row['recording']:.2f} s" if "recording" in row else ""
    return (f"  whole    {row['fps']:.2f} FPS: {row['frames']} frames in {row['seconds']:.3f} s, the first "
            f"after {row['first_frame']:.3f} s; warming up before {row['warm_up']:.1f} s{graphs}")


def steady_line(row: dict) -> str:
    state = row.get("under_load", {})
    load = (f"; SM {state['clocks.sm']} MHz, {state['power.draw']} of {state['power.limit']} W"
            if "clocks.sm" in state else "")
    return (f"  steady   {row['fps']:.2f} FPS: {row['us']:.0f} us a chunk (p20 {row['p20']:.0f} p80 "
            f"{row['p80']:.0f}), {row['chunks']} chunks; the host {row['host_us']:.0f} us{load}")


def floor_line(row: dict) -> str:
    return (f"  floor    {row['us']:.0f} us: {row['tflop']:.4g} TFLOP at {row['gemm_tflops']:.4g} TFLOP/s, "
            f"{row['gb']:.4g} GB at {row['copy_gbs']:.4g} GB/s; floor / steady {row['of_floor']:.3f}, "
            f"steady / floor {1 / row['of_floor']:.3f}")


def stage_line(row: dict) -> str:
    text = f"  {row['stage']:24} {row['us']:10.1f} us"
    if "floor_us" not in row:
        return text
    return (f"{text}, floor {row['floor_us']:9.1f}: {row['tflop']:8.4g} TFLOP {row['gb']:8.4g} GB, "
            f"{row['floor_us'] / row['us']:.3f} of it")


def kernel_line(row: dict) -> str:
    return f"  {row['us']:10.1f} us {row['share']:6.1%} {row['runs']:7g}x  {row['kernel'][:120]}"


def _short(row: dict) -> dict:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_upscaler",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=SECONDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: v1.1 on a GPU, compact on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--size", nargs="+", help="output HEIGHTxWIDTH, multiples of 4, from 64x64")
    parser.add_argument("--sparse-ratio", nargs="+", type=float, help="default: the preset's")
    parser.add_argument("--frames", type=int, default=101, help="of the whole clip")
    parser.add_argument("--seconds", type=float, help="of steady chunks; default: 60 on a GPU, 2 on a CPU")
    parser.add_argument("--quick", action="store_true", help="5 seconds at most, 33 frames")
    parser.add_argument("--profile", nargs="?", const=TRACE, type=Path, metavar="FILE",
                        help=f"table of kernels, and a Chrome trace as FILE, by default {TRACE}; of one case")
    parser.add_argument("--commit", help="what to record where this is no git repository")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args(argv)
    base = usual(args.device)
    preset, dtype = args.preset or base.preset, args.dtype or base.dtype
    for size in args.size or []:
        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) >= 64 and int(side) % SCALE == 0
                                      for side in sides):
            parser.error(f"--size must be HEIGHTxWIDTH in multiples of 4 from 64, got {size}")
    args.cases = [Case(size, preset, dtype, ratio) for size in args.size or [base.size]
                  for ratio in args.sparse_ratio or [PRESETS[preset].sparse_ratio]]
    if args.profile and len(args.cases) > 1:  # its hooks would slow the next case down
        parser.error("--profile takes one --size and one --sparse-ratio")
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    if args.quick:
        args.seconds, args.frames = min(5.0, args.seconds), min(FEWEST, args.frames)
    if args.frames < FEWEST:
        parser.error(f"--frames must be at least {FEWEST}, got {args.frames}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = about(args.device, args.commit)
    print(first_line(facts, args.device), flush=True)
    model = random_model(args.cases[0].config, args.cases[0].dtype, args.device)
    document = {"machine": facts, "seconds": args.seconds, "rows": [], "stages": [], "kernels": []}
    alike = []
    for case in args.cases:
        weights = 0
        if args.device == "cuda":
            torch.cuda.empty_cache()  # what the last case and the drawing of weights left
            torch.cuda.reset_peak_memory_stats()
            weights = torch.cuda.memory_allocated()
        stream = Stream(case, model, args.frames)
        row, rows = run(stream, weights, args.seconds)
        document["rows"].append(row)
        document["stages"] += rows
        if args.json:
            save(args.json, document)
        if not row["steady"]["pixel_std"] > 1:
            alike.append(case.key)
        if args.profile:
            document["kernels"] = kernels(stream, PROFILED, args.profile)
            print("\n".join(map(kernel_line, document["kernels"])) + f"\n  trace    {args.profile}")
        del stream
    if args.json:
        save(args.json, document)
    for key in alike:
        print(f"WRONG: {key}: all pixels are alike")
    return 1 if alike else 0


if __name__ == "__main__":
    sys.exit(main())
