"""Weights that change over training: functions of the number of `penalty.step()` calls made so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class constant:  # noqa: N801  (called like a function; a class, so that penalties can be pickled)
    """value, always."""

    value: float

    def __post_init__(self):
        _finite(value=self.value)

    def __call__(self, step: int) -> float:
        """The weight after that many steps."""
        return self.value


@dataclass(frozen=True)
class _Ramp:
    """From start to end over the given number of calls of `step()`, then end."""

    start: float
    end: float
    steps: int

    def __post_init__(self):
        _finite(start=self.start, end=self.end)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def _part(self, step: int) -> float:
        return min(step, self.steps) / self.steps


class exponential(_Ramp):  # noqa: N801
    """start · (end/start)^(step/steps), then end.

    Args:
        start, end: positive weights. steps: how many calls of `step()` it takes.

    Source: thesis sections 5.2 and 6.3; the papers' code anneals a global penalty per epoch, a local one per step.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise ValueError(
                f"start and end must be positive for an exponential schedule, got {self.start} and {self.end}"
            )

    def __call__(self, step: int) -> float:
        """The weight after that many steps."""
        return self.start * (self.end / self.start) ** self._part(step)


class linear(_Ramp):  # noqa: N801
    """A straight line from start to end over the given number of steps, then end."""

    def __call__(self, step: int) -> float:
        """The weight after that many steps."""
        return self.start + (self.end - self.start) * self._part(step)


class cosine(_Ramp):  # noqa: N801
    """Half a cosine from start to end over the given number of steps, then end."""

    def __call__(self, step: int) -> float:
        """The weight after that many steps."""
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self._part(step)))


def _finite(**values: float):
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
