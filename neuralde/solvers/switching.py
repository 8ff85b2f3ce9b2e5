"""Methods made of methods: each sample steps with one of several, and changes when its own figures say so."""

from __future__ import annotations

import abc

from torch import Tensor

from ..algebra import Algebra, Figure
from .base import Past, Solver, Step, VectorField


class Switching(Solver):
    """A method of several parts, of which every sample uses one at a time.

    To those who ask for a single step it is its first part: the step that a solve would begin with.

    Args:
        name: what `solve(solver=...)` calls it.
        parts: the methods. They need the same error control: an estimate each.
    """

    def __init__(self, name: str, parts: tuple[Solver, ...]):
        first, last = parts[0], parts[-1]
        self.name, self._parts = name, parts
        self.order, self.error_order = last.order, last.error_order
        self.adaptive = True
        self.interpolant_order = min(part.interpolant_order for part in parts)
        self.reports_stiffness = all(part.reports_stiffness for part in parts)
        self.stability_size, self.fsal, self.calls_per_step = first.stability_size, first.fsal, first.calls_per_step
        self.history = max(part.history for part in parts)
        self.linearizes = any(part.linearizes for part in parts)

    @property
    def parts(self) -> tuple[Solver, ...]:
        """See `Solver.parts`."""
        return self._parts

    @abc.abstractmethod
    def route(
        self, part: int, counter: Figure, ok: Figure, figures: Tensor, dt: Figure, m: Algebra
    ) -> tuple[Figure, Figure]:
        """Which part the samples go on with after an attempt.

        Args:
            part: the one they used.
            counter: what this method has counted so far, [groups] integers; 0 at the start and after a jump of f.
            ok: which attempts were accepted. figures: the judge's. dt: their absolute size.
            m: of the figures.

        Returns:
            The new counter, and which samples leave for the other part ([groups] bool).
        """

    @abc.abstractmethod
    def restart(self, part: int) -> int:
        """The part that goes on after a jump of f."""

    def memory(self, z: Tensor, taped: bool):
        """See `Solver.memory`."""
        return self._parts[0].memory(z, taped)

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory,
        lens: bool | str = True,
        close: bool = False,
        past: Past | None = None,
    ) -> Step:
        """See `Solver.attempt`: a step of the first part."""
        return self._parts[0].attempt(f, t, dt, z, slope, memory, lens, close)

    def snapshot(self, stages) -> Tensor:
        """See `Solver.snapshot`: of the first part."""
        return self._parts[0].snapshot(stages)

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`: of the first part."""
        return self._parts[0].interpolate(snapshot, theta, rows)
