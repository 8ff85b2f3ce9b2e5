"""Broyden's method with limited memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Work
from .iteration import Iteration, Memory, Move, backtrack, count, dot

_ROOM = 8  # rank-one terms that there is room for at first


class Broyden(Iteration):
    """Broyden's good method for g(z) = f(z) - z = 0, sample by sample.

        z_{k+1} = z_k - H_k g_k,    H_{k+1} = H_k + (Δz - H_k Δg) vᵀ / vᵀΔg,    v = H_kᵀ Δz,    H_0 = -I

    H is kept as -I and rank-one terms: its first step is one of the fixed-point iteration. A sample whose update would
    divide by (nearly) zero leaves that update out.

    Args:
        memory: how many rank-one terms are remembered. When there are so many the method starts anew from -I and the
            last step: without the oldest term alone, H would not be what any of the others was made for.
        line_search: whether steps that don't make ‖g‖ sufficiently smaller are shortened, each at one more evaluation.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965); limited
    memory as in Bai, Kolter & Koltun, "Deep equilibrium models", 2019.
    """

    remedy = (
        "Take more memory (nde.solvers.Broyden(memory=100)), solver='anderson', 'newton' (dear, but it depends least "
        "on the map), 'fixed_point' where the map contracts, or one for ODEs ('tsit5')"
    )

    def __init__(self, memory: int = 30, line_search: bool = False, name: str = "broyden"):
        if not isinstance(line_search, bool):
            raise TypeError(f"line_search must be True or False, got {line_search!r}")
        self.name, self.m, self.line_search = name, count("memory", memory), line_search
        if line_search:
            self.calls_per_step = None

    def blank(self, z: Tensor) -> tuple[Tensor, ...]:
        """See `Iteration.blank`."""
        return tuple(z.new_zeros(len(z), min(_ROOM, self.m), z.shape[1]) for _ in range(2))

    def start(self, z: Tensor, slope: Tensor, buffers: tuple[Tensor, ...]) -> Memory:
        """See `Iteration.start`: what led to z changed nothing, and H = -I would go on by slope."""
        return Memory(-1, (z, slope, slope), buffers)

    def lasts(self, memory: Memory) -> int | None:
        """See `Iteration.lasts`."""
        return memory.buffers[0].shape[1] - memory.made

    def room(self, memory: Memory) -> Memory:
        """See `Iteration.room`."""
        batch, known, features = memory.buffers[0].shape
        if memory.made < known:
            return memory
        if known == self.m:  # all of them go, and g is where -I takes the last one
            z, slope, _ = memory.states
            return Memory(0, (z, slope, slope), tuple(torch.zeros_like(x[:, :_ROOM]) for x in memory.buffers))
        more = memory.buffers[0].new_zeros(batch, min(known, self.m - known), features)
        return Memory(memory.made, memory.states, tuple(torch.cat([x, more], dim=1) for x in memory.buffers))

    def move(self, f, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """See `Iteration.move`.

        The memory: where H was last used, its g and its step, [batch, features]; and the factors of the rank-one terms,
        [batch, room, features], 0 where there are none yet. The room grows with the steps.
        """
        if memory is None:
            step, start = slope, self.start(z, slope, self.blank(z))
            memory = Memory(0, start.states, start.buffers)
        else:
            step, memory = self._updated(z, slope, memory)
        if not self.line_search:
            return Move(z + step, memory)
        z, slope, made = backtrack(f, z, slope, step)
        return Move(z, memory, slope, Work(nfe=made))

    def _updated(self, z: Tensor, slope: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """-H g with H updated by the step that led to z."""
        (z_before, slope_before, step), (left, right) = memory.states, memory.buffers
        move, change = z - z_before, slope - slope_before
        image = memory.combined(memory.products(right, slope), left) - slope  # H g, by the old H
        v = memory.combined(memory.products(left, move), right) - move
        # The old H took the last g to -step.
        lack, bottom = move - (image + step), dot(v, change)
        fine = bottom.abs() > 10 * torch.finfo(z.dtype).eps * (dot(v, v) * dot(change, change)).sqrt()
        u = lack * torch.where(fine, 1.0 / torch.where(fine, bottom, 1.0), 0.0)[:, None]
        slot = memory.slot(self.m)
        memory.put(left, slot, u)
        memory.put(right, slot, v)
        step = -torch.addcmul(image, u, dot(v, slope)[:, None])
        return step, Memory(memory.made + 1, (z, slope, step), memory.buffers)

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m}{', line search' if self.line_search else ''})"
