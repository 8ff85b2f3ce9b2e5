"""The way down a tree of bisections to one time for all samples, with what the last steps had of it kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bisection import Noise, Piece
from .hashing import GOLDEN, ODD, mix, signed


class Known:
    """A tree with one time for all samples, that keeps the intervals on the last ways down: the next are short.

    The same numbers as a `Way`'s, up to rounding. Kept are the intervals whose parents reach into the last step, a few
    per level.

    Args:
        normals: see `_Way.noise`. levels: of bisection.
    """

    def __init__(self, normals: Callable[[Tensor], Tensor], levels: int):
        self.normals, self.levels = normals, levels
        self.kept: dict[tuple[int, int], Piece] = {}  # by level and place

    def between(self, start: float, end: float) -> Noise:
        """W and H between two times, in units of cells."""
        if end <= start:
            nothing = torch.zeros_like(self._interval(0, math.floor(start)).w)
            return Noise(nothing, nothing)
        for time in (start, end):
            self._descend(time)
        pieces: list[Piece] = []
        for cell in range(math.floor(start), math.ceil(end)):
            self._collect(0, cell, start, end, pieces)
        self.kept = {at: x for at, x in self.kept.items() if self._near(*at, start, end)}
        w, j = pieces[0].w, pieces[0].j
        for piece in pieces[1:]:
            j = j.add(torch.add(piece.h, piece.w, alpha=0.5).add_(w), alpha=float(piece.size))
            w = w + piece.w
        return Noise(w, (j / (end - start)).sub_(w, alpha=0.5))

    @staticmethod
    def _near(level: int, place: int, start: float, end: float) -> bool:
        level, place = max(level - 1, 0), place >> min(level, 1)
        return math.ldexp(place, -level) <= end and math.ldexp(place + 1, -level) > start

    def _descend(self, time: float):
        """Makes the intervals on the way to a time, with as many random numbers at once as are missing."""
        place, depth = math.floor(math.ldexp(time, self.levels)), 0
        if math.ldexp(place, -self.levels) == time:  # the end of an interval: no need to go deeper
            last = self.levels
            while last and not place & 1:
                place, last = place >> 1, last - 1
        else:
            last = self.levels
        while depth < last and (depth + 1, place >> (last - depth - 1)) in self.kept:
            depth += 1
        self._interval(0, place >> last)
        missing = [(level, place >> (last - level)) for level in range(depth, last)]
        if not missing:
            return
        first, second = self._numbers(missing)
        for (level, node), x, y in zip(missing, first, second, strict=True):
            halves = self.kept[level, node].halved(x, y)
            self.kept[level + 1, 2 * node], self.kept[level + 1, 2 * node + 1] = halves

    def _interval(self, level: int, place: int) -> Piece:
        if (level, place) not in self.kept:  # a cell
            first, second = self._numbers([(-1, place)])
            self.kept[level, place] = Piece(first[0], second[0] / math.sqrt(12), 1.0)
        return self.kept[level, place]

    def _numbers(self, nodes: list[tuple[int, int]]) -> Tensor:
        counters = [signed(place * ODD + (level + 1) * GOLDEN) for level, place in nodes]
        return self.normals(mix(torch.tensor(counters)))

    def _collect(self, level: int, place: int, start: float, end: float, pieces: list[Piece]):
        """The intervals that a step is made of, in their order."""
        low, high = math.ldexp(place, -level), math.ldexp(place + 1, -level)
        if end <= low or high <= start:
            return
        if start <= low and high <= end:
            pieces.append(self._interval(level, place))
        elif level == self.levels:
            pieces.append(self._part(place, low, high, start, end))
        else:
            for child in (2 * place, 2 * place + 1):
                self._collect(level + 1, child, start, end, pieces)

    def _part(self, place: int, low: float, high: float, start: float, end: float) -> Piece:
        """What a step has of a last interval, which a time inside of it divides."""
        whole = self._interval(self.levels, place)
        x, y = self._numbers([(self.levels, place)])

        def divided(time):
            part = torch.tensor((time - low) / (high - low), dtype=whole.w.dtype)
            return Piece(whole.w, whole.h, torch.tensor(whole.size, dtype=whole.w.dtype)).divided(part, x[0], y[0])

        if start <= low:
            return divided(end)[0]._replace(size=end - low)
        if end >= high:
            return divided(start)[1]._replace(size=high - start)
        first, second = divided(start)[0], divided(end)[0]  # two times in one last interval
        w, size = second.w - first.w, second.size - first.size
        return Piece(w, (second.j - first.j - first.w * size) / size - 0.5 * w, end - start)
