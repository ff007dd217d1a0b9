"""The words of the command line: options, their checks, and the help."""
import argparse
import sys
from collections.abc import Callable
from fractions import Fraction

from .pictures import PICTURES
from .video_out import CONTAINERS

UPSCALE_HELP = f"""\
IN is a video, a folder of pictures ({', '.join(sorted(s[1:] for s in PICTURES))};
in natural order of their names), or - for a video on standard input: any container that can be read
front to back (Matroska, WebM, MPEG-TS, FLV, NUT, or MP4 with the index in front), with `< file` any.

OUT is a video ({', '.join(s[1:] for s in CONTAINERS)}), a folder (a name without suffix; PNGs,
16-bit ones from input of more than 8 bits), or - for a Matroska stream on standard output.

Kept: the time of every frame, audio and subtitle streams (packets copied, not encoded again),
attachments, chapters, metadata, colour tags, sample aspect ratio, more than 8 bits where the codec has
them. A turned video stays turned by its display matrix in mp4, mov, mkv and webm; in ts and in a folder
its pixels are turned. A stream that OUT's container cannot hold is left out, with a line that says so.
yuv420p cannot have odd sizes: yuv422p or yuv444p is written for them, nothing is cropped. OUT begins at
time zero.

OUT gets its name when it is complete. Ctrl-C ends it with the frames done so far (exit status 130).
If IN breaks off, is damaged or truncated (pictures of a folder, but not its first), what could be read is
upscaled and kept under OUT, a line says so, and the exit status is 1. Other failures leave nothing: 1, or 2
for wrong usage."""


class Parser(argparse.ArgumentParser):
    """argparse with its errors in one line."""

    def error(self, message: str) -> None:
        print(f"flashvsr: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def seconds(text: str) -> float:
    """Seconds from "90", "1:30" or "0:01:30.5", less than a hundred years."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or any(not 0 <= value < 1e5 * 60 ** (5 - len(values)) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds or HH:MM:SS")
    return sum(value * 60 ** power for power, value in enumerate(reversed(values)))


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """A parser of a number of that kind from low to high."""
    def parse(text: str):
        try:
            value = kind(text)
        except (ValueError, ZeroDivisionError):
            value = None
        if value is None or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            to = f" to {high:g}" if high < float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} of {low:g}{to}")
        return value
    return parse


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what is to be done is in `command`, for weights also in `action`.
    """
    parser = Parser(prog="flashvsr", description="Video, four times larger.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_upscale(commands.add_parser(
        "upscale", help="upscale a video", description="Upscale a video.", epilog=UPSCALE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    demo = commands.add_parser(
        "demo", help="upscale the clip that ships with the package",
        description="Upscales the shipped clip (320x180, 132 frames, sound) with the shipped weights, says "
                    "how fast, and writes a side-by-side picture.")
    demo.add_argument("--out", default="flashvsr-demo", metavar="DIR",
                      help="folder of results (default %(default)s)")
    demo.add_argument("--frames", type=number(int, 1), metavar="N", help="stop after N frames")
    _add_device(demo)
    commands.add_parser(
        "doctor", help="what runs here, what does not, and why",
        description="Prints the versions, the GPUs, for every op which backend runs here and why the others "
                    "do not, and what to install to change that.")
    weights = commands.add_parser("weights", help="look at weight files")
    verify = weights.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "verify", help="say what each file of a folder is",
        description="Hashes every weight file of a folder with official weights and says what it is.")
    verify.add_argument("folder", metavar="DIR")
    return parser


def _add_upscale(up: argparse.ArgumentParser) -> None:
    up.add_argument("source", metavar="IN")
    up.add_argument("target", metavar="OUT")
    up.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    up.add_argument("--scale", type=int, choices=(2, 3, 4), default=4,
                    help="size of OUT (default 4); 2 and 3 are the 4x result made smaller with a "
                         "Lanczos filter")
    part = up.add_argument_group("which part")
    part.add_argument("--start", type=seconds, default=0.0, metavar="TIME",
                      help="seconds or HH:MM:SS to begin at")
    part.add_argument("--frames", type=number(int, 1), metavar="N",
                      help="stop after N frames; sound is cut to them")
    part.add_argument("--fps", type=number(Fraction, 0.001, 1000), default=Fraction(25), metavar="RATE",
                      help="frames per second of a folder of pictures (default 25; 30000/1001 works)")
    model = up.add_argument_group("model")
    model.add_argument("--weights", default="compact", metavar="DIR",
                       help='"compact" (default, ships with the package) or a folder with the official files')
    model.add_argument("--model-version", choices=("v1", "v1.1"),
                       help="what official files of unknown hash are")
    model.add_argument("--sparse-ratio", type=number(float, 0.01), metavar="X",
                       help="share of attention that is computed, higher is steadier (default: the weights' "
                            "own; official weights: 2, or 1.5 for speed)")
    model.add_argument("--local-range", type=number(int, 1), metavar="N",
                       help="side of the attention window in blocks of 128 pixels of the result (default: "
                            "the weights' own; official weights: 11 is steadier, 9 sharper)")
    model.add_argument("--color", choices=("adain", "wavelet", "none"),
                       help="how colours are matched to the input (default: the weights' own)")
    model.add_argument("--seed", type=number(int, 0), metavar="N",
                       help="of the noise the model starts from (default 0); compact starts from none")
    _add_device(model)
    out = up.add_argument_group("output")
    out.add_argument("--codec", metavar="NAME",
                     help="FFmpeg's encoder: libx264 (default; for webm libvpx-vp9), libx265, libsvtav1, "
                          "ffv1, ...")
    out.add_argument("--crf", type=number(float, 0, 63), metavar="X",
                     help="quality of these encoders, smaller is better (default 18 for libx264; "
                          "ffv1 has none)")
    out.add_argument("--compare", metavar="PNG",
                     help="also write one frame side by side: bicubic | FlashVSR | truth")
    out.add_argument("--compare-frame", type=number(int, 0), metavar="N",
                     help="which frame (default the middle one; the first where IN does not say how many it has)")
    out.add_argument("--truth", metavar="FILE",
                     help="video, or picture of that frame, for --compare's third panel")


def _add_device(group) -> None:
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="arithmetic (default bfloat16 on a GPU, float32 on the CPU)")
