"""Temporal regularization: in training, the solve does not end where it ends in use."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor, nn

from neuralde.solution import Solution

from .base import Regularizer, solutions
from .recorded import Recorded
from .schedules import Schedule


class Steer(Regularizer):
    """Ends training's solves at a random time: t1 ~ U(t1 - b, t1 + b).

    It is no term of the loss, its value is 0: it acts on the solves. `steer.prepare(model)` sets it to work on the
    layers inside of a model (neuralde's `NeuralODE`, and torchdyn's that `attach` has seen), from their next call on,
    while they are in training mode; in eval mode they solve to where they always did. Called as a penalty, on its own
    or in a sum, it does that too, so that in a training loop without `prepare` only the first step is made with the
    layer's own times. One time is drawn per solve.

    Where a solve has output times, every one after the first is drawn, around where it was; what is compared with data
    there stays. Elsewhere, torchdiffeq's functions for one, ask for the times: `odeint(f, z0, steer.sample(t))`.

    Args:
        b: the half-width in units of t, less than the horizon, and at most half of the intervals between output times;
            or a schedule of it, that `step()` advances. None takes half of the horizon, or half of the shorter interval
            beside an output time: on the papers' horizons and grids, what they take.
        generator: a torch.Generator on the CPU to draw from.

    Source: Behl et al. 2020, "STEER: Simple Temporal Regularization For Neural ODEs", eq. 5; for output times thesis
    section 5.3.1.2, which draws within half of the interval before: the same where intervals are equal; elsewhere
    outputs could change places.
    """

    def __init__(self, b: float | Schedule | None = None, generator: torch.Generator | None = None):
        if not (b is None or callable(b) or isinstance(b, numbers.Real)):
            raise TypeError(f"b must be a number, a schedule or None, got {b!r}")
        if isinstance(b, numbers.Real) and not (math.isfinite(b) and b > 0):
            raise ValueError(f"b must be positive and finite, got {b}")
        super().__init__(0.5 if b is None else b)
        self.relative, self.generator = b is None, generator
        self._used = False

    def prepare(self, model: nn.Module) -> Steer:
        """Draws the times of the layers inside of a model from now on, while they are in training mode.

        Args:
            model: a layer, or a model with layers inside.

        Returns:
            The `Steer` itself.

        Raises:
            TypeError: not a Module. ValueError: no layer inside whose times could be drawn.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Steer acts on a layer or on a model with layers inside, got {type(model).__name__}")
        # Known by the attribute, so that layers of every kind, and users' own, count.
        layers = [module for module in model.modules() if hasattr(module, "draw_times")]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no layer inside whose times could be drawn (neuralde's NeuralODE, and "
                "torchdyn's after regularizers.attach(model)); hand steer.sample(t) to the solver"
            )
        for layer in layers:
            layer.draw_times = self.sample  # a method: a Module would enter the layer's state_dict
        self._used = True
        return self

    def release(self, model: nn.Module) -> None:
        """Takes back `prepare`."""
        for module in model.modules():
            if getattr(getattr(module, "draw_times", None), "__self__", None) is self:
                module.draw_times = None

    def sample(self, t):
        """Draws the times of a solve; in eval mode (`steer.eval()`) they stay as they are.

        Args:
            t: (t0, t1), [times] or [batch, times], as `solve` takes them. Samples share the draws.

        Returns:
            What t was: a tuple of numbers, or a tensor.

        Raises:
            TypeError: t is none of these. ValueError: it has less than two times, or b is too large for them.
        """
        self._used = True
        if isinstance(t, Tensor):
            times = t
        elif _numbers(t):
            times = torch.tensor(t, dtype=torch.float64)
        elif isinstance(t, tuple | list):
            times = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, t)), dim=-1)
        else:
            raise TypeError(f"t must be (t0, t1) or a tensor of times, got {t!r}")
        if times.dim() not in (1, 2) or times.shape[-1] < 2:
            raise ValueError(
                "t must have the start and the end of a solve, (t0, t1), or output times, [times] or [batch, times], "
                f"two at least; got {t if times.numel() < 3 else list(times.shape)}"
            )
        if not self.training:
            return t
        moved = times + self._shift(times.detach())
        return tuple(moved.tolist()) if _numbers(t) else moved

    def _shift(self, times: Tensor) -> Tensor:
        gaps = times.diff(dim=-1)
        room = gaps.abs()
        if room.shape[-1] > 1:  # neighbours may move towards each other
            room = torch.cat([torch.minimum(room[..., :-1], room[..., 1:]), room[..., -1:]], dim=-1)
        b = self.weight * room if self.relative else torch.full_like(room, self.weight)
        most = 1.0 if gaps.shape[-1] == 1 else 0.5
        if not self.relative and bool(((b >= room) if most == 1.0 else (b > most * room)).any()):
            what = "less than the horizon" if most == 1.0 else "at most half of every interval between output times"
            raise ValueError(f"b must be {what}, {most * room.min().item():.6g}, got {self.weight:.6g}")
        u = torch.rand(gaps.shape[-1], generator=self.generator, dtype=torch.float64).to(gaps)
        shift = (2.0 * u - 1.0) * b * gaps.sign()
        return torch.cat([torch.zeros_like(shift[..., :1]), shift], dim=-1)

    def figure(self, solution: Solution) -> Tensor:
        """Zeros, [batch]."""
        return torch.zeros(len(solution.converged), device=solution.converged.device)

    def forward(self, source: Solution | Recorded | nn.Module | list) -> Tensor:
        """0, and `prepare` for a model.

        Raises:
            TypeError, ValueError: as `prepare`; or a Solution is given, and no time was ever drawn.
        """
        found = solutions(source)
        if isinstance(source, nn.Module):
            self.prepare(source)
        elif not self._used:
            raise ValueError(
                "Steer acts on solves, not on a Solution: call steer.prepare(model), or solve at steer.sample(t)"
            )
        return torch.zeros((), device=found[0].converged.device)

    def extra_repr(self) -> str:
        """The half-width as it is now."""
        return "b=half the interval" if self.relative else f"b={self.weight:.6g}"


def _numbers(t) -> bool:
    return isinstance(t, tuple | list) and all(isinstance(x, numbers.Real) for x in t)
