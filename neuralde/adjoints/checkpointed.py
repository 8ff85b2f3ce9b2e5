"""The checkpointed adjoint: one state per step is kept, each step is replayed in the backward pass."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..discover import discover
from ..errors import NeuralDEError, Status
from ..field import Substitute, closed_over, full_precision, reachable
from ..grid import Grid
from ..problem import Problem
from ..replay import Schedule, past_of, replay_all, replay_step
from ..solvers import Past
from ..trajectory import Trajectory
from .base import Adjoint, Outcome, plain


class Checkpointed(Adjoint):
    """Discretise, then differentiate, one replayed step at a time.

    The exact gradient of the discrete solution, as "direct" has it, with memory that grows by one state per step; the
    price is one more evaluation of every stage. Gradients reach z0, args, the parameters of f and whatever tensors f
    closes over, also through `solution.error` and `solution.stiffness`.
    """

    name = "checkpointed"

    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """See `Adjoint.solve`."""
        field, start, end = problem.field, problem.first_instant, problem.end
        if not torch.is_grad_enabled():
            return plain(discover(problem, z0, field.first(start, z0, end)))
        slope, closed, seen = closed_over(field, start, z0.detach(), end)
        given = [x for x in pytree.tree_leaves(field.args) if isinstance(x, Tensor) and x.requires_grad]
        # A solver may have parameters too: the network of a hypersolver.
        tensors = list({id(x): x for x in (*given, *closed, *reachable(problem.solver))}.values())
        if not (z0.requires_grad or tensors):
            return plain(discover(problem, z0, slope))
        run = _Run(problem, slope, tensors, seen)
        final, interior, error, stiffness, states = _Solve.apply(run, z0, *tensors)
        outcome = plain(run.trajectory)
        outcome.final, outcome.interior = final, interior
        outcome.error = outcome.error and (lambda: error)
        outcome.stiffness = outcome.stiffness and (lambda: stiffness)
        outcome.states = lambda: states
        return outcome


_CHANGED = (
    "f gives another result in the backward pass than in the solve: a tensor, an input or a mode (train, eval) that it "
    "uses was changed in between, or was lent to it for the call. adjoint='checkpointed' evaluates f again in the "
    "backward pass; run the backward pass before changing f, pass what changes through args, or use adjoint='direct'"
)


class _Run:
    """What the forward and the backward pass share beside tensors."""

    def __init__(self, problem: Problem, slope: Tensor, tensors: list[Tensor], seen: set[int]):
        self.problem, self.slope = problem, slope
        # What f depends on, as f knows it: saved tensors may come back as others (save_on_cpu).
        self.tensors, self.seen = tensors, seen
        self.reached = self._reached()
        self.trajectory: Trajectory | None = None

    def _reached(self) -> set[int]:
        return {id(x) for uses in (self.problem.field.equation.f, self.problem.solver) for x in reachable(uses)}

    def require_same_f(self):
        """Raises NeuralDEError if f can reach other tensors now than in the solve."""
        if self._reached() != self.reached:
            raise NeuralDEError(_CHANGED)

    def forward(self, z0: Tensor) -> Trajectory:
        self.trajectory = discover(self.problem, z0, self.slope)
        self.slope = None
        return self.trajectory

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
        trajectory = run.forward(z0)
        ctx.run = run
        ctx.save_for_backward(z0, *tensors)
        ctx.set_materialize_grads(False)
        states = trajectory.grid.flat_z
        for record in trajectory.records:
            record.z = None  # the grid has them now
        if run.problem.solver.history:
            trajectory.grid.slopes  # noqa: B018  (packs them)
            for record in trajectory.records:
                record.slope = None
        # Aliases: an output that is itself kept by the run would tie the run, its graph and the outputs in a cycle.
        return tuple(
            None if x is None else x.detach()
            for x in (
                trajectory.final,
                trajectory.interior,
                trajectory.error,
                trajectory.stiffness,
                states,
            )
        )

    @staticmethod
    def backward(ctx, *cotangents):
        z0, *_ = ctx.saved_tensors  # unpacking all of them checks that none was changed in place
        tensors = ctx.run.tensors
        ctx.run.require_same_f()
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(ctx.run, z0, tensors, cotangents)
        return None, *_backward(ctx.run, z0, tensors, cotangents)


def _backward(run: _Run, z0: Tensor, tensors: list[Tensor], cotangents) -> list[Tensor]:
    """Runs through the steps from the last to the first, each replayed on a tape of its own."""
    final, interior, error, stiffness, states = cotangents
    problem, grid = run.problem, run.trajectory.grid
    schedule = run.schedule() if interior is not None else None
    error, stiffness, states = (
        None if flat is None else grid.split(flat) if i < 2 else flat.split([len(z) for z in grid.z])
        for i, flat in enumerate((error, stiffness, states))
    )
    lens = error is not None or stiffness is not None
    costate = torch.zeros_like(z0)
    if final is not None:
        costate = torch.where(run.done[:, None], final, costate)
    field, leaves, substitute = _leaves(run, tensors)
    sums: list[Tensor | None] = [None] * len(leaves)
    history = _History(problem, grid)
    for j in reversed(range(len(grid))):
        rows = grid.rows[j]
        z = grid.z[j].detach().requires_grad_()
        outputs = schedule.at(j) if schedule is not None else None
        past = history.leaves(j)
        with torch.enable_grad(), full_precision(z0.device), substitute():
            step = replay_step(problem, grid, j, z, lens, outputs, field, past)
        if j == len(grid) - 1:
            _same_step(step.z, run, rows)
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
        slopes = [] if past is None else [past.slopes]
        back, *gradients = torch.autograd.grad(
            [v for v, _ in pairs], [z, *slopes, *leaves], [w for _, w in pairs], allow_unused=True
        )
        if slopes:
            history.collect(j, gradients.pop(0))
        if states is not None:
            back = back + states[j]
        costate = back if rows is None else costate.index_copy(0, rows, back)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                # The first gradient may share memory with a cotangent; the sum's own memory begins with the second.
                sums[i] = gradient if sums[i] is None else sums[i] + gradient
    for x, total in zip(tensors, sums, strict=True):
        if total is None and not x.is_leaf and id(x) in run.seen and len(grid):
            raise NeuralDEError(
                f"f uses a computed tensor of shape {tuple(x.shape)} in a way that adjoint='checkpointed' can't follow "
                "in the backward pass (a scripted function or a custom autograd.Function); pass it through args, or "
                "use adjoint='direct'"
            )
    return [costate, *sums]


class _History:
    """The slopes that later steps of a multistep method build on, and their cotangents."""

    def __init__(self, problem: Problem, grid: Grid):
        self.problem, self.grid, self.depth = problem, grid, problem.solver.history
        self.cotangents: dict[int, Tensor] = {}

    def leaves(self, j: int) -> Past | None:
        """What step j builds on, as ends of its graph."""
        past = past_of(self.problem, self.grid, j, self.grid.slopes) if self.depth else None
        return past and past._replace(slopes=past.slopes.requires_grad_())

    def collect(self, j: int, gradient: Tensor | None):
        """Adds what step j hands back to the steps before it."""
        for back, part in enumerate(() if gradient is None else gradient, start=1):
            where = self.grid.before(j, back)
            total = self.cotangents.setdefault(j - back, torch.zeros_like(self.grid.z[j - back]))
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
        raise NeuralDEError(_CHANGED)


def _leaves(run: _Run, tensors: list[Tensor]):
    """The tensors that f depends on, as ends of the replay's graph.

    Returns:
        The field that uses them, the list of ends in the order of `tensors`, and a context in which f sees them.
    """
    # Hooks on a parameter are for its whole gradient, not for every step's part of it.
    ends = [x if x.is_leaf and not x._backward_hooks else x.detach().requires_grad_() for x in tensors]
    pairs = [(x, end) for x, end in zip(tensors, ends, strict=True) if x is not end]
    if not pairs:
        return run.problem.field, ends, contextlib.nullcontext
    replaced = {id(x): end for x, end in pairs}
    field = copy.copy(run.problem.field)
    field.args = pytree.tree_map(lambda x: replaced.get(id(x), x), field.args)
    return field, ends, lambda: Substitute(pairs)


def _differentiable_backward(run: _Run, z0: Tensor, tensors: list[Tensor], cotangents) -> tuple:
    """The backward pass when it is differentiated itself: the whole grid on one tape, with "direct"'s memory."""
    if _one_behind_another([z0, *tensors]):
        raise NeuralDEError(
            "double backward under adjoint='checkpointed' can't tell apart what a parameter does inside f and what it "
            "does on the way to z0, args or a tensor that f closes over, and here one parameter does both; "
            "use adjoint='direct'"
        )
    with full_precision(z0.device):
        path = replay_all(run.problem, run.trajectory.grid, z0, run.done, run.schedule())
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
        seen, todo = set(), [parent for parent, _ in x.grad_fn.next_functions] if x.grad_fn is not None else []
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in nodes or (hasattr(node, "variable") and id(node.variable) in leaves):
                return True
            todo.extend(parent for parent, _ in node.next_functions)
    return False
