"""Solves as compiled programs: `solve(compile=True)`.

`programs` compiles functions with loops in them, and knows what they may be given; `hoisting` moves what never changes
out of the loops; `engine` remembers what was compiled for an f. Each kind of solve has an engine of its own. `stepping`
has what solves in steps have in common, `runge_kutta` the explicit Runge-Kutta methods, `sde` the SDEs, with `bridge`
for their noise, and `equilibrium` the iterations for steady states.
"""

from __future__ import annotations

from ..problem import Problem
from .engine import Engine, remembered
from .equilibrium import EquilibriumEngine
from .programs import Unsupported, warn
from .records import Ran
from .runge_kutta import RungeKuttaEngine
from .sde import SDEEngine

__all__ = ["Engine", "EquilibriumEngine", "Ran", "Unsupported", "engine", "warn"]


def engine(problem: Problem) -> Engine | None:
    """What solves the problem compiled; None, after a warning, where it has to be solved as ever."""
    try:
        kind = EquilibriumEngine if problem.rest is not None else SDEEngine if problem.noisy else RungeKuttaEngine
        return remembered(kind, problem)
    except Unsupported as cause:
        warn(problem.field.given, cause)
        return None
