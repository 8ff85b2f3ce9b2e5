"""What is said of a solve for a steady state that was not reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import SHOWN, NotConverged, Status, number
from .solvers import Solver
from .termination import CLOSE, FAR, Termination

_CONTRACT = "make the map more contractive (regularizers.EquilibriumJacobian, weight or spectral normalization)"
_NON_FINITE = (
    "f returned NaN or infinity, or the state overflowed. Look at f near that state: a log or square root outside "
    "its domain, a division by zero, an output that grows without bound. Try a bounded activation (tanh), damping, "
    "another start, or check the input and the parameters for NaN"
)
_ROUNDING = 8, 32  # times the precision of f: tolerances that may be too small for it, and residuals that are its noise


def unsettled(
    status: Tensor,
    residual: Tensor,
    t: Tensor,
    depth: Tensor,
    end: Tensor,
    termination: Termination,
    joint: bool,
    solver: Solver,
    precision: torch.dtype,
) -> NotConverged:
    """The error that describes the samples that did not come to rest.

    Args:
        status, residual, t, depth: [batch], of each sample when it stopped; depth in accepted steps.
        end: of the horizon, [batch].
        termination: by which they would have converged.
        joint: whether the batch ends as one.
        solver: of the solve. precision: what f computes in.
    """
    failed = torch.nonzero(status != Status.SUCCESS).flatten().tolist()
    columns = [x.detach().double()[failed].tolist() for x in (residual, t, depth)]
    kinds = [Status(int(status[i])) for i in failed]
    tolerance = termination.tolerance
    lines = []
    for i, kind, left, at, deep in list(zip(failed, kinds, *columns, strict=True))[: 1 if joint else SHOWN]:
        who = "the batch (joint control)" if joint else f"sample {i}"
        where = "" if solver.discrete else f", at t = {at:.6g}"
        lines.append(f"  {who}: {kind.name.lower()} after {int(deep)} steps{where}, residual = {number(left)}")
    if not joint and len(failed) > SHOWN:
        lines.append(f"  and {len(failed) - SHOWN} more")
    count = "the batch" if joint else f"{len(failed)} of {len(status)} samples"
    bounded = (t >= end)[failed].tolist()
    said = [
        f"{kind.name.lower()}: {advice(kind, left, at_end, termination, solver)}"
        for kind, left, at_end in zip(kinds, columns[0], bounded, strict=True)
    ]
    limit = f"converged up to {tolerance:.3g}" if tolerance > 0.0 else "steps unrolled"
    what = "\n".join(
        [
            f"{count} did not reach a steady state with solver {solver.name!r} (residual by mode {termination.mode!r}, "
            f"{limit}).",
            *lines,
        ]
    )
    said, noise = dict.fromkeys(said), _of_rounding(columns[0], termination, precision)
    error = NotConverged(f"{what}\n{'; '.join(said)}.{noise}", failed, columns[1])
    error.residual, error.tolerance = columns[0], tolerance
    error.what, error.advice = what, [*said, noise]
    return error


def advice(kind: Status, residual: float, at_end: bool, termination: Termination, solver: Solver) -> str:
    """What happened to a sample, and what to try: never the solver in use."""
    if kind is Status.NON_FINITE:
        return _NON_FINITE
    if kind is Status.MAX_STEPS:
        ratio = "the ratio of successive residuals (solution.steps.stiffness)" if solver.discrete else "|∂f/∂z|"
        return (
            f"max_steps ran out before the residual was within the tolerance. Where {ratio} is near 1 the map hardly "
            f"contracts, and where the residual does not fall at all it may have no fixed point. {solver.remedy}; "
            f"raise max_steps; loosen rtol/atol (or nde.Termination's); or {_CONTRACT}"
        )
    if kind is Status.NOT_CONVERGED and at_end:
        return "the bound t of the horizon was reached first. Raise t, or loosen rtol/atol (or nde.Termination's)"
    if kind is Status.NOT_CONVERGED and residual <= CLOSE * termination.tolerance:
        return (
            f"the residual stays within {CLOSE:g} tolerances, and flat (nde.Termination's patience and fall). Loosen "
            "rtol/atol (or nde.Termination's), let it go on (nde.Termination(patience=None)), use a float64 state if "
            f"the tolerance is near the precision of the present one. Or {solver.remedy[0].lower()}{solver.remedy[1:]}"
        )
    if kind is Status.NOT_CONVERGED:
        return (
            f"no residual was a new least one in {FAR * termination.patience} steps ({FAR} times nde.Termination's "
            f"patience): the map may have no fixed point, or solver {solver.name!r} jumps about. {solver.remedy}; or "
            f"{_CONTRACT}"
        )
    if kind is Status.DIVERGED:
        return (
            f"the residual grew without bound. Where the least one, above, is large, the map expands or has no fixed "
            f"point; where it is small it is rather solver {solver.name!r} that has lost its way. {solver.remedy}; "
            f"{_CONTRACT}; or start nearer to the steady state"
        )
    return kind.message


def _of_rounding(residuals: Sequence[float], termination: Termination, precision: torch.dtype) -> str:
    """A sentence where a residual is noise of the precision that f computes in."""
    eps = torch.finfo(precision).eps
    tolerance, noise = (factor * eps for factor in _ROUNDING)
    if termination.mode == "absolute" or termination.tolerance > tolerance or min(residuals) > noise:
        return ""
    return (
        f" f computes in {precision}, whose precision is {eps:.2g}: residuals near that are rounding, and a tolerance "
        f"of {termination.tolerance:.2g} is hard to meet. Use rtol={tolerance:.1g} or more, or compute f in a wider "
        "dtype (a wider state, or no autocast)."
    )
