"""The command line: flashvsr upscale | demo | doctor | weights verify."""
import argparse
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import av
import torch
from tqdm import tqdm

from .arguments import make_parser
from .clip import Clip, error_text
from .compare import Compare
from .doctor import report
from .memory import keep_freed_memory
from .pictures import PICTURES, FolderWriter
from .pipeline import Summary, read_ahead, upscale
from .pixels import UserError
from .video import open_clip
from .video_out import CONTAINERS, VideoWriter
from .weights import load_upscaler, verify

DEMO_FRAME = 60             # data/demo_truth.webp is this frame of the film at 1280x720
STAGES = {"read": "reading", "upscale": "upscaling", "write": "writing"}
CHOICES = ("sparse_ratio", "local_range", "color", "seed")


def main(argv: list[str] | None = None, *, load: Callable[..., object] = load_upscaler) -> int:
    """Runs the command line argv (None: of this process) and returns its exit status.

    0 done, 1 failed or IN was damaged, 2 wrong usage, 130 ended by Ctrl-C. load: makes the upscaler, for
    tests
    """
    args = make_parser().parse_args(argv)
    try:
        if args.command == "upscale":
            return run_upscale(args, load)
        if args.command == "demo":
            return run_demo(args, load)
        return run_doctor() if args.command == "doctor" else run_verify(args)
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except BrokenPipeError:
        _say("error: nobody reads standard output any more")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own last flush does not complain
        return 1
    except torch.OutOfMemoryError as error:
        _say(f"error: out of GPU memory ({str(error).split('. ')[0]}); a smaller picture or "
             "--device cpu needs less")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        return 130


def run_upscale(args: argparse.Namespace, load: Callable[..., object]) -> int:
    try:
        _check_paths(args)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # like an error: nothing half-written stays
    opening = (open_clip(args.source, start=args.start, frames=args.frames, rate=args.fps, note=_note)
               for _ in "1")
    clip = next(read_ahead(opening, 1))             # in a thread: Ctrl-C must end a wait for standard input
    upscaler = _load(args, load)
    width, height = clip.width * args.scale, clip.height * args.scale
    compare = None
    if args.compare:
        compare = Compare(clip, (width, height), frame=args.compare_frame, truth=args.truth, start=args.start)
    if _is_folder(args.target):
        if clip.copies:
            _note(f"a folder holds no sound and no subtitles: {len(clip.copies)} streams are left out")
        writer = FolderWriter(clip, args.target, width, height)
    else:
        writer = VideoWriter(clip, args.target, width, height, codec=args.codec, crf=args.crf, note=_note)
    summary = _upscale(upscaler, clip, writer, compare.watch if compare else None)
    if compare and summary.frames:
        compare.save(args.compare)
    for problem in clip.problems:
        _say(f"error: {problem}; its {summary.frames} frames are in {writer.name}")
    return 130 if summary.interrupted else 1 if clip.problems else 0


def run_demo(args: argparse.Namespace, load: Callable[..., object]) -> int:
    data, out = resources.files(__package__) / "data", Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    video, picture = out / "demo_4x.mp4", out / "demo_compare.png"
    frame = min(DEMO_FRAME, args.frames - 1) if args.frames else DEMO_FRAME
    with resources.as_file(data / "demo.mp4") as clip, resources.as_file(data / "demo_truth.webp") as truth:
        words = ["upscale", clip, video, "--overwrite", "--compare", picture, "--compare-frame", frame]
        words += ["--truth", truth] if frame == DEMO_FRAME else []
        for name in ("frames", "device", "dtype"):
            words += [f"--{name}", value] if (value := getattr(args, name)) is not None else []
        status = main([str(word) for word in words], load=load)
    if status == 0:
        print(f"video    {video}\npicture  {picture}")
    return status


def run_doctor() -> int:
    print("\n".join(report()))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    try:
        records = verify(args.folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    for record in records:
        size = "" if record.size is None else f", {record.size:,} bytes, sha256 {record.sha256[:12]}..."
        print(f"{'ok ' if record.problem is None else 'BAD'} {record.file}: {record.what}{size}"
              + (f"\n    {record.problem}" if record.problem else ""))
    return 1 if any(record.problem for record in records) else 0


def _say(line: str) -> None:
    print("flashvsr: " + " ".join(line.split()), file=sys.stderr, flush=True)


def _note(line: str) -> None:
    _say(f"note: {line}")


def _load(args: argparse.Namespace, load: Callable[..., object]) -> object:
    """The upscaler that args ask for; options that were not given keep the weights' own values."""
    keep_freed_memory()
    options = {name: value for name in CHOICES if (value := getattr(args, name)) is not None}
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        device = None if args.device is None else torch.device(args.device)
        return load(args.weights, device=device, dtype=dtype, version=args.model_version, **options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:                   # torch's word for a device that it does not have
        if args.device is None:
            raise
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error


def _is_folder(target: str) -> bool:
    return target != "-" and (Path(target).is_dir() or target.endswith(os.sep) or not Path(target).suffix)


def _check_paths(args: argparse.Namespace) -> None:
    """Raises UserError for names that can be refused before anything is read."""
    if args.source != "-" and not Path(args.source).exists():
        raise UserError(f"{args.source}: no such file or folder")
    if args.target == "-":
        if sys.stdout.isatty():
            raise UserError("standard output is a terminal: send the video to a file or a program")
    else:
        _check_target(args, Path(args.target))
    if args.compare:
        path = Path(args.compare)
        if path.suffix.lower() not in PICTURES or not path.absolute().parent.is_dir() or path.is_dir():
            raise UserError(f"--compare {args.compare}: must be a picture in a folder that exists")
        if path.exists() and not args.overwrite:
            raise UserError(f"{args.compare} exists; --overwrite replaces it")
        for name, other in (("IN", args.source), ("OUT", args.target), ("--truth", args.truth)):
            if other not in (None, "-") and path.resolve() == Path(other).resolve():
                raise UserError(f"--compare and {name} are the same: {path}")
    elif args.truth or args.compare_frame is not None:
        raise UserError("--truth and --compare-frame need --compare")
    if args.truth and not Path(args.truth).exists():
        raise UserError(f"--truth {args.truth}: no such file")


def _check_target(args: argparse.Namespace, path: Path) -> None:
    folder = _is_folder(args.target)
    if args.source != "-" and path.exists() and path.samefile(args.source):
        raise UserError(f"IN and OUT are the same: {path}")
    if not folder and path.suffix.lower() not in CONTAINERS:
        raise UserError(f"{path}: its suffix must be one of {', '.join(CONTAINERS)}, "
                        "or none for a folder of PNGs")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder")
    if not args.overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists; --overwrite replaces it")
    if folder and (args.codec or args.crf is not None):
        raise UserError("--codec and --crf are of a video; OUT is a folder of PNGs")


def _upscale(upscaler, clip: Clip, writer, watch) -> Summary:
    """pipeline.upscale with a progress bar, and after it a line about what was written."""
    device = getattr(upscaler, "device", torch.device("cpu"))
    size = f"{clip.width}x{clip.height} to {writer.width}x{writer.height}"
    try:
        with tqdm(total=clip.total, unit=" frames", desc=size, file=sys.stderr, dynamic_ncols=True,
                  mininterval=0.2 if sys.stderr.isatty() else 10) as bar:
            def progress(frames: int) -> None:
                bar.set_postfix_str(_memory(device), refresh=False)
                bar.update(frames)
            summary = upscale(upscaler, clip, writer, watch=watch, progress=progress)
            if not summary.interrupted:
                bar.total = bar.n               # it may have been an estimate
    except BrokenPipeError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot write {writer.name}: {error_text(error)}") from error
    if not summary.frames:
        _say("interrupted before the first frame; nothing was written")
        return summary
    what = "interrupted; what was done is in" if summary.interrupted else "wrote"
    busy = ", ".join(f"{stage} {100 * spent / summary.seconds:.0f} %"
                     for stage, spent in summary.busy.items())
    _say(f"{what} {writer.name}: {summary.frames} frames of {writer.width}x{writer.height} in "
         f"{summary.seconds:.1f} s, {summary.frames / summary.seconds:.2f} frames/s, {_memory(device)}; "
         f"bottleneck: {STAGES[summary.bottleneck]} ({busy} busy)"
         + f"; kernels were made ready in {summary.ready:.1f} s" * (summary.ready > 0))
    return summary


def _memory(device: torch.device) -> str:
    """The most memory taken so far by the process, and on the GPU if one is used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"mem {peak / 2**30:.2f} GiB"
    if device.type == "cuda":
        text += f", GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text
