"""Penalties for deep equilibria: what makes their steady states cheap to find."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuralde import introspection, parametrized, stability
from neuralde.solution import Solution
from neuralde.solvers.iteration import count, real

from .base import Regularizer
from .schedules import Schedule


class EquilibriumJacobian(Regularizer):
    """‖J‖²_F / d of the map's Jacobian J = ∂f/∂z at the steady state, estimated as the mean of ‖Jᵀε‖² / d, ε ~ N(0, I).

    One evaluation of f, and one backward pass for every sample of ε; of f as it is by then, at the z* that was found.

    Args:
        weight: a number or a schedule.
        probability: with which it is applied at a call; else it is 0 and costs nothing.
        samples: of ε.
        through_state: whether the gradient also flows into z*. The published code cuts it.
        generator: a torch.Generator to draw from.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: Bai, Koltun & Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", equation 5 and
    table 4; d has the features of a sample, and the mean is over the batch, as in its code.
    """

    of_steady = True

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        probability: float = 1.0,
        samples: int = 1,
        through_state: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(weight)
        if isinstance(probability, bool) or not isinstance(probability, int | float):
            raise TypeError(f"probability must be a number, got {type(probability).__name__}")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must be from 0 to 1, got {probability}")
        self.probability, self.samples = float(probability), count("samples", samples)
        self.through_state, self.generator = through_state, generator

    def forward(self, source: Solution | nn.Module) -> Tensor:
        """See `Regularizer.forward`; 0 where it is not applied this time. One draw for all layers of a model."""
        if self.probability < 1.0:
            device = "cpu" if self.generator is None else self.generator.device
            if float(torch.rand((), generator=self.generator, device=device)) >= self.probability:
                return torch.zeros(())
        return super().forward(source)

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        states = solution._outcome.final if self.through_state else solution._outcome.final.detach()
        with parametrized.as_solved(solution), torch.enable_grad():
            at = stability.end(solution, states)
            product = stability.jacobian_products(at.f, at.z, taped=torch.is_grad_enabled())
            like = real(at.z.detach())
            total = torch.zeros_like(like[:, 0])
            for _ in range(self.samples):
                device = like.device if self.generator is None else self.generator.device
                noise = torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=device)
                total = total + product(noise.to(like.device)).square().sum(dim=1)
        return at.spread(total / (self.samples * like.shape[1]), len(solution.status))

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, probability={self.probability:g}, samples={self.samples}"


class Skip(Regularizer):
    """The mean of |z0 - z*| over the state: what trains the start of a deep equilibrium to be near to its end.

    Args:
        weight: a number or a schedule.
        detach_target: whether z* is a constant to it. It is not in the published code, which this trains too.

    Source: Pal et al. 2023, "Continuous deep equilibrium models", section 3.2; L1 and the mean as in its code.
    """

    of_steady = True

    def __init__(self, weight: float | Schedule = 1.0, detach_target: bool = False):
        super().__init__(weight)
        if not isinstance(detach_target, bool):
            raise TypeError(f"detach_target must be True or False, got {detach_target!r}")
        self.detach_target = detach_target

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        if solution.residual is None:
            raise ValueError("Skip trains the start of a steady state, and this solution is one on a horizon")
        # Not `final`, which may have been changed in place.
        starts, ends = (torch.utils._pytree.tree_leaves(z) for z in (solution.initial, solution.copied()))
        parts = [x - (y.detach() if self.detach_target else y) for x, y in zip(starts, ends, strict=True)]
        return torch.cat([part.abs().reshape(len(part), -1) for part in parts], dim=1).mean(dim=1)

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, detach_target={self.detach_target}"


class Contraction(Regularizer):
    """The solver's own heuristics near the steady state: how hard the last step of the way was.

    Of an iteration (fixed_point, anderson, broyden, newton) the ratio of the residuals of two steps of the fixed-point
    iteration, ‖f(z + c) - f(z)‖ / ‖c‖ with c = f(z) - z, from where the last step began; of a solver for ODEs the
    error·|dt| and the stiffness of its last step, as `solution.steps` has them. t, dt, z, and the c or the dz/dt there
    are constants to the gradient, as in the published local regularization: else it would be one of where the steady
    state lies.

    "vcab3" estimates its error from slopes of earlier steps, which are such constants; bs3, by which it begins, stands
    in for it on a step of the same size. That error is another quantity, much smaller than vcab3's own as a rule: a
    weight is of one solver.

    Args:
        weight: a number or a schedule.
        error, stiffness: which of the two count, of a solver for ODEs; one that has not got a figure counts the other.

    Raises:
        ValueError: neither is to count.

    Source: the thesis names solver heuristics as penalties for deep equilibria as future work.
    """

    of_steady = True

    def __init__(self, weight: float | Schedule = 1.0, error: bool = True, stiffness: bool = True):
        super().__init__(weight)
        if not (error or stiffness):
            raise ValueError("error or stiffness must be True: there is nothing else that could be penalized")
        self.error, self.stiffness = bool(error), bool(stiffness)

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        if solution.residual is None:
            raise ValueError("Contraction penalizes the way to a steady state, and this solution is one on a horizon")
        if solution.solver.discrete:
            return introspection.contraction(solution)
        probe = introspection.probe_last(solution)
        parts = [probe.error * probe.dt.abs()] if self.error and probe.error is not None else []
        if self.stiffness and probe.stiffness is not None:
            parts.append(probe.stiffness)
        if not parts:
            asked = " nor ".join(name for name in ("error", "stiffness") if getattr(self, name))
            raise ValueError(f"solver {solution.solver.name!r} reports no {asked}; use 'tsit5', which has both")
        return torch.stack(parts).sum(dim=0)

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, error={self.error}, stiffness={self.stiffness}"
