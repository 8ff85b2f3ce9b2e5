"""The checkpointed adjoint: one state per step is kept, each step is replayed in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import compiled
from ..discover import discover
from ..errors import NeuralDEError, Status
from ..field import full_precision
from ..graph import behind, without_gradient
from ..grid import Grid
from ..problem import Problem
from ..replay import Schedule, past_at, past_of, replay_all, replay_step
from ..solvers import Past
from ..trajectory import Trajectory
from .base import Adjoint, Outcome, packed, plain, states_of
from .binomial import blocks, limit, limited
from .dependencies import Dependencies, added, complain_of_change


class Checkpointed(Adjoint):
    """Discretise, then differentiate, one replayed step at a time.

    The exact gradient of the discrete solution, as "direct" has it, with memory that grows by one state per step; the
    price is one more evaluation of every stage. Gradients reach z0, args, the parameters of f and whatever tensors f
    closes over, also through `solution.error` and `solution.stiffness`. f is taken as a function of t, z, args and
    tensors that it holds: what it remembers of another evaluation, or collects on the side, needs "direct".

    With k checkpoints the memory does not grow with the steps, but for their times and figures. The solve keeps up to k
    states at equal distances, and the backward pass makes those between them again, from the last to the first, with
    binomial checkpointing. Up to k + 1 steps that costs nothing; else every step is made about r times more, r being
    the smallest number with (k + r)! / (k! r!) ≥ steps: 10 checkpoints do for 66 steps at r = 2, for 286 at r = 3, for
    1001 at r = 4. `solution(t)` and `steps.z` have no gradient then, and asking for it is an error: outputs at times in
    `t`, events, error and stiffness have theirs. Double backward keeps all states.

    Args:
        checkpoints: at most how many states are kept beside z0, at least 1; None for those of all steps. (A state of
            "vcab3" has with it the two states before that its steps build on.)

    Raises:
        TypeError, ValueError: checkpoints is no such number.

    Source: Griewank & Walther, Algorithm 799: Revolve, ACM TOMS 26 (2000).
    """

    name = "checkpointed"
    compiles = True

    def __init__(self, checkpoints: int | None = None):
        self.checkpoints = limit(checkpoints)

    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """See `Adjoint.solve`."""
        problem = limited(problem, self.checkpoints)
        engine = compiled.engine(problem) if problem.compile else None
        if not torch.is_grad_enabled():
            return plain(
                (engine and engine.discover(problem, z0))
                or discover(problem, z0, problem.field.first(problem.first_instant, z0, problem.end))
            )
        run = _Run(problem, z0, self.name)
        if engine is not None:
            # A full look at what f uses takes longer than a compiled solve: once is enough, but for an inspection.
            tensors = engine.tensors(problem)
            if tensors is None:
                tensors = engine.learn(problem, z0.detach(), run.uses.tensors)
            ran = None if tensors is None else engine.discover(problem, z0)
            if ran is not None:
                return self._compiled(run, engine, ran, z0, tensors)
        uses = run.uses
        if not (z0.requires_grad or uses.tensors):
            return plain(discover(problem, z0, uses.slope))
        final, interior, error, stiffness, states = _Solve.apply(run, z0, *uses.tensors)
        outcome = plain(run.trajectory)
        outcome.final, outcome.interior = final, interior
        outcome.error = outcome.error and (lambda: error)
        outcome.stiffness = outcome.stiffness and (lambda: stiffness)
        if states is None:
            outcome.lost = functools.partial(without_gradient, like=[final], message=_LOST)
        else:
            outcome.states = packed(states, run.trajectory)
        return outcome

    @staticmethod
    def _compiled(run: _Run, engine: compiled.Engine, ran: compiled.Ran, z0: Tensor, tensors) -> Outcome:
        run.trajectory, outcome = ran, plain(ran)
        if not (z0.requires_grad or tensors):
            return outcome
        outcome.final, outcome.interior, figures, states = _SolveCompiled.apply(run, engine, z0, *tensors)
        outcome.error = outcome.error and (lambda: ran.reported(figures, 0))
        outcome.stiffness = outcome.stiffness and (lambda: ran.reported(figures, 1))
        integrals = functools.cache(lambda: ran.integrals(figures))
        outcome.integral = lambda name: integrals()[name]
        outcome.states = packed(states, ran)
        return outcome


_LOST = (
    "Checkpointed(checkpoints=...) does not keep the states between, so what is made from them, solution(t), steps.z "
    "or a figure of introspection.measure, has no gradient; give solve the times that you need in t, or use "
    "adjoint='checkpointed' without checkpoints, or 'direct'"
)


class _Run:
    """What the forward and the backward pass share beside tensors."""

    def __init__(self, problem: Problem, z0: Tensor, adjoint: str):
        self.problem, self.z0, self.adjoint = problem, z0.detach().requires_grad_(z0.requires_grad), adjoint
        self.trajectory: Trajectory | None = None

    @functools.cached_property
    def uses(self) -> Dependencies:
        return Dependencies(self.problem, self.z0, self.adjoint)

    @property
    def done(self) -> Tensor:
        return self.trajectory.status == Status.SUCCESS

    def schedule(self) -> Schedule | None:
        trajectory = self.trajectory
        if trajectory.interior is None:
            return None
        return Schedule(self.problem, trajectory.grid, trajectory.reached, trajectory.hits)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _Run, z0: Tensor, *tensors: Tensor):
        trajectory = run.trajectory = discover(run.problem, z0, run.uses.slope)
        run.uses.slope = None
        ctx.run = run
        ctx.save_for_backward(z0, *tensors)
        ctx.set_materialize_grads(False)
        states = None
        if run.problem.keep is None:
            states = states_of(trajectory)
            if run.problem.solver.history:
                trajectory.grid.slopes  # noqa: B018  (packs them)
                for record in trajectory.records:
                    record.slope = None
        # Aliases: an output that is itself kept by the run would tie the run, its graph and the outputs in a cycle.
        found = trajectory.final, trajectory.interior, trajectory.error, trajectory.stiffness
        return *(None if x is None else x.detach() for x in found), states

    @staticmethod
    def backward(ctx, *cotangents):
        z0, *_ = ctx.saved_tensors  # unpacking all of them checks that none was changed in place
        ctx.run.uses.require_same_f()
        with ctx.run.uses.followed():
            if torch.is_grad_enabled():
                return None, *_differentiable_backward(ctx.run, z0, cotangents)
            return None, *_backward(ctx.run, z0, cotangents)


class _SolveCompiled(torch.autograd.Function):
    """The same for a solve that was compiled; errors and stiffness are as the programs logged them."""

    @staticmethod
    def forward(ctx, run: _Run, engine: compiled.Engine, z0: Tensor, *tensors: Tensor):
        ran = ctx.ran = run.trajectory
        ctx.run, ctx.engine, ctx.tensors = run, engine, tensors
        ctx.save_for_backward(z0, *tensors)
        ctx.set_materialize_grads(False)
        interior = None if ran.interior is None else ran.interior.detach()
        return ran.final.detach(), interior, ran.figures.detach(), ran.stand_in()

    @staticmethod
    def backward(ctx, final, interior, figures, states):
        z0, *_ = ctx.saved_tensors
        run, ran = ctx.run, ctx.ran
        if not torch.is_grad_enabled():
            try:
                found = ctx.engine.backward(ran, ctx.tensors, final, interior, figures, states)
            except compiled.Unsupported:
                complain_of_change(run.adjoint)
            if found is not None:
                gradients, off = found
                if off > torch.finfo(z0.dtype).eps ** 0.5 * float(ran.final.abs().max()):
                    complain_of_change(run.adjoint)
                return None, None, *gradients
        cotangents = final, interior, *ran.of_steps(figures), states
        with run.uses.followed():
            go = _differentiable_backward if torch.is_grad_enabled() else _backward
            z0_gradient, *gradients = go(run, z0, cotangents)
        found = {id(x): gradient for x, gradient in zip(run.uses.tensors, gradients, strict=True)}
        if any(id(x) not in found for x in ctx.tensors):
            complain_of_change(run.adjoint)
        return None, None, z0_gradient, *(found[id(x)] for x in ctx.tensors)


def _backward(run: _Run, z0: Tensor, cotangents) -> list[Tensor]:
    """Runs through the steps from the last to the first, each replayed on a tape of its own."""
    final, interior, error, stiffness, states = cotangents
    problem, grid = run.problem, run.trajectory.grid
    schedule = run.schedule() if interior is not None else None
    error, stiffness = (None if flat is None else grid.split(flat) for flat in (error, stiffness))
    states = None if states is None else states.split([grid.samples(j) for j in range(len(grid))])
    lens = error is not None or stiffness is not None
    costate = torch.zeros_like(z0)
    if final is not None:
        costate = torch.where(run.done[:, None], final, costate)
    field, leaves, substitute = run.uses.ends()
    sums: list[Tensor | None] = [None] * len(leaves)
    history = _History(grid)
    for j, z, past in _starts(problem, grid, z0):
        rows = grid.rows[j]
        z = z.detach().requires_grad_()
        past = past and past._replace(slopes=past.slopes.detach().requires_grad_())
        outputs = schedule.at(j) if schedule is not None else None

        def replayed(j=j, z=z, outputs=outputs, past=past):
            with torch.enable_grad(), full_precision(z0.device), substitute():
                return replay_step(problem, grid, j, z, lens, outputs, field, past)

        step = replayed()
        slopes = [] if past is None else [past.slopes]
        if j == len(grid) - 1:
            _same_step(step.z, run, rows)
            run.uses.require_no_other([step.z], [z, *slopes, *leaves], lambda again=replayed: [again().z])
        values, weights = [step.z], [costate if rows is None else costate.index_select(0, rows)]
        for value, flat in ((step.error, error), (step.stiffness, stiffness)):
            if flat is not None:
                values.append(value)
                weights.append(flat[j])
        if outputs is not None:
            values.append(step.outputs)
            at = outputs.point if outputs.sample is None else (outputs.point, outputs.sample)
            weights.append(interior[at])
        if step.slope is not None:
            values.append(step.slope)
            weights.append(history.cotangents.pop(j, torch.zeros_like(step.slope)))
        # f may be constant: then nothing of the step but z itself carries a gradient.
        pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v.requires_grad]
        back, *gradients = torch.autograd.grad(
            [v for v, _ in pairs], [z, *slopes, *leaves], [w for _, w in pairs], allow_unused=True
        )
        if slopes:
            history.collect(j, gradients.pop(0))
        if states is not None:
            back = back + states[j]
        costate = back if rows is None else costate.index_copy(0, rows, back)
        sums = added(sums, gradients)
    if len(grid):
        run.uses.require_all(sums)
    return [costate, *sums]


def _starts(problem: Problem, grid: Grid, z0: Tensor) -> Iterator[tuple[int, Tensor, Past | None]]:
    """What the steps start from, the last step first: (its index, the state, what it builds on)."""
    depth = problem.solver.history
    if grid.held is None:
        for j in reversed(range(len(grid))):
            yield j, grid.z[j], past_of(problem, grid, j, grid.slopes) if depth else None
        return
    for lo, hi, states in blocks(problem, grid, z0, problem.keep):
        for j in reversed(range(lo, hi)):
            past = None
            if depth and j >= depth:
                step, rows = grid.whole_step(j)
                with torch.no_grad(), full_precision(z0.device):
                    before = [states(step - back, rows) for back in range(1, depth + 1)]
                    past = past_at(problem, grid, step, rows, before)
            yield j, states[j - lo], past


class _History:
    """The cotangents of the slopes that later steps of a multistep method build on."""

    def __init__(self, grid: Grid):
        self.grid, self.cotangents = grid, {}

    def collect(self, j: int, gradient: Tensor | None):
        """Adds what step j hands back to the steps before it."""
        for back, part in enumerate(() if gradient is None else gradient, start=1):
            where = self.grid.before(j, back)
            size = self.grid.samples(j - back), part.shape[1]
            total = self.cotangents.setdefault(j - back, part.new_zeros(size))
            if where is None:
                total += part
            else:
                total.index_add_(0, where, part)


def _same_step(again: Tensor, run: _Run, rows: Tensor | None):
    """Makes sure that f still is what it was in the forward pass, by the last step."""
    once = run.trajectory.final if rows is None else run.trajectory.final[rows]
    arrived = torch.isfinite(once)  # not so where a sample failed
    off = torch.where(arrived, again.detach() - once, 0.0).abs().max()
    if bool(off > torch.finfo(once.dtype).eps ** 0.5 * once[arrived].abs().max() if bool(arrived.any()) else False):
        complain_of_change(run.adjoint)


def _differentiable_backward(run: _Run, z0: Tensor, cotangents) -> tuple:
    """The backward pass when it is differentiated itself: the whole grid on one tape, with "direct"'s memory."""
    tensors = run.uses.tensors
    if _one_behind_another([z0, *tensors]):
        raise NeuralDEError(
            "double backward under adjoint='checkpointed' can't tell apart what a parameter does inside f and what it "
            "does on the way to z0, args or a tensor that f closes over, and here one parameter does both; "
            "use adjoint='direct'"
        )

    def replayed():
        with full_precision(z0.device):
            return replay_all(run.problem, run.trajectory.grid, z0, run.done, run.schedule())

    path = replayed()
    run.uses.require_no_other([path.final], [z0, *tensors], lambda: [replayed().final])
    values = (path.final, path.interior, path.error, path.stiffness, path.states)
    pairs = [(v, w) for v, w in zip(values, cotangents, strict=True) if w is not None and v.requires_grad]
    inputs = [x for x in (z0, *tensors) if x.requires_grad]
    gradients = torch.autograd.grad(
        [v for v, _ in pairs], inputs, [w for _, w in pairs], create_graph=True, allow_unused=True
    )
    gradients = iter(gradients)
    return tuple(next(gradients) if x.requires_grad else None for x in (z0, *tensors))


def _one_behind_another(tensors: list[Tensor]) -> bool:
    """Whether one of the tensors was computed from another one."""
    leaves = {id(x) for x in tensors if x.is_leaf}
    nodes = {x.grad_fn for x in tensors if x.grad_fn is not None}
    for x in tensors:
        for node in behind([x]):
            known = node in nodes or (hasattr(node, "variable") and id(node.variable) in leaves)
            if known and node is not x.grad_fn:
                return True
    return False
