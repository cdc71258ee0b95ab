"""A collection to try the program with: little landscapes that are drawn, not downloaded.

A picture is a pure function of its number. Shapes are large and clean, so that even a small network that trains for
minutes on a CPU shows recognisable skies, hills and water.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Ridge = np.ndarray  # [N, 2] float: x rising, y downwards, in units of the picture's side

DEMO_COUNT = 4000
SUPERSAMPLING = 3  # drawn this many times larger, then averaged: smooth edges without a drawing library that has them


@dataclass(frozen=True)
class Palette:
    """The light of one hour of the day. `far` and `near` are the most distant and the closest hills."""

    zenith: Colour
    horizon: Colour
    disc: Colour
    far: Colour
    near: Colour
    lamp: Colour


PALETTES = (
    Palette((92, 120, 186), (255, 205, 178), (255, 244, 214), (176, 150, 184), (64, 78, 110), (255, 214, 130)),  # dawn
    Palette((58, 136, 214), (198, 230, 246), (255, 246, 190), (142, 184, 206), (64, 138, 76), (250, 240, 220)),  # noon
    Palette((38, 164, 196), (226, 244, 222), (255, 250, 220), (132, 196, 180), (38, 122, 96), (255, 236, 190)),  # may
    Palette((96, 62, 132), (255, 140, 84), (255, 226, 130), (178, 84, 108), (58, 32, 66), (255, 206, 96)),  # sunset
    Palette((232, 130, 84), (255, 222, 140), (255, 250, 226), (214, 140, 90), (112, 62, 48), (255, 232, 160)),  # autumn
    Palette((14, 22, 60), (70, 98, 158), (240, 240, 222), (44, 62, 116), (10, 18, 40), (255, 210, 110)),  # night
    Palette((34, 24, 74), (150, 84, 150), (255, 214, 226), (92, 60, 122), (28, 20, 56), (255, 220, 150)),  # dusk
    Palette((164, 180, 196), (238, 236, 232), (255, 255, 250), (186, 194, 204), (92, 108, 118), (255, 224, 160)),  # fog
)
ROOFS = ((184, 74, 60), (150, 96, 66), (88, 92, 120))


def draw(index: int, size: int = 64) -> np.ndarray:
    """Draw landscape number `index`: uint8 [size, size, 3], always the same for the same arguments."""
    rng = np.random.default_rng(index)
    side = size * SUPERSAMPLING
    palette = _varied(PALETTES[int(rng.random() * len(PALETTES))], rng)
    shore = 0.62 + 0.14 * rng.random()  # where the ground in front, or the water, begins
    picture = _sky(palette, side, shore)
    _draw_disc(picture, palette, rng, shore)
    _draw_distance(picture, palette, rng, shore)
    if rng.random() < 0.4:
        _draw_lake(picture, palette, shore)
        ground = _rolling(rng, shore + 0.2, 0.07)
    else:
        ground = _rolling(rng, shore + 0.04, 0.05)
    _fill_below(picture, ground, palette.near)
    _draw_foreground(picture, palette, rng, ground)
    return np.array(picture.reduce(SUPERSAMPLING))


def demo_images(count: int = DEMO_COUNT, size: int = 64) -> Iterator[np.ndarray]:
    """Yield the first `count` landscapes, each uint8 [size, size, 3]."""
    for index in range(count):
        yield draw(index, size)


def _varied(palette: Palette, rng: np.random.Generator) -> Palette:
    """The palette with its colours shifted together a little, so that no two evenings are alike."""
    shift = (rng.random(3) - 0.5) * 36
    colours = [palette.zenith, palette.horizon, palette.far, palette.near]
    zenith, horizon, far, near = (_clipped(np.add(colour, shift)) for colour in colours)
    return Palette(zenith, horizon, palette.disc, far, near, palette.lamp)


def _sky(palette: Palette, side: int, shore: float) -> Image.Image:
    """A [side, side] picture that fades from the zenith's colour to the horizon's, which is reached at `shore`."""
    fade = np.minimum(np.arange(side) / (side * shore), 1.0)[:, None]
    column = (1 - fade) * palette.zenith + fade * np.asarray(palette.horizon)  # [side, 3]
    strip = Image.fromarray(column.round().astype(np.uint8)[:, None, :])
    return strip.resize((side, side), Image.Resampling.NEAREST)


def _draw_disc(picture: Image.Image, palette: Palette, rng: np.random.Generator, shore: float) -> None:
    """The sun or the moon, with a halo."""
    x, y = 0.15 + 0.7 * rng.random(), 0.12 + (shore - 0.3) * rng.random()
    radius = 0.05 + 0.08 * rng.random()
    pen = ImageDraw.Draw(picture, "RGBA")
    for factor, alpha in ((2.1, 40), (1.5, 70), (1.0, 255)):
        _ellipse(pen, picture.width, (x, y), radius * factor, (*palette.disc, alpha))


def _draw_distance(picture: Image.Image, palette: Palette, rng: np.random.Generator, shore: float) -> None:
    """One or two silhouettes behind the ground, paler the farther they are; the farthest may be mountains."""
    mountains = rng.random() < 0.5
    if mountains:
        _draw_mountains(picture, palette, rng, shore)
    else:
        _fill_below(picture, _rolling(rng, shore - 0.17, 0.07), palette.far)
    if rng.random() < 0.7:
        _fill_below(picture, _rolling(rng, shore - 0.06, 0.045), _mixed(palette.far, palette.near, 0.45))


def _draw_mountains(picture: Image.Image, palette: Palette, rng: np.random.Generator, shore: float) -> None:
    snow = _mixed(palette.far, _mixed(palette.disc, palette.horizon, 0.5), 0.7) if rng.random() < 0.5 else None
    pen, side = ImageDraw.Draw(picture), picture.width
    count = 2 + int(2 * rng.random())
    heights = 0.2 + 0.22 * rng.random(count)
    for slot in np.argsort(-heights):  # the highest stands behind the others
        x = (slot + 0.2 + 0.6 * rng.random()) / count
        height, spread = heights[slot], 0.9 + 0.5 * rng.random()
        top, left, right = (x, shore - height), (x - spread * height, shore), (x + spread * height, shore)
        colour = _mixed(palette.far, palette.horizon, 0.25 * (heights.max() - height) / 0.22)
        pen.polygon(_pixels([top, left, right], side), fill=colour)
        if snow is not None:
            cap = [top, _between(top, left, 0.32), _between(top, (x, shore), 0.2), _between(top, right, 0.32)]
            pen.polygon(_pixels(cap, side), fill=snow)
    pen.rectangle((0, round(shore * side), side, side), fill=palette.far)


def _draw_lake(picture: Image.Image, palette: Palette, shore: float) -> None:
    """Water from `shore` down, which mirrors what stands above it."""
    side = picture.width
    top = round(shore * side)
    mirrored = picture.crop((0, 2 * top - side, side, top)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    water = Image.new("RGB", mirrored.size, _mixed(palette.zenith, palette.far, 0.3))
    picture.paste(Image.blend(mirrored, water, 0.4), (0, top))


def _draw_foreground(picture: Image.Image, palette: Palette, rng: np.random.Generator, ground: Ridge) -> None:
    """Up to four trees of one kind and perhaps a house, each in its own fifth of the width."""
    places = [(place + 0.25 + 0.5 * rng.random()) / 5 for place in rng.random(5).argsort()]
    pen = ImageDraw.Draw(picture)
    if rng.random() < 0.3:
        _draw_house(pen, picture.width, palette, rng, _standing(ground, places.pop()))
    if rng.random() < 0.6:
        leaves = _mixed(palette.near, palette.far, 0.18 * rng.random())
        leaves = _mixed(leaves, (12, 28, 24), 0.35)
        tree = _draw_conifer if rng.random() < 0.5 else _draw_round_tree
        for place in places[: 1 + int(4 * rng.random())]:
            tree(pen, picture.width, _standing(ground, place), 0.2 + 0.16 * rng.random(), leaves)


def _draw_conifer(pen: ImageDraw.ImageDraw, side: int, foot: tuple[float, float], height: float, fill: Colour) -> None:
    x, y = foot
    pen.rectangle(_pixels([(x - 0.012, y - 0.2 * height), (x + 0.012, y)], side), fill=fill)
    for bottom, top, width in ((0.12, 0.7, 0.3), (0.45, 1.0, 0.22)):
        corners = [(x - width * height, y - bottom * height), (x, y - top * height)]
        corners.append((x + width * height, y - bottom * height))
        pen.polygon(_pixels(corners, side), fill=fill)


def _draw_round_tree(
    pen: ImageDraw.ImageDraw, side: int, foot: tuple[float, float], height: float, fill: Colour
) -> None:
    x, y = foot
    pen.rectangle(_pixels([(x - 0.013, y - 0.5 * height), (x + 0.013, y)], side), fill=fill)
    _ellipse(pen, side, (x, y - 0.65 * height), 0.35 * height, fill)


def _draw_house(
    pen: ImageDraw.ImageDraw, side: int, palette: Palette, rng: np.random.Generator, foot: tuple[float, float]
) -> None:
    x, y = foot
    half, wall = 0.07 + 0.03 * rng.random(), 0.1
    roof = _mixed(ROOFS[int(rng.random() * len(ROOFS))], palette.near, 0.3)
    pen.rectangle(_pixels([(x - half, y - wall), (x + half, y)], side), fill=_mixed(palette.horizon, palette.near, 0.3))
    eaves = [(x - 1.3 * half, y - wall), (x, y - wall - 0.09), (x + 1.3 * half, y - wall)]
    pen.polygon(_pixels(eaves, side), fill=roof)
    pen.rectangle(_pixels([(x - 0.022, y - 0.07), (x + 0.022, y - 0.025)], side), fill=palette.lamp)


def _rolling(rng: np.random.Generator, level: float, height: float) -> Ridge:
    """A smooth ridge around `level`: two sine waves, the longer one also the higher."""
    x = np.linspace(0, 1, 25)
    frequency, phase = 0.5 + rng.random(2) * (0.7, 1.2), rng.random(2) * 2 * np.pi
    waves = np.sin(2 * np.pi * frequency[0] * x + phase[0]) + 0.4 * np.sin(2 * np.pi * frequency[1] * x + phase[1])
    return np.stack([x, level - height * waves / 1.4], axis=1)


def _standing(ground: Ridge, x: float) -> tuple[float, float]:
    """The point of the ground at `x`, a little below its edge so that nothing floats."""
    return x, float(np.interp(x, ground[:, 0], ground[:, 1])) + 0.015


def _fill_below(picture: Image.Image, ridge: Ridge, colour: Colour) -> None:
    corners = np.concatenate([ridge, [[1.0, 1.1], [0.0, 1.1]]])
    ImageDraw.Draw(picture).polygon((corners * picture.width).ravel().tolist(), fill=colour)


def _ellipse(
    pen: ImageDraw.ImageDraw, side: int, centre: tuple[float, float], radius: float, fill: tuple[int, ...]
) -> None:
    x, y = centre
    pen.ellipse(_pixels([(x - radius, y - radius), (x + radius, y + radius)], side), fill=fill)


def _pixels(points: list[tuple[float, float]], side: int) -> list[tuple[float, float]]:
    return [(x * side, y * side) for x, y in points]


def _between(start: tuple[float, float], end: tuple[float, float], part: float) -> tuple[float, float]:
    return start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])


def _mixed(colour: Colour, other: Colour, part: float) -> Colour:
    """`colour` with `part` (0..1) of `other` in it."""
    return _clipped((1 - part) * np.asarray(colour) + part * np.asarray(other))


def _clipped(colour: np.ndarray) -> Colour:
    red, green, blue = np.clip(np.rint(colour), 0, 255).astype(int).tolist()
    return red, green, blue
