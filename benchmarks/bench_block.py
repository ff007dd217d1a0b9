"""What surrounds attention in a transformer block: norms, adds, rotary position and the feed-forward's first product.

    python -m benchmarks.bench_block [--quick] [--json FILE.json]

First a line with the machine; then one line for each op and contestant, at the size of a steady chunk: median, 20th
and 80th percentile of the time; GB/s of what must be read and written once, and that over a large copy's rate in the
same run (linear_gelu: TFLOP/s, over a large matrix product's); and for ours the reference's time over it. Calls take
turns over inputs that no cache holds, recorded as CUDA graphs (bench_decoder.py). Exit 1 on a wrong result.
"""
import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashvsr_kernels import (backends, gated_add, gated_add_norm, layer_norm_modulate, linear_gelu, qk_norm_rope,
                              qkv_norm_rope, rms_norm, rope_table)
from flashvsr_model import PRESETS
from flashvsr_model.config import PATCH, SLICE_FRAMES, FlashVSRConfig

from .bench_attention import about, first_line, save
from .bench_decoder import WORST, line, rows_of
from .cases import DTYPES
from .decoder_cases import SHAPE, error
from .decoder_peers import COLD, captured

Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on the tokens of an output picture. tensors: that it reads or writes, of (tokens, dim) each"""
    op: str
    tensors: int
    config: FlashVSRConfig
    size: tuple[int, int]
    dtype: str

    @property
    def tokens(self) -> int:
        return math.prod(self.size) // PATCH ** 2 * SLICE_FRAMES // 4

    @property
    def key(self) -> str:
        return f"{self.op}/{self.tokens}x{self.config.dim}/{self.dtype}"

    @property
    def amount(self) -> float:
        """Bytes, or FLOP of a product."""
        if self.op == "linear_gelu":
            return 2 * self.tokens * self.config.dim * self.config.ffn_dim
        return self.tensors * self.tokens * self.config.dim * DTYPES[self.dtype].itemsize

    def call(self, backend: str, seed: int, device: str) -> Callable[[], Results]:
        """The op by one of its backends on random inputs, which are those of the seed."""
        generator, C = torch.Generator(device).manual_seed(seed), self.config.dim

        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, device=device, generator=generator)).to(DTYPES[self.dtype])
        x, y, *vectors = rand(1, self.tokens, C), rand(1, self.tokens, C), *(rand(C) for _ in range(3))
        if self.op == "linear_gelu":
            weight, bias = rand(self.config.ffn_dim, C, scale=C ** -.5), rand(self.config.ffn_dim)
            return lambda: linear_gelu(x, weight, bias, backend=backend)
        if self.op in ("qkv_norm_rope", "qk_norm_rope"):
            height, width = (side // PATCH for side in self.size)
            tables = tuple(rope_table(torch.arange(n), pairs).to(device) for n, pairs in
                           zip((SLICE_FRAMES // 4, height, width), self.config.rope_split))
            k, v = (x.new_empty(1, self.tokens, self.config.num_heads, self.config.head_dim) for _ in "kv")
            if self.op == "qk_norm_rope":
                return lambda: qk_norm_rope(x, vectors[0], tables, self.config.head_dim, out=k, backend=backend)
            qkv = rand(1, self.tokens, 3 * C)
            return lambda: qkv_norm_rope(qkv, *vectors[:2], tables, self.config.head_dim, out=(k, v), backend=backend)
        return {"rms_norm": lambda: rms_norm(x, vectors[0], backend=backend),
                "layer_norm_modulate": lambda: layer_norm_modulate(x, *vectors[:2], backend=backend),
                "gated_add": lambda: gated_add(x, y, vectors[0], backend=backend),
                "gated_add_norm": lambda: gated_add_norm(x, y, *vectors, backend=backend)}[self.op]


def grid(device: str, picture: str | None = None) -> list[Case]:
    usual, preset, dtype = SHAPE[device]
    height, width = (int(side) for side in (picture or usual).split("x"))
    return [Case(op, tensors, PRESETS[preset], (height, width), dtype) for op, tensors in (
        ("rms_norm", 2), ("layer_norm_modulate", 2), ("gated_add", 3), ("gated_add_norm", 4), ("qk_norm_rope", 2),
        ("qkv_norm_rope", 6), ("linear_gelu", 0))]


@torch.no_grad()
def run(case: Case, device: str, seconds: float) -> list[dict]:
    """Rows of all backends of the case's op that run here."""
    bound = "flop" if case.op == "linear_gelu" else "bytes"
    sets = min(16, math.ceil(COLD / case.amount)) if device == "cuda" and bound == "bytes" else 1
    names = [name for name, reason in backends()[case.op].items() if reason is None]
    ready, firsts = {}, {}
    for name in names:
        try:
            calls = [case.call(name, seed, device) for seed in range(sets)]
            firsts[name] = [x.clone() for x in _tensors(calls[0]())]
        except NotImplementedError:  # the backend runs on another device; backends() does not know the call
            continue
        ready[name] = captured(lambda calls=calls: [call() for call in calls], device, sets)
    rows = rows_of(case.key, ready, case.amount, bound, case.dtype, device, seconds, ["reference"])
    for row in rows:
        if row["contestant"] in firsts:
            pairs = zip(firsts[row["contestant"]], firsts["reference"], strict=True)
            row["error"] = float(f"{max(error(*pair) for pair in pairs):.3g}")
    return rows


def wrong(rows: list[dict]) -> list[str]:
    return [f"{row['case']}/{row['contestant']}: error {row['error']}" for row in rows
            if not row.get("error", 0) <= WORST]


def _tensors(results: Results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_block", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the time")
    parser.add_argument("--device", choices=SHAPE, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", help="output HEIGHTxWIDTH, multiples of 128")
    parser.add_argument("--seconds", type=float, default=2, help="of timing for a case, at least")
    parser.add_argument("--commit", help="what to record where this is no git repository")
    parser.add_argument("--json", type=Path, help="write the figures, case by case")
    args = parser.parse_args(argv)
    facts = about(args.device, args.commit)
    print(first_line(facts, args.device))
    document = {"machine": facts, "seconds": args.seconds, "rows": []}
    for case in grid(args.device, args.picture):
        rows = run(case, args.device, args.seconds / 4 if args.quick else args.seconds)
        document["rows"] += rows
        print("\n".join(map(line, rows)), flush=True)
        if args.json:
            save(args.json, document)
    for one in wrong(document["rows"]):
        print(f"WRONG: {one}")
    return 1 if wrong(document["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
