"""Few states instead of all: how they are thinned, how the others are made again, and that nothing else changes."""

import functools
import math

import pytest
import torch
from helpers import ADAPTIVE, CONTROLS, SOLVERS, close, options, refused
from torch import nn

import neuralde as nde
import regularizers as reg
from neuralde.adjoints import Checkpointed
from neuralde.adjoints.binomial import blocks, minimum, reverse, states_at

FIXED = nde.StepControl(adaptive=False)
BATCH = 5
LINEARIZING = [name for name, solver in nde.solvers.SOLVERS.items() if solver.linearizes]
RATES = torch.tensor([[1.0], [9.0], [3.0], [0.2], [20.0]], dtype=torch.float64)


def uneven(t, z, args):
    """Samples that need very different numbers of steps."""
    weight, rate = args["weight"], args["rate"]
    return torch.tanh(z @ weight) * rate * torch.cos(3 * t) - 0.1 * z


def solve(checkpoints, solver="tsit5", control="per_sample", t=(0.0, 2.0), **how):
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    rate = RATES.clone().requires_grad_()
    how = {**options(solver, 0.06), **how}
    if nde.solvers.get(solver).order == 1:  # hundreds of steps otherwise
        how = {"rtol": 0.1, "atol": 0.01, **how}
    f = how.pop("f", uneven)
    solution = nde.solve(
        nde.ODE(f),
        z0,
        t,
        control=control,
        adjoint=Checkpointed(checkpoints),
        args={"weight": weight, "rate": rate},
        **how,
    )
    return solution, (z0, weight, rate)


def grid_of(solution):
    return solution._outcome.trajectory.grid


def same_gradients(loss, checkpoints, tolerance=1e-12, **how):
    """The loss and its gradients, with so many checkpoints and with all states."""
    found = []
    for k in (checkpoints, None):
        solution, inputs = solve(k, **how)
        value = loss(solution)
        found.append((value.detach(), *torch.autograd.grad(value, inputs)))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, tolerance)
    return solution


# -- the schedule ------------------------------------------------------------------------------------------------------


@functools.cache
def least(steps, slots):
    """The fewest steps made again, by trying every place for the next state."""
    if steps == 1:
        return 0
    if slots == 0:
        return math.inf
    return min(m + least(m, slots) + least(steps - m, slots - 1) for m in range(1, steps))


@pytest.mark.parametrize("slots", range(1, 9))
def test_the_schedule_is_the_best_one(slots):
    for steps in range(1, 51):
        made = sum(action.stop - action.start - action.block for action in reverse(steps, slots))
        r = next(r for r in range(steps) if math.comb(slots + r, slots) >= steps)
        formula = r * steps - (math.comb(slots + r, slots + 1) if r else 0)
        assert made == formula == least(steps, slots)


@pytest.mark.parametrize("steps, slots", [(1, 1), (7, 1), (66, 10), (67, 10), (500, 4), (200_000, 1500)])
def test_the_schedule_covers_all_steps_from_what_it_holds(steps, slots):
    held, todo = {0}, steps
    for start, stop, block in reverse(steps, slots):
        assert start in held
        if block:
            assert stop == todo and (stop - start - 1) + len(held) - 1 <= slots
            held.remove(start)
            todo = start
        else:
            held.add(stop)
            assert len(held) - 1 <= slots
    assert todo == 0 and not held


# -- what a solve keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [1, 5])
def test_kept_and_made_again_states_are_those_of_the_solve(solver, control, k):
    with torch.no_grad():
        every, _ = solve(None, solver, control)
        few, _ = solve(k, solver, control)
    grid, steps = grid_of(few), every.steps
    assert len(grid) > 2 * k and len(grid.held.starts) <= k
    for j, z in grid.held.z.items():
        there = steps.mask[j]
        assert torch.equal(z[there], steps.z[j][there])
    with refused(RuntimeError, "not all kept"):
        grid.flat_z
    z0 = few._z0
    own = (every.stats.accepted * torch.tensor([0.0, 0.3, 0.5, 0.9, 0.999])).long()
    if control == "joint":
        assert len(own.unique()) > 1
    everyone = torch.arange(BATCH)
    close(states_at(few._problem, grid, z0, own), steps.z[own, everyone], 1e-11)
    some = torch.tensor([1, 4])
    close(states_at(few._problem, grid, z0, own[some], some), steps.z[own[some], some], 1e-11)
    close(few.steps.z, steps.z, 1e-11)
    for t in (0.7, torch.linspace(2.0, 0.0, 6, dtype=torch.float64)):
        close(few(t), every(t), 1e-11)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3", "auto"])
@pytest.mark.parametrize("k", [1, 2, 6, 1000])
def test_blocks_hold_at_most_k_states(solver, control, k):
    with torch.no_grad():
        every, _ = solve(None, solver, control, t=(0.0, 0.5))
        few, _ = solve(k, solver, control, t=(0.0, 0.5))
    grid, steps, end = grid_of(few), every.steps, len(every.steps)
    for lo, hi, states in blocks(few._problem, grid, few._z0, k):
        assert hi == end and len(states) == hi - lo
        # Its first state is z0 or one that is held; k counts everything beside z0.
        assert len(grid.held.starts) + hi - lo - 1 <= k  # the way back may have let go of some
        for j in range(lo, hi):
            rows = torch.arange(BATCH)[steps.mask[j]]
            close(states[j - lo], steps.z[j, rows], 1e-11)
            for back in range(few.solver.history + 1 if j >= few.solver.history else 1):
                close(states(torch.full_like(rows, j - back), rows), steps.z[j - back, rows], 1e-11)
        end = lo
    assert end == 0


def test_nothing_is_made_again_where_all_states_fit():
    calls = []
    for k in (None, 1000, 4):
        solution, inputs = solve(k)
        before = solution._problem.field.calls
        torch.autograd.grad(solution.final.sum(), inputs)
        calls.append(solution._problem.field.calls - before)
    assert calls[0] == calls[1] < calls[2]


# -- gradients ---------------------------------------------------------------------------------------------------------


def everything(solution):
    loss = (solution.zs**2).sum() + solution.final.sum()
    if solution.solver.error_order is not None:
        loss = loss + reg.GlobalError()(solution)
    if solution.solver.reports_stiffness:
        loss = loss + 1e-3 * reg.GlobalStiffness()(solution)
    return loss


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_all_states(solver, control):
    t = torch.tensor([0.0, 0.3, 0.31, 1.2, 2.0], dtype=torch.float64)
    t = t * 0.5 if nde.solvers.get(solver).history or solver in LINEARIZING else t  # slow ones
    # The estimates are differences of nearly equal numbers, so that last digits of a state show in their gradients.
    solution = same_gradients(everything, 4, 1e-9, solver=solver, control=control, t=t)
    assert len(solution.steps) > 8
    if control == "per_sample" and solver in ADAPTIVE:
        accepted = solution.stats.accepted
        assert int(accepted.max()) > 2 * int(accepted.min())
    same_gradients(lambda s: (s.zs**2).sum(), 4, 1e-12, solver=solver, control=control, t=t)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3", "auto"])
def test_events_and_jumps(solver, control):
    events = [
        nde.Event(lambda t, z: z[:, 0] - 0.1, terminal=False),
        nde.Event(lambda t, z: z[:, 1] - 0.2, terminal=True),
    ]

    def loss(s):
        mask = s.events[0].mask
        return s.events[0].t[mask].sum() + (s.events[0].z[mask] ** 2).sum() + (s.zs**2).sum()

    solution = same_gradients(
        loss, 3, 1e-11, solver=solver, control=control, t=(0.0, 0.5, 2.0), events=events, jump_times=[0.4, 1.1]
    )
    assert bool(solution.events[0].mask.any()) and bool(solution.events[1].mask.any())


@pytest.mark.parametrize("solver", ["tsit5", "vcab3"])
def test_samples_that_fail(solver):
    def f(t, z, args):
        return uneven(t, z, args) + torch.where(args["rate"] == 9.0, z**2, 0.0)

    def loss(s):
        assert s.converged.tolist() == [True, False, True, True, True]
        return (s.zs[:, s.converged] ** 2).sum()

    same_gradients(loss, 10, solver=solver, f=f, t=(0.0, 0.5, 4.0), on_failure="ignore", max_steps=3000)


def test_every_sample_fails_at_once():
    f = nde.ODE(lambda t, z: torch.sqrt(z))
    z0 = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    solution = nde.solve(f, z0, (0.0, 1.0), adjoint=Checkpointed(2), on_failure="ignore")
    assert solution.steps.z.shape == (0, 2, 1) and bool(solution.final.isnan().all())
    (g,) = torch.autograd.grad(solution.final.nan_to_num().sum(), z0)
    assert bool((g == 0).all())


def test_decreasing_times_and_lost_rows():
    """Each sample with its own horizon, most of which end early: the batch is compacted."""
    t = torch.tensor([[1.0, -k] for k in (0.0, 0.1, 0.2, 0.3, 9.0)], dtype=torch.float64)
    same_gradients(lambda s: (s.final**2).sum(), 3, t=t)


def test_gradients_of_times_and_backward_twice():
    t = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    found = []
    for k in (3, None):
        solution, inputs = solve(k, t=t)
        for _ in range(2):
            found.append(torch.autograd.grad((solution.zs**2).sum(), (t, *inputs), retain_graph=True))
    for other in found[1:]:
        for mine, expected in zip(other, found[0], strict=True):
            close(mine, expected, 1e-12)


def test_double_backward():
    weight = torch.randn(2, 2, dtype=torch.float64)

    def value(z0):
        adjoint = Checkpointed(1)
        f = nde.ODE(lambda t, z: torch.tanh(z @ weight))
        return (nde.solve(f, z0, (0.0, 1.0), "bs3", adjoint=adjoint, control=FIXED, dt0=0.2).final ** 2).sum()

    assert torch.autograd.gradgradcheck(value, torch.randn(2, 2, dtype=torch.float64, requires_grad=True))


def test_random_f_is_the_same_in_every_replay():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    z0, found = torch.randn(4, 3, dtype=torch.float64), []
    for k in (2, None):
        torch.manual_seed(1)
        layer = nde.NeuralODE(f, (0.0, 1.0), solver="bs3", adjoint=Checkpointed(k), control=FIXED, dt0=0.05)
        found.append(torch.autograd.grad(layer(z0).square().sum(), list(f.parameters())))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, 1e-12)


# -- what has no gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "figure",
    [
        lambda s: s(0.7),
        lambda s: s(torch.tensor(0.7, dtype=torch.float64, requires_grad=True)),
        lambda s: s.steps.z,
        lambda s: nde.introspection.measure(s, nde.introspection.raw_error),
        lambda s: reg.LocalError(through_state=True)(s),
    ],
    ids=["solution(t)", "with respect to t", "steps.z", "measure", "LocalError through the state"],
)
def test_what_is_made_from_lost_states_has_a_value_and_no_gradient(control, figure):
    few, every = (solve(k, control=control)[0] for k in (3, None))
    torch.manual_seed(0)
    value = figure(few)
    torch.manual_seed(0)
    close(value.detach(), figure(every).detach(), 1e-8)
    assert value.requires_grad
    with refused(nde.NeuralDEError, "checkpoints", "solution(t)", "steps.z", "'direct'"):
        value.sum().backward()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3"])
def test_local_error(solver, control):
    found = []
    for k in (3, None):
        solution, inputs = solve(k, solver, control)
        torch.manual_seed(0)
        penalty = reg.LocalError()(solution)
        found.append((penalty.detach(), *torch.autograd.grad(penalty, inputs[1:])))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, 1e-8)


@pytest.mark.parametrize("solver", ["tsit5", "vcab3"])
def test_replay_and_plot_need_no_kept_states(solver):
    few, inputs = solve(2, solver, t=(0.0, 1.0))
    assert len(few.steps) > 8
    again = nde.introspection.replay(few)
    close(again.zs.detach(), few.zs.detach(), 1e-12)
    close(again(0.3).detach(), few(0.3).detach(), 1e-12)
    for mine, expected in zip(*(torch.autograd.grad(s.final.sum(), inputs[0]) for s in (again, few)), strict=True):
        close(mine, expected, 1e-11)


# -- memory ------------------------------------------------------------------------------------------------------------


def held_after(k, steps, solver="bs3"):
    """Bytes that are alive between the forward and the backward pass, and at most in the backward pass."""
    counter = Alive()
    z0 = torch.randn(64, 128, requires_grad=True)
    f = nn.Linear(128, 128)
    with counter:
        solution = nde.solve(
            nde.ODE(lambda t, z: torch.tanh(f(z))),
            z0,
            (0.0, 1.0),
            solver,
            adjoint=Checkpointed(k),
            control=FIXED,
            dt0=1.0 / steps,
        )
        final, between = solution.final, counter.alive
        counter.peak = counter.alive
        final.square().sum().backward()
    assert len(grid_of(solution)) == steps
    return between, counter.peak


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors that were made inside of it and are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        given = {id(x.untyped_storage()) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(x) and id(storage := x.untyped_storage()) not in (self.seen.keys() | given):
                size, key = storage.nbytes(), id(storage)

                def freed(_, size=size, key=key):
                    del self.seen[key]
                    self.alive -= size

                self.seen[key] = weakref.ref(storage, freed)
                self.alive += size
        self.peak = max(self.peak, self.alive)
        return out


STATE = 64 * 128 * 4


@pytest.mark.parametrize("solver", ["bs3", "vcab3"])
def test_memory_grows_with_times_and_figures_only(solver):
    few, many = (held_after(6, steps, solver) for steps in (30, 120))  # three states each
    for a, b in zip(few, many, strict=True):
        assert b - a < 0.15 * 90 * STATE
    # With every state it is a state for each step.
    assert held_after(None, 120)[0] - held_after(None, 30)[0] > 0.95 * 90 * STATE


def test_at_most_k_states_are_alive():
    """And in the backward pass, beside what one step and one backward pass through it need."""
    base = held_after(1, 24)
    for k in (2, 5, 9):
        for mine, least_one in zip(held_after(k, 24), base, strict=True):
            assert mine - least_one <= (k - 1) * STATE


# -- options -----------------------------------------------------------------------------------------------------------


def test_options():
    assert repr(Checkpointed()) == "Checkpointed()" and repr(nde.adjoints.Direct()) == "Direct()"
    assert repr(Checkpointed(checkpoints=7)) == "Checkpointed(checkpoints=7)"
    assert nde.adjoints.get("checkpointed").checkpoints is None
    for bad in (0, -3):
        with refused(ValueError, "checkpoints", str(bad)):
            Checkpointed(bad)
    for bad in (2.0, "4", True):
        with refused(TypeError, "checkpoints"):
            Checkpointed(bad)
    with refused(ValueError, "dense=True", "checkpoints=3"):
        solve(3, dense=True)


@pytest.mark.parametrize("steps, k", [(40, 1), (200, 2), (200, 3), (120, 6), (200, 10)])
def test_no_more_steps_are_made_again_than_with_the_best_schedule(steps, k):
    """States that the solve kept on its way save steps where they are many, and are let go of where slots are few."""
    calls = [0]
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(t, z):
        calls[0] += 1
        return -rate * z

    how = {"solver": "euler", "dt0": 1 / steps, "adjoint": nde.adjoints.Checkpointed(checkpoints=k)}
    solution = nde.solve(nde.ODE(f), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0), **how)
    forward = calls[0]
    solution.final.sum().backward()
    again = calls[0] - forward - steps  # beside the replay of each step on its tape
    assert 0 < again <= minimum(steps, k) + 2
