"""What a solver is to the rest of the package: a pure step, its orders, and what it can report."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .protocol import TorchdynProtocol


class VectorField(Protocol):
    """f as solvers call it."""

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Any]:
        """The times t + c·dt of several evaluations, in the form that `__call__` takes; only t itself without c.

        Args:
            t, dt: [groups]. c: [evaluations, 1].
        """

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        """dz/dt, [batch, features]. t: one of `times`."""


class Work(NamedTuple):
    """What one attempt cost, per sample: each a number, or [groups] (int64) where the samples differ.

    Attributes:
        nfe: evaluations of f. jacobians: of its Jacobian. factorizations: of a matrix. linear_solves: with its factors.
    """

    nfe: int | Tensor
    jacobians: int | Tensor = 0
    factorizations: int | Tensor = 0
    linear_solves: int | Tensor = 0

    def of_groups(self, groups: int) -> Work:
        """The same, where a single group is made of all samples: that of the worst one."""
        return Work(*(x.amax().reshape(1) if isinstance(x, Tensor) and groups == 1 else x for x in self))


class Step(NamedTuple):
    """One attempted step, before anybody judges it.

    Attributes:
        z: the state at t + dt, [batch, features].
        error: the embedded error estimate, a vector like z with dt inside, or None.
        pair: (dt·f(x), dt·f(y), x, y) for two stages x, y at one abscissa, or None. ‖f(x) - f(y)‖ / ‖x - y‖ estimates
            the local Lipschitz constant of f. Valid as long as `stages`.
        slope_end: f(t + dt, z), where it was computed, or None.
        stages: the step's memory, for `Solver.snapshot`; valid until the next step with the same memory.
        stiffness: an estimate of |λ| from f's Jacobian, [groups], where the solver has it; `pair` is None then.
        work: what the attempt cost; None means `Solver.calls_per_step` evaluations of f and nothing else.
    """

    z: Tensor
    error: Tensor | None
    pair: tuple[Tensor, Tensor, Tensor, Tensor] | None
    slope_end: Tensor | None
    stages: Any
    stiffness: Tensor | None = None
    work: Work | None = None


class Past(NamedTuple):
    """What a multistep method uses of the steps before: row 0 is the last one.

    Attributes:
        slopes: f at their starts, [steps, batch, features].
        dt: their sizes, [steps, groups].
    """

    slopes: Tensor
    dt: Tensor


class Solver(TorchdynProtocol, abc.ABC):
    """A method. Stateless: everything a step needs is given to it, and everything it produces is returned.

    `step` and what belongs to it is torchdyn's protocol (see `TorchdynProtocol`); ours is `attempt`.

    Attributes:
        name: the registry's name.
        kind: of equations it solves: "ode", "sde" or "equilibrium".
        order: p, the global order of convergence.
        adaptive: whether its error estimate chooses the steps by default; a solver that does not needs `dt0`.
        error_order: q, the error estimate being O(dt^q) on one step; None where there is no estimate.
        interpolant_order: q, the solution inside one step being exact to O(dt^(q+1)).
        reports_stiffness: whether steps carry a stiffness estimate.
        stability_size: |dt·λ| at which the method's stability ends on the negative real axis; None where it never
            does.
        fsal: whether a step computes the slope at its end anyway (first same as last).
        calls_per_step: evaluations of f in one attempt that is given the slope at its start if `fsal`, and isn't
            otherwise; None where they vary, and `Step.work` counts them.
        linearizes: whether a step takes f's Jacobian, sample by sample: f must not mix samples then, not even under
            joint control; and a stiffness estimate is `Step.stiffness`, not a pair.
        exponents: (beta1, beta2) that step-size control should use with this method, where the literature has tuned
            them; None for the general rule.
        history: steps before this one whose slopes a step is given as `past`.
        transforms: whether torch.func's transforms and forward-mode AD can go through a step.
        discrete: whether it is an iteration for steady states, which has no steps in time.
        unrolls: whether its steps can be differentiated one by one.
        remedy: what to do where it does not come to a steady state, a sentence without its end.
        copies: approximations of the state that it steps side by side, for methods that carry more than the solution: a
            state is then [batch, copies·features], the solution first.
        closes: whether a step computes the slope at its end when asked to `close`. One that doesn't is given it by
            `finish`, once its step has been accepted: a rejected attempt then costs no evaluation.
    """

    name: str
    kind: str = "ode"
    order: int | float
    adaptive: bool
    error_order: int | None
    interpolant_order: int
    reports_stiffness: bool
    stability_size: float | None
    fsal: bool
    calls_per_step: int | None
    linearizes: bool = False
    exponents: tuple[float, float] | None = None
    history: int = 0
    transforms: bool = True
    discrete: bool = False
    unrolls: bool = True
    closes: bool = True
    copies: int = 1
    remedy: str = "Take an iteration (solver='anderson', 'broyden' or 'newton')"

    @property
    def parts(self) -> tuple[Solver, ...]:
        """The methods that a sample's steps may be made with; the first one begins."""
        return (self,)

    @property
    def one_step(self) -> bool:
        """Whether a step needs nothing but its start: what torchdyn can carry."""
        return len(self.parts) == 1 and not self.history

    @abc.abstractmethod
    def memory(self, z: Tensor, taped: bool) -> Any:
        """Where a step keeps its stages: a reused buffer, or a list that autograd may hold when `taped`."""

    def memory_of_one(self, z: Tensor, taped: bool) -> Any:
        """`memory` for a step with one dt for the whole batch, whose number the host may wait for."""
        return self.memory(z, taped)

    @abc.abstractmethod
    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: Any,
        lens: bool | str = True,
        close: bool = False,
        past: Past | None = None,
    ) -> Step:
        """One step from (t, z) of size dt.

        Args:
            f: (t, z) -> dz/dt.
            t, dt: [batch], or [1] for the whole batch.
            z: [batch, features].
            slope: f(t, z) where it is known; None and it is evaluated.
            memory: of `self.memory(z, taped)`; its previous contents are overwritten.
            lens: whether `error` and the stiffness are wanted; "error" or "stiffness", and a method may leave the other
                one out. Without them, and without `close`, the last stage of an FSAL method is saved.
            close: whether the slope at the step's end is wanted even where the method does not compute it:
                interpolation needs it.
            past: the `history` steps before; only given to a method that has one.
        """

    def carried(self, memory: Any, index: Tensor) -> Any:
        """The `memory` of a step for some of its samples, where the next steps need it; None, and a new one is made."""
        return None

    def finish(self, stages: Any, slope: Tensor) -> Any:
        """The `stages` of a step that is not closed, with the slope at its end."""
        return stages

    @abc.abstractmethod
    def snapshot(self, stages: Any) -> Tensor:
        """A closed step's `stages` as one tensor [rows, batch, features], a view of its memory where possible."""

    @abc.abstractmethod
    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """The solution inside a step.

        Args:
            snapshot: of `self.snapshot`.
            theta: [points], the fractions of the step in [0, 1]; or, without rows, [points, batch], every sample's own.
            rows: [points], the sample that each point belongs to; None: every sample at every point.

        Returns:
            [points, features], or [points, batch, features] where rows is None.
        """

    def __repr__(self) -> str:
        return f"{self.name} (order {self.order})"
