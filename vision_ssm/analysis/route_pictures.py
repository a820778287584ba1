"""Animated pictures of walks and waves: gif with one frame per step, and svg that any browser plays.

Still pictures are drawn by `vision_ssm.scans.drawing.draw_walks`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from ..scans.drawing import CELL, FIRST, INK, LAST, panel_grid, parts
from ..scans.walks import Walk, Wave

MOST_FRAMES = 200
_CELL = 26  # pixels from cell to cell
_SMALL_CELL = 14
_LARGE_GRID = 16  # cells of a side from which they are drawn small
_HEADING = 34
_CAPTION = 22
_SHARP = 2  # gif frames are drawn this much larger and reduced, which smooths edges
_COLOURS = 96
_HOLD = 12  # steps for which the finished picture stays


@dataclass
class _Panel:
    """A walk or wave in pixels: what appears at which step.

    Attributes:
        title, x, y: heading and top left corner.
        cells: centres of all cells.
        lines: (step, start, end, colour, width).
        dots: (step, centre, colour): cells that are reached.
        steps: number of steps.
    """

    title: str
    x: float
    y: float
    cells: list[tuple[float, float]] = field(default_factory=list)
    lines: list[tuple[int, tuple[float, float], tuple[float, float], str, float]] = field(default_factory=list)
    dots: list[tuple[int, tuple[float, float], str]] = field(default_factory=list)
    steps: int = 0


@cache
def _palette() -> list[str]:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]([i / 255 for i in range(256)], bytes=True)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, _ in colours.tolist()]


def _colour(place: float) -> str:
    return _palette()[round(255 * place)]


def _fill(panel: _Panel, walk: Walk | Wave, cell: float) -> None:
    def centre(column: float, row: float) -> tuple[float, float]:
        return panel.x + (column + 0.5) * cell, panel.y + _CAPTION + (row + 0.5) * cell

    if isinstance(walk, Wave):
        height, width = walk.steps.shape
        last = max(int(walk.steps.max()), 1)
        for row in range(height):
            for column in range(width):
                step = int(walk.steps[row, column])
                panel.dots.append((step, centre(column, row), _colour(step / last)))
                for down, right in walk.directions:
                    if 0 <= row - down < height and 0 <= column - right < width:
                        start = centre(column - right, row - down)
                        panel.lines.append((step, start, centre(column, row), _colour(step / last), 2.0))
        panel.steps = last + 1
    else:
        height, width = walk.height, walk.width
        length = walk.segment or len(walk.order)
        panel.steps = min(length, len(walk.order))
        for sequence in parts(walk):  # parts start anew, so they are walked at the same time
            steps = [round(place * max(panel.steps - 1, 1)) for *_, place in sequence]
            for i, (column, row, place) in enumerate(sequence):
                panel.dots.append((steps[i], centre(column, row), _colour(place)))
                if i:
                    x, y, _ = sequence[i - 1]
                    near = abs(x - column) + abs(y - row) == 1
                    thick = 3.0 if near else 1.0
                    panel.lines.append((steps[i], centre(x, y), centre(column, row), _colour(place), thick))
    panel.cells = [centre(column, row) for row in range(height) for column in range(width)]


def _lay_out(walks: Sequence[Walk | Wave]) -> tuple[list[_Panel], int, int, float]:
    """Panels, width and height of the picture, and radius of a cell."""
    sizes = [walk.steps.shape if isinstance(walk, Wave) else (walk.height, walk.width) for walk in walks]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    cell = _CELL if max(height, width) < _LARGE_GRID else _SMALL_CELL
    rows, columns = panel_grid(len(walks))
    longest = max(len(walk.title) for walk in walks)
    wide = max(cell * width, 6.2 * longest) + 18
    tall = cell * height + _CAPTION + 8
    panels = []
    for number, walk in enumerate(walks):
        panel = _Panel(walk.title, 12 + number % columns * wide, _HEADING + number // columns * tall)
        _fill(panel, walk, cell)
        panels.append(panel)
    return panels, round(columns * wide + 12), round(_HEADING + rows * tall + _CAPTION), cell / 5


def save_gif(
    walks: Sequence[Walk | Wave], path: str | os.PathLike, title: str, seconds: float = 0.12, frames: int = MOST_FRAMES
) -> int:
    """Write an animation in which the walks go on side by side, step by step.

    Args:
        walks: of `walks_of`; those that start anew again and again walk all their parts at once.
        path: file to write, of the format gif.
        title: line above.
        seconds: duration of a frame, in the hundredths of a second that the format knows.
        frames: at most so many; longer walks take several steps in one frame, the last frame shows the end.

    Returns:
        The number of frames: that of the steps of the longest walk, if `frames` allows.
    """
    if frames < 1:
        raise ValueError(f"an animation has at least 1 frame, got {frames}")
    panels, width, height, radius = _lay_out(walks)
    steps = max(panel.steps for panel in panels)
    stride = -(-steps // frames)
    shown = [min(step + stride, steps) for step in range(0, steps, stride)]
    drawn = _frames(panels, width, height, radius, title, shown)
    images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in drawn]
    palette = _gif_palette(images)
    reduced = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    tick = max(20, round(1000 * seconds))
    durations = [tick] * (len(reduced) - 1) + [tick * (1 + _HOLD)]
    reduced[0].save(path, format="GIF", save_all=True, append_images=reduced[1:], duration=durations, loop=0)
    return len(reduced)


def _gif_palette(images: Sequence[Image.Image]) -> Image.Image:
    """A picture with the palette of all frames: the colours of three of them, with large spots of those that matter."""
    chosen = [images[0], images[len(images) // 2], images[-1]]
    width, height = chosen[0].size
    sample = Image.new("RGB", (width, 3 * height), "white")
    for number, image in enumerate(chosen):
        sample.paste(image, (0, number * height))
    for number, colour in enumerate((CELL, LAST, INK)):
        sample.paste(colour, (0, number * height, 12, number * height + 12))
    palette = sample.quantize(_COLOURS - 1, dither=Image.Dither.NONE)
    entries = palette.getpalette() or []
    palette.putpalette([*entries[: 3 * (_COLOURS - 1)], 255, 255, 255])
    return palette


def _frames(
    panels: Sequence[_Panel], width: int, height: int, radius: float, title: str, shown: Sequence[int]
) -> Iterator[Image.Image]:
    """For each number of `shown`, the picture after so many steps."""
    canvas = Image.new("RGB", (_SHARP * width, _SHARP * height), "white")
    draw = ImageDraw.Draw(canvas)
    fonts = [ImageFont.load_default(size * _SHARP) for size in (14, 11)]

    def disc(at: tuple[float, float], size: float, colour: str) -> None:
        box = [_SHARP * (value + sign * size) for sign in (-1, 1) for value in at]
        draw.ellipse(box, fill=colour)

    draw.text((12 * _SHARP, 8 * _SHARP), title, fill=INK, font=fonts[0])
    for panel in panels:
        draw.text((_SHARP * panel.x, _SHARP * panel.y), panel.title, fill=INK, font=fonts[1])
        for at in panel.cells:
            disc(at, radius / 2, CELL)
    done = 0
    for count in shown:
        for panel in panels:
            for step, start, end, colour, thick in panel.lines:
                if done <= step < count:
                    draw.line([_SHARP * value for value in (*start, *end)], fill=colour, width=round(_SHARP * thick))
            for step, at, colour in panel.dots:
                if done <= step < count:
                    disc(at, radius, colour)
        frame = canvas.copy()
        pen = ImageDraw.Draw(frame)
        for panel in panels:
            for step, at, _ in panel.dots:
                if step == min(count, panel.steps) - 1:
                    box = [_SHARP * (value + sign * radius * 1.5) for sign in (-1, 1) for value in at]
                    pen.ellipse(box, fill=LAST, outline=INK, width=_SHARP)
        text = f"step {count} of {shown[-1]}"
        pen.text((12 * _SHARP, (height - _CAPTION + 2) * _SHARP), text, fill=INK, font=fonts[1])
        done = count
        yield frame


def save_animated_svg(walks: Sequence[Walk | Wave], path: str | os.PathLike, title: str, seconds: float = 0.12) -> None:
    """Write a scalable picture that draws the walks step by step, over and over; arguments as of `save_gif`."""
    panels, width, height, radius = _lay_out(walks)
    steps = max(panel.steps for panel in panels)
    duration = f"{(steps + _HOLD) * seconds:g}s"

    def appear(step: int) -> str:
        if step == 0:
            return ""
        moment = f"{step / (steps + _HOLD):.5f}"
        return (
            f'<animate attributeName="opacity" dur="{duration}" repeatCount="indefinite" calcMode="discrete" '
            f'values="0;1" keyTimes="0;{moment}"/>'
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}">',
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="22" font-size="14">{escape(title)}</text>',
    ]
    for panel in panels:
        out.append(f'<text x="{panel.x:g}" y="{panel.y + 12:g}" font-size="11">{escape(panel.title)}</text>')
        out.append(f'<g fill="{CELL}">')
        out += [f'<circle cx="{x:g}" cy="{y:g}" r="{radius / 2:g}"/>' for x, y in panel.cells]
        out.append('</g><g stroke-linecap="round">')
        for step, (x0, y0), (x1, y1), colour, thick in panel.lines:
            ends = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
            out.append(f'<line {ends} stroke="{colour}" stroke-width="{thick:g}">{appear(step)}</line>')
        out.append("</g>")
        for step, (x, y), colour in panel.dots:
            out.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}">{appear(step)}</circle>')
        ends_of = {0: FIRST, panel.steps - 1: LAST}
        for step, (x, y), _ in panel.dots:
            if step in ends_of:
                out.append(
                    f'<circle cx="{x:g}" cy="{y:g}" r="{1.4 * radius:g}" fill="{ends_of[step]}">{appear(step)}</circle>'
                )
    out.append("</svg>\n")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(out))
