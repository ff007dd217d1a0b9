"""Decoder and projector: every convolution and pixel pass alone, and both stages whole, ours and PyTorch's.

    python -m benchmarks.bench_decoder [--quick] [--json FILE.json --plot FILE.png]

First a line with the machine; then one line for each case and contestant: median, 20th and 80th percentile of
the time; TFLOP/s, or GB/s where memory is what binds; that over the rate of a large matrix product (8192^3 in
bf16; on a CPU 1024^3), or of a large copy, in the same run; RMS error against float32 over RMS; of stages the
GiB held (weights, memory, inputs) and worked in beside that; and for ours the time of each peer over ours.
Peers are cuDNN's convolutions (oneDNN's on a CPU), channels last, with bias, addition and ReLU fused, which
get past or tail joined beforehand; "-cat" joins inside the clock, "-split" adds two convolutions, "-unfused"
runs operators one by one; "-conv" is the 3x3 alone. How is timed: timing.py; the calls: decoder_cases.py;
whole stages: decoder_stages.py, their peers: plain.py, of which the fastest form is compiled too. Exit 1 if
one of our backends gave a wrong result or an error other than that it cannot run the case.
"""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashvsr_kernels import backends

from . import plain
from .bench_attention import about, first_line, save
from .decoder_cases import BYTES, Case, error, exact, grid
from .decoder_peers import BACKENDS, OURS, Contestant, captured, contestant, make_sets, peers, yardstick
from .decoder_stages import Stage, Step, Work, allocated, peak, stages, used
from .plot_bars import draw
from .timing import ask_turn, measure, ratio, summary

WORST = .03        # of a call, RMS error over RMS: bf16 has 2e-3 to 4e-3, a wrong tap or border .05 to 1
WORST_STAGE = .1   # of thirty calls one after the other, and bytes
OP = {"decoder": "conv3x3", "projector": "causal_conv3d"}  # a backend that has it is timed in the stage


def rows_of(key: str, ready: dict[str, Contestant], amount: float, bound: str, dtype: str, device: str,
            seconds: float, against: list[str], turn: str = "short") -> list[dict]:
    """Times the contestants in turn with a product ("flop") or copy ("bytes").

    amount: FLOP or bytes of one run    against: the peers that ours are compared with
    """
    name, call, its_amount = yardstick(bound, device, dtype)
    call()
    every = {name: Contestant(call)} | ready
    times = measure({one: made.call for one, made in every.items()}, device, seconds, turn)
    times = {one: [t / every[one].runs for t in found] for one, found in times.items()}
    unit, scale = ("tflops", 1e6) if bound == "flop" else ("gbs", 1e3)
    best = its_amount / summary(times[name])["us"] / scale
    rows = []
    for one, found in times.items():
        row = {"case": key, "contestant": one, **summary(found)}
        row[unit] = (its_amount if one == name else amount) / row["us"] / scale
        row[f"of_{name}"] = row[unit] / best
        if one in OURS:
            row["of_peer"] = {peer: float(f"{ratio(times[peer], found, len(times)):.4g}")
                              for peer in against if peer in times}
        if every[one].alone:
            row["no_graph"] = every[one].alone
        rows.append({key: float(f"{value:.5g}") if isinstance(value, float) else value
                     for key, value in row.items()})
    return rows


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
def run(case: Case, names: list[str], against: list[str], device: str, seconds: float,
        turn: str = "short") -> tuple[list[dict], list[dict]]:
    """Rows of the contestants that run the case, and the refusals of those that do not.

    names: of ours; if none of them runs there are no rows    against: of decoder_peers.peers
    """
    sets = make_sets(case, device)
    ready, errors, refused, true = {}, {}, [], exact(case, sets[0])
    for name in [*names, *against]:
        if not any(one in OURS for one in ready) and name not in names:
            break
        try:
            first, ready[name] = contestant(name, case, sets)
            errors[name] = error(first, true)
        except Exception as fault:  # of ours the run fails by it, unless it says that it cannot run the case
            refused.append(_refusal(case.key, name, fault))
    del true
    rows = []
    if ready:
        bound = "bytes" if case.op in BYTES else "flop"
        amount = case.bytes if case.op in BYTES else case.flop
        rows = rows_of(case.key, ready, amount, bound, case.dtype, device, seconds, against, turn)
    for row in rows:
        if row["contestant"] in errors:
            row["error"] = float(f"{errors[row['contestant']]:.3g}")
    return rows, refused


def _refusal(key: str, name: str, fault: Exception) -> dict:
    told = " ".join(str(fault).split())[:300]
    return {"case": key, "contestant": name, "refused": f"{type(fault).__name__}: {told}"}


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
def run_stage(stage: Stage, names: list[str], compiled: bool, device: str, seconds: float,
              turn: str = "short") -> tuple[list[dict], list[dict]]:
    """As run. Peers: all forms of plain.py's module, and the fastest compiled if asked."""
    work = Work(stage, device)
    # As in decoder_cases.exact, no algorithms are tried.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        true = work.ours("reference", torch.float32)()
    forms = {f"plain-{form}": form for form in
             (plain.DECODER if stage.part == "decoder" else plain.PROJECTOR)}
    ready, facts, refused = {}, {}, []

    def add(name: str, make: Callable[[], Step]) -> None:
        try:
            if name in OURS and (reason := backends()[OP[stage.part]].get(name, "there is no such backend")):
                raise NotImplementedError(f"{OP[stage.part]}: {reason}")
            before = allocated(device)
            step = make()
            held = allocated(device) - before + work.frames.nbytes + work.latent.nbytes
            facts[name] = {"error": float(f"{error(step(), true):.3g}")}
            if device == "cuda":
                facts[name] |= {"held_gib": round(held / 2 ** 30, 3), "working_gib": round(peak(step), 3)}
            if name in OURS:
                facts[name]["used"] = used(step)
            ready[name] = captured(step, device)
        except Exception as fault:  # as in run
            refused.append(_refusal(stage.key, name, fault))
    for name in names:
        add(name, partial(work.ours, name))
    for name, form in forms.items():
        add(name, partial(work.plain, form, compiled=False))
    if compiled:
        quick = measure({name: ready[name].call for name in forms if name in ready}, device, 0)
        fastest = min(quick, key=lambda name: sum(quick[name]))
        add("plain-compiled", partial(work.plain, forms[fastest], compiled=True))
        facts.get("plain-compiled", {})["form"] = forms[fastest]
    rows = rows_of(stage.key, ready, stage.flop, "flop", stage.dtype, device, seconds,
                   [*forms, "plain-compiled"], turn)
    return [row | facts.get(row["contestant"], {}) for row in rows], refused


def line(row: dict) -> str:
    """A row as printed: the same columns in every line, - where one does not apply."""
    if "refused" in row:
        return f"{row['case']:52} {row['contestant']:15} not run: {row['refused']}"
    unit, share, what = (("tflops", "of_gemm", "TFLOP/s {:4.0%} of GEMM") if "tflops" in row else
                         ("gbs", "of_copy", "GB/s    {:4.0%} of copy"))
    wrong = f"{row['error']:.1e}" if "error" in row else "-"
    text = (f"{row['case']:52} {row['contestant']:15} {row['us']:10.1f} us (p20 {row['p20']:10.1f} p80 "
            f"{row['p80']:10.1f}) {row[unit]:9.4g} {what.format(row[share])}  error {wrong:>7}")
    if "held_gib" in row:
        text += f"  {row['held_gib']:.2f} + {row['working_gib']:.2f} GiB"
    text += "".join(f"  {times:.3f} of {peer}" for peer, times in row.get("of_peer", {}).items())
    return text + (f"  (no CUDA graph: {row['no_graph']})" if "no_graph" in row else "")


def wrong(rows: list[dict], refused: list[dict], worst: float) -> list[dict]:
    """The rows of ours that must fail the run."""
    return ([row for row in rows if row["contestant"] in OURS and not row["error"] <= worst] +
            [row for row in refused
             if row["contestant"] in OURS and not row["refused"].startswith("NotImplementedError")])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_decoder", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--device", choices=BACKENDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=OURS, help="ours; default: the device's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile of the stages' peers; default: on a GPU")
    parser.add_argument("--picture", help="output HEIGHTxWIDTH, multiples of 128")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases named with one of these")
    parser.add_argument("--seconds", type=float, default=2, help="of timing for a case, at least")
    ask_turn(parser)
    parser.add_argument("--commit", help="what to record where this is no git repository")
    parser.add_argument("--json", type=Path, help="write the figures, case by case")
    parser.add_argument("--plot", type=Path, help="draw them, as PNG")
    args = parser.parse_args(argv)
    sides = (args.picture or "128x128").split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 128 == 0 for side in sides):
        parser.error(f"--picture must be HEIGHTxWIDTH in multiples of 128, got {args.picture}")
    every = stages(args.device, args.picture) + grid(args.device, args.quick, args.picture)
    args.cases = [case for case in every if not args.only or any(text in case.key for text in args.only)]
    if not args.cases:
        parser.error("--only fits no case of: " + " ".join(case.key for case in every))
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = about(args.device, args.commit)
    print(first_line(facts, args.device))
    names = args.backends or BACKENDS[args.device]
    document = {"machine": facts, "seconds": args.seconds, "turn": args.turn, "rows": [], "refused": []}
    bad = []
    for case in args.cases:
        if isinstance(case, Stage):
            rows, refused = run_stage(case, names, args.compile, args.device, args.seconds, args.turn)
        else:
            rows, refused = run(case, names, peers(case, args.device), args.device, args.seconds, args.turn)
        document["rows"] += rows
        document["refused"] += refused
        bad += wrong(rows, refused, WORST_STAGE if isinstance(case, Stage) else WORST)
        print("\n".join(map(line, rows + refused)), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the graphs' pools
        if args.json:
            save(args.json, document)
    if args.plot:
        draw(document, args.plot)
    for row in bad:
        print(f"WRONG: {line(row)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
