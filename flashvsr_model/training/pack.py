"""Pack fetched pictures and films into a folder small enough to carry to a GPU machine.

    python -m flashvsr_model.training.pack RAW OUT [--small]

RAW is the folder that fetch_data.sh filled. OUT gets still/*.webp and tex/*.webp (photographs and textures,
halved by area), sprite/*.webp (RGBA) and video/*.mp4, each a row of short segments whose lengths stand in the
.mp4.txt beside it.

Never packed, because quality is measured on them: cityCC0, bigbuckbunny and its shot in the film (frames 1145
to 1345), and four stills. The film's titles and credits are left out as well.
"""
import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

HELD_OUT_STILLS = frozenset({"life_by_Aitzol_Berasategi", "EveningGlow", "flower", "ColorfulCups"})
HELD_OUT_FRAMES = range(1145, 1346)   # of the film: the shot that bigbuckbunny.mp4 was cut from
FILM_BODY = range(378, 12001)         # between titles and credits
TOO_SMOOTH = frozenset({"umang_by_Abhishek_Mudgal", "Fossa_by_Jasper_Roks", "Infinite-Sea_by_Aury88",
                        "Painting-Colors_by__herobrine7gamer", "Storm", "FreshFlower", "Valendas"})
PATTERNS = ("backgrounds/*_by_*.jpg", "backgrounds/mate/nature/*.jpg",
            "backgrounds/mate/abstract/Elephants_5640x3172.jpg", "lxqt/wallpapers/*.*")
LXQT = frozenset({"after-the-rain", "appleflower", "beam", "butterfly", "cloud", "drop", "flowers", "fog",
                  "this-is-not-windows", "Butterfly-Kenneth-Wimer"})
PLASMA = {"2560x1600": ("FallenLeaf", "Path", "Autumn", "summer_1am", "EveningGlow", "Grey", "Kite",
                        "ColorfulCups", "OneStandsOut", "ColdRipple", "BytheWater"),
          "5120x2880": ("SafeLanding", "Altai", "Patak")}
NOT_COLOUR = ("normal", "_nm", "gloss", "mask", "skybox", "/gui/", "lightmap", "_n.")   # technical maps

FPS = 24
Segment = tuple[int, int]   # first frame, number of frames


@dataclass(frozen=True)
class PackConfig:
    """How strongly to compress: WebP qualities (0-100) and the x264 constant rate factor."""
    still: int = 95
    texture: int = 90
    sprite: int = 92
    crf: int = 16
    native_every: int = 3   # one film segment in so many is packed again, as a window at full resolution


SMALL = PackConfig(still=85, texture=80, sprite=80, crf=21, native_every=4)


def still_paths(share: Path) -> list[Path]:
    """The photographs under share (usr/share of the unpacked wallpaper packages) that are not held out."""
    found = [p for pattern in PATTERNS for p in sorted(share.glob(pattern))
             if p.parts[-3] != "lxqt" or p.stem in LXQT]
    for size, names in PLASMA.items():
        for name in names:
            found += sorted(share.glob(f"wallpapers/{name}/contents/images/{size}.*"))[:1]
    return [p for p in found if _still_name(p) not in HELD_OUT_STILLS | TOO_SMOOTH]


def film_segments(cuts: Sequence[int], length: int = 25) -> list[Segment]:
    """Segments of length frames inside the film's shots: the middle of each, and both ends of the long ones.

    cuts: first frame of every shot and, last, the number of frames
    Returns them in order; none leaves FILM_BODY or belongs to a shot that touches HELD_OUT_FRAMES.
    """
    segments = []
    for first, end in zip(cuts, cuts[1:]):
        held_out = first < HELD_OUT_FRAMES.stop and end > HELD_OUT_FRAMES.start
        if held_out or end - first < length + 4 or first < FILM_BODY.start or end >= FILM_BODY.stop:
            continue
        segments.append((first + (end - first - length) // 2, length))
        if end - first > 120:
            segments += [(first + 4, length), (end - length - 4, length)]
    return sorted(segments)


def find_cuts(path: Path) -> list[int]:
    """First frame of every shot of the video at path and, last, its number of frames."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        small = [frame.reformat(width=64, height=36, format="gray").to_ndarray().astype(np.float32)
                 for frame in container.decode(video=0)]
    jump = np.array([np.abs(b - a).mean() for a, b in zip(small, small[1:])])
    usual = np.array([np.median(jump[max(0, i - 12):i + 12]) for i in range(len(jump))])
    cut = (jump > 18) & (jump > 4 * usual + 2)   # grey levels: large, and unlike its neighbours
    return [0, *(int(i) + 1 for i in np.flatnonzero(cut)), len(small)]


def pack_video(source: Path, segments: Sequence[Segment], out: Path, *, size: tuple[int, int], crf: int,
               native: bool = False) -> None:
    """Write the segments of source to out (.mp4, H.264) in a row, and their lengths to out + ".txt".

    segments: in order, not overlapping    size: (width, height) written, in pixels
    native: False shrinks whole frames by area; True cuts windows, each segment's from another quarter
    Raises ValueError if source ends before the last segment does.
    """
    number = {i: n for n, (first, length) in enumerate(segments) for i in range(first, first + length)}
    written = 0
    with av.open(str(source)) as container, av.open(str(out), "w") as target:
        container.streams.video[0].thread_type = "AUTO"
        stream = target.add_stream("libx264", rate=FPS, width=size[0], height=size[1], pix_fmt="yuv420p",
                                   options={"crf": str(crf), "preset": "slow"})
        for i, frame in enumerate(container.decode(video=0)):
            if i not in number:
                continue
            if native:
                frame = _quarter(frame, number[i] % 4, size)
            small = frame.reformat(*size, format="yuv420p", interpolation="AREA")
            small.pts, small.time_base, small.pict_type = written, Fraction(1, FPS), 0
            target.mux(stream.encode(small))
            written += 1
        target.mux(stream.encode())
    if written != sum(length for _, length in segments):
        raise ValueError(f"{source} must hold the frames of all segments, got only {written} of them")
    out.with_name(out.name + ".txt").write_text(" ".join(str(length) for _, length in segments) + "\n")


def pack_videos(clips: Path, out: Path, config: PackConfig) -> None:
    """Write the film (whole frames, and windows of its 720p) and the real videos in clips as out/*.mp4."""
    film, crf = clips / "bbb.mp4", config.crf
    segments = film_segments(find_cuts(film))
    pack_video(film, segments, out / "bbb360.mp4", size=(640, 360), crf=crf)
    some = segments[::config.native_every]
    pack_video(film, some, out / "bbb720.mp4", size=(640, 360), crf=crf, native=True)
    road = [(first, 33) for first in range(200, 1700, 150)]
    pack_video(clips / "test_video.mp4", road, out / "road.mp4", size=(480, 270), crf=crf)
    seattle = [(first, 25) for first in range(5, 460, 60)]
    pack_video(clips / "test.avi", seattle, out / "seattle.mp4", size=(640, 360), crf=crf)


def pack_stills(paths: Iterable[Path], out: Path, quality: int) -> None:
    """Write each picture of paths, halved, as out/NAME.webp."""
    for path in paths:
        with Image.open(path) as image:
            _halve(image.convert("RGB")).save(out / f"{_still_name(path)}.webp", quality=quality, method=4)


def pack_textures(share: Path, out: Path, quality: int) -> None:
    """Write the large colour textures with enough detail under share as out/000.webp onwards, halved."""
    count = 0
    for path in sorted((share / "games/supertuxkart/data").rglob("*")):
        inside = path.relative_to(share).as_posix().lower()
        if not inside.endswith((".jpg", ".jpeg", ".png")) or any(part in inside for part in NOT_COLOUR):
            continue
        with Image.open(path) as image:
            if image.mode != "RGB" or image.width * image.height < 5e5:
                continue
            half = _halve(image)
        mean = np.asarray(half).reshape(-1, 3).mean(0)
        normal_map = (np.abs(mean - (128, 128, 250)) < 30).all()
        if not normal_map and np.median(_detail(half)) >= 7:
            half.save(out / f"{count:03d}.webp", quality=quality, method=4)
            count += 1


def pack_sprites(share: Path, out: Path, quality: int) -> None:
    """Write the photographic cut-outs (RGBA) under share as out/000.webp onwards."""
    count = 0
    for path in sorted((share / "tuxpaint/stamps").rglob("*.png")):
        with Image.open(path) as image:
            if image.mode == "RGBA" and image.width * image.height >= 4e4 and "cartoon" not in path.parts:
                image.save(out / f"{count:03d}.webp", quality=quality, method=4)
                count += 1


def pack(raw: Path, out: Path, config: PackConfig = PackConfig()) -> None:
    """Make the whole pack in out; FileNotFoundError if raw lacks a folder that fetch_data.sh makes."""
    share, clips = raw / "deb/x/usr/share", raw / "clips"
    for folder in (share, clips):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: fill {raw} with fetch_data.sh first")
    for kind in ("still", "tex", "sprite", "video"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    pack_stills(still_paths(share), out / "still", config.still)
    pack_textures(share, out / "tex", config.texture)
    pack_sprites(share, out / "sprite", config.sprite)
    pack_videos(clips, out / "video", config)


def _still_name(path: Path) -> str:
    return path.parts[-4] if path.parts[-3] == "contents" else path.stem   # NAME/contents/images/SIZE.jpg


def _quarter(frame: av.VideoFrame, index: int, size: tuple[int, int]) -> av.VideoFrame:
    """A window of size (width, height) in the middle of quarter index (0 to 3) of frame, kept inside it."""
    width, height = size
    left = min(max(frame.width * (1 + 2 * (index % 2)) // 4 - width // 2, 0), frame.width - width)
    top = min(max(frame.height * (1 + 2 * (index // 2)) // 4 - height // 2, 0), frame.height - height)
    pixels = frame.to_ndarray(format="rgb24")[top:top + height, left:left + width]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def _halve(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)


def _detail(image: Image.Image, tile: int = 128) -> np.ndarray:
    """Mean absolute Laplacian of the grey image in every tile; 0 where it is smaller than a tile."""
    grey = np.pad(np.asarray(image.convert("L"), np.float32), 1, mode="reflect")
    centre = grey[1:-1, 1:-1]
    laplacian = np.abs(grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre)
    rows, cols = (side // tile for side in centre.shape)
    if not rows or not cols:
        return np.zeros((1, 1), np.float32)
    return laplacian[:rows * tile, :cols * tile].reshape(rows, tile, cols, tile).mean((1, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the size of each part and returns the exit status."""
    parser = argparse.ArgumentParser("python -m flashvsr_model.training.pack",
                                     description="Pack fetched pictures and films for training.")
    parser.add_argument("raw", type=Path, help="folder filled by fetch_data.sh")
    parser.add_argument("out", type=Path, help="folder to write the pack to")
    parser.add_argument("--small", action="store_true", help="compress more: 31 MB instead of 56 MB")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None   # the sources are known packages; some wallpapers pass Pillow's limit
    try:
        pack(args.raw, args.out, SMALL if args.small else PackConfig())
    except (FileNotFoundError, ValueError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    for kind in ("still", "tex", "sprite", "video"):
        files = [p for p in (args.out / kind).iterdir() if p.is_file()]
        print(f"{kind:6} {len(files):4} files  {sum(p.stat().st_size for p in files) / 1e6:5.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
