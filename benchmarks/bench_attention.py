"""Block-sparse attention, ours and others', on the same lists: time, rate, and how near to ideal.

    python -m benchmarks.bench_attention [--quick] [--thirty] [--no-product] [--json FILE.json --plot FILE.png]

First a line with the machine; then one line for each case and contestant: median, 20th and 80th percentile of
the time; TFLOP/s on the kept blocks (4 D 128^2 a block forward, 2.5 times that backward; dense attention: all
blocks); the same over the rate of a large matrix product (8192^3 in bf16; on a CPU 1024^3); ideal time over
time, ideal being dense attention's (cuDNN's on a GPU) times the density; the error of a few tiles against
float32; the time to build our lists from a bool mask; and how many times as fast as each peer, a median of ratios
within cycles. timing.py says how they are timed, masks.py with which masks; forward calls are replayed as CUDA
graphs, as the model's are, where they can be recorded. Backward is the gradient alone. Exit 1 if one of our backends
gave a wrong result or an error other than that it cannot run the case.
"""
import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flashvsr_kernels import BlockMask, lcsa_mask, local_window

from . import machine, spot_check
from .cases import MODEL_DENSITY, Case, Work, grid
from .decoder_peers import Contestant as Recorded, captured
from .peers import DENSE, EXACT, OURS, PEERS, Contestant, contestant, gemm, missing
from .plot import draw
from .timing import ask_turn, measure, ratio, summary

BACKENDS = {"cuda": ["hopper", "triton", "cuda"], "cpu": ["cpu", "reference"]}
OTHERS = {"cuda": ["flex", "fa4", "fastvideo", "flashinfer", "bsa"], "cpu": ["sdpa-masked"]}


def gather(names: list[str],
           work: Work) -> tuple[dict[str, Recorded], dict[str, float | None], dict[str, str]]:
    """Contestants as they are timed, errors of what they give so (None: attends to all keys of a sparse mask), others'
    reasons.
    """
    ready, errors, refused = {}, {}, {}
    for name in names:
        try:
            ready[name], result, heads_first = timed(contestant(name, work), work)
            compared = name not in EXACT or work.density == 1
            errors[name] = spot_check.error(result, heads_first, work) if compared else None
        except Exception as error:  # other packages raise anything; the reason is printed and kept
            ready.pop(name, None)
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ready, errors, refused


def timed(made: Contestant, work: Work) -> tuple[Recorded, Tensor | tuple[Tensor, ...], bool]:
    """What is timed, the result of a run of it, and its layout.

    Backwards start from Python: they run on the stream of their forward, which the recording's is not.
    """
    held: dict[str, Tensor | tuple[Tensor, ...]] = {}

    def call() -> None:
        held["result"] = made.call()
    call()  # compiles
    recorded = captured(call, work.q.device.type) if work.case.direction == "fwd" else Recorded(call)
    for x in held["result"] if isinstance(held["result"], tuple) else (held["result"],):
        x.fill_(float("nan"))  # or else a recording of nothing would seem right, and fast
    recorded.call()
    return recorded, held["result"], made.heads_first


def run(case: Case, names: list[str], device: str, seconds: float, turn: str = "short",
        product: bool = True) -> tuple[list[dict], list[dict]]:
    """Rows of the contestants that run the case, and the refusals of those that do not.

    product: whether the large one takes turns with them; if not, no rate is told as a part of its
    """
    work = Work.of(case, device)
    ready, errors, refused = gather([DENSE[device], *names], work)
    calls = {name: made.call for name, made in ready.items()}
    if product:
        multiply, product_flop = gemm(device, case.dtype)
        multiply()
        calls = {"gemm": multiply} | calls
    times = measure(calls, device, seconds, turn)
    lists = measure({"lists": lambda: BlockMask.from_dense(work.dense)}, device, seconds / 20)["lists"]
    dense = times.get(DENSE[device])
    rows = []
    for name, found in times.items():
        row = {"case": case.key, "contestant": name, **summary(found), "density": work.density, "cv": work.cv}
        flop = product_flop if name == "gemm" else work.flop / (work.density if name in EXACT else 1)
        row["tflops"] = flop / row["us"] / 1e6
        if product:
            row["of_gemm"] = flop / row["us"] / (product_flop / summary(times["gemm"])["us"])
        if dense and name != "gemm":
            row["of_ideal"] = work.density * ratio(dense, found, len(times))
        if name in ready:
            row["error"] = errors[name]
            row |= {"no_graph": ready[name].alone} if ready[name].alone else {}
        if name in OURS:
            peers = [peer for peer in times if peer not in (*OURS, "gemm", DENSE[device])]
            over = {peer: float(f"{ratio(times[peer], found, len(times)):.5g}") for peer in peers}
            row |= {"as_fast_as": over} if peers else {}
            row["lists_us"] = summary(lists)["us"]
            if device == "cuda":
                row["under_load"] = _under_load(ready[name].call, row["us"], flop)
        rows.append({key: float(f"{value:.5g}") if isinstance(value, float) else value
                     for key, value in row.items()})
    return rows, [{"case": case.key, "contestant": name, "refused": why} for name, why in refused.items()]


def wrong(rows: list[dict], refused: list[dict]) -> list[dict]:
    """Of run's: our wrong results, and our errors other than that a backend cannot run the case."""
    return ([row for row in rows if row["contestant"] in OURS and row["error"] > spot_check.WORST]
            + [row for row in refused
               if row["contestant"] in OURS and not row["refused"].startswith("NotImplementedError")])


def _under_load(call: Callable[[], object], us: float, flop: float) -> dict[str, float | str]:
    """TFLOP/s of .4 s of one contestant alone, and the GPU's clock and power meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    turns = min(1000, int(4e5 / us) + 1)  # more would wait for room in the launch queue
    start.record()
    for _ in range(turns):
        call()
    end.record()
    state = machine.gpu_state()
    end.synchronize()
    return state | {"tflops": float(f"{turns * flop / start.elapsed_time(end) / 1e9:.5g}")}


def mask_rows(pictures: list[str], heads: int, device: str) -> list[dict]:
    """Time of building lists at each size, us: from a bool mask, transposed, and chosen by lcsa_mask.

    us: called from Python    graph_us: replayed as a CUDA graph, which leaves out the launches' own time
    """
    rows = []
    for picture in pictures:
        work = Work.of(Case(picture, .1, 0, heads=heads), device)
        S = work.dense.shape[2]
        q, k = (x.view(1, -1, 128, heads, 128).mean(2).transpose(1, 2) for x in (work.q, work.k))
        local = local_window(*work.case.grid, 11, device=device)
        topk = min(MODEL_DENSITY, 4 * S) * S - 1
        builders = {"from_dense": lambda: BlockMask.from_dense(work.dense, columns=work.case.grid[1]),
                    "transposed": work.mask.transposed,
                    "lcsa_mask": lambda: lcsa_mask(q, k, local, slices=1, topk=topk, columns=work.case.grid[1])}
        for name, build in builders.items():
            build()
            row = {"picture": picture, "heads": heads, "builder": name,
                   **summary(measure({name: build}, device, .2)[name])}
            if device == "cuda":
                row |= _replayed(build)
            rows.append(row)
    return rows


def _replayed(build: Callable[[], object]) -> dict[str, float | str]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            build()
    except RuntimeError as error:
        return {"graph": f"not captured: {' '.join(str(error).split())[:200]}"}
    return {"graph_us": summary(measure({"replay": graph.replay}, "cuda", .2)["replay"])["us"]}


def line(row: dict) -> str:
    """A row as printed: the same columns in every line, - where one does not apply."""
    def of(key: str, form: str) -> str:
        return form.format(row[key]) if row.get(key) is not None else "-"
    if "refused" in row:
        return f"{row['case']:48} {row['contestant']:12} not run: {row['refused']}"
    return (f"{row['case']:48} {row['contestant']:12} {row['us']:10.1f} us (p20 {row['p20']:10.1f} p80 "
            f"{row['p80']:10.1f}) {row['tflops']:9.4g} TFLOP/s {of('of_gemm', '{:.0%}'):>5} of GEMM "
            f"{of('of_ideal', '{:.3f}'):>6} of ideal  error {of('error', '{:.1e}'):>7}  lists "
            f"{of('lists_us', '{:.0f} us'):>8}"
            + "".join(f"  {peer} {over:.3f}x" for peer, over in row.get("as_fast_as", {}).items())
            + (f"  (no CUDA graph: {row['no_graph']})" if "no_graph" in row else ""))


def first_line(about: dict, device: str) -> str:
    if device == "cpu":
        return ", ".join(f"{key} {about[key]}" for key in ("cpu", "torch", "commit"))
    state = about["idle"]
    clocks = state.get("unknown") or (f"SM {state['clocks.sm']} of {state['clocks.max.sm']} MHz, "
                                      f"{state['power.draw']} of {state['power.limit']} W")
    return (f"{about['gpu']}, {clocks}, CUDA {about['cuda']}, torch {about['torch']}, "
            f"triton {about['triton']}, commit {about['commit']}")


def save(path: Path, document: dict) -> None:
    """JSON with a line for each row of a list and each entry of a dict."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        elif isinstance(value, dict):
            text = "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def about(device: str, commit: str | None) -> dict:
    """What machine.describe says, the GPU's clocks, and which CUDA."""
    facts = machine.describe() | ({"commit": commit} if commit else {})
    return facts | ({"cuda": torch.version.cuda, "idle": machine.gpu_state()} if device == "cuda" else {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_attention",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--device", choices=BACKENDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=OURS, help="ours; default: the device's")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: those that are installed")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases named with all of these")
    parser.add_argument("--seconds", type=float, default=4, help="of timing for a case, at least")
    parser.add_argument("--no-product", dest="product", action="store_false",
                        help="leave the large product out of the turns, as where attention's goals were set")
    ask_turn(parser)
    parser.add_argument("--commit", help="what to record where this is no git repository")
    parser.add_argument("--json", type=Path, help="write the figures, case by case")
    parser.add_argument("--plot", type=Path, help="draw them, as PNG")
    args = parser.parse_args(argv)
    cases = grid(args.device, args.quick)
    args.cases = [case for case in cases if all(text in case.key for text in args.only)]
    if not args.cases:
        parser.error("--only fits no case of: " + " ".join(case.key for case in cases))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = about(args.device, args.commit)
    print(first_line(facts, args.device))
    wanted = OTHERS[args.device] if args.peers is None else args.peers
    absent = {name: why for name in wanted if (why := missing(name))}
    for why in absent.values():
        print(f"peer {why}")
    names = (args.backends or BACKENDS[args.device]) + [name for name in wanted if name not in absent]
    document = {"machine": facts, "seconds": args.seconds, "turn": args.turn, "product": args.product,
                "rows": [], "refused": [], "lists": []}
    bad = []
    for case in args.cases:
        rows, refused = run(case, names, args.device, args.seconds, args.turn, args.product)
        document["rows"] += rows
        document["refused"] += refused
        bad += wrong(rows, refused)
        print("\n".join(map(line, rows + refused)), flush=True)
        if args.json:
            save(args.json, document)
    for row in mask_rows(sorted({case.picture for case in args.cases}), args.cases[0].heads, args.device):
        document["lists"].append(row)
        graph = f", as a CUDA graph {row['graph_us']:.1f} us" if "graph_us" in row else row.get("graph", "")
        print(f"{row['builder']:10} {row['picture']} h{row['heads']} {row['us']:8.1f} us{graph}")
    if args.json:
        save(args.json, document)
    if args.plot:
        draw(document, args.plot)
    for row in bad:
        print(f"WRONG: {line(row)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
