"""Events: where along a solution a condition passes through zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .equations import required_arguments
from .errors import NeuralDEError
from .field import Field
from .graph import without_gradient
from .solvers.linearize import ordinary
from .state import Layout

# Units of rounding within which a solve starts on a zero: what a restart from an event can be off by.
_ON_ZERO = 64


@dataclass(frozen=True, eq=False)
class Event:
    """Where condition(t, z) = 0.

    A zero is found where the condition has another sign at a step's end than at its start, and located on the solver's
    interpolant. Two zeros inside of one step are not seen: bound the step by `dt_max` where a condition changes fast. A
    solve that starts on a zero (up to rounding) has left it: so that one can go on from an event, after a bounce.

    Args:
        condition: a function or Module of (t, z), or (t, z, args) where the solve is given args, that returns one
            number per sample, [batch] or [batch, 1]; t is [batch, 1, ..., 1] under either control, z the state. It may
            have parameters: they get gradients through the event's time and state.
        terminal: whether the sample's solve ends there.
        direction: which passages count: +1 where the condition grows (along the solve), -1 where it falls, 0 both.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    condition: Callable
    terminal: bool = True
    direction: int = 0

    def __post_init__(self):
        if not callable(self.condition):
            raise TypeError(f"condition must be a callable (t, z) -> [batch], got {type(self.condition).__name__}")
        if not isinstance(self.terminal, bool):
            raise TypeError(f"terminal must be True or False, got {self.terminal!r}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction must be -1, 0 or 1, got {self.direction!r}")


class Occurrences:
    """Where one event took place.

    Attributes:
        t: the times, [occurrence, batch]; NaN where `mask` is False.
        z: the states, in the structure of z0, every tensor [occurrence, batch, ...]; NaN where `mask` is False.
        mask: whether sample b has an occurrence k, [occurrence, batch]; each sample's are packed to the left.

    t and z are differentiable with respect to whatever the solution is, and to what the condition depends on; first
    derivatives only.
    """

    def __init__(self, t: Tensor, z, mask: Tensor):
        self.t, self.z, self.mask = t, z, mask

    @property
    def count(self) -> Tensor:
        """Occurrences of each sample, [batch] int64."""
        return self.mask.sum(dim=0)

    def __len__(self) -> int:
        return len(self.t)

    def __repr__(self) -> str:
        return f"Occurrences({int(self.mask.sum())} in {int((self.count > 0).sum())} of {self.mask.shape[1]} samples)"


class Hits(NamedTuple):
    """The occurrences that a solve found, in the order of their event and occurrence. All [hits] but shape.

    Attributes:
        row: which row of the extra outputs each is; sample; step: its place on the grid; theta: where in that step.
        t: the time. speed: dz/dt along the interpolant, [hits, features]. terminal: whether the sample's solve ended
        there. rows: how many rows every event has, in order.
    """

    row: Tensor
    sample: Tensor
    step: Tensor
    theta: Tensor
    t: Tensor
    speed: Tensor
    terminal: Tensor
    rows: list[int]


class Watch:
    """The events of one solve, as the loop asks for them.

    Args:
        events: what to look for.
        field: of the solve, for its args.
        layout: of the state.
    """

    def __init__(self, events: list[Event], field: Field, layout: Layout):
        self.events, self.field, self.layout = events, field, layout
        self.terminal = torch.tensor([e.terminal for e in events], device=layout.device)
        self.direction = torch.tensor([e.direction for e in events], device=layout.device)[:, None]
        self._takes_args = [field.args is not None and required_arguments(e.condition) != 2 for e in events]
        self._everyone: tuple[Tensor, Tensor] | None = None

    def start(self, t: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        """The signs of the conditions at the start, [events, batch].

        A start on a zero, up to rounding, is on the side that the condition goes to: a solve that goes on from an event
        must not find it again.
        """
        # What samples are evaluated beside, later on.
        self._everyone = t, z = t.expand(len(z)).clone(), z.detach().clone()
        signs = []
        for i in range(len(self.events)):
            value, rate, by_z = self.derivatives(i, None, t, z, slope.detach())
            self._refuse_nan(i, value, t)
            reach = rate.abs() * t.abs() + (by_z.abs() * z.abs()).sum(dim=1).to(t.dtype)
            near = value.abs() <= _ON_ZERO * torch.finfo(t.dtype).eps * reach
            signs.append(torch.sign(torch.where(near, rate.to(value.dtype), value)))
        return torch.stack(signs)

    def derivatives(self, i: int, rows: Tensor | None, t: Tensor, z: Tensor, speed: Tensor):
        """A condition and its derivatives; constants.

        Args:
            speed: dz/dt, [samples, features]. The others are `values`'.

        Returns:
            Its value, [samples]; how fast it changes along the solution, [samples]; its derivative by z,
            [samples, features].
        """
        with ordinary(), torch.inference_mode(False), torch.enable_grad():
            t, z = t.detach().clone().requires_grad_(), z.detach().clone().requires_grad_()
            value = self.values(rows, t, z, only=i)
            by_t = by_z = None
            if value.requires_grad:
                by_t, by_z = torch.autograd.grad(value.sum(), (t, z), allow_unused=True)
        by_t, by_z = (torch.zeros_like(x) if g is None else g for x, g in ((t, by_t), (z, by_z)))
        return value.detach(), by_t + (by_z.conj() * speed).real.sum(dim=1).to(t.dtype), by_z

    def require_numbers(self, values: Tensor, ok: Tensor, t: Tensor):
        """Raises ValueError if a condition is not a number at the end of an accepted step."""
        if bool((values.isnan() & ok).any()):
            for i, value in enumerate(values):
                self._refuse_nan(i, torch.where(ok, value, 0.0), t)

    @staticmethod
    def _refuse_nan(i: int, value: Tensor, t: Tensor):
        lost = value.isnan().nonzero().flatten().tolist()
        if lost:
            at = float(t.expand(len(value))[lost[0]])
            raise ValueError(
                f"condition of event {i} is NaN for samples {lost[:5]}{' and more' if len(lost) > 5 else ''}, first at "
                f"t = {at:.9g}: an event can't be told there; make the condition finite wherever the solution goes"
            )

    def values(self, rows: Tensor | None, t: Tensor, z: Tensor, only: int | None = None) -> Tensor:
        """The conditions, [events, samples] (or one of them, [samples]).

        Conditions may hold tensors of the whole batch, so they are always evaluated on all of it.

        Args:
            rows: the samples, or None for all. t: [samples] or [1]. z: [samples, features].
        """
        t = t.expand(len(z))
        if rows is not None:
            t, z = self._everyone[0].index_copy(0, rows, t), self._everyone[1].index_copy(0, rows, z)
        chosen = range(len(self.events)) if only is None else (only,)
        found = torch.stack([self._one(i, t, z) for i in chosen])
        found = found if rows is None else found.index_select(1, rows)
        return found if only is None else found[0]

    def _one(self, i: int, t: Tensor, z: Tensor) -> Tensor:
        time = t.reshape(-1, *(1,) * (self.layout.time_rank - 1))
        args = (self.field.args,) if self._takes_args[i] else ()
        value = self.events[i].condition(time, self.layout.unpack(z), *args)
        if not isinstance(value, Tensor):
            raise TypeError(f"condition of event {i} must return a tensor, got {type(value).__name__}")
        if value.numel() != len(z):
            raise ValueError(
                f"condition of event {i} must return one number per sample, [{len(z)}], got {tuple(value.shape)}"
            )
        if not value.is_floating_point():
            raise TypeError(f"condition of event {i} must be real and floating-point, got {value.dtype}")
        return value.reshape(-1)

    def crossed(self, before: Tensor, after: Tensor) -> Tensor:
        """Which conditions passed through zero, [events, samples], from their signs before and values after."""
        after = torch.sign(after).to(before)
        return (before != 0) & (after != before) & ((self.direction == 0) | (before == -self.direction))

    def sign_after(self, before: Tensor, after: Tensor) -> Tensor:
        """The sign that the next step starts from: on a zero itself, the one that the condition goes to."""
        sign = torch.sign(after).to(before)
        return torch.where((sign == 0) & (before != 0), -before, sign)

    def locate(self, i: int, rows: Tensor | None, here: Tensor, before: Tensor, state: Callable, t, dt) -> Tensor:
        """Where inside its step an event lies, [samples]; 1 where it doesn't.

        Args:
            i: the event. rows: as `values`'. here: which samples have it. before: their signs at the start.
            state: theta [samples] -> z there. t, dt: of the step, [groups].
        """
        low, high = torch.zeros_like(here, dtype=t.dtype), torch.ones_like(here, dtype=t.dtype)
        # Halving the step until it is as narrow as rounding: slower than a secant method, and never fooled.
        for _ in range(1 - round(math.log2(torch.finfo(t.dtype).eps))):
            middle = 0.5 * (low + high)
            value = self.values(rows, t + middle * dt, state(middle), only=i)
            left = torch.sign(value).to(before) == before
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return torch.where(here, high, 1.0)


def slope_inside(state: Callable, theta: Tensor) -> Tensor:
    """d state/d theta, [points, features], where every point's state [points, features] depends on its own theta alone.

    By two backward passes, the first being linear in its cotangent. The first use of forward mode would load the
    decompositions of all operations, which takes a second and warns.

    Args:
        state: theta -> z there. theta: [points].
    """
    with ordinary(), torch.inference_mode(False), torch.enable_grad():
        theta = theta.clone().requires_grad_()
        z = state(theta)
        real = torch.view_as_real(z) if z.is_complex() else z
        cotangent = torch.zeros_like(real, requires_grad=True)
        (total,) = torch.autograd.grad(real, theta, cotangent, create_graph=True)
        (slope,) = torch.autograd.grad(total, cotangent, torch.ones_like(total))
    return torch.view_as_complex(slope) if z.is_complex() else slope


def parse(events) -> list[Event]:
    """`solve(events=...)` as a list; an empty one for None.

    Raises:
        TypeError: not an `Event` or a list of them.
    """
    listed = [events] if isinstance(events, Event) else [] if events is None else events
    if not isinstance(listed, list | tuple) or not all(isinstance(e, Event) for e in listed):
        raise TypeError(f"events must be an nde.Event or a list of them, got {events!r}")
    return list(listed)


def gather(watch: Watch, hits: Hits, z: Tensor) -> tuple[Tensor, Tensor]:
    """The occurrences' times and states with their gradients, [rows, batch] and [rows, batch, features].

    The condition's zero moves with all that it depends on: t = t̂ - g(t̂, z(t̂)) / ġ, one step of Newton's method whose
    value changes nothing, and z moves along with t. NaN where a sample has no such occurrence.

    Args:
        z: the states there, on the tape, [rows, batch, features].
    """
    rows, batch, features = z.shape
    t_flat, z_flat, speed = hits.t, z[hits.row, hits.sample], hits.speed
    starts = torch.tensor([0, *hits.rows], device=z.device).cumsum(0)
    times, states = t_flat, z_flat
    if torch.is_grad_enabled():
        times, states = t_flat.clone(), z_flat.clone()
        for row in range(rows):
            here = (hits.row == row).nonzero().flatten()
            event = int((starts <= row).sum()) - 1
            moved = _newton(watch, event, hits.sample[here], t_flat[here], z_flat[here], speed[here])
            times = times.index_copy(0, here, t_flat[here] + moved)
            states = states.index_copy(0, here, z_flat[here] + moved[:, None].to(z.dtype) * speed[here])
    t_out = t_flat.new_full((rows, batch), float("nan")).index_put((hits.row, hits.sample), times)
    z_out = z.new_full((rows, batch, features), float("nan")).index_put((hits.row, hits.sample), states)
    return t_out, z_out


def _newton(watch: Watch, event: int, rows: Tensor, t: Tensor, z: Tensor, speed: Tensor) -> Tensor:
    """How far the zero moves, [samples]: zero in value, with a gradient."""
    value = watch.values(rows, t, z, only=event).to(t.dtype)
    _, rate, _ = watch.derivatives(event, rows, t, z, speed)
    return _Moved.apply(value, z, rate, event)


class _Moved(torch.autograd.Function):
    """-(g - ĝ)/ġ: zero, with the derivative -1/ġ by g. First derivatives only, and whoever wants more is told."""

    @staticmethod
    def forward(ctx, value: Tensor, z: Tensor, rate: Tensor, event: int) -> Tensor:
        ctx.save_for_backward(value, z, rate)
        ctx.event = event
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, g: Tensor):
        value, z, rate = ctx.saved_tensors
        if bool(((rate == 0) & (g != 0)).any()):
            raise NeuralDEError(
                f"event {ctx.event} has no gradient: its condition does not change along the solution where it is "
                "zero, or autograd can't follow it (detach, sign, numpy inside of the condition)"
            )
        back = -g / torch.where(rate == 0, 1.0, rate)
        if torch.is_grad_enabled():
            back = without_gradient(back, [value, z], _FIRST_ONLY)
        return back, None, None, None


_FIRST_ONLY = "an event's time and state have first derivatives only: their gradient has none"
