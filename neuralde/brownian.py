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
from typing import Protocol

import torch
from torch import Tensor

from .bisection import Noise, Way
from .descent import Known
from .hashing import GOLDEN, ODD, mix, normals, signed

_LEVELS = {torch.float32: 24, torch.float64: 32}  # of bisection below a cell: float32 has no finer times
_PATHS = ("independent", "antithetic", "shared")


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
        self._group: int | None = None

    def grouped(self, size: int) -> BrownianTree:
        """The same for a batch in which so many samples in a row are trajectories of one input.

        Antithetic paths are then those of the first and the second half of an input's trajectories, and shared ones
        are those of the trajectories, one input's as another's.
        """
        tree = copy.copy(self)
        tree._group = size
        return tree

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
                those = "" if self._group is None else f" ({batch // self._group} inputs times {self._group})"
                raise ValueError(f"paths must have one entry per sample, {batch}{those}, got {len(self.paths)}")
            return self.paths.to(device=device, dtype=torch.int64), None
        if self.paths == "shared":
            return (torch.zeros_like(index) if self._group is None else index % self._group), None
        if self.paths == "independent":
            return index, None
        size, what = (batch, "samples") if self._group is None else (self._group, "trajectories of every input")
        if size % 2:
            raise ValueError(f"paths='antithetic' needs an even number of {what}, got {size}")
        half, place = size // 2, index % size
        return index - place + place % half, torch.where(place < half, 1.0, -1.0)

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
        motion = torch.arange(channels, device=index.device) * GOLDEN
        start = mix(torch.tensor(signed(seed), device=index.device))
        # Cells of another length have other numbers: with the same ones, [0, 1] and [0, 2] would have one path, scaled.
        length = (torch.frexp(cell)[1].to(torch.int64) - 1)[:, None] * ODD
        self.keys = mix(mix(index * GOLDEN + start)[:, None] + motion + length)
        self._known: list[tuple[Tensor, Tensor]] = []  # of the last point: counters and numbers, level by level
        self._part: tuple[Tensor, Tree] | None = None
        self._descent: Known | None = None

    def on(self, rows: Tensor | None) -> Tree:
        """See `Paths.on`."""
        if rows is None:
            return self
        if self._part is not None and self._part[0] is rows:
            return self._part[1]
        part = copy.copy(self)
        part._known, part._part, part._descent = [], None, None
        part.index, part.keys = self.index[rows], self.keys[rows]
        part.sign = None if self.sign is None else self.sign[rows]
        if len(self.cell) > 1:
            part.cell, part.scale = self.cell[rows], self.scale[rows]
        self._part = rows, part
        return part

    def fresh(self) -> Tree:
        """See `Paths.fresh`."""
        seed = int(mix(torch.tensor(signed(self.seed ^ 0x5DEECE66D))))
        return Tree(seed, self.index, self.sign, self.cell, self.channels, self.dtype, self.levels)

    @torch.no_grad()
    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`."""
        times = times.double() / self.cell
        if times.shape[1] == 1 and len(times) <= 3 and times.device.type == "cpu":
            # One step for all samples: its way down is mostly that of the last one.
            self._descent = self._descent or Known(self._pairs, self.levels)
            points = times[:, 0].tolist()
            found = [self._descent.between(start, end) for start, end in itertools.pairwise(points)]
        else:
            found = Way(times, self.levels).noise(self._normals, self.dtype)
        scale = self.scale if self.sign is None else self.scale * self.sign
        return [Noise(w * scale, h * scale) for w, h in found]

    def _pairs(self, counters: Tensor) -> Tensor:
        return normals(self.keys + counters[:, None, None], self.dtype)

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
            return normals(self.keys + counter[:, None], self.dtype)
        new = (counter != known[0]).nonzero().flatten()
        if not len(new):
            return known[1]
        if len(new) == len(counter):
            return normals(self.keys + counter[:, None], self.dtype)
        made = normals(self.keys.index_select(0, new) + counter[new][:, None], self.dtype)
        return known[1].index_copy(1, new, made)


# -- torchsde's --------------------------------------------------------------------------------------------------------


class Foreign:
    """A Brownian object of torchsde's as bound paths: it answers for the whole batch at one time.

    Args:
        brownian: such as a BrownianInterval.

    Attributes:
        horizon: from when to when it is known; infinite where it does not say.
    """

    def __init__(self, brownian):
        self.brownian = brownian
        interval = getattr(brownian, "_interval", brownian)  # what a BrownianPath or a BrownianTree of theirs is around
        self.horizon = getattr(interval, "_start", -math.inf), getattr(interval, "_end", math.inf)

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
