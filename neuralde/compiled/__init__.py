"""Solves as compiled programs: `solve(compile=True)`.

`programs` compiles functions with loops in them, and knows what they may be given; `engine` remembers what was compiled
for an f. Each kind of solve has an engine of its own: `runge_kutta` that of the explicit Runge-Kutta methods,
`equilibrium` that of the iterations for steady states.
"""

from __future__ import annotations

from ..problem import Problem
from .engine import Engine, remembered
from .equilibrium import EquilibriumEngine
from .programs import Unsupported, warn
from .records import Ran
from .runge_kutta import RungeKuttaEngine

__all__ = ["Engine", "EquilibriumEngine", "Ran", "Unsupported", "engine", "warn"]


def engine(problem: Problem) -> Engine | None:
    """What solves the problem compiled; None, after a warning, where it has to be solved as ever."""
    try:
        return remembered(RungeKuttaEngine if problem.rest is None else EquilibriumEngine, problem)
    except Unsupported as cause:
        warn(problem.field.given, cause)
        return None
