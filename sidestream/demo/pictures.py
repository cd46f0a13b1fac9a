"""Small generated pictures of signs: an outer shape with a mark in it, on an unquiet ground. Deterministic.

Where no data set can be had, they stand for photographs: position, size, turn, colours and noise differ from
one to the next, and only shape and mark say what a sign is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

SIDE: Final = 40
"""Pixels."""
OUTER: Final = {"triangle": 3, "square": 4, "pentagon": 5, "octagon": 8, "circle": 40}
"""Shapes, with their corners."""
MARKS: Final = ("bar", "cross", "dot", "ring", "arrow", "two")
SIGNS: Final = (
    "triangle-bar",
    "triangle-dot",
    "square-cross",
    "square-arrow",
    "octagon-bar",
    "octagon-ring",
    "circle-cross",
    "circle-two",
)
"""What the demo's devices tell apart. Its backbone has been taught with other signs only."""
Colour: TypeAlias = tuple[int, int, int]
_DARK: Final = (10, 100)
_LIGHT: Final = (140, 245)


def every_sign() -> list[str]:
    """All there are, of which :data:`SIGNS` are some."""
    return [f"{outer}-{mark}" for outer in OUTER for mark in MARKS]


def picture(sign: str, rng: np.random.Generator) -> Any:
    """A picture of a sign, in RGB, :data:`SIDE` pixels wide and high."""
    from PIL import Image, ImageDraw

    outer, _, mark = sign.partition("-")
    ground, shape, ink = _colours(rng)
    ramp = np.linspace(-25, 25, SIDE) * rng.uniform(-1, 1)
    canvas = np.clip(ground + np.zeros((SIDE, SIDE, 3)) + ramp[:, None, None], 0, 255).astype(np.uint8)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    centre = rng.uniform(0.46 * SIDE, 0.54 * SIDE, 2)
    radius, turn = rng.uniform(0.36, 0.44) * SIDE, rng.uniform(-0.25, 0.25)
    draw.polygon(_corners(centre, radius, OUTER[outer], turn), fill=_plain(shape))
    _draw_mark(draw, mark, centre, 0.45 * radius, turn, _plain(ink))
    noisy = np.asarray(image, dtype=np.float64) + rng.normal(0, 12, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_signs(folder: Path, each: int, *, seed: int) -> Path:
    """So many pictures of each of :data:`SIGNS`, in a folder for each; whatever was there stays."""
    rng = np.random.default_rng(seed)
    for sign in SIGNS:
        (folder / sign).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            (folder / sign / f"{number:03d}.png").write_bytes(png(picture(sign, rng)))
    return folder


def png(image: Any) -> bytes:
    """What its file holds."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _colours(rng: np.random.Generator) -> Sequence[Any]:
    """Of ground, shape and mark: a shape is lighter than both."""
    return [rng.uniform(low, high, 3) for low, high in (_DARK, _LIGHT, _DARK)]


def _plain(colour: Any) -> Colour:
    red, green, blue = (int(value) for value in colour)
    return red, green, blue


def _corners(centre: Any, radius: float, count: int, turn: float) -> list[tuple[float, float]]:
    start = turn - math.pi / 2 + (math.pi / count if count in (4, 8) else 0)
    angles = [start + 2 * math.pi * number / count for number in range(count)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _draw_mark(
    draw: Any, mark: str, centre: Any, size: float, turn: float, ink: tuple[int, int, int]
) -> None:
    def at(x: float, y: float) -> tuple[float, float]:
        cos, sin = math.cos(turn), math.sin(turn)
        return centre[0] + size * (x * cos - y * sin), centre[1] + size * (x * sin + y * cos)

    def box(x: float, y: float, wide: float, high: float) -> None:
        corners = [
            at(x - wide, y - high),
            at(x + wide, y - high),
            at(x + wide, y + high),
            at(x - wide, y + high),
        ]
        draw.polygon(corners, fill=ink)

    def disc(x: float, y: float, radius: float, fill: Colour) -> None:
        draw.polygon(_corners(at(x, y), radius * size, 24, 0.0), fill=fill)

    if mark in ("bar", "cross"):
        box(0, 0, 1, 0.3)
    if mark == "cross":
        box(0, 0, 0.3, 1)
    elif mark == "dot":
        disc(0, 0, 0.6, ink)
    elif mark == "ring":
        under = draw.im.getpixel(tuple(map(int, at(0, 1.2))))
        disc(0, 0, 0.9, ink)
        disc(0, 0, 0.5, under)
    elif mark == "arrow":
        box(0, 0.35, 0.22, 0.65)
        draw.polygon([at(-0.8, -0.1), at(0.8, -0.1), at(0, -1)], fill=ink)
    elif mark == "two":
        disc(-0.6, 0, 0.38, ink)
        disc(0.6, 0, 0.38, ink)
