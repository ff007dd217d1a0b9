"""A stand-in for the model, fast and exact: nearest enlargement with the model's delay; and small clips to
feed it.
"""
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

FIRST, CHUNK, LOOKAHEAD = 25, 8, 4


class Nearest:
    """push and flush as StreamingUpscaler's: 21 frames after the first 25, then 8 for every 8, the rest at
    the end.

    at: {number of frames taken: callable}, called when the push that takes that frame begins
    """

    def __init__(self, at: dict | None = None):
        self.at, self.options, self.dtypes = at or {}, None, set()

    def __call__(self, weights, *, device=None, dtype=None, version=None, **options):
        """As load_upscaler."""
        self.options = {"weights": weights, "device": device, "dtype": dtype, "version": version, **options}
        return self

    def new_state(self, height, width, **options):
        return {"held": [], "taken": 0, "size": (height, width)} | options

    def push(self, state, frames):
        out = []
        for frame in frames:
            assert frame.shape == (*state["size"], 3), (frame.shape, state["size"])
            self.dtypes.add(frame.dtype.name)
            self.at.get(state["taken"], lambda: None)()
            state["held"].append(frame)
            state["taken"] += 1
            if state["taken"] >= FIRST and (state["taken"] - FIRST) % CHUNK == 0:
                out += self._take(state, len(state["held"]) - LOOKAHEAD)
        return self._large(state, out)

    def flush(self, state):
        return self._large(state, self._take(state, len(state["held"])))

    @staticmethod
    def _take(state, count):
        out, state["held"] = state["held"][:count], state["held"][count:]
        return out

    @staticmethod
    def _large(state, frames):
        height, width = state["size"]
        if not frames:
            return np.zeros((0, 4 * height, 4 * width, 3), np.uint8)
        return np.stack(frames).repeat(4, axis=1).repeat(4, axis=2)


def moving(count: int, width: int = 48, height: int = 32, start: int = 0) -> list[np.ndarray]:
    """RGB frames (height, width, 3) uint8: a gradient with a bar that moves by 2 pixels a frame."""
    frames = []
    for n in range(start, start + count):
        y, x = np.mgrid[:height, :width]
        rgb = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, n * 5 % 256)],
                       axis=2).astype(np.uint8)
        rgb[:, (2 * n) % width:(2 * n) % width + 4] = (230, 40, 60)
        frames.append(rgb)
    return frames


def write_video(path: Path, frames: list[np.ndarray], *, codec="libx264", pix_fmt="yuv420p", rate=25,
                pts=None, time_base=None, options=None, audio=0.0, srt=(), tags=None, sar=None, matrix=None,
                chapters=(), metadata=None, format=None) -> Path:
    """A video of frames.

    pts: times in time_base, None for one a frame
    tags: (primaries, transfer, space, range) as FFmpeg's numbers
    audio: seconds of a sine as AAC    srt: (start ms, duration ms, text) as a SubRip stream, in Matroska
    """
    time_base = time_base or Fraction(1, rate)
    with av.open(str(path), "w", format=format) as out:
        height, width = frames[0].shape[:2]
        video = out.add_stream(codec, rate=rate, options=options or {})
        video.width, video.height, video.pix_fmt = width, height, pix_fmt
        video.codec_context.time_base = video.time_base = time_base
        video.codec_context.flags |= av.codec.context.Flags.frame_duration
        if tags:
            (video.codec_context.color_primaries, video.codec_context.color_trc,
             video.codec_context.colorspace, video.codec_context.color_range) = tags
        if sar:
            video.codec_context.sample_aspect_ratio = sar
        if matrix:
            video.set_display_rotation(matrix)
        sound = out.add_stream("aac", rate=48000) if audio else None
        text = out.add_mux_stream("subrip", time_base=Fraction(1, 1000)) if srt else None
        out.metadata.update(metadata or {})
        if chapters:
            out.set_chapters([{"id": i, "start": a, "end": b, "time_base": Fraction(1, 1000),
                               "metadata": {"title": t}}
                              for i, (a, b, t) in enumerate(chapters)])
        out.start_encoding()
        if sound:
            _write_sine(out, sound, audio)
        for begin, duration, words in srt:
            packet = av.Packet(words.encode())
            packet.stream, packet.time_base = text, Fraction(1, 1000)
            packet.pts = packet.dts = begin
            packet.duration = duration
            out.mux(packet)
        for number, rgb in enumerate(frames):
            frame = VideoFrame.from_ndarray(rgb, format="rgb48le" if rgb.dtype == np.uint16 else "rgb24")
            space = {6: 5}.get(tags[2], tags[2]) if tags else 5
            frame = frame.reformat(format=pix_fmt, dst_colorspace=space,
                                   dst_color_range=(tags[3] if tags else 0) or 1)
            if tags:
                frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range = tags
            frame.pts, frame.time_base = (pts[number] if pts else number), time_base
            frame.duration = (pts[number + 1] - pts[number]) if pts and number + 1 < len(pts) else \
                max(1, round(1 / (rate * time_base)))
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def _write_sine(out, sound, seconds: float) -> None:
    rate, block = 48000, 1024
    for begin in range(0, int(seconds * rate), block):
        wave = np.sin(np.arange(begin, begin + block) * 2 * np.pi * 440 / rate).astype(np.float32) * 0.3
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        out.mux(sound.encode(frame))
    out.mux(sound.encode(None))


def facts(path: Path) -> dict:
    """What a file holds: decoded RGB frames, their times in seconds, packets of the other streams, and the
    tags.
    """
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        found = {"times": [], "frames": [], "packets": {}, "pix_fmt": video.pix_fmt,
                 "rate": video.average_rate, "sar": video.sample_aspect_ratio,
                 "size": (video.width, video.height), "chapters": container.chapters(),
                 "metadata": dict(container.metadata), "duration": (container.duration or 0) / av.time_base,
                 "format": container.format.name, "codec": video.codec_context.name,
                 "streams": [(s.type, s.metadata.get("language")) for s in container.streams]}
        for packet in container.demux():
            if packet.stream.type != "video":
                if packet.size:
                    found["packets"].setdefault(packet.stream.index, []).append(
                        (float(packet.pts * packet.time_base), bytes(packet)))
                continue
            for frame in packet.decode():
                found["times"].append(float(frame.pts * frame.time_base))
                found["rotation"] = frame.rotation
                found["tags"] = (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range)
                found["frames"].append(frame.to_ndarray(format="rgb24"))
    return found
