"""Pathfinder: grey images with two marked points; the label says whether one dashed curve connects them.

After Linsley et al. (arXiv 1805.08315) with the settings of the Long Range Arena (arXiv 2011.04006). Two curves of
`contour_length` dashes are grown side by side, then shorter distractors in the remaining space; discs mark the
beginning of one curve and the end of the same curve (label 1) or of the other (label 0).

A curve grows from pivot to pivot. The pivot moves by length + 2 margin along the last dash; the next dash ends at one of the
pixels around it at the distance r = length + margin, sampled with weight (1 - O) max(0, cos(min(c D, pi/2)))^2, with O
the occupancy dilated by the margin, D the change of direction and c the continuity. A dash that would touch existing
dashes is sampled again a few times, then its curve is restarted. Image number i depends only on (seed, i).

Two details differ from the published program. The newest dash of one target curve is already an obstacle to the other, so the
two never cross; and positions are rounded to the nearest pixel instead of up, so curves do not drift to one side.

Shape letters: R pixels per side, S pixels per side of a stamp, n candidate heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache, partial
from random import Random
from typing import Any

import numpy as np

from .parallel import map_blocks

DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a target curve

_FREE = 0.3  # a first dash may touch pixels whose occupancy is at most this
_COLLISION = 1.8  # a dash does not touch anything while occupancy plus its mask stays below this
_DEAD_END = 1e-4
_MAX_ATTEMPTS = 20_000  # pairs of target curves per image

Point = tuple[int, int]  # (row, column)


@dataclass(frozen=True)
class PathfinderSettings:
    """Geometry of the images, in pixels; the defaults are the 32 x 32 version, hard. See `pathfinder_settings`.

    Args:
        resolution: R, pixels per side.
        contour_length, distractor_length: dashes per curve.
        num_distractors: number of distractors to try; those without room are left out.
        dash_length, thickness: size of a dash, in pixels.
        margins: choices for the free space around dashes, in pixels; one is sampled per image.
        seed_distance: distance between the beginnings of the two target curves; the first is twice as far from the
            border.
        continuity: c, straightness of the curves.
        marker_radius: radius of the discs, in pixels.
        padding: width of the empty border, in pixels.
        antialias: multiple of the resolution at which lines are drawn before a Lanczos filter reduces them.
        contrast: brightness of the dashes relative to the markers, before both are clipped at white.
        dash_retrials, snake_retrials: number of retries for a dash and for a distractor.

    Raises:
        ValueError: a size is out of range, or the image is too small for `seed_distance`.
    """

    resolution: int = 32
    contour_length: int = 14
    distractor_length: int = 4
    num_distractors: int = 5
    dash_length: int = 2
    thickness: float = 0.5
    margins: tuple[int, ...] = (1,)
    seed_distance: int = 7
    continuity: float = 1.0
    marker_radius: float = 1.5
    padding: int = 1
    antialias: int = 2
    contrast: float = 1.5
    dash_retrials: int = 2
    snake_retrials: int = 4

    def __post_init__(self) -> None:
        for name in ("contour_length", "dash_length", "seed_distance", "antialias", "padding"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if not self.margins or min(self.margins) < 1:
            raise ValueError(f"`margins` must hold positive numbers of pixels; got {self.margins}.")
        if self.resolution <= 4 * self.seed_distance:
            raise ValueError(
                f"`resolution` {self.resolution} leaves no room for a first dash 2 x `seed_distance` = "
                f"{2 * self.seed_distance} pixels from every border."
            )


def pathfinder_settings(resolution: int = 32, difficulty: str = "hard") -> PathfinderSettings:
    """The settings of the Long Range Arena; 128 is Path-X.

    Args:
        resolution: 32, 64 or 128 pixels per side.
        difficulty: `"easy"`, `"intermediate"` or `"hard"` (used in papers): 6, 9 or 14 dashes.

    Raises:
        ValueError: another resolution or difficulty.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"`difficulty` must be one of {', '.join(DIFFICULTIES)}; got {difficulty!r}.")
    length = DIFFICULTIES[difficulty]
    curves: dict[str, Any] = {"contour_length": length, "distractor_length": length // 3}
    if resolution == 32:
        return PathfinderSettings(**curves, num_distractors=20 // (length // 3))
    sizes: dict[int, dict[str, Any]] = {
        64: {"seed_distance": 12, "marker_radius": 2.5, "thickness": 1.0, "contrast": 0.8, "margins": (1,)},
        128: {"seed_distance": 20, "marker_radius": 3.0, "thickness": 1.5, "contrast": 0.9, "margins": (2, 3)},
    }
    if resolution not in sizes:
        raise ValueError(f"`resolution` must be 32, 64 or 128; got {resolution}.")
    distractors = {64: 22, 128: 35}[resolution] // (length // 3)
    return PathfinderSettings(
        resolution, **curves, **sizes[resolution], num_distractors=distractors, dash_length=5, continuity=1.8
    )


@dataclass
class PathfinderScene:
    """One image and its construction.

    Attributes:
        image: (R, R) uint8.
        label: 1 if both markers lie on the same curve.
        markers: centres of the two discs.
        targets: the two curves, each a list of dashes (tail, head) from its beginning.
        distractors: the other curves.
    """

    image: np.ndarray
    label: int
    markers: tuple[Point, Point]
    targets: list[list[tuple[Point, Point]]]
    distractors: list[list[tuple[Point, Point]]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=32)
def _lanczos(radius: int, antialias: int) -> np.ndarray:
    """Matrix (2 radius + 1, fine points) that reduces a line of fine points, spaced 1 / antialias, to pixels."""
    pixels = np.arange(-radius, radius + 1)
    fine = np.arange(-radius * antialias, radius * antialias + 1) / antialias
    distance = fine - pixels[:, None]
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return weights / weights.sum(1, keepdims=True)


def _reduced(fine: np.ndarray, radius: int, antialias: int) -> np.ndarray:
    matrix = _lanczos(radius, antialias)
    return np.clip(matrix @ fine @ matrix.T, 0.0, 1.0)


def _fine_grid(radius: int, antialias: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.arange(-radius * antialias, radius * antialias + 1) / antialias
    return line[:, None], line[None, :]


def _disc(radius: float, antialias: int) -> np.ndarray:
    size = math.ceil(radius) + 1
    rows, columns = _fine_grid(size, antialias)
    return _reduced((rows**2 + columns**2 <= radius**2).astype(np.float64), size, antialias)


def _dash(angle: float, settings: PathfinderSettings, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Stamps (S, S) of a dash that starts at the centre: its brightness, and its shape dilated by the margin."""
    length, thickness = settings.dash_length, settings.thickness
    radius = length + math.ceil(thickness) + margin
    rows, columns = _fine_grid(radius, settings.antialias)
    # Rounding treats points on the edges equally in every direction, whatever the last digits of sine and cosine.
    along = np.round(rows * math.sin(angle) + columns * math.cos(angle), 6)
    across = np.round(rows * math.cos(angle) - columns * math.sin(angle), 6)
    line = (0 <= along) & (along <= length) & (-thickness / 2 <= across) & (across < thickness / 2)
    beyond = np.maximum(np.maximum(-along, along - length), 0.0)
    shape = beyond**2 + across**2 <= (margin + thickness / 2) ** 2
    brightness = settings.contrast * _reduced(line.astype(np.float64), radius, settings.antialias)
    return brightness.astype(np.float32), _reduced(shape.astype(np.float64), radius, settings.antialias).astype(
        np.float32
    )


def _offsets(distance: float, angles: np.ndarray) -> list[Point]:
    """Pixels nearest to the points at a distance in the given directions."""
    points = np.rint(distance * np.stack([np.sin(angles), np.cos(angles)], 1)).astype(int)
    return [(int(row), int(column)) for row, column in points]


class _Geometry:
    """Shared data of all curves of one setting: stamps, candidate heads, weights. Directions are numbered.

    The first 360 directions are whole degrees, for first dashes, which are drawn from their tail; the others are those from a
    pivot to its candidate heads, and their dashes are drawn from the head backwards.
    """

    num_first = 360

    def __init__(self, settings: PathfinderSettings, margin: int) -> None:
        self.settings, self.margin = settings, margin
        step = settings.dash_length + margin
        around = np.arange(math.ceil(2 * math.pi * step)) / step  # one candidate per pixel of arc
        self.heads = sorted(set(_offsets(step, around)))  # n
        towards = np.array([math.atan2(row, column) for row, column in self.heads])
        angles = np.concatenate([np.deg2rad(np.arange(-180, 180)), towards])
        self.drawn_angles = np.concatenate([angles[: self.num_first], towards + math.pi])
        turn = np.abs(angles[:, None] - towards[None, :])
        turn = np.minimum(turn, 2 * math.pi - turn)
        self.weights = (
            np.maximum(np.cos(np.minimum(settings.continuity * turn, math.pi / 2)), 0.0) ** 2
        )  # (360 + n, n)
        self.advance = _offsets(settings.dash_length + 2 * margin, angles)  # from pivot to pivot
        self.back = _offsets(margin, angles)  # from the first pivot to the first tail
        self.span = _offsets(settings.dash_length, self.drawn_angles)  # from where a dash is drawn to its other end
        self.radius = settings.dash_length + math.ceil(settings.thickness) + margin
        # A frame around the image, so that no stamp or candidate needs clipping: pivots lie less than 2 steps and a
        # margin outside.
        self.room = self.radius + 3 * (step + margin)
        self.width = settings.resolution + 2 * self.room
        line = range(-margin, margin + 1)
        near = [row * self.width + column for row in line for column in line if row**2 + column**2 <= margin**2]
        heads = np.array([row * self.width + column for row, column in self.heads])
        self.reach = (
            np.array(near)[:, None] + heads[None, :]
        )  # flat offsets (near, n): the pixels within the margin of a head
        self.marker = _disc(settings.marker_radius, settings.antialias).astype(np.float32)
        self._stamps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def stamp(self, direction: int) -> tuple[np.ndarray, np.ndarray]:
        """Brightness and mask of a dash."""
        if direction not in self._stamps:
            self._stamps[direction] = _dash(float(self.drawn_angles[direction]), self.settings, self.margin)
        return self._stamps[direction]


@lru_cache(maxsize=16)
def _geometry(settings: PathfinderSettings, margin: int) -> _Geometry:
    return _Geometry(settings, margin)


# ------------------------------------------------------------------------------------------------- growing


def _plus(point: Point, offset: Point) -> Point:
    return point[0] + offset[0], point[1] + offset[1]


def _minus(point: Point, offset: Point) -> Point:
    return point[0] - offset[0], point[1] - offset[1]


class _Snake:
    """A growing curve.

    Its newest dash is not an obstacle to its next one, which begins within its margin; so every curve keeps its own
    view of the occupancy.

    Args:
        geometry: sizes in the image.
        occupied: occupancy as this curve sees it, changed in place.
        tail: start of the first dash, in coordinates that include the frame around the image.
        direction: index of the direction of the first dash.
    """

    def __init__(self, geometry: _Geometry, occupied: np.ndarray, tail: Point, direction: int) -> None:
        self.geometry = geometry
        self.occupied = occupied
        self.direction = direction
        self.anchor = tail  # from where the newest dash is drawn
        self.pivot = _minus(tail, geometry.back[direction])
        self.dashes: list[tuple[Point, Point]] = [(tail, _plus(tail, geometry.span[direction]))]
        self.drawn = [(tail, direction)]

    def window(self, anchor: Point) -> tuple[slice, slice]:
        """Position of the stamp of a dash."""
        radius = self.geometry.radius
        return (slice(anchor[0] - radius, anchor[0] + radius + 1), slice(anchor[1] - radius, anchor[1] + radius + 1))

    def settle(self, occupied: np.ndarray) -> None:
        """Marks the newest dash as an obstacle in a view."""
        place, mask = self.window(self.anchor), self.geometry.stamp(self.direction)[1]
        np.maximum(occupied[place], mask, out=occupied[place])

    def extend(self, draw: Random, tries: int) -> bool:
        """Adds a dash; False if the curve cannot continue or every try collides."""
        geometry = self.geometry
        pivot = _plus(self.pivot, geometry.advance[self.direction])
        around = self.occupied.take(geometry.reach + (pivot[0] * geometry.width + pivot[1]))
        weights = (1.0 - np.maximum.reduce(around)) * geometry.weights[self.direction]
        cumulated = weights.cumsum()
        total = float(cumulated[-1])
        if total < _DEAD_END:
            return False
        for _ in range(tries):
            chosen = min(int(cumulated.searchsorted(draw.random() * total, side="right")), len(geometry.heads) - 1)
            direction = geometry.num_first + chosen
            head = _plus(pivot, geometry.heads[chosen])
            if (self.occupied[self.window(head)] + geometry.stamp(direction)[1]).max() < _COLLISION:
                self.settle(self.occupied)
                self.pivot, self.direction, self.anchor = pivot, direction, head
                self.dashes.append((_plus(head, geometry.span[direction]), head))
                self.drawn.append((head, direction))
                return True
        return False

    def draw_on(self, image: np.ndarray) -> None:
        """Draws the dashes into the image."""
        for anchor, direction in self.drawn:
            place, brightness = self.window(anchor), self.geometry.stamp(direction)[0]
            np.maximum(image[place], brightness, out=image[place])


def _empty(geometry: _Geometry, settings: PathfinderSettings) -> np.ndarray:
    """Occupancy of an empty image: the border and everything beyond it count as occupied."""
    occupied = np.ones((geometry.width, geometry.width), dtype=np.float32)
    inside = slice(geometry.room + settings.padding, geometry.room + settings.resolution - settings.padding)
    occupied[inside, inside] = 0.0
    return occupied


def _whole(draw: Random, low: int, high: int) -> int:
    """An integer in [low, high), from `random()`, the only method of `Random` stable across Python versions."""
    return low + int(draw.random() * (high - low))


def _grow_pair(draw: Random, geometry: _Geometry, settings: PathfinderSettings) -> list[_Snake] | None:
    """One attempt at the two target curves."""
    border = 2 * settings.seed_distance
    row, column = (geometry.room + _whole(draw, border, settings.resolution - border) for _ in range(2))
    away = _offsets(settings.seed_distance, np.deg2rad([_whole(draw, 0, 360)]))[0]
    tails = [(row, column), _plus((row, column), away)]
    views = [_empty(geometry, settings) for _ in tails]
    snakes = [_Snake(geometry, view, start, _whole(draw, 0, 360)) for view, start in zip(views, tails)]
    for snake, other in zip(snakes, reversed(views)):
        mask = geometry.stamp(snake.direction)[1]
        if (snake.occupied[snake.window(snake.anchor)] + mask).max() >= _COLLISION:
            return None
        snake.settle(other)
    for _ in range(settings.contour_length - 1):
        for snake, other in zip(snakes, reversed(views)):
            if not snake.extend(draw, settings.dash_retrials + 1):
                return None
            snake.settle(other)
    return snakes


def _grow_distractor(
    draw: Random, geometry: _Geometry, settings: PathfinderSettings, occupied: np.ndarray
) -> _Snake | None:
    """One attempt at a distractor; the view is not changed."""
    direction = _whole(draw, 0, geometry.num_first)
    mask = geometry.stamp(direction)[1] > 0.5
    low, high = geometry.room, geometry.room + settings.resolution
    taken = occupied > _FREE
    blocked = np.zeros((settings.resolution, settings.resolution), dtype=bool)
    for row, column in np.argwhere(mask) - geometry.radius:
        blocked |= taken[low + row : high + row, low + column : high + column]
    free = np.flatnonzero(~blocked)
    if free.size == 0:
        return None
    row, column = divmod(int(free[_whole(draw, 0, free.size)]), settings.resolution)
    snake = _Snake(geometry, occupied.copy(), (low + row, low + column), direction)
    for _ in range(settings.distractor_length - 1):
        if not snake.extend(draw, settings.dash_retrials + 1):
            return None
    snake.settle(snake.occupied)
    return snake


def draw_pathfinder(index: int, *, seed: int = 0, settings: PathfinderSettings | None = None) -> PathfinderScene:
    """Image number `index`, a function of (seed, index, settings).

    Raises:
        ValueError: the settings leave no room for two target curves.
    """
    settings = settings or PathfinderSettings()
    draw = Random(f"pathfinder {seed} {index}")
    label = _whole(draw, 0, 2)
    geometry = _geometry(settings, settings.margins[_whole(draw, 0, len(settings.margins))])
    for _ in range(_MAX_ATTEMPTS):
        targets = _grow_pair(draw, geometry, settings)
        if targets is not None:
            break
    else:
        raise ValueError(f"Two curves of {settings.contour_length} dashes do not fit into the image: {settings}.")
    occupied = np.maximum(targets[0].occupied, targets[1].occupied)
    for snake in targets:
        snake.settle(occupied)
    distractors = []
    for _ in range(settings.num_distractors):
        for _ in range(settings.snake_retrials + 1):
            distractor = _grow_distractor(draw, geometry, settings, occupied)
            if distractor is not None:
                occupied = distractor.occupied
                distractors.append(distractor)
                break
    image = np.zeros((geometry.width, geometry.width), dtype=np.float32)
    for snake in (*targets, *distractors):
        snake.draw_on(image)
    first = _whole(draw, 0, 2)
    markers = (targets[first].dashes[0][0], targets[first if label else 1 - first].dashes[-1][1])
    size = len(geometry.marker) // 2
    for row, column in markers:
        place = (slice(row - size, row + size + 1), slice(column - size, column + size + 1))
        np.maximum(image[place], geometry.marker, out=image[place])
    return _scene(image, label, markers, targets, distractors, geometry.room, settings.resolution)


def _scene(
    image: np.ndarray,
    label: int,
    markers: tuple[Point, Point],
    targets: list[_Snake],
    distractors: list[_Snake],
    room: int,
    resolution: int,
) -> PathfinderScene:
    """Crops the frame around the image and converts it to bytes."""
    inside = slice(room, room + resolution)
    pixels = np.rint(255 * np.minimum(image[inside, inside], 1.0)).astype(np.uint8)

    def moved(point: Point) -> Point:
        return _minus(point, (room, room))

    def curves(snakes: list[_Snake]) -> list[list[tuple[Point, Point]]]:
        return [[(moved(tail), moved(head)) for tail, head in snake.dashes] for snake in snakes]

    return PathfinderScene(pixels, label, (moved(markers[0]), moved(markers[1])), curves(targets), curves(distractors))


def _draw_block(indices: range, seed: int, settings: PathfinderSettings) -> tuple[np.ndarray, np.ndarray]:
    scenes = [draw_pathfinder(index, seed=seed, settings=settings) for index in indices]
    return np.stack([scene.image.ravel() for scene in scenes]), np.array([scene.label for scene in scenes])


def generate_pathfinder(
    count: int,
    *,
    seed: int = 0,
    settings: PathfinderSettings | None = None,
    num_processes: int = 1,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Images as pixel sequences, with their labels.

    Args:
        count: number of images.
        seed: seed of the images. The images of a larger `count` begin with those of a smaller one.
        settings: geometry; None for 32 x 32, hard.
        num_processes: see `map_blocks`; the images do not depend on it.
        progress: show a progress bar.

    Returns:
        pixels (count, R * R) uint8, row by row; labels (count,) int64, 0 or 1.

    Raises:
        ValueError: see `draw_pathfinder`.
    """
    settings = settings or PathfinderSettings()
    make = partial(_draw_block, seed=seed, settings=settings)
    options = {"num_processes": num_processes, "progress": progress, "description": "Pathfinder"}
    parts = list(map_blocks(make, range(count), block=16, **options))  # type: ignore[arg-type]
    if not parts:
        return np.zeros((0, settings.resolution**2), np.uint8), np.zeros(0, np.int64)
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])
