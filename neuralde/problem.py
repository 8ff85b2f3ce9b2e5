"""One solve, ready to run: what the loop, the replays and the lens all work from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import control as _control
from .control import Norm, StepControl
from .events import Watch
from .field import Between, Field, Still
from .solvers import Solver, Step
from .stochastic import Driven, NoisyField, NoisyPart


class Impulses(Protocol):
    """Jumps of the state itself, at times that are among the problem's stops."""

    def apply(self, z: Tensor, t: Tensor, rows: Tensor | None, arrived: Tensor) -> tuple[Tensor, Tensor]:
        """The states after the impulses at t.

        Args:
            z: [samples, features]. t: [groups]. rows: the samples, None for all.
            arrived: who stands at a stop, [groups].

        Returns:
            The states, and which groups had an impulse, [groups].
        """


class Rest(Protocol):
    """What looks after every accepted step whether the samples have come to rest: see `termination.Rest`."""

    def begin(self, z: Tensor, slope: Tensor) -> Tensor | None:
        """Takes in the start; as `look` without a step."""

    def look(
        self, rows: Tensor | None, start: Tensor, z: Tensor, slope: Tensor, ok: Tensor, attempt: int
    ) -> tuple[Tensor, Tensor | None]:
        """The residuals after a step, and codes of what has ended, both [groups]; no codes where nothing has."""

    def verdict(self, status: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The status of the samples, [groups], and the states that they end with, [batch, features]."""


class Tally(Protocol):
    """What is computed along the accepted steps, beside the solution."""

    def add(self, rows: Tensor | None, t: Tensor, dt: Tensor, ok: Tensor, solver: Solver, stages: Any, z: Tensor):
        """Takes in a step.

        Args:
            rows: the samples, None for all. t, dt: of the step, [groups]. ok: whose it is, [groups]: for the others it
                was rejected. solver: what made it. stages: for `solver.snapshot`. z: where it started.
        """


@dataclass
class Problem:
    """One solve, ready to run.

    Attributes:
        field, solver, control: what is stepped, with what, and how.
        times: [times, groups]: where the solve starts, its outputs, and where it ends. One column where all samples
            share them and control is joint.
        norm: how large an error is, with the tolerances.
        dt0: first (or fixed) step size, positive, or each group's own, [groups]; None for the automatic one.
        max_steps: attempts per sample.
        keep_stages: whether to keep every accepted step's stages, so that `solution(t)` need not call f.
        dt_min, dt_max: bounds of the step size, or None.
        jumps: times at which f jumps, [points, groups], or None. stops: the same and those at which a step has to end
            although f is smooth there.
        watch: the events to look for, or None.
        observer: what is told of every attempt, or None.
        recorded: whether the accepted steps are written down: not where only the end is wanted.
        impulses: by which the state jumps at some of the stops, or None.
        tally: what is shown every accepted step, or None.
        rest: what ends the samples before the end of the horizon, which may be infinite then, or None.
        compile: whether compiled programs solve it, where they can.
        keep: at most how many states the solve keeps beside its start and its end (see `Held`); None for all of them.
    """

    field: Field
    solver: Solver
    control: StepControl
    times: Tensor
    norm: Norm
    dt0: float | Tensor | None
    max_steps: int
    keep_stages: bool
    dt_min: float | None = None
    dt_max: float | None = None
    jumps: Tensor | None = None
    stops: Tensor | None = None
    watch: Watch | None = None
    observer: Any = None
    compile: bool = False
    keep: int | None = None
    recorded: bool = True
    impulses: Impulses | None = None
    tally: Tally | None = None
    rest: Rest | None = None

    @property
    def joint(self) -> bool:
        """Whether one step size serves the whole batch."""
        return not self.control.per_sample

    @property
    def noisy(self) -> bool:
        """Whether it is an SDE."""
        return isinstance(self.field, NoisyField | NoisyPart)

    @functools.cached_property
    def span(self) -> Tensor:
        """t1 - t0, signed, [groups]."""
        return self._groups(self.times[-1] - self.times[0])

    @functools.cached_property
    def start(self) -> Tensor:
        """t0, [groups]."""
        return self._groups(self.times[0])

    @functools.cached_property
    def end(self) -> Tensor:
        """t1, [groups]."""
        return self._groups(self.times[-1])

    @property
    def elsewhere(self) -> Tensor:
        """Other instants than t0, [groups]: t1, or a later one on an endless horizon."""
        return torch.where(self.end.isfinite(), self.end, self.start + 1.0) if self.rest is not None else self.end

    @property
    def first_instant(self) -> Tensor:
        """Where f is first evaluated, [groups]: t0, or just after it where f jumps there."""
        return self.start if self.jumps is None else self._off(self.start, self.end, self.jumps)

    def before(self, t: Tensor) -> Tensor:
        """Times on the horizon, [groups or batch], or just before them where f jumps."""
        return t if self.jumps is None else self._off(t, self.start, self.jumps)

    def _groups(self, x: Tensor) -> Tensor:
        return x[:1] if self.joint else x

    @property
    def interior(self) -> Tensor | None:
        """Output times strictly inside the horizon, [points, groups], or None."""
        return self.times[1:-1] if len(self.times) > 2 else None

    def f(self, rows: Tensor | None, t: Tensor, t_end: Tensor, field: Field | None = None, still: Tensor | None = None):
        """The field for a step.

        Args:
            rows: of these samples. t, t_end: from and to, [groups].
            field: another one than the problem's. still: samples that stand still, [samples], or None.
        """
        field = (field or self.field).on(rows)
        if self.jumps is not None:
            jumps = self.jumps if rows is None or self.joint else self.jumps.index_select(1, rows)
            first, last = self._off(t, t_end, jumps), self._off(t_end, t, jumps)
            field = Between(field, torch.minimum(first, last), torch.maximum(first, last))
        if self.noisy:
            return Driven(field, self.field.diagonal, self.field.paths.on(rows), t, t_end)
        return field if still is None else Still(field, still)

    @staticmethod
    def _off(t: Tensor, towards: Tensor, jumps: Tensor) -> Tensor:
        """t, moved to its neighbour where it is a jump."""
        return torch.where((jumps == t).any(dim=0), torch.nextafter(t, towards), t)

    def ratio(self, error: Tensor, z: Tensor, z_end: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the controller compares with 1, [groups]; of the samples `rows`."""
        return self.norm.on(rows).ratio(error, z, z_end)

    def stiffness(self, step: Step, dt: Tensor) -> Tensor | None:
        """A step's stiffness estimate, [groups], or None where it has none."""
        if step.pair is None:
            return step.stiffness
        return _control.stiffness(step.pair, dt, self.joint)
