"""Penalties on the derivatives of the learned dynamics, integrated along the solution.

Their integrals are taken by Simpson's rule on the steps that the solver accepted
(`neuralde.introspection.integrate`), so that the solve itself is the same with and without them.
"""

from __future__ import annotations

import abc
import functools

import torch
from torch import Tensor

from neuralde import introspection, transforms
from neuralde.solution import Solution

from . import taylor_functions  # noqa: F401  (its rules are registered as it is imported)
from .base import Regularizer
from .schedules import Schedule
from .taylor import derivatives, nested_derivatives

_MODES = {"taylor": derivatives, "jvp": nested_derivatives}


class _Along(Regularizer):
    """∫ ‖a vector of the state's size‖² |dt| along the solution."""

    def __init__(self, weight: float | Schedule, reduce: str):
        super().__init__(weight)
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean' (over the components of a sample), got {reduce!r}")
        self.reduce = reduce

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        return introspection.integrate(solution, self._at)

    @abc.abstractmethod
    def _at(self, f, t: Tensor, z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the integrand, dz/dt), as `introspection.integrate` asks for them."""

    def _square(self, x: Tensor) -> Tensor:
        square = (x * x.conj()).real if x.is_complex() else x * x
        return square.sum(dim=1) if self.reduce == "sum" else square.mean(dim=1)

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, reduce={self.reduce!r}"


class TaylorDerivative(_Along):
    """∫ ‖dᴷz/dtᴷ‖² |dt|: the size of the solution's total derivative of order K, TayNODE's R_K.

    A solution whose K-th derivative vanishes is a polynomial, which a method of that order solves in one step.

    Args:
        order: K, at least 1. The papers take 2 and 3 with methods of order 5.
        weight: a number or a schedule.
        reduce: "sum" over the components of a sample, the paper's norm; or "mean", which its code takes and its
            coefficients belong to.
        mode: "taylor", one call of f with power series in place of tensors, for f made of operations that have a rule
            (see `regularizers.taylor_rules` and `.taylor_functions`); or "jvp", nested forward mode by torch.func,
            whose cost doubles with every order, for f made of anything that goes through torch.func.jvp.

    Differentiable under the adjoints that have gradients of the steps' states: "direct", "checkpointed" (without few
    checkpoints) and "interpolating" or "quadrature" where they keep the states.

    A kink of f (relu) has no derivative there, and none of order 2 or more of it elsewhere: take a smooth activation.

    Raises (when called):
        NoTaylorRule: f calls something without a rule; the message names it.

    Source: Kelly et al. 2020, "Learning Differential Equations that are Easy to Solve", eq. 1; thesis section 2.8.1.
    """

    def __init__(self, order: int = 3, weight: float | Schedule = 1.0, reduce: str = "sum", mode: str = "taylor"):
        super().__init__(weight, reduce)
        if not isinstance(order, int) or isinstance(order, bool) or order < 1:
            raise ValueError(
                f"order must be a whole number, at least 1, got {order!r}; a weight is given by its name, weight=..."
            )
        if mode not in _MODES:
            raise ValueError(f"mode must be 'taylor' or 'jvp', got {mode!r}")
        self.order, self.mode = order, mode

    def _at(self, f, t: Tensor, z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        found = _MODES[self.mode](f, f.times(t)[0], z, self.order)
        return self._square(found[-1]), found[0]

    def extra_repr(self) -> str:
        """Order, weight and options."""
        return f"order={self.order}, {super().extra_repr()}, mode={self.mode!r}"


class KineticEnergy(_Along):
    """∫ ‖f(t, z)‖² |dt|: short, straight ways from the initial states to the final ones.

    Args:
        weight: a number or a schedule.
        reduce: "sum" over the components of a sample, the paper's norm; or "mean", which its code takes, with a factor
            of 1/2 that belongs into the weight.

    Differentiable as `TaylorDerivative`, whose order 1 this is.

    Source: Finlay et al. 2020, "How to train your neural ODE: the world of Jacobian and kinetic regularization", eq. 5.
    """

    def __init__(self, weight: float | Schedule = 1.0, reduce: str = "sum"):
        super().__init__(weight, reduce)

    def _at(self, f, t: Tensor, z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        slope = f(f.times(t)[0], z)
        return self._square(slope), slope


class JacobianFrobenius(_Along):
    """∫ ‖∂f/∂z‖_F² |dt|, by Hutchinson's estimate ∫ ‖εᵀ ∂f/∂z‖² |dt| with ε ~ N(0, I) drawn once per solve and sample.

    Args:
        weight: a number or a schedule.
        reduce: "sum" over the components of a sample, the paper's norm; or "mean", which its code takes.
        generator: a torch.Generator to draw the noise from.

    Differentiable as `TaylorDerivative`, by second derivatives of f.

    Source: Finlay et al. 2020, eq. 6 and section 3.3.
    """

    def __init__(self, weight: float | Schedule = 1.0, reduce: str = "sum", generator: torch.Generator | None = None):
        super().__init__(weight, reduce)
        self.generator = generator

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        state = solution._problem.field.layout.solution(solution._z0)
        device = state.device if self.generator is None else self.generator.device
        noise = torch.randn(state.shape, dtype=state.dtype, generator=self.generator, device=device).to(state.device)
        return introspection.integrate(solution, functools.partial(self._at, noise=noise))

    def _at(self, f, t: Tensor, z: Tensor, rows: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        noise, time = noise if rows is None else noise[rows], f.times(t)[0]
        if transforms.active():
            slope, pull = torch.func.vjp(lambda z: f(time, z), z)
            return self._square(pull(noise)[0]), slope
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            slope = f(time, z)
            if not slope.requires_grad:  # f looks neither at z nor at a parameter
                return self._square(torch.zeros_like(z)), slope
            (row,) = torch.autograd.grad(slope, z, noise, create_graph=wanted, materialize_grads=True)
        return (self._square(row), slope) if wanted else (self._square(row.detach()), slope.detach())
