"""The way down a tree of bisections to some times, and the noise between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .hashing import GOLDEN, ODD, mix


class Noise(NamedTuple):
    """What drives a step.

    Attributes:
        w: increments of the Brownian motions. h: their space-time Lévy areas. Both [samples, channels].
    """

    w: Tensor
    h: Tensor


class Way:
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
        return mix(nodes * ODD + level * GOLDEN)

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
        one = Sum(*(torch.zeros_like(w[1:]) for _ in range(2)), torch.zeros_like(parted[0]))
        two = Sum(*(torch.zeros_like(w[1:]) for _ in range(2)), torch.zeros_like(parted[0]))
        for level in range(self.levels):
            size = 2.0 ** -(level + 1)
            w, h, other = halved(w, h, *numbers[level + 1], sign[level], size, self.beside[level])
            if other is not None:
                one = one.after(other.some(slice(None, -1)).sum(), right_of_first[level])
                two = two.before(other.some(slice(1, None)).sum(), left_of_second[level])
        last = Piece(w, h, torch.full_like(self.rest, 2.0**-self.levels).to(dtype)[..., None])
        if self.split:
            both = last.split(self.rest.to(dtype)[..., None], *numbers[-1], one, two, parted[-1])
        else:
            both = last.whole(one, two, parted[-1])
        return both.noise(self.times.diff(dim=0)[..., None].to(dtype))


def halved(w: Tensor, h: Tensor, x: Tensor, y: Tensor, sign: Tensor | None, size, beside: bool = True):
    """One level down: W' = W/2 ± (3H/2 + Z), H' = H/4 - Z/2 ± N/2, with Z ~ N(0, h/16) and N ~ N(0, h/12).

    Args:
        w, h: of the interval. x, y: standard normal. size: of a half.
        sign: +1 for its left half, -1 for its right one; None for the left one everywhere.
        beside: whether the other half is wanted.

    Returns:
        W and H of that half, and the other one as a `Piece` or None.
    """
    z = x * ((2 * size) ** 0.5 / 4)
    across, spread = torch.add(z, h, alpha=1.5), 0.5 * (2 * size / 12) ** 0.5
    if sign is not None:
        across, spread = across.mul_(sign), sign * spread
    along, apart = (h * 0.25).sub_(z, alpha=0.5), y * spread
    mine = torch.add(across, w, alpha=0.5)
    other = Piece(w - mine, along - apart, size) if beside else None
    return mine, along.add_(apart), other


class Sum(NamedTuple):
    """A path on an interval: its increment, its integral from the start, and the interval's length."""

    w: Tensor
    j: Tensor
    size: Tensor

    def then(self, other: Sum) -> Sum:
        """With the interval that follows."""
        return Sum(self.w + other.w, self.j + self.w * other.size + other.j, self.size + other.size)

    def after(self, other: Sum, factor: Tensor) -> Sum:
        """With the interval before it, where the factor is 1 and not 0."""
        w = other.w * factor
        return Sum(self.w + w, self.j + other.j * factor + w * self.size, self.size + other.size * factor)

    def before(self, other: Sum, factor: Tensor) -> Sum:
        """With the interval that follows, where the factor is 1 and not 0."""
        size = other.size * factor
        return Sum(
            torch.addcmul(self.w, other.w, factor),
            torch.addcmul(self.j, other.j, factor).addcmul_(self.w, size),
            self.size + size,
        )

    def noise(self, span: Tensor) -> list[Noise]:
        """W and H of paths on intervals of these lengths, by point."""
        area = torch.where(span == 0, 0.0, self.j / torch.where(span == 0, 1.0, span) - 0.5 * self.w)
        return [Noise(w, h) for w, h in zip(self.w, area, strict=True)]

    def or_within(self, first: Piece, second: Piece, parted: Tensor) -> Sum:
        """Where two times lie in one last interval: the difference of what lies before them."""
        w, size = second.w - first.w, second.size - first.size
        inside = Sum(w, second.j - first.j - first.w * size, size)
        return Sum(*(torch.where(parted > 0, x, y) for x, y in zip(self, inside, strict=True)))


class Piece(NamedTuple):
    """A path on an interval: W, H and the length."""

    w: Tensor
    h: Tensor
    size: Tensor

    @property
    def j(self) -> Tensor:
        """The integral of the path from the interval's start."""
        return self.size * (self.h + 0.5 * self.w)

    def some(self, points: slice) -> Piece:
        """Those of some of the points."""
        size = self.size[points] if isinstance(self.size, Tensor) and self.size.dim() else self.size
        return Piece(self.w[points], self.h[points], size)

    def sum(self) -> Sum:
        """The same as a sum to add to."""
        return Sum(self.w, self.j, self.size)

    def whole(self, one: Sum, two: Sum, parted: Tensor) -> Sum:
        """From times to the ones after them, which are ends of last intervals: these begin there.

        Args:
            one, two: what lies beside the ways to the first and to the second time. parted: whether they differ.
        """
        return one.after(self.some(slice(None, -1)).sum(), parted).then(two)

    def split(self, part: Tensor, x: Tensor, y: Tensor, one: Sum, two: Sum, parted: Tensor) -> Sum:
        """The same where times lie inside of last intervals: which part of one is before each; see `divided`."""
        begun, rest = self.divided(part, x, y)
        one = one.after(rest.some(slice(None, -1)).sum(), parted)
        both = one.then(two.before(begun.some(slice(1, None)).sum(), parted))
        return both.or_within(begun.some(slice(None, -1)), begun.some(slice(1, None)), parted)

    def halved(self, x: Tensor, y: Tensor) -> tuple[Piece, Piece]:
        """Its halves; x and y are standard normal. See the function of that name."""
        w, h, right = halved(self.w, self.h, x, y, None, 0.5 * self.size)
        return Piece(w, h, right.size), right

    def divided(self, part: Tensor, x: Tensor, y: Tensor) -> tuple[Piece, Piece]:
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
        return Piece(w, before, a * self.size), Piece(self.w - w, after, b * self.size)
