"""Pixels of video frames as RGB arrays and back: colour matrix and range by the tags, depth, display matrix.
"""
import struct
from dataclasses import dataclass

import numpy as np
from av import VideoFormat
from av.sidedata.sidedata import Type as SideType
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

RGB, BT709, UNSPECIFIED, RESERVED, SMPTE170M = 0, 1, 2, 3, 6               # AVColorSpace
LIMITED, FULL = 1, 2                                                       # AVColorRange
# AVColorSpace -> weights of red and blue in luma: BT.709, FCC, BT.470BG, SMPTE 170M and 240M, BT.2020
LUMA = {BT709: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), SMPTE170M: (0.299, 0.114),
        7: (0.212, 0.087), 9: (0.2627, 0.0593)}
SWS = {SMPTE170M: 5}                            # AVColorSpace -> swscale's number where they differ
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def _unnamed(cls: type, value: int) -> SideType:
    member = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


# PyAV (18 and 19) raises at a frame's side data if one is of a type it has no name for, such as EXIF of FFmpeg 8, which
# every camera's JPEG has.
SideType._missing_ = classmethod(_unnamed)


class UserError(Exception):
    """What the user must hear in one line: the message of `flashvsr: error:`."""


@dataclass(frozen=True)
class Tags:
    """The colour tags of a stream as FFmpeg's numbers: AVColorPrimaries, ...Transfer, ...Space and ...Range.
    """
    primaries: int
    transfer: int
    space: int
    range: int

    @classmethod
    def of(cls, frame: VideoFrame) -> "Tags":
        space = UNSPECIFIED if frame.colorspace == RESERVED else frame.colorspace
        return cls(frame.color_primaries, frame.color_trc, space, frame.color_range)

    def matrix(self, width: int, height: int) -> int:
        """The YUV matrix of a width x height picture: the tag, or what players take for an untagged one."""
        if self.space != UNSPECIFIED:
            return self.space
        return BT709 if width >= 1280 or height > 576 else SMPTE170M

    def for_size(self, width: int, height: int, from_width: int, from_height: int) -> "Tags":
        """The tags of a resized picture: unset ones stay unset unless players would then guess another
        matrix.
        """
        if self.matrix(from_width, from_height) == self.matrix(width, height):
            return self
        return Tags(self.primaries, self.transfer, self.matrix(from_width, from_height), self.range)

    def put(self, frame: VideoFrame) -> None:
        frame.color_primaries, frame.color_trc = self.primaries, self.transfer
        frame.colorspace, frame.color_range = self.space, self.range


def check(frame: VideoFrame, name: str) -> None:
    """UserError if the frame is too small or of a colour matrix that cannot be converted."""
    if frame.width < 16 or frame.height < 16:
        raise UserError(f"{name} is {frame.width}x{frame.height}; the smallest size is 16x16")
    if not frame.format.is_rgb and frame.colorspace not in {RGB, UNSPECIFIED, RESERVED, *LUMA}:
        raise UserError(f"{name}: the colour matrix {frame.colorspace} (AVColorSpace) cannot be converted")


def bits(pixels: VideoFormat) -> int:
    """Bits of a component, 8 for palettes."""
    return 8 if pixels.has_palette else max(part.bits for part in pixels.components)


def chroma(pixels: VideoFormat) -> str:
    """"420", "422", "444" or "rgb"; what is coarser than 420, or grey, counts as 420."""
    if pixels.is_rgb or pixels.has_palette:
        return "rgb"
    if len(pixels.components) < 3:
        return "420"
    across, down = pixels.chroma_width(16), pixels.chroma_height(16)
    return "444" if (across, down) == (16, 16) else "422" if down == 16 else "420"


def to_rgb(frame: VideoFrame, tags: Tags, reformatter: VideoReformatter) -> np.ndarray:
    """(h, w, 3) full-range RGB by the matrix and range of tags: uint8, or uint16 of a frame deeper than 8 bits."""
    deep, flags = bits(frame.format) > 8, Interpolation.BICUBIC | EXACT
    if frame.format.is_rgb or frame.format.has_palette:
        return reformatter.reformat(frame, format="rgb48le" if deep else "rgb24",
                                    interpolation=flags).to_ndarray()
    frame.colorspace = space = tags.matrix(frame.width, frame.height)
    frame.color_range = tags.range or frame.color_range or LIMITED
    if not deep:
        return reformatter.reformat(frame, format="rgb24", interpolation=flags).to_ndarray()
    # swscale's own deep RGB is up to 4 of 1023 too dark (FFmpeg 8.1), so it only brings chroma to full size
    y, u, v = np.moveaxis(reformatter.reformat(frame, format="yuv444p16le",
                                               interpolation=flags).to_ndarray(), 2, 0)
    top, black, swing, chroma_swing = _levels(frame.color_range, bits(frame.format))
    y, u, v = (y.astype(np.float32) - black) / swing, *((c.astype(np.float32) - 32768) / chroma_swing
                                                        for c in (u, v))
    red, blue = LUMA[BT709 if len(frame.format.components) < 3 else space]  # of grey any: it has no chroma
    r, b = y + v * (2 - 2 * red), y + u * (2 - 2 * blue)
    g = (y - red * r - blue * b) / (1 - red - blue)
    return (np.stack([r, g, b], axis=2).clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def to_frame(rgb: np.ndarray, tags: Tags, space: int, pix_fmt: str, size: tuple[int, int],
             reformatter: VideoReformatter) -> VideoFrame:
    """A frame of pix_fmt with tags from (H, W, 3) uint8 or uint16 RGB, brought to size (width, height) by
    Lanczos.

    space: the matrix to convert by where pix_fmt is YUV, which tags may leave unset
    """
    flags, crange, pixels = Interpolation.LANCZOS | EXACT, tags.range or LIMITED, VideoFormat(pix_fmt)
    if rgb.dtype == np.uint16 and not pixels.is_rgb:
        frame = _yuv16(rgb, space, crange, bits(pixels))
    elif rgb.dtype == np.uint8 and pix_fmt != "rgb24":
        # without a copy, which costs half as much as the conversion that follows before rgb can change
        frame = VideoFrame.from_numpy_buffer(np.ascontiguousarray(rgb), format="rgb24")
    else:
        frame = rgb_frame(rgb)
    if frame.format.name != pix_fmt or (frame.width, frame.height) != size:
        frame = reformatter.reformat(frame, *size, pix_fmt, interpolation=flags,
                                     dst_colorspace=SWS.get(space, space), dst_color_range=crange)
    tags.put(frame)
    return frame


def rgb_frame(rgb: np.ndarray) -> VideoFrame:
    """A frame of (h, w, 3) uint8 or uint16 RGB as it is."""
    return VideoFrame.from_ndarray(np.ascontiguousarray(rgb),
                                   format="rgb48le" if rgb.dtype == np.uint16 else "rgb24")


def _levels(crange: int, depth: int) -> tuple[int, int, int, int]:
    """Of YUV codes shifted up to 16 bits: the largest, black, black to white, and chroma from -1/2 to 1/2."""
    top = (2 ** depth - 1) << (16 - depth)
    return (top, 0, top, top) if crange == FULL else (top, 16 << 8, 219 << 8, 224 << 8)


def _yuv16(rgb: np.ndarray, space: int, crange: int, depth: int) -> VideoFrame:
    """(h, w, 3) uint16 RGB as yuv444p16le with the code values of depth bits shifted up."""
    top, black, swing, chroma_swing = _levels(crange, depth)
    red, blue = LUMA[space]
    r, g, b = np.moveaxis(rgb.astype(np.float32) / 65535, 2, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    planes = [y * swing + black, (b - y) / (2 - 2 * blue) * chroma_swing + 32768,
              (r - y) / (2 - 2 * red) * chroma_swing + 32768]
    codes = (np.stack(planes, axis=2) + 0.5).clip(0, top).astype(np.uint16)
    frame = VideoFrame.from_ndarray(codes, format="yuv444p16le", channel_last=True)
    frame.colorspace, frame.color_range = space, crange
    return frame


def display_matrix(frame: VideoFrame) -> tuple[int, ...] | None:
    """The frame's display matrix, 9 integers as in FFmpeg, None if it has none or one that changes nothing.
    """
    data = frame.side_data.get(SideType.DISPLAYMATRIX)
    matrix = struct.unpack("=9i", bytes(data)) if data is not None else None
    return None if matrix is None or matrix[:5] == (65536, 0, 0, 0, 65536) else matrix


def upright(rgb: np.ndarray, matrix: tuple[int, ...] | None) -> np.ndarray:
    """rgb (h, w, c) turned and mirrored as a display matrix of quarter turns says; UserError for any other
    matrix.
    """
    if matrix is None:
        return rgb
    a, b, c, d = (round(matrix[i] / 65536) for i in (0, 1, 3, 4))
    off = max(abs(matrix[i] - 65536 * round(matrix[i] / 65536)) for i in (0, 1, 3, 4))
    if off > 8 or sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
        raise UserError(f"the display matrix {matrix} is not one of quarter turns: "
                        "write a .mp4, .mov or .mkv")
    # x' = a x + c y, y' = b x + d y: where the diagonal is empty x and y change places, then signs mirror
    if a == 0:
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
