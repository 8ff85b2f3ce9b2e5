"""Solvers, and the registry that gives them names."""

from __future__ import annotations

from ..registry import Registry
from . import tableaus
from .anderson import Anderson
from .auto import Auto
from .base import Past, Solver, Step, VectorField, Work
from .broyden import Broyden
from .foreign import Foreign, speaks_torchdyn
from .implicit_euler import ImplicitEuler
from .iteration import FixedPoint, Iteration
from .multistep import VCAB3
from .newton import Newton
from .rosenbrock import Rosenbrock, RosenbrockTableau
from .runge_kutta import RungeKutta, Tableau
from .switching import Switching

__all__ = [
    "SOLVERS",
    "Anderson",
    "Auto",
    "Broyden",
    "FixedPoint",
    "Foreign",
    "ImplicitEuler",
    "Iteration",
    "Newton",
    "Past",
    "Rosenbrock",
    "RosenbrockTableau",
    "RungeKutta",
    "Solver",
    "Step",
    "Switching",
    "Tableau",
    "VectorField",
    "Work",
    "get",
    "register",
    "speaks_torchdyn",
]

SOLVERS: Registry[Solver] = Registry("solver", Solver)
register = SOLVERS.register


def get(solver: str | Solver) -> Solver:
    """The solver of that name, the solver itself, or a solver object of torchdyn's as one of ours.

    Raises:
        ValueError: nothing has that name; the message has the nearest one.
        TypeError: neither a name nor a solver, or a solver of torchdyn's that has no step of its own.
    """
    return Foreign(solver) if speaks_torchdyn(solver) else SOLVERS.find(solver)


# dopri5's exponents are those of Hairer's DOPRI5, which OrdinaryDiffEq.jl keeps for it.
for _name, _tableau, _adaptive, *_exponents in (
    ("euler", tableaus.EULER, False),
    ("midpoint", tableaus.MIDPOINT, False),
    ("heun", tableaus.HEUN, False),
    ("ralston", tableaus.RALSTON, False),
    ("heun3", tableaus.HEUN3, False),
    ("rk4", tableaus.RK4, False),
    ("rk4_38", tableaus.RK4_38, False),
    ("bs3", tableaus.BS3, True),
    ("dopri5", tableaus.DOPRI5, True, (0.17, 0.04)),
    ("tsit5", tableaus.TSIT5, True),
    ("dopri8", tableaus.DOPRI8, True),
):
    register(RungeKutta(_name, _tableau, _adaptive, *_exponents))

register(ImplicitEuler())
for _name, _rosenbrock in (("rosenbrock23", tableaus.ROSENBROCK23), ("rodas5p", tableaus.RODAS5P)):
    register(Rosenbrock(_name, _rosenbrock))
register(VCAB3(get("bs3")))
register(Auto("auto", get("tsit5"), get("rodas5p")))
for _iteration in (FixedPoint(), Anderson(), Broyden(), Newton()):
    register(_iteration)
