"""Solvers, and the registry that gives them names."""

from __future__ import annotations

import difflib

from . import tableaus
from .base import Solver, Step
from .runge_kutta import RungeKutta, Tableau

__all__ = ["SOLVERS", "RungeKutta", "Solver", "Step", "Tableau", "get", "register"]

SOLVERS: dict[str, Solver] = {}


def register(solver: Solver) -> Solver:
    """Adds a solver under its name, so that `solve(solver=name)` and the tests over all solvers find it.

    Raises:
        ValueError: the name is taken.
    """
    if solver.name in SOLVERS:
        raise ValueError(f"a solver named {solver.name!r} is registered already; choose another name")
    SOLVERS[solver.name] = solver
    return solver


def get(solver: str | Solver) -> Solver:
    """The solver of that name, or the solver itself.

    Raises:
        ValueError: no solver has that name; the message has the nearest one.
        TypeError: neither a name nor a solver.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise TypeError(f"solver must be a name or a neuralde solver, got {type(solver).__name__}")
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver.lower(), SOLVERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown solver {solver!r}; {hint}Known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[solver]


for _name, _tableau, _adaptive in (
    ("euler", tableaus.EULER, False),
    ("midpoint", tableaus.MIDPOINT, False),
    ("heun", tableaus.HEUN, False),
    ("ralston", tableaus.RALSTON, False),
    ("rk4", tableaus.RK4, False),
    ("bs3", tableaus.BS3, True),
    ("dopri5", tableaus.DOPRI5, True),
    ("tsit5", tableaus.TSIT5, True),
    ("dopri8", tableaus.DOPRI8, True),
):
    register(RungeKutta(_name, _tableau, _adaptive))
