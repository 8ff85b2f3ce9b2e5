"""Replay: accepted steps made again, on the frozen grid, where somebody wants to differentiate or look at them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid
from .problem import Problem


class Replayed(NamedTuple):
    """One step, made again.

    Attributes:
        z: the state at its end, [samples, features].
        error, stiffness: [groups], or None where not wanted or not reported.
        outputs: the output times inside the step, as `Schedule.at` lists them, or None.
    """

    z: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    outputs: Tensor | None


class Schedule:
    """Which interior output times lie in which step.

    Args:
        problem: with `interior` times.
        grid: the accepted steps.
        reached: the time each sample got to, [groups]: what lies beyond has no value.
    """

    def __init__(self, problem: Problem, grid: Grid, reached: Tensor):
        times, direction = problem.interior, problem.span.sign()
        step, theta = grid.locate(times, direction)
        got = times * direction <= reached * direction
        point, group = got.nonzero(as_tuple=True)
        step, theta = step[point, group], theta[point, group]
        order = torch.argsort(step, stable=True)
        sizes = torch.bincount(step, minlength=len(grid)).tolist()
        self._parts = list(zip(*(x[order].split(sizes) for x in (point, group, theta)), strict=True))
        self._grid, self.shared = grid, problem.joint and times.shape[1] == 1

    def at(self, j: int):
        """The outputs of step j: (point, sample or None for all, row within the step or None, theta), or None."""
        point, sample, theta = self._parts[j]
        if not len(point):
            return None
        if self.shared:
            return point, None, None, theta
        rows = self._grid.rows[j]
        return point, sample, sample if rows is None else torch.searchsorted(rows, sample), theta


def replay_step(problem: Problem, grid: Grid, j: int, z: Tensor, lens: bool, outputs=None, f=None) -> Replayed:
    """Makes step j again from z, on the tape if grad mode is on.

    Args:
        z: [samples, features], the state at the step's start.
        lens: whether error and stiffness are wanted.
        outputs: of `Schedule.at(j)`, or None.
        f: another field than the problem's.
    """
    f = (f or problem.field).on(grid.rows[j])
    solver, t, dt = problem.solver, grid.t[j], grid.dt[j]
    memory = solver.memory(z, taped=torch.is_grad_enabled())
    step = solver.step(f, t, dt, z, None, memory, lens=lens, close=outputs is not None)
    error = stiffness = values = None
    if step.error is not None:
        error = problem.ratio(step.error, z, step.z)
    if step.pair is not None:
        stiffness = problem.stiffness(step.pair, dt)
    if outputs is not None:
        _, _, rows, theta = outputs
        values = solver.interpolate(solver.snapshot(step.stages), theta, rows)
    return Replayed(step.z, error, stiffness, values)


class Path(NamedTuple):
    """A replay of the whole grid; the same quantities as a `Trajectory`'s.

    Attributes:
        final: [batch, features]. interior: [points, batch, features] or None.
        error, stiffness: flat in the grid's order, or None. states: [all accepted, features], in the same order.
    """

    final: Tensor
    interior: Tensor | None
    error: Tensor | None
    stiffness: Tensor | None
    states: Tensor


def replay_all(
    problem: Problem, grid: Grid, z0: Tensor, done: Tensor, schedule: Schedule | None, lens: bool = True
) -> Path:
    """Solves again from z0 on the frozen grid, every step on the tape if grad mode is on.

    Args:
        z0: [batch, features].
        done: which samples reach their end, [groups]; the others end in NaN, as in the solve.
        schedule: of the interior outputs, or None.
    """
    z, errors, stiffnesses, states = z0, [], [], []
    interior = None
    if schedule is not None:
        interior = z0.new_full((len(problem.interior), *z0.shape), float("nan"))
    for j in range(len(grid)):
        rows = grid.rows[j]
        here = z if rows is None else z.index_select(0, rows)
        outputs = schedule.at(j) if schedule is not None else None
        step = replay_step(problem, grid, j, here, lens, outputs)
        states.append(here)
        errors.append(step.error)
        stiffnesses.append(step.stiffness)
        if outputs is not None:
            point, sample, _, _ = outputs
            interior = interior.index_put((point,) if sample is None else (point, sample), step.outputs)
        z = step.z if rows is None else z.index_copy(0, rows, step.z)

    def flat(parts):
        return torch.cat(parts) if parts and parts[0] is not None else None

    return Path(
        final=torch.where(done[:, None], z, float("nan")),
        interior=interior,
        error=flat(errors),
        stiffness=flat(stiffnesses),
        states=torch.cat(states) if states else z0[:0],
    )
