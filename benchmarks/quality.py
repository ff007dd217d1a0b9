"""Picture quality of the model against bicubic, Lanczos and Real-ESRGAN animevideov3 on two real clips.

    benchmarks/fetch_data.sh DIR
    python -m benchmarks.quality --data DIR --out benchmarks/results/quality.json --sheet sheet.png
    python -m benchmarks.quality --data DIR --methods ours-float32 ours-bf16 --metrics psnr_y

Every method gets the same low-resolution frames. Columns are means over the frames (metrics.py defines
them): PSNR-Y in dB and SSIM-Y on BT.601 luma; VMAF v0.6.1, and NEG, its variant that gives nothing for
contrast above the truth's; NIQE of every 8th frame, lower is better; temporal difference in 8-bit steps of
luma, lower is better; fps, frames over the wall time of one call here.
"""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import metrics, resize
from .animevideov3 import AnimeVideo
from .clips import CLIPS, Clip, load_clip
from .machine import describe
from .niqe import Statistics, natural_statistics, niqe
from .sheet import crops, pick_crops, write_sheet

METHODS = ("bicubic", "lanczos", "sharpened", "animevideov3", "ours")
PRECISIONS = {"ours-float32": torch.float32, "ours-bf16": torch.bfloat16}  # of the same weights, if asked for
NIQE_EVERY, SEAM_PERIODS = 8, (8, 16, 128)  # output pixels: latent, token and attention block
COLUMNS = (("PSNR-Y", "psnr_y", 2), ("SSIM-Y", "ssim_y", 4), ("VMAF", "vmaf", 1), ("NEG", "vmaf_neg", 1),
           ("NIQE", "niqe", 2), ("temporal", "temporal_difference", 3), ("fps", "fps", 2))
METRICS = [key for _, key, _ in COLUMNS if key != "fps"]


def load_method(name: str, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """The function that makes (T, 4H, 4W, 3) uint8 of (T, H, W, 3) uint8 by the method of this name."""
    if name in resize.FILTERS:
        return lambda frames: resize.grow(frames, name)
    if name == "sharpened":  # what a filter can do: Lanczos and an unsharp mask
        return lambda frames: resize.sharpen(resize.grow(frames, "lanczos"))
    if name == "animevideov3":
        return AnimeVideo(args.data / "weights").upscale
    from flashvsr_model import keep_freed_memory, load_upscaler  # here: the baselines run without the model
    keep_freed_memory()
    options = {"dtype": PRECISIONS[name]} if name in PRECISIONS else {}
    upscaler = load_upscaler(args.weights, device=args.device, **options)
    return lambda frames: upscaler.upscale(frames).cpu()


def measure(out: Tensor, truth: Tensor, natural: Statistics | None, asked: list[str]) -> dict[str, float]:
    """The columns asked for, of a whole clip. natural: for NIQE"""
    per_frame = {"psnr_y": lambda: metrics.psnr_y(out, truth), "ssim_y": lambda: metrics.ssim_y(out, truth),
                 "niqe": lambda: [niqe(frame, natural) for frame in out[::NIQE_EVERY]],
                 "temporal_difference": lambda: metrics.temporal_difference(out, truth)}
    found = {name: values() for name, values in per_frame.items() if name in asked}
    if set(metrics.VMAF) & set(asked):
        found |= {name: values for name, values in metrics.vmaf(out, truth).items() if name in asked}
    return {name: sum(values) / len(values) for name, values in found.items()}


def artefacts(out: Tensor, truth: Tensor) -> dict:
    """Seams, over the truth's; chunk jumps (None for a clip of one chunk); colour shift in 8-bit steps."""
    shift, change = metrics.colour_shift(out, truth), metrics.temporal_difference(out, truth)
    seams = {str(p): metrics.block_seams(out, p) / metrics.block_seams(truth, p) for p in SEAM_PERIODS}
    return {"seams": seams, "chunk_jumps": metrics.chunk_jumps(change) if len(out) > 21 else None,
            "colour_shift": shift.mean(0).tolist(), "colour_shift_worst_frame": shift.abs().max().item(),
            "colour_shift_worst_change": shift.diff(dim=0).abs().max().item()}


def run_clip(clip: Clip, methods: dict[str, Callable], natural: Statistics | None,
             args: argparse.Namespace) -> tuple[dict, list]:
    """A clip's results, printed as they come, and its rows of the contact sheet."""
    low, truth = load_clip(clip, args.data, args.frames, args.low)
    height, width = truth.shape[1:3]
    result = {"about": clip.about, "frames": len(truth), "width": width, "height": height}
    if natural:
        result["truth_niqe"] = measure(truth, truth, natural, ["niqe"])["niqe"]
        print_row(clip.name, "truth", {"niqe": result["truth_niqe"]})
    found, where = {}, pick_crops(truth)
    columns = {"truth": crops(truth, where)}
    for name, upscale in methods.items():
        start = time.perf_counter()
        out = upscale(low)
        seconds = time.perf_counter() - start
        found[name] = measure(out, truth, natural, args.metrics)
        found[name] |= {"fps": len(low) / seconds, "artefacts": artefacts(out, truth)}
        columns[name] = crops(out, where)
        print_row(clip.name, name, found[name])
        if args.frames_dir:
            save_frames(out, args.frames_dir / clip.name / name)
    names = [f"{clip.name} {frame}" for frame, _, _ in where]
    return result | {"methods": found}, list(zip(names, zip(*columns.values(), strict=True), strict=True))


def print_row(clip: str, method: str, values: dict[str, float]):
    cells = [f"{values[key]:{max(len(title), 7)}.{digits}f}" if key in values else " " * max(len(title), 7)
             for title, key, digits in COLUMNS]
    print(f"{clip:5} {method:12} " + "  ".join(cells), flush=True)


def print_artefacts(results: dict[str, dict]):
    print("\nseams: steps across block borders over steps elsewhere, relative to the truth's\n"
          "chunk: temporal difference where a chunk of output begins over that elsewhere\n"
          "colour: mean of out - truth of R, G, B in 8-bit steps; the worst frame; the worst change a step")
    for clip, result in results.items():
        for name, found in result["methods"].items():
            a = found["artefacts"]
            seams = " ".join(f"{p}: {value:.3f}" for p, value in a["seams"].items())
            chunk = "-" if a["chunk_jumps"] is None else f"{a['chunk_jumps']:.3f}"
            colour = " ".join(f"{value:+.2f}" for value in a["colour_shift"])
            print(f"{clip:5} {name:12} seams {seams}  chunk {chunk}  colour {colour}  "
                  f"worst {a['colour_shift_worst_frame']:.2f}, {a['colour_shift_worst_change']:.2f}")


def print_margins(results: dict[str, dict]):
    """How far ours is above Lanczos in PSNR-Y and above bicubic in VMAF, where all three ran; what bf16 costs."""
    for clip, result in results.items():
        found = result["methods"]
        if set(PRECISIONS) <= set(found) and all("psnr_y" in one for one in found.values()):
            loss = found["ours-float32"]["psnr_y"] - found["ours-bf16"]["psnr_y"]
            print(f"{clip}: bf16 costs {loss:+.4f} dB of PSNR-Y against float32")
        if {"ours", "lanczos", "bicubic"} <= set(found) and {"psnr_y", "vmaf"} <= set(found["ours"]):
            psnr = found["ours"]["psnr_y"] - found["lanczos"]["psnr_y"]
            vmaf = found["ours"]["vmaf"] - found["bicubic"]["vmaf"]
            print(f"{clip}: PSNR-Y {psnr:+.2f} dB against Lanczos, VMAF {vmaf:+.1f} against bicubic")


def save_frames(frames: Tensor, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(folder / f"{i:05d}.png", compress_level=1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the folder that fetch_data.sh filled")
    add("--weights", default="compact", help="what ours loads: compact, or a path that load_upscaler takes")
    add("--device", help="where ours runs (default: the GPU if there is one)")
    add("--methods", nargs="+", choices=(*METHODS, *PRECISIONS), default=METHODS)
    add("--metrics", nargs="+", choices=METRICS, default=METRICS, help="default: all, which takes scipy and imageio-ffmpeg")
    add("--commit", help="what to record where this is no git repository")
    add("--clips", nargs="+", choices=[c.name for c in CLIPS], default=[c.name for c in CLIPS])
    add("--frames", type=int, default=97, help="frames of each clip, from its start (default 97)")
    add("--low", choices=("shipped", "area"), default="shipped",
        help="input: the compressed clip that ships, or 4x4 means of the truth (default shipped)")
    add("--out", type=Path, metavar="JSON", help="write the results, with versions and commit")
    add("--sheet", type=Path, metavar="PNG", help="write crops of three frames a clip side by side")
    add("--frames-dir", type=Path, metavar="DIR", help="write every frame as DIR/clip/method/00000.png")
    args = parser.parse_args(argv)
    if args.frames < 2:
        parser.error(f"--frames must be at least 2, is {args.frames}")
    if not (args.data / "clips").is_dir():
        parser.error(f"{args.data} has no folder clips: fill it with benchmarks/fetch_data.sh {args.data}")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    about = describe() | ({"commit": args.commit} if args.commit else {})
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    natural = natural_statistics(args.data / "clips" / "frames_modelparameters.mat") if "niqe" in args.metrics else None
    methods = {name: load_method(name, args) for name in args.methods}
    print(f"{'clip':5} {'method':12} " + "  ".join(f"{title:>7}" for title, _, _ in COLUMNS))
    results, rows = {}, []
    for clip in CLIPS:
        if clip.name in args.clips:
            results[clip.name], clip_rows = run_clip(clip, methods, natural, args)
            rows += clip_rows
    print_artefacts(results)
    print_margins(results)
    if args.sheet:
        write_sheet(args.sheet, ["truth", *methods], rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"frames": args.frames, "low": args.low, "weights": args.weights, "niqe_every": NIQE_EVERY}
        document = {"about": about, "settings": settings, "clips": results}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
