"""Where a model's solves work hard, and what that suggests.

Every piece of advice follows from a number and a threshold; the thresholds are the constants below, and
tests/test_diagnose.py holds them against problems whose trouble is known.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import solvers
from .discover import discover
from .equations import Coefficients
from .errors import Status
from .field import full_precision
from .problem import Problem
from .retrace import every_state
from .solution import Solution
from .solve import solve

# Fewer steps than these are not worth an advice about their number.
FEW_STEPS = 20
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
# float32's error estimates are rounding noise where rtol is below a hundred times its precision.
NOISE = 100.0
# What stands around f decides, where f takes less than half of the time.
OVERHEAD = 0.5


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: "failed", "stiff", "jump", "rejections", "transient", "slow samples", "tolerance", "precision",
            "overhead".
        what: the observation, with its numbers. advice: what it suggests.
    """

    kind: str
    what: str
    advice: str


@dataclass(frozen=True)
class LayerDiagnosis:
    """What one layer's solver did.

    Attributes:
        name: of the layer in the model.
        solution: of the call; its `stats` have the work of every sample.
        nfe, accepted, rejected: mean per sample.
        steps_per_time: accepted steps per unit of t, [batch].
        hardest: the samples that needed most evaluations, the hardest first, at most 5, [samples].
        error_ratio: median over the accepted steps, or None.
        stability: median over the accepted steps of |dt|·stiffness over the method's stability size: near 1, stability
            limits the step. None for a method that has none.
        seconds: of one forward solve, not compiled and without gradients; f_share: the part of it that f took.
        closer: what `stability` and `hardest` were read from, where the solution does not tell: another solve.
        findings: what stands out.
    """

    name: str
    solution: Solution
    nfe: float
    accepted: float
    rejected: float
    steps_per_time: Tensor
    hardest: Tensor
    error_ratio: float | None
    stability: float | None
    seconds: float
    f_share: float
    closer: str | None
    findings: list[Finding]

    def summary(self) -> dict:
        """As plain numbers."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "solution"}
        given["findings"] = [dataclasses.asdict(finding) for finding in self.findings]
        given |= {name: given[name].tolist() for name in ("steps_per_time", "hardest")}
        return {"solver": self.solution.solver.name, "samples": len(self.solution.status), **given}

    def __str__(self) -> str:
        nfe = self.solution.stats.nfe
        lines = [
            f"{self.name or 'layer'}: {self.solution.solver.name}, {len(nfe)} samples",
            f"  evaluations of f       {self.nfe:.1f} per sample ({int(nfe.min())} to {int(nfe.max())})",
            f"  steps                  {self.accepted:.1f} accepted, {self.rejected:.1f} rejected; "
            f"{self.steps_per_time.mean():.3g} per unit of t",
        ]
        if self.error_ratio is not None:
            lines.append(f"  median error ratio     {self.error_ratio:.2g} (rejected above 1)")
        if self.stability is not None:
            lines.append(f"  median stability use   {self.stability:.2g} of the method's stability size")
        lines.append(f"  forward solve          {1e3 * self.seconds:.3g} ms, {100 * self.f_share:.0f} % of it in f")
        lines.append(f"  hardest samples        {', '.join(f'{b} ({int(nfe[b])})' for b in self.hardest.tolist())}")
        if self.closer:
            lines.append(f"  (looked at closer by   {self.closer})")
        for finding in self.findings:
            lines += [f"  * {finding.kind}: {finding.what}", f"    -> {finding.advice}"]
        if not self.findings:
            lines.append("  * nothing stands out: fewer evaluations come from a looser tolerance or from a penalty")
        return "\n".join(lines)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found, layer by layer; printing it shows it.

    Attributes:
        layers: one for each layer that solved something.
    """

    layers: list[LayerDiagnosis]

    @property
    def findings(self) -> list[Finding]:
        """Those of all layers."""
        return [finding for layer in self.layers for finding in layer.findings]

    def summary(self) -> list[dict]:
        """The numbers of every layer as plain ones, for JSON."""
        return [layer.summary() for layer in self.layers]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def diagnose(model: nn.Module | Solution, *inputs, show: bool = True) -> Diagnosis:
    """Says where a model's solvers work hard, and which penalty or solver that suggests.

    The model is called once, without gradients, in the mode that it is in; its layers hold these solutions afterwards.
    Every solve is made again, to see how long f takes in it; where it does not tell samples apart (joint control), or
    its method has no stiffness estimate, once more with what does.

    Args:
        model: a model with neuralde layers inside, or a Solution.
        *inputs: what the model is called with; a failing solve does not raise here.
        show: print the diagnosis.

    Returns:
        A `Diagnosis`.

    Raises:
        TypeError: model is neither. ValueError: no layer in it solved anything; or inputs were given with a Solution.
    """
    if isinstance(model, Solution):
        if inputs:
            raise ValueError("a Solution needs no inputs")
        found = {"": model}
    elif isinstance(model, nn.Module):
        found = _solutions(model, inputs)
    else:
        raise TypeError(f"model must be a Module or a Solution, got {type(model).__name__}")
    with torch.no_grad():
        diagnosis = Diagnosis([_look(name, solution) for name, solution in found.items()])
    if show:
        print(diagnosis)
    return diagnosis


def _solutions(model: nn.Module, inputs: tuple) -> dict[str, Solution]:
    """The solutions of one call, by the names of the layers."""
    layers = {name: x for name, x in model.named_modules() if isinstance(getattr(x, "solve_options", None), dict)}
    kept = {name: dict(layer.solve_options) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.solution = None
            layer.solve_options["on_failure"] = "ignore"
        with torch.no_grad():
            model(*inputs)
    finally:
        for name, layer in layers.items():
            layer.solve_options = kept[name]
    found = {n: x.solution for n, x in model.named_modules() if isinstance(getattr(x, "solution", None), Solution)}
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} solved anything when the model was called")
    return found


class _Timed:
    """An f that knows how long its evaluations took."""

    def __init__(self, f, device: torch.device):
        self.f, self.device, self.seconds = f, device, 0.0

    def __call__(self, *arguments):
        began = _now(self.device)
        out = self.f(*arguments)
        self.seconds += _now(self.device) - began
        return out


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(problem: Problem, z0: Tensor) -> tuple[float, float]:
    """(seconds of a solve, the share of it that f took): the faster of two, since the first one warms up."""
    found = []
    for _ in range(2):
        equation, f = copy.copy(problem.field.equation), problem.field.equation.f
        parts = (f.drift, f.diffusion) if problem.noisy else (f,)
        timed = [_Timed(part, z0.device) for part in parts]
        object.__setattr__(equation, "f", Coefficients(*timed) if problem.noisy else timed[0])
        field = copy.copy(problem.field)
        field.equation = equation
        began = _now(z0.device)
        with full_precision(z0.device):
            p = dataclasses.replace(problem, field=field, compile=False, observer=None)
            discover(p, z0, field.first(p.first_instant, z0, p.end))
        seconds = _now(z0.device) - began
        found.append((seconds, sum(part.seconds for part in timed) / seconds))
    return min(found)


def _closer(solution: Solution) -> tuple[Solution, str | None]:
    """A solve that tells samples apart and has a stiffness estimate: this one, or another."""
    p = solution._problem
    joint, blind = p.joint, not solution.solver.reports_stiffness and solution.solver.stability_size is not None
    if not (joint or blind) or not solution.control.adaptive or not p.norm.plain:
        return solution, None
    method = solvers.get("tsit5") if blind else solution.solver
    ts = solution.ts if solution.ts.dim() == 1 else solution.ts.T
    how = {"rtol": p.norm.rtol, "atol": p.norm.atol, "args": p.field.args, "max_steps": p.max_steps}
    z0 = p.field.layout.unpack(solution._z0)
    for control in ("per_sample", "joint"):
        try:
            made = solve(p.field.equation, z0, ts, method, control=control, on_failure="ignore", **how)
        except ValueError:  # f mixes samples: they can't be told apart
            continue
        if control == "joint" and not blind:
            break
        return made, f"{method.name}, control={control!r}"
    return solution, None


def _look(name: str, solution: Solution) -> LayerDiagnosis:
    closer, how = _closer(solution)
    stats, steps, near = solution.stats, solution.steps, closer.steps
    length = (solution.t_end - solution._problem.start).abs().clamp(min=torch.finfo(solution.ts.dtype).tiny)
    nfe = closer.stats.nfe
    stability = None
    if closer.solver.reports_stiffness and closer.solver.stability_size is not None:
        stability = near.stiffness * near.dt.abs() / closer.solver.stability_size
    seconds, share = _timed(solution._problem, solution._z0)
    found = LayerDiagnosis(
        name=name,
        solution=solution,
        nfe=stats.nfe.double().mean().item(),
        accepted=stats.accepted.double().mean().item(),
        rejected=stats.rejected.double().mean().item(),
        steps_per_time=stats.accepted / length,
        hardest=nfe.argsort(descending=True, stable=True)[:5],
        error_ratio=None if steps.error is None else _median(steps.error[steps.mask]),
        stability=None if stability is None else _median(stability[near.mask]),
        seconds=seconds,
        f_share=share,
        closer=how,
        findings=[],
    )
    crowded = None if stability is None or not len(near) else stability[near.mask] > STIFF_STEP
    # In the order of what to do first.
    found.findings.extend(_failed(found))
    stiff = _stiff(found, crowded)
    found.findings.extend(stiff)
    for judge in (_rejections, _transient, _slow_samples):
        found.findings.extend(judge(found, closer))
    found.findings.extend([] if stiff else _tolerance(found))
    found.findings.extend(_precision(found))
    found.findings.extend(_overhead(found))
    return found


def _median(x: Tensor) -> float | None:
    return x.double().median().item() if x.numel() else None


# -- what follows from the numbers -----------------------------------------------------------------------------------


def _failed(layer: LayerDiagnosis) -> list[Finding]:
    lost = (~layer.solution.converged).nonzero().flatten()
    if not len(lost):
        return []
    kinds = sorted({Status(s).name for s in layer.solution.status[lost].tolist()})
    shown = ", ".join(map(str, lost[:5].tolist())) + (" ..." if len(lost) > 5 else "")
    what = f"{len(lost)} of {len(layer.solution.status)} samples ({shown}): {', '.join(kinds)}"
    return [Finding("failed", what, "solve once with on_failure='raise': its message says where and why")]


def _stiff(layer: LayerDiagnosis, crowded: Tensor | None) -> list[Finding]:
    if crowded is None or layer.accepted < FEW_STEPS or crowded.double().mean().item() <= STIFF_SHARE:
        return []
    what = (
        f"{100 * crowded.double().mean().item():.0f} % of the steps use more than half of the method's stability size: "
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
    if share > TRANSIENT or any(finding.kind == "jump" for finding in layer.findings):
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
    if not limited or count < FEW_STEPS or (layer.stability or 0.0) > FAR_FROM_STIFF:
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
    what = f"rtol = {rtol:.1g} in {str(solution._z0.dtype).removeprefix('torch.')}, whose precision is {eps:.1g}"
    return [Finding("precision", what, "error estimates are rounding noise there: loosen rtol, or solve in float64")]


def _overhead(layer: LayerDiagnosis) -> list[Finding]:
    if layer.f_share >= OVERHEAD or layer.solution._problem.compile:
        return []
    what = f"f takes {100 * layer.f_share:.0f} % of the solve; the rest stands around it"
    advice = "larger batches; on the CPU torch.set_num_threads(1) for small states"
    if layer.solution.residual is None:
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
