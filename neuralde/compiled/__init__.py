"""Solves as compiled programs: `solve(compile=True)`.

`programs` compiles functions with loops in them, and knows what they may be given; `hoisting` moves what never changes
out of the loops; `engine` remembers what was compiled for an f. Each kind of solve has an engine of its own. `stepping`
has what solves in steps have in common, `runge_kutta` the explicit Runge-Kutta methods, `sde` the SDEs, with `bridge`
for their noise, and `settling` the ODEs that are followed to their steady states; `equilibrium` has the iterations for
these.
"""

from __future__ import annotations

from ..problem import Problem
from .engine import Engine, refusals, remembered
from .equilibrium import EquilibriumEngine, SteadyEngine
from .programs import Unsupported, warn
from .records import Ran
from .runge_kutta import RungeKuttaEngine
from .sde import SDEEngine
from .settling import SettlingEngine

__all__ = ["Engine", "Ran", "SteadyEngine", "Unsupported", "engine", "refused", "warn"]


def engine(problem: Problem) -> Engine | None:
    """What solves the problem compiled; None, after a warning, where it has to be solved as ever."""
    try:
        return remembered(_kind(problem), problem)
    except Unsupported as cause:
        warn(problem.field.given, cause)
        return None


def refused(problem: Problem) -> bool:
    """Whether it is known that no engine solves the problem."""
    return any(so for so, _ in (*refusals(problem), *_kind(problem).refusals(problem)))


def _kind(problem: Problem) -> type[Engine]:
    if problem.rest is not None:
        return EquilibriumEngine if problem.solver.discrete else SettlingEngine
    return SDEEngine if problem.noisy else RungeKuttaEngine
