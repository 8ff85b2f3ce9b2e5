"""The papers' linear examples: how slowly the simplest map comes to rest, and how fast the equation behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..equations import SteadyState
from ..solve import solve
from ..termination import Termination

ALPHAS = (-0.9, 0.5, 0.9, 0.99)
METHODS = ("fixed_point", "anderson", "broyden", "tsit5", "vcab3")


def steps_to_rest(
    alphas: Sequence[float] = ALPHAS, methods: Sequence[str] = METHODS, tolerance: float = 1e-3
) -> dict[float, dict[str, int]]:
    """Accepted steps until u ← α u from u = 1 is within a tolerance of its steady state 0, discrete and continuous.

    Args:
        alphas: of the map, other than 1. methods: solvers. tolerance: of |u|.

    Returns:
        alpha -> solver -> steps.

    Source: Pal et al. 2023, "Continuous deep equilibrium models", section 3 and figure 3.
    """
    table = {}
    for alpha in alphas:
        equation = SteadyState(lambda u, alpha=alpha: alpha * u)
        start = torch.ones(1, 1, dtype=torch.float64)
        # The residual is (α - 1) u.
        near = Termination("absolute", atol=tolerance * abs(alpha - 1.0))
        given = {"termination": near, "rtol": 1e-2 * tolerance, "atol": 1e-1 * tolerance, "max_steps": 10000}
        table[alpha] = {name: int(solve(equation, start, solver=name, **given).depth) for name in methods}
    return table
