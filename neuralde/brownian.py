"""Brownian paths from a seed: a path of its own for every sample, at whatever times each of them asks, in O(1) memory.

A path is a binary tree of normal numbers that nobody stores. The number at a node is a hash of the seed, the sample,
the channel and the node, so that it can be asked for again, in any order, by whoever replays a step: a rejected attempt
and the shorter one after it see one path. Samples at different times go down the tree side by side.

On an interval of length h a path has an increment W ~ N(0, h) and, independent of it, a space-time Lévy area
H ~ N(0, h/12): with J the integral of the path over the interval, from its start, H = J/h - W/2.

Source: Foster, Lyons & Oberhauser, An optimal polynomial approximation of Brownian motion, SIAM J. Numer. Anal. 58
(2020); Jelinčič, Foster & Kidger, Single-seed generation of Brownian paths and integrals (2024).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LEVELS = {torch.float32: 24, torch.float64: 32}  # of bisection below a cell: float32 has no finer times
_MANY = 4096  # paths, for which a random number takes longer than the call that makes it
_PATHS = ("independent", "antithetic", "shared")


class Noise(NamedTuple):
    """What drives a step.

    Attributes:
        w: increments of the Brownian motions. h: their space-time Lévy areas. Both [samples, channels].
    """

    w: Tensor
    h: Tensor


class Paths(Protocol):
    """The Brownian paths of the samples of a solve."""

    def on(self, rows: Tensor | None) -> Paths:
        """Those of some of the samples; None for all."""

    def between(self, times: Tensor) -> list[Noise]:
        """The noise between consecutive times, [points, groups], ascending."""

    def fresh(self) -> Paths:
        """Other paths, independent of these."""


class BrownianTree:
    """Where the noise of a solve comes from: `solve(SDE(...), ..., brownian=BrownianTree(seed))`.

    A sample's path depends on the seed, its index in the batch, absolute time and the power of two above the length of
    its horizon; on nothing else: not on the other samples, the solver, the tolerances or the steps. A solve that goes
    on where an equally long one ended, with the same seed, has new noise.

    Args:
        seed: an integer, or None to draw one from torch's generator, for every solve anew.
        paths: "independent", a path for every sample; "antithetic", the second half of the batch has those of the first
            half with their signs changed; "shared", one path for all samples. Or [batch] integers, the path that each
            sample has: `paths=[17]` is sample 17's, alone.

    Raises:
        TypeError, ValueError: no such seed or paths.
    """

    def __init__(self, seed: int | None = None, paths: str | list[int] | Tensor = "independent"):
        if seed is not None and (not isinstance(seed, numbers.Integral) or isinstance(seed, bool)):
            raise TypeError(f"seed must be an integer or None, got {type(seed).__name__}")
        if isinstance(paths, str) and paths not in _PATHS:
            raise ValueError(f"paths must be one of {', '.join(map(repr, _PATHS))} or [batch] integers, got {paths!r}")
        if not isinstance(paths, str):
            paths = torch.as_tensor(paths)
            if paths.dim() != 1 or paths.is_floating_point() or paths.is_complex():
                raise ValueError(f"paths must be [batch] integers, got {paths.dtype} of shape {tuple(paths.shape)}")
        self.seed, self.paths = seed, paths

    def drawn(self) -> BrownianTree:
        """The same with a seed."""
        if self.seed is not None:
            return self
        tree = copy.copy(self)
        tree.seed = int(torch.randint(2**62, ()))
        return tree

    def bind(self, start: Tensor, span: Tensor, batch: int, channels: int, dtype: torch.dtype) -> Tree:
        """The paths of a solve.

        Args:
            start, span: t0 and t1 - t0, [groups].
            channels: Brownian motions of each sample. dtype: of the noise.

        Raises:
            ValueError: `paths` does not fit the batch.
        """
        index, sign = self._members(batch, start.device)
        seed = int(self.drawn().seed) % 2**64
        return Tree(seed, index, sign, _cell(span), channels, dtype, _LEVELS[start.dtype])

    def _members(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(which path each sample has, with which sign or None for +1), [batch]."""
        index = torch.arange(batch, device=device)
        if isinstance(self.paths, Tensor):
            if len(self.paths) != batch:
                raise ValueError(f"paths must have one entry per sample, {batch}, got {len(self.paths)}")
            return self.paths.to(device=device, dtype=torch.int64), None
        if self.paths == "shared":
            return torch.zeros_like(index), None
        if self.paths == "independent":
            return index, None
        if batch % 2:
            raise ValueError(f"paths='antithetic' needs an even number of samples, got {batch}")
        half = batch // 2
        return index % half, torch.where(index < half, 1.0, -1.0)

    def __repr__(self) -> str:
        paths = self.paths if isinstance(self.paths, str) else self.paths.tolist()
        return f"BrownianTree(seed={self.seed}, paths={paths!r})"


def _cell(span: Tensor) -> Tensor:
    """The least power of two that a horizon fits in, float64: scaling with it leaves times exact."""
    mantissa, exponent = torch.frexp(span.double().abs())
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))


def resolution(start: Tensor, span: Tensor) -> float:
    """The length of the last intervals of the trees that `bind` makes, the longest of all groups."""
    return float(_cell(span).max()) * 2.0 ** -_LEVELS[start.dtype]


class Tree:
    """Bound paths; see `BrownianTree` and `Paths`.

    Time is cut into cells as long as `cell`, on which the paths are independent, and a cell is bisected `levels` times.
    A time inside of the last interval splits it once more, at that time, which is exact as long as steps are longer
    than those intervals.

    Args:
        seed: which paths. index, sign: [batch], each sample's path and its sign (None: all +1).
        cell: [groups] float64. channels, dtype: of the noise. levels: of bisection.
    """

    def __init__(
        self,
        seed: int,
        index: Tensor,
        sign: Tensor | None,
        cell: Tensor,
        channels: int,
        dtype: torch.dtype,
        levels: int,
    ):
        self.seed, self.index, self.channels, self.levels = seed, index, channels, levels
        self.cell, self.scale = cell, cell.sqrt().to(dtype)[:, None]
        self.sign = None if sign is None else sign.to(dtype)[:, None]
        self.dtype = dtype
        motion = torch.arange(channels, device=index.device) * _GOLDEN
        start = _mix(torch.tensor(_signed(seed), device=index.device))
        self.keys = _mix(_mix(index * _GOLDEN + start)[:, None] + motion)
        self._known: _Known | None = None

    def on(self, rows: Tensor | None) -> Tree:
        """See `Paths.on`."""
        if rows is None:
            return self
        part = copy.copy(self)
        part.index, part.keys = self.index[rows], self.keys[rows]
        part.sign = None if self.sign is None else self.sign[rows]
        if len(self.cell) > 1:
            part.cell, part.scale = self.cell[rows], self.scale[rows]
        return part

    def fresh(self) -> Tree:
        """See `Paths.fresh`."""
        seed = int(_mix(torch.tensor(_signed(self.seed ^ 0x5DEECE66D))))
        return Tree(seed, self.index, self.sign, self.cell, self.channels, self.dtype, self.levels)

    @torch.no_grad()
    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`."""
        times = times.double() / self.cell
        normals = functools.partial(_normals, self.keys, self.dtype)
        if times.shape[1] == 1 and len(times) <= 3 and times.device.type == "cpu" and self.keys.numel() >= _MANY:
            # One step for all samples: the next one's way begins where this one's ends.
            self._known = self._known or _Known(normals, self.levels)
            points = times[:, 0].tolist()
            found = [self._known.between(start, end) for start, end in itertools.pairwise(points)]
        else:
            found = _Way(times, self.levels).noise(normals, self.dtype)
        scale = self.scale if self.sign is None else self.scale * self.sign
        return [Noise(w * scale, h * scale) for w, h in found]


class _Way:
    """The ways down the tree to some times, in units of cells: everything that does not depend on the path.

    Args:
        times: [points, groups] float64. levels: of bisection.
    """

    def __init__(self, times: Tensor, levels: int):
        self.times = times
        scaled = times * 2.0**levels
        ticks = scaled.floor()
        self.rest = scaled - ticks  # where in its last interval a time lies, [0, 1)
        ticks = ticks.to(torch.int64)
        self.split = True
        if times.device.type == "cpu":  # elsewhere, to look would be to wait
            # Times with few binary digits are ends of intervals, and the way to them is short.
            self.split = bool(self.rest.any())
            if not self.split:
                digits = torch.where(ticks == 0, 1 << levels, ticks & -ticks)
                shift = min(int(digits.min()).bit_length() - 1, levels)
                ticks, levels = ticks >> shift, levels - shift
        self.levels = levels
        down = torch.arange(levels, -1, -1, device=times.device)[:, None, None]
        self.nodes = ticks >> down  # the interval of level l that each time lies in, [levels + 1, points, groups]
        self.left = (self.nodes[1:] & 1) == 0
        # Consecutive times go down together, and part at some level.
        self.apart = self.nodes[:, 1:] != self.nodes[:, :-1]

    def counters(self) -> Tensor:
        """The numbers that the tree is asked for: of the cell, of every interval that is halved, of the last one."""
        parts = [self.nodes[:1], self.nodes[:-1]]
        if self.split:
            parts.append(self.nodes[-1:])
        nodes = torch.cat(parts)
        level = torch.arange(len(nodes), device=nodes.device)[:, None, None]
        return _mix(nodes * _ODD + level * _GOLDEN)

    def noise(self, normals: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Noise]:
        """W and H between consecutive times, in units of cells.

        Args:
            normals: counters [..., groups] -> two independent standard normal tensors [..., samples, channels].
        """
        first, second = normals(self.counters())
        halves = 2.0 ** (-0.5 * torch.arange(self.levels, device=first.device, dtype=dtype))[:, None, None, None]
        sign = torch.where(self.left, 1.0, -1.0).to(dtype)[..., None]
        count = self.levels + 1
        # Halving an interval: W' = W/2 ± (3H/2 + Z), H' = H/4 - Z/2 ± N/2, with Z ~ N(0, h/16), N ~ N(0, h/12).
        z = first[1:count] * (halves / 4)
        n = second[1:count] * (halves * (0.5 / math.sqrt(12))) * sign
        signed, mine, other = z * sign, n - 0.5 * z, -n - 0.5 * z
        w, h = first[0], second[0] / math.sqrt(12)
        beside_w, beside_h = torch.empty_like(z), torch.empty_like(z)  # the halves that the ways leave beside them
        for level in range(self.levels):
            half = torch.add(signed[level], w, alpha=0.5).addcmul_(sign[level], h, value=1.5)
            torch.sub(w, half, out=beside_w[level])
            torch.add(other[level], h, alpha=0.25, out=beside_h[level])
            w, h = half, torch.add(mine[level], h, alpha=0.25)
        last = _Piece(w, h, torch.full_like(self.rest, 2.0**-self.levels).to(dtype)[..., None])
        if not self.split:
            return self._collect(beside_w, beside_h, last.none(), last)
        before, after = last.divided(self.rest.to(dtype)[..., None], first[-1], second[-1])
        return self._collect(beside_w, beside_h, before, after)

    def _collect(self, beside_w: Tensor, beside_h: Tensor, before: _Piece, after: _Piece) -> list[Noise]:
        """Puts the intervals between two times together; nothing is a difference of larger things.

        Two times part at the middle of the interval that they last have in common. From the first to there lie the
        rest of its last interval and the right halves beside its way; from there to the second the left ones beside
        that one's way, and the beginning of its last interval.

        Args:
            beside_w, beside_h: [levels, points, samples, channels]. before, after: the parts of every time's last
                interval before and after it, [points, ...].
        """
        dtype, levels = beside_w.dtype, torch.arange(1, self.levels + 1, device=beside_w.device)
        length = (2.0 ** -levels.double()).to(dtype)[:, None, None, None]
        beside_j = beside_h + 0.5 * beside_w
        parted = self.apart[-1, :, :, None].to(dtype)

        right = (self.apart[:-1] & self.left[:, :-1])[..., None].to(dtype)
        w, size = beside_w[:, :-1] * right, length * right
        here = after.some(slice(None, -1)).times(parted)
        deeper = here.w + w.flip(0).cumsum(0).flip(0) - w  # what lies before each of them
        one = _Sum(here.w + w.sum(0), here.j + (size * (beside_j[:, :-1] + deeper)).sum(0), here.size + size.sum(0))

        left = (self.apart[:-1] & ~self.left[:, 1:])[..., None].to(dtype)
        w, size = beside_w[:, 1:] * left, length * left
        two = _Sum(w.sum(0), (size * (beside_j[:, 1:] + w.cumsum(0) - w)).sum(0), size.sum(0))
        there = before.some(slice(1, None)).times(parted)
        both = one.then(two).then(_Sum(there.w, there.j, there.size))
        if self.split:
            both = both.or_within(before.some(slice(None, -1)), before.some(slice(1, None)), parted)
        span = self.times.diff(dim=0)[..., None].to(dtype)
        area = torch.where(span == 0, 0.0, both.j / torch.where(span == 0, 1.0, span) - 0.5 * both.w)
        return [Noise(w, h) for w, h in zip(both.w, area, strict=True)]


class _Sum(NamedTuple):
    """A path on an interval: its increment, its integral from the start, and the interval's length."""

    w: Tensor
    j: Tensor
    size: Tensor

    def then(self, other: _Sum) -> _Sum:
        """With the interval that follows."""
        return _Sum(self.w + other.w, self.j + self.w * other.size + other.j, self.size + other.size)

    def or_within(self, first: _Piece, second: _Piece, parted: Tensor) -> _Sum:
        """Where two times lie in one last interval: the difference of what lies before them."""
        w, size = second.w - first.w, second.size - first.size
        inside = _Sum(w, second.j - first.j - first.w * size, size)
        return _Sum(*(torch.where(parted > 0, x, y) for x, y in zip(self, inside, strict=True)))


class _Piece(NamedTuple):
    """A path on an interval: W, H and the length."""

    w: Tensor
    h: Tensor
    size: Tensor

    @property
    def j(self) -> Tensor:
        return self.size * (self.h + 0.5 * self.w)

    def some(self, points: slice) -> _Piece:
        return _Piece(self.w[points], self.h[points], self.size[points])

    def times(self, factor: Tensor) -> _Piece:
        return _Piece(self.w * factor, self.h * factor, self.size * factor)

    def none(self) -> _Piece:
        return self.times(torch.zeros_like(self.size))

    def halved(self, x: Tensor, y: Tensor) -> tuple[_Piece, _Piece]:
        """Its halves; x and y are standard normal. See `_Way.noise`."""
        z, n = x * (0.25 * math.sqrt(self.size)), y * (math.sqrt(self.size / 48))
        w = torch.add(z, self.w, alpha=0.5).add_(self.h, alpha=1.5)
        middle = torch.sub(0.25 * self.h, z, alpha=0.5)
        half = 0.5 * self.size
        return _Piece(w, middle + n, half), _Piece(self.w - w, middle.sub_(n), half)

    def divided(self, part: Tensor, x: Tensor, y: Tensor) -> tuple[_Piece, _Piece]:
        """The parts before and after a point inside.

        With a and b = 1 - a the parts, the pair (W, H) of the whole is two of four orthonormal combinations of W and H
        of the parts; x and y, standard normal, are the other two.
        """
        root = self.size.sqrt()
        a, b = part, 1 - part
        p = (3 * a * b).sqrt()
        q = (1 - 3 * a * b).sqrt()
        bend = self.h * (math.sqrt(12) / root)
        across = p * bend + q * x
        w = a * self.w + root * (a * b).sqrt() * across
        along = bend - p / q * x
        before = root * (a / 12).sqrt() * (a**1.5 * along + b**1.5 / q * y)
        after = root * (b / 12).sqrt() * (b**1.5 * along - a**1.5 / q * y)
        return _Piece(w, before, a * self.size), _Piece(self.w - w, after, b * self.size)


class _Known:
    """A tree with one time for all samples, that keeps the intervals on the last ways down: the next are short.

    The same numbers as a `_Way`'s, up to rounding. Kept are the intervals whose parents reach into the last step, a few
    per level.

    Args:
        normals: see `_Way.noise`. levels: of bisection.
    """

    def __init__(self, normals: Callable[[Tensor], tuple[Tensor, Tensor]], levels: int):
        self.normals, self.levels = normals, levels
        self.kept: dict[tuple[int, int], _Piece] = {}  # by level and place

    def between(self, start: float, end: float) -> Noise:
        """W and H between two times, in units of cells."""
        if end <= start:
            nothing = torch.zeros_like(self._interval(0, math.floor(start)).w)
            return Noise(nothing, nothing)
        for time in (start, end):
            self._descend(time)
        pieces: list[_Piece] = []
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

    def _interval(self, level: int, place: int) -> _Piece:
        if (level, place) not in self.kept:  # a cell
            first, second = self._numbers([(-1, place)])
            self.kept[level, place] = _Piece(first[0], second[0] / math.sqrt(12), 1.0)
        return self.kept[level, place]

    def _numbers(self, nodes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        counters = [_signed(place * _ODD + (level + 1) * _GOLDEN) for level, place in nodes]
        return self.normals(_mix(torch.tensor(counters))[:, None])

    def _collect(self, level: int, place: int, start: float, end: float, pieces: list[_Piece]):
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

    def _part(self, place: int, low: float, high: float, start: float, end: float) -> _Piece:
        """What a step has of a last interval, which a time inside of it divides."""
        whole = self._interval(self.levels, place)
        x, y = self._numbers([(self.levels, place)])

        def divided(time):
            part = torch.tensor((time - low) / (high - low), dtype=whole.w.dtype)
            return _Piece(whole.w, whole.h, torch.tensor(whole.size, dtype=whole.w.dtype)).divided(part, x[0], y[0])

        if start <= low:
            return divided(end)[0]._replace(size=end - low)
        if end >= high:
            return divided(start)[1]._replace(size=high - start)
        first, second = divided(start)[0], divided(end)[0]  # two times in one last interval
        w, size = second.w - first.w, second.size - first.size
        return _Piece(w, (second.j - first.j - first.w * size) / size - 0.5 * w, end - start)


# -- random numbers ----------------------------------------------------------------------------------------------------


def _signed(x: int) -> int:
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _ODD = _signed(0x9E3779B97F4A7C15), _signed(0xD1342543DE82EF95)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose every output bit depends on every input bit.

    Source: Evensen 2020, "moremur", with the form of Stafford's and SplitMix64's finalizers.
    """
    x, moved = x.clone(), torch.empty_like(x)
    for shift, factor in ((27, 0x3C79AC492BA7B653), (33, 0x1C69B3F74AC4AE35), (27, None)):
        torch.bitwise_right_shift(x, shift, out=moved)
        x ^= moved.bitwise_and_(2 ** (64 - shift) - 1)  # a logical shift: torch's keeps the sign
        if factor is not None:
            x *= _signed(factor)
    return x


def _normals(keys: Tensor, dtype: torch.dtype, counters: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers for every counter and key, by the Box-Muller transform.

    Args:
        keys: [samples, channels]. counters: [..., samples or 1].
    """
    bits = _mix(keys + counters[..., None])
    angle = (bits & 0xFFFFFFFF).to(dtype).mul_(2.0 * math.pi * 2.0**-32)
    high = bits.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).to(dtype)
    radius = high.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    return radius * torch.cos(angle), radius * angle.sin_()


# -- torchsde's --------------------------------------------------------------------------------------------------------


class Foreign:
    """A Brownian object of torchsde's as bound paths: it answers for the whole batch at one time.

    Args:
        brownian: such as a BrownianInterval.
    """

    def __init__(self, brownian):
        self.brownian = brownian

    def on(self, rows: Tensor | None) -> Foreign:
        """See `Paths.on`."""
        if rows is not None:
            raise ValueError("a Brownian object of torchsde's has the noise of the whole batch only")
        return self

    def fresh(self) -> Paths:
        """See `Paths.fresh`."""
        shape, dtype = self.brownian.shape, self.brownian.dtype
        times = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return BrownianTree().bind(times, times, shape[0], shape[1], dtype)

    @torch.no_grad()
    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`."""
        points = [float(x) for x in times[:, 0]]
        found = []
        for start, end in itertools.pairwise(points):
            if self.brownian.levy_area_approximation == "none":
                w = self.brownian(start, end)
                found.append(Noise(w, torch.full_like(w, math.nan)))
                continue
            w, u = self.brownian(start, end, return_U=True)
            found.append(Noise(w, u / (end - start) - 0.5 * w if end > start else torch.zeros_like(w)))
        return found
