"""Rosenbrock methods: implicit for the Jacobian's part of f, without iterations. Linear systems are all they solve.

For a step from (t, z) with J = ∂f/∂z, T = ∂f/∂t there and one matrix W = I - γ·dt·J for all stages,

    W u_i = γ·dt·(f(t + c_i·dt, z + Σ_j a_ij u_j) + d_i·dt·T) + γ Σ_j C_ij u_j,
    z(t + θ·dt) = z + Σ_i b_i(θ) u_i,    error = Σ_i e_i u_i.

Multiplied by γ·dt as it is, the form of Hairer & Wanner (Solving ODEs II, IV.7) holds for dt = 0 as well: a sample that
stands still gets a step of zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import transforms
from .base import Step, VectorField, Work
from .implicit import Implicit, RealField, combine, factorize, stiffness, to_complex, to_real
from .linearize import linearize


@dataclass(frozen=True, eq=False)
class RosenbrockTableau:
    """The coefficients of a Rosenbrock method; checks itself when it is built.

    Attributes:
        gamma: γ.
        a, couplings: strictly lower triangular rows a_ij and C_ij, without the first (empty) one.
        b: weights of the solution.
        c: abscissae, the first one 0.
        d: weights of ∂f/∂t.
        order: p.
        error: e_i of the embedded estimate.
        error_order: q, the estimate being O(dt^q) on one step.
        interpolant: rows b_i(θ) as coefficients of θ, θ², ...
        interpolant_order: q, its error being O(dt^(q+1)) on one step.
        source: where the numbers are from.
    """

    gamma: float
    a: tuple[tuple[float, ...], ...]
    couplings: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    d: tuple[float, ...]
    order: int
    error: tuple[float, ...]
    error_order: int
    interpolant: tuple[tuple[float, ...], ...]
    interpolant_order: int
    source: str

    def __post_init__(self):
        def close(x, y, what):
            if abs(x - y) > 1e-10:
                raise ValueError(f"inconsistent tableau ({self.source}): {what} is {x}, must be {y}")

        stages = len(self.b)
        if {len(self.c), len(self.d), len(self.error), len(self.interpolant)} != {stages}:
            raise ValueError(f"inconsistent tableau ({self.source}): b, c, d, error and interpolant differ in length")
        for name in ("a", "couplings"):
            if [len(row) for row in getattr(self, name)] != list(range(1, stages)):
                raise ValueError(f"inconsistent tableau ({self.source}): {name} is not strictly lower triangular")
        # u = Γk, where k_i are the slopes of the method's direct form and Γ⁻¹ = I/γ - C.
        gammas = self._inverse()
        alphas = [_times(row, gammas) for row in ((), *self.a)]
        b, e = _times(self.b, gammas), _times(self.error, gammas)
        for i in range(stages):
            close(sum(alphas[i]), self.c[i], f"the sum of row {i} of a, times Γ,")
            close(sum(gammas[i]), self.d[i], f"the sum of row {i} of Γ")
            close(sum(self.interpolant[i]), self.b[i], f"the interpolant's weight {i} at θ = 1")
        close(sum(b), 1.0, "the sum of the weights")
        close(sum(e), 0.0, "the sum of the error weights")
        close(sum(w * (c + d) for w, c, d in zip(b, self.c, self.d, strict=True)), 0.5, "b·(c + d)")

    def _inverse(self) -> list[list[float]]:
        """Γ."""
        rows: list[list[float]] = []
        for i in range(len(self.b)):
            carried = _times(self.couplings[i - 1] if i else (), rows)
            rows.append([self.gamma * x for x in carried[:i]] + [self.gamma] + [0.0] * (len(self.b) - i - 1))
        return rows


def _times(row, matrix: list[list[float]]) -> list[float]:
    """A row (of any length up to the matrix's) times a matrix."""
    columns = len(matrix[0]) if matrix else 0
    return [sum(w * line[j] for w, line in zip(row, matrix, strict=False)) for j in range(columns)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for the next solve must not be an inference tensor
def _abscissae(tableau: RosenbrockTableau, dtype: torch.dtype, device: torch.device) -> Tensor:
    """c, [stages, 1]."""
    return transforms.physical(torch.tensor(tableau.c, dtype=torch.float64).to(device=device, dtype=dtype)[:, None])


class Rosenbrock(Implicit):
    """The Rosenbrock method of a tableau.

    Args:
        name: what `solve(solver=...)` calls it.
        tableau: its coefficients.
    """

    adaptive = True
    fsal = False

    def __init__(self, name: str, tableau: RosenbrockTableau):
        self.name, self.tableau = name, tableau
        self.order, self.error_order = tableau.order, tableau.error_order
        self.interpolant_order = tableau.interpolant_order
        self.calls_per_step = len(tableau.b)
        # Without the error estimate, the last stages may have nothing to do.
        self._needed = max(i for i, row in enumerate(tableau.interpolant) if any(row)) + 1

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `Solver.attempt`. `slope` is of no use: it comes with the Jacobian."""
        tableau, as_complex = self.tableau, z.is_complex()
        f, x = (RealField(f), to_real(z)) if as_complex else (f, z)
        back = to_complex if as_complex else _same
        here = linearize(f, t, x)
        times = f.times(t, _abscissae(tableau, t.dtype, t.device), dt)
        h = dt[:, None]
        scaled = tableau.gamma * h
        solve = factorize(here.jacobian, scaled)
        stages = len(tableau.b) if lens else self._needed
        slope, increments = here.value, []
        for i in range(stages):
            carried = None
            if i:
                slope = f(times[i], x + combine(tableau.a[i - 1], increments))
                carried = combine(tableau.couplings[i - 1], increments)
            right = scaled * (slope + (tableau.d[i] * h) * here.rate if tableau.d[i] else slope)
            increments.append(solve(right if carried is None else torch.add(right, carried, alpha=tableau.gamma)))

        def coefficients():
            powers = zip(*tableau.interpolant[:stages], strict=True)
            return [back(combine(weights, increments)) for weights in powers]

        error = size = None
        if lens:
            error = back(combine(tableau.error, increments))
            size = stiffness(here, len(t), as_complex)
        z_end = back(x + combine(tableau.b[:stages], increments))
        work = Work(stages, jacobians=1, factorizations=1, linear_solves=stages)
        return Step(z_end, error, None, None, (z, coefficients), size, work)


def _same(x: Tensor) -> Tensor:
    return x
