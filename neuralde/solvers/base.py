"""What a solver is to the rest of the package: a pure step, its orders, and what it can report."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class VectorField(Protocol):
    """f as solvers call it."""

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Any]:
        """The times t + c·dt of several evaluations, in the form that `__call__` takes; only t itself without c.

        Args:
            t, dt: [groups]. c: [evaluations, 1].
        """

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        """dz/dt, [batch, features]. t: one of `times`."""


class Step(NamedTuple):
    """One attempted step, before anybody judges it.

    Attributes:
        z: the state at t + dt, [batch, features].
        error: the embedded error estimate, a vector like z with dt inside, or None.
        pair: (dt·f(x), dt·f(y), x, y) for two stages x, y at one abscissa, or None. ‖f(x) - f(y)‖ / ‖x - y‖ estimates
            the local Lipschitz constant of f. Valid as long as `stages`.
        slope_end: f(t + dt, z), where it was computed, or None.
        stages: the step's memory, for `Solver.snapshot`; valid until the next step with the same memory.
    """

    z: Tensor
    error: Tensor | None
    pair: tuple[Tensor, Tensor, Tensor, Tensor] | None
    slope_end: Tensor | None
    stages: Any


class Solver(abc.ABC):
    """A one-step method. Stateless: everything a step produces is returned.

    Attributes:
        name: the registry's name.
        order: p, the global order of convergence.
        adaptive: whether its error estimate chooses the steps by default; a solver that does not needs `dt0`.
        error_order: q, the error estimate being O(dt^q) on one step; None where there is no estimate.
        interpolant_order: q, the solution inside one step being exact to O(dt^(q+1)).
        reports_stiffness: whether steps carry a stiffness estimate.
        stability_size: |dt·λ| at which the method's stability ends on the negative real axis, or None.
        fsal: whether a step computes the slope at its end anyway (first same as last).
        calls_per_step: evaluations of f in one attempt that is given the slope at its start if `fsal`, and isn't
            otherwise.
        exponents: (beta1, beta2) that step-size control should use with this method, where the literature has tuned
            them; None for the general rule.
    """

    name: str
    order: int
    adaptive: bool
    error_order: int | None
    interpolant_order: int
    reports_stiffness: bool
    stability_size: float | None
    fsal: bool
    calls_per_step: int
    exponents: tuple[float, float] | None = None

    @abc.abstractmethod
    def memory(self, z: Tensor, taped: bool) -> Any:
        """Where a step keeps its stages: a reused buffer, or a list that autograd may hold when `taped`."""

    @abc.abstractmethod
    def step(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: Any,
        lens: bool = True,
        close: bool = False,
    ) -> Step:
        """One step from (t, z) of size dt.

        Args:
            f: (t, z) -> dz/dt.
            t, dt: [batch], or [1] for the whole batch.
            z: [batch, features].
            slope: f(t, z) where it is known; None and it is evaluated.
            memory: of `self.memory(z, taped)`; its previous contents are overwritten.
            lens: whether `error` and `pair` are wanted. Without them, and without `close`, the last stage of an
                FSAL method is saved.
            close: whether the slope at the step's end is wanted even where the method does not compute it:
                interpolation needs it.
        """

    @abc.abstractmethod
    def snapshot(self, stages: Any) -> Tensor:
        """A closed step's `stages` as one tensor [rows, batch, features], a view of its memory where possible."""

    @abc.abstractmethod
    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """The solution inside a step.

        Args:
            snapshot: of `self.snapshot`.
            theta: [points], the fractions of the step in [0, 1].
            rows: [points], the sample that each point belongs to; None: every sample at every point.

        Returns:
            [points, features], or [points, batch, features] where rows is None.
        """

    def __repr__(self) -> str:
        return f"{self.name} (order {self.order})"
