"""A contact sheet: the same crops of several methods' frames side by side, for eyes."""
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .metrics import luma

SIDE, LABEL, GAP = 256, 14, 4  # pixels: crops are shown 1:1


def pick_crops(truth: Tensor, count: int = 3) -> list[tuple[int, int, int]]:
    """(frame, top, left) of the square with the most detail in `count` frames spread over truth (T, H, W, 3).

    A square once taken counts for nothing in the frames after it: each shows another part of the picture.
    """
    side, step = min(SIDE, *truth.shape[1:3]), 16
    taken, result = torch.ones(truth.shape[1:3], dtype=torch.float64), []
    for i in range(count):
        frame = (2 * i + 1) * len(truth) // (2 * count)
        y = luma(truth[frame])
        detail = F.pad((y[1:, 1:] - y[:-1, 1:]).abs() + (y[1:, 1:] - y[1:, :-1]).abs(), (0, 1, 0, 1)) * taken
        sums = F.avg_pool2d(detail[None], side, step)[0]
        top, left = (step * v for v in divmod(sums.argmax().item(), sums.shape[1]))
        taken[top:top + side, left:left + side] = 0
        result.append((frame, top, left))
    return result


def crops(video: Tensor, where: list[tuple[int, int, int]]) -> list[Tensor]:
    """Copies of the crops (SIDE, SIDE, 3), smaller where the picture is, of a video (T, H, W, 3)."""
    return [video[t, top:top + SIDE, left:left + SIDE].clone() for t, top, left in where]


def write_sheet(path: Path, columns: list[str], rows: list[tuple[str, Sequence[Tensor]]]):
    """Writes a picture of one row for each (name, crops) in `rows`, one crop for each name in `columns`."""
    size = (GAP + len(columns) * (SIDE + GAP), GAP + len(rows) * (LABEL + SIDE + GAP))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, (row, pictures) in enumerate(rows):
        for j, (column, picture) in enumerate(zip(columns, pictures, strict=True)):
            x, y = GAP + j * (SIDE + GAP), GAP + i * (LABEL + SIDE + GAP)
            draw.text((x, y), f"{column}   {row}" if j == 0 else column, fill="black")
            page.paste(Image.fromarray(picture.numpy()), (x, y + LABEL))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
