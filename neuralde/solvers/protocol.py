"""What torchdyn asks of a solver, answered by every solver of ours: `torchdyn.core.NeuralODE(solver=...)` takes them.

Nothing here imports torchdyn: its protocol is a handful of attributes and two methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transforms


class TorchdynProtocol:
    """The attributes and methods that torchdyn's loops use, for a class with the attributes of `Solver`.

    torchdyn chooses the steps: by its own integral controller for an adaptive solver, along `t_span` for a fixed-step
    one. The whole batch takes one step size, since torchdyn has one t for all samples.

    Source: torchdyn 1.0.6, numerics/odeint.py and numerics/solvers/templates.py.
    """

    @property
    def stepping_class(self) -> str:
        """Which of torchdyn's loops is used: "adaptive" or "fixed"."""
        return "adaptive" if self.adaptive else "fixed"

    # What torchdyn's controller computes with; without dimensions, they mix with tensors on any device.
    safety = property(lambda self: torch.tensor(0.9))
    min_factor = property(lambda self: torch.tensor(0.2))
    max_factor = property(lambda self: torch.tensor(10.0))

    def sync_device_dtype(self, x: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        """What torchdyn calls first: the state as it is, and the times on its device.

        An adaptive solve also gets its times in the state's dtype: t is a sum of step sizes there, which in float32
        would lose the digits of a float64 state.

        Raises:
            TypeError: the state is no tensor, or the solver can't make a step from its start alone.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"a neuralde solver in torchdyn needs a tensor as its state, got {type(x).__name__}")
        self.require_one_step()
        return x, t_span.to(x.device, x.real.dtype if self.adaptive else None)

    def require_one_step(self) -> None:
        """Raises TypeError for a solver that torchdyn's protocol can't carry."""
        if not self.one_step:
            raise TypeError(
                f"solver {self.name!r} remembers what its last steps were, which torchdyn's protocol can't carry: a "
                "step there starts from (t, x) alone. Use a Runge-Kutta method there, or this one in neuralde.NeuralODE"
            )

    def step(self, f: Callable, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args=None) -> tuple:
        """One step as torchdyn's loops ask for it.

        Args:
            f: f(t, x), dx/dt in the shape of x.
            x: the state, of any shape.
            t, dt: one number each, with or without a dimension. f gets t as it is shaped here.
            k1: f(t, x) where it is known.
            args: of torchdyn's loops, which hand it to no vector field; so does this.

        Returns:
            (f(t + dt, x₁), x₁, error, stages) of an adaptive solver, (None, x₁, None) of a fixed-step one.
        """
        # All of x is one sample here, with one step size.
        z = x.reshape(1, -1)
        size = torch.as_tensor(dt, device=x.device).to(x.real.dtype).reshape(1)
        now = torch.as_tensor(t, device=x.device)
        slope = None if k1 is None else k1.reshape(1, -1)
        memory = self.memory(z, taped=transforms.recording())
        field = _Flat(f, x.shape, now.shape)
        try:
            result = self.attempt(field, now.reshape(1), size, z, slope, memory, self.adaptive, self.adaptive)
        except RuntimeError as error:
            if not self.linearizes:
                raise
            raise TypeError(
                f"solver {self.name!r} needs the Jacobian of what torchdyn steps, which its sensitivities 'adjoint' "
                "and 'interpolated_adjoint' don't let it take; use sensitivity='autograd', or neuralde.NeuralODE"
            ) from error
        if not self.adaptive:
            return None, result.z.view(x.shape), None
        # torchdyn's next step wants the slope here, also from a method that has no use for it.
        last = field(field.times(now + size)[0], result.z) if result.slope_end is None else result.slope_end
        ends = (last, result.z, result.error)
        return *(end.view(x.shape) for end in ends), _Slopes(self, result.stages, size, x.shape)


class _Flat:
    """torchdyn's f as our solvers call it, on one row."""

    def __init__(self, f: Callable, shape: torch.Size, time_shape: torch.Size):
        self.f, self.shape, self.time_shape = f, shape, time_shape

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor]:
        stack = t[None] if c is None else torch.addcmul(t, c, dt.to(t.dtype))
        return [x.reshape(self.time_shape) for x in stack]

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.f(t, z.view(self.shape)).reshape(z.shape)


class _Slopes:
    """The stages of a step, for torchdyn's 4th-order interpolator. Its weights are dopri5's."""

    def __init__(self, solver, stages: Any, dt: Tensor, shape: torch.Size):
        self.solver, self.stages, self.dt, self.shape = solver, stages, dt, shape

    def __len__(self) -> int:
        if self.solver.name != "dopri5":
            raise ValueError(
                f"torchdyn's interpolator='4th' has the weights of dopri5, which say nothing about "
                f"{self.solver.name!r}; leave interpolator=None, or use dopri5"
            )
        return 7

    def __getitem__(self, i: int) -> Tensor:
        return (self.solver.snapshot(self.stages)[i + 1] / self.dt).view(self.shape)
