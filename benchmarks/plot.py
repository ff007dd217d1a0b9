"""The figures of bench_attention as a picture, drawn with Pillow: no display, no plotting package."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PANEL, MARGIN, LEGEND, FONT = (520, 330), (64, 40, 16, 44), 34, 14  # pixels; margins left, top, right, bottom
SCALE = 2  # drawn larger and reduced, which smooths lines
COLOURS = {"hopper": "#0b6e4f", "triton": "#1f77b4", "cuda": "#8c564b", "cpu": "#0b6e4f",
           "reference": "#999999", "fa4": "#d62728", "flex": "#ff7f0e", "sdpa-masked": "#ff7f0e",
           "fastvideo": "#9467bd", "flashinfer": "#e377c2", "bsa": "#bcbd22"}


def panels(document: dict) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """For each panel that has points its title, name of the x axis, and contestants' (x, share of ideal).

    The shape with the most cases, against density at the spread nearest 17.5 %, and against spread at the
    density nearest .45, forward and backward.
    """
    rows = [row for row in document["rows"] if "of_ideal" in row]
    found = []
    for direction in ("fwd", "bwd"):
        shapes = [_shape(row) for row in rows if row["case"].startswith(direction)]
        if not shapes:
            continue
        here = [row for row in rows if _shape(row) == max(shapes, key=shapes.count)]
        densities, spreads = zip(*map(_asked, here))
        cv = min(spreads, key=lambda value: abs(value - .175))
        density = min(densities, key=lambda value: abs(value - .45))
        name = " ".join(_shape(here[0]))
        for title, axis, kept in (
                (f"{name}, counts spread by {cv:.1%}", "density",
                 [row for row in here if _asked(row)[1] == cv or _asked(row)[0] == 1]),
                (f"{name}, density {density:g}", "cv", [row for row in here if _asked(row)[0] == density])):
            series: dict[str, list[tuple[float, float]]] = {}
            for row in kept:
                series.setdefault(row["contestant"], []).append((row[axis], row["of_ideal"]))
            found.append((title, {"density": "density of the mask", "cv": "spread of the counts (cv)"}[axis],
                          {contestant: sorted(points) for contestant, points in series.items()
                           if contestant not in ("cudnn", "sdpa")}))
    return found


def draw(document: dict, path: Path) -> None:
    """Writes the PNG: a panel each for what panels gives, two a row, and a legend."""
    parts = panels(document)
    names = list(dict.fromkeys(name for _, _, series in parts for name in series))
    columns, rows = min(2, len(parts)), -(-len(parts) // 2)
    size = max(1, columns) * PANEL[0] * SCALE, (rows * PANEL[1] + 2 * LEGEND) * SCALE
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    about = document["machine"]
    where = f"{about.get('gpu', about['cpu'])}, torch {about['torch']}, commit {about['commit']}"
    write(pen, (MARGIN[0], 8), f"Ideal time / time. {where}", "#222222")
    for i, part in enumerate(parts):
        _panel(pen, (i % 2 * PANEL[0], LEGEND + i // 2 * PANEL[1]), *part)
    x, y = MARGIN[0], LEGEND + rows * PANEL[1] + 6
    for name in names:
        pen.line(scaled((x, y + 8), (x + 22, y + 8)), COLOURS.get(name, "black"), 3 * SCALE)
        write(pen, (x + 28, y), name, "#222222")
        x += 44 + int(font().getlength(name) / SCALE)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)
    image.save(path, optimize=True)


def _shape(row: dict) -> tuple[str, ...]:
    """Direction, picture, heads, D and dtype of a row's case."""
    return tuple(row["case"].split("/")[:5])


def _asked(row: dict) -> tuple[float, float]:
    """The density and the spread that a row's case asked for; the mask's own differ a little."""
    density, cv = row["case"].split("/")[5:]
    return float(density.removeprefix("density")), float(cv.removeprefix("cv"))


def _panel(pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, axis: str,
           series: dict[str, list[tuple[float, float]]]) -> None:
    left, top = corner[0] + MARGIN[0], corner[1] + MARGIN[1]
    width, height = PANEL[0] - MARGIN[0] - MARGIN[2], PANEL[1] - MARGIN[1] - MARGIN[3]
    points = [point for line in series.values() for point in line]
    most_x = max([x for x, _ in points] + [1e-9]) * 1.04
    most_y = max([y for _, y in points] + [1.0]) * 1.08

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * width, top + (1 - y / most_y) * height
    write(pen, (left, corner[1] + 16), title, "#222222")
    step = next(s for s in (.1, .2, .5, 1, 2, 5, 1e9) if most_y / s <= 8)
    for i in range(int(most_y / step) + 1):
        colour = "#222222" if i == 0 else "#dddddd"
        pen.line(scaled(place(0, i * step), place(most_x, i * step)), colour, SCALE)
        write(pen, (corner[0] + 24, place(0, i * step)[1] - 9), f"{i * step:.1f}", "#555555")
    for x in sorted({x for x, _ in points}):
        at = place(x, 0)
        pen.line(scaled(at, (at[0], at[1] + 4)), "#222222", SCALE)
        write(pen, (at[0] - 12, at[1] + 6), f"{x:.2f}", "#555555")
    write(pen, (left + width // 2 - 60, top + height + 24), axis, "#222222")
    pen.line(scaled(place(0, 1), place(most_x, 1)), "#222222", 2 * SCALE)  # ideal
    for name, line in series.items():
        colour = COLOURS.get(name, "black")
        pen.line(scaled(*(place(*point) for point in line)), colour, 2 * SCALE, joint="curve")
        for point in line:
            x, y = place(*point)
            pen.ellipse(scaled((x - 3, y - 3), (x + 3, y + 3)), colour)


def scaled(*points: tuple[float, float]) -> list[tuple[float, float]]:
    """Pixels of the picture as drawn, SCALE times as large."""
    return [(x * SCALE, y * SCALE) for x, y in points]


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, SCALE times as large."""
    return ImageFont.load_default(FONT * SCALE)


def write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str) -> None:
    """A line of text; at: of its upper left corner."""
    pen.text(scaled(at)[0], text, colour, font())
