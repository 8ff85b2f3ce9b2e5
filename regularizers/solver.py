"""Penalties made of the solver's own heuristics: local error and stiffness, globally or at one sampled time.

All of them make the learned equation cheaper to solve. Global penalties use every accepted step; local ones make one
probe step at a sampled time, which costs the same whatever made the solution.

Where the thesis and its published code disagree, the option exists: see each class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralde import introspection
from neuralde.introspection import Probe
from neuralde.solution import Solution

from .base import Regularizer
from .recorded import Recorded, able
from .schedules import Schedule

_REDUCTIONS = ("sum", "mean", "max")


class _Global(Regularizer):
    """A figure of every accepted step, reduced over the steps of each sample."""

    def __init__(self, weight: float | Schedule, reduce: str, times_dt: bool):
        super().__init__(weight)
        if reduce not in _REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduce!r}")
        self.reduce, self.times_dt = reduce, times_dt

    def _reduced(self, solution: Solution, figure: Tensor) -> Tensor:
        steps = solution.steps
        if self.times_dt:
            figure = figure * steps.dt.abs()
        if self.reduce == "max":
            return figure.amax(dim=0)
        total = figure.sum(dim=0)
        return total if self.reduce == "sum" else total / steps.mask.sum(dim=0).clamp(min=1)

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, reduce={self.reduce!r}, times_dt={self.times_dt}"


class GlobalError(_Global):
    """Σ_j error_j·|Δt_j| over the accepted steps: the thesis' ERNODE.

    Args:
        weight: a number or a schedule.
        reduce: "sum", the thesis' formula; "mean", which the published code takes and its coefficients belong to; or
            "max".
        scaled: the error over the tolerance (what the controller sees; thesis and code), or the raw RMS error in units
            of the state, whose size does not change with the tolerances.
        times_dt: whether |Δt_j| multiplies.

    Differentiable under adjoint "direct" and "checkpointed", at the latter's memory.

    In float32, an error ratio below about 1e-7/rtol is rounding noise, and so is its gradient: use float64 for the
    layer, a looser tolerance, or `GlobalStiffness` (docs/why-is-it-slow.md has numbers).

    Source: thesis chapter 5; Pal et al. 2021, "Opening the Blackbox".
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        reduce: str = "sum",
        scaled: bool = True,
        times_dt: bool = True,
    ):
        super().__init__(weight, reduce, times_dt)
        self.scaled = scaled

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        if self.scaled and self.reduce == "sum" and self.times_dt:
            return solution.error
        solution.require("error")
        error = solution.steps.error if self.scaled else introspection.measure(solution, introspection.raw_error)
        return self._reduced(solution, error)


class GlobalStiffness(_Global):
    """Σ_j stiffness_j·|Δt_j| over the accepted steps: the thesis' SRNODE.

    Args:
        weight: a number or a schedule.
        reduce: "sum", the thesis' formula; "max", which the published code takes, with times_dt=False; or "mean".
        times_dt: whether |Δt_j| multiplies: it does in the thesis, not in the code.
        relative: divide by the method's stability size (3.5068 for Tsit5), as the code does; the thesis' coefficient
            0.0285 is 0.1 over that.

    Source: thesis chapter 5; Pal et al. 2021, "Opening the Blackbox".
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        reduce: str = "sum",
        times_dt: bool = True,
        relative: bool = False,
    ):
        super().__init__(weight, reduce, times_dt)
        self.relative = relative

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        if self.reduce == "sum" and self.times_dt:
            figure = solution.stiffness
        else:
            solution.require("stiffness")
            figure = self._reduced(solution, solution.steps.stiffness)
        return figure / _stability_size(solution.solver) if self.relative else figure


def _stability_size(solver) -> float:
    if solver.stability_size is None:
        raise ValueError(
            f"solver {solver.name!r} is stable however stiff the equation is: it has no stability size that "
            "stiffness could be relative to; use relative=False"
        )
    return solver.stability_size


class _Local(Regularizer):
    """One probe step at a time sampled per sample (per batch under joint control)."""

    local = True

    def __init__(self, sampling: str, weight: float | Schedule, through_state: bool, solver, generator):
        super().__init__(weight)
        if sampling not in ("unbiased", "biased"):
            raise ValueError(
                f"sampling must be 'unbiased' or 'biased', got {sampling!r}; a weight or a schedule is given by its "
                f"name: {type(self).__name__}(weight=...)"
            )
        self.sampling, self.through_state, self.solver, self.generator = sampling, through_state, solver, generator

    def sample(self, solution: Solution) -> Tensor:
        """Draws the times: uniform on the horizon (unbiased), or uniform over the starts of the accepted steps.

        Returns:
            [batch]; one value repeated under joint control. Of another library's solve the time drawn as it was made,
            [1].
        """
        if isinstance(solution, Recorded):
            return solution.place(self.sampling).t.reshape(1)
        batch = len(solution.status)
        draws = 1 if not solution.control.per_sample else batch
        device = solution.ts.device if self.generator is None else self.generator.device
        u = torch.rand(draws, generator=self.generator, device=device).to(solution.ts)
        if self.sampling == "unbiased":
            start, end = solution.ts[0].detach(), solution.ts[-1].detach()
            if solution.control.per_sample and solution.events:
                end = solution.t_end  # not after its terminal event
            return (start + u * (end - start)).expand(batch)
        steps = solution.steps
        counts = steps.mask.sum(dim=0)
        j = (u * counts).long().minimum(counts - 1)
        return steps.t[j, torch.arange(batch, device=j.device)]

    def probe(self, solution: Solution, t: Tensor) -> Probe:
        """The probe step from the solution at the times t ([batch])."""
        solver = self.solver
        if solver is None and not able(solution.solver, self._figure):
            # As the papers' code probes a multistep solution; with noise, the default for the equation.
            solver = "tsit5" if solution.solver.kind == "ode" else introspection.default_solver(solution)
            if not isinstance(solver, str) and not able(solver, self._figure):
                solution.require(self._figure)
        return introspection.probe_solution(solution, t, through_state=self.through_state, solver=solver)

    def look(self, solution: Solution | Recorded) -> Probe:
        """The probe step at a sampled time; of another library's solve, at the one that was sampled as it was made."""
        if not isinstance(solution, Recorded):
            return self.probe(solution, self.sample(solution))
        if self.generator is not None:
            raise ValueError(
                f"generator: the times of {solution.source} were sampled as it was made; give record(generator=...) one"
            )
        return solution.probe(self.sampling, self.through_state, self.solver, self._alone)

    _figure = "error"

    @property
    def _alone(self) -> str:
        """The only figure of a `Probe` that is looked at."""
        return self._figure

    def extra_repr(self) -> str:
        """Weight and options."""
        return f"{super().extra_repr()}, sampling={self.sampling!r}, through_state={self.through_state}"


class LocalError(_Local):
    """error·|Δt| of one step from a sampled time: the thesis' local regularization.

    The step is the one a new solve from the sampled time would begin with (its automatic first step), made with the
    solution's solver, tolerances and control. It is never rejected. Works with any adjoint; its memory is one step's.

    Of a solve of another library's (`regularizers.attach`, `regularizers.torchdiffeq`, ...) the step has the size that
    the library took there. Its error is larger by orders of magnitude, and a weight belongs to one of the two.

    Args:
        sampling: "unbiased", times uniform on the horizon; "biased", uniform over the times the solver stepped to, of
            which there are more where the equation is hard.
        weight: a number or a schedule.
        scaled: the error over the tolerance, or raw.
        through_state: whether the gradient also flows into the state at the sampled time, and so into everything
            before it. The published code cuts it.
        solver: another method for the probe step than the solution's.
        generator: a torch.Generator to draw the times from.

    In float32, an error ratio below about 1e-7/rtol is rounding noise, and so is its gradient: on an easy problem use
    float64 for the layer, or `LocalStiffness` (docs/why-is-it-slow.md has numbers).

    The published code also holds the slope at the start of the step constant; here the parameters get its gradient.

    Source: thesis chapter 6, algorithms 6.1 and 6.2; Pal et al. 2023, "Locally Regularized Neural DEs".
    """

    def __init__(
        self,
        sampling: str = "unbiased",
        weight: float | Schedule = 1.0,
        scaled: bool = True,
        through_state: bool = False,
        solver=None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(sampling, weight, through_state, solver, generator)
        self.scaled = scaled

    @property
    def _alone(self) -> str:
        return "error" if self.scaled else "raw_error"

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        probe = self.look(solution)
        return (probe.error if self.scaled else probe.raw_error) * probe.dt.abs()


class LocalStiffness(_Local):
    """The stiffness of one step from a sampled time.

    Args:
        sampling, weight, through_state, solver, generator: as `LocalError`.
        relative: divide by the method's stability size, as the published code does.

    Source: thesis chapter 6; LocalRegNeuralDE.jl's stiffness variant.
    """

    def __init__(
        self,
        sampling: str = "unbiased",
        weight: float | Schedule = 1.0,
        relative: bool = False,
        through_state: bool = False,
        solver=None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(sampling, weight, through_state, solver, generator)
        self.relative = relative

    _figure = "stiffness"

    def figure(self, solution: Solution) -> Tensor:
        """See `Regularizer.figure`."""
        probe = self.look(solution)
        return probe.stiffness / _stability_size(probe.solver) if self.relative else probe.stiffness
