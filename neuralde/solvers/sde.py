"""What a solver of SDEs is, beside what every solver is."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..brownian import Noise
from ..equations import SDE, SDE_TYPES
from .base import Solver, Step, VectorField
from .hermite import weighted


class DrivenField(VectorField, Protocol):
    """Drift and diffusion, with the noise of one step. Called, it is the drift.

    Attributes:
        noise: over the step. halves: over its first half, and over its second one.
    """

    noise: Noise
    halves: Sequence[Noise]
    diagonal: bool

    def diffusion(self, t: Any, z: Tensor) -> Tensor:
        """[batch, features] of diagonal noise, else [batch, features, channels]. t: one of `times`."""

    def times_noise(self, diffusion: Tensor, noise: Tensor) -> Tensor:
        """The product of a diffusion with noise [batch, channels], [batch, features]."""


class SDESolver(Solver):
    """A method for SDEs. `attempt` is given a `DrivenField`.

    `order` and `error_order` are strong ones, of the best that the method can do; `of` has those for an equation.

    Attributes:
        orders: strong order by the noise types that the method takes.
        sde_types: the senses of the integral that it takes: "ito", "stratonovich" or both.
        uses_area: whether it uses the noise's space-time Lévy area.
        separate: whether it takes diagonal noise only where each component's diffusion depends on that one alone.
    """

    kind = "sde"
    adaptive = True
    interpolant_order = 0
    reports_stiffness = False
    stability_size = None
    fsal = False
    uses_area = False
    separate = False
    orders: Mapping[str, float]
    sde_types: tuple[str, ...]

    def suits(self, equation: SDE) -> bool:
        """Whether it takes this noise in this sense. Additive noise has the same integral in both."""
        sense = equation.noise_type == "additive" or equation.sde_type in self.sde_types
        return sense and equation.noise_type in self.orders

    @property
    def senses(self) -> tuple[str, ...]:
        """The senses in which it takes some noise: `sde_types`, or both where it takes additive noise alone."""
        return SDE_TYPES if tuple(self.orders) == ("additive",) else self.sde_types

    def of(self, equation: SDE, adaptive: bool) -> SDESolver:
        """The method for an equation that it suits, at adaptive or at fixed steps."""
        solver = copy.copy(self)
        solver.order = self.orders[equation.noise_type]
        return solver

    def require_one_step(self) -> None:
        """Raises TypeError: torchdyn's protocol is for ODEs."""
        raise TypeError(
            f"solver {self.name!r} is for SDEs, and torchdyn's NeuralODE has no noise for it; use neuralde.NeuralSDE"
        )

    def memory(self, z: Tensor, taped: bool) -> None:
        """See `Solver.memory`: none is needed."""

    @abc.abstractmethod
    def attempt(
        self,
        f: DrivenField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `Solver.attempt`; slope is the drift at (t, z), where it is known."""

    def snapshot(self, stages: tuple[Tensor, Tensor]) -> Tensor:
        """See `Solver.snapshot`: the ends."""
        return torch.stack(stages)

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`: linear; inside of a step the path is not looked at."""
        return weighted(torch.stack([1 - theta, theta], dim=-1), snapshot, rows)

    def __repr__(self) -> str:
        noise = ", ".join(f"{kind} {order:g}" for kind, order in self.orders.items())
        return f"{self.name} ({' and '.join(self.senses)}; strong order by noise: {noise})"
