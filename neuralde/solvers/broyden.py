"""Broyden's method with limited memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Work
from .iteration import Iteration, Memory, Move, backtrack, count, dot, put


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

    def room(self, memory: Memory) -> Memory:
        """See `Iteration.room`."""
        z, slope, step, left, right = memory.tensors
        known = left.shape[1]
        if memory.made < known or known == self.m:
            return memory
        more = z.new_zeros(2, len(z), min(known, self.m - known), z.shape[1])
        left, right = (torch.cat([x, y], dim=1) for x, y in zip((left, right), more, strict=True))
        return Memory(memory.made, z, slope, step, left, right)

    def move(self, f, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """See `Iteration.move`.

        The memory: where H was last used, its g and its step, [batch, features]; and the factors of the rank-one terms,
        [batch, room, features], 0 where there are none yet. The room grows with the steps.
        """
        if memory is None:
            room = z.new_zeros(2, len(z), min(8, self.m), z.shape[1]).unbind(0)
            step, memory = slope, Memory(0, z, slope, slope, *room)
        else:
            step, memory = self._updated(z, slope, memory)
        if not self.line_search:
            return Move(z + step, memory)
        z, slope, made = backtrack(f, z, slope, step)
        return Move(z, memory, slope, Work(nfe=made))

    def _updated(self, z: Tensor, slope: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """-H g with H updated by the step that led to z."""
        z_before, slope_before, step, left, right = memory.tensors
        move, change = z - z_before, slope - slope_before
        weights = torch.bmm(slope[:, None], right.mT)
        image = torch.baddbmm(slope[:, None], weights, left, beta=-1.0)[:, 0]  # H g, by the old H
        v = torch.baddbmm(move[:, None], torch.bmm(move[:, None], left.mT), right, beta=-1.0)[:, 0]
        # The old H took the last g to -step.
        lack, bottom = move - (image + step), dot(v, change)
        fine = bottom.abs() > 10 * torch.finfo(z.dtype).eps * (dot(v, v) * dot(change, change)).sqrt()
        u = lack * torch.where(fine, 1.0 / torch.where(fine, bottom, 1.0), 0.0)[:, None]
        slot = memory.made % self.m
        if isinstance(slot, Tensor):
            oldest = weights.index_select(2, slot)[:, 0] * left.index_select(1, slot)[:, 0]
            image = image - oldest  # 0 where there is none yet
        elif memory.made >= self.m:  # the oldest term goes
            image = image - weights[:, 0, slot, None] * left[:, slot]
        put(left, slot, u)
        put(right, slot, v)
        step = -torch.addcmul(image, u, dot(v, slope)[:, None])
        return step, Memory(memory.made + 1, z, slope, step, left, right)

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m}{', line search' if self.line_search else ''})"
