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
import itertools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LEVELS = {torch.float32: 24, torch.float64: 32}  # of bisection below a cell: float32 has no finer times
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
        self._known: list[tuple[Tensor, Tensor]] = []  # of the last point: counters and numbers, level by level
        self._part: tuple[Tensor, Tree] | None = None

    def on(self, rows: Tensor | None) -> Tree:
        """See `Paths.on`."""
        if rows is None:
            return self
        if self._part is not None and self._part[0] is rows:
            return self._part[1]
        part = copy.copy(self)
        part._known, part._part = [], None
        part.index, part.keys = self.index[rows], self.keys[rows]
        part.sign = None if self.sign is None else self.sign[rows]
        if len(self.cell) > 1:
            part.cell, part.scale = self.cell[rows], self.scale[rows]
        self._part = rows, part
        return part

    def fresh(self) -> Tree:
        """See `Paths.fresh`."""
        seed = int(_mix(torch.tensor(_signed(self.seed ^ 0x5DEECE66D))))
        return Tree(seed, self.index, self.sign, self.cell, self.channels, self.dtype, self.levels)

    @torch.no_grad()
    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`."""
        way = _Way(times.double() / self.cell, self.levels)
        found = way.noise(self._normals, self.dtype)
        scale = self.scale if self.sign is None else self.scale * self.sign
        return [Noise(w * scale, h * scale) for w, h in found]

    def _normals(self, counters: Tensor) -> list[list[Tensor]]:
        """Pairs of standard normal numbers by point and by number, each [2, samples, channels].

        Those of the last point are known where this one's way down is the same: a step begins where the one before it
        ended, and ends nearby.

        Args:
            counters: [numbers, points, groups].
        """
        found = []
        for point in counters.unbind(1):
            values = []
            for number, counter in enumerate(point.unbind(0)):
                known = self._known[number] if number < len(self._known) else None
                values.append(self._number(counter, known))
            self._known = list(zip(point.unbind(0), values, strict=True))
            found.append(values)
        return found

    def _number(self, counter: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
        """The pairs of one counter for each group, [2, samples, channels], of which some may be known."""
        if known is None or counter.device.type != "cpu":  # elsewhere, to look would be to wait
            return _normals(self.keys + counter[:, None], self.dtype)
        new = (counter != known[0]).nonzero().flatten()
        if not len(new):
            return known[1]
        if len(new) == len(counter):
            return _normals(self.keys + counter[:, None], self.dtype)
        made = _normals(self.keys.index_select(0, new) + counter[new][:, None], self.dtype)
        return known[1].index_copy(1, new, made)


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
        self.beside = self.apart.flatten(1).any(dim=1).tolist() if times.device.type == "cpu" else [True] * (levels + 1)

    def counters(self) -> Tensor:
        """The numbers that the tree is asked for: of the cell, of every interval that is halved, of the last one."""
        parts = [self.nodes[:1], self.nodes[:-1]]
        if self.split:
            parts.append(self.nodes[-1:])
        nodes = torch.cat(parts)
        level = torch.arange(len(nodes), device=nodes.device)[:, None, None]
        return _mix(nodes * _ODD + level * _GOLDEN)

    def noise(self, normals: Callable[[Tensor], list[list[Tensor]]], dtype: torch.dtype) -> list[Noise]:
        """W and H between consecutive times, in units of cells.

        Level by level, since what all levels are together would not stay in the cache. Nothing is a difference of
        larger things: two times part in the middle of the interval that they last have in common. From the first to
        there lie the rest of its last interval and the right halves beside its way; from there to the second the left
        ones beside that one's way, and the beginning of its last interval.

        Args:
            normals: counters [numbers, points, groups] -> pairs of independent standard normal numbers, [2, samples,
                channels] each, by point and by number.
        """
        pairs = normals(self.counters())
        numbers = [torch.stack(x, dim=1) for x in zip(*pairs, strict=True)]  # [2, points, samples, channels] each
        left = self.left[..., None].to(dtype)
        sign = 2.0 * left - 1.0
        parted = self.apart[..., None].to(dtype)
        right_of_first, left_of_second = parted[:-1] * left[:, :-1], parted[:-1] * (1.0 - left[:, 1:])
        w, h = numbers[0][0], numbers[0][1] / math.sqrt(12)
        one = _Sum(*(torch.zeros_like(w[1:]) for _ in range(2)), torch.zeros_like(parted[0]))
        two = _Sum(*(torch.zeros_like(w[1:]) for _ in range(2)), torch.zeros_like(parted[0]))
        for level in range(self.levels):
            # Halving an interval: W' = W/2 ± (3H/2 + Z), H' = H/4 - Z/2 ± N/2, with Z ~ N(0, h/16), N ~ N(0, h/12).
            size = 2.0 ** -(level + 1)
            x, y = numbers[level + 1]
            z = x * (math.sqrt(2 * size) / 4)
            across = torch.add(z, h, alpha=1.5).mul_(sign[level])
            along = (h * 0.25).sub_(z, alpha=0.5)
            apart = y * (sign[level] * (0.5 * math.sqrt(2 * size / 12)))
            mine = torch.add(across, w, alpha=0.5)
            if self.beside[level]:
                other_w, other_h = w - mine, along - apart
                other_j = torch.add(other_h, other_w, alpha=0.5).mul_(size)
                one = one.after(_Sum(other_w[:-1], other_j[:-1], size), right_of_first[level])
                two = two.before(_Sum(other_w[1:], other_j[1:], size), left_of_second[level])
            w, h = mine, along.add_(apart)
        last = _Piece(w, h, torch.full_like(self.rest, 2.0**-self.levels).to(dtype)[..., None])
        if self.split:
            begun, rest = last.divided(self.rest.to(dtype)[..., None], *numbers[-1])
            one = one.after(rest.some(slice(None, -1)).sum(), parted[-1])
            both = one.then(two.before(begun.some(slice(1, None)).sum(), parted[-1]))
            both = both.or_within(begun.some(slice(None, -1)), begun.some(slice(1, None)), parted[-1])
        else:
            both = one.after(last.some(slice(None, -1)).sum(), parted[-1]).then(two)
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

    def after(self, other: _Sum, factor: Tensor) -> _Sum:
        """With the interval before it, where the factor is 1 and not 0."""
        w = other.w * factor
        return _Sum(self.w + w, self.j + other.j * factor + w * self.size, self.size + other.size * factor)

    def before(self, other: _Sum, factor: Tensor) -> _Sum:
        """With the interval that follows, where the factor is 1 and not 0."""
        size = other.size * factor
        return _Sum(
            torch.addcmul(self.w, other.w, factor),
            torch.addcmul(self.j, other.j, factor).addcmul_(self.w, size),
            self.size + size,
        )

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

    def sum(self) -> _Sum:
        return _Sum(self.w, self.j, self.size)

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


# -- random numbers ----------------------------------------------------------------------------------------------------


def _signed(x: int) -> int:
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _ODD = _signed(0x9E3779B97F4A7C15), _signed(0xD1342543DE82EF95)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose every output bit depends on every input bit.

    Source: Evensen 2020, "moremur", with the form of Stafford's and SplitMix64's finalizers.
    """
    return _mix_in_place(x.clone())


def _mix_in_place(x: Tensor) -> Tensor:
    for shift, factor in ((27, 0x3C79AC492BA7B653), (33, 0x1C69B3F74AC4AE35), (27, None)):
        # A logical shift: torch's keeps the sign.
        x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if factor is not None:
            x *= _signed(factor)
    return x


def _normals(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs of independent standard normal numbers, [2, ...], from integers that are written over.

    By the Box-Muller transform: the halves of their hashes are a radius and an angle.
    """
    halves = _mix_in_place(numbers).view(torch.int32).unflatten(-1, (-1, 2)).to(dtype)
    radius = halves[..., 0].mul(2.0**-32).add_(0.5 + 2.0**-33).log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    angle = halves[..., 1] * (2.0 * math.pi * 2.0**-32)
    pair = torch.empty(2, *angle.shape, dtype=dtype, device=angle.device)
    torch.cos(angle, out=pair[0])
    torch.sin(angle, out=pair[1])
    return pair.mul_(radius)


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
