"""torchdyn's solver objects as solvers of ours. Recognized by their protocol: torchdyn is not imported."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Solver, Step, VectorField
from .hermite import hermite

_PROTOCOL = ("step", "order", "stepping_class", "sync_device_dtype")


def speaks_torchdyn(solver) -> bool:
    """Whether it is an object with torchdyn's solver protocol, and none of ours."""
    return not isinstance(solver, Solver | str | type) and all(hasattr(solver, name) for name in _PROTOCOL)


class _Stages(NamedTuple):
    z: Tensor
    slope: Tensor | None
    z_end: Tensor
    slope_end: Tensor | None
    dt: Tensor


class Foreign(Solver):
    """A solver object of torchdyn's, hypersolvers included, for `solve(solver=...)`.

    Its `step` makes the steps; step sizes, error control, output times (cubic Hermite interpolation) and gradients are
    ours. The parameters of a hypernetwork get gradients. What its step evaluates, with which coefficients and at which
    times, is torchdyn's affair: its `RungeKutta4` evaluates every stage at the step's start, and is of first order
    where f depends on t; its coefficients are rounded to the `dtype` that it was built with.

    `calls_per_step` is what its last step took, for a step is the only thing that tells.

    Args:
        solver: with torchdyn's `step`, `order`, `stepping_class` and `sync_device_dtype`.

    Raises:
        TypeError: a solver whose f has another dimension than its state (asynchronous leapfrog).
    """

    reports_stiffness, stability_size = False, None
    calls_per_step = 1
    transforms = False  # torchdyn keeps its coefficients on itself, and would keep what a transform makes of them

    def __init__(self, solver):
        if hasattr(solver, "x_shape"):
            raise TypeError(
                f"solver {type(solver).__name__} steps a state (x, v) with an f of x alone, which no nde.ODE is; "
                "write the system as dz/dt = f(t, z) of the whole state, or use torchdyn's odeint"
            )
        # Its attributes beside it: a hypernetwork may be a function that closes over a Module.
        self.solver, self._uses = solver, [solver, *vars(solver).values()]
        self.name = type(solver).__name__
        self.order = int(solver.order)
        self.adaptive = self.fsal = solver.stepping_class == "adaptive"
        self.error_order = self.order if self.adaptive else None
        self.interpolant_order = min(self.order, 3)

    def memory(self, z: Tensor, taped: bool) -> None:
        """None: every step's tensors are its own. The coefficients are moved to the state's device and dtype."""
        self.solver.sync_device_dtype(z, z.new_zeros(2))

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `Solver.attempt`."""
        if close and slope is None:
            slope = f(f.times(t)[0], z)
        seen = _Shaped(f, len(t))
        k1 = None if slope is None else seen.shaped(slope)
        last, end, *rest = self.solver.step(seen, seen.shaped(z), seen.spread(t), seen.spread(dt), k1=k1)
        self.calls_per_step = seen.calls + (k1 is not None) - self.fsal
        z_end = seen.flat(end)
        wanted = z.requires_grad or (slope is not None and slope.requires_grad)
        if torch.is_grad_enabled() and wanted and z_end.grad_fn is None:
            raise TypeError(
                f"solver {self.name} makes its step in a way that no gradient passes (inside an optimizer); "
                "solve under torch.no_grad(), or use another solver"
            )
        error = seen.flat(rest[0]) if self.adaptive and lens else None
        slope_end = None if last is None else seen.flat(last)
        if slope_end is None and close:
            slope_end = f(f.times(t + dt)[0], z_end)
        return Step(z_end, error, None, slope_end, _Stages(z, slope, z_end, slope_end, dt))

    def snapshot(self, stages: _Stages) -> Tensor:
        """See `Solver.snapshot`: the values and the increments at both ends."""
        dt = stages.dt[:, None].to(stages.z.real.dtype)
        return torch.stack([stages.z, stages.z_end, dt * stages.slope, dt * stages.slope_end])

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`: cubic Hermite interpolation."""
        return hermite(snapshot, theta, rows)


class _Shaped:
    """f as torchdyn's steps call it: on the user's shape, with t a scalar or one for every sample.

    Attributes:
        calls: of f so far.
    """

    def __init__(self, f: VectorField, groups: int):
        self.f, self.calls, self.layout = f, 0, f.layout
        if f.layout.tree is not None or f.layout.dtype != f.layout.work_dtype:
            raise TypeError(
                "a solver of torchdyn's needs one float32 or float64 tensor as its state, not a tuple, a dict, or half "
                "precision"
            )
        self.time_shape = () if f.joint else (groups, *(1,) * (f.layout.time_rank - 1))

    def shaped(self, z: Tensor) -> Tensor:
        return self.layout.unpack(z)

    def flat(self, x: Tensor) -> Tensor:
        return self.layout.pack(x)

    def spread(self, t: Tensor) -> Tensor:
        return t.reshape(self.time_shape)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.shaped(self.f(self.f.times(t.reshape(-1))[0], self.flat(x)))
