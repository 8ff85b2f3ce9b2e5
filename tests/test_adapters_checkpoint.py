"""Adapted solves inside of torch.utils.checkpoint, which makes them once more in the backward pass."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
import torchsde
from adapters import FUNCTIONS, LOOSE, TIMES, Net, start
from helpers import close
from test_adapters_torchsde import SDE, TS
from torch import nn
from torch.utils.checkpoint import checkpoint

import regularizers as reg
from regularizers import torchdiffeq as adapter
from regularizers import torchsde as sde_adapter
from regularizers.recomputed import Seeds, hooked

FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)


def blocks(solve, reentrant, through=lambda y: 0.0, method="dopri5", depth=3):
    """(the output, the penalties made inside, the gradients) of solves in a row, each under a checkpoint."""
    fields = [Net() for _ in range(depth)]
    y, extra = start().requires_grad_(), 0.0

    def block(f, y):
        y = solve(f, y, TIMES["forwards"], method=method, **LOOSE)[-1]
        return y, through(y)

    for f in fields:
        y, more = block(f, y) if reentrant is None else checkpoint(block, f, y, use_reentrant=reentrant)
        extra = extra + more
    (y.square().sum() + extra).backward()
    return y, extra, [p.grad for f in fields for p in f.parameters()]


@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "rk4", "heun3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_import_changes_nothing(reentrant, method, function):
    """Whatever the sampled times are: the recomputation finds the tape that it expects."""
    theirs = blocks(getattr(torchdiffeq, function), reentrant, method=method)
    for seed in range(4):
        with reg.record(torch.Generator().manual_seed(seed)) as solutions:
            ours = blocks(getattr(adapter, function), reentrant, method=method)
        assert torch.equal(ours[0], theirs[0]) and len(solutions) == 3
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


@FUNCTION
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_penalties_inside_and_outside_of_a_checkpoint(sampling, function):
    """As without one: the same times, of which a recomputation has those of its own block."""
    solve, penalty = getattr(adapter, function), reg.LocalError(sampling, scaled=False, weight=100.0)
    found = []
    for reentrant in (None, False):
        with reg.record(torch.Generator().manual_seed(3)) as solutions:
            found.append((*blocks(solve, reentrant, lambda y: penalty(solve.solution)), penalty(solutions)))
        assert len(solutions) == 3 and solve.solution is solutions[-1]
    (y, inside, gradients, outside), (y_here, inside_here, gradients_here, outside_here) = found
    assert torch.equal(y, y_here) and float(inside.detach()) > 0
    close(inside_here, inside, 1e-9)
    close(outside_here, outside, 1e-9)
    for a, b in zip(gradients_here, gradients, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("through_state", [False, True])
def test_a_penalty_outside_of_the_checkpoint_has_its_gradient(through_state):
    f, penalty = Net(), reg.LocalStiffness(through_state=through_state)

    def gradient(call):
        with reg.record(torch.Generator().manual_seed(3)) as solutions:
            # A fixed-step method: torchdiffeq has the sizes of adaptive steps on its tape, a penalty has constants.
            call(lambda y: adapter.odeint(f, y, TIMES["forwards"], method="rk4"), start().requires_grad_())
        return torch.autograd.grad(penalty(solutions), list(f.parameters()))

    plain = gradient(lambda solve, y: solve(y))
    for a, b in zip(gradient(lambda solve, y: checkpoint(solve, y, use_reentrant=False)), plain, strict=True):
        close(a, b, 1e-9)


@FUNCTION
def test_a_reentrant_checkpoint_has_no_penalty_and_says_why(function, monkeypatch):
    monkeypatch.setattr("regularizers.recorded._WARNED", set())
    solve = getattr(adapter, function)
    checkpoint(lambda y: solve(Net(), y, TIMES["forwards"]), start().requires_grad_(), use_reentrant=True)
    with pytest.warns(UserWarning, match="use_reentrant=True"):
        assert float(reg.LocalError()(solve.solution)) == 0.0


def test_new_steps_of_training_draw_new_times():
    """From the same start each time, of which the recomputation between them knows the seed."""
    f = Net()
    with reg.record(torch.Generator().manual_seed(0)) as solutions:
        for _ in range(3):
            y = checkpoint(lambda y: adapter.odeint(f, y, TIMES["forwards"]), start(), use_reentrant=False)
            y.sum().backward()
    assert len({float(s.place("unbiased").t) for s in solutions}) == len(solutions) == 3


def test_seeds_are_few():
    seeds, fresh = Seeds(), iter(range(10000))

    def drawn(y):
        seeds.of(None, y, lambda: next(fresh))
        return y * y

    for j in range(1100):
        checkpoint(drawn, torch.full((1,), float(j), requires_grad=True), use_reentrant=False)
    assert next(fresh) == 1100 and len(seeds._seeds) == 1024
    assert seeds.of(None, start(), lambda: -1) == -1 and len(seeds._seeds) == 1024  # nothing is kept outside of one


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", ["sdeint", "sdeint_adjoint"])
def test_an_sde(function, reentrant):
    """With a given path: torchsde draws the seed of its own from NumPy, which a checkpoint does not restore."""
    found = []
    for module in (torchsde, sde_adapter):
        sde, y0 = SDE(), start().requires_grad_()
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(5, 3), dtype=torch.float64, entropy=4)

        def solve(y, module=module, sde=sde, bm=bm):
            return getattr(module, function)(sde, y, TS, dt=0.1, method="euler", bm=bm)

        ys = checkpoint(solve, y0, use_reentrant=reentrant)
        ys[-1].square().sum().backward()
        found.append([ys, y0.grad, *(p.grad for p in sde.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_torchdyn_layer():
    core = pytest.importorskip("torchdyn.core")
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            core.NeuralODE(Net().net, solver="tsit5", sensitivity="autograd"), nn.Linear(3, 1).double()
        )
        if attached:
            reg.attach(model)
        y = checkpoint(lambda x, model=model: model[1](model[0](x)[1][-1]), start(), use_reentrant=False)
        y.sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("told", [True, False])
def test_what_takes_in_the_tape_is_noticed(told, monkeypatch):
    """Where torch tells, and by trial where it does not."""
    if not told:
        monkeypatch.setattr("regularizers.recomputed._HOOKS", None)
    found = []

    def noted(x):
        found.append(hooked())
        return x.exp()

    assert not hooked()
    with torch.no_grad():
        assert not hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert hooked()
    checkpoint(noted, start().requires_grad_(), use_reentrant=False).sum().backward()
    assert found == [True, True] and not hooked()
