"""sparse_attn on a CPU against PyTorch's attention with the same mask, in turn in one process.

    python -m benchmarks.bench_cpu_attention --threads 2 --out benchmarks/results/cpu_attention.json

The default shape is one steady chunk of 768x1408 (66 query and 264 key blocks) with 2 of its 12 heads, block
counts that vary from row to row, 45 % of the blocks kept. The peer is scaled_dot_product_attention with a
bool mask over tokens, which has no way to skip blocks. One line a case: median (p20, p80), GFLOP/s counted
from the kept blocks, times as fast as the peer (median over rounds of the ratio within a round), worst
difference between the two.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr_kernels import BLOCK, BlockMask, sparse_attn

from .machine import describe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_mask(heads: int, q_blocks: int, k_blocks: int, density: float) -> Tensor:
    """Bool (1, heads, q_blocks, k_blocks): rows keep 0.7 to 1.3 times density, on average density."""
    kept = density * torch.empty(1, heads, q_blocks, 1).uniform_(0.7, 1.3)
    return torch.rand(1, heads, q_blocks, k_blocks) < kept


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in ms."""
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_ms": statistics.median(times) * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}


def compare(dtype: str, args: argparse.Namespace) -> list[dict]:
    """One row for the peer and one for sparse_attn."""
    torch.manual_seed(0)
    mask = make_mask(args.heads, args.q_blocks, args.k_blocks, args.density)
    q, k, v = (torch.randn(1, blocks * BLOCK, args.heads, args.dim).to(DTYPES[dtype])
               for blocks in (args.q_blocks, args.k_blocks, args.k_blocks))
    lists, tokens = BlockMask.from_dense(mask), mask.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    calls = {"sdpa": lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=tokens).transpose(1, 2),
             "cpu": lambda: sparse_attn(q, k, v, lists, backend="cpu")}
    worst = (calls["sdpa"]().float() - calls["cpu"]().float()).abs().max().item()  # and warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.rounds):
        for name in list(calls)[::1 if turn % 2 else -1]:
            times[name].append(seconds(calls[name]))
    speedup = statistics.median(peer / ours for peer, ours in zip(times["sdpa"], times["cpu"]))
    flop = 4 * args.dim * BLOCK * BLOCK * mask.sum().item()
    return [{"op": "sparse_attn", "backend": name, "dtype": dtype, "density": lists.density(),
             **spread(values), "gflops": flop / statistics.median(values) / 1e9,
             "speedup": speedup if name == "cpu" else 1.0, "difference": worst}
            for name, values in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--q-blocks", type=int, default=66)
    parser.add_argument("--k-blocks", type=int, default=264)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, choices=(64, 128), default=128)
    parser.add_argument("--density", type=float, default=0.45)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe()
    print(", ".join(f"{name} {machine[name]}" for name in ("cpu", "torch", "commit")))
    rows = [row for dtype in args.dtype for row in compare(dtype, args)]
    for row in rows:
        print("{op}  {q}x{k} H={h} D={d} d={density:.2f} {dtype:8}  {backend:5} {median_ms:8.1f} ms "
              "(p20 {p20_ms:.1f} p80 {p80_ms:.1f})  {gflops:6.1f} GFLOP/s  {speedup:.2f}x sdpa  "
              "differ by {difference:.1e}".format(
                  q=args.q_blocks * BLOCK, k=args.k_blocks * BLOCK, h=args.heads, d=args.dim, **row))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "rounds": args.rounds, "threads": args.threads, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
