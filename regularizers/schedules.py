"""Weights that change over training: functions of the number of `penalty.step()` calls made so far."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """value, always."""
    _finite(value=value)
    return lambda step: value


def exponential(start: float, end: float, steps: int) -> Schedule:
    """Start · (end/start)^(step/steps), then end.

    Args:
        start, end: positive weights. steps: how many calls of `step()` it takes.

    Source: thesis sections 5.2 and 6.3; the papers' code anneals a global penalty per epoch, a local one per step.
    """
    _finite(start=start, end=end)
    _positive_steps(steps)
    if start <= 0 or end <= 0:
        raise ValueError(f"start and end must be positive for an exponential schedule, got {start} and {end}")
    return lambda step: start * (end / start) ** (min(step, steps) / steps)


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line from start to end over the given number of steps, then end."""
    _finite(start=start, end=end)
    _positive_steps(steps)
    return lambda step: start + (end - start) * min(step, steps) / steps


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from start to end over the given number of steps, then end."""
    _finite(start=start, end=end)
    _positive_steps(steps)
    return lambda step: end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


def _finite(**values: float):
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _positive_steps(steps: int):
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
