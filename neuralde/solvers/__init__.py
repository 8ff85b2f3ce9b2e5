"""Solvers, and the registry that gives them names."""

from __future__ import annotations

from ..registry import Registry
from . import tableaus
from .base import Solver, Step
from .runge_kutta import RungeKutta, Tableau

__all__ = ["SOLVERS", "RungeKutta", "Solver", "Step", "Tableau", "get", "register"]

SOLVERS: Registry[Solver] = Registry("solver", Solver)
register, get = SOLVERS.register, SOLVERS.find

# dopri5's exponents are those of Hairer's DOPRI5, which OrdinaryDiffEq.jl keeps for it.
for _name, _tableau, _adaptive, *_exponents in (
    ("euler", tableaus.EULER, False),
    ("midpoint", tableaus.MIDPOINT, False),
    ("heun", tableaus.HEUN, False),
    ("ralston", tableaus.RALSTON, False),
    ("rk4", tableaus.RK4, False),
    ("bs3", tableaus.BS3, True),
    ("dopri5", tableaus.DOPRI5, True, (0.17, 0.04)),
    ("tsit5", tableaus.TSIT5, True),
    ("dopri8", tableaus.DOPRI8, True),
):
    register(RungeKutta(_name, _tableau, _adaptive, *_exponents))
