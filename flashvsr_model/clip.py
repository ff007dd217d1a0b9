"""What passes between reading, the model and writing: a clip and its pictures."""
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from .pixels import Tags


@dataclass(frozen=True)
class Picture:
    """One frame. rgb: (h, w, 3) uint8, or uint16 from deep input. pts, duration: units of Clip.time_base."""
    rgb: np.ndarray
    pts: int
    duration: int
    name: str = ""


@dataclass
class Clip:
    """An open input: what its first frame tells, and `items`, which gives Pictures and packets to copy, in
    file order.

    total: the frame count if the input says it, an estimate for most containers, or None.
    depth: bits per component. chroma: "420", "422", "444" or "rgb".
    matrix: the display matrix (9 integers) if the picture is to be shown turned, else None.
    origin: seconds of the input that are second 0 of the items. copies: the streams of the packets.
    problems: filled while reading: what is wrong with the input, though frames came out of it.
    """
    name: str
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    depth: int
    chroma: str
    tags: Tags
    total: int | None = None
    sar: Fraction | None = None
    matrix: tuple[int, ...] | None = None
    origin: Fraction = Fraction(0)
    copies: list = field(default_factory=list)
    chapters: list = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    stream_metadata: dict[str, str] = field(default_factory=dict)
    items: Iterator = iter(())
    problems: list[str] = field(default_factory=list)
    cut: bool = False                   # set while reading, when `frames` ends before the input does

    @property
    def deep(self) -> bool:
        return self.depth > 8


def temporary(path: Path) -> Path:
    """The name beside path under which it is written until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def error_text(error: Exception) -> str:
    """An FFmpeg or system error as one line without numbers and file names."""
    log = getattr(error, "log", None)
    last = f" ({log[2].strip()})" if log and len(log) > 2 else ""
    return f"{getattr(error, 'strerror', None) or error}{last}"
