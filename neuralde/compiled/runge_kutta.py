"""Explicit Runge-Kutta methods, compiled."""

from __future__ import annotations

from torch.utils import _pytree as pytree

from ..problem import Problem
from ..solvers.runge_kutta import RungeKutta
from .stepping import SteppingEngine, closes


class RungeKuttaEngine(SteppingEngine):
    """The programs of a solve of an ODE by an explicit Runge-Kutta method."""

    _shrinks = _fixed = True

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        like = problem.start.new_zeros(1, dtype=problem.field.layout.work_dtype)
        solver = problem.solver.bound(like, problem.start)
        super().__init__(problem, tree, solver, closes(problem) or solver.fsal, 2 + solver.calls_per_step)

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        solver = problem.solver
        return [
            (not isinstance(solver, RungeKutta), f"solver {solver.name!r} is not an explicit Runge-Kutta method"),
            *SteppingEngine.refusals(problem),
            (problem.stops is not None, "it has jump_times or step_times"),
            ((problem.dt_min, problem.dt_max) != (None, None), "it has dt_min or dt_max"),
        ]
