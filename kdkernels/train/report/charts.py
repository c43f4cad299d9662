# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: text stays text, and colours follow the page's light or dark theme.

Classes of the style sheet (``s0`` to ``s7`` for series) give all colours; coordinates are those of
a view box that the page scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from typing import Literal

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = 8  # of the style sheet
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
# Points are marked, with their value to hover over, where there are no more of them.
MARKED = 30
Points = Sequence[tuple[float, float]]
_clips = count()


def series(index: int) -> str:
    """The class of a series' colour."""
    return f"s{index % COLOURS}"


class Chart:
    """A frame with axes around all ``points``, to draw lines, bands and marks into."""

    def __init__(
        self,
        points: Iterable[tuple[float, float]],
        *,
        x: str,
        y: str,
        size: tuple[int, int] = (360, 230),
        log: bool = False,
        ticks: Literal["whole", "any", "none"] = "whole",
        limits: tuple[float, float] | None = None,
    ) -> None:
        """``log`` and ``limits`` are of y; ``ticks`` are the numbers at x."""
        points = [p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not log)]
        self.log = log and bool(points)
        self.width, self.height = size
        self.clip = f"clip{next(_clips)}"
        xs, ys = zip(*points, strict=True) if points else ((0, 1), (0, 1))
        self.x_low, self.x_high = _widened(min(xs), max(xs), 0)
        y_low, y_high = limits or (min(ys), max(ys))
        if self.log:
            y_low, y_high = math.log10(y_low), math.log10(y_high)
        self.y_low, self.y_high = _widened(y_low, y_high, 0 if limits else 0.06)
        self.parts = [
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(y)} by {escape(x)}">',
            f'<clipPath id="{self.clip}"><rect x="{LEFT}" y="{TOP - 4}" '
            f'width="{self.width - LEFT - RIGHT + 4}" '
            f'height="{self.height - TOP - BOTTOM + 8}"/></clipPath>',
        ]
        self._axes(x, y, ticks)

    def line(self, points: Points, style: str, name: str, *, marks: bool = True) -> None:
        """A line through points, each to hover over if they are few."""
        at = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in self._shown(points))
        self.parts.append(
            f'<polyline class="line {style}" clip-path="url(#{self.clip})" points="{at}">'
            f"<title>{escape(name)}</title></polyline>"
        )
        if marks and len(points) <= MARKED:
            self.dots(points, style, name, radius=2)

    def band(self, points: Sequence[tuple[float, float, float]], style: str) -> None:
        """The area between (x, low) and (x, high)."""
        lows = self._shown([(x, low) for x, low, _ in points])
        highs = self._shown([(x, high) for x, _, high in points])
        at = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in [*lows, *reversed(highs)])
        self.parts.append(
            f'<polygon class="band {style}" clip-path="url(#{self.clip})" points="{at}"/>'
        )

    def dots(self, points: Points, style: str, name: str, *, radius: float = 3.5) -> None:
        """A mark at each point."""
        for x, y in self._shown(points):
            self.parts.append(
                f'<circle class="dot {style}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" '
                f'r="{radius}"><title>{escape(name)}: {_text(y)} at {_text(x)}</title></circle>'
            )

    def bar(self, x: float, width: float, y: float, title: str) -> None:
        """A bar from the ground to y, from x on."""
        left, right, top = self._x(x), self._x(x + width), self._y(y)
        self.parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{self.height - BOTTOM - top:.1f}"><title>{escape(title)}</title></rect>'
        )

    def level(self, x: float, width: float, y: float) -> None:
        """A short line at y, from x on."""
        at = f'x1="{self._x(x):.1f}" x2="{self._x(x + width):.1f}"'
        self.parts.append(f'<line class="level" {at} y1="{self._y(y):.1f}" y2="{self._y(y):.1f}"/>')

    def svg(self) -> str:
        """The chart."""
        return "".join([*self.parts, "</svg>"])

    def _shown(self, points: Points) -> list[tuple[float, float]]:
        return [
            (x, y)
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not self.log)
        ]

    def _x(self, x: float) -> float:
        share = (x - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def _y(self, y: float) -> float:
        y = math.log10(y) if self.log else y
        share = (y - self.y_low) / (self.y_high - self.y_low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def _axes(self, x: str, y: str, ticks: str) -> None:
        base, right = self.height - BOTTOM, self.width - RIGHT
        ticks_of_y = self._y_ticks()
        for tick, text in zip(ticks_of_y, _texts(ticks_of_y), strict=True):
            at = self._y(tick)
            self.parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text class="tick end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{text}</text>'
            )
        numbers = [] if ticks == "none" else _ticks(self.x_low, self.x_high, ticks == "whole")
        for tick in numbers:
            at = self._x(tick)
            self.parts.append(
                f'<text class="tick middle" x="{at:.1f}" y="{base + 14}">{_text(tick)}</text>'
            )
        self.parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>'
            f'<text class="tick middle" x="{(LEFT + right) / 2}" y="{self.height - 4}">'
            f"{escape(x)}</text>"
        )

    def _y_ticks(self) -> list[float]:
        if not self.log:
            return _ticks(self.y_low, self.y_high, False)
        low, high = 10**self.y_low, 10**self.y_high
        for subs in ((1.0,), (1.0, 2.0, 5.0)):
            ticks = [t for t in LogLocator(subs=subs).tick_values(low, high) if low <= t <= high]
            if len(ticks) > 2:
                return ticks
        return [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]


def strip(values: Sequence[float], low: float, high: float, style: str, name: str) -> str:
    """Values as dots on a scale from ``low`` to ``high``, with a bar at their mean: for a table."""
    width, height = 130, 18

    def at(value: float) -> float:
        return 6 + (width - 12) * ((value - low) / (high - low) if high > low else 0.5)

    mean = at(sum(values) / len(values))
    dots = "".join(
        f'<circle class="dot {style}" cx="{at(value):.1f}" cy="{height / 2}" r="3.5">'
        f"<title>{escape(name)}: {value:.4g}</title></circle>"
        for value in values
    )
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height / 2}" y2="{height / 2}"/>'
        f'<line class="line {style}" x1="{mean:.1f}" x2="{mean:.1f}" y1="1" y2="{height - 1}"/>'
        f"{dots}</svg>"
    )


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _texts(ticks: Sequence[float]) -> list[str]:
    """As many digits as tell them apart."""
    for digits in range(4, 16):
        texts = [_text(tick) if digits == 4 else f"{tick:.{digits}g}" for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    locator = MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10])
    slack = 1e-9 * (high - low)
    return [t for t in locator.tick_values(low, high) if low - slack <= t <= high + slack]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        return low - 0.5, high + 0.5
    margin = share * (high - low)
    return low - margin, high + margin


def mean_and_range(lines: Sequence[Points]) -> tuple[Points, list[tuple[float, float, float]]]:
    """Of several lines: the mean, and the least and greatest value, at every x that one has."""
    at: dict[float, list[float]] = {}
    for line in lines:
        for x, y in line:
            at.setdefault(x, []).append(y)
    mean = [(x, float(np.mean(ys))) for x, ys in sorted(at.items())]
    return mean, [(x, min(ys), max(ys)) for x, ys in sorted(at.items())]
