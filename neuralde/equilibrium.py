"""What a solve for a steady state gives back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .adjoints.base import Outcome
from .graph import without_gradient
from .problem import Problem
from .solution import Solution, Statistics, Steps
from .termination import kept

_CONSTANT = (
    "the residuals of an iteration, and their ratios, are constants to gradients; penalize the steady state itself by "
    "regularizers.EquilibriumJacobian, or the last step by regularizers.Contraction"
)


class Descent(Steps):
    """The accepted steps of a solve for a steady state: see `Steps`, and

    Attributes:
        residual: at the end of every step, as the termination's mode measures it, [step, batch]; 0 where `mask` is
            False.
        error, stiffness: of an iteration, which has neither tolerance nor time: the residual, and the ratio of it to
            that of the step before, which estimates the contraction; constants. Of a solver for ODEs as `Steps` has
            them.
    """

    @functools.cached_property
    def residual(self) -> Tensor:  # noqa: D102  (documented in the class)
        return self._grid.pad(self._outcome.trajectory.residuals)

    @functools.cached_property
    def error(self) -> Tensor | None:  # noqa: D102
        return self._constant(self.residual) if self._problem.solver.discrete else Steps.error.func(self)

    @functools.cached_property
    def stiffness(self) -> Tensor | None:  # noqa: D102
        if not self._problem.solver.discrete:
            return Steps.stiffness.func(self)
        first = self._problem.rest.first.expand(self._grid.batch)
        before = torch.cat([first[None], self.residual])[:-1]
        ratio = self.residual / torch.where(before > 0, before, 1.0)
        return self._constant(torch.where(self.mask & (before > 0), ratio, 0.0))

    def _constant(self, figure: Tensor) -> Tensor:
        return without_gradient(figure, [self._outcome.final], _CONSTANT)

    @functools.cached_property
    def z(self):  # noqa: D102
        problem = self._problem
        if problem.solver.discrete and not problem.solver.unrolls and problem.keep is not None:
            raise ValueError(
                f"solver {problem.solver.name!r} does not keep the states of its steps, nor can they be made again one "
                "by one; pass dense=True to keep them"
            )
        return Steps.z.func(self)


class Equilibrium(Solution):
    """The result of `solve` for a `SteadyState`: see `Solution`, and

    Attributes:
        ts: where each sample started and ended, [2, batch]: times, or steps times their size for an iteration.
        zs: the states there, every tensor [2, batch, ...]. `final` is the latter; of a sample that did not converge the
            one with the least residual (`Termination(best=False)`: the last one). It has a gradient where `status` is
            SUCCESS, NOT_CONVERGED or MAX_STEPS; an iteration that got lost (DIVERGED, NON_FINITE, STEP_SIZE_UNDERFLOW)
            has none to hand on.
        residual: at `final`, as the termination's mode measures it, [batch]: converged where it is within the
            tolerance. A constant.
        termination: with its tolerances.
        before: evaluations of f before the solve, which made z0; counted in `stats`.
    """

    def __init__(self, problem: Problem, outcome: Outcome, z0_flat: Tensor):
        self._solved(problem, outcome, z0_flat)
        self._stopped, self._held, self.events = None, None, []
        self.residual = problem.rest.residual.expand(problem.field.layout.batch)
        self.termination = problem.rest.termination
        self.before, self._taped = 0, torch.is_grad_enabled()

    # A training reads the end and little else: the others are made when they are asked for, with the gradient that they
    # would have had.

    @functools.cached_property
    def ts(self) -> Tensor:  # noqa: D102  (documented in the class)
        batch, ends = self._problem.field.layout.batch, (self._problem.start, self._outcome.trajectory.reached)
        with torch.inference_mode(False):
            return torch.stack([x.expand(batch) for x in ends])

    @functools.cached_property
    def zs(self):  # noqa: D102
        return self._given(lambda: torch.stack([self._z0, self._outcome.final]))

    @functools.cached_property
    def final(self):
        """Where every sample came to rest, in the structure of z0."""
        return self.copied()

    def copied(self):
        """`final` once more, in memory of its own: what may be changed in place."""
        return self._given(self._outcome.final.clone)

    def _given(self, states: Callable[[], Tensor]):
        with torch.inference_mode(False), torch.set_grad_enabled(self._taped):
            return self._problem.field.layout.unpack(states())

    @property
    def stats(self) -> Statistics:
        """See `Solution.stats`."""
        stats = super().stats
        return replace(stats, nfe=stats.nfe + self.before, function_calls=stats.function_calls + self.before)

    @functools.cached_property
    def steps(self) -> Descent:
        """The accepted steps."""
        return Descent(self._problem, self._outcome, self._z0)

    @property
    def usable(self) -> Tensor:
        """Which samples ended with a state that means something, and has a gradient, [batch] bool."""
        return kept(self.status)

    @property
    def depth(self) -> Tensor:
        """Accepted steps of each sample, [batch] int64."""
        return self.stats.accepted

    def require(self, name: str) -> None:
        """See `Solution.require`."""
        if not self.solver.discrete:
            super().require(name)

    def __call__(self, t):
        """The solution between the steps, see `Solution.__call__`; after a sample's end, where it came to rest.

        Raises:
            ValueError: of an iteration, which is nowhere between its steps.
        """
        return super().__call__(t)

    def _interpolate(self, times: Tensor) -> Tensor:
        if self.solver.discrete:
            raise ValueError(
                f"solver {self.solver.name!r} is nowhere between its steps; solution.steps.z has the states that it "
                "went through"
            )
        return super()._interpolate(times)

    def plot(self, sample: int = 0, axes=None):
        """Draws the residual against depth. See `neuralde.plotting.plot_descent`."""
        from .plotting import plot_descent

        return plot_descent(self, sample=sample, axes=axes)

    def __repr__(self) -> str:
        lost = int((~self.converged).sum())
        state = "all samples converged" if not lost else f"{lost} of {len(self.status)} samples did not converge"
        return f"Equilibrium({self.solver.name}, {state}, residual ≤ {float(self.residual.max()):.3g}; {self.stats!r})"
