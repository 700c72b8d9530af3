"""A training's loss as a picture: SVG, which browsers show, written from the log without a library."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 400, 60, 40, 20
# A training of a million steps is a picture of as many points as it has pixels.
MOST_POINTS = 400
LEARNED, JUDGED = "#8ab", "#c33"


class Point(NamedTuple):
    step: float
    loss: float


def loss_curve(log: Iterable[Mapping[str, Any]]) -> str:
    """The losses of a training's log, those of steps and those of evaluations; text of an SVG file."""
    points: dict[bool, list[Point]] = {False: [], True: []}
    for record in log:
        step, loss = record.get("step"), record.get("loss")
        if isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss):
            points[record.get("evaluation") is True].append(Point(step, loss))
    learned, judged = _thinned(points[False]), points[True]
    frame = _Frame(
        [*learned, *judged], max((point.step for each in points.values() for point in each), default=1)
    )
    body = [*frame.axes(), frame.line(learned, LEARNED), frame.line(judged, JUDGED), *frame.dots(judged)]
    body += [_legend(0, LEARNED, "learned from"), _legend(1, JUDGED, "kept for judging")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>", ""])


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, where there are more than can be seen."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[begin : begin + size] for begin in range(0, len(points), size or 1)]
    return [Point(*(sum(values) / len(group) for values in zip(*group, strict=True))) for group in groups]


class _Frame:
    """Axes around some points up to a last step, and where a point stands in the picture."""

    def __init__(self, points: Sequence[Point], last: float) -> None:
        self._last = last
        top = max((point.loss for point in points), default=1)
        self._tick = _round_number(top / 5)
        self._top = self._tick * max(1, math.ceil(top / self._tick))

    def at(self, point: Point) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - MARGIN) * point.step / self._last
        return x, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - MARGIN) * point.loss / self._top

    def axes(self) -> list[str]:
        lines = []
        for number in range(round(self._top / self._tick) + 1):
            loss = number * self._tick
            _, y = self.at(Point(0, loss))
            lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
            lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
        for step in sorted({0, self._last // 2, self._last}):
            x, y = self.at(Point(step, 0))
            lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{step:g}</text>')
        middle = (LEFT + WIDTH - MARGIN) / 2
        return [*lines, f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">step</text>']

    def line(self, points: Sequence[Point], colour: str) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*self.at(point)) for point in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    def dots(self, points: Sequence[Point]) -> list[str]:
        centres = [self.at(point) for point in points]
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{JUDGED}"/>' for x, y in centres]


def _legend(number: int, colour: str, text: str) -> str:
    y = MARGIN + 14 + 18 * number
    return f'<text x="{WIDTH - MARGIN - 8}" y="{y}" text-anchor="end" fill="{colour}">{text}</text>'


def _round_number(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((factor * power for factor in (1, 2, 5) if factor * power >= value), 10 * power)
