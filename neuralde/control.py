"""Step-size control: how large the error is, and what step that asks for. Knows nothing of any solver."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from . import algebra, transforms
from .algebra import Algebra, Figure
from .state import Layout

_FIRST_ERROR = 1e-4  # the error ratio that precedes the first step, and the least one remembered (qoldinit)


@dataclass(frozen=True)
class StepControl:
    """Proportional-integral control of the step size.

    After an attempt with error ratio e (accepted where e ≤ 1) that followed an accepted one with e₋, the next step is
    dt times

        accepted: clamp(safety · e^(-beta1) · e₋^beta2, factor_min, factor_max)
        rejected: max(safety · e^(-beta1), factor_min)

    e₋ is at least 1e-4, and so it is before the first step under joint control, as in the reference, whose step counts
    that reproduces; under per-sample control it is 1 then, which spares short solves up to a third of their steps. The
    step size is a constant to every gradient.

    Args:
        per_sample: one step size per sample, judged by the sample's own error; or one for the whole batch.
        adaptive: whether the error chooses the step. False: every step is `dt0`, whatever the solver.
        safety, factor_min, factor_max: as above. With a safety of 0.7 every adaptive method that suits stays within 100
            tolerances, or 3 times the error of SciPy's RK45, on all DETEST problems; with 0.9, the reference's, bs3,
            dopri5 and vcab3 exceed that in 9 of 475 cases, by up to 3.6 times. A factor_max of None is 10. For SDEs,
            whose errors are random, it is 9/8, but for the step after the first one: see `leap`.
        beta1, beta2: exponents; None means 7/(10 p) and 2/(5 p) for a method of order p, and 0.17 and 0.04 for
            dopri5. 1/p and 0 make it the integral controller of torchdiffeq and torchdyn.
        norm: how errors are measured instead of in RMS: a function of the error over its tolerance, in the structure of
            the state, that returns one number per sample, [batch], or one for the batch under joint control. A seminorm
            looks at some components only. None is RMS.

    Raises:
        ValueError: safety, factor_min or factor_max is out of range.

    Source: Hairer & Wanner, Solving ODEs II, IV.2; constants of OrdinaryDiffEq.jl's PIController, which the papers'
    code ran with.
    """

    per_sample: bool = True
    adaptive: bool = True
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    norm: Callable | None = None
    leaps: bool = field(init=False, default=False, repr=False)

    def __post_init__(self):
        for name in ("per_sample", "adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, or None, got {value}")
        if self.norm is not None and not callable(self.norm):
            raise TypeError(f"norm must be a callable or None, got {type(self.norm).__name__}")
        if not 0.0 < self.safety <= 1.0:
            raise ValueError(f"safety must be in (0, 1], got {self.safety}")
        if not 0.0 < self.factor_min < 1.0 < self._most:
            raise ValueError(f"factor_min and factor_max must enclose 1, got {self.factor_min} and {self.factor_max}")

    @property
    def _most(self) -> float:
        return 10.0 if self.factor_max is None else self.factor_max

    def factor(self, ratio: Figure, previous: Figure, accept: Figure | None, exponents, m: Algebra) -> Figure:
        """What to multiply dt with, [groups].

        Args:
            ratio, previous: this attempt's error ratio, infinite where it is not a number, and that of the last
                accepted step, [groups].
            accept: [groups], or None where all were accepted.
            exponents: (beta1, beta2), of `exponents`.
            m: of the figures.
        """
        beta1, beta2 = exponents
        memory = m.power(previous, beta2)
        if accept is not None:
            memory = m.where(accept, memory, 1.0)
        # Bounded above in any case: a finished sample makes zero steps without error, and 0 · inf is no step size.
        return m.clamp(m.power(ratio, -beta1) * self.safety * memory, self.factor_min, self._most)

    def leap(self, factor: Figure, ratio: Figure, first: Figure, error_order: float, m: Algebra) -> Figure:
        """The factor, or a larger one after the first step of an SDE, whose automatic size is a tenth or less of the
        right one: what its error asks for, as of order `error_order`, up to 1e4 times its size.

        Args:
            first: which attempts were first steps, and accepted, [groups].
        """
        if not self.leaps:
            return factor
        far = m.power(m.clamp(ratio, _FIRST_ERROR), -1.0 / error_order) * self.safety
        return m.where(first, m.maximum(factor, far), factor)

    def exponents(self, order: int, tuned: tuple[float, float] | None) -> tuple[float, float]:
        """(beta1, beta2) for a method of that order, with exponents of its own or None."""
        general = tuned or (0.7 / order, 0.4 / order)
        return tuple(g if own is None else own for own, g in zip((self.beta1, self.beta2), general, strict=True))

    def remember(self, ratio: Figure, previous: Figure, accept: Figure | None, m: Algebra) -> Figure:
        """The error ratio that the next attempt compares with, [groups]; arguments as `factor`'s."""
        kept = m.clamp(ratio, _FIRST_ERROR)
        return kept if accept is None else m.where(accept, kept, previous)

    def first_memory(self, like: Figure, m: Algebra) -> Figure:
        """What `previous` is before the first step."""
        return m.full(1.0 if self.per_sample else _FIRST_ERROR, like)


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


def for_noise(control: StepControl) -> StepControl:
    """The control of an SDE's steps: they grow slowly, since a small error may be chance, once they have their size."""
    if control.factor_max is not None:
        return control
    found = replace(control, factor_max=9 / 8)
    object.__setattr__(found, "leaps", True)
    return found


def norm(rtol, atol, control: StepControl, layout: Layout) -> Norm:
    """How a solve's errors are measured.

    Args:
        rtol, atol: numbers; tensors that broadcast to the state or to one sample; or either in the state's structure.

    Raises:
        TypeError, ValueError: a tolerance is wrong; the message names it.
    """
    packed = [_tolerance(name, value, layout) for name, value in (("rtol", rtol), ("atol", atol))]
    joint = not control.per_sample
    measure = None if control.norm is None else functools.partial(_measure, control.norm, layout, joint)
    return Norm(*packed, joint, measure)


def check_tolerance(name: str, value: float) -> float:
    """The value, if it is a tolerance of that name ("rtol" or "atol").

    Raises:
        TypeError, ValueError: it is not.
    """
    value = number(name, value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a number here, got {got}")
    if not (value > 0.0 if name == "rtol" else value >= 0.0) or not math.isfinite(value):
        raise ValueError(f"{name} must be finite and {'positive' if name == 'rtol' else 'at least 0'}, got {value}")
    return float(value)


def number(name: str, x):
    """A tensor without dimensions as a number, and what is none as it is.

    Raises:
        ValueError: vmap maps x, an argument of that name.
    """
    if not isinstance(x, Tensor) or x.dim():
        return x
    transforms.require_shared(name, x)
    return x.item()


def check_max_steps(max_steps) -> None:
    """Raises TypeError or ValueError if that is no number of attempts."""
    if not isinstance(max_steps, numbers.Integral) or isinstance(max_steps, bool):
        raise TypeError(f"max_steps must be an integer, got {type(max_steps).__name__}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def check_sizes(dt0, dt_min=None, dt_max=None) -> None:
    """Raises TypeError or ValueError if these are no sizes and bounds of steps; None is none."""
    for name, value in (("dt0", dt0), ("dt_min", dt_min), ("dt_max", dt_max)):
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite (t gives the direction), got {value}")
    if dt_min is not None and dt_max is not None and dt_min > dt_max:
        raise ValueError(f"dt_min must be at most dt_max, got {dt_min} and {dt_max}")


def refuse_bounds(dt_min, dt_max) -> None:
    """Raises ValueError if there are bounds: of steps that are fixed."""
    for name, value in (("dt_min", dt_min), ("dt_max", dt_max)):
        if value is not None:
            raise ValueError(f"{name} bounds adaptive steps, but every step is of the size dt0 here; leave {name} out")


def _tolerance(name: str, value, layout: Layout) -> float | Tensor:
    strict = name == "rtol"
    if isinstance(value, numbers.Real):
        return check_tolerance(name, value)
    packed = layout.pack_figures(name, value)
    if not bool((packed >= 0.0).all()) or (strict and not bool(torch.isfinite(packed).all())):
        bad = packed[~(packed >= 0.0)].tolist() or packed[packed.isinf()].tolist()
        raise ValueError(f"{name} must be {'finite and ' if strict else ''}at least 0 everywhere, but holds {bad[0]}")
    return packed


def _measure(measure: Callable, layout: Layout, joint: bool, scaled: Tensor) -> Tensor:
    """A user's norm of an error over its tolerance, [groups]."""
    found = measure(layout.unpack(scaled))
    wanted = 1 if joint else len(scaled)
    if not isinstance(found, Tensor) or found.numel() != wanted or found.is_complex():
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        what = "one real number for the batch" if joint else f"one real number per sample, [{wanted}]"
        raise ValueError(f"norm must return {what}, got {got}")
    return found.reshape(wanted)


def rms(x: Tensor, joint: bool) -> Tensor:
    """Root mean square over each sample, [batch]; or over everything, [1], when `joint`."""
    if joint:
        return torch.linalg.vector_norm(x).div(x.numel() ** 0.5).reshape(1)
    return torch.linalg.vector_norm(x, dim=1).div(x.shape[1] ** 0.5)


@dataclass(frozen=True, eq=False)
class Norm:
    """How large an error is beside the tolerance: what the controller compares with 1.

    Attributes:
        rtol, atol: numbers, or tensors [1 or batch, features].
        joint: one figure for the batch, or one per sample.
        measure: of an error over its tolerance, [samples, features] -> [groups]; None for `rms`.
    """

    rtol: float | Tensor
    atol: float | Tensor
    joint: bool
    measure: Callable[[Tensor], Tensor] | None = None

    def on(self, rows: Tensor | None) -> Norm:
        """The norm for some of the samples."""

        def pick(x):
            return x.index_select(0, rows) if isinstance(x, Tensor) and len(x) > 1 else x

        return self if rows is None else replace(self, rtol=pick(self.rtol), atol=pick(self.atol))

    @property
    def plain(self) -> bool:
        """Whether tolerances are numbers and the measure is RMS."""
        return self.measure is None and not isinstance(self.rtol, Tensor) and not isinstance(self.atol, Tensor)

    def scale(self, size: Tensor) -> Tensor:
        """Atol + rtol·size."""
        return size * self.rtol + self.floor(size)

    def floor(self, like: Tensor) -> float | Tensor:
        """atol, but never 0: a component that is and stays 0 has no error, not 0/0."""
        tiny = torch.finfo(like.dtype).tiny
        return self.atol.clamp(min=tiny) if isinstance(self.atol, Tensor) else max(self.atol, tiny)

    def of(self, scaled: Tensor) -> Tensor:
        """The size of an error over its tolerance, [groups]."""
        return rms(scaled, self.joint) if self.measure is None else self.measure(scaled)

    def ratio(self, error: Tensor, z: Tensor, z_end: Tensor) -> Tensor:
        """The size of error / (atol + rtol·max(|z|, |z_end|)): accepted up to 1. [groups]."""
        return self.of(error / self.scale(torch.maximum(z.abs(), z_end.abs())))


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


class Reporting(Protocol):
    """What a solver says of its own figures: see `solvers.Solver`."""

    error_order: int | None
    reports_stiffness: bool
    linearizes: bool


def reported(figures: Tensor, dt: Tensor, solver: Reporting) -> tuple[Tensor | None, Tensor | None]:
    """(error ratio, stiffness) in the figures of a `Judge`, each [groups], or None where the solver has none.

    Args:
        figures: [1 to 5, groups]. dt: of the attempts, [groups].
    """
    error = None if solver.error_order is None else figures[0]
    if not solver.reports_stiffness:
        return error, None
    return error, figures[-1] if solver.linearizes else quotient(figures[-2], figures[-1], dt)


class Judge:
    """`Norm.ratio` and the norms of `stiffness` for attempts without a tape: one reduction over one buffer.

    Args:
        z: a state of the shape to be judged, [samples, features].
        solver: what makes the steps.
        norm: of these samples.
        weigh: whether the norms of the pair are wanted over the tolerances as well, as rows 1 and 2.
    """

    def __init__(self, z: Tensor, solver: Reporting, norm: Norm, weigh: bool = False):
        has_error, self.has_stiffness = solver.error_order is not None, solver.reports_stiffness and solver.linearizes
        has_pair = solver.reports_stiffness and not solver.linearizes
        self.has_error, self.has_pair, self.norm = has_error, has_pair, norm
        self.weigh = weigh and has_error and has_pair
        self.buffer = z.new_empty(has_error + 2 * has_pair * (1 + self.weigh), *z.shape)
        self.rows = self.buffer.unbind(0)
        self.flat = self.buffer.flatten(1) if norm.joint else self.buffer
        # The norm's 1/√n goes into the scale: one pass less.
        self.root = (z.numel() if norm.joint else z.shape[1]) ** 0.5
        self.plain = norm.plain
        if self.plain:
            self.rtol = norm.rtol * self.root
            self.atol = torch.tensor(norm.floor(z.real) * self.root, dtype=z.real.dtype, device=z.device)
        self.magnitude = None

    def __call__(self, step, z: Tensor) -> Tensor | None:
        """The error ratio, and the norms of dt·(f(x) - f(y)) and x - y or the stiffness: what is reported of them.

        Args:
            step: the attempt. z: where it started.

        Returns:
            [1 to 5, groups], or None where nothing is reported. See `reported`.
        """
        if not self.rows:
            return step.stiffness[None] if self.has_stiffness else None
        if self.has_error:
            before = self.magnitude if self.magnitude is not None else z.abs()
            self.after = step.z.abs()
            largest = torch.maximum(before, self.after)
            if self.plain:
                scale = torch.add(self.atol, largest, alpha=self.rtol)
            else:
                scale = self.norm.scale(largest) * self.root
            torch.div(step.error, scale, out=self.rows[0])
        if self.has_pair:
            slope_x, slope_y, x, y = step.pair
            torch.sub(slope_x, slope_y, out=self.rows[-2])
            torch.sub(x, y, out=self.rows[-1])
            if self.weigh:
                torch.div(self.rows[-2], scale, out=self.rows[1])
                torch.div(self.rows[-1], scale, out=self.rows[2])
        figures = torch.linalg.vector_norm(self.flat, dim=-1, keepdim=self.norm.joint)
        if self.has_error and self.norm.measure is not None:
            figures[0] = self.norm.measure(self.rows[0] * self.root)
        return torch.cat([figures, step.stiffness[None]]) if self.has_stiffness else figures

    def advance(self, everyone: bool) -> None:
        """Remembers |z| of an attempt that every sample accepted: the next one starts there."""
        self.magnitude = self.after if everyone and self.has_error else None


class SharedJudge:
    """`Judge` where transforms are active: the worst of the copies of a sample, which share their steps.

    Args:
        z, solver, norm, weigh: as `Judge`'s.
    """

    def __init__(self, z: Tensor, solver: Reporting, norm: Norm, weigh: bool = False):
        self.solver, self.norm, self.weigh = solver, norm, weigh

    def __call__(self, step, z: Tensor) -> Tensor | None:
        """See `Judge.__call__`. In place of two norms there are their quotient and 1.

        For the largest quotient is not that of the largest norms.
        """
        figures, scales = [], [1.0]
        if self.solver.error_order is not None:
            figures.append(self.norm.ratio(step.error, z, step.z))
            if self.weigh:
                scales.insert(0, self.norm.scale(torch.maximum(z.abs(), step.z.abs())))
        if self.solver.reports_stiffness and self.solver.linearizes:
            figures.append(step.stiffness)
        elif self.solver.reports_stiffness:
            slope_x, slope_y, x, y = step.pair
            for scale in scales:
                norms = (rms(difference / scale, self.norm.joint) for difference in (slope_x - slope_y, x - y))
                one = torch.ones(1, dtype=z.real.dtype, device=z.device)
                size = quotient(*norms, one)
                figures += [size, one.expand_as(size)]
        return transforms.worst(torch.stack(figures)) if figures else None

    def advance(self, everyone: bool) -> None:
        """See `Judge.advance`: nothing is kept."""


def judge(z: Tensor, solver: Reporting, norm: Norm, weigh: bool = False) -> Judge | SharedJudge:
    """What judges the attempts of a solve, here and now; arguments as `Judge`'s."""
    return (SharedJudge if transforms.active() else Judge)(z, solver, norm, weigh)


def initial_step(
    f, t: Tensor, z: Tensor, slope: Tensor, span: Figure, order: int, norm: Norm, m: Algebra | None = None
) -> Figure:
    """The automatic first step, [groups]; always positive. Costs one evaluation of f beside the given slope.

    The drift of an SDE is taken as large as three standard deviations of the noise make it, which costs two of the
    diffusion.

    Args:
        f: the vector field.
        t, z, slope: where the solve starts, and f there.
        span: t1 - t0, signed, [groups]: the direction and the largest step.
        order: of the solver; the exponent is 1/order.
        norm: of the samples.
        m: of the figures; None for that of the norm's groups.

    Source: Hairer, Nørsett & Wanner, Solving ODEs I, II.4, with OrdinaryDiffEq.jl's norms and exponent.
    """
    m = m or algebra.of(norm.joint)
    longest = abs(span)
    scale = norm.scale(z.abs())
    spread = getattr(f, "spread", None)  # of an SDE
    fastest = slope if spread is None else slope.abs() + spread(f.times(t)[0], z)
    size, speed = m.read(norm.of(z / scale)), m.read(norm.of(fastest / scale))
    still = m.minimum(size, speed) < 1e-5
    trial = m.minimum(m.where(still, m.full(1e-6, size), m.divide(0.01 * size, speed)), longest)
    trial = m.where(trial > 0, trial, m.minimum(m.full(1e-6, size), longest))  # an infinite speed where z is 0
    step = m.tensor(m.where(span < 0, -trial, trial), t)
    now, z_trial = f.times(t + step)[0], z + step[:, None].to(z.real.dtype) * slope
    change = f(now, z_trial) - slope
    if spread is not None:
        change, order = change.abs() + (fastest - slope.abs()) + spread(now, z_trial), order + 0.5
    bend = m.divide(m.read(norm.of(change / scale)), trial)
    sharpest = m.maximum(speed, bend)
    best = m.power(m.divide(m.full(0.01, size), sharpest), 1.0 / order)
    best = m.where(sharpest <= 1e-15, m.clamp(trial * 1e-3, 1e-6), best)
    chosen = m.minimum(m.where(bend == 0, 100 * trial, m.minimum(100 * trial, best)), longest)
    # f is not finite at the trial point: start from there, and let the error control shrink further.
    return m.where(bend < math.inf, chosen, trial)
