"""Where a model's solves work hard; what that suggests is in `findings.py`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import solvers
from .equations import Coefficients
from .field import full_precision
from .findings import Finding, findings
from .iterate import followed
from .problem import Problem
from .seen import seen
from .solution import Solution
from .solve import solve

# What to do where another library, or none, makes the solves.
_WRAP = (
    "diagnose looks at neuralde's solves, and at those of torchdiffeq and torchdyn that a penalty could be taken of: "
    "import odeint from regularizers.torchdiffeq, or call regularizers.attach(model) for torchdyn's layers. Else make "
    'a layer of the vector field: neuralde.NeuralODE(f, t, solver=..., control="joint")'
)


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
        contraction: of an iteration, the median ratio of successive residuals, or None.
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
    contraction: float | None
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
        nfe, steady = self.solution.stats.nfe, self.solution.residual is not None
        rate = "" if steady else f"; {self.steps_per_time.mean():.3g} per unit of t"
        lines = [
            f"{self.name or 'layer'}: {self.solution.solver.name}, {len(nfe)} samples",
            f"  evaluations of f       {self.nfe:.1f} per sample ({int(nfe.min())} to {int(nfe.max())})",
            f"  steps                  {self.accepted:.1f} accepted, {self.rejected:.1f} rejected{rate}",
        ]
        if steady:
            residual, within = self.solution.residual, self.solution.termination.tolerance
            known = residual[residual.isfinite()]
            rest = f" (at rest up to {within:.2g})" if within > 0.0 else ""
            most = f"{float(known.max()):.2g} at most" if len(known) else "not finite"
            others = f", of {len(known)} samples that have one" if 0 < len(known) < len(residual) else ""
            lines.append(f"  residual               {most}{rest}{others}")
        if self.contraction is not None:
            lines.append(f"  median contraction     {self.contraction:.2g} per step")
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
    What torchdiffeq and torchdyn solve, where `regularizers` has them show it, is solved by neuralde too: by the same
    method, to the same tolerances, with their step-size control: in about their steps.
    Every solve is made again, to see how long f takes in it; where it does not tell samples apart (joint control), or
    its method has no stiffness estimate, once more with what does.

    Args:
        model: a model with neuralde layers inside, or solves of neuralde's, or of another library's odeint that was
            imported from `regularizers.torchdiffeq`, or torchdyn's layers after `regularizers.attach`; or a Solution.
        *inputs: what the model is called with; a failing solve does not raise here.
        show: print the diagnosis.

    Returns:
        A `Diagnosis`.

    Raises:
        TypeError: model is neither. ValueError: nothing was solved where it can be seen; or inputs were given with a
            Solution.
    """
    if isinstance(model, Solution):
        if inputs:
            raise ValueError("a Solution needs no inputs")
        found = {"": model}
    elif isinstance(model, nn.Module):
        found = _solutions(model, inputs)
    else:
        raise TypeError(f"model must be a Module or a Solution, got {type(model).__name__}: {_WRAP}")
    with torch.no_grad():
        diagnosis = Diagnosis([_look(name, solution) for name, solution in found.items()])
    if show:
        print(diagnosis)
    return diagnosis


def _solutions(model: nn.Module, inputs: tuple) -> dict[str, Solution]:
    """The solutions of one call, by the names of the layers, or of the vector fields where no layer holds them."""
    modules = dict(model.named_modules())
    with seen() as made, torch.no_grad():
        model(*inputs)
    found = {}
    for name, module in modules.items():
        solution = getattr(module, "solution", None)
        # What torch.compile makes of a layer holds what the layer does.
        if any(solution is one for one in made) and not any(solution is one for one in found.values()):
            found[name] = solution
    held = {_identity(solution) for solution in found.values()}
    others = {_identity(solution): solution for solution in made}  # of a vector field that is solved often, the last
    for which, solution in others.items():
        if which not in held:
            f = _field(solution)
            name = next((name for name, module in modules.items() if module is f), "")
            name = name or getattr(f, "__name__", type(f).__name__)
            found[name if name not in found else f"{name} ({len(found)})"] = solution
    if not found:
        name = type(model).__name__
        if any(isinstance(getattr(module, "solve_options", None), dict) for module in modules.values()):
            raise ValueError(f"no layer of {name} solved anything when the model was called")
        raise ValueError(f"nothing in {name} was solved where neuralde sees it: {_WRAP}")
    return found


def _field(solution: Solution):
    """The user's f of a solve."""
    return inspect.unwrap(solution._problem.field.equation.f)


def _identity(solution: Solution) -> tuple:
    """By which two solves have one f; a method is another object whenever it is asked for."""
    f = _field(solution)
    return id(getattr(f, "__self__", f)), getattr(f, "__func__", None)


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
            rest = copy.copy(problem.rest)  # the solution goes on using its own
            p = dataclasses.replace(problem, field=field, compile=False, observer=None, rest=rest)
            followed(p, z0)
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
        except (ValueError, TypeError, RuntimeError, IndexError):  # f mixes samples, or takes one t for all of them
            continue
        if control == "joint" and not blind:
            break
        return made, f"{method.name}, control={control!r}"
    return solution, None


def _look(name: str, solution: Solution) -> LayerDiagnosis:
    closer, how = _closer(solution)
    stats, steps, near, discrete = solution.stats, solution.steps, closer.steps, solution.solver.discrete
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
        error_ratio=None if discrete or steps.error is None else _median(steps.error[steps.mask]),
        contraction=_median(steps.stiffness[steps.mask]) if discrete else None,
        stability=None if stability is None else _median(stability[near.mask]),
        seconds=seconds,
        f_share=share,
        closer=how,
        findings=[],
    )
    found.findings.extend(findings(found, closer, None if stability is None else stability[near.mask]))
    return found


def _median(x: Tensor) -> float | None:
    return x.double().median().item() if x.numel() else None
