"""What the numbers of a diagnosed solve suggest.

Every piece of advice follows from a number and a threshold; the thresholds are the constants below, and
tests/test_diagnose.py holds them against problems whose trouble is known.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import compiled
from .errors import Status
from .retrace import every_state
from .solution import Solution
from .termination import Unrolled
from .unsettled import advice as unsettled_advice

if TYPE_CHECKING:
    from .diagnose import LayerDiagnosis

# Fewer steps than these are not worth an advice about their number,
FEW_STEPS = 20
# but for a penalty on their error, which halves the six of a classifier of digits (benchmarks/existing_code.py).
PENALTY_STEPS = 5
# Stiff: more than half of the steps have |dt|·stiffness above half of the method's stability size.
STIFF_STEP, STIFF_SHARE = 0.5, 0.5
# An implicit method's Jacobian costs one backward pass per component.
MANY_COMPONENTS = 100
# A transient: half of the hardest sample's steps lie within a twentieth of its horizon.
TRANSIENT = 0.05
# Rejections: a fifth of the attempts, and some of them.
REJECTED_SHARE, REJECTED = 0.2, 3
# A slow sample: twice the evaluations of the median one.
SLOW = 2.0
# Limited by accuracy: the median error ratio is above a twentieth (it settles near 0.2, where a step does not grow),
# and stability is far. A tolerance is tight for a method of order 5 where it takes a hundred steps at rtol below 1e-7.
ACCURACY, FAR_FROM_STIFF, TIGHT_RTOL, TIGHT_STEPS = 0.05, 0.25, 1e-7, 100
# float32's error estimates may be rounding noise where rtol is below a hundred times its precision eps, and are where
# the median error ratio is below some times eps / rtol, the ratio that rounding alone makes.
NOISE, NOISY_RATIO = 100.0, 3.0
# A map hardly contracts where a step leaves more than so much of the residual. A steady state takes many evaluations
# where it takes more than so many.
SLOW_MAP, MANY_EVALUATIONS = 0.8, 30
# What stands around f decides, where f takes less than half of the time.
OVERHEAD = 0.5


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: "failed", "stiff", "jump", "rejections", "transient", "slow samples", "tolerance", "precision",
            "overhead"; of steady states also "contraction" and "depth".
        what: the observation, with its numbers. advice: what it suggests.
    """

    kind: str
    what: str
    advice: str


def findings(layer: LayerDiagnosis, closer: Solution, crowding: Tensor | None) -> list[Finding]:
    """What stands out, in the order of what to do first.

    Args:
        layer: the diagnosis, without findings. closer: the solve that tells samples apart, see there.
        crowding: |dt|·stiffness over the stability size of every accepted step of `closer`, or None.
    """
    if layer.solution.residual is not None:
        return [
            *_unsettled(layer),
            *_contraction(layer),
            *_depth(layer),
            *_slow_samples(layer, layer.solution),
            *_overhead(layer),
        ]
    stiff, rejections = _stiff(layer, crowding), _rejections(layer, closer)
    jumps = any(finding.kind == "jump" for finding in rejections)
    return [
        *_failed(layer, ~layer.solution.converged),
        *stiff,
        *rejections,
        *([] if jumps else _transient(layer, closer)),
        *_slow_samples(layer, closer),
        *([] if stiff else _tolerance(layer)),
        *_precision(layer),
        *_overhead(layer),
    ]


def _unsettled(layer: LayerDiagnosis) -> list[Finding]:
    """As `_failed`, of a solve for a steady state, whose message says more."""
    solution = layer.solution
    p = solution._problem
    lost = ~(solution.usable if isinstance(p.rest.termination, Unrolled) else solution.converged)
    found = _failed(layer, lost)
    if not found:
        return []
    b = int(lost.nonzero()[0])
    at_end = bool((solution.t_end >= p.end)[b])
    how = unsettled_advice(
        Status(int(solution.status[b])), float(solution.residual[b]), at_end, p.rest.termination, p.solver
    )
    return [Finding("failed", found[0].what, how)]


def _contraction(layer: LayerDiagnosis) -> list[Finding]:
    ratio, name = layer.contraction, layer.solution.solver.name
    if ratio is None or ratio <= SLOW_MAP or layer.accepted < PENALTY_STEPS:
        return []
    what = f"a step of {name} leaves {100 * ratio:.0f} % of the residual"
    better = "" if name != "fixed_point" else "take solver='anderson' or 'broyden'; or "
    penalty = "make the map flatter where it ends (reg.EquilibriumJacobian, reg.Contraction)"
    return [Finding("contraction", what, better + penalty)]


def _depth(layer: LayerDiagnosis) -> list[Finding]:
    if layer.nfe < MANY_EVALUATIONS:
        return []
    solver = layer.solution.solver
    what = f"{layer.nfe:.0f} evaluations of f to come to rest"
    near = "begin nearer: initial=a Module of x, or 'first_step', with the penalty reg.Skip"
    if solver.discrete:
        return [Finding("depth", what, near)]
    per_step = layer.nfe / max(layer.accepted + layer.rejected, 1.0)
    what += f", {per_step:.1f} a step of {solver.name}"
    return [Finding("depth", what, f"an iteration takes one a step: solver='anderson' or 'broyden'; or {near}")]


def _failed(layer: LayerDiagnosis, which: Tensor) -> list[Finding]:
    lost = which.nonzero().flatten()
    if not len(lost):
        return []
    kinds = sorted({Status(s).name for s in layer.solution.status[lost].tolist()})
    shown = ", ".join(map(str, lost[:5].tolist())) + (" ..." if len(lost) > 5 else "")
    what = f"{len(lost)} of {len(layer.solution.status)} samples ({shown}): {', '.join(kinds)}"
    return [Finding("failed", what, "solve once with on_failure='raise': its message says where and why")]


def _stiff(layer: LayerDiagnosis, crowding: Tensor | None) -> list[Finding]:
    if crowding is None or not len(crowding) or layer.accepted < FEW_STEPS:
        return []
    share = (crowding > STIFF_STEP).double().mean().item()
    if share <= STIFF_SHARE:
        return []
    what = (
        f"{100 * share:.0f} % of the steps use more than half of the method's stability size: "
        "stability limits the step, not accuracy"
    )
    size = layer.solution._problem.field.layout.features
    if layer.solution._problem.noisy:
        method = "(no method for SDEs is implicit)"
    elif size <= MANY_COMPONENTS:
        method = 'or solver="auto", "rodas5p"'
    else:
        method = f"({size} components are many for an implicit method)"
    advice = f"penalize it (reg.GlobalStiffness, reg.LocalStiffness), {method}; a looser tolerance does not help"
    return [Finding("stiff", what, advice)]


def _rejections(layer: LayerDiagnosis, closer: Solution) -> list[Finding]:
    b = int(layer.hardest[0])
    accepted, rejected = int(closer.stats.accepted[b]), int(closer.stats.rejected[b])
    if rejected < REJECTED or rejected < REJECTED_SHARE * (accepted + rejected) or layer.solution._problem.noisy:
        return []  # of an SDE, the noise has steps rejected
    what = f"{rejected} of the {accepted + rejected} attempts of sample {b} were rejected"
    jump = find_jump(closer, b)
    if jump is None:
        advice = (
            "f has kinks (relu, abs, clamp), or changes abruptly: a smooth activation, or fixed steps (rk4 with dt0)"
        )
        return [Finding("rejections", what, advice)]
    t, in_time = jump
    what += f"; f jumps at t = {t:.6g}"
    advice = (
        f"name the jump: jump_times=[{t:.6g}]"
        if in_time
        else "the jump is in z (torch.where, round, a comparison): make f smooth there, or find it by an nde.Event"
    )
    return [Finding("jump", what, advice)]


def _transient(layer: LayerDiagnosis, closer: Solution) -> list[Finding]:
    b = int(layer.hardest[0])
    dt = closer.steps.dt[closer.steps.mask[:, b], b].abs()
    if len(dt) < FEW_STEPS:
        return []
    # The shortest time in which half of the steps follow each other.
    ends, half = dt.cumsum(0), (len(dt) + 1) // 2
    spans = ends[half - 1 :] - (ends - dt)[: len(dt) - half + 1]
    share = (spans.min() / ends[-1]).item()
    if share > TRANSIENT:
        return []
    start = closer.steps.t[int(spans.argmin()), b].item()
    what = (
        f"half of the {len(dt)} steps of sample {b} lie within {100 * share:.2g} % of the horizon, from t = {start:.4g}"
    )
    advice = (
        'penalize what happens there: reg.GlobalError, or reg.LocalError(sampling="biased"), which samples where the '
        "steps are; unbiased times would miss it"
    )
    return [Finding("transient", what, advice)]


def _slow_samples(layer: LayerDiagnosis, closer: Solution) -> list[Finding]:
    nfe = closer.stats.nfe.double()
    most, median = nfe.max().item(), nfe.median().item()
    if len(nfe) < 2 or most < SLOW * median or closer.stats.accepted.max() < FEW_STEPS:
        return []
    slow = (nfe >= SLOW * median).nonzero().flatten()
    shown = ", ".join(map(str, layer.hardest[: min(len(slow), 5)].tolist()))
    what = (
        f"{len(slow)} of {len(nfe)} samples need at least twice the median of {median:.0f} evaluations, up to "
        f"{most:.0f}: {shown}"
    )
    if layer.solution.control.per_sample:
        advice = "look at these samples; the others do not pay for them under per-sample control"
    else:
        advice = 'control="per_sample": under joint control the whole batch takes the steps of its hardest sample'
    return [Finding("slow samples", what, advice)]


def _tolerance(layer: LayerDiagnosis) -> list[Finding]:
    solution = layer.solution
    limited = layer.error_ratio is not None and layer.error_ratio > ACCURACY
    count = solution.stats.accepted.median().item()
    if not limited or count < PENALTY_STEPS or (layer.stability or 0.0) > FAR_FROM_STIFF:
        return []
    what = f"accuracy limits the step: {count} steps at a median error ratio of {layer.error_ratio:.2g}"
    penalty = "penalize the error (reg.GlobalError, reg.LocalError)"
    rtol = solution.rtol if not isinstance(solution.rtol, Tensor) else solution.rtol.min().item()
    if rtol < TIGHT_RTOL and count >= TIGHT_STEPS and solution.solver.order < 8:
        advice = f"rtol = {rtol:.1g} is tight for order {solution.solver.order}: loosen it, or take solver='dopri8'"
        return [Finding("tolerance", what, f"{advice}; or {penalty}")]
    return [Finding("tolerance", what, f"loosen rtol = {rtol:.1g} if the task allows, or {penalty}")]


def _precision(layer: LayerDiagnosis) -> list[Finding]:
    solution = layer.solution
    rtol = solution.rtol if not isinstance(solution.rtol, Tensor) else solution.rtol.min().item()
    eps = torch.finfo(solution._z0.dtype).eps
    if not solution.control.adaptive or rtol >= NOISE * eps:
        return []
    if layer.error_ratio is not None and layer.error_ratio > NOISY_RATIO * eps / rtol:
        return []
    what = f"rtol = {rtol:.1g} in {str(solution._z0.dtype).removeprefix('torch.')}, whose precision is {eps:.1g}"
    return [Finding("precision", what, "error estimates are rounding noise there: loosen rtol, or solve in float64")]


def _overhead(layer: LayerDiagnosis) -> list[Finding]:
    if layer.f_share >= OVERHEAD or layer.solution._problem.compile:
        return []
    what = f"f takes {100 * layer.f_share:.0f} % of the solve; the rest stands around it"
    advice = "larger batches; on the CPU torch.set_num_threads(1) for small states"
    if not compiled.refused(layer.solution._problem):
        advice += ", and a compiled solve: nde.compile(layer)"
    return [Finding("overhead", what, advice)]


def find_jump(solution: Solution, sample: int) -> tuple[float, bool] | None:
    """Where f jumps along a sample's solution, near steps that fell.

    Bisection of the interval where f changes most, by the half in which it changes more: what is left at the resolution
    of t is a jump.

    Args:
        solution: of `solve`. sample: which one.

    Returns:
        (t, whether f jumps at that time whatever the state is), or None where no jump was found.
    """
    p, steps, outcome = solution._problem, solution.steps, solution._outcome
    mine = steps.mask[:, sample]
    dt = steps.dt[mine, sample].abs()
    fallen = (dt[1:] < 0.7 * dt[:-1]).nonzero().flatten() + 1
    if p.joint or not len(fallen):
        return None
    rows = torch.tensor([sample], device=dt.device)
    f, final = p.field.on(rows), outcome.final[sample]
    states = outcome.trajectory.grid.pad(outcome.from_states(lambda: every_state(p, outcome, solution._z0)))
    t = torch.cat([steps.t[mine, sample], solution.t_end[sample : sample + 1]])
    z = torch.cat([states[mine, sample], final[None]])

    def node(t: Tensor, z: Tensor) -> _Node:
        return _Node(t, z, f(f.times(t[None])[0], z[None])[0])

    for j in fallen[dt[fallen].argsort()][:5].tolist():
        around = [node(t[i], z[i]) for i in range(max(j - 1, 0), min(j + 3, len(t)))]
        low, high = max(itertools.pairwise(around), key=lambda ends: _change(*ends))
        before = _change(low, high)
        for _ in range(80):
            middle = node(0.5 * (low.t + high.t), 0.5 * (low.z + high.z))
            if middle.t.item() in (low.t.item(), high.t.item()):
                break
            low, high = (low, middle) if _change(low, middle) > _change(middle, high) else (middle, high)
        if _change(low, high) > 0.5 * before:
            return high.t.item(), _change(low, node(high.t, low.z)) > 0.25 * before
    return None


class _Node(NamedTuple):
    """A point of a solution: its time, its state, [features], and f there."""

    t: Tensor
    z: Tensor
    slope: Tensor


def _change(low: _Node, high: _Node) -> float:
    return (high.slope - low.slope).norm().item()
