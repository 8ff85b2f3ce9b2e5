"""Solvers, and the registry that gives them names."""

from __future__ import annotations

from ..equations import SDE
from ..registry import Registry
from . import doubling, sde_tableaus, tableaus
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
from .rossler import Rossler, SRATableau, SRITableau
from .runge_kutta import RungeKutta, Tableau
from .sde import DrivenField, SDESolver
from .switching import Switching

__all__ = [
    "SDE_SOLVERS",
    "SOLVERS",
    "Anderson",
    "Auto",
    "Broyden",
    "DrivenField",
    "FixedPoint",
    "Foreign",
    "ImplicitEuler",
    "Iteration",
    "Newton",
    "Past",
    "Rosenbrock",
    "RosenbrockTableau",
    "Rossler",
    "RungeKutta",
    "SDESolver",
    "SRATableau",
    "SRITableau",
    "Solver",
    "Step",
    "Switching",
    "Tableau",
    "VectorField",
    "Work",
    "for_ode",
    "for_sde",
    "get",
    "register",
    "speaks_torchdyn",
]

SOLVERS: Registry[Solver] = Registry("solver", Solver)
register = SOLVERS.register
# A registry of its own: torchsde's heun and midpoint are others than those for ODEs.
SDE_SOLVERS: Registry[SDESolver] = Registry("solver", SDESolver, {"euler": "euler_maruyama", "em": "euler_maruyama"})


def get(solver: str | Solver) -> Solver:
    """The solver of that name, the solver itself, or a solver object of torchdyn's as one of ours.

    Raises:
        ValueError: nothing has that name; the message has the nearest one.
        TypeError: neither a name nor a solver, or a solver of torchdyn's that has no step of its own.
    """
    if isinstance(solver, str) and solver in SDE_SOLVERS and solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is for SDEs: solve(nde.SDE(drift, diffusion), ...); for ODEs, take tsit5")
    return Foreign(solver) if speaks_torchdyn(solver) else SOLVERS.find(solver)


def for_ode(solver: str | Solver) -> Solver:
    """As `get`, of solvers that have steps in time.

    Raises:
        ValueError, TypeError: as `get`; or it is an iteration for steady states.
    """
    solver = get(solver)
    if solver.discrete:
        able = ", ".join(x.name for x in SOLVERS.values() if not x.discrete)
        raise ValueError(
            f"solver {solver.name!r} finds steady states (nde.SteadyState, nde.DeepEquilibrium), it has no steps in "
            f"time; on a horizon take one of {able}"
        )
    return solver


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

for _name, _sde_tableau in (
    ("sosri", sde_tableaus.SOSRI),
    ("sosri2", sde_tableaus.SOSRI2),
    ("sosra", sde_tableaus.SOSRA),
    ("sosra2", sde_tableaus.SOSRA2),
    ("sra1", sde_tableaus.SRA1),
):
    SDE_SOLVERS.register(Rossler(_name, _sde_tableau))
for _method in doubling.METHODS:
    SDE_SOLVERS.register(_method)

_DEFAULT = ("sosri2", "sosra2", "midpoint", "euler_maruyama")


def for_sde(solver: str | SDESolver | None, equation: SDE, adaptive: bool = True) -> SDESolver:
    """The method of that name, or the method itself, for an equation.

    Args:
        solver: None for the first of sosri2, sosra2, midpoint and euler_maruyama that suits the equation.
        adaptive: whether the steps are to be adaptive.

    Raises:
        ValueError: there is no such solver of SDEs, or it does not suit the equation; the message has those that do.
        TypeError: neither a name nor a solver of SDEs.
    """
    if solver is None:
        solver = next(name for name in _DEFAULT if SDE_SOLVERS[name].suits(equation))
    suitable = [name for name, x in SDE_SOLVERS.items() if x.suits(equation)]
    kind = f"{'an Itô' if equation.sde_type == 'ito' else 'a Stratonovich'} SDE with {equation.noise_type} noise"
    if isinstance(solver, Solver) and not isinstance(solver, SDESolver):
        raise TypeError(f"solver {solver.name!r} is not for SDEs; for {kind} there are: {', '.join(suitable)}")
    if isinstance(solver, str) and solver in SOLVERS and solver not in SDE_SOLVERS:
        raise ValueError(f"solver {solver!r} is for ODEs; for {kind} there are: {', '.join(suitable)}")
    found = SDE_SOLVERS.find(solver)
    if not found.suits(equation):
        raise ValueError(
            f"solver {found.name!r} does not solve {kind}: it takes {', '.join(found.orders)} noise, "
            f"{' and '.join(found.senses)}; these do: {', '.join(suitable)}"
        )
    return found.of(equation, adaptive)
