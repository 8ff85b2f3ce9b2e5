"""Broyden's method with limited memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Work
from .iteration import Iteration, Move, backtrack, count, dot


class Broyden(Iteration):
    """Broyden's good method for g(z) = f(z) - z = 0, sample by sample.

        z_{k+1} = z_k - H_k g_k,    H_{k+1} = H_k + (Δz - H_k Δg) vᵀ / vᵀΔg,    v = H_kᵀ Δz,    H_0 = -I

    H is kept as -I and the last rank-one terms: its first step is one of the fixed-point iteration. A sample whose
    update would divide by (nearly) zero leaves that update out.

    Args:
        memory: how many rank-one terms are remembered; a further one takes the place of the oldest.
        line_search: whether steps that don't make ‖g‖ sufficiently smaller are shortened, each at one more evaluation.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965); limited
    memory as in Bai, Kolter & Koltun, "Deep equilibrium models", 2019.
    """

    def __init__(self, memory: int = 30, line_search: bool = False, name: str = "broyden"):
        if not isinstance(line_search, bool):
            raise TypeError(f"line_search must be True or False, got {line_search!r}")
        self.name, self.m, self.line_search = name, count("memory", memory), line_search
        if line_search:
            self.calls_per_step = None

    def memory(self, z: Tensor, taped: bool) -> _Inverse:
        """See `Solver.memory`."""
        return _Inverse(self.m)

    def carried(self, memory: _Inverse, index: Tensor) -> _Inverse:
        """See `Solver.carried`."""
        return memory.on(index)

    def move(self, f, z: Tensor, slope: Tensor, memory: _Inverse) -> Move:
        """See `Iteration.move`."""
        direction = memory.direction(z, slope)
        if not self.line_search:
            return Move(z + direction)
        z, slope, made = backtrack(f, z, slope, direction)
        return Move(z, slope, Work(nfe=made))

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m}{', line search' if self.line_search else ''})"


class _Inverse:
    """H, and where it was last used."""

    def __init__(self, m: int):
        self.m, self.made = m, 0
        self.z = self.slope = self.step = self.left = self.right = None

    def direction(self, z: Tensor, slope: Tensor) -> Tensor:
        """-H g with H updated by the step that led to z."""
        if self.z is None:
            self.left, self.right = z.new_empty(2, len(z), 0, z.shape[1]).unbind(0)
            self.z, self.slope, self.step = z, slope, slope
            return slope
        known = min(self.made, self.m)
        left, right = self.left[:, :known], self.right[:, :known]
        move, change = z - self.z, slope - self.slope
        weights = torch.bmm(slope[:, None], right.mT)
        image = torch.baddbmm(slope[:, None], weights, left, beta=-1.0)[:, 0]  # H g, by the old H
        v = torch.baddbmm(move[:, None], torch.bmm(move[:, None], left.mT), right, beta=-1.0)[:, 0]
        # The old H took the last g to -step.
        lack, bottom = move - (image + self.step), dot(v, change)
        fine = bottom.abs() > 10 * torch.finfo(z.dtype).eps * (dot(v, v) * dot(change, change)).sqrt()
        u = torch.where(fine[:, None], lack / torch.where(fine, bottom, 1.0)[:, None], 0.0)
        i = self.made % self.m
        if self.made >= self.m:  # the oldest term goes
            image = image - weights[:, 0, i, None] * left[:, i]
        self._store(i, u, v)
        self.made += 1
        step = -torch.addcmul(image, u, dot(v, slope)[:, None])
        self.z, self.slope, self.step = z, slope, step
        return step

    def _store(self, i: int, u: Tensor, v: Tensor):
        if i >= self.left.shape[1]:  # memory grows with the steps
            size = min(max(8, 2 * i), self.m) - i
            self.left, self.right = (
                torch.cat([x, x.new_empty(len(x), size, x.shape[2])], dim=1) for x in (self.left, self.right)
            )
        self.left[:, i], self.right[:, i] = u, v

    def on(self, index: Tensor) -> _Inverse:
        """The same for some of the samples."""
        part = _Inverse(self.m)
        part.made = self.made
        for name in ("z", "slope", "step", "left", "right"):
            setattr(part, name, getattr(self, name).index_select(0, index))
        return part
