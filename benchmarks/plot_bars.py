"""The figures of bench_decoder as bars: what contestants reach of a matrix product's or a copy's rate."""
from pathlib import Path

from PIL import Image, ImageDraw

from .plot import COLOURS, SCALE, font, scaled, write

NAMES, BARS, FIGURES, MARGIN, HEAD, BAR, GAP = 410, 620, 190, 12, 44, 15, 12  # pixels
OTHERS = {"cudnn": "#d62728", "onednn": "#d62728", "plain-compiled": "#9467bd", "im2col": "#ff7f0e",
          "torch": "#ff7f0e"}
REST = "#bbbbbb"  # peers with work beside the call's own, and the slower ones


def groups(document: dict) -> dict[str, list[tuple[str, float, str]]]:
    """For each case the contestants' names, shares of the rate that binds, and figures as text."""
    found: dict[str, list[tuple[str, float, str]]] = {}
    for row in document["rows"]:
        if row["contestant"] in ("gemm", "copy"):
            continue
        share, figure = ((row["of_gemm"], f"{row['tflops']:.3g} TFLOP/s") if "of_gemm" in row else
                         (row["of_copy"], f"{row['gbs']:.4g} GB/s"))
        found.setdefault(row["case"], []).append((row["contestant"], share, f"{row['us']:,.0f} us, {figure}"))
    return found


def draw(document: dict, path: Path) -> None:
    """Writes the PNG: a group of bars for each case, one below the other."""
    parts = groups(document)
    height = HEAD + sum(len(bars) * BAR + BAR + GAP for bars in parts.values()) + MARGIN
    image = Image.new("RGB", ((NAMES + BARS + FIGURES) * SCALE, height * SCALE), "white")
    pen = ImageDraw.Draw(image)
    about = document["machine"]
    where = f"{about.get('gpu', about['cpu'])}, torch {about['torch']}, commit {about['commit']}"
    write(pen, (MARGIN, 8), f"Share of a large matrix product's rate, or of a copy's. {where}", "#222222")
    longest = max([share for bars in parts.values() for _, share, _ in bars] + [1.0])
    y = HEAD
    for case, bars in parts.items():
        write(pen, (MARGIN, y - 2), case, "#222222")
        y += BAR
        top = y
        for name, share, figure in bars:
            colour = OTHERS.get(name) or COLOURS.get(name, REST)
            write(pen, (NAMES - 12 - font().getlength(name) / SCALE, y - 3), name, "#222222")
            end = NAMES + share / longest * BARS
            pen.rectangle(scaled((NAMES, y + 1), (end, y + BAR - 2)), colour)
            write(pen, (end + 5, y - 3), figure, "#555555")
            y += BAR
        one = NAMES + BARS / longest
        pen.line(scaled((one, top), (one, y)), "#222222", SCALE)
        y += GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)
    image.save(path, optimize=True)
