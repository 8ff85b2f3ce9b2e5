"""Rößler's stochastic Runge-Kutta methods of strong order 1.5, with embedded error estimates.

For a step of size h with increment W and space-time Lévy area H of the noise, the iterated integrals are

    χ₁ = (W² - h) / (2√h),    χ₂ = W/2 + H,    χ₃ = (W³ - 3hW) / (6h).

Source: Rößler, SIAM J. Numer. Anal. 48 (2010); the SOSRI and SOSRA families, with their coefficients and estimates:
Rackauckas & Nie, Stability-optimized high order methods (2018), and StochasticDiffEq.jl.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..brownian import Noise
from .base import Step
from .sde import DrivenField, SDESolver

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class SRITableau:
    """For diagonal or scalar Itô noise; checks itself when it is built.

    With k_i = f(t + c0_i h, X_i) and g_i = g(t + c1_i h, Y_i),

        X_i = z + h Σ_j a0_ij k_j + χ₂ Σ_j b0_ij g_j,    Y_i = z + h Σ_j a1_ij k_j + √h Σ_j b1_ij g_j,
        z(t + h) = z + h Σ α_i k_i + Σ (W β1_i + χ₁ β2_i + χ₂ β3_i + χ₃ β4_i) g_i.

    Attributes:
        a0, b0, a1, b1: strictly lower triangular rows, without the first (empty) ones.
        alpha, beta1, beta2, beta3, beta4, c0, c1: as above.
        source: where the numbers are from.
        pair: two stages (0-based) with equal c0, for the stiffness estimate, or None.
        stability_size: |h·λ| at which its stability ends on the negative real axis; None where nobody has said.
    """

    a0: Rows
    b0: Rows
    a1: Rows
    b1: Rows
    alpha: tuple[float, ...]
    beta1: tuple[float, ...]
    beta2: tuple[float, ...]
    beta3: tuple[float, ...]
    beta4: tuple[float, ...]
    c0: tuple[float, ...]
    c1: tuple[float, ...]
    source: str
    pair: tuple[int, int] | None = None
    stability_size: float | None = None

    def __post_init__(self):
        for row, c in ((self.a0, self.c0), (self.a1, self.c1)):
            for i, weights in enumerate(row, start=1):
                _close(sum(weights), c[i], f"row {i} of a", self.source)
        for name, total in (("alpha", 1.0), ("beta1", 1.0), ("beta2", 0.0), ("beta3", 0.0), ("beta4", 0.0)):
            _close(sum(getattr(self, name)), total, f"the sum of {name}", self.source)
        # The conditions of strong order 1.5 that one sum tells.
        across, beside = _sums(self.b0), _sums(self.b1)
        _close(_dot(self.alpha, self.c0), 0.5, "alpha·c0", self.source)
        _close(_dot(self.alpha, across), 1.0, "alpha·B0", self.source)
        _close(_dot(self.alpha, [x * x for x in across]), 1.5, "alpha·B0²", self.source)
        betas = self.beta1, self.beta2, self.beta3, self.beta4
        for i, (beta, values) in enumerate(zip(betas, ((0, 1, 1), (1, 0, 0), (0, -1, -1), (0, 0, 2)), strict=True), 1):
            for what, stage, value in zip(
                ("B1", "c1", "B1²"), (beside, self.c1, [x * x for x in beside]), values, strict=True
            ):
                _close(_dot(beta, stage), float(value), f"beta{i}·{what}", self.source)

    @property
    def abscissae(self) -> tuple[float, ...]:
        """c0, then c1."""
        return self.c0 + self.c1


@dataclass(frozen=True, eq=False)
class SRATableau:
    """For additive noise; checks itself when it is built.

    With k_i = f(t + c0_i h, X_i) and g_i = g(t + c1_i h),

        X_i = z + h Σ_j a0_ij k_j + Σ_j b0_ij g_j χ₂,    z(t + h) = z + h Σ α_i k_i + Σ g_i (W β1_i + χ₂ β2_i).

    Attributes: as `SRITableau`'s.
    """

    a0: Rows
    b0: Rows
    alpha: tuple[float, ...]
    beta1: tuple[float, ...]
    beta2: tuple[float, ...]
    c0: tuple[float, ...]
    c1: tuple[float, ...]
    source: str
    pair: tuple[int, int] | None = None
    stability_size: float | None = None

    def __post_init__(self):
        for i, weights in enumerate(self.a0, start=1):
            _close(sum(weights), self.c0[i], f"row {i} of a", self.source)
        for name, total in (("alpha", 1.0), ("beta1", 1.0), ("beta2", 0.0)):
            _close(sum(getattr(self, name)), total, f"the sum of {name}", self.source)
        _close(_dot(self.alpha, self.c0), 0.5, "alpha·c0", self.source)
        across = _sums(self.b0)
        _close(_dot(self.alpha, across), 1.0, "alpha·B0", self.source)
        _close(_dot(self.alpha, [x * x for x in across]), 1.5, "alpha·B0²", self.source)
        _close(_dot(self.beta1, self.c1), 1.0, "beta1·c1", self.source)
        _close(_dot(self.beta2, self.c1), -1.0, "beta2·c1", self.source)

    @property
    def abscissae(self) -> tuple[float, ...]:
        """c0, then c1."""
        return self.c0 + self.c1


def _close(x: float, y: float, what: str, source: str):
    if abs(x - y) > 1e-9:
        raise ValueError(f"inconsistent tableau ({source}): {what} is {x}, must be {y}")


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def _sums(rows: Rows) -> list[float]:
    return [0.0, *(sum(row) for row in rows)]


class Made(NamedTuple):
    """A step, and what its estimates are made of.

    Attributes:
        z: at its end. rough: the part of the update that β3 and β4 (β2 of an SRA tableau) make.
        slopes: k_i. inputs: X_i.
    """

    z: Tensor
    rough: Tensor
    slopes: list[Tensor]
    inputs: list[Tensor]


def sri(
    tableau: SRITableau, f: DrivenField, times: Sequence[Any], h: Tensor, z: Tensor, noise: Noise, first: tuple
) -> Made:
    """A step with an SRI tableau.

    Args:
        times: at the tableau's `abscissae`. h: [groups, 1]. noise: of the step.
        first: (f(t, z), g(t, z)).
    """
    size, flat = len(tableau.alpha), (lambda g: g) if f.diagonal else (lambda g: g[..., 0])
    w, root = noise.w, h.sqrt()
    over = torch.where(h == 0, 1.0, h)  # a sample that stands still has neither time nor noise
    two = 0.5 * w + noise.h
    slopes, noises, inputs = [first[0]], [flat(first[1])], [z]
    for i in range(1, size):
        x = _combine(z, h, tableau.a0[i - 1], slopes, two, tableau.b0[i - 1], noises)
        y = _combine(z, h, tableau.a1[i - 1], slopes, root, tableau.b1[i - 1], noises)
        slopes.append(f(times[i], x))
        noises.append(flat(f.diffusion(times[size + i], y)))
        inputs.append(x)
    one, three = (w * w - h) / (2 * over.sqrt()), (w * w * w - 3 * h * w) / (6 * over)
    rough = two * _weighted(tableau.beta3, noises) + three * _weighted(tableau.beta4, noises)
    smooth = w * _weighted(tableau.beta1, noises) + one * _weighted(tableau.beta2, noises)
    return Made(z + h * _weighted(tableau.alpha, slopes) + rough + smooth, rough, slopes, inputs)


def sra(
    tableau: SRATableau, f: DrivenField, times: Sequence[Any], h: Tensor, z: Tensor, noise: Noise, first: tuple
) -> Made:
    """A step with an SRA tableau; arguments as `sri`'s."""
    size, two = len(tableau.alpha), 0.5 * noise.w + noise.h
    # The diffusion is of t alone: it can be evaluated at z at once.
    noises = [first[1] if c == 0 else f.diffusion(times[size + i], z) for i, c in enumerate(tableau.c1)]
    slopes, inputs = [first[0]], [z]
    for i in range(1, size):
        kick = f.times_noise(_weighted(tableau.b0[i - 1], noises), two)
        x = z + h * _weighted(tableau.a0[i - 1], slopes) + kick
        slopes.append(f(times[i], x))
        inputs.append(x)
    rough = f.times_noise(_weighted(tableau.beta2, noises), two)
    smooth = f.times_noise(_weighted(tableau.beta1, noises), noise.w)
    return Made(z + h * _weighted(tableau.alpha, slopes) + rough + smooth, rough, slopes, inputs)


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Σ weights_i values_i, of the first values if there are more; leaves zeros out."""
    total = None
    for weight, value in zip(weights, values, strict=False):
        if weight:
            total = value * weight if total is None else torch.add(total, value, alpha=weight)
    return torch.zeros_like(values[0]) if total is None else total


def _combine(z: Tensor, h: Tensor, a: Sequence[float], slopes, chi: Tensor, b: Sequence[float], noises) -> Tensor:
    if any(a):
        z = z + h * _weighted(a, slopes)
    return z + chi * _weighted(b, noises) if any(b) else z


def column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as `VectorField.times` takes them, [numbers, 1]."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)[:, None]
    return _column(values, dtype, device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for the next solve must not be an inference tensor
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return transforms.physical(torch.tensor(values, dtype=torch.float64).to(device=device, dtype=dtype))[:, None]


class Rossler(SDESolver):
    """A method with a tableau and its embedded error estimate.

    The estimate is literally the reference's: h·Σ k_i plus the part of the update that β3 and β4 (of an SRA tableau,
    β2) make. That is O(h), much more than the error of a step: tolerances of 1e-2 are small ones here.

    Args:
        name: what `solve(solver=...)` calls it.
        tableau: its coefficients.
    """

    error_order = 1
    sde_types = ("ito",)
    uses_area = True

    def __init__(self, name: str, tableau: SRITableau | SRATableau):
        self.name, self.tableau = name, tableau
        self._make = sri if isinstance(tableau, SRITableau) else sra
        self.orders = {"diagonal": 1.5, "scalar": 1.5} if self._make is sri else {"additive": 1.5}
        self.order = 1.5
        self.reports_stiffness, self.stability_size = tableau.pair is not None, tableau.stability_size
        self.calls_per_step = len(tableau.abscissae)

    def attempt(
        self,
        f: DrivenField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `SDESolver.attempt`."""
        tableau, h = self.tableau, dt[:, None]
        times = f.times(t, column(tableau.abscissae, t.dtype, t.device), dt)
        first = f(times[0], z) if slope is None else slope, f.diffusion(times[0], z)
        made = self._make(tableau, f, times, h, z, f.noise, first)
        if not lens:
            return Step(made.z, None, None, None, (z, made.z))
        error = h * _weighted((1.0,) * len(made.slopes), made.slopes) + made.rough
        pair = None
        if tableau.pair is not None:
            i, j = tableau.pair
            pair = h * made.slopes[j], h * made.slopes[i], made.inputs[j], made.inputs[i]
        return Step(made.z, error, pair, None, (z, made.z))
