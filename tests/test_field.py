"""f in all its forms: mixing samples, drawing random numbers, holding tensors, being counted."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import sys
import threading
import types

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, DENSE, EXACT, SOLVERS, Counted, close, options, refused
from torch import nn
from torch.utils import _pytree as pytree

import neuralde as nde
from neuralde.field import reachable


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- mixing samples ------------------------------------------------------------------------------------------------


def with_batch_norm(d=3):
    return nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.Tanh())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm1d(3, track_running_stats=False)])
def test_a_layer_finds_batch_normalization_when_it_is_made(norm):
    with refused(ValueError, "1 (BatchNorm", 'control="joint"', "GroupNorm"):
        nde.NeuralODE(nn.Sequential(nn.Linear(3, 3), norm))
    nde.NeuralODE(nn.Sequential(nn.Linear(3, 3), norm), control="joint")


def test_a_layer_finds_batch_normalization_that_came_into_training_mode_later():
    layer = nde.NeuralODE(with_batch_norm().eval())
    layer(torch.randn(5, 3))
    layer.train()
    with refused(ValueError, "BatchNorm1d", 'control="joint"'):
        layer(torch.randn(5, 3))
    layer.eval()
    layer(torch.randn(5, 3))


def test_batch_statistics_that_are_never_tracked_mix_in_eval_mode_too():
    f = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with refused(ValueError, "BatchNorm1d", 'control="joint"'):
        nde.NeuralODE(f)


MIXING = {
    "mean": lambda t, z: z - z.mean(0),
    "softmax over the batch": lambda t, z: torch.softmax(z, 0),
    "neighbour": lambda t, z: z.roll(1, 0),
    "attention": lambda t, z: torch.softmax(z @ z.T, 1) @ z,
    "time of another": lambda t, z: -z * (1 + t.flatten()[-1]),
    "one image's statistics": lambda t, z: z - z.mean(),
}


@pytest.mark.parametrize("f", MIXING.values(), ids=MIXING)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_mixing_is_found_at_the_first_call(f, adjoint, solver):
    z0 = normal(5, 3)
    with refused(ValueError, 'control="per_sample"', 'control="joint"'):
        nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint, **options(solver))
    joint = nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint, control="joint", **options(solver))
    assert joint.converged.all()
    # One sample alone mixes with nobody.
    assert nde.solve(nde.ODE(f), z0[:1], (0.0, 1.0), adjoint=adjoint, **options(solver)).converged.all()


@pytest.mark.parametrize("control", CONTROLS)
def test_what_does_not_mix_is_let_through(control):
    for f in (nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6).eval(), nn.Identity(), nn.Sequential(nn.ReLU())):
        z0 = torch.randn(5, 6)
        assert nde.solve(nde.ODE(f), z0, (0.0, 1.0), control=control).converged.all()


def test_mixing_is_found_though_the_first_solve_was_in_eval_mode():
    net = with_batch_norm().double()
    net(normal(50, 3))  # running statistics unlike any batch's
    f = nde.ODE(lambda t, z: net(z))
    net.eval()
    nde.solve(f, normal(5, 3), (0.0, 1.0))
    net.train()
    with refused(ValueError, 'control="joint"'):
        nde.solve(f, normal(5, 3), (0.0, 1.0))
    module = nde.ODE(net)
    nde.solve(module, normal(5, 3), (0.0, 1.0), control="joint")
    net.eval()
    nde.solve(module, normal(5, 3), (0.0, 1.0))
    net.train()
    with refused(ValueError, 'control="joint"'):
        nde.solve(module, normal(5, 3), (0.0, 1.0))


def test_mixing_is_found_where_f_is_nan_for_a_sample():
    """A failure that is ignored hides nothing else."""
    z0 = normal(4, 2).abs()
    z0[1] = -1.0
    with refused(ValueError, 'control="joint"'):
        nde.solve(nde.ODE(lambda t, z: torch.sqrt(z) + z.mean(0)), z0, (0.0, 1.0), on_failure="ignore")


def test_mixing_is_found_later_where_the_first_state_hid_it():
    """As long as f answers nothing to a change, not even for the changed sample, it isn't known to be independent."""
    weight = torch.zeros((), dtype=torch.float64)
    f = nde.ODE(lambda t, z: weight * z.mean(0).expand_as(z))
    nde.solve(f, normal(4, 2), (0.0, 1.0))
    weight.fill_(1.0)  # as the first optimizer step does where the last layer's weights begin at zero
    with refused(ValueError, 'control="joint"'):
        nde.solve(f, normal(4, 2), (0.0, 1.0))


def test_mixing_is_found_in_an_f_that_returns_a_buffer_of_its_own():
    """As a captured graph does: a second call overwrites what the first returned."""
    buffer = torch.empty(4, 2, dtype=torch.float64)
    with refused(ValueError, 'control="joint"'):
        nde.solve(nde.ODE(lambda t, z: torch.sub(z, z.mean(0), out=buffer)), normal(4, 2), (0.0, 1.0))


def test_batch_normalization_under_joint_control_is_the_ode_of_the_whole_batch():
    """Against the same f seen as one big sample."""
    net = with_batch_norm().double()
    net[1].momentum = 0.0  # the running statistics stay as they are, whoever calls
    z0 = normal(6, 3)
    # The integral controller: the two controls' PI controllers begin with another memory.
    one, own = (nde.StepControl(per_sample=x, beta1=0.2, beta2=0.0) for x in (False, True))
    joint = nde.solve(nde.ODE(lambda t, z: net(z)), z0, (0.0, 1.0), control=one, rtol=1e-6)
    whole = nde.solve(nde.ODE(lambda t, z: net(z[0])[None]), z0[None], (0.0, 1.0), control=own, rtol=1e-6)
    torch.testing.assert_close(joint.final, whole.final[0], rtol=1e-10, atol=1e-12)
    assert (joint.stats.nfe == whole.stats.nfe[0]).all()


# -- randomness ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A net with dropout that keeps the masks it drew."""

    def __init__(self, p=0.5):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 32), nn.Dropout(p), nn.Linear(32, 4)
        self.masks = []

    def forward(self, t, z):
        hidden = torch.tanh(self.first(z))
        kept = self.drop(torch.ones_like(hidden))
        self.masks.append(kept.detach().clone())
        return self.last(hidden * kept) + torch.cos(5 * t)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_dropout_is_drawn_once_per_solve(control, adjoint, solver):
    net, z0 = Noisy(), torch.randn(5, 4)
    drawn = []
    for _ in range(2):
        net.masks.clear()
        before = torch.get_rng_state()
        solution = nde.solve(nde.ODE(net), z0, (0.0, 1.0), control=control, adjoint=adjoint, **options(solver))
        assert not torch.equal(torch.get_rng_state(), before), "the next draw must be another"
        after = torch.get_rng_state()
        # Looking at the solution, and going back through it, sees the mask of the solve, and draws nothing.
        between, figure = solution(0.3).sum(), solution.error.sum() if solution.solver.error_order else 0
        loss = solution.final.sum()
        loss = loss + figure if adjoint in EXACT else loss
        loss = loss + between if adjoint in DENSE else loss
        loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
        assert len(net.masks) > 10
        assert all(torch.equal(mask, net.masks[0]) for mask in net.masks)
        drawn.append(net.masks[0])
    assert not torch.equal(*drawn)
    assert len(drawn[0][drawn[0] == 0]) > 30


@pytest.mark.parametrize("control", CONTROLS)
def test_dropout_is_one_draw_of_the_users_generator(control):
    """A solve uses up as many random numbers as one evaluation: the same seed gives the same network, as always."""
    net, z0 = Noisy(), torch.randn(5, 4)
    torch.manual_seed(7)
    first = net.drop(torch.ones(5, 32))
    following = torch.rand(3)
    torch.manual_seed(7)
    net.masks.clear()
    nde.solve(nde.ODE(net), z0, (0.0, 1.0), control=control)
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(net.masks[0], first)


def test_error_control_does_not_chase_noise():
    """A frozen mask makes f as smooth as it is in eval mode: a few steps more or less, not hundreds."""
    net, z0 = Noisy(0.3), torch.randn(16, 4)
    for control in CONTROLS:
        counts = {}
        for mode in (True, False):
            net.train(mode)
            counts[mode] = nde.solve(nde.ODE(net), z0, (0.0, 2.0), rtol=1e-5, control=control).stats.nfe.max()
        assert counts[True] < 1.5 * counts[False]


@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_through_dropout_agree(control):
    net, z0 = Noisy().double(), normal(5, 4)

    def gradients(adjoint, figures):
        torch.manual_seed(11)
        start = z0.clone().requires_grad_()
        how = {"adjoint": adjoint, "control": control, "rtol": 1e-3 if figures else 1e-6}
        solution = nde.solve(nde.ODE(net), start, (0.0, 0.4, 1.0), **how)
        torch.rand(5)  # what the user draws between the two passes is no business of the backward pass
        loss = (solution.zs**2).sum() + (solution.error.sum() if figures else 0.0)
        return torch.autograd.grad(loss, [start, *net.parameters()])

    expected = {figures: gradients("direct", figures) for figures in (True, False)}
    for adjoint in ADJOINTS:
        exact = adjoint in EXACT
        for a, b in zip(gradients(adjoint, exact), expected[exact], strict=True):
            close(a, b, 1e-11 if exact else 1e-5)


def test_dropout_with_samples_that_finish_at_different_steps():
    """Each keeps the mask of its place in the batch, whoever else is still unfinished."""
    torch.manual_seed(3)
    net, z0 = Noisy().double(), normal(64, 4)
    rate = torch.ones(64, 1, dtype=torch.float64)
    rate[[5, 40]] = 300.0
    net.masks.clear()
    solution = nde.solve(nde.ODE(lambda t, z, rate: rate * (net(t, z) - z)), z0, (0.0, 1.0), args=rate)
    assert solution.stats.accepted.max() > 10 * solution.stats.accepted.min()
    mask = net.masks[0]
    assert all(torch.equal(m, mask) for m in net.masks)
    for i in (0, 5, 40, 63):

        def alone(t, z, i=i):
            inner = net.last(torch.tanh(net.first(z)) * mask[[i]]) + torch.cos(5 * t)
            return rate[[i]] * (inner - z)

        final = nde.solve(nde.ODE(alone), z0[[i]], (0.0, 1.0)).final
        torch.testing.assert_close(solution.final[[i]], final, rtol=1e-9, atol=1e-10)


# -- tensors of the batch ------------------------------------------------------------------------------------------

BATCH, STIFF = 64, [3, 31, 32, 63]


def uneven():
    """Rates that let four samples need many more steps than the other sixty, and a drive for each sample."""
    rate = 1.0 + torch.rand(BATCH, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rate[STIFF] = 400.0
    return normal(BATCH, 3), rate, normal(BATCH, 3, seed=2)


def swinging(t, z, rate, towards):
    """Goes away from something and comes back, again and again: what contracts can't be solved backwards."""
    rate = rate / 8
    return -rate * torch.cos(rate * t) * (z - towards)


def outcome(f, z0, adjoint, watched, args=None):
    """zs and the gradients, by z0 and what is watched, of a loss of all outputs, and the errors where they have any."""
    start = z0.clone().requires_grad_()
    t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
    solution = nde.solve(nde.ODE(f), start, t, adjoint=adjoint, args=args, rtol=1e-4)
    loss = (solution.zs**2).sum() + (solution.error.sum() if adjoint in EXACT else 0.0)
    return solution, torch.autograd.grad(loss, [start, *watched])


def same_as_alone(solution, gradients, alone):
    """alone(i): the outcome of sample i by itself. The last gradients may be shared: those are summed."""
    assert solution.stats.accepted.max() > 6 * solution.stats.accepted.min(), "too even to say anything"
    for i in (0, 3, 30, 32, 63):
        own, own_gradients = alone(i)
        assert own.stats.nfe[0] == solution.stats.nfe[i]
        torch.testing.assert_close(solution.zs[:, [i]], own.zs, rtol=1e-10, atol=1e-12)
        for g, mine in zip(gradients, own_gradients, strict=True):
            torch.testing.assert_close(g[[i]], mine, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_f_that_closes_over_a_tensor_of_the_whole_batch(adjoint):
    z0, rate, drive = uneven()

    def run(rows):
        r, d = rate[rows].clone().requires_grad_(), drive[rows].clone().requires_grad_()
        return outcome(lambda t, z: swinging(t, z, r, d * torch.cos(t)), z0[rows], adjoint, [r, d])

    same_as_alone(*run(list(range(BATCH))), lambda i: run([i]))


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("wrap", [lambda r, d: (r, d), lambda r, d: {"rate": r, "inner": [d, 1.0]}])
def test_args_of_the_whole_batch(adjoint, wrap):
    z0, rate, drive = uneven()

    def f(t, z, args):
        r, d, *_ = pytree.tree_leaves(args)
        return swinging(t, z, r, d * torch.cos(t))

    def run(rows):
        r, d = rate[rows].clone().requires_grad_(), drive[rows].clone().requires_grad_()
        return outcome(f, z0[rows], adjoint, [r, d], wrap(r, d))

    same_as_alone(*run(list(range(BATCH))), lambda i: run([i]))


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("seen", ["all rows", "first rows", "nearly no last row"])
def test_args_that_only_look_as_if_they_were_of_the_batch(adjoint, seen):
    """A table of as many rows as the batch has samples, which every sample reads: it must not be cut to the batch."""
    z0, rate, drive = uneven()
    weight = torch.full((BATCH,), 1.0, dtype=torch.float64)
    if seen == "first rows":
        weight[5:] = 0.0
    elif seen == "nearly no last row":
        weight[-1] = 1e-12
    weight = weight / weight.sum()

    def f(t, z, args):
        r, table = args
        # weight is indexed by the table's rows, as attention's keys would be.
        return swinging(t, z, r, torch.cos(t) * (weight[: len(table), None] * table).sum(0))

    def run(rows):
        r = rate[rows].clone().requires_grad_()
        return outcome(f, z0[rows], adjoint, [r], (r, drive))

    same_as_alone(*run(list(range(BATCH))), lambda i: run([i]))


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_square_matrix_in_args(adjoint):
    """The everyday coincidence: weights [d, d] in a batch of d samples."""
    _, rate, _ = uneven()
    z0 = normal(BATCH, BATCH)
    matrix = normal(BATCH, BATCH, seed=5) / BATCH

    def run(rows, given=True):
        r, m = rate[rows].clone().requires_grad_(), matrix.clone().requires_grad_()

        def f(t, z, args=(r, m)):
            return swinging(t, z, args[0], z @ args[1])

        return outcome(f, z0[rows], adjoint, [r, m], (r, m) if given else None)

    solution, gradients = run(list(range(BATCH)))
    held, expected = run(list(range(BATCH)), given=False)
    torch.testing.assert_close(solution.zs, held.zs, rtol=1e-10, atol=1e-12)
    for mine, reference in zip(gradients, expected, strict=True):
        close(mine, reference, 1e-9)

    def alone(i):
        solution, gradients = run([i])
        return solution, gradients[:-1]

    same_as_alone(solution, gradients[:-1], alone)


def test_f_may_insist_on_the_whole_batch():
    """However it complains about part of it."""
    z0, rate, _ = uneven()
    for error in (AssertionError, TypeError, KeyError):

        def f(t, z, error=error):
            if len(z) != BATCH:
                raise error("the whole batch, please")
            return -rate * z

        final = nde.solve(nde.ODE(f), z0, (0.0, 1.0), rtol=1e-4).final
        single = nde.solve(nde.ODE(lambda t, z: -rate[[3]] * z), z0[[3]], (0.0, 1.0), rtol=1e-4).final
        torch.testing.assert_close(final[[3]], single, rtol=1e-9, atol=1e-12)


# -- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("t", [(0.0, 1.0), (0.0, 0.3, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("own_dt0", [False, True])
def test_nfe_of_one_sample_is_what_is_really_called(solver, control, dense, t, own_dt0):
    f = Counted(lambda t, z: -5.0 * z * torch.cos(9 * t))
    how = options(solver) if not own_dt0 else {"solver": solver, "dt0": 0.11}
    stats = nde.solve(nde.ODE(f), normal(1, 2), t, control=control, dense=dense, **how).stats
    assert stats.nfe.tolist() == [f.calls]
    assert stats.function_calls == f.calls


def test_nfe_counts_rejected_attempts():
    f = Counted(lambda t, z: -20.0 * torch.sin(9 * t) * z)
    stats = nde.solve(nde.ODE(f), normal(1, 2), (0.0, 2.0), dt0=1.0, rtol=1e-6).stats
    assert stats.rejected > 2
    assert stats.nfe == f.calls


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_function_calls_are_what_is_really_called(adjoint, grad, solver):
    """Of the whole batch, with the samples at different steps, and with f's own checks; and not those of a replay."""
    z0, rate, _ = uneven()
    f = Counted(lambda t, z, rate: -rate * z)
    with torch.set_grad_enabled(grad):
        start = z0.clone().requires_grad_(grad)
        solution = nde.solve(nde.ODE(f), start, (0.0, 0.1), args=rate, adjoint=adjoint, **options(solver, 1e-3))
    forward = f.calls
    assert solution.stats.function_calls == forward
    if grad:
        (solution.final.sum()).backward()
    solution(0.05)
    assert solution.stats.function_calls == forward
    # The slowest sample takes part in every attempt; the checks are a few calls.
    most = int(solution.stats.nfe.max())
    assert most <= forward <= most + 10


def test_nfe_is_each_samples_own():
    z0, rate, _ = uneven()
    stats = nde.solve(nde.ODE(lambda t, z, rate: -rate * z), z0, (0.0, 1.0), args=rate).stats
    for i in (0, 3, 20, 63):
        f = Counted(lambda t, z, rate: -rate * z)
        alone = nde.solve(nde.ODE(f), z0[[i]], (0.0, 1.0), args=rate[[i]]).stats
        assert stats.nfe[i] == alone.nfe[0] == f.calls
        assert stats.accepted[i] == alone.accepted[0] and stats.rejected[i] == alone.rejected[0]


# -- what may be an f ----------------------------------------------------------------------------------------------


class Dynamics:
    """Something with a parameter, whose methods are vector fields of two and of three arguments, and of one."""

    def __init__(self):
        self.weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def field(self, t, z):
        return -self.weight * z * (1 + t)

    def autonomous(self, z):
        return -self.weight * z * 2

    def with_args(self, t, z, args):
        return -self.weight * z * (1 + t) * args

    __call__ = field

    @staticmethod
    def static(t, z):
        return -0.7 * z * (1 + t)

    @classmethod
    def of_class(cls, t, z):
        return -0.7 * z * (1 + t)


class AsModule(nn.Module):
    def __init__(self, dynamics):
        super().__init__()
        self.weight = nn.Parameter(dynamics.weight.detach())

    def forward(self, t, z):
        return -self.weight * z * (1 + t)


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, t, z):
        return -self.weight * z * (1 + t)

    __hash__ = None


def scaled(weight, t, z, *, power=1):
    return -weight * z * (1 + t) ** power


def scaled_last(t, z, weight):
    return -weight * z * (1 + t)


def starred(*args):
    t, z = args
    return -0.7 * z * (1 + t)


FORMS = {
    "bound method": lambda d: (d.field, d.weight),
    "callable object": lambda d: (d, d.weight),
    "partial": lambda d: (functools.partial(scaled, d.weight), d.weight),
    "partial with keywords": lambda d: (functools.partial(scaled_last, weight=d.weight), d.weight),
    "partial of a partial": lambda d: (functools.partial(functools.partial(scaled, power=1), d.weight), d.weight),
    "partial of a method": lambda d: (functools.partial(d.field), d.weight),
    "lambda": lambda d: (lambda t, z: -d.weight * z * (1 + t), d.weight),
    "lambda with a default": lambda d: (lambda t, z, w=d.weight: -w * z * (1 + t), d.weight),
    "module": lambda d: (lambda m: (m, m.weight))(AsModule(d)),
    "module's forward": lambda d: (lambda m: (m.forward, m.weight))(AsModule(d)),
    "slots": lambda d: (Slotted(d.weight), d.weight),
    "static method": lambda d: (d.static, None),
    "class method": lambda d: (d.of_class, None),
    "stars": lambda d: (starred, None),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_forms_of_f(form, adjoint, control):
    """dz/dt = -w z (1 + t), so that z(1) = z0 exp(-3w/2), and dz(1)/dw = -3/2 z(1)."""
    f, weight = form(Dynamics())
    z0 = normal(3, 2)
    for _ in range(2):  # what is remembered of an f must not change what it is
        final = nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint, control=control, rtol=1e-9, atol=1e-10).final
        torch.testing.assert_close(final, z0 * torch.exp(torch.tensor(-1.05)).double(), rtol=1e-6, atol=0)
        assert (final.grad_fn is not None) is (weight is not None)
        if weight is not None:
            gradient = torch.autograd.grad(final.sum(), weight)[0]
            torch.testing.assert_close(gradient, -1.5 * final.sum().detach(), rtol=1e-7, atol=0)


def linear_net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


AUTONOMOUS = {
    "sequential": lambda net: net,
    "lambda": lambda net: lambda z: net(z),
    "method": lambda net: net.forward,
    "partial": lambda net: functools.partial(lambda scale, z: scale * net(z), 1.0),
    "keyword-only option": lambda net: lambda z, *, scale=1.0: scale * net(z),
}


@pytest.mark.parametrize("form", AUTONOMOUS.values(), ids=AUTONOMOUS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_autonomous_forms_of_f(form, adjoint, control, solver):
    net, z0 = linear_net(), normal(5, 2)
    how = {"adjoint": adjoint, "control": control, **options(solver)}
    found = []
    for f in (form(net), lambda t, z: net(z)):
        solution = nde.solve(nde.ODE(f), z0, (0.0, 0.5, 1.0), **how)
        found.append([solution.zs, solution(0.2), *torch.autograd.grad((solution.zs**2).sum(), list(net.parameters()))])
    assert nde.ODE(form(net)).takes_time is False
    for own, reference in zip(*found, strict=True):
        assert torch.equal(own, reference)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_args_reach_every_kind_of_f(adjoint, control):
    d, z0 = Dynamics(), normal(3, 2)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    how = {"adjoint": adjoint, "control": control, "rtol": 1e-9, "atol": 1e-10}
    solution = nde.solve(nde.ODE(d.with_args), z0, (0.0, 1.0), args=factor, **how)
    torch.testing.assert_close(solution.final.detach(), z0 * torch.exp(torch.tensor(-2.1)).double(), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(solution.final.sum(), [factor, d.weight])
    for gradient, expected in zip(gradients, (-1.05, -3.0), strict=True):
        torch.testing.assert_close(gradient, expected * solution.final.sum().detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_structures_of_args(adjoint, control):
    """Tensors anywhere in them get gradients; what is no tensor comes through as it is."""
    z0 = normal(4, 2)
    a = normal(4, 2, seed=1).requires_grad_()
    b = normal(2, 2, seed=2).requires_grad_()
    c = torch.tensor(0.3, dtype=torch.float64)
    how = {"adjoint": adjoint, "control": control}

    def rate(t, z, args):
        assert args["name"] == "w" and args["more"][1] is None
        return -args["a"] * z + torch.tanh(z @ args["more"][0]) * args["more"][2]

    def closed(t, z):
        return -a * z + torch.tanh(z @ b) * c

    args = {"a": a, "name": "w", "more": (b, None, c)}
    given = nde.solve(nde.ODE(rate), z0, (0.0, 1.0), args=args, **how)
    held = nde.solve(nde.ODE(closed), z0, (0.0, 1.0), **how)
    torch.testing.assert_close(given.final, held.final, rtol=1e-12, atol=1e-13)
    for mine, reference in zip(
        torch.autograd.grad((given.final**2).sum(), [a, b]),
        torch.autograd.grad((held.final**2).sum(), [a, b]),
        strict=True,
    ):
        close(mine, reference, 1e-11)


def test_f_may_return_what_it_was_given_or_a_buffer_of_its_own():
    z0 = normal(3, 2)
    buffer = torch.empty(3, 2, dtype=torch.float64)

    def reuses(t, z):
        return torch.mul(z, -1.0, out=buffer[: len(z)])

    expected = nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 1.0))
    assert torch.equal(nde.solve(nde.ODE(reuses), z0, (0.0, 1.0)).final, expected.final)
    grows = nde.solve(nde.ODE(lambda t, z: z), z0, (0.0, 1.0)).final
    torch.testing.assert_close(grows, nde.solve(nde.ODE(lambda t, z: z * 1.0), z0, (0.0, 1.0)).final, rtol=0, atol=0)
    still = nde.solve(nde.ODE(lambda t, z: torch.zeros_like(z)), z0, (0.0, 1.0)).final
    assert torch.equal(still, z0)


def test_f_sees_states_that_it_may_keep():
    """What f was handed stays as it was: a hook that collects states needs no copies."""
    kept = []

    def f(t, z):
        kept.append((z, z.clone(), t, t.clone()))
        return -z

    nde.solve(nde.ODE(f), normal(3, 2), (0.0, 1.0))
    assert len(kept) > 10
    for z, z_then, t, t_then in kept:
        assert torch.equal(z, z_then) and torch.equal(t, t_then)


def test_z0_is_left_alone():
    z0 = normal(3, 2)
    before = z0.clone()
    nde.solve(nde.ODE(lambda t, z: z * 1.5), z0, (0.0, 1.0), rtol=1e-6)
    assert torch.equal(z0, before)


# -- what f depends on, between the solve and its backward pass ------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_that_comes_to_f_in_more_ways_than_one(adjoint, leaf):
    """As an argument, twice, as a closed-over tensor and on the way to z0: dz/dt = -3vz from v."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    v = w if leaf else 2 * w
    f = nde.ODE(lambda t, z, args: -args[0] * z - args[1] * z - v * z)
    z0 = torch.ones(2, 1, dtype=torch.float64) * v
    final = nde.solve(f, z0, (0.0, 1.0), args=(v, v), adjoint=adjoint, rtol=1e-9, atol=1e-11).final
    value = v.detach()
    torch.testing.assert_close(final.detach(), (value * torch.exp(-3 * value)).expand(2, 1), rtol=1e-7, atol=0)
    gradient = torch.autograd.grad(final.sum(), w)[0]
    expected = 2 * (1 - 3 * value) * torch.exp(-3 * value) * (1 if leaf else 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=0)


class Late(nn.Module):
    """Holds tensors that are no parameters, and uses them in the second half of the horizon only."""

    def __init__(self, held):
        super().__init__()
        self.held, self.inner = held, nn.Identity()
        self.inner.more = [held]

    def forward(self, t, z):
        return -z if t < 0.5 else -self.held * z - self.inner.more[0] * z


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: lambda t, z: m(t, z), lambda m: m.forward])
def test_tensors_that_f_uses_late(adjoint, wrap):
    """z(1) = z0 exp(-1/2 - v)."""
    v = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    f = nde.ODE(wrap(Late(v)))
    z0 = normal(2, 1)
    final = nde.solve(f, z0, (0.0, 1.0), control="joint", adjoint=adjoint, solver="rk4", dt0=0.125).final
    gradient = torch.autograd.grad(final.sum(), v)[0]
    # The step that ends where v sets in has its last stage there: an error of order dt.
    torch.testing.assert_close(gradient, -final.sum().detach(), rtol=0.1, atol=0)


class Holder:
    def __init__(self, held):
        self.held = held


class Slots:
    __slots__ = ("__held",)

    def __init__(self, held):
        self.__held = held

    @property
    def held(self):
        return self.__held


@dataclasses.dataclass(frozen=True)
class Configuration:
    name: str
    held: torch.Tensor


class Configured(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        self.configuration = configuration


def _bottom(x):
    """The tensor in nested objects."""
    while not isinstance(x, torch.Tensor):
        x = x.configuration if isinstance(x, Configured) else x.held
    return x


def by_object(v):
    inner = Holder(Configuration("inner", v))
    inner.parent = inner  # a cycle
    return lambda t, z: -z if t < 0.5 else -_bottom(inner) * z


def by_function_of_an_object(v):
    box = Holder(None)
    box.held = types.SimpleNamespace(rates={"late": collections.deque([v])})
    return lambda t, z: -z if t < 0.5 else -box.held.rates["late"][0] * z


def by_module(v):
    module = Configured(Slots(Holder(v)))
    return lambda t, z: -z if t < 0.5 else -_bottom(module) * z


def by_hook(v):
    module = nn.Identity()
    module.register_forward_hook(lambda module, inputs, out: -_late[0] * out)
    _late[:] = [v]
    return lambda t, z: -z if t < 0.5 else module(z)


def by_global(v):
    _late[:] = [Holder({"v": v})]

    def f(t, z):
        def late():
            return _late[0].held["v"]

        return -z if t < 0.5 else -late() * z

    return f


def by_bound_method(v):
    class Model:
        def __init__(self):
            self.options = Slots(Slots(v))

        def field(self, t, z):
            return -z if t < 0.5 else -_bottom(self.options) * z

    return Model().field


_late = []
HOLDERS = [by_object, by_function_of_an_object, by_module, by_hook, by_global, by_bound_method]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("holder", HOLDERS)
def test_tensors_deep_in_objects_that_f_uses_late(adjoint, holder, leaf):
    """z(1) = z0 exp(-1/2 - v/2), with a step that ends where v sets in."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    v = w if leaf else 1.0 * w
    how = {"control": "joint", "solver": "rk4", "dt0": 0.125, "jump_times": [0.5]}
    z0 = normal(2, 1).requires_grad_()
    final = nde.solve(nde.ODE(holder(v)), z0, (0.0, 1.0), adjoint=adjoint, **how).final
    if adjoint != "direct" and not leaf and holder in (by_module, by_hook):
        # Computed tensors in a Module's attributes may be left over from an earlier call: they are not looked for.
        with refused(nde.NeuralDEError, "args", "direct"):
            final.sum().backward()
        return
    gradient = torch.autograd.grad(final.sum(), w)[0]
    torch.testing.assert_close(gradient, -0.5 * final.sum().detach(), rtol=1e-3, atol=0)


def hidden_in_a_generator(v):
    """Which hands v out again and again: no inspection finds it."""

    def always():
        while True:
            yield v

    values = always()
    return lambda t, z: next(values) * z


def hidden_by_a_class(v):
    cls = type("Constants", (), {"v": v})
    return lambda t, z: cls.v * z


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("hide", [hidden_in_a_generator, hidden_by_a_class])
@pytest.mark.parametrize("twice", [False, True])
def test_a_tensor_that_can_not_be_found_is_not_missed_in_silence(adjoint, hide, twice):
    v = torch.tensor([[0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    product = hide(v)
    z0 = normal(2, 2).requires_grad_()
    how = {"control": "joint", "solver": "rk4", "dt0": 0.125, "jump_times": [0.5], "adjoint": adjoint}
    final = nde.solve(nde.ODE(lambda t, z: -z if t < 0.5 else -product(t, z)), z0, (0.0, 1.0), **how).final
    if adjoint == "direct":
        gradient = torch.autograd.grad(final.sum(), v)[0]
        torch.testing.assert_close(gradient, -0.5 * final.sum(0, keepdim=True).detach(), rtol=1e-4, atol=0)
        return
    twice = twice and nde.adjoints.get(adjoint).exact
    with refused(nde.NeuralDEError, "(1, 2)", "args", "direct"):
        torch.autograd.grad(final.sum(), z0, create_graph=twice)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_tensors_that_f_makes_are_not_taken_for_hidden_ones(adjoint):
    """A Hamiltonian's f differentiates with respect to a tensor of its own."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(t, z):
        with torch.enable_grad():
            x = z if z.requires_grad else z.detach().requires_grad_()
            own = torch.ones((), dtype=z.dtype, requires_grad=True)
            (slope,) = torch.autograd.grad((own * w * x**2).sum() / 2, x, create_graph=True)
        return -slope

    z0 = normal(2, 1).requires_grad_()
    final = nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint, rtol=1e-8, atol=1e-8).final
    found = torch.autograd.grad(final.sum(), [z0, w])
    close(found[0], torch.exp(-w).detach().expand(2, 1), 1e-6)
    close(found[1], -final.sum().detach(), 1e-6)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("depth", [0, 1])
def test_what_else_the_object_of_f_holds_does_no_harm(adjoint, depth):
    """Losses of earlier iterations, whose graphs are gone; the losses of this one; and what f computed last."""

    class Trainer:
        def __init__(self):
            self.weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            self.losses = []
            self.history = Holder(self.losses) if depth else self.losses

        def field(self, t, z):
            self.last = -self.weight * z
            return self.last

    trainer = Trainer()
    if depth:
        history, trainer.losses = trainer.history.held, None
    else:
        history = trainer.losses
    for _ in range(3):
        final = nde.solve(
            nde.ODE(trainer.field), normal(2, 1), (0.0, 1.0), adjoint=adjoint, control="joint", rtol=1e-8
        ).final
        history.append(torch.exp(final).sum())
        trainer.weight.grad = None
        history[-1].backward()
        close(trainer.weight.grad, -(final * torch.exp(final)).sum().detach(), 1e-6)


def test_the_search_stops_at_libraries():
    """It neither runs away into them, nor calls anything."""

    class Sly:
        def __getattr__(self, name):
            raise AssertionError(name)

        @property
        def value(self):
            raise AssertionError("value")

    held = torch.ones(1, requires_grad=True)
    holder = [logging.getLogger(), threading.Lock(), sys, nn.Linear, torch.Generator(), Sly(), {1: held}, range(3)]
    assert reachable(lambda t, z: holder)[0] is held and len(reachable(lambda t, z: holder)) == 1


def right_or_refused(run, reference):
    """The gradient is that of the f which was solved; or an error says that it can't be had. Never another one."""
    try:
        gradients = run()
    except nde.NeuralDEError as error:
        assert "backward" in str(error) and "direct" in str(error)
        return
    for mine, expected in zip(gradients, reference, strict=True):
        assert mine is not None
        close(mine, expected, 1e-10)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_f_is_given_another_input_before_the_backward_pass(adjoint):
    """Two solves, then one backward pass through both: torchdyn's DataControl, or a closed-over variable."""
    net = nn.Linear(4, 2).double()
    inputs = [normal(3, 2, seed=seed) for seed in (1, 2)]
    z0 = normal(3, 2)
    held = None

    def f(t, z):
        return torch.tanh(net(torch.cat([z, held], 1)))

    def total(one_by_one):
        nonlocal held
        gradients, loss = [], 0.0
        for held in inputs:
            term = (nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint).final ** 2).sum()
            if one_by_one:
                gradients.append(torch.autograd.grad(term, list(net.parameters())))
            loss = loss + term
        if one_by_one:
            return [sum(parts) for parts in zip(*gradients, strict=True)]
        return torch.autograd.grad(loss, list(net.parameters()))

    right_or_refused(lambda: total(False), total(True))


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_functional_call(adjoint, scale):
    """Parameters lent to a module for one forward pass, as meta-learning does; at first they equal its own."""
    layer = nde.NeuralODE(linear_net(), adjoint=adjoint)
    z0 = normal(3, 2)
    lent = {name: (p.detach() * scale).requires_grad_() for name, p in layer.named_parameters()}
    own = nde.NeuralODE(linear_net(), adjoint=adjoint)
    own.load_state_dict(lent)
    expected = torch.autograd.grad((own(z0) ** 2).sum(), list(own.parameters()))

    def run():
        out = torch.func.functional_call(layer, lent, (z0,))
        assert torch.equal(out, own(z0))
        return torch.autograd.grad((out**2).sum(), list(lent.values()), allow_unused=True)

    right_or_refused(run, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_f_changes_mode_before_the_backward_pass(adjoint):
    net = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    z0 = normal(3, 2)

    def run(evaluate):
        torch.manual_seed(3)
        net.train()
        out = nde.solve(nde.ODE(net), z0, (0.0, 1.0), adjoint=adjoint).final
        net.train(not evaluate)
        return torch.autograd.grad((out**2).sum(), list(net.parameters()))

    right_or_refused(lambda: run(True), run(False))


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_parameters_that_were_stepped_before_the_backward_pass(adjoint):
    """PyTorch's own error: a tensor needed for the gradient was changed in place."""
    net = linear_net()
    out = nde.solve(nde.ODE(net), normal(3, 2), (0.0, 1.0), adjoint=adjoint).final
    with torch.no_grad():
        net[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_scripted_f_has_the_gradients_of_the_plain_one(adjoint):
    """What it computes inside goes unseen by those who watch what f uses."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, t, z):
            return torch.tanh(self.inner(z))

    net, found = Net().double(), []
    for f in (net, torch.jit.script(net)):
        solution = nde.solve(nde.ODE(f), torch.ones(3, 2, dtype=torch.float64), (0.0, 1.0), adjoint=adjoint)
        found.append(torch.autograd.grad((solution.final**2).sum(), list(net.parameters())))
    for g, h in zip(*found, strict=True):
        close(g, h, 1e-12)
