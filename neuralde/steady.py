"""A solve for a steady state: what `solve` does with a `SteadyState`."""

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from . import adjoints, compiled, parametrized, solvers, transforms
from . import control as _control
from . import termination as _termination
from .adjoints import Adjoint
from .control import StepControl
from .equations import SteadyState
from .equilibrium import Equilibrium
from .errors import NeuralDEError, NotConverged, SolveWarning, Status
from .field import Field, full_precision
from .problem import Problem
from .solvers import Solver
from .state import Layout
from .termination import Rest, Unrolled, kept
from .unsettled import unsettled

MAX_STEPS, MAX_ITERATIONS = 4096, 1000
# Short names of adjoints, which only here can't be taken for something else.
_ITERATED = {"anderson": "implicit-anderson", "broyden": "implicit-broyden"}
_LARGEST = 1e-3  # times the largest number there is: a step size that overflows is not brought back by any factor


def solve(
    equation: SteadyState,
    z0,
    t,
    solver,
    tolerances,
    control,
    adjoint,
    args,
    steps: dict,
    unknown: dict,
    observer,
    compile,
    dense,
    on_failure,
    termination,
) -> Equilibrium:
    """See `neuralde.solve`; arguments as it has them, those that are of horizons only in `unknown`."""
    for name, value in unknown.items():
        if value is not None:
            raise ValueError(f"{name} is of solves on a horizon; a solve for a steady state has no use for it")
    if transforms.active():
        raise NeuralDEError(
            "torch.func transforms and forward-mode AD can't go through a solve for a steady state; unroll it on a "
            "horizon: solve(equation.ode, z0, (0, steps), solver='euler', dt0=1.0, adjoint='direct')"
        )
    if compile and adjoint == "direct":
        compiled.warn(equation.f, compiled.Unsupported("adjoint='direct' is not compiled"))
    layout = Layout.of(z0)
    solver, control, adjoint, dt0 = chosen(solver, control, adjoint, steps["dt0"])
    max_steps = steps["max_steps"]
    if max_steps is None:
        max_steps = MAX_ITERATIONS if solver.discrete else MAX_STEPS
    bounds = steps["dt_min"], steps["dt_max"]
    _control.check_max_steps(max_steps)
    _control.check_sizes(dt0, *bounds)
    if not control.adaptive:
        _control.refuse_bounds(*bounds)
    elif bounds[1] is None:
        bounds = bounds[0], max(_LARGEST * torch.finfo(layout.time_dtype).max, bounds[0] or 0.0)
    joint = not control.per_sample
    norm = _control.norm(*tolerances, control, layout)
    settling = _termination.get(termination).within(norm.rtol, norm.atol)
    flat = layout.pack_start(z0)
    problem = Problem(
        field=Field(equation.ode, layout, args, joint, solver.linearizes),
        solver=solver,
        control=control,
        times=_horizon(t, layout, joint),
        norm=norm,
        dt0=None if dt0 is None else float(dt0),
        max_steps=max_steps,
        keep_stages=dense and not solver.discrete,
        dt_min=bounds[0],
        dt_max=bounds[1],
        observer=observer,
        keep=None if dense or adjoint.name == "direct" else 0,
        rest=Rest(settling, joint),
        compile=compile,
    )
    with full_precision(layout.device), parametrized.once(equation.f):
        outcome = adjoint.solve(problem, flat)
    _report(problem, outcome.trajectory, on_failure)
    return Equilibrium(problem, outcome, flat)


def chosen(
    solver: str | Solver, control: str | StepControl, adjoint: str | Adjoint, dt0: float | None
) -> tuple[Solver, StepControl, Adjoint, float | None]:
    """What these options of a solve for a steady state name: as `neuralde.solve.chosen`, and the size of the steps.

    Raises:
        TypeError, ValueError: there is no such thing, or they don't go together.
    """
    solver, control = solvers.get(solver), _control.get(control)
    adjoint = adjoints.get(_ITERATED.get(adjoint, adjoint) if isinstance(adjoint, str) else adjoint)
    if not adjoint.of_steady:
        able = ", ".join(repr(x.name) for x in adjoints.ADJOINTS.values() if x.of_steady)
        raise ValueError(
            f"adjoint {adjoint.name!r} differentiates solutions on a finite horizon; for a steady state take one of "
            f"{able}"
        )
    if adjoint.of_horizons and not solver.unrolls:
        able = ", ".join(repr(x.name) for x in adjoints.ADJOINTS.values() if x.of_steady and not x.of_horizons)
        raise ValueError(
            f"adjoint {adjoint.name!r} differentiates the steps of the solve one by one, which those of solver "
            f"{solver.name!r} can't be; take one of {able}, or solver='fixed_point' or one for ODEs"
        )
    if solver.discrete:
        if dt0 is not None:
            raise ValueError(
                f"dt0 is of solvers with steps in time, and solver {solver.name!r} has none; damping is an option of "
                "nde.solvers.FixedPoint, beta one of nde.solvers.Anderson"
            )
        dt0 = solver.step_size
    if control.adaptive and not solver.adaptive:
        control = replace(control, adaptive=False)
    if not control.adaptive and dt0 is None:
        raise ValueError(f"dt0 is needed: solver {solver.name!r} takes fixed steps, of size dt0; pass e.g. dt0=0.5")
    if control.adaptive and solver.error_order is None:
        raise ValueError(f"solver {solver.name!r} has no error estimate; use StepControl(adaptive=False) with dt0")
    adjoint.require(solver, control, dt0)
    return solver, control, adjoint, dt0


def _horizon(t, layout: Layout, joint: bool) -> Tensor:
    """Where the solve starts and where it ends at the latest, [2, groups]."""
    if t is None:
        bounds = (0.0, math.inf)
    else:
        bounds = (0.0, t) if isinstance(t, numbers.Real) and not isinstance(t, bool) else t
        fits = isinstance(bounds, tuple | list) and len(bounds) == 2
        if not (fits and all(isinstance(x, numbers.Real) for x in bounds)):
            raise TypeError(f"t must be a number, (t0, t1) or None for a steady state, got {t!r}")
        if not (math.isfinite(bounds[0]) and bounds[1] > bounds[0]):
            raise ValueError(f"t must end after it starts, got {t!r}")
    times = torch.tensor(bounds, dtype=layout.time_dtype, device=layout.device)[:, None]
    return times if joint else times.expand(-1, layout.batch)


def _report(problem: Problem, trajectory, on_failure: str):
    if on_failure == "ignore" or trajectory.complete:
        return
    rest, batch = problem.rest, problem.field.layout.batch
    status = trajectory.status
    if isinstance(rest.termination, Unrolled):  # only who was lost did not get where it should
        status = torch.where(kept(status), int(Status.SUCCESS), status)
        if not bool(status.any()):
            return
    figures = (status, rest.residual, trajectory.reached, trajectory.counts.accepted, problem.end)
    figures, precision = (x.expand(batch) for x in figures), problem.field.precision
    error = unsettled(*figures, rest.termination, problem.joint, problem.solver, precision)
    if on_failure == "raise":
        raise error
    warnings.warn(_told(problem.field.given, error), SolveWarning, stacklevel=5)


_TOLD: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # the advice that the user of an f has had


def _told(f, error: NotConverged) -> str:
    """The whole message, or what happened where all of its advice was given before: a training has many steps."""
    try:
        told = _TOLD.setdefault(f, set())
    except TypeError:  # can't be referred to weakly
        return str(error)
    if not told.issuperset(error.advice):
        told.update(error.advice)
        return str(error)
    return f"{error.what}\n(What to try was said before.)"
