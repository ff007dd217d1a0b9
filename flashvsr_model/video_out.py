"""Writing: RGB arrays with their times into a video file or a Matroska stream on standard output.

A file grows under a temporary name beside the final one and gets its name in finish(); abort() removes it.
"""
import os
import sys
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import VideoReformatter

from .clip import Clip, Picture, error_text, temporary
from .pixels import BT709, FULL, LIMITED, RGB, UNSPECIFIED, Tags, UserError, to_frame, upright

# Suffix -> FFmpeg's muxer. Only containers that keep the time of every frame.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm",
              ".ts": "mpegts"}
# Of MPEG-TS FFmpeg says that it holds any codec, and hides those that no reader would know.
TS_CODECS = {"h264", "hevc", "vvc", "mpeg1video", "mpeg2video", "mpeg4", "cavs", "dirac", "vc1"}
HOLDS_MATRIX = {"mp4", "mov", "matroska", "webm"}
CRF = {"libx264": 18, "libx265": 20, "libvpx-vp9": 24, "libsvtav1": 24}      # near-transparent at 4x sizes
# Written by the muxer of the input about its own file, untrue for ours.
STALE = ("major_brand", "minor_version", "compatible_brands", "encoder", "rotate", "duration", "bps",
         "number_of_frames", "number_of_bytes", "_statistics")


def default_codec(path: str) -> str:
    return "libvpx-vp9" if path.lower().endswith(".webm") else "libx264"


def pixel_format(codec: av.Codec, chroma: str, depth: int, width: int, height: int) -> str:
    """The codec's pixel format nearest to the input's: its depth first, then its chroma, more rather than
    less.

    chroma: "420", "422", "444" or "rgb". An odd width rules out 422 and 420, an odd height 420: one of the
    others is taken, nothing is cropped. RGB input stays RGB only in a codec that is lossless by nature. Raises
    UserError if none fits.
    """
    have = {f.name for f in codec.video_formats or []}
    depths = [d for d in (8, 10, 12, 14, 16) if d >= depth] + [d for d in (14, 12, 10, 8) if d < depth]
    kinds = ["420", "422", "444"]
    kinds = kinds[kinds.index(chroma):] + kinds[:kinds.index(chroma)][::-1] if chroma != "rgb" else kinds
    kinds = [k for k in kinds if not (width % 2 and k != "444") and not (height % 2 and k == "420")]
    if chroma == "rgb" and codec.lossless and not codec.lossy:
        kinds = ["rgb", "444"] + [k for k in kinds if k != "444"]
    for bits in depths:
        for kind in kinds:
            names = ("rgb24", "gbrp", "bgr0") if kind == "rgb" else (f"yuv{kind}p", f"yuvj{kind}p")
            if bits > 8:
                names = ((f"yuv{kind}p{bits}le",) if kind != "rgb" else
                         ("rgb48le",) if bits == 16 else (f"gbrp{bits}le",))
            for name in names:
                if name in have:
                    return name
    raise UserError(f"codec {codec.name} takes none of the pixel formats for {width}x{height} with {depth} "
                    f"bits (it takes {', '.join(sorted(have)) or 'none that it tells'})")


class _Pipe:
    """Only `write`, so that FFmpeg does not try to seek."""

    def __init__(self, file):
        self.write, self.flush = file.write, file.flush


class VideoWriter:
    """A video: frames encoded, the other streams' packets copied beside them, all that Clip knows kept."""

    def __init__(self, clip: Clip, path: str, width: int, height: int, *, codec: str | None = None,
                 crf: float | None = None, note: Callable[[str], None] = lambda line: None):
        """path: a file whose suffix names the container, or "-" for a Matroska stream on standard output

        width, height: of the pictures in the file (as stored, before a display matrix turns them)
        codec: an encoder's name as FFmpeg has it    crf: its quality, None for the table above
        Raises UserError if codec, container and sizes do not go together or the file cannot be made.
        """
        self.name, self.clip, self.note = ("standard output" if path == "-" else path), clip, note
        self.path = None if path == "-" else Path(path)
        self.width, self.height, self.pictures, self.end = width, height, 0, 0
        self.reformatter = VideoReformatter()
        self.waiting: deque[av.Packet] = deque()        # copied packets until the video has come that far
        self.kinds = {stream.index: stream.type for stream in clip.copies}
        self.format = "matroska" if path == "-" else CONTAINERS[self.path.suffix.lower()]
        self.turn = None if self.format in HOLDS_MATRIX else clip.matrix
        if self.turn:
            self.width, self.height = upright(np.empty((height, width, 0)), self.turn).shape[1::-1]
        try:
            self.file = _Pipe(sys.stdout.buffer) if self.path is None else open(temporary(self.path), "wb")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            self.container = av.open(self.file, "w", format=self.format)
            self._add_video(codec or default_codec(path), crf)
            self.copies = self._add_copies()
            self.container.metadata.update(_fresh(clip.metadata))
            if self.path is None:                       # a file gets them in finish(), when its end is known
                self.container.set_chapters(self._chapters(None))
            self._start()
        except (av.FFmpegError, OSError, ValueError) as error:
            self.abort()
            raise UserError(f"cannot write {self.name}: {error_text(error)}") from error
        except BaseException:
            self.abort()
            raise

    def _add_video(self, name: str, crf: float | None) -> None:
        try:
            codec = av.Codec(name, "w")
        except (av.FFmpegError, ValueError) as error:
            raise UserError(f"there is no encoder {name!r} in this FFmpeg") from error
        if codec.type != "video":
            raise UserError(f"{name} does not encode video")
        if self.format == "mpegts" and codec.canonical_name not in TS_CODECS:
            raise UserError(f"a .ts file cannot hold {codec.canonical_name}; it can hold "
                            + ", ".join(sorted(TS_CODECS)))
        if name == "libx265" and min(self.width, self.height) < 64:
            # it would crash
            raise UserError(f"libx265 needs at least 64x64, this is {self.width}x{self.height}")
        clip = self.clip
        stream = self.container.add_stream(name, rate=clip.rate)
        context = stream.codec_context
        context.width, context.height = self.width, self.height
        context.pix_fmt = pixel_format(codec, clip.chroma, clip.depth, self.width, self.height)
        context.time_base = stream.time_base = clip.time_base
        context.flags |= Flags.frame_duration
        # As many threads as there are cores, on several frames where the codec can. PyAV's own choice, slices
        # of one frame, is a tenth more work for x264 (1408x768), and waits for the slowest slice.
        context.thread_type, context.thread_count = "AUTO", 0
        sar = clip.sar
        if sar:
            context.sample_aspect_ratio = 1 / sar if self.turn and self.turn[0] == 0 else sar
        self.tags = self._tags(context.pix_fmt)
        self.matrix = self.tags.matrix(self.width, self.height)
        context.color_primaries, context.color_trc = self.tags.primaries, self.tags.transfer
        context.colorspace, context.color_range = self.tags.space, self.tags.range
        if clip.matrix and not self.turn:
            stream.set_display_matrix(clip.matrix)
        known = {option.name for option in context.supported_options.private}
        if crf is not None and "crf" not in known:
            raise UserError(f"codec {name} has no crf")
        if crf is None:
            crf = CRF.get(name)
        if crf is not None:
            context.options = {"crf": f"{crf:g}"}
        if name == "libvpx-vp9":                        # row-mt: else a column of 256 pixels is a thread's
            context.options = context.options | {"b": "0", "row-mt": "1"}
        if name == "libx265":
            context.options = context.options | {"x265-params": "log-level=error"}
            if self.format in ("mp4", "mov"):
                context.codec_tag = "hvc1"              # what QuickTime plays
        stream.metadata.update(_fresh(clip.stream_metadata))
        self.stream = stream

    def _start(self) -> None:
        """Opens the encoder and writes the header."""
        try:
            self.container.start_encoding()
        except (av.FFmpegError, OSError, ValueError) as error:
            context = self.stream.codec_context
            if context.is_open:
                raise
            raise UserError(f"encoder {context.name} does not start with {self.width}x{self.height}, {context.pix_fmt}, "
                            f"rate {self.clip.rate} (it may want a device, a size or a rate that is not here): "
                            f"{error_text(error)}") from error

    def _tags(self, pix_fmt: str) -> Tags:
        """The input's tags; YUV made from RGB gets the tags of BT.709, limited range."""
        clip, is_rgb = self.clip, av.VideoFormat(pix_fmt).is_rgb
        if is_rgb:
            return Tags(clip.tags.primaries, clip.tags.transfer, RGB, FULL)
        if clip.chroma == "rgb" or clip.tags.space == RGB:
            unset = [BT709 if v == UNSPECIFIED else v for v in (clip.tags.primaries, clip.tags.transfer)]
            return Tags(*unset, BT709, LIMITED)
        return clip.tags.for_size(self.width, self.height, clip.width, clip.height)

    def _add_copies(self) -> dict[int, av.stream.Stream]:
        copies = {}
        for stream in self.clip.copies:
            codec = stream.codec_context and stream.codec_context.codec.canonical_name
            kind = (f"{stream.type} stream {stream.index} "
                    f"({codec or getattr(stream, 'name', None) or 'unknown'})")
            if stream.type == "attachment" and self.format != "matroska":
                self.note(f"{kind} is left out: {self.format} holds no attachments; .mkv does")
                continue
            if stream.type != "attachment" and stream.codec_context is None:
                self.note(f"{kind} is left out: this FFmpeg does not know its codec")
                continue
            try:
                copy = self.container.add_stream_from_template(stream)
            except ValueError:
                self.note(f"{kind} is left out: {self.format} cannot hold it" +
                          ("" if self.format == "matroska" else "; .mkv may"))
                continue
            copy.metadata.update(_fresh(stream.metadata))
            copy.disposition = stream.disposition
            copies[stream.index] = copy
        return copies

    def _chapters(self, end: Fraction | None) -> list[dict]:
        """The input's chapters on our clock, without what lies before 0 or after `end` seconds."""
        kept = []
        for chapter in self.clip.chapters:
            tick = chapter["time_base"]
            shift, last = round(self.clip.origin / tick), chapter["end"]
            first, last = max(chapter["start"] - shift, 0), last - shift
            last = last if end is None else min(last, round(end / tick))
            if first < last:
                kept.append(chapter | {"start": first, "end": last})
        return kept

    def picture(self, picture: Picture) -> None:
        """Encodes one picture, resized to the writer's size if it has another. rgb: (H, W, 3) uint8 or
        uint16.
        """
        context = self.stream.codec_context
        frame = to_frame(upright(picture.rgb, self.turn), self.tags, self.matrix, context.pix_fmt,
                         (self.width, self.height), self.reformatter)
        frame.pts, frame.duration, frame.time_base = picture.pts, picture.duration, self.clip.time_base
        self.end = picture.pts + picture.duration
        self._mux(context.encode(frame))
        self.pictures += 1

    def packet(self, packet: av.Packet) -> None:
        """Takes a packet of one of Clip.copies, to be written unchanged when the video has come to its time.
        """
        if packet.stream_index in self.copies:
            self.waiting.append(packet)

    def _mux(self, encoded: list[av.Packet]) -> None:
        for packet in encoded:
            packet.stream = self.stream
            seconds = packet.dts * packet.time_base
            while self.waiting and self.waiting[0].dts * self.waiting[0].time_base <= seconds:
                self._copy(self.waiting.popleft())
            self.container.mux_one(packet)

    def _copy(self, packet: av.Packet) -> None:
        packet.stream = self.copies[packet.stream_index]
        self.container.mux_one(packet)

    def finish(self, *, cut: bool) -> None:
        """Ends the file and gives it its name. cut: the other streams end with the video, not with the input.
        """
        end = self.end * self.clip.time_base
        self._mux(self.stream.codec_context.encode(None))
        for packet in self.waiting:
            left = end - packet.pts * packet.time_base
            if cut and left <= 0:
                continue
            if cut and self.kinds[packet.stream_index] == "subtitle" and packet.duration:
                packet.duration = min(packet.duration, int(left / packet.time_base))
            self._copy(packet)
        if self.path is not None:
            self.container.set_chapters(self._chapters(end if cut else None))
        self.container.close()
        self.file.flush()
        if self.path is not None:
            self.file.close()
            os.replace(temporary(self.path), self.path)

    def abort(self) -> None:
        """Removes the unfinished file."""
        if self.path is None:
            return
        try:
            self.file.close()
        except OSError:                                 # the disk is full: closing cannot flush, and need not
            pass
        temporary(self.path).unlink(missing_ok=True)


def _fresh(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if not key.lower().startswith(STALE)}
