"""High-resolution training clips made on the training device from a pack of pictures and short film segments.

The whole pack is decoded once and stays on the device as uint8. A clip is either a segment of film, cropped
and shrunk at random, or a picture under a moving camera, often with cut-outs that move by themselves.
Decisions are drawn on the host with NumPy; pixels take a few device operations per clip, none per frame.
"""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE = 64   # pixels, of a picture's map of detail


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of clip, and how often a clip of each has what. Speeds are per frame."""
    synthetic: float = 0.45
    film: float = 0.45
    real: float = 0.10
    texture: float = 0.4          # of the synthetic clips: background from tex/ instead of still/
    sprites: float = 0.5          # of the synthetic clips: with one or two cut-outs
    motion_blur: float = 0.25     # of the synthetic clips
    still_camera: float = 0.15    # of the synthetic clips: the background does not move
    speed: float = 1.5            # pixels, median speed of the camera
    turn: float = 0.003           # radians and relative zoom, scale of rotation and zoom
    shake: float = 0.3            # pixels, of the hand-held camera
    shrink: tuple[float, ...] = (1.0, 2.0, 3.0)   # factors by which film is shrunk, as far as its size allows


@dataclass(frozen=True)
class Video:
    """Decoded segments. frames: (F, H, W, 3) uint8; segments: (first frame, length) of each."""
    frames: Tensor
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Picture:
    """A decoded picture. pixels: (H, W, C) uint8; odds: how likely a crop is centred on each tile."""
    pixels: Tensor
    odds: np.ndarray


class ClipSource:
    """Endless random high-resolution clips from a pack (see flashvsr_model.training.pack).

    pack_dir: folder with still/, tex/ and sprite/ (*.webp) and video/ (*.mp4 with *.mp4.txt)
    device: where pixels are kept and clips are made    seed: of all choices; equal seeds give equal clips
    mix: what a batch holds; a kind of clip with share 0 needs no files. Videos named bbb* are the film
    Raises FileNotFoundError if the pack lacks a kind of file that mix asks for, ValueError if a video and its
    list of segments disagree.
    """

    def __init__(self, pack_dir: str | Path, device: str | torch.device, *, seed: int, mix: Mix = Mix()):
        pack, self.device, self.mix = Path(pack_dir), torch.device(device), mix
        self.rng = np.random.default_rng(seed)
        videos = sorted((pack / "video").glob("*.mp4"))
        found = {kind: sorted((pack / kind).glob("*.webp")) for kind in ("still", "tex", "sprite")}
        found["film"] = [path for path in videos if path.stem.startswith("bbb")]
        found["real"] = [path for path in videos if not path.stem.startswith("bbb")]
        shares = {"film": mix.film, "real": mix.real, "still": mix.synthetic * (1 - mix.texture),
                  "tex": mix.synthetic * mix.texture, "sprite": mix.synthetic * mix.sprites}
        used = {kind: found[kind] for kind, share in shares.items() if share}
        for kind, paths in used.items():
            if not paths:
                raise FileNotFoundError(f"{pack} must hold files of kind {kind!r}, got none: make it with "
                                        "python -m flashvsr_model.training.pack")
        load = {kind: load_video if kind in ("film", "real") else load_picture for kind in used}
        with ThreadPoolExecutor() as pool:   # films first: they take longest
            jobs = {kind: [pool.submit(load[kind], path, self.device) for path in paths]
                    for kind, paths in used.items()}
            loaded = {kind: [job.result() for job in some] for kind, some in jobs.items()}
        self.pictures = {kind: loaded[kind] for kind in ("still", "tex", "sprite") if kind in loaded}
        self.shots = {kind: [(video.frames, segment) for video in loaded[kind] for segment in video.segments]
                      for kind in ("film", "real") if kind in loaded}

    def batch(self, n: int, frames: int, height: int, width: int) -> Tensor:
        """n random clips: (n, frames, 3, height, width) float32 RGB in [0, 1] on the source's device."""
        shares = np.array([self.mix.synthetic, self.mix.film, self.mix.real])
        kinds = self.rng.choice(("synthetic", "film", "real"), n, p=shares / shares.sum())
        clips = torch.empty(n, frames, 3, height, width, device=self.device)
        for i in np.flatnonzero(kinds != "synthetic"):
            clips[i] = self._recorded(kinds[i], frames, height, width)
        rows = np.flatnonzero(kinds == "synthetic")
        blurred = self.rng.random(len(rows)) < self.mix.motion_blur
        for some, steps in ((rows[~blurred], 1), (rows[blurred], 4)):
            if len(some):
                moving = self._synthetic(len(some), frames, height, width, steps)
                for i, clip in zip(some, moving):
                    clips[i] = clip
        return clips

    def _recorded(self, kind: str, frames: int, height: int, width: int) -> Tensor:
        """A segment of "film" or "real" as (frames, 3, height, width): cropped, shrunk, flipped, reversed."""
        pixels, (first, length) = self.shots[kind][self.rng.integers(len(self.shots[kind]))]
        fits = min(pixels.shape[1] / height, pixels.shape[2] / width)
        factor = max(1.0, min(float(self.rng.choice(self.mix.shrink)), fits))
        h, w = int(height * factor), int(width * factor)
        time = first + ping_pong(int(self.rng.integers(max(1, 2 * length - 2))), frames, length, self.device)
        y = self._span(pixels.shape[1], h, h / 2 + self.rng.random() * (pixels.shape[1] - h + 1))
        x = self._flip(self._span(pixels.shape[2], w, w / 2 + self.rng.random() * (pixels.shape[2] - w + 1)))
        clip = pixels[time[:, None, None], y[:, None], x].permute(0, 3, 1, 2).float() / 255
        if (h, w) != (height, width):
            clip = F.interpolate(clip, (height, width), mode="bicubic", antialias=True).clamp_(0, 1)
        return clip

    def _synthetic(self, n: int, frames: int, height: int, width: int, steps: int) -> Tensor:
        """n moving pictures (n, frames, 3, height, width); a frame is the mean of steps moments."""
        mix, rng = self.mix, self.rng
        still = rng.random(n) < mix.still_camera
        paths = trajectories(rng, n, frames, steps, mix) * ~still[:, None, None]
        paths[..., 3] += rng.uniform(-0.3, 0.2, (n, 1))   # some clips closer, some farther
        backgrounds = torch.stack([self._background(height, width) for _ in range(n)])
        clips = warp(backgrounds, paths, (height, width), "reflection")
        layers = (rng.random(n) < mix.sprites) * rng.integers(1, 3, n)
        for layer in range(2):
            rows = np.flatnonzero(layers > layer)
            if not len(rows):
                continue
            paths = trajectories(rng, len(rows), frames, steps, mix)
            paths[..., :2] += rng.uniform(-0.4, 0.4, (len(rows), 1, 2)) * (width, height)
            canvas = torch.stack([self._sprite(height, width) for _ in rows])
            sprite = warp(canvas, paths, (height, width), "zeros")
            where = torch.from_numpy(rows).to(self.device, non_blocking=True)
            clips[where] = clips[where] * (1 - sprite[:, :, 3:]) + sprite[:, :, :3]
        return clips.unflatten(1, (frames, steps)).mean(2) if steps > 1 else clips

    def _background(self, height: int, width: int) -> Tensor:
        """(3, 1.5 height, 1.5 width) float around a place with detail, sometimes shrunk 2x to be sharper."""
        kind = "tex" if self.rng.random() < self.mix.texture else "still"
        picture = self.pictures[kind][self.rng.integers(len(self.pictures[kind]))]
        h, w = int(1.5 * height), int(1.5 * width)
        large = picture.pixels.shape[0] >= 2 * h and picture.pixels.shape[1] >= 2 * w
        shrink = 2 if large and self.rng.random() < 0.5 else 1
        tile = int(self.rng.choice(picture.odds.size, p=picture.odds.ravel()))
        middle = [(k + self.rng.random()) * TILE for k in divmod(tile, picture.odds.shape[1])]
        y = self._span(picture.pixels.shape[0], h * shrink, middle[0])
        x = self._flip(self._span(picture.pixels.shape[1], w * shrink, middle[1]))
        crop = picture.pixels[y[:, None], x].permute(2, 0, 1).float() / 255
        return F.avg_pool2d(crop, shrink)

    def _sprite(self, height: int, width: int) -> Tensor:
        """(4, 2 height, 2 width) float, colour times alpha and alpha, a cut-out in the middle of nothing."""
        picture = self.pictures["sprite"][self.rng.integers(len(self.pictures["sprite"]))]
        rgba = picture.pixels.permute(2, 0, 1)[None].float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        side = self.rng.uniform(0.3, 0.9) * min(height, width)
        scale = min(side / max(rgba.shape[2:]), 1.0)
        h, w = (max(2, int(scale * s)) for s in rgba.shape[2:])
        small = F.interpolate(rgba, (h, w), mode="bilinear", antialias=True)[0]
        top, left = (2 * height - h) // 2, (2 * width - w) // 2
        return F.pad(small, (left, 2 * width - w - left, top, 2 * height - h - top))

    def _span(self, size: int, length: int, middle: float) -> Tensor:
        """length neighbouring indices into size pixels, around middle if they fit; mirrored if none do."""
        return ping_pong(max(0, min(int(middle - length / 2), size - length)), length, size, self.device)

    def _flip(self, indices: Tensor) -> Tensor:
        return indices.flip(0) if self.rng.random() < 0.5 else indices


def ping_pong(first: int, count: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """count indices (int64) into 0..length-1 that run forth and back without repeating the ends.

    first: phase of the first index, in 0..2*length-3: from length on, the way back (time reversed)
    """
    if length == 1:
        return torch.zeros(count, dtype=torch.int64, device=device)
    phase = (torch.arange(count, device=device) + first) % (2 * length - 2)
    return torch.minimum(phase, 2 * length - 2 - phase)


def trajectories(rng: np.random.Generator, n: int, frames: int, steps: int, mix: Mix) -> np.ndarray:
    """Camera paths (n, frames * steps, 4): right and down in pixels, angle in radians, log of the scale.

    They drift, sway slowly and shake as a hand does. The steps of a frame share the first half of its time.
    """
    scale = np.array([mix.speed, mix.speed, mix.turn, mix.turn]) * np.exp(rng.normal(0, 0.8, (n, 1, 1)))
    velocity = rng.normal(size=(n, 1, 4)) * scale
    sway = rng.normal(size=(n, 1, 4)) * scale * 3
    phase, pitch = rng.uniform(0, 2 * math.pi, (n, 1, 4)), rng.uniform(0.05, 0.6, (n, 1, 4))
    shake = rng.normal(size=(n, frames + 1, 4)) * (1, 1, 2e-3, 1e-3) * mix.shake * rng.random((n, 1, 1))
    time = np.arange(frames + 1)[:, None]
    path = velocity * (time - frames / 2) + sway * np.sin(pitch * time + phase) + shake.cumsum(1)
    path[..., 3] = 0.3 * np.tanh(path[..., 3] / 0.3)
    part = (np.arange(steps) / (2 * steps))[:, None]
    return (path[:, :-1, None] * (1 - part) + path[:, 1:, None] * part).reshape(n, frames * steps, 4)


def warp(pictures: Tensor, paths: np.ndarray, size: tuple[int, int], padding: str) -> Tensor:
    """What a camera sees that starts in the middle of each picture and follows its path.

    pictures: (n, C, h, w) float in [0, 1]    paths: (n, T, 4), see trajectories    size: (height, width) seen
    padding: "reflection" or "zeros" beyond the borders
    Returns (n, T, C, height, width) in [0, 1], sampled bicubically.
    """
    (h, w), (height, width) = pictures.shape[2:], size
    path = torch.from_numpy(paths.astype(np.float32)).to(pictures.device, non_blocking=True)
    right, down, angle, zoom = path[:, :, None, None].unbind(-1)
    across, up = zoom.exp() * angle.cos(), zoom.exp() * angle.sin()
    u = torch.arange(width, device=pictures.device) + (0.5 - width / 2)
    v = (torch.arange(height, device=pictures.device) + (0.5 - height / 2))[:, None]
    # sums, not a matrix product: that may be rounded to TF32, which moves pixels
    grid = torch.stack([(across * u - up * v + right) * (2 / w), (up * u + across * v + down) * (2 / h)], -1)
    grid = grid.flatten(1, 2)   # all frames of a clip as one tall picture: the source is read, not repeated
    seen = F.grid_sample(pictures, grid, mode="bicubic", padding_mode=padding, align_corners=False)
    return seen.unflatten(2, (-1, height)).transpose(1, 2).clamp(0, 1)


def load_video(path: Path, device: torch.device) -> Video:
    """Decode a packed video and read its segments' lengths; ValueError if these do not add up."""
    lengths = [int(word) for word in path.with_name(path.name + ".txt").read_text().split()]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = torch.empty(sum(lengths), stream.height, stream.width, 3, dtype=torch.uint8)
        count = 0
        for frame in container.decode(stream):
            if count < len(frames):
                frames[count] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            count += 1
    if count != len(frames):
        raise ValueError(f"{path} must hold the {len(frames)} frames of its segments, got {count}")
    firsts = np.cumsum([0, *lengths[:-1]])
    return Video(frames.to(device), tuple((int(first), length) for first, length in zip(firsts, lengths)))


def load_picture(path: Path, device: torch.device) -> Picture:
    """Decode a packed picture and measure where its detail is."""
    with Image.open(path) as image:
        pixels = np.array(image)
    return Picture(torch.from_numpy(pixels).to(device), _detail_odds(pixels))


def _detail_odds(pixels: np.ndarray) -> np.ndarray:
    """Probability of each tile of pixels (H, W, C), from its mean gradient plus a tenth of the largest."""
    grey = pixels[..., 1].astype(np.int16)
    rows, cols = (max(1, side // TILE) for side in grey.shape)
    gradient = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    odds = np.array([[part.mean() for part in np.array_split(strip, cols, 1)]
                     for strip in np.array_split(gradient, rows)])
    odds += odds.max() / 10 + 1e-6
    return odds / odds.sum()
