"""The way down a Brownian tree as programs have it: the same path, to rounding, as `neuralde.brownian.Tree`'s."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bisection import Noise, Piece, Sum, halved
from ..hashing import GOLDEN, ODD, mixed, traced_normals
from .programs import while_loop


class Bridge:
    """Traced: bound paths. How deep a time lies is known in the program alone: the levels are a loop in it.

    Args:
        keys: of the paths, [samples, channels]. scale: the root of a cell's length, with the paths' signs, [1 or
            samples, 1]. cell: its length, [groups]. levels: of bisection. See `brownian.Tree`.
    """

    def __init__(self, keys: Tensor, scale: Tensor, cell: Tensor, levels: int):
        self.keys, self.scale, self.cell, self.levels, self.dtype = keys, scale, cell, levels, scale.dtype

    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`: the noise between consecutive times, [points, groups]."""
        times, dtype = times.double() / self.cell, self.dtype
        ticks, part, depth, common = self._places(times)
        cells = ticks >> depth
        one, (w, h) = torch.ones((), dtype=dtype), self._cells(cells[:1])
        size, *found = self._down_together(ticks[:1], depth, common, w, h, one)
        together = common > 0
        w, h, size = (torch.where(together, new, old) for new, old in zip((*found, size), (w, h, one), strict=True))
        w, h = torch.cond((cells != cells[:1]).any(), self._in_other_cells, _in_one, (cells, w, h))
        found = self._down_apart(ticks, depth, common, w, h, size)
        # Times that the control chose are ends of last intervals.
        w, j = torch.cond((part != 0).any(), self._split, _whole, (ticks, depth, part, *found))
        span = times.diff(dim=0)[..., None].to(dtype)
        found = Sum(w, j, span).noise(span)
        return [Noise(noise.w * self.scale, noise.h * self.scale) for noise in found]

    # -- branches: what they hand back is memory of its own ------------------------------------------------------------

    def _in_other_cells(self, cells: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._cells(cells)

    def _split(self, ticks: Tensor, depth: Tensor, part: Tensor, w: Tensor, h: Tensor, size: Tensor, *sums):
        numbers, place = self._numbers(ticks, depth), part[..., None].to(self.dtype)
        before, after = Sum(*sums[:3]), Sum(*sums[3:])
        return _copied(_last(part, w, h, size).split(place, *numbers, before, after, _parted(ticks, self.dtype)))

    # -- the way -------------------------------------------------------------------------------------------------------

    def _places(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where times lie: as `Way` has it.

        Returns:
            The intervals of the last level that is needed, where in them the times lie, [points, groups]; that level,
            at least 1, and one before it at which all times of a group are in one interval.
        """
        scaled = times * 2.0**self.levels
        ticks = scaled.floor()
        part, ticks = scaled - ticks, ticks.to(torch.int64)
        lowest = torch.where(ticks == 0, 1 << self.levels, ticks & -ticks)
        zeros = lowest.double().log2().round().to(torch.int64).clamp(max=self.levels - 1).amin()
        depth = self.levels - torch.where((part != 0).any(), 0, zeros)
        ticks = ticks >> (self.levels - depth)
        # x has as many binary digits as log2(x + 1/2) says, rounded up.
        digits = ((ticks ^ ticks[:1]).double() + 0.5).log2().ceil().to(torch.int64).clamp(min=1).amax()
        return ticks, part, depth, (depth - digits).clamp(min=0)

    def _cells(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """W and H of cells."""
        x, y = self._numbers(nodes, None)
        return x, y / math.sqrt(12)

    def _numbers(self, nodes: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        """What halves the intervals of a level, or what the cells have where that is None: [points, samples, channels].

        Args:
            nodes: [points, groups].
        """
        counters = nodes * ODD if level is None else nodes * ODD + (level + 1) * GOLDEN
        return traced_normals(self.keys + mixed(counters)[..., None], self.dtype)

    # What a loop hands back without having been gone through is the memory that it was given, which Inductor uses
    # again: so these are gone through at least once.

    def _down_together(self, ticks: Tensor, depth: Tensor, common: Tensor, w: Tensor, h: Tensor, size: Tensor):
        """As long as all times are in one interval, one way does for them; what it finds if common is 0 has no use."""

        def more(level, *carried):
            return level < common.clamp(min=1)

        def down(level, size, w, h):
            half = 0.5 * size
            x, y = self._numbers(ticks >> (depth - level), level)
            w, h, _ = halved(w, h, x, y, self._sign(ticks, depth, level), half, beside=False)
            return level + 1, half, w, h

        _, *found = while_loop(more, down, (torch.zeros((), dtype=torch.int64), size.clone(), w.clone(), h.clone()))
        return found

    def _down_apart(self, ticks: Tensor, depth: Tensor, level: Tensor, w: Tensor, h: Tensor, size: Tensor):
        """Beside the ways lie the parts that are between the times: see `Way.noise`.

        Returns:
            W and H of the last intervals and their length, and the two sums of these parts.
        """

        def more(level, *carried):
            return level < depth

        def down(level, size, w, h, *sums):
            before, after = Sum(*sums[:3]), Sum(*sums[3:])
            nodes, half = ticks >> (depth - level), 0.5 * size
            x, y = self._numbers(nodes, level)
            sign = self._sign(ticks, depth, level)
            left, apart = 0.5 * (sign + 1.0), (nodes[1:] != nodes[:-1])[..., None].to(self.dtype)
            w, h, other = halved(w, h, x, y, sign, half)
            before = before.after(other.some(slice(None, -1)).sum(), apart * left[:-1])
            after = after.before(other.some(slice(1, None)).sum(), apart * (1.0 - left[1:]))
            return level + 1, half, w, h, *before, *after

        none, length = torch.zeros_like(w[1:]), torch.zeros_like(ticks[1:], dtype=self.dtype)[..., None]
        sums = none, none.clone(), length, none.clone(), none.clone(), length.clone()
        _, size, w, h, *sums = while_loop(more, down, (level.clone(), size.clone(), w.clone(), h.clone(), *sums))
        return w, h, size, *sums

    def _sign(self, ticks: Tensor, depth: Tensor, level: Tensor) -> Tensor:
        """+1 where the way goes left from a level, else -1, [points, groups, 1]."""
        return (1 - 2 * ((ticks >> (depth - level - 1)) & 1))[..., None].to(self.dtype)


def _in_one(cells: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.expand(len(cells), -1, -1).clone() for x in (w, h))


def _whole(ticks: Tensor, depth: Tensor, part: Tensor, w: Tensor, h: Tensor, size: Tensor, *sums):
    return _copied(_last(part, w, h, size).whole(Sum(*sums[:3]), Sum(*sums[3:]), _parted(ticks, w.dtype)))


def _copied(both: Sum) -> tuple[Tensor, Tensor]:
    return both.w.clone(), both.j.clone()


def _last(part: Tensor, w: Tensor, h: Tensor, size: Tensor) -> Piece:
    return Piece(w, h, size.expand(part.shape)[..., None])


def _parted(ticks: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether two consecutive times are in two intervals."""
    return (ticks[1:] != ticks[:-1])[..., None].to(dtype)
