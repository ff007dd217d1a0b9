"""The side-by-side picture: bicubic | ours | truth."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clip import Clip, Picture
from .pictures import PICTURES
from .pixels import UserError, upright
from .video import open_clip

LABEL = 32                  # pixels of the strip with the names


class Compare:
    """Keeps one frame and its result of those that pass, and writes them beside bicubic enlargement and the
    truth.
    """

    def __init__(self, clip: Clip, size: tuple[int, int], *, frame: int | None = None,
                 truth: str | None = None, start: float = 0.0):
        """size: width and height of a panel, before turning    frame: its number; None takes the middle one

        truth: a video whose frame of the same number is the truth, or a picture of it; None for no third
           panel
        start: seconds from where the frames count, in the clip and in the truth
        Raises UserError if the truth cannot be read: now, not when the work is done.
        """
        self.clip, self.size, self.truth, self.start = clip, size, truth, start
        self.wanted = frame if frame is not None else (clip.total or 1) // 2
        self.seen, self.kept, self.number = 0, None, 0
        if truth is not None:
            self._truth()

    def watch(self, before: np.ndarray, after: np.ndarray) -> None:
        """Takes a frame (h, w, 3) and its result (4h, 4w, 3), uint8 or uint16. The last stands in for a later
        one.
        """
        if self.seen <= self.wanted:
            self.kept, self.number = (before, after), self.seen
        self.seen += 1

    def save(self, path: str) -> None:
        """Writes the panels side by side. Raises UserError if no frame passed or the picture cannot be
        written.
        """
        if self.kept is None:
            raise UserError("no frame to compare")
        before, after = (_image(rgb) for rgb in self.kept)
        panels = {"bicubic": before.resize(self.size, Image.Resampling.BICUBIC),
                  "FlashVSR": after.resize(self.size, Image.Resampling.LANCZOS)}
        panels = {name: Image.fromarray(upright(np.asarray(panel), self.clip.matrix))
                  for name, panel in panels.items()}
        if self.truth is not None:
            size = panels["FlashVSR"].size
            panels["truth"] = self._truth().resize(size, Image.Resampling.LANCZOS)
        try:
            side_by_side(panels).save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def _truth(self) -> Image.Image:
        if Path(self.truth).suffix.lower() in PICTURES:
            try:
                with Image.open(self.truth) as image:
                    return image.convert("RGB")
            except OSError as error:
                raise UserError(f"{self.truth}: not a readable picture: {error}") from error
        clip = open_clip(self.truth, start=self.start, frames=self.number + 1)
        for item in clip.items:
            if isinstance(item, Picture):
                last = item.rgb
        return Image.fromarray(upright(np.asarray(_image(last)), clip.matrix))


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """The panels, all of one size, in a row, each under its name."""
    width, height = next(iter(panels.values())).size
    sheet = Image.new("RGB", (width * len(panels), height + LABEL))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL * 0.6)
    for column, (name, panel) in enumerate(panels.items()):
        draw.text((column * width + width / 2, LABEL / 2), name, fill="white", font=font, anchor="mm")
        sheet.paste(panel, (column * width, LABEL))
    return sheet


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray((rgb / 257 + 0.5).astype(np.uint8) if rgb.dtype == np.uint16
                           else np.ascontiguousarray(rgb))
