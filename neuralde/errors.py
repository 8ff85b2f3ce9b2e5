"""What can go wrong in a solve, as types: one hierarchy, one way of saying it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

import torch


class Status(enum.IntEnum):
    """How one sample's solve ended; the value stored in `Solution.status`.

    The member's `.message` is what a user reads when a solve fails that way.
    """

    SUCCESS = 0
    STEP_SIZE_UNDERFLOW = 1
    NON_FINITE = 2
    MAX_STEPS = 3
    NOT_CONVERGED = 4
    DIVERGED = 5

    @property
    def message(self) -> str:
        """What happened, what it usually means and what to try."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.SUCCESS: "the solve reached its end",
    Status.STEP_SIZE_UNDERFLOW: (
        "the error test still failed at a step size of dt_min, or of what t's floating-point precision resolves. This "
        "usually means a solution that goes to infinity, an f that is discontinuous (pass jump_times) or stiff (try "
        "solver='auto' or 'rodas5p'), or tolerances below the state's precision. Try larger rtol/atol, a float64 "
        "state, a smaller dt_min, a smoother or regularized f (regularizers.GlobalStiffness, "
        "regularizers.LocalStiffness), or a fixed-step solver with dt0"
    ),
    Status.NON_FINITE: (
        "f returned NaN or infinity, the state overflowed, or an implicit method's iteration did not converge, and "
        "smaller steps did not help. Look at f near that t and state: a log or square root outside its domain, a "
        "division by zero, an output that grows without bound. Try a bounded activation (tanh), a smaller dt0, or "
        "check the input and the parameters for NaN"
    ),
    Status.MAX_STEPS: (
        "the step budget ran out before the end of the horizon. Either the problem needs more steps (raise max_steps, "
        "or loosen rtol/atol), or it is stiff (steps are then limited by stability, not by accuracy) and wants a stiff "
        "solver (solver='auto', 'rodas5p' or 'rosenbrock23') or regularization"
    ),
    Status.NOT_CONVERGED: (
        "the residual stays above the tolerance without getting smaller, or the bound t of the horizon was reached "
        "first. Raise t, loosen rtol/atol (or nde.Termination's), take another solver, or make the map more "
        "contractive (regularizers.EquilibriumJacobian)"
    ),
    Status.DIVERGED: (
        "the residual grew without bound: the map expands there, or has no fixed point, or the solver has lost its "
        "way. Take another solver, make the map contractive (regularizers.EquilibriumJacobian, weight or spectral "
        "normalization), or start nearer to the steady state"
    ),
}


class NeuralDEError(RuntimeError):
    """Base class of every failure of a solve.

    Attributes:
        samples: indices of the samples that failed, list of int.
        t, dt, error, stiffness: per failed sample, list of float: the time reached, the last step size tried, its
            error ratio (accepted up to 1) and its stiffness estimate (NaN where the solver has none).
    """

    def __init__(self, message: str, samples=(), t=(), dt=(), error=(), stiffness=()):
        super().__init__(message)
        self.samples, self.t, self.dt = list(samples), list(t), list(dt)
        self.error, self.stiffness = list(error), list(stiffness)


class StepSizeUnderflow(NeuralDEError):
    """The step size fell below the precision of t while the error test still failed."""


class NonFiniteState(NeuralDEError):
    """f, or the state, became NaN or infinite and smaller steps did not help."""


class MaxStepsReached(NeuralDEError):
    """`max_steps` attempts were made without reaching the end of the horizon."""


class NotConverged(NeuralDEError):
    """A steady state was asked for and not reached.

    Attributes:
        residual: per failed sample, list of float: the least residual, as the termination's mode measures it.
        tolerance: what it was compared with.
        what, advice: the message without what to try, and that: list of str.
    """

    residual: list[float]
    tolerance: float
    what: str
    advice: list[str]


class SolveWarning(UserWarning):
    """A solve failed for some samples and `on_failure="warn"` was asked for."""


class BiasWarning(UserWarning):
    """The law of a solution of an SDE is off by more than its tolerances say: its noise is none that the method takes
    adaptive steps with.
    """


_TYPES = {
    Status.STEP_SIZE_UNDERFLOW: StepSizeUnderflow,
    Status.NON_FINITE: NonFiniteState,
    Status.MAX_STEPS: MaxStepsReached,
    Status.NOT_CONVERGED: NotConverged,
    Status.DIVERGED: NotConverged,
}

SHOWN = 5  # samples described one by one in a message; the rest are counted


def failure(
    status,
    t,
    dt,
    error,
    stiffness,
    joint: bool,
    solver: str,
    stability_size: float | None,
    messages: Mapping[Status, str] | None = None,
) -> NeuralDEError:
    """The error that describes the failed samples.

    Args:
        status, t, dt, error, stiffness: [batch]: the state of each sample when it stopped. `error` and `stiffness` are
            None where the solver has no such estimate.
        joint: whether one step size served the whole batch, so that the batch fails as a whole.
        solver: its name. stability_size: |dt·λ| beyond which it is unstable, or None where it always is stable.
        messages: in place of the statuses' own, where what was solved was not the user's problem itself.
    """
    failed = torch.nonzero(status != Status.SUCCESS).flatten().tolist()
    missing = torch.full_like(dt, float("nan"))
    columns = [(missing if x is None else x).detach().double()[failed].tolist() for x in (t, dt, error, stiffness)]
    kinds = [Status(int(status[i])) for i in failed]
    lines = []
    for i, kind, at, h, ratio, stiff in list(zip(failed, kinds, *columns, strict=True))[: 1 if joint else SHOWN]:
        who = "the batch (joint control)" if joint else f"sample {i}"
        lines.append(
            f"  {who}: {kind.name.lower()} at t = {at:.9g}, dt = {h:.4g}, "
            f"error ratio = {number(ratio, error is None)}, stiffness = {number(stiff, stiffness is None)}"
        )
    if not joint and len(failed) > SHOWN:
        lines.append(f"  and {len(failed) - SHOWN} more")
    count = "the solve" if joint else f"{len(failed)} of {len(status)} samples"
    stiff = _stiff(kinds, columns, solver, stability_size)
    # A budget that ran out needs no other explanations then.
    messages = messages or _MESSAGES | ({Status.MAX_STEPS: _BUDGET} if stiff else {})
    said = {kind: messages[kind] for kind in dict.fromkeys(kinds)}
    advice = "; ".join(f"{kind.name.lower()}: {text}" for kind, text in said.items())
    message = f"{count} failed.{stiff}\n" + "\n".join(lines) + f"\n{advice}."
    return _TYPES[kinds[0]](message, failed, *columns)


NOISY = _MESSAGES | {
    Status.STEP_SIZE_UNDERFLOW: (
        "the error test still failed at a step size of dt_min, or of what the noise is resolved to. This usually means "
        "tolerances that an SDE can't meet (a path is rough: rtol = atol = 1e-1 to 1e-3 are usual), a solution that "
        "goes to infinity, or a drift that is stiff, for which there is no implicit method. Try larger rtol/atol, a "
        "regularized drift (regularizers.GlobalStiffness, regularizers.LocalStiffness), or fixed steps "
        "(control=nde.StepControl(adaptive=False) with dt0)"
    ),
    Status.MAX_STEPS: (
        "the step budget ran out before the end of the horizon. Paths are rough, and steps fall fast with the "
        "tolerance: loosen rtol/atol, or take a solver whose estimate is the error itself ('srk' or 'milstein'), or "
        "fixed steps (control=nde.StepControl(adaptive=False) with dt0), or raise max_steps"
    ),
}
"""What `failure` says of SDEs, for which no method is implicit."""

_BUDGET = (
    "the step budget ran out before the end of the horizon. Or make f less stiff (regularizers.GlobalStiffness), or "
    "raise max_steps"
)


def _stiff(kinds: list[Status], columns: list[list[float]], solver: str, stability_size: float | None) -> str:
    """What the stiffness says: steps as large as stability allows are not as large as accuracy does.

    That costs steps. Where the step size falls without end it is accuracy that is missing, near a pole as a rule.
    """
    _, dt, _, stiffness = columns
    ran_out = (kind is Status.MAX_STEPS for kind in kinds)
    sizes = [abs(h * s) for h, s, slow in zip(dt, stiffness, ran_out, strict=True) if slow and math.isfinite(h * s)]
    if stability_size is None or not sizes or max(sizes) < 0.5 * stability_size:
        return ""
    return (
        f" The problem is stiff for solver {solver!r}: |dt|·stiffness = {max(sizes):.3g}, and its steps are stable up "
        f"to {stability_size:.3g}. Use solver='auto', 'rodas5p' or 'rosenbrock23'."
    )


def number(value: float, missing: bool = False) -> str:
    """A figure as messages have it."""
    if missing:
        return "no estimate with this solver"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
