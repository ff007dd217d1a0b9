"""The compact model on a CPU with our C++ convolutions and with PyTorch's, in turn in one process.

    python -m benchmarks.bench_cpu_convolutions --json benchmarks/results/cpu_convolutions.json

Steady chunks of 8 frames of bench_upscaler's usual case, all else as it is. One line for each: median, 20th and 80th
percentile, frames a second; then how many times as fast ours is, the median of ratios within cycles.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from flashvsr_model.config import SLICE_FRAMES

from . import machine
from .bench_attention import save
from .decoder_stages import preferring, used
from .timing import measure, ratio, summary
from .upscaler_stream import FEWEST, Stream, random_model, usual

CONVOLUTIONS = "conv3x3", "upsample_conv", "rgb_conv"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_cpu_convolutions",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30, help="of steady chunks, at least")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts, case = machine.describe(), usual("cpu")
    print(", ".join(f"{name} {facts[name]}" for name in ("cpu", "torch", "commit")), flush=True)
    stream = Stream(case, random_model(case.config, case.dtype, "cpu"), FEWEST)
    stream.start()

    def pytorch() -> Tensor:
        with preferring("reference", CONVOLUTIONS):
            return stream.push()
    calls, ran = {"cpu": stream.push, "pytorch": pytorch}, {}
    for name, call in calls.items():
        ran[name] = used(call)
    times = measure(calls, "cpu", args.seconds)
    rows = [{"case": case.key, "contestant": name, **summary(found), "fps": SLICE_FRAMES * 1e6 / summary(found)["us"],
             "used": ran[name]} for name, found in times.items()]
    rows[0]["as_fast_as"] = {"pytorch": ratio(times["pytorch"], times["cpu"], len(times))}
    for row in rows:
        print("{case} {contestant:8} {us:10.0f} us a chunk (p20 {p20:.0f} p80 {p80:.0f}) {fps:6.2f} frames/s".format(**row))
    print(f"{rows[0]['as_fast_as']['pytorch']:.3f} times as fast as with PyTorch's convolutions")
    if args.json:
        save(args.json, {"machine": facts, "threads": args.threads, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
