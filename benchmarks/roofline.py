"""What another GPU should reach, worked out from what was measured here and from the model's FLOP and bytes.

    python -m benchmarks.roofline --gpu a100 [--measured benchmarks/results/attention_h100.json]

Nothing here was run on that GPU. Every assumption is printed beside the figure it enters. FLOP and bytes are
those of one steady chunk (8 frames) of the official v1.1 shapes at 768x1408.
"""
import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from flashvsr_model.config import (LATENT_FRAMES, PATCH, PRESETS, SCALE, SLICE_FRAMES, TILE,
                                   FlashVSRConfig)
from flashvsr_model.state import Geometry

MEASURED = Path(__file__).parent / "results" / "attention_h100.json"
HEIGHT, WIDTH = 768, 1408
BLOCK_FLOP = 4 * 128 * 128 * 128  # of one kept block forward, D 128
SCORES = 128 * 128
FA2 = 204, 372  # TFLOP/s forward, D 128, as published for an A100 and (with FlashAttention-3) for an H100


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets: multiprocessors, boost MHz, dense bf16 TFLOP/s, memory TB/s.

    mma: bf16 FLOP a clock of a multiprocessor by mma.sync    fp32, exp2: float32 and special-function lanes
    """
    name: str
    processors: int
    mhz: int
    peak: float
    memory: float
    mma: float
    fp32: int
    exp2: int


# On an H100 mma.sync reaches .629 of wgmma's 4096 FLOP a clock (published microbenchmarks, arXiv 2402.13499).
H100 = Gpu("H100 SXM", 132, 1830, 989.4, 3.35, .629 * 4096, 128, 16)
GPUS = {"a100": Gpu("A100 SXM 40GB", 108, 1410, 312, 1.555, 2048, 64, 16),
        "a100-80gb": Gpu("A100 SXM 80GB", 108, 1410, 312, 2.039, 2048, 64, 16)}


def measured_rows(path: Path) -> dict[str, dict]:
    """The rows of the main case (forward, bf16, D 128, cv nearest 17.5 %) by contestant.

    Raises FileNotFoundError or ValueError that name the command which makes them.
    """
    command = f"python -m benchmarks.bench_attention --json {path} on an H100"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run: {command}")
    document = json.loads(path.read_text())
    if "H100" not in document["machine"].get("gpu", ""):
        found = document["machine"].get("gpu", "a CPU")
        raise ValueError(f"{path} is of {found}, not of an H100; run: {command}")
    rows = [row for row in document["rows"] if row["case"].startswith(f"fwd/{HEIGHT}x{WIDTH}/h12/d128/bf16/")
            and .4 < row["density"] < .5]
    if not any(row["contestant"] == "cuda" and "clocks.sm" in row["under_load"] for row in rows):
        raise ValueError(f"{path} has no row of the backend cuda, with its clock, at {HEIGHT}x{WIDTH}; "
                         f"run: {command}")
    near = min((row["case"] for row in rows if row["contestant"] == "cuda"),
               key=lambda case: abs(float(case.rsplit("cv", 1)[1]) - .175))
    return {row["contestant"]: row for row in rows if row["case"] == near} | {"machine": document["machine"]}


def attention(gpu: Gpu, tflops: float, mhz: float) -> list[tuple[str, float, str]]:
    """Three predictions of the cuda backend's TFLOP/s on gpu: name, figure, assumption.

    tflops, mhz: measured on the H100, and its SM clock under that load
    """
    cycles = BLOCK_FLOP / (tflops * 1e12 / (H100.processors * mhz * 1e6))  # of a multiprocessor, a block
    tensor, beside = BLOCK_FLOP / H100.mma, cycles - BLOCK_FLOP / H100.mma
    here = BLOCK_FLOP / gpu.mma
    softmax = SCORES / gpu.exp2, 5 * SCORES / gpu.fp32

    def rate(cycles: float) -> float:
        return BLOCK_FLOP / cycles * gpu.processors * gpu.mhz * 1e6 / 1e12
    return [("same share of the mma.sync rate", rate(here * cycles / tensor),
             f"a block takes {cycles:.0f} clocks of an H100 multiprocessor, {tensor:.0f} of them the tensor "
             f"cores' at their best: {tensor / cycles:.0%}. That share carries over"),
            ("same clocks beside the products", rate(here + max(beside, 0)),
             f"the other {beside:.0f} clocks (waiting, ldmatrix, softmax not hidden) do not depend on the "
             "tensor cores"),
            ("softmax at half the lanes", rate(here + max(beside, 0) * H100.fp32 / gpu.fp32),
             f"those clocks grow by {H100.fp32 / gpu.fp32:g}, as if all were float32 work ({gpu.fp32} lanes, "
             f"not {H100.fp32}); for scale: exp2 of a block needs {softmax[0]:.0f} clocks, 5 float32 "
             f"operations a score {softmax[1]:.0f}, products {here:.0f}")]


def parts(config: FlashVSRConfig, height: int, width: int) -> list[tuple[str, float, float]]:
    """Name, FLOP and bytes (bf16) of each part of one steady chunk.

    Bytes: every weight once, every product's operands and result once, the ring's K and V once a layer.
    """
    blocks, d, f = height // TILE * (width // TILE), config.dim, config.ffn_dim
    L, layers = blocks * 128, config.num_layers
    weights = 6 * d * d + 2 * d * f
    linears = 2 * L * weights, 2 * (weights + L * (6 * 2 * d + 2 * (d + f)))
    kept = min(config.topk(height, width), blocks ** 2 * config.ring_slices) * config.num_heads
    sparse = kept * 4 * 128 * 128 * config.head_dim, 2 * L * d * (2 + 2 * config.ring_slices)
    cross = 4 * L * config.context_len * d, 2 * d * (2 * L + 2 * config.context_len)
    norms = 0, 2 * L * d * 14  # three norms, two gates, norms of q and k with rotation: in and out
    found = [("linears", *linears), ("sparse attention", *sparse), ("cross attention", *cross),
             ("norms, rotation, gates", *norms)]
    found = [(name, layers * flop, layers * size) for name, flop, size in found]
    return found + [("LQ projector", *_projector(config, height, width)),
                    ("decoder", *_decoder(config, height, width))]


def _projector(config: FlashVSRConfig, height: int, width: int) -> tuple[float, float]:
    clips, inside = SLICE_FRAMES // LATENT_FRAMES, 3 * PATCH * PATCH
    places = height // PATCH * (width // PATCH)
    a, b = config.lq_hidden
    weights = 36 * inside * a, 36 * a * b, b * config.dim  # kernels of 4 x 3 x 3
    flop = 2 * clips * places * (2 * weights[0] + weights[1] + weights[2])
    return flop, 2 * (sum(weights) + clips * places * (4 * inside + 2 * 2 * a + 2 * b + config.dim))


def _decoder(config: FlashVSRConfig, height: int, width: int) -> tuple[float, float]:
    """As flashvsr_model.decoder runs: three 3x3 convolutions a memory block; growth in time, enlargement and
    the convolution behind them as one of 2x2 taps an output pixel."""
    places, steps, flop, size = height * width // 64, SLICE_FRAMES // LATENT_FRAMES, 0, 0

    def layer(weights: int, into: int, out: int, places: int) -> None:
        nonlocal flop, size
        flop, size = flop + 2 * weights * places, size + 2 * (weights + places * (into + out))
    widths = config.decoder_channels
    first = 3 * LATENT_FRAMES * 64 + config.latent_channels
    layer(9 * first * widths[0], first, widths[0], steps * places)
    layer(9 * widths[0] ** 2, widths[0], widths[0], steps * places)
    for width, out, grow in zip(widths, widths[1:], (1, 2, 2)):
        for _ in range(3):
            layer(18 * width * width, 2 * width, width, steps * places)
            layer(9 * width * width, width, width, steps * places)
            layer(9 * width * width, 2 * width, width, steps * places)
        steps, places = grow * steps, 4 * places
        layer(4 * width * out, width // 4, out, steps * places)
    layer(9 * widths[3] ** 2, widths[3], widths[3], steps * places)
    layer(9 * widths[3] * 3, widths[3], 3, steps * places)
    return flop, size


def floor(config: FlashVSRConfig, g: Geometry, itemsize: int = 2) -> list[tuple[str, float, float]]:
    """Name, FLOP and bytes of what one steady chunk cannot do without. The floor is the sum of their times.

    Bytes count where there is no matrix product to hide them: the norms' as in parts; of enlarged pictures,
    and of those of 8 bits, made from float32. Masks and all that is not here should cost nothing.
    itemsize: bytes of the model's numbers
    """
    pixels = SLICE_FRAMES * SCALE ** 2 * g.height * g.width
    found = [(name, flop, 0.0) if flop else (name, 0.0, size * itemsize / 2)
             for name, flop, size in parts(config, g.padded_height, g.padded_width)]
    return [("enlargement", 0.0, pixels * 3 * (1 + 1 / SCALE ** 2)), *found, ("colour", 0.0, pixels * 3 * (4 + 1))]


def report(gpu: Gpu, rows: dict[str, dict]) -> list[str]:
    """The lines to print."""
    about, cuda, gemm = rows["machine"], rows["cuda"], rows["gemm"]
    alone = cuda["under_load"]  # the kernel by itself, so that the clock is its own
    guesses = attention(gpu, alone["tflops"], alone["clocks.sm"])
    same = gpu.mma * gpu.processors * gpu.mhz / (H100.mma * H100.processors * alone["clocks.sm"])
    out = [f"# {gpu.name}: a forecast, from {about['gpu']}, commit {about['commit']}",
           f"measured, {cuda['case']}: cuda {cuda['tflops']:.0f} TFLOP/s in turn with others "
           f"({cuda['of_ideal']:.2f} of ideal), {alone['tflops']:.0f} alone at {alone['clocks.sm']:.0f} MHz",
           "", "sparse attention on it, TFLOP/s on kept blocks (backend cuda: mma.sync and cp.async)",
           *(f"  {rate:5.0f}  {name}: {why}" for name, rate, why in guesses),
           f"  The first one's ratio of the cards is {same:.2f}. FlashAttention-2, also of mma.sync and "
           f"cp.async, is published at {FA2[0]} TFLOP/s on an A100 and {FA2[1]} on an H100: "
           f"{FA2[0] / FA2[1]:.2f}."]
    if "triton" in rows:
        out.append(f"  The backend triton ({rows['triton']['tflops']:.0f} TFLOP/s on the H100) tells nothing "
                   "about it: on sm_90 it is other code (wgmma), for sm_80 it has only been compiled.")
    return out + [""] + _model(gpu, [rate for _, rate, _ in guesses], gemm["tflops"])


def _model(gpu: Gpu, attention: list[float], gemm: float) -> list[str]:
    """The table of parts: gemm and attention are TFLOP/s, measured on the H100 and forecast for gpu."""
    share = gemm / H100.peak
    low, high = sorted((share, .8))
    out = [f"matrix products, convolutions: {low:.2f} to {high:.2f} of the peak {gpu.peak:g} TFLOP/s: the "
           f"H100's share is {share:.2f} ({gemm:.0f} TFLOP/s) under its power limit; .8 is assumed where "
           "that does not bind", f"memory: .85 of {gpu.memory:g} TB/s (assumed)",
           "a part takes the longer of its FLOP and its bytes; parts do not overlap",
           "", f"{'part':24} {'TFLOP':>7} {'GB':>6} {'ms, FLOP':>15} {'ms, bytes':>9}"]
    slow = fast = 0.0
    for name, flop, size in parts(PRESETS["v1.1"], HEIGHT, WIDTH):
        sparse = name == "sparse attention"
        rates = (min(attention), max(attention)) if sparse else (low * gpu.peak, high * gpu.peak)
        times, memory = [flop / rate / 1e9 for rate in rates], size / (.85 * gpu.memory) / 1e9
        slow, fast = slow + max(times[0], memory), fast + max(times[1], memory)
        out.append(f"{name:24} {flop / 1e12:7.2f} {size / 1e9:6.2f} {times[1]:7.1f} {times[0]:7.1f} "
                   f"{memory:9.1f}")
    return out + [f"{'a chunk of 8 frames':24} {'':14} {fast:7.1f} {slow:7.1f}",
                  f"{SLICE_FRAMES / slow * 1e3:.1f} to {SLICE_FRAMES / fast * 1e3:.1f} frames a second at "
                  f"{HEIGHT}x{WIDTH}, masks, launches and video coding not counted; the paper states 16.9 "
                  "on an A100, with a quarter fewer blocks (sparse ratio 1.5)"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="a100")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="written by bench_attention, H100")
    args = parser.parse_args(argv)
    try:
        rows = measured_rows(args.measured)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(report(GPUS[args.gpu], rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
