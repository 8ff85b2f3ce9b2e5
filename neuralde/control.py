"""Step-size control: how large the error is, and what step that asks for. Knows nothing of any solver."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_ERROR = 1e-4  # the error ratio that precedes the first step, and the least one remembered (qoldinit)


@dataclass(frozen=True)
class StepControl:
    """Proportional-integral control of the step size.

    After an attempt with error ratio e (accepted where e ≤ 1) that followed an accepted one with e₋, the next step is
    dt times

        accepted: clamp(safety · e^(-beta1) · e₋^beta2, factor_min, factor_max)
        rejected: max(safety · e^(-beta1), factor_min)

    The step size is a constant to every gradient.

    Args:
        per_sample: one step size per sample, judged by the sample's own error; or one for the whole batch.
        adaptive: whether the error chooses the step. False: every step is `dt0`, whatever the solver.
        safety, factor_min, factor_max: as above.
        beta1, beta2: exponents; None means 7/(10 p) and 2/(5 p) for a method of order p, and 0.17 and 0.04 for
            dopri5. 1/p and 0 make it the integral controller of torchdiffeq and torchdyn.

    Raises:
        ValueError: safety, factor_min or factor_max is out of range.

    Source: Hairer & Wanner, Solving ODEs II, IV.2; constants of OrdinaryDiffEq.jl's PIController, which the papers'
    code ran with.
    """

    per_sample: bool = True
    adaptive: bool = True
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    beta1: float | None = None
    beta2: float | None = None

    def __post_init__(self):
        for name in ("per_sample", "adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, or None, got {value}")
        if not 0.0 < self.safety <= 1.0:
            raise ValueError(f"safety must be in (0, 1], got {self.safety}")
        if not 0.0 < self.factor_min < 1.0 < self.factor_max:
            raise ValueError(f"factor_min and factor_max must enclose 1, got {self.factor_min} and {self.factor_max}")

    def factor(self, ratio: Tensor, previous: Tensor, accept: Tensor | None, exponents) -> Tensor:
        """What to multiply dt with, [groups].

        Args:
            ratio, previous: this attempt's error ratio, infinite where it is not a number, and that of the last
                accepted step, [groups].
            accept: [groups], or None where all were accepted.
            exponents: (beta1, beta2), of `exponents`.
        """
        beta1, beta2 = exponents
        shrink = ratio.pow(-beta1).mul_(self.safety)
        grow = (shrink * previous.pow(beta2)).clamp_(self.factor_min, self.factor_max)
        if accept is None:
            return grow
        # Bounded above too: a finished sample makes zero steps without error, and 0 · inf is no step size.
        return torch.where(accept, grow, shrink.clamp_(self.factor_min, self.factor_max))

    def exponents(self, order: int, tuned: tuple[float, float] | None) -> tuple[float, float]:
        """(beta1, beta2) for a method of that order, with exponents of its own or None."""
        general = tuned or (0.7 / order, 0.4 / order)
        return tuple(g if own is None else own for own, g in zip((self.beta1, self.beta2), general, strict=True))

    def remember(self, ratio: Tensor, previous: Tensor, accept: Tensor | None) -> Tensor:
        """The error ratio that the next attempt compares with, [groups]; arguments as `factor`'s."""
        kept = ratio.clamp(min=_FIRST_ERROR)
        return kept if accept is None else torch.where(accept, kept, previous)

    def first_memory(self, like: Tensor) -> Tensor:
        """What `previous` is before the first step."""
        return torch.full_like(like, _FIRST_ERROR)


_PRESETS = {"per_sample": StepControl(per_sample=True), "joint": StepControl(per_sample=False)}


def get(control: str | StepControl) -> StepControl:
    """The control of that name ("per_sample" or "joint"), or the control itself.

    Raises:
        ValueError: no such name. TypeError: neither a name nor a `StepControl`.
    """
    if isinstance(control, StepControl):
        return control
    if not isinstance(control, str):
        raise TypeError(f"control must be 'per_sample', 'joint' or a StepControl, got {type(control).__name__}")
    if control not in _PRESETS:
        raise ValueError(f"unknown control {control!r}; use 'per_sample', 'joint' or a StepControl")
    return _PRESETS[control]


def check_tolerances(rtol, atol) -> None:
    """Raises TypeError or ValueError unless rtol > 0 and atol ≥ 0 are finite numbers."""
    for name, value, strict in (("rtol", rtol, True), ("atol", atol, False)):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (value > 0.0 if strict else value >= 0.0) or not math.isfinite(value):
            raise ValueError(f"{name} must be finite and {'positive' if strict else 'at least 0'}, got {value}")


def rms(x: Tensor, joint: bool) -> Tensor:
    """Root mean square over each sample, [batch]; or over everything, [1], when `joint`."""
    if joint:
        return torch.linalg.vector_norm(x).div(x.numel() ** 0.5).reshape(1)
    return torch.linalg.vector_norm(x, dim=1).div(x.shape[1] ** 0.5)


def error_ratio(error: Tensor, z: Tensor, z_end: Tensor, rtol: float, atol: float, joint: bool) -> Tensor:
    """RMS of error / (atol + rtol·max(|z|, |z_end|)): accepted up to 1. [batch], or [1] when joint."""
    scale = torch.maximum(z.abs(), z_end.abs()).mul(rtol).add(_floor(atol, z))
    return rms(error / scale, joint)


def _floor(atol: float, z: Tensor) -> float:
    """atol, but never 0: a component that is and stays 0 has no error, not 0/0."""
    return max(atol, torch.finfo(z.dtype).tiny)


def stiffness(pair: tuple[Tensor, Tensor, Tensor, Tensor], dt: Tensor, joint: bool) -> Tensor:
    """‖f(x) - f(y)‖ / ‖x - y‖ of two stages at one abscissa; 0 where they coincide. [batch], or [1] when joint.

    Args:
        pair: (dt·f(x), dt·f(y), x, y), each [batch, features].
        dt: [groups].

    Source: Shampine 1977; thesis chapter 5, with root-mean-square norms as in the papers' code.
    """
    # The difference of two rounded stage inputs is exact, so that the estimate has nothing more to lose than f's own
    # rounding.
    slope_x, slope_y, x, y = pair
    return quotient(rms(slope_x - slope_y, joint), rms(x - y, joint), dt)


def quotient(difference: Tensor, distance: Tensor, dt: Tensor) -> Tensor:
    """Difference / (distance·|dt|), 0 where that is 0/0: the stiffness from its norms."""
    bottom = distance * dt.abs()
    moving = bottom != 0  # NaN stays NaN
    return torch.where(moving, difference / torch.where(moving, bottom, 1.0), 0.0)


class Judge:
    """`error_ratio` and the norms of `stiffness` for attempts without a tape: one reduction over one buffer.

    Args:
        z: a state of the shape to be judged, [batch, features].
        estimates: whether steps carry an error estimate, and whether a stiffness pair.
    """

    def __init__(self, z: Tensor, estimates: tuple[bool, bool], rtol: float, atol: float, joint: bool):
        has_error, has_pair = estimates
        count = has_error + 2 * has_pair
        self.has_error, self.has_pair = has_error, has_pair
        self.buffer = z.new_empty(count, *z.shape)
        self.rows = self.buffer.unbind(0)
        self.flat = self.buffer.flatten(1) if joint else self.buffer
        # The norm's 1/√n goes into the scale: one pass less.
        root = (z.numel() if joint else z.shape[1]) ** 0.5
        self.root, self.joint = root, joint
        self.rtol = rtol * root
        self.atol = torch.tensor(_floor(atol, z) * root, dtype=z.real.dtype, device=z.device)
        self.magnitude = None

    def __call__(self, step, z: Tensor) -> Tensor | None:
        """The error ratio and the norms of dt·(f(x) - f(y)) and x - y, as far as reported, [1 to 3, groups].

        Args:
            step: the attempt. z: where it started.
        """
        if not self.rows:
            return None
        if self.has_error:
            before = self.magnitude if self.magnitude is not None else z.abs()
            self.after = step.z.abs()
            scale = torch.add(self.atol, torch.maximum(before, self.after), alpha=self.rtol)
            torch.div(step.error, scale, out=self.rows[0])
        if self.has_pair:
            slope_x, slope_y, x, y = step.pair
            torch.sub(slope_x, slope_y, out=self.rows[-2])
            torch.sub(x, y, out=self.rows[-1])
        return torch.linalg.vector_norm(self.flat, dim=-1, keepdim=self.joint)

    def advance(self, everyone: bool) -> None:
        """Remembers |z| of an attempt that every sample accepted: the next one starts there."""
        self.magnitude = self.after if everyone and self.has_error else None


def initial_step(
    f, t: Tensor, z: Tensor, slope: Tensor, horizon: Tensor, order: int, rtol: float, atol: float, joint: bool
) -> Tensor:
    """The automatic first step, signed, [groups]. Costs one evaluation of f beside the given slope.

    Args:
        f: the vector field.
        t, z, slope: where the solve starts, and f there.
        horizon: t1 - t0, signed, [groups]: the direction and the largest step.
        order: of the solver; the exponent is 1/order.

    Source: Hairer, Nørsett & Wanner, Solving ODEs I, II.4, with OrdinaryDiffEq.jl's norms and exponent.
    """
    longest, direction = horizon.abs(), horizon.sign()
    scale = z.abs().mul(rtol).add(_floor(atol, z))
    size, speed = rms(z / scale, joint), rms(slope / scale, joint)
    trial = torch.where(torch.minimum(size, speed) < 1e-5, 1e-6, 0.01 * size / speed).minimum(longest)
    if atol == 0.0:
        trial = torch.where(trial > 0, trial, 1e-6).minimum(longest)  # an infinite speed where z is 0
    step = (trial * direction)[:, None]
    bend = rms((f(f.times(t + step[:, 0])[0], z + step.to(z.real.dtype) * slope) - slope) / scale, joint) / trial
    sharpest = torch.maximum(speed, bend)
    flat = sharpest <= 1e-15
    best = torch.where(flat, (trial * 1e-3).clamp(min=1e-6), (0.01 / torch.where(flat, 1.0, sharpest)).pow(1.0 / order))
    chosen = torch.where(bend == 0, 100 * trial, torch.minimum(100 * trial, best)).minimum(longest)
    # f is not finite at the trial point: start from there, and let the error control shrink further.
    return torch.where(chosen.isfinite(), chosen, trial) * direction
