"""ODEs followed to their steady states by explicit Runge-Kutta methods, compiled.

A program ends the samples that have come to rest. Whoever gets lost instead, or stalls, is left to the loop in Python,
which says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import termination as _termination
from ..discover import resolution
from ..held import Held
from ..problem import Problem
from ..solvers import Step
from ..solvers.runge_kutta import RungeKutta
from .engine import VectorField
from .equilibrium import SteadyEngine
from .programs import constant
from .records import Page, Ran, Stand
from .runge_kutta import RungeKuttaEngine
from .stepping import SteppingEngine, closes


class _Own(NamedTuple):
    """What is carried.

    Attributes:
        residual: the last ones, [groups].
        before: where the step began that brought a sample to rest, [batch, features].
    """

    residual: Tensor
    before: Tensor


class _Start(NamedTuple):
    """What is known of the start, all [groups].

    Attributes:
        figure: the residual. size: ‖f(z) - z‖. scale: the larger of it and ‖f(z)‖. limit: of it later on.
    """

    figure: Tensor
    size: Tensor
    scale: Tensor
    limit: Tensor


class _Excess(VectorField):
    """f(z) - z of a map f."""

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """See `VectorField`."""
        return super().__call__(t, z) - z


class SettlingEngine(SteadyEngine, RungeKuttaEngine):
    """The programs of a solve for a steady state by an explicit Runge-Kutta method."""

    _settles, _shrinks = True, False

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        super().__init__(problem, tree)
        self._termination = problem.rest.termination
        self._scaled = self._termination.mode != "absolute"

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        solver = problem.solver
        closing = isinstance(solver, RungeKutta) and solver.fsal
        return [
            (not closing, f"solver {solver.name!r} is no explicit Runge-Kutta method whose last slope is at its end"),
            (not bool(problem.end.isinf().all()), "it has a horizon"),
            (problem.dt_min is not None, "it has dt_min"),
            *SteppingEngine.refusals(problem),
        ]

    @staticmethod
    def kinds(problem: Problem) -> tuple:
        """See `Engine.kinds`."""
        return problem.solver, problem.dt0 is None, closes(problem), problem.keep, problem.rest.termination

    def _given(self, problem: Problem) -> list[Tensor]:
        most = math.inf if problem.dt_max is None else problem.dt_max
        return [constant("dt_max", most, problem.start.dtype)]

    # -- in the programs -----------------------------------------------------------------------------------------------

    def _slope_of(self, f, leaves) -> VectorField:
        own = self._of(f, leaves)
        return _Excess(own.field, own.f, own.args) if self._is_map else own

    def _bounded(self, h: Tensor, given: Sequence[Tensor]) -> Tensor:
        return torch.minimum(h, given[0]) if self._control.adaptive else h

    def _least(self, s: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
        return s.abs() * resolution(s)

    def _started(self, stand: Stand) -> tuple[Stand, tuple[Tensor, ...], tuple[Tensor, ...]]:
        figure, size, largest, limit = _termination.outset(self._termination, self._joint, stand.z, stand.slope)
        fixed = _Start(figure, size, size if largest is None else largest, limit)
        live = ~(figure <= self._termination.tolerance)
        return stand._replace(live=live), tuple(_Own(figure, stand.z)), tuple(x.clone() for x in fixed)

    def _looked(
        self, at: Stand, step: Step, ok: Tensor, arrived: Tensor, own: tuple[Tensor, ...], fixed: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
        own, start = _Own(*own), _Start(*fixed)
        started = (start.size, start.scale) if self._scaled else None
        size, figure, _ = _termination.measure(self._termination, self._joint, step.z, step.slope_end, started)
        settled = ok & (figure <= self._termination.tolerance)
        lost = ok & ~settled & ~(size <= start.limit)
        own = torch.where(ok, figure, own.residual), torch.where(settled[:, None], at.z, own.before)
        return settled, lost, figure, own

    # -- outside of them -----------------------------------------------------------------------------------------------

    def _ran(self, problem: Problem, z0: Tensor, stand: Stand, pages: list[Page], extra: int, own, fixed) -> Ran | None:
        if self._stalled(pages):
            return None
        return Settled(problem, z0, stand, pages, extra, _Own(*own), _Start(*fixed))

    def _stalled(self, pages: list[Page]) -> bool:
        """Whether the loop in Python would have found a sample at a standstill on the way."""
        patience = self._termination.patience
        if patience is None or sum(page.filled for page in pages) < patience:
            return False
        recent, attempt = _termination.Recent(self._termination), 0
        for filled, log, _ in pages:
            figures = torch.where(log.ok[:filled], log.residual[:filled], math.nan)
            for figure, ok in zip(figures, log.ok, strict=False):
                attempt += 1
                if not bool(ok.any()):
                    continue
                recent.append(figure)
                still = recent.stalled(attempt)
                if still is not None and bool((still & ok & (figure > self._termination.tolerance)).any()):
                    return True
        return False


class Settled(Ran):
    """A trajectory to steady states, all of which were reached."""

    def __init__(
        self,
        problem: Problem,
        z0: Tensor,
        stand: Stand,
        pages: list[Page],
        extra: int,
        own: _Own,
        start: _Start,
    ):
        super().__init__(problem, z0, stand, pages, extra)
        rest = problem.rest
        rest.first, rest.residual, rest.before = start.figure, own.residual, own.before
        self.complete = rest.conclude(self.status)
        self._held = None if problem.keep is None else Held(problem.keep, 0, len(z0))

    @property
    def reached(self) -> Tensor:  # noqa: D102
        return self._stand.s
