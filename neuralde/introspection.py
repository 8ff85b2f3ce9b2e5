"""The lens: one step looked at closely, and accepted steps made again; all of it differentiable.

Step sizes are constants to every gradient here, as they are everywhere in the package: the same penalty has grossly
different gradients with and without the path through dt, and the controllers of the papers' code cut it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from . import algebra, solvers, transforms
from . import control as _control
from .adjoints.base import Outcome
from .control import StepControl
from .equations import ODE, SDE
from .errors import Status
from .field import Field, full_precision
from .outputs import outputs
from .parametrized import looking_back
from .problem import Problem
from .replay import Schedule, make_step, past_at, replay_all
from .retrace import every_state, lookup
from .solution import Solution
from .solvers import Past, Solver, Step
from .stability import Anchored, contraction, end, spectral_radius
from .state import Layout, all_finite
from .stochastic import Driven, NoisyField, source

__all__ = ["Probe", "contraction", "measure", "probe", "probe_last", "probe_solution", "replay", "spectral_radius"]


@dataclass(frozen=True)
class Probe:
    """One step under the lens. Under joint control every figure is one value repeated.

    Attributes:
        t, dt: where it starts and its (signed) size, [batch]; constants to the gradient.
        z: the state at its end, in the structure of the state given.
        error: the embedded error estimate over the tolerance, RMS: what a controller would compare with 1. [batch],
            or None where the solver has no estimate. A probe is never rejected, so it may exceed 1.
        raw_error: the same before the tolerance divides it: RMS of the estimate, in units of z. [batch] or None.
        stiffness: estimate of |λ|, in units of 1/t. [batch], or None where the solver has none.
        solver: the method that made the step.
    """

    t: Tensor
    dt: Tensor
    z: object
    error: Tensor | None
    raw_error: Tensor | None
    stiffness: Tensor | None
    solver: Solver


def probe(
    f: Callable | ODE | SDE,
    t,
    z,
    dt: float | Tensor | None = None,
    solver: str | Solver | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    control: str | StepControl = "per_sample",
    args=None,
    t1=None,
    seed: int | None = None,
) -> Probe:
    """Makes one step of dz/dt = f(t, z), or of an SDE, from (t, z) and reports its error and stiffness, differentiably.

    Args:
        f: the vector field, as in `ODE`; or the equation.
        t: a time, or one per sample, [batch].
        z: the state, [batch, ...], or a tuple or dict of such tensors.
        dt: the (signed) step size, a number or [batch]; None takes the automatic first step that a solve from here to
            t1 would begin with.
        solver: which method's step. None is "tsit5", or for an SDE the default of `solve`.
        rtol, atol: the tolerances that `error` is relative to, and that the automatic step is made for.
        control: "per_sample", or "joint": one step size and one norm for the batch.
        args: for f's last argument.
        t1: where the solve would end: gives the automatic step its direction and its largest size. None: forward,
            without limit; an SDE needs it, or dt.
        seed: of an SDE's noise; None draws one.

    Returns:
        A `Probe`.

    Raises:
        ValueError, TypeError: an argument is wrong, or f mixes samples under per-sample control.
    """
    layout = Layout.of(z)
    noisy = isinstance(f, SDE)
    control = _control.get(control)
    solver = solvers.for_sde(solver, f) if noisy else solvers.for_ode(ODE.usual.solver if solver is None else solver)
    layout = dataclasses.replace(layout, copies=solver.copies)
    joint = not control.per_sample
    groups = 1 if joint else layout.batch

    def times(name, x):
        if not isinstance(x, numbers.Real | Tensor):
            raise TypeError(f"{name} must be a number or a tensor, got {type(x).__name__}")
        x = torch.as_tensor(x, dtype=layout.time_dtype, device=layout.device)
        if not all_finite(x):
            raise ValueError(f"{name} must be finite, got {x.tolist()}")
        if x.dim() > 1 or (x.dim() == 1 and len(x) not in (1, groups)):
            raise ValueError(f"{name} must be a number{'' if joint else f' or [batch] = [{groups}]'}, got {x.shape}")
        return x.detach().expand(groups)

    t = times("t", t)
    end = t + 1e30 if t1 is None else times("t1", t1)
    if bool((end == t).any()):
        raise ValueError("t1 must differ from t: it gives the step its direction")
    dt = None if dt is None else times("dt", dt)
    if dt is not None and bool((dt == 0).any()):
        raise ValueError("dt must not be 0")
    if noisy:
        span = _noise_span(dt, None if t1 is None else end - t)
        field = NoisyField(f, layout, args, joint, t, span, source(seed, None, f, solver, control))
    else:
        field = Field(f if isinstance(f, ODE) else ODE(f), layout, args, joint, solver.linearizes)
    problem = Problem(
        field=field,
        solver=solver,
        control=control,
        times=torch.stack([t, end]),
        norm=_control.norm(rtol, atol, control, layout),
        dt0=None,
        max_steps=1,
        keep_stages=False,
    )
    flat = layout.pack_start(z)
    slope = problem.field.first(t, flat, t + 1.0)
    return _for_all(_look(problem, t, flat, slope, dt), layout.batch)


def probe_step(
    f: Callable, t: Tensor, z, dt: Tensor, solver: Solver, rtol: float, atol: float, figure: str | None = None
) -> Probe:
    """`probe` of a step that another library made, under joint control, without the checks that this has made needless.

    Args:
        f, z, solver, rtol, atol: of `probe`.
        t, dt: tensors with one number.
        figure: "error", "raw_error" or "stiffness": take that one alone, and leave the others None.

    Returns:
        A `Probe` whose t, dt and figures are [1].
    """
    layout = Layout.of(z)
    t, dt = (x.detach().to(layout.time_dtype).reshape(1) for x in (t, dt))
    field = Field(ODE(f), layout, None, True, solver.linearizes)
    problem = Problem(
        field=field,
        solver=solver,
        control=_control.get("joint"),
        times=t[None],
        norm=_control.Norm(rtol, atol, True),
        dt0=None,
        max_steps=1,
        keep_stages=False,
    )
    flat = layout.pack(z).to(layout.work_dtype)
    memory = solver.memory_of_one(flat, transforms.recording())
    return _look(problem, t, flat, field.first(t, flat, t + dt), dt, figure, memory)


def _noise_span(dt: Tensor | None, span: Tensor | None) -> Tensor:
    """How long the paths of a probe have to be."""
    if dt is None and span is None:
        raise ValueError("the probe of an SDE needs dt, or t1, where its noise ends; pass one of them")
    span = dt if span is None else span
    if bool((span < 0).any()) or (dt is not None and bool((dt < 0).any())):
        raise ValueError("dt must be positive: an SDE is solved forward in time")
    return span if dt is None else torch.maximum(span, dt)


@looking_back
def probe_solution(
    solution: Solution, t: Tensor, through_state: bool = False, solver: str | Solver | None = None
) -> Probe:
    """`probe` from a point on a solution, with its vector field, tolerances and control.

    The step is the one that a new solve from there to the end of the horizon would begin with.

    Args:
        solution: of `solve`.
        t: [batch] times on the horizon (equal ones under joint control).
        through_state: whether gradients flow into the solution at t.
        solver: another method than the solution's.

    The step of an SDE has noise of its own, not that of the solution, whose state at t may know it already; the same
    noise every time.

    Returns:
        A `Probe`, NaN where a sample failed.

    Raises:
        ValueError: every sample failed.
    """
    problem = solution._problem
    t = problem._groups(t.detach().to(problem.times))
    with torch.set_grad_enabled(torch.is_grad_enabled() and through_state):
        z = solution._at(t)
    problem = dataclasses.replace(problem, times=torch.stack([t.expand(problem.times.shape[1]), problem.times[-1]]))
    if not bool(solution.converged.any()):
        raise ValueError("every sample of the solution failed, so there is no point to probe from")
    pieces = [
        _look_at(*_stepped_with(method, problem, z), t, which & solution.converged)
        for method, which in _methods(solution, t, solver)
    ]
    if len(pieces) == 1:
        return pieces[0]
    # Every sample is a number in one of them.
    both = {name: [getattr(piece, name) for piece in pieces] for name in vars(pieces[0]) if name != "solver"}
    values = {
        name: None if None in x else pytree.tree_map(lambda first, *others: _known(first, others), *x)
        for name, x in both.items()
    }
    return Probe(solver=solution.solver, **values)


def _stepped_with(solver: Solver, problem: Problem, z: Tensor) -> tuple[Problem, Tensor]:
    """A problem and a state on its solution for another method, which may step another number of copies of it."""
    layout = problem.field.layout
    if solver.copies != layout.copies:
        field = copy.copy(problem.field)
        field.layout = dataclasses.replace(layout, copies=solver.copies)

        def copied(x):
            return field.layout.copied(layout.solution(x)) if isinstance(x, Tensor) else x

        norm = dataclasses.replace(problem.norm, rtol=copied(problem.norm.rtol), atol=copied(problem.norm.atol))
        z, problem = copied(z), dataclasses.replace(problem, field=field, norm=norm)
    return dataclasses.replace(problem, solver=solver), z


def default_solver(solution: Solution) -> Solver:
    """What an SDE is solved with by default, for a probe of a solution whose own method reports too little."""
    return solvers.for_sde(None, solution._problem.field.equation)


@looking_back
def probe_last(solution: Solution) -> Probe:
    """The last step of a solve for a steady state, made again as `probe` makes one.

    Its start, and f there, are constants to the gradient (see `stability.Anchored`).

    Args:
        solution: an `Equilibrium` of a solver for ODEs. A method that builds on earlier steps is stood in for by the
            one that it starts with.

    Returns:
        A `Probe`; its figures are 0 for samples that got lost or began at rest.
    """
    problem, steps, batch = solution._problem, solution.steps, len(solution.status)
    last = (steps.mask.sum(dim=0) - 1).clamp(min=0)
    everyone = torch.arange(batch, device=last.device)
    if not len(steps):
        dt = torch.zeros(batch, dtype=problem.times.dtype, device=last.device)
    else:
        dt = torch.where(steps.mask.any(dim=0), steps.dt[last, everyone], 0.0)
    method = solution.solver.parts[0]
    start = solution.ts[-1] - dt
    at = end(solution, problem.rest.before.detach())

    def own(x):
        x = x if at.rows is None else x.index_select(0, at.rows)
        return x[:1] if problem.joint else x

    t, dt = own(start), own(dt)
    part = problem.field if at.rows is None else problem.field.on(at.rows)
    slope = at.f(at.z).to(at.z.dtype)
    part = Anchored(part, slope)
    moved = dataclasses.replace(problem, field=part, solver=method, norm=problem.norm.on(at.rows))
    found = _for_all(_look(moved, t, at.z, slope.detach(), torch.where(dt == 0, 1e-6, dt)), len(at.z))
    if at.rows is None:
        return found
    values = {name: x for name, x in vars(found).items() if name not in ("solver", "z")}
    values = {name: None if x is None else at.spread(x, batch) for name, x in values.items()}
    return Probe(z=None, solver=found.solver, **values)


def _methods(solution: Solution, t: Tensor, solver: str | Solver | None) -> list[tuple[Solver, Tensor]]:
    """What to probe with, and which samples, [batch]: the method that each of them stepped with there."""
    everyone = torch.ones_like(solution.converged)
    if solver is not None or len(solution.solver.parts) == 1:
        if solver is not None:
            problem = solution._problem
            solver = solvers.for_sde(solver, problem.field.equation) if problem.noisy else solvers.for_ode(solver)
        return [(solution.solver if solver is None else solver, everyone)]
    used = solution._parts_at(t)
    # A method that builds on earlier steps can't begin anywhere: the one that starts it can.
    parts = [solution.solver.parts[0] if part.history else part for part in solution.solver.parts]
    found: dict[Solver, Tensor] = {}
    for i, part in enumerate(parts):
        found[part] = found.get(part, ~everyone) | (used == i)
    return [(part, which) for part, which in found.items() if bool(which.any())]


def _known(first: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    for other in others:
        first = torch.where(first.isnan(), other, first)
    return first


def _look_at(problem: Problem, z: Tensor, t: Tensor, which: Tensor) -> Probe:
    """`_look` at some of the samples, [batch] bool; NaN for the others, whom f may be unable to handle anywhere."""
    f, rows = problem.field, None
    if not bool(which.all()):
        rows = which.nonzero().flatten()
        f, t, z = f.on(rows), t[rows], z[rows]
        problem = dataclasses.replace(problem, field=f, times=problem.times[:, rows], norm=problem.norm.on(rows))
    slope = f(f.times(t)[0], z)
    if rows is None and problem.solver.linearizes:
        problem = dataclasses.replace(problem, field=f.linearized(t, z, slope))
    found = _for_all(_look(problem, t, z, slope, None), len(z))
    if rows is None:
        return found

    def spread(x):
        return x.new_full((len(which), *x.shape[1:]), float("nan")).index_copy(0, rows, x)

    values = {name: x for name, x in vars(found).items() if name != "solver"}
    return Probe(solver=found.solver, **pytree.tree_map_only(Tensor, spread, values))


def _look(
    problem: Problem,
    t: Tensor,
    z: Tensor,
    slope: Tensor,
    dt: Tensor | None,
    figure: str | None = None,
    memory: Any = None,
) -> Probe:
    """The step from (t, z), where f is slope; with one figure alone, or all of them.

    All [groups], those of the probe too.

    Args:
        problem, t, z, slope, dt: of the step.
        figure: of `probe_step`.
        memory: of the solver, for this step; None, and it is made.
    """
    p, solver = problem, problem.solver
    with full_precision(z.device):
        if dt is None:
            with torch.no_grad():
                span = algebra.of(p.joint).read(p.span)
                dt = _control.initial_step(p.field, t, z.detach(), slope.detach(), span, solver.order, p.norm)
                dt = torch.as_tensor(dt).to(t) * p.span.sign()
        f = p.field
        if p.noisy:
            f = Driven(f, f.diagonal, f.paths.fresh(), t, t + dt)
        memory = solver.memory(z, transforms.recording()) if memory is None else memory
        lens = {None: True, "raw_error": "error"}.get(figure, figure)
        step = solver.attempt(f, t, dt, z, slope, memory, lens)
        error = raw = stiffness = None
        if step.error is not None and figure in (None, "error"):
            error = p.ratio(step.error, z, step.z)
        if step.error is not None and figure in (None, "raw_error"):
            raw = _control.rms(step.error, p.joint)
        if figure in (None, "stiffness"):
            stiffness = p.stiffness(step, dt)
    return Probe(t, dt, p.field.layout.unpack(step.z), error, raw, stiffness, solver)


def _for_all(probe: Probe, batch: int) -> Probe:
    """A probe whose figures are [groups], with [batch] each."""
    names = ("t", "dt", "error", "raw_error", "stiffness")
    figures = {name: getattr(probe, name) for name in names}
    return dataclasses.replace(probe, **{name: x if x is None else x.expand(batch) for name, x in figures.items()})


def raw_error(problem: Problem, step: Step, z: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """A figure for `measure`: RMS of the embedded error estimate, not divided by the tolerance."""
    return _control.rms(step.error, problem.joint)


def measure(solution: Solution, figure: Callable[[Problem, Step, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Makes every accepted step again and takes a figure of each, at the memory of the checkpointed adjoint.

    Args:
        solution: of `solve`.
        figure: (problem, step, z, t, dt) -> [groups]: the step's `Step`, and where it started. z is [samples,
            features], t and dt are [groups].

    Returns:
        [step, batch], 0 where a sample has no such step. Differentiable where `solution.steps.error` is.
    """
    _require_steps(solution)
    p, outcome = solution._problem, solution._outcome
    grid = outcome.trajectory.grid

    def one(j, *here):
        with full_precision(here[0].device):
            past = past_at(p, grid, *steps[j], here[1:])
            found, places = [], []
            for part, where in grid.parts[j]:
                place = grid.place(j, where)
                z = here[0] if where is None else here[0][where]
                then = past if past is None or where is None else Past(past.slopes[:, where], past.dt[:, where])
                step, _ = make_step(p, place, part, z, past=then)
                found.append(figure(dataclasses.replace(p, norm=p.norm.on(place.rows)), step, z, place.t, place.dt))
                places.append(where)
        return found[0] if len(found) == 1 else torch.cat(found)[torch.argsort(torch.cat(places))]

    if not len(grid):
        return p.start.new_zeros(0, grid.batch)
    states, depth = lookup(p, outcome, solution._z0), p.solver.history
    steps = [grid.whole_step(j) for j in range(len(grid))]

    def all_of_them():
        parts = []
        for j, (step, rows) in enumerate(steps):
            here = [states(step - back, rows) for back in reversed(range(depth + 1 if j >= depth else 1))][::-1]
            # Inside of a transform, checkpoints are not to be had, and "direct" has its steps in memory anyway.
            taped = torch.is_grad_enabled() and not transforms.active()
            parts.append(checkpoint(one, j, *here, use_reentrant=False) if taped else one(j, *here))
        return torch.cat(parts)

    return grid.pad(outcome.from_states(all_of_them))


# (f, t, z, rows): the field of the samples `rows` (None for all), [groups], [samples, features].
Figure = Callable[[Any, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def integrate(solution: Solution, figure: Figure) -> Tensor:
    """∫ figure |dt| along a solution, by Simpson's rule on its accepted steps.

    The states are those at the ends of the steps, and in their middles those of the cubic through the states and slopes
    there, so that no step is made again. On every step the rule is exact for cubics, and its weights are positive. The
    memory is some states per step: everything else is made again in the backward pass.

    Args:
        solution: of `solve`.
        figure: (f, t, z, rows) -> (the figure, [samples]; dz/dt, [samples, features]). f is the field of the samples
            `rows` (None for all), to be called as f(f.times(t)[0], z).

    Returns:
        [batch], 0 where a sample failed. Differentiable where `solution.steps.z` is.
    """
    if not len(solution.steps) or not bool(solution.converged.any()):
        return solution._z0.real.new_zeros(len(solution.status))
    with full_precision(solution._z0.device):
        return solution._outcome.from_states(lambda: _Simpson(solution, figure).total())


class _Simpson:
    """Simpson's rule on the accepted steps of the samples that arrived."""

    def __init__(self, solution: Solution, figure: Figure):
        self.p, self.figure = solution._problem, figure
        outcome, t_end = solution._outcome, solution.t_end
        self.grid = outcome.trajectory.grid
        self.alive = solution.converged
        held = solution._held
        self.everyone = held is None and bool(self.alive.all())
        direction = self.p.span.sign()
        # Steps that a sample does not have, or that lie beyond its terminal event, have no length.
        a, b = (self.grid.padded(name).expand(-1, self.grid.batch) for name in ("t", "t_end"))
        a, b = (torch.where(self.grid.mask, x, t_end) for x in (a, b))
        self.a, self.b = (torch.minimum(x * direction, t_end * direction) * direction for x in (a, b))
        self.t_end, final = t_end, outcome.final if held is None else held
        layout = self.p.field.layout
        states, final = (
            layout.solution(self.grid.pad(every_state(self.p, outcome, solution._z0))),
            layout.solution(final),
        )
        inside = (self.a != t_end)[..., None]
        self.z = [*torch.where(inside, states, final), final]

    def total(self) -> Tensor:
        """[batch]."""
        a, b, total = self.a, self.b, 0.0
        starts = [self._at(self._rows(j), a[j], self.z[j], a[j], b[j]) for j in range(len(a))]
        last = self._at(self._rows(None), self.t_end, self.z[-1], self.p.times[0].expand_as(self.t_end), self.t_end)
        for j in range(len(a)):
            more = None if j + 1 == len(a) else (a[j + 1] != self.t_end)
            g, slope = starts[j]
            if self.p.jumps is not None:  # on this step's side
                g_end, slope_end = self._at(self._rows(j), b[j], self.z[j + 1], a[j], b[j])
            elif more is None:
                g_end, slope_end = last
            else:
                g_end = torch.where(more, starts[j + 1][0], last[0])
                slope_end = torch.where(more[:, None], starts[j + 1][1], last[1])
            h = (b[j] - a[j])[:, None].to(slope.real.dtype)
            middle = 0.5 * (self.z[j] + self.z[j + 1]) + 0.125 * h * (slope - slope_end)
            g_middle, _ = self._at(self._rows(j), 0.5 * (a[j] + b[j]), middle, a[j], b[j])
            total = total + h[:, 0].abs() / 6.0 * (g + 4.0 * g_middle + g_end)
        return total

    def _rows(self, j: int | None) -> Tensor | None:
        """Who has step j, or who arrived: None for everyone."""
        if self.p.joint:
            return None
        if self.everyone:
            return None if j is None else self.grid.rows[j]
        here = self.alive if j is None else self.alive & (self.a[j] != self.b[j])
        return None if bool(here.all()) else here.nonzero().flatten()

    def _at(self, rows: Tensor | None, t: Tensor, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The figure and the slope at (t, z) inside of the step from low to high, 0 for others; all [batch]."""
        if rows is not None and not len(rows):
            return z.real.new_zeros(len(z)), torch.zeros_like(z)
        t, low, high = (self.p._groups(x) if rows is None else x[rows] for x in (t, low, high))
        f, here = self.p.f(rows, low, high), z if rows is None else z[rows]
        # Inside of a transform, checkpoints are not to be had.
        if torch.is_grad_enabled() and not transforms.active():
            found = checkpoint(self.figure, f, t, here, rows, use_reentrant=False)
        else:
            found = self.figure(f, t, here, rows)
        if rows is None:
            return found
        g, slope = found
        return g.new_zeros(len(z)).index_copy(0, rows, g), torch.zeros_like(z).index_copy(0, rows, slope)


def replay(solution: Solution, z0=None, args=None) -> Solution:
    """Solves again on the frozen grid of a solution: the same steps, with whatever f's parameters are now.

    The result is the differentiable function that the solve's gradients are the gradients of; finite differences of it
    are what they are tested against. Every step is on the tape (the memory of adjoint "direct").

    Args:
        solution: of `solve`.
        z0: another initial state, of the same structure and shapes; None for the same.
        args: other args; None for the same.
    """
    _require_steps(solution)
    old, trajectory = solution._problem, solution._outcome.trajectory
    field = copy.copy(old.field)
    field.calls = 0
    field.args = field.args if args is None else args
    problem = dataclasses.replace(old, field=field, keep_stages=False)
    flat = solution._z0
    if z0 is not None:
        layout = Layout.of(z0)
        if (layout.shapes, layout.batch, layout.dtype) != (field.layout.shapes, field.layout.batch, field.layout.dtype):
            raise ValueError("z0 must have the structure, shapes and dtype of the solution's own initial state")
        flat = field.layout.copied(layout.pack(z0).to(layout.work_dtype))
    schedule = None
    if trajectory.interior is not None:
        schedule = Schedule(problem, trajectory.grid, trajectory.reached, trajectory.hits)
    with full_precision(flat.device):
        path = replay_all(problem, trajectory.grid, flat, trajectory.status == Status.SUCCESS, schedule)
    # What has no gradient is looked up there.
    trajectory = copy.copy(trajectory)
    trajectory.grid = trajectory.grid.with_states(path.states.detach())
    outcome = Outcome(
        trajectory=trajectory,
        final=path.final,
        interior=path.interior,
        error=None if path.error is None else functools.partial(_same, path.error),
        stiffness=None if path.stiffness is None else functools.partial(_same, path.stiffness),
        states=functools.partial(_same, path.states),
    )
    return Solution(problem, outcome, solution.ts, outputs(problem, outcome, flat, problem.times), flat)


def _require_steps(solution: Solution):
    """Raises ValueError if the solution's steps can't be made again one by one."""
    if not solution.solver.unrolls:
        raise ValueError(
            f"the steps of solver {solution.solver.name!r} can't be made again one by one, since each goes on from "
            "what those before it have learned; take solver='fixed_point' or one for ODEs"
        )


def _same(x):
    return x
