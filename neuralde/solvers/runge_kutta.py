"""Explicit Runge-Kutta methods: a method is a tableau, the arithmetic is written once.

For a step from (t, z) with slopes k_i = f(t + c_i·dt, y_i) and increments d_i = dt·k_i,

    y_i = z + Σ_j a_ij d_j,    z(t + θ·dt) = z + Σ_i b_i(θ) d_i,    error = Σ_i e_i d_i,

every line is one row of coefficients times the stack [z, d_1, ..., d_s]: one pass over one buffer.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import transforms
from .base import Solver, Step, VectorField
from .hermite import weighted


@dataclass(frozen=True, eq=False)
class Tableau:
    """A Butcher tableau with its error estimate and interpolant; checks itself when it is built.

    Attributes:
        a: strictly lower triangular rows, without the first (empty) one.
        b: weights of the solution.
        c: abscissae, the first one 0.
        order: p.
        error: e_i of the embedded estimate, or None.
        error_order: q, the estimate being O(dt^q) on one step.
        interpolant: rows b_i(θ) as coefficients of θ, θ², ...; None means cubic Hermite interpolation.
        interpolant_order: q, its error being O(dt^(q+1)) on one step.
        pair: two stages (0-based) with equal abscissae, for the stiffness estimate, or None.
        source: where the numbers are from.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    source: str
    error: tuple[float, ...] | None = None
    error_order: int | None = None
    interpolant: tuple[tuple[float, ...], ...] | None = None
    interpolant_order: int = 3
    pair: tuple[int, int] | None = None

    def __post_init__(self):
        def close(x, y, what):
            if abs(x - y) > 1e-11:
                raise ValueError(f"inconsistent tableau ({self.source}): {what} is {x}, must be {y}")

        if not len(self.b) == len(self.c) == len(self.a) + 1:
            raise ValueError(f"inconsistent tableau ({self.source}): a, b and c differ in length")
        for i, row in enumerate(self.a, start=1):
            if len(row) != i:
                raise ValueError(f"inconsistent tableau ({self.source}): row {i} of a has {len(row)} entries")
            close(sum(row), self.c[i], f"the sum of row {i} of a")
        close(sum(self.b), 1.0, "the sum of b")
        if self.order >= 2:
            close(sum(b * c for b, c in zip(self.b, self.c, strict=True)), 0.5, "b·c")
        if self.error is not None:
            close(sum(self.error), 0.0, "the sum of the error weights")
        if self.interpolant is not None:
            for i, row in enumerate(self.interpolant):
                close(sum(row), self.b[i], f"the interpolant's weight {i} at θ = 1")
        if self.pair is not None:
            close(self.c[self.pair[0]], self.c[self.pair[1]], "the abscissa of the stiffness pair")

    @property
    def fsal(self) -> bool:
        """Whether the last stage is the slope at the step's end: first same as last."""
        return bool(self.a) and self.a[-1] == self.b[:-1] and self.b[-1] == 0.0

    @property
    def stages(self) -> int:
        """Number of slopes, the FSAL one included."""
        return len(self.b)

    @functools.cached_property
    def stability_size(self) -> float:
        """Largest x for which |R(-y)| ≤ 1 for all 0 ≤ y ≤ x, R being the method's stability function.

        Tsit5's is 3.5068, dopri5's 3.3066: the constants that OrdinaryDiffEq.jl divides its stiffness estimate by.
        """
        # R(y) = 1 + y b·(I - yA)⁻¹1, a polynomial with coefficients 1, b·1, b·A1, b·A²1, ...
        vector, coefficients = [1.0] * self.stages, [1.0]
        for _ in range(self.stages):
            coefficients.append(sum(b * v for b, v in zip(self.b, vector, strict=True)))
            vector = [0.0] + [sum(w * v for w, v in zip(row, vector, strict=False)) for row in self.a]

        def unstable(x):
            return abs(sum(c * (-x) ** k for k, c in enumerate(coefficients))) > 1.0 + 1e-12

        low, step = 0.0, 1e-2
        while not unstable(low + step):
            low += step
        for _ in range(40):
            step /= 2
            low = low if unstable(low + step) else low + step
        return low


class _Row(NamedTuple):
    """Weights of [z, d_1, ..., d_i]: as a tensor for the buffer, as numbers for the tape."""

    tensor: Tensor
    numbers: tuple[float, ...]


class _Coefficients(NamedTuple):
    """A tableau on one device in one dtype."""

    c: Tensor  # [stages, 1]
    a: list[_Row]
    b: _Row
    error: _Row | None
    interpolant: Tensor  # [slopes, powers]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for the next solve must not be an inference tensor
def _coefficients(tableau: Tableau, dtype: torch.dtype, time_dtype: torch.dtype, device: torch.device):
    def tensor(values, kind=dtype):
        # Through float64 on the CPU, so that no float32 rounding precedes the conversion. What is kept for the next
        # solve must not be of a transform around this one.
        return transforms.physical(torch.tensor(values, dtype=torch.float64).to(device=device, dtype=kind))

    def row(state, increments):
        return _Row(tensor((state, *increments)), (state, *increments))

    return _Coefficients(
        c=tensor([[c] for c in tableau.c], time_dtype),
        a=[row(1.0, weights) for weights in tableau.a],
        b=row(1.0, tableau.b),
        error=None if tableau.error is None else row(0.0, tableau.error),
        interpolant=tensor(_interpolant(tableau), time_dtype),
    )


def _interpolant(tableau: Tableau) -> list[list[float]]:
    """b_i(θ), one row per slope. Cubic Hermite where the method has none of its own:

    z + θ²(3 - 2θ)(z₁ - z) + θ(1 - θ)² d_first + θ²(θ - 1) d_end, and z₁ - z = Σ b_i d_i.
    """
    if tableau.interpolant is not None:
        return [list(row) for row in tableau.interpolant]
    rows = [[0.0, 3.0 * b, -2.0 * b] for b in tableau.b]
    if not tableau.fsal:
        rows.append([0.0, 0.0, 0.0])
    for row, hermite in ((rows[0], (1.0, -2.0, 1.0)), (rows[-1], (0.0, -1.0, 1.0))):
        for power, value in enumerate(hermite):
            row[power] += value
    return rows


_SMALL = 16384  # numbers in a state whose stage inputs are allocated together


class _Buffer:
    """Increments in one reused buffer [1 + stages, batch·features], row 0 the state: for steps without a tape."""

    def __init__(self, z: Tensor, stages: int):
        self.stack = z.new_empty(stages + 1, z.numel())
        self.rows = self.stack.view(-1, *z.shape).unbind(0)
        # [batch·features, i] views: a combination is one matrix-vector product.
        columns = self.stack.t()
        self.prefix = [None, None, *(columns[:, :i] for i in range(2, stages + 2))]
        self.shape, self.stages = z.shape, stages

    def start(self, z: Tensor, dt: Tensor):
        self.dt = dt[:, None]
        self.rows[0].copy_(z)
        self.filled = 1
        # New memory for every step's stage inputs, since f may keep what it is given. One piece for all of them costs
        # fewer calls; a large one would cost page faults, where stages one by one reuse what is in the cache.
        self.inputs = None
        if z.numel() <= _SMALL:
            inputs = z.new_empty(self.stages, z.numel())
            self.inputs = zip(inputs.unbind(0), inputs.view(-1, *self.shape).unbind(0), strict=True)

    def stage_input(self, row: _Row) -> Tensor:
        if self.inputs is None:
            return self.combine(row)
        flat, shaped = next(self.inputs)
        torch.mv(self.prefix[len(row.numbers)], row.tensor, out=flat)
        return shaped

    def append(self, slope: Tensor):
        torch.mul(slope, self.dt, out=self.rows[self.filled])
        self.filled += 1

    def combine(self, row: _Row) -> Tensor:
        return torch.mv(self.prefix[len(row.numbers)], row.tensor).view(self.shape)

    def increment(self, i: int) -> Tensor:
        return self.rows[i + 1]

    def tensor(self) -> Tensor:
        return self.stack[: self.filled].view(self.filled, *self.shape)


class _Tape:
    """Increments in a list of separate tensors: for steps that autograd records."""

    unit = 1.0  # what weights are multiplied by

    def start(self, z: Tensor, dt: Tensor):
        self.dt = dt[:, None]
        self.z, self.increments = z, []

    def append(self, slope: Tensor):
        self.increments.append(slope * self.dt)

    def combine(self, row: _Row) -> Tensor:
        state, *weights = row.numbers
        total = self.z if state else None
        for weight, d in zip(weights, self.increments, strict=True):
            if weight:
                weight *= self.unit
                total = d * weight if total is None else torch.add(total, d, alpha=weight)
        return total

    stage_input = combine

    def increment(self, i: int) -> Tensor:
        return self.increments[i]

    def tensor(self) -> Tensor:
        return torch.stack([self.z, *self.increments])


class _Slopes(_Tape):
    """The same for a step whose dt is one number: it goes into the weights, so that no slope is multiplied by it."""

    def start(self, z: Tensor, dt: Tensor):
        super().start(z, dt)
        self.unit = float(dt)

    def append(self, slope: Tensor):
        # What was written to may be a buffer of f's own, which its next call writes to.
        if slope.is_inference() or slope._version:
            slope = slope.clone()
        self.increments.append(slope if slope.dtype == self.z.dtype else slope.to(self.z.dtype))

    def increment(self, i: int) -> Tensor:
        return self.increments[i] * self.dt

    def tensor(self) -> Tensor:
        return torch.stack([self.z, *(slope * self.dt for slope in self.increments)])


class RungeKutta(Solver):
    """The explicit Runge-Kutta method of a tableau.

    Args:
        name: what `solve(solver=...)` calls it.
        tableau: its coefficients.
        adaptive: whether its error estimate chooses the steps by default.
        exponents: (beta1, beta2) for step-size control, or None for the general rule.
    """

    def __init__(self, name: str, tableau: Tableau, adaptive: bool, exponents: tuple[float, float] | None = None):
        if adaptive and tableau.error is None:
            raise ValueError(f"solver {name!r} can't be adaptive: its tableau has no error estimate")
        self.name, self.tableau, self.adaptive, self.exponents = name, tableau, adaptive, exponents
        self.order, self.error_order = tableau.order, tableau.error_order
        self.interpolant_order = min(tableau.order, tableau.interpolant_order)
        self.reports_stiffness = tableau.pair is not None
        self.stability_size = tableau.stability_size
        self.fsal = tableau.fsal
        self.calls_per_step = tableau.stages - self.fsal
        self._bound: _Coefficients | None = None

    def bound(self, z: Tensor, t: Tensor) -> RungeKutta:
        """The method with its coefficients for states and times like these: torch.compile can't follow a cache."""
        solver = copy.copy(self)
        solver._bound = _coefficients(self.tableau, z.dtype, t.dtype, z.device)
        return solver

    def memory(self, z: Tensor, taped: bool) -> _Buffer | _Tape:
        """See `Solver.memory`."""
        return _Tape() if taped else _Buffer(z, self.tableau.stages + 1)

    def memory_of_one(self, z: Tensor, taped: bool) -> _Buffer | _Tape:
        """See `Solver.memory_of_one`."""
        return _Slopes() if taped else self.memory(z, taped)

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: _Buffer | _Tape,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `Solver.attempt`."""
        tableau, last = self.tableau, self.tableau.stages - 1
        weights = self._bound or _coefficients(tableau, z.dtype, t.dtype, z.device)
        times = f.times(t, weights.c, dt)
        memory.start(z, dt)
        memory.append(f(times[0], z) if slope is None else slope)
        inputs, z_end, slope_end = [z], None, None
        for i in range(1, tableau.stages):
            if i == last and self.fsal:
                y = z_end = memory.combine(weights.a[i - 1])
                if not (lens or close):
                    return Step(z_end, None, None, None, memory)
            else:
                y = memory.stage_input(weights.a[i - 1])
            inputs.append(y)
            slope_end = f(times[i], y)
            memory.append(slope_end)
        error = memory.combine(weights.error) if weights.error and lens and lens != "stiffness" else None
        if not self.fsal:
            z_end, slope_end = memory.combine(weights.b), None
            if close:
                slope_end = f(f.times(t + dt)[0], z_end)
                memory.append(slope_end)
        if not lens:
            return Step(z_end, None, None, slope_end, memory)
        pair = None
        if tableau.pair is not None and lens != "error":
            i, j = tableau.pair
            pair = memory.increment(j), memory.increment(i), inputs[j], inputs[i]
        return Step(z_end, error, pair, slope_end, memory)

    def snapshot(self, stages: _Buffer | _Tape) -> Tensor:
        """See `Solver.snapshot`: row 0 the state, then the increments."""
        return stages.tensor()

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`."""
        rate = _coefficients(self.tableau, snapshot.dtype, theta.dtype, snapshot.device).interpolant
        powers = torch.stack([theta**k for k in range(1, rate.shape[1] + 1)], dim=-1)
        return weighted(torch.cat([torch.ones_like(theta)[..., None], powers @ rate.mT], dim=-1), snapshot, rows)
