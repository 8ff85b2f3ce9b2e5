"""One solve, ready to run: what the loop, the replays and the lens all work from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import control as _control
from .control import Norm, StepControl
from .field import Field
from .solvers import Solver


@dataclass
class Problem:
    """One solve, ready to run.

    Attributes:
        field, solver, control: what is stepped, with what, and how.
        times: [times, groups]: where the solve starts, its outputs, and where it ends. One column where all samples
            share them and control is joint.
        norm: how large an error is, with the tolerances.
        dt0: first (or fixed) step size, positive, or None for the automatic one.
        max_steps: attempts per sample.
        keep_stages: whether to keep every accepted step's stages, so that `solution(t)` need not call f.
    """

    field: Field
    solver: Solver
    control: StepControl
    times: Tensor
    norm: Norm
    dt0: float | None
    max_steps: int
    keep_stages: bool

    @property
    def joint(self) -> bool:
        """Whether one step size serves the whole batch."""
        return not self.control.per_sample

    @property
    def span(self) -> Tensor:
        """t1 - t0, signed, [groups]."""
        return self._groups(self.times[-1] - self.times[0])

    @property
    def start(self) -> Tensor:
        """t0, [groups]."""
        return self._groups(self.times[0])

    @property
    def end(self) -> Tensor:
        """t1, [groups]."""
        return self._groups(self.times[-1])

    def _groups(self, x: Tensor) -> Tensor:
        return x[:1] if self.joint else x

    @property
    def interior(self) -> Tensor | None:
        """Output times strictly inside the horizon, [points, groups], or None."""
        return self.times[1:-1] if len(self.times) > 2 else None

    def ratio(self, error: Tensor, z: Tensor, z_end: Tensor) -> Tensor:
        """What the controller compares with 1, [groups]."""
        return self.norm.ratio(error, z, z_end)

    def stiffness(self, pair: tuple[Tensor, Tensor, Tensor, Tensor], dt: Tensor) -> Tensor:
        """The stiffness estimate, [groups]."""
        return _control.stiffness(pair, dt, self.joint)
