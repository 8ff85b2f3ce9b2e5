"""Replay: accepted steps made again, on the frozen grid, where somebody wants to differentiate or look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms
from .events import Hits
from .grid import Grid, Place
from .problem import Problem
from .solvers import Past, Solver, Step


class Replayed(NamedTuple):
    """One step, made again.

    Attributes:
        z: the state at its end, [samples, features].
        error, stiffness: [groups], or None where not wanted or not reported.
        outputs: the output times inside the step, as `Schedule.at` lists them, or None.
        slope: f at its start, [samples, features], where later steps build on it.
    """

    z: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    outputs: Tensor | None
    slope: Tensor | None


class Outputs(NamedTuple):
    """The outputs that lie in one step, all [outputs].

    Attributes:
        point: which they are. sample: whose, or None where every sample has all of them. row: the sample's place in
            the step, None likewise. theta: where in the step.
    """

    point: Tensor
    sample: Tensor | None
    row: Tensor | None
    theta: Tensor


class Schedule:
    """Which outputs inside the horizon lie in which step.

    Args:
        problem: its `interior` times are the first outputs.
        grid: the accepted steps.
        reached: the time each sample got to, [groups]: what lies beyond has no value.
        hits: events; their rows follow.
    """

    def __init__(self, problem: Problem, grid: Grid, reached: Tensor, hits: Hits | None):
        times, direction = problem.interior, problem.span.sign()
        self._grid, count = grid, 0 if times is None else len(times)
        self.shared = problem.joint and hits is None and times.shape[1] == 1
        parts = []
        if times is not None:
            if not self.shared:
                times = times.expand(-1, grid.batch)
            step, theta = grid.locate(times, direction)
            point, group = (times * direction <= reached * direction).nonzero(as_tuple=True)
            parts.append((step[point, group], point, group, theta[point, group]))
        if hits is not None:
            parts.append((hits.step, count + hits.row, hits.sample, hits.theta))
        step, *rest = (torch.cat(x) for x in zip(*parts, strict=True))
        order = torch.argsort(step, stable=True)
        sizes = torch.bincount(step, minlength=len(grid)).tolist()
        self._parts = list(zip(*(x[order].split(sizes) for x in rest), strict=True))
        self.points = count + (0 if hits is None else sum(hits.rows))

    def at(self, j: int) -> Outputs | None:
        """The outputs of step j, or None."""
        point, sample, theta = self._parts[j]
        if not len(point):
            return None
        if self.shared:
            return Outputs(point, None, None, theta)
        rows = self._grid.rows[j]
        return Outputs(point, sample, sample if rows is None else torch.searchsorted(rows, sample), theta)


def replay_step(
    problem: Problem, grid: Grid, j: int, z: Tensor, lens: bool, outputs=None, field=None, past: Past | None = None
) -> Replayed:
    """Makes step j again from z, on the tape if grad mode is on.

    Args:
        z: [samples, features], the state at the step's start.
        lens: whether error and stiffness are wanted.
        outputs: of `Schedule.at(j)`, or None.
        field: another one than the problem's.
        past: of `past_of`, where the solver has a history.
    """
    pieces = grid.parts[j]
    if len(pieces) == 1:
        return _replay(problem, grid, j, None, pieces[0][0], z, lens, outputs, field, past)
    made, places = [], []
    for part, where in pieces:
        mine = None
        if outputs is not None:
            place = torch.searchsorted(where, outputs.row).clamp(max=len(where) - 1)
            here = (where[place] == outputs.row).nonzero().flatten()
            mine = Outputs(outputs.point[here], outputs.sample[here], place[here], outputs.theta[here])
            places.append(here)
        then = past and Past(past.slopes[:, where], past.dt[:, where])
        made.append(_replay(problem, grid, j, where, part, z[where], lens, mine, field, then))
    order = torch.argsort(torch.cat([where for _, where in pieces]))
    back = torch.argsort(torch.cat(places)) if places else None
    values = {}
    for name, parts in zip(Replayed._fields, zip(*made, strict=True), strict=True):
        whole = None if any(x is None for x in parts) else torch.cat(parts)
        values[name] = whole if whole is None else whole.index_select(0, back if name == "outputs" else order)
    return Replayed(**values)


def _replay(problem, grid, j, where, part, z, lens, outputs, field, past) -> Replayed:
    """The samples of a step that one part of the solver makes; `where` are their places in it."""
    place, solver = grid.place(j, where), problem.solver.parts[part]
    step, slope = make_step(problem, place, part, z, lens, outputs is not None, field, past)
    error = stiffness = values = None
    if lens and step.error is not None:
        error = problem.ratio(step.error, z, step.z, place.rows)
    if lens and problem.solver.reports_stiffness:
        stiffness = problem.stiffness(step, place.dt)
    if outputs is not None:
        values = solver.interpolate(solver.snapshot(step.stages), outputs.theta, outputs.row)
    return Replayed(step.z, error, stiffness, values, slope)


def make_step(
    problem: Problem,
    place: Place,
    part: int,
    z: Tensor,
    lens: bool = True,
    close: bool = False,
    field=None,
    past: Past | None = None,
) -> tuple[Step, Tensor | None]:
    """Makes a step again, or one of each sample's own, with one part of the solver.

    Args:
        place: of `Grid.place` or `Grid.places`.
        z: the states at the start, [samples, features].
        lens, close: of `Solver.attempt`. field: another one than the problem's.
        past: of `past_of` or `past_at`, where the part has a history.

    Returns:
        The step, and f at its start where the solver has a history.
    """
    solver: Solver = problem.solver.parts[part]
    if place.still is not None and past is not None:
        past = past._replace(slopes=torch.where(place.still[:, None], 0.0, past.slopes))
    f = problem.f(place.rows, place.t, place.t_end, field, place.still)
    slope = f(f.times(place.t)[0], z) if problem.solver.history else None
    memory = solver.memory(z, taped=transforms.recording())
    history = {"past": past} if solver.history else {}
    step = solver.attempt(f, place.t, place.dt, z, slope, memory, lens=lens, close=close, **history)
    if close and not solver.closes:
        end = f(f.times(place.t_end)[0], step.z)
        step = step._replace(slope_end=end, stages=solver.finish(step.stages, end))
    return step, slope


def past_of(problem: Problem, grid: Grid, j: int, slopes: list[Tensor]) -> Past | None:
    """What step j builds on; None for a solver without history, and where there are not enough steps yet.

    Args:
        slopes: f at the starts of the steps before j, [samples of the step, features].
    """
    depth = problem.solver.history
    if not depth or j < depth:
        return None
    found, sizes = [], []
    for back in range(1, depth + 1):
        where, dt = grid.before(j, back), grid.dt[j - back]
        slope = slopes[j - back]
        found.append(slope if where is None else slope.index_select(0, where))
        sizes.append(dt if where is None or problem.joint else dt.index_select(0, where))
    return Past(torch.stack(found), torch.stack(sizes))


def past_at(problem: Problem, grid: Grid, step: Tensor, rows: Tensor, states: Sequence[Tensor]) -> Past | None:
    """What a step of each sample's own builds on, f being evaluated again; None where it builds on nothing.

    Args:
        step, rows: as `Grid.places` has them.
        states: at the starts of the steps before, the last one first, [samples, features] each.
    """
    slopes, sizes = [], []
    for back, z in enumerate(states, start=1):
        place = grid.places(step - back, rows)
        f = problem.f(place.rows, place.t, place.t_end, still=place.still)
        slopes.append(f(f.times(place.t)[0], z))
        sizes.append(place.dt)
    return Past(torch.stack(slopes), torch.stack(sizes)) if slopes else None


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
        schedule: of the outputs inside the horizon, or None.
    """
    z, errors, stiffnesses, states, slopes = z0, [], [], [], []
    interior = None
    if schedule is not None:
        interior = z0.new_full((schedule.points, *z0.shape), float("nan"))
    for j in range(len(grid)):
        rows = grid.rows[j]
        here = z if rows is None else z.index_select(0, rows)
        outputs = schedule.at(j) if schedule is not None else None
        step = replay_step(problem, grid, j, here, lens, outputs, past=past_of(problem, grid, j, slopes))
        states.append(here)
        errors.append(step.error)
        stiffnesses.append(step.stiffness)
        slopes.append(step.slope)
        if outputs is not None:
            where = (outputs.point,) if outputs.sample is None else (outputs.point, outputs.sample)
            interior = interior.index_put(where, step.outputs)
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
