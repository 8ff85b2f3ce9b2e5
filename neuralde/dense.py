"""The solution between the steps: their stages, kept or made again, and the solvers' interpolants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid
from .problem import Problem
from .replay import make_step, past_at
from .solvers import Solver
from .trajectory import Trajectory

# (step, rows), both [samples] -> the states at the starts of these steps of these samples, [samples, features].
States = Callable[[Tensor, Tensor], Tensor]


class Stages(NamedTuple):
    """The stages of all accepted steps, as `solve(dense=True)` keeps them.

    Attributes:
        snapshots: [rows, all accepted, features], in the grid's order.
        count: how many of the rows each part of the solver has.
    """

    snapshots: Tensor
    count: list[int]

    @classmethod
    def of(cls, trajectory: Trajectory) -> Stages:
        """Those that a solve kept."""
        count = [0] * len(trajectory.problem.solver.parts)
        for record in trajectory.records:
            count[record.part] = len(record.snapshot)
        most = max(count)
        parts = [
            torch.cat([r.snapshot, r.snapshot.new_zeros(most - len(r.snapshot), *r.snapshot.shape[1:])]).movedim(0, 1)
            for r in trajectory.records
        ]
        return cls(trajectory.grid.gather(parts, parts[0]).movedim(1, 0), count)


class Dense:
    """The solution between the steps; differentiable where the states and the times are.

    Args:
        problem: what was solved.
        grid: its accepted steps.
        states: what the steps start from; under joint control it is asked for the whole batch. Where a step builds on
            those before it, it is asked for these first, in their order.
        kept: the stages, or None to make the steps again.
    """

    def __init__(self, problem: Problem, grid: Grid, states: States, kept: Stages | None = None):
        self.problem, self.grid, self.states, self.kept = problem, grid, states, kept

    def at(self, step: Tensor, theta: Tensor) -> Tensor:
        """The solution inside of steps, [points, batch, features].

        Args:
            step, theta: of `Grid.locate`, [points, batch]; [points, 1] under joint control where samples share them.
        """
        everyone = self.problem.joint and step.shape[1] == 1
        values, order = [], []
        # Points whose samples all lie in the same steps share one replay.
        combinations, which = torch.unique(step, dim=0, return_inverse=True)
        for i, here in enumerate(combinations):
            points = (which == i).nonzero().flatten()
            order.append(points)
            if everyone:
                part, snapshot = self.shared(here)
                values.append(part.interpolate(snapshot, theta[points, 0], None))
                continue
            found, places = [], []
            for part, rows, snapshot, at in self.pieces(here):
                flat = part.interpolate(snapshot, theta[points][:, rows].flatten(), at.repeat(len(points)))
                found.append(flat.view(len(points), len(rows), -1))
                places.append(rows)
            value = found[0].new_zeros(len(points), self.grid.batch, found[0].shape[-1])
            values.append(value.index_copy(1, torch.cat(places), torch.cat(found, dim=1)))
        return torch.cat(values).index_select(0, torch.argsort(torch.cat(order)))

    def pieces(self, step: Tensor, rows: Tensor | None = None) -> Iterator[tuple[Solver, Tensor, Tensor, Tensor]]:
        """The stages of every sample's own step.

        Args:
            step: indices, [batch].
            rows: the samples that are wanted, ascending; None for all. Samples without any step are left out.

        Yields:
            (the method, the samples, their snapshot, where in it they are).
        """
        rows = torch.arange(self.grid.batch, device=step.device) if rows is None else rows
        if self.problem.joint:
            for j in step[rows].unique():
                here = rows[step[rows] == j]
                part, snapshot = self.shared(j[None])
                yield part, here, snapshot, here
            return
        parts = self.grid.part_of(step[rows], rows)
        for i, part in enumerate(self.problem.solver.parts):
            # A sample that failed at once has no step to be made again, and f may be unable to handle it.
            here = rows[(parts == i) & (self.grid.counts[rows] > 0)]
            if len(here):
                yield part, here, self._stages(i, step[here], here), torch.arange(len(here), device=step.device)

    def shared(self, step: Tensor) -> tuple[Solver, Tensor]:
        """The method and the stages of a step that the whole batch took; its index as [1]."""
        part = self.grid.parts[int(step)][0][0]
        rows = torch.arange(self.grid.batch, device=step.device)
        return self.problem.solver.parts[part], self._stages(part, step.expand(len(rows)), rows)

    def _stages(self, part: int, step: Tensor, rows: Tensor) -> Tensor:
        """The snapshot of one step of each sample, made with one method; step and rows are [samples]."""
        if self.kept is not None:
            return self.kept.snapshots[: self.kept.count[part], self.grid.flat_index[step, rows]]
        method = self.problem.solver.parts[part]
        before = [self.states(step - back, rows) for back in reversed(range(1, method.history + 1))]
        past = past_at(self.problem, self.grid, step, rows, before[::-1])
        place, z = self.grid.places(step, rows), self.states(step, rows)
        made, _ = make_step(self.problem, place, part, z, close=True, past=past)
        return method.snapshot(made.stages)
