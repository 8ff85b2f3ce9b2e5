"""The adjoints of steady states: a linear system in place of the steps backwards."""

from __future__ import annotations

import abc
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import compiled
from .. import control as _control
from .. import termination as _termination
from ..errors import NeuralDEError, SolveWarning
from ..field import reachable
from ..graph import depends, without_gradient
from ..iterate import followed, iterate
from ..linear import LinearSolve, gmres
from ..problem import Problem
from ..solvers import SOLVERS
from ..solvers.iteration import count, fraction, real, unreal
from ..solvers.linearize import ordinary
from ..trajectory import Counts, Trajectory
from .base import Adjoint, Outcome, plain

if TYPE_CHECKING:
    from ..compiled import SteadyEngine


_LOOSEST = 1e-2  # tolerance of a linear system: the square root of bfloat16's precision would be 0.09


class AtRest(Adjoint):
    """What the adjoints of steady states share.

    f is evaluated once more at the steady state, on the tape; nothing else of the solve is. So gradients reach the
    parameters of f, args and whatever else f uses, and the memory is that of one evaluation. z0 gets none: where the
    solve starts does not matter to where it ends.
    """

    exact = False
    of_horizons = False
    of_steady = True

    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """See `Adjoint.solve`."""
        z0 = z0.detach()
        with torch.no_grad():
            engine = problem.compile and compiled.engine(problem)
            trajectory = (engine and engine.discover(problem, z0)) or followed(problem, z0)
        outcome = plain(trajectory)
        if torch.is_grad_enabled():
            for name in ("error", "stiffness"):
                figure = getattr(outcome, name)
                if figure is not None:
                    setattr(outcome, name, functools.partial(self._constant, figure, outcome))
            rows = _with_gradient(problem, trajectory)
            if rows is None or len(rows):
                self.attach(problem, outcome, rows, engine or None)
            else:
                outcome.final = _without(problem, outcome.final)
        return outcome

    def _constant(self, figure: Callable[[], Tensor], outcome: Outcome) -> Tensor:
        message = (
            f"the steps of a solve for a steady state have no gradient under adjoint={self.name!r}; use "
            "adjoint='direct' (with solver='fixed_point' or one for ODEs), or a penalty on the steady state itself: "
            "regularizers.EquilibriumJacobian, Contraction, LocalError, LocalStiffness"
        )
        return without_gradient(figure(), [outcome.final], message)

    @abc.abstractmethod
    def attach(self, problem: Problem, outcome: Outcome, rows: Tensor | None, engine: SteadyEngine | None):
        """Gives `outcome.final` its gradient.

        Args:
            rows: the samples that have one, None for all. engine: of compiled programs, or None.
        """


def _with_gradient(problem: Problem, trajectory: Trajectory) -> Tensor | None:
    """The samples whose end means something, None for all."""
    if trajectory.complete:
        return None
    kept = _termination.kept(trajectory.status).expand(len(trajectory.final))
    return None if bool(kept.all()) else kept.nonzero().flatten()


def _without(problem: Problem, final: Tensor) -> Tensor:
    """States that have no gradient to hand on, in the graph all the same."""
    leaves = pytree.tree_leaves(problem.field.args)
    given = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return beside(final, {id(x): x for x in (*given, *reachable(problem.field.equation.f))}.values())


def beside(final: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """The states, with a gradient of zero for these tensors.

    Parameters that get none at all would keep torch's DistributedDataParallel waiting for them.
    """
    return _Beside.apply(final, *tensors)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, final: Tensor, *tensors: Tensor) -> Tensor:
        ctx.like = [{"size": x.shape, "dtype": x.dtype, "device": x.device} for x in tensors]
        return final.view_as(final)

    @staticmethod
    def backward(ctx, v: Tensor):
        return v, *(torch.zeros(**like) for like in ctx.like)


def at_rest(problem: Problem, trajectory: Trajectory, rows: Tensor | None, z: Tensor | None = None):
    """The field of some of the samples, its time and its state where they ended.

    The other samples are left out where f can be evaluated without them; else they take the place of one of these: NaN
    must not come into the sums over the batch that gradients of parameters are.

    Args:
        rows: None for all.

    Returns:
        (z -> f(z) - z, the states [samples, features]).
    """
    field, t, z = problem.field, trajectory.reached, trajectory.final.detach() if z is None else z
    if rows is None:
        return functools.partial(field, field.times(t)[0]), z
    own = z.index_select(0, rows)
    if not field.can_shrink():
        everyone = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        everyone[rows] = torch.arange(len(rows), device=z.device)
        field.fill(t, own.index_select(0, everyone))
    part = field.on(rows)
    return functools.partial(part, part.times(t if problem.joint else t.index_select(0, rows))[0]), own


class _Linear(AtRest):
    """Those that hand a vector λ to one evaluation of f at the steady state: a gradient of λᵀ f."""

    def attach(self, problem: Problem, outcome: Outcome, rows: Tensor | None, engine: SteadyEngine | None):
        """See `AtRest.attach`."""
        final = outcome.final
        f, z = at_rest(problem, outcome.trajectory, rows)
        with ordinary(), torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
                slope = f(z)
        if not (slope.requires_grad and depends(slope, z)):  # on anything but where it is
            return
        tape = Tape(self, slope, z, rows, torch.finfo(problem.field.precision).eps, problem.joint)
        if engine is not None and rows is None:
            tape.costate = functools.partial(
                engine.costate, field=problem.field, t=outcome.trajectory.reached, z=z.detach()
            )
        own = _Attach.apply(slope, z.detach(), tape)
        outcome.final = own if rows is None else final.index_copy(0, rows, own)
        outcome.backward = functools.partial(tape.work, len(final))

    @abc.abstractmethod
    def costate(self, tape: Tape, v: Tensor) -> Tensor:
        """λ for the loss's gradient v, [samples, features] each, real."""


class Tape:
    """One evaluation of g(z) = f(z) - z at the steady state, and what went backwards through it.

    Attributes:
        rows: the samples, None for all. eps: the precision that f computes in.
        joint: whether the samples have one linear system together: under joint control f may mix them.
        costate: solves for the costate by a compiled program, or None: see `SteadyEngine.costate`.
        found: of the last backward pass, or None.
    """

    def __init__(self, adjoint: _Linear, slope: Tensor, z: Tensor, rows: Tensor | None, eps: float, joint: bool):
        self.adjoint, self.slope, self.z, self.rows, self.eps, self.joint = adjoint, slope, z, rows, eps, joint
        self.costate: Callable[[Problem, Tensor], Trajectory | None] | None = None
        self.found: LinearSolve | None = None

    def product(self, u: Tensor) -> Tensor:
        """Jᵀu of the Jacobian of f, [samples, features] each, real; or both in the shape of one system of the batch."""
        own = unreal(u.reshape(len(self.z), -1), self.z.dtype)
        how = {"retain_graph": True, "allow_unused": True}
        (back,) = torch.autograd.grad(self.slope, self.z, own.to(self.slope.dtype), **how)
        return u if back is None else real(own + back).reshape(u.shape)

    def work(self, batch: int) -> Counts | None:
        """What the last backward pass cost."""
        if self.found is None:
            return None
        each = self.found.iterations.expand(len(self.z))
        if self.rows is not None:
            each = each.new_zeros(batch).index_copy(0, self.rows, each)
        none = torch.zeros_like(each)
        return Counts(none, none, each, none, none, each)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope: Tensor, z: Tensor, tape: Tape) -> Tensor:
        ctx.tape, ctx.dtype = tape, slope.dtype
        return z.view_as(z)

    @staticmethod
    def backward(ctx, v: Tensor):
        tape = ctx.tape
        if torch.is_grad_enabled():
            raise NeuralDEError(
                f"gradients under adjoint={tape.adjoint.name!r} are those of a linear system and have no derivatives "
                "of their own; for double backward (create_graph=True) use adjoint='phantom', or 'direct' with "
                "solver='fixed_point' or one for ODEs"
            )
        found = tape.adjoint.costate(tape, real(v))
        return unreal(found, v.dtype).to(ctx.dtype), None, None


def _pack(x: Tensor) -> tuple[Tensor, int]:
    """Keeps what the tape saves with the tape itself.

    The linear solve goes backwards through it many times, which hooks from outside (torch.utils.checkpoint's) would
    take as so many reasons to make the whole solve again.
    """
    return x.detach(), x._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    x, version = packed
    if x._version != version:  # autograd's own look at this is left out where there are hooks
        raise RuntimeError(
            "a tensor that f used at the steady state was changed in place before the backward pass (by an optimizer's "
            "step?); run the backward pass first"
        )
    return x


class Implicit(_Linear):
    """The gradient of the implicit function theorem: (I - J)ᵀλ = v, then λᵀ∂f/∂θ; J = ∂f/∂z at the steady state.

    One linear system per sample, solved with products Jᵀu through the taped evaluation; one of the whole batch under
    joint control, where f may mix samples. As accurate as the steady state and the linear solve are.
    `solution.backward_stats.linear_solves` has the products that the samples needed; a system that was not solved to
    its tolerance warns, and its best λ is used.

    Args:
        solver: "gmres"; or "anderson" or "broyden" (or such an object), on λ = Jᵀλ + v.
        rtol: of the system, ‖v - (I - J)ᵀλ‖ / ‖v‖ (of an iteration, ‖Jᵀλ + v - λ‖ / ‖Jᵀλ + v‖); None takes the square
            root of the precision that f computes in: 1.5e-8 in float64, 3.5e-4 in float32; 0.01 in half of it.
        max_iter: products per sample.
        restart: products after which GMRES begins anew; it keeps so many vectors like z.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.

    Source: Bai, Kolter & Koltun, "Deep equilibrium models", 2019, theorem 1; Pal et al. 2023, "Continuous deep
    equilibrium models", which solves the system by GMRES.
    """

    def __init__(
        self,
        solver="gmres",
        rtol: float | None = None,
        max_iter: int = 100,
        restart: int = 20,
        name: str = "implicit",
    ):
        self.name, self.max_iter, self.restart = name, count("max_iter", max_iter), count("restart", restart)
        self.rtol = None if rtol is None else _control.check_tolerance("rtol", rtol)
        if solver != "gmres":
            known = "'gmres', " + ", ".join(repr(x.name) for x in SOLVERS.values() if x.discrete and x.name != "newton")
            if isinstance(solver, str) and solver not in SOLVERS:
                raise ValueError(f"solver must be one of {known}, got {solver!r}")
            solver = SOLVERS.find(solver)
            if not solver.discrete or solver.name == "newton":
                raise ValueError(f"solver must be one of {known}, got {solver.name!r}")
        self.solver = solver

    def costate(self, tape: Tape, v: Tensor) -> Tensor:
        """See `_Linear.costate`."""
        rtol = self.rtol or min(tape.eps**0.5, _LOOSEST)
        # What is not finite in a sample's gradient stays with the sample.
        finite = torch.isfinite(v).all(dim=1, keepdim=True)
        right = torch.where(finite, v, 0.0)
        right = right.reshape(1, -1) if tape.joint else right
        if self.solver == "gmres":
            found = gmres(lambda u: u - tape.product(u), right, rtol, self.restart, self.max_iter)
        else:
            found = self._iterate(tape, right, rtol)
        tape.found = found
        lost = (~found.converged).nonzero().flatten()
        if len(lost):
            self._warn(tape, found, lost, rtol)
        return torch.where(finite, found.x.reshape(v.shape), v)

    def _iterate(self, tape: Tape, right: Tensor, rtol: float) -> LinearSolve:
        """By one of the iterations for steady states: this is one."""
        field = _Costate(tape, right)
        # A system without a right-hand side is at rest at once.
        rest = _termination.Rest(_termination.Termination("relative", rtol=rtol, patience=None), joint=False)
        start = torch.zeros_like(right)
        times = torch.tensor([[0.0], [float("inf")]], dtype=right.dtype, device=right.device).expand(-1, len(right))
        problem = Problem(
            field=field,
            solver=self.solver,
            control=_control.StepControl(adaptive=False),
            times=times,
            norm=_control.Norm(rtol, 0.0, joint=False),
            dt0=self.solver.step_size,
            max_steps=self.max_iter,
            keep_stages=False,
            recorded=False,
            keep=0,
            rest=rest,
        )
        trajectory = (tape.costate and tape.costate(problem, right)) or iterate(problem, start, right)
        return LinearSolve(trajectory.final, trajectory.counts.nfe, rest.residual, trajectory.status == 0)

    def _warn(self, tape: Tape, found: LinearSolve, lost: Tensor, rtol: float):
        samples = (lost if tape.rows is None else tape.rows[lost]).tolist()
        few = ", ".join(map(str, samples[:5])) + (f" and {len(samples) - 5} more" if len(samples) > 5 else "")
        which = "system of the batch was" if tape.joint else f"systems of samples {few} were"
        worst = float(found.residual[lost].max())
        warnings.warn(
            f"adjoint={self.name!r}: the linear {which} not solved to {rtol:.3g}, but to a "
            f"residual of up to {worst:.3g} within {int(found.iterations.max())} products; their gradients are as "
            "inaccurate as that. The map hardly contracts there, or does not: make it more contractive "
            "(regularizers.EquilibriumJacobian), solve for the steady state more accurately, or allow more: "
            "nde.adjoints.Implicit(max_iter=..., rtol=...)",
            SolveWarning,
            stacklevel=2,
        )


class _Costate:
    """Jᵀλ + v - λ as a field, [systems, numbers]: what `discover` needs of one."""

    calls = 0
    takes_time = False

    def __init__(self, tape: Tape, v: Tensor):
        self.tape, self.v, self.layout = tape, v, None

    def times(self, t, c=None, dt=None):
        return (None,)

    def __call__(self, t, u: Tensor) -> Tensor:
        return self.tape.product(u) + self.v - u

    def on(self, rows: Tensor | None):
        return self

    def can_shrink(self) -> bool:
        return False  # the tape is of all samples


class Neumann(_Linear):
    """λ = Σ_{i ≤ terms} (Jᵀ)ⁱ v: the first terms of the series that the implicit gradient is, where f contracts.

    Its error falls as the contraction to the power terms + 1.

    Args:
        terms: k, products Jᵀu in the backward pass; 0 is "jfb".

    Raises:
        TypeError, ValueError: terms is no such number.

    Source: Geng et al. 2021, "On training implicit models".
    """

    name = "neumann"

    def __init__(self, terms: int = 5):
        self.terms = count("terms", terms)

    def costate(self, tape: Tape, v: Tensor) -> Tensor:
        """See `_Linear.costate`."""
        total = term = v
        for _ in range(self.terms):
            term = tape.product(term)
            total = total + term
        each = torch.full((len(v),), self.terms, dtype=torch.int64, device=v.device)
        fine = torch.ones_like(each, dtype=torch.bool)
        tape.found = LinearSolve(total, each, torch.zeros_like(v[:, 0]), fine)
        return total


class JFB(_Linear):
    """λ = v: J is taken as 0 in the backward pass, which costs one evaluation of f and a backward pass through it.

    Source: Fung et al. 2022, "JFB: Jacobian-free backpropagation for implicit networks".
    """

    name = "jfb"

    def costate(self, tape: Tape, v: Tensor) -> Tensor:
        """See `_Linear.costate`."""
        return v


class Phantom(AtRest):
    """The gradient of so many damped steps from the steady state, on the tape; the state stays what it is.

        z ← z + damping·(f(z) - z)

    Its error falls as the contraction of such a step to the power `steps`. It can be differentiated twice.

    Args:
        steps: k, at least 1; 1 without damping is "jfb".
        damping: in (0, 1].

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.

    Source: Geng et al. 2021, "On training implicit models".
    """

    name = "phantom"

    def __init__(self, steps: int = 5, damping: float = 0.5):
        self.steps, self.damping = count("steps", steps), fraction("damping", damping)

    def attach(self, problem: Problem, outcome: Outcome, rows: Tensor | None, engine: SteadyEngine | None):
        """See `AtRest.attach`."""
        final = outcome.final
        f, start = at_rest(problem, outcome.trajectory, rows)
        z = start
        with ordinary(), torch.enable_grad():
            for _ in range(self.steps):
                z = torch.add(z, f(z).to(z.dtype), alpha=self.damping)
        if not z.requires_grad:
            return
        own = start + (z - z.detach())
        outcome.final = own if rows is None else final.index_copy(0, rows, own)
