"""Folders of pictures, in and out."""
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from .clip import Clip, Picture, error_text, temporary
from .pixels import (FULL, RGB, UNSPECIFIED, Tags, UserError, bits, check, display_matrix,
                     rgb_frame, to_frame, to_rgb, upright)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
NO_TAGS = Tags(UNSPECIFIED, UNSPECIFIED, RGB, FULL)


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def read_picture(path: Path) -> VideoFrame:
    """The first frame of a picture file. Raises UserError if there is none."""
    try:
        with av.open(BytesIO(path.read_bytes())) as container:
            return next(container.decode(video=0))
    except (av.FFmpegError, OSError, StopIteration, IndexError) as error:
        raise UserError(f"{path}: not a readable picture: {error_text(error)}") from error


def open_folder(folder: Path, start: float, frames: int | None, rate: Fraction) -> Clip:
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES), key=_natural)
    if not paths:
        raise UserError(f"{folder}: no picture in it ({', '.join(sorted(PICTURES))})")
    skipped = round(start * rate)
    paths = paths[skipped:][:frames]
    if not paths:
        raise UserError(f"{folder}: no frame at or after {start:g} s (its pictures count "
                        f"{rate} to the second)")
    first = read_picture(paths[0])
    check(first, str(paths[0]))
    depth, reformatter, problems = bits(first.format), VideoReformatter(), []

    def pictures() -> Iterator[Picture]:
        size, unique = None, len({p.stem for p in paths}) == len(paths)
        for number, path in enumerate(paths):
            try:
                frame = read_picture(path)
            except UserError as error:
                problems.append(f"{error}; it is left out")
                continue
            check(frame, str(path))
            rgb = upright(to_rgb(frame, Tags.of(frame), reformatter), display_matrix(frame))
            if rgb.dtype == np.uint8 and depth > 8:
                rgb = rgb.astype(np.uint16) * 257
            elif rgb.dtype == np.uint16 and depth <= 8:
                raise UserError(f"{path} has {bits(frame.format)} bits a colour, the pictures before it have 8; "
                                "if the first has more, all are taken with more")
            size = size or rgb.shape
            if rgb.shape != size:
                raise UserError(f"{path} is {rgb.shape[1]}x{rgb.shape[0]}, the pictures before it are "
                                f"{size[1]}x{size[0]}")
            yield Picture(np.ascontiguousarray(rgb), number, 1, path.stem if unique else "")

    height, width = upright(np.empty((first.height, first.width, 3), np.uint8),
                            display_matrix(first)).shape[:2]
    tags = Tags(UNSPECIFIED, UNSPECIFIED, RGB, 0)       # what the arrays are, whatever the files held
    return Clip(str(folder), width, height, rate, 1 / rate, depth, "rgb", tags, len(paths), items=pictures(),
                problems=problems)


class FolderWriter:
    """A folder of PNGs, 8 or 16 bits as the arrays are, turned upright, named as the input's pictures or by
    number.
    """

    def __init__(self, clip: Clip, path: str, width: int, height: int):
        """path: the folder, made in finish(); if it exists its other files stay. Raises UserError if it
        cannot be.
        """
        self.name, self.path, self.clip, self.width, self.height = path, Path(path), clip, width, height
        self.pictures, self.reformatter = 0, VideoReformatter()
        self.part = temporary(self.path.absolute())
        try:
            self.part.mkdir()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def picture(self, picture: Picture) -> None:
        deep = picture.rgb.dtype == np.uint16
        small = to_frame(picture.rgb, NO_TAGS, RGB, "rgb48le" if deep else "rgb24", (self.width, self.height),
                         self.reformatter).to_ndarray()
        frame = rgb_frame(upright(small, self.clip.matrix)).reformat(format="rgb48be" if deep else "rgb24")
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, frame.format.name
        encoder.time_base = Fraction(1, 25)
        data = b"".join(bytes(p) for p in encoder.encode(frame) + encoder.encode(None))
        self.pictures += 1
        (self.part / f"{picture.name or f'{self.pictures:06d}'}.png").write_bytes(data)

    def packet(self, packet: av.Packet) -> None:
        """A folder has no place for other streams."""

    def finish(self, *, cut: bool) -> None:
        if self.path.is_dir():
            for file in self.part.iterdir():
                os.replace(file, self.path / file.name)
            self.part.rmdir()
        else:
            os.replace(self.part, self.path)

    def abort(self) -> None:
        for file in self.part.glob("*.png"):
            file.unlink()
        if self.part.is_dir():
            self.part.rmdir()
