"""Reading: a video file, a stream on standard input or a folder of pictures, as RGB arrays with their times.

Nothing is held beyond one frame and the packets the decoder holds, so memory does not grow with length.
"""
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from .clip import Clip, Picture, error_text
from .pictures import open_folder
from .pixels import Tags, UserError, bits, check, chroma, display_matrix, to_rgb

SUBTITLE = 10               # seconds before --start from which a subtitle that still shows is looked for
# PyAV 19 dropped the argument and reads undecodable metadata always; before, it raises unless told so
LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Containers whose header says how long the file is; for the others FFmpeg estimates it from what is there.
STATES_LENGTH = ("mov,mp4", "matroska", "avi", "flv", "asf")
# Containers in which FFmpeg's seeking ends at the key frame before a time. In MPEG-TS, for one, it can end behind what
# is wanted: there everything is decoded from the beginning.
SEEKS_BACK = ("mov,mp4", "matroska", "flv", "nut")


def open_clip(source: str, *, start: float = 0.0, frames: int | None = None, rate: Fraction = Fraction(25),
              note: Callable[[str], None] = lambda line: None) -> Clip:
    """The clip at source, read up to its first frame.

    source: a video file, a folder of pictures in natural order of their names, or "-" for a stream on
       standard input
    start: seconds; the first frame at or after it is the first that is given
    frames: at most that many; None for all    rate: frames per second of a folder
    note: takes lines the user should see (what is left out)
    Raises UserError if there is nothing to read.
    """
    if source != "-" and Path(source).is_dir():
        return open_folder(Path(source), start, frames, rate)
    return _Decoder(source, start, frames, note).clip()


def _exact(ratio) -> Fraction | None:
    """A Fraction of PyAV's ratio (before 19 a Fraction or None, then a type of its own that is false when
    unset).
    """
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


class _NoSeek:
    """Only `read`, so that FFmpeg does not try to seek in a pipe."""

    def __init__(self, file):
        self.read = file.read
        self.name = "standard input"


class _Decoder:
    """One video stream decoded, the packets of the streams beside it passed on; all times start at the
    origin.
    """

    def __init__(self, source: str, start: float, frames: int | None, note: Callable[[str], None]):
        self.name = "standard input" if source == "-" else source
        self.start, self.frames, self.note = start, frames, note
        self.reformatter = VideoReformatter()
        self.problems: list[str] = []
        self.packets: list[av.Packet] = []              # of other streams, until the origin is known
        self.count, self.broken, self.last_pts, self.end = 0, 0, None, Fraction(0)
        self.container = self._open(source)
        videos = [s for s in self.container.streams.video
                  if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise UserError(f"{self.name}: no video stream")
        self.stream = videos[0]
        if self.stream.codec_context is None:
            raise UserError(f"{self.name}: there is no decoder for its video stream")
        self.stream.thread_type = "AUTO"
        self.tick = _exact(self.stream.time_base)
        self.rate = _exact(self.stream.average_rate or self.stream.guessed_rate) or Fraction(25)
        self.begin = Fraction(max(self.container.start_time or 0, 0), av.time_base)
        self.copies = []
        for stream in self.container.streams:
            if stream.type in ("audio", "subtitle", "attachment"):
                self.copies.append(stream)
            elif stream is not self.stream:
                note(f"stream {stream.index} ({stream.type}) of {self.name} is left out")
        if self.stream.codec_context.field_order not in (0, 1):
            note(f"{self.name} is interlaced; its frames are taken as they are")
        self.from_seconds = self.begin + Fraction(start).limit_denominator(1_000_000)
        if start > 0 and self.container.format.name.startswith(SEEKS_BACK) and self._seekable(source):
            before = SUBTITLE if any(stream.type == "subtitle" for stream in self.copies) else 0
            self.container.seek(int(max(self.from_seconds - before, 0) / self.tick), stream=self.stream)

    def _open(self, source: str) -> av.container.InputContainer:
        try:
            if source == "-":
                # unbuffered: a buffer's lock, held by a read that waits, would abort Python's exit
                pipe = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
                return av.open(pipe if pipe.seekable() else _NoSeek(pipe), **LENIENT)
            if not Path(source).exists():
                raise UserError(f"{source}: no such file or folder")
            if Path(source).is_file() and not Path(source).stat().st_size:
                raise UserError(f"{source}: the file is empty")
            container = av.open(f"file:{source}", **LENIENT)
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.name}: not a readable video: {error_text(error)}") from error
        if container.format.name == "tty":              # FFmpeg shows any text file as a video of a terminal
            raise UserError(f"{self.name}: not a readable video: it is a text file")
        return container

    @staticmethod
    def _seekable(source: str) -> bool:
        return source != "-" or sys.stdin.seekable()

    def clip(self) -> Clip:
        frames = self._frames()
        first = next(frames, None)
        if first is None:
            after = f" at or after {self.start:g} s" if self.start else ""
            raise UserError(f"{self.name}: no frame could be decoded{after}"
                            + "".join(f"; {p}" for p in self.problems))
        check(first, self.name)
        self.tags, self.size = Tags.of(first), (first.width, first.height)
        self.origin = self._time(first) if self.start > 0 else self.begin
        if any(part.is_alpha for part in first.format.components):
            self.note(f"the alpha channel of {self.name} is left out")
        chapters = [c | {"time_base": _exact(c["time_base"])} for c in self.container.chapters()]
        self.result = Clip(
            self.name, first.width, first.height, self.rate, self.tick, bits(first.format),
            chroma(first.format), self.tags, self._total(), _exact(self.stream.sample_aspect_ratio),
            display_matrix(first), self.origin, self.copies, chapters, dict(self.container.metadata),
            dict(self.stream.metadata),
            self._items(first, frames), self.problems)
        return self.result

    def _total(self) -> int | None:
        length = self._promised()
        whole = self.stream.frames or (round(length * self.rate) if length else None)
        if whole is None:
            return self.frames
        rest = max(1, whole - round(self.start * self.rate))
        return rest if self.frames is None else min(rest, self.frames)

    def _promised(self) -> Fraction | None:
        """Seconds of the video that the header states, None if it does not."""
        if not self.container.format.name.startswith(STATES_LENGTH):
            return None
        if self.stream.duration:
            return self.stream.duration * self.tick
        return Fraction(self.container.duration, av.time_base) if self.container.duration else None

    def _time(self, frame: VideoFrame) -> Fraction:
        return frame.pts * self.tick

    def _set_time(self, frame: VideoFrame) -> None:
        """A rising pts for frames whose stream has none, or steps back."""
        step = max(1, round(1 / (self.rate * self.tick)))
        if frame.pts is None:
            frame.pts = 0 if self.last_pts is None else self.last_pts + step
        elif self.last_pts is not None and frame.pts <= self.last_pts:
            frame.pts = self.last_pts + (1 if self.last_pts - frame.pts < step else step)
        self.last_pts = frame.pts
        if not frame.duration or frame.duration < 0:
            frame.duration = step
        self.end = max(self.end, (frame.pts + frame.duration) * self.tick)

    def _frames(self) -> Iterator[VideoFrame]:
        """Decoded frames from `start` on, in rising time; packets of the copied streams gather in
        self.packets.
        """
        for packet in self._demux():
            if packet.stream is not self.stream:
                self.packets.append(packet)
                continue
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                self.broken += 1
                self.why = error_text(error)
                continue
            for frame in decoded:
                self._set_time(frame)
                if self.start <= 0 or self._time(frame) >= self.from_seconds:
                    yield frame
        self._tell_damage()
        self._judge_length()

    def _demux(self) -> Iterator[av.Packet]:
        streams = [self.stream] + [s for s in self.copies if s.type != "attachment"]
        try:
            for packet in self.container.demux(streams):
                if packet.stream is self.stream:
                    yield packet
                elif packet.size:               # an empty one marks the end of its stream
                    packet.pts = packet.dts if packet.pts is None else packet.pts
                    if packet.pts is None:
                        raise UserError(f"{self.name}: a packet of stream {packet.stream.index} has no time")
                    until = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self.end = self.end if self.stream.duration else max(self.end, until)
                    if self.start <= 0 or until > self.from_seconds:
                        yield packet
        except av.FFmpegError as error:
            self.problems.append(f"{self.name} breaks off: {error_text(error)}")

    def _tell_damage(self) -> None:
        if self.broken:
            self.problems.append(f"{self.name} is damaged: {self.broken} packets "
                                 f"could not be decoded ({self.why})")

    def _judge_length(self) -> None:
        """At the end of the file: does it hold what its header states?"""
        promised = self._promised()
        # Matroska's is an end
        start = (self.stream.start_time or 0) * self.tick if self.stream.duration else 0
        if promised and self.end < start + promised - max(2 / self.rate, Fraction(1, 10)):
            self.problems.append(f"{self.name} is truncated: it states {float(promised):.2f} s and "
                                 f"holds {float(self.end - start):.2f} s")

    def _items(self, first: VideoFrame, frames: Iterator[VideoFrame]) -> Iterator:
        shift = round(self.origin / self.tick)
        frame = first
        while frame is not None:
            if (frame.width, frame.height) != self.size:
                raise UserError(f"{self.name}: the picture size changes from {self.size[0]}x{self.size[1]} "
                                f"to {frame.width}x{frame.height} at frame {self.count}")
            yield from self._moved()
            rgb = to_rgb(frame, self.tags, self.reformatter)
            yield Picture(rgb, frame.pts - shift, frame.duration)
            self.count += 1
            if self.count == self.frames:
                self._tell_damage()
                yield from self._tail((frame.pts + frame.duration) * self.tick)
                return
            frame = next(frames, None)
        yield from self._moved()

    def _moved(self) -> Iterator[av.Packet]:
        """The gathered packets, their times from the origin; a subtitle that lies across it is shortened."""
        for packet in self.packets:
            shift = round(self.origin / packet.time_base)
            packet.pts -= shift
            packet.dts = packet.pts if packet.dts is None else packet.dts - shift
            if self.start > 0 and packet.pts < 0:
                if packet.stream.type != "subtitle":
                    continue
                packet.duration = max(0, (packet.duration or 0) + packet.pts)
                packet.pts = packet.dts = 0
            yield packet
        self.packets.clear()

    def _tail(self, end: Fraction) -> Iterator[av.Packet]:
        """The packets up to `end` seconds that stand behind the last frame in the file."""
        self.result.cut = True
        waiting = {s.index for s in self.copies if s.type == "audio"}
        yield from self._moved()
        for packet in self._demux():
            if packet.dts is None:
                continue
            seconds = packet.dts * packet.time_base
            if packet.stream is not self.stream:
                if seconds >= end:
                    waiting.discard(packet.stream.index)
                else:
                    self.packets.append(packet)
                    yield from self._moved()
            if not waiting or seconds > end + 5:
                return
