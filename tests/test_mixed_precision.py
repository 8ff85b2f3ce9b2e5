"""Gradients where f computes in half precision: within its rounding of float32's, under every adjoint.

What is tested elsewhere: states in half precision and autocast going forward (test_states.py).
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, SOLVERS
from torch import nn
from torch.func import functional_call

import neuralde as nde

DTYPES = [torch.bfloat16, torch.float16]
# Units of rounding, of a gradient's norm. What a step adds to a gradient passes through two layers, forward and back,
# with half a unit of rounding each, and roundings add up as random numbers do: 2.7 at most was measured, over several
# seeds, every solver, dtype and adjoint. A term that is left out is more: see the test of that.
BOUND = 8
STEPS = 8


def case(seed=0):
    """(network, initial state, args) in float32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(8, 4), torch.randn(4)


def rounded(dtype):
    """The same case with numbers that a half precision has, still in float32."""
    net, z0, args = case()
    return net.to(dtype).float(), z0.to(dtype).float(), args.to(dtype).float()


def fixed(control):
    return nde.StepControl(per_sample=control == "per_sample", adaptive=False)


def gradients(net, z0, args, autocast=None, f=None, **how):
    """Those of z0, args and the parameters, in float32."""
    z0, args = z0.detach().requires_grad_(), args.detach().requires_grad_()
    how = {"solver": "rk4", "dt0": 1 / STEPS, "adjoint": "direct", "control": fixed("per_sample"), **how}
    f = f or (lambda t, z, args: net(z) * torch.sigmoid(args))
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        solution = nde.solve(nde.ODE(f), z0, (0.0, 1.0), args=args, **how)
        loss = solution.final.float().square().mean()
    # Outside of the autocast region, as PyTorch recommends.
    return solution, [g.float() for g in torch.autograd.grad(loss, [z0, args, *net.parameters()])]


def off(found, expected):
    """The distances of gradients, relative to the expected ones' norms."""
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]


def pair(kind, dtype, **how):
    """The gradients in half precision and in float32."""
    if kind == "autocast":
        return gradients(*case(), autocast=dtype, **how)[1], gradients(*case(), **how)[1]
    net, z0, args = rounded(dtype)
    expected = gradients(net, z0, args, **how)[1]
    return gradients(net.to(dtype), z0.to(dtype), args.to(dtype), **how)[1], expected


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["autocast", "state"])
def test_gradients_are_within_rounding(kind, dtype, adjoint, control):
    found, expected = pair(kind, dtype, adjoint=adjoint, control=fixed(control))
    assert max(off(found, expected)) <= BOUND * torch.finfo(dtype).eps
    assert min(off(found, expected)) > 0.0, "nothing was rounded"


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["autocast", "state"])
def test_gradients_of_every_solver_are_within_rounding(kind, solver, adjoint):
    found, expected = pair(kind, torch.bfloat16, adjoint=adjoint, solver=solver, control=fixed("joint"))
    assert max(off(found, expected)) <= BOUND * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["autocast", "state"])
def test_gradients_of_adaptive_steps_are_within_rounding(kind, dtype, adjoint, control):
    """Against float32 on the steps that half precision chose: a fixed step of the whole horizon, stopped at each."""
    how = {"adjoint": adjoint, "solver": "tsit5", "control": control, "dt0": None, "rtol": 1e-2, "atol": 1e-3}
    if kind == "autocast":
        start = case()
        solution, found = gradients(*start, autocast=dtype, **how)
    else:
        start = rounded(dtype)
        low = [x.to(dtype) for x in rounded(dtype)]
        solution, found = gradients(*low, **how)
    steps = solution.steps
    assert len(steps) > 2
    ends = torch.where(steps.mask, steps.t + steps.dt, math.inf).T
    ends = torch.where(ends < 0.999, ends, math.inf)  # the horizon's end is none
    how = {"adjoint": adjoint, "solver": "tsit5", "control": fixed(control), "dt0": 1.0, "step_times": ends}
    again, expected = gradients(*start, **how)
    torch.testing.assert_close(again.steps.t, steps.t, rtol=0.0, atol=1e-6)
    assert max(off(found, expected)) <= BOUND * torch.finfo(dtype).eps


@pytest.mark.parametrize("step", range(STEPS))
def test_the_bound_would_show_a_term_left_out(step):
    """A step whose part of the gradient is missing is more than rounding, in every parameter and in args."""
    net, z0, args = case()

    def f(t, z, args):
        if step <= STEPS * float(t.flatten()[0]) < step + 1:
            return functional_call(net, {name: p.detach() for name, p in net.named_parameters()}, z) * torch.sigmoid(
                args.detach()
            )
        return net(z) * torch.sigmoid(args)

    _, (_, *expected) = gradients(net, z0, args)
    _, (_, *found) = gradients(net, z0, args, f=f)
    assert min(off(found, expected)) > BOUND * torch.finfo(torch.bfloat16).eps


# -- gradient scaling --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, adjoint, **options):
        super().__init__()
        field = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.before, self.after = nn.Linear(3, 8), nn.Linear(8, 2)
        self.ode = nde.NeuralODE(field, adjoint=adjoint, rtol=1e-2, atol=1e-2, **options)

    def forward(self, x):
        return self.after(self.ode(self.before(x)))


def training(adjoint, dtype, control="per_sample"):
    """(model, optimizer, its loss in autocast as a function of a factor)."""
    torch.manual_seed(0)
    model = Classifier(adjoint, control=control)
    x, target = torch.randn(16, 3), torch.randint(2, (16,))

    def loss(factor=1.0):
        with torch.autocast("cpu", dtype=dtype):
            return factor * nn.functional.cross_entropy(model(x).float(), target)

    return model, torch.optim.SGD(model.parameters(), lr=0.1), loss


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_gradients_are_the_gradients(dtype, adjoint, control):
    """After unscaling. Small ones, that float16 has no numbers for, are kept by the scale."""
    model, optimizer, loss = training(adjoint, dtype, control)
    factor = 1e-3  # 2¹⁶ times the gradients of a larger loss is more than float16 holds
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss(factor)).backward()
    scaler.unscale_(optimizer)
    found = [p.grad.clone() for p in model.parameters()]
    # With a factor and without a scale: the same computation in float16's middle range.
    expected = [g * factor for g in torch.autograd.grad(loss(), list(model.parameters()))]
    assert max(off(found, expected)) <= BOUND * torch.finfo(dtype).eps
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    for p, old, g in zip(model.parameters(), before, found, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_overflow_is_found_and_skipped(dtype, adjoint, control):
    """The scale falls until the gradients are finite; no step is made before, and nothing of ours complains."""
    model, optimizer, loss = training(adjoint, dtype, control)
    # bfloat16 has the exponents of float32: only a scale near its end overflows.
    largest = 2.0**20 if dtype == torch.float16 else 2.0**127
    scaler = torch.amp.GradScaler("cpu", init_scale=largest)
    start = [p.detach().clone() for p in model.parameters()]
    first, skipped = float(loss().detach()), 0
    for _ in range(40):
        optimizer.zero_grad()
        scaler.scale(loss(8.0)).backward()
        overflown = not all(torch.isfinite(p.grad).all() for p in model.parameters())
        scaler.step(optimizer)
        old = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == (old / 2 if overflown else old)
        if not overflown:
            break
        skipped += 1
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert skipped >= 1 and not overflown
    assert float(loss().detach()) < first


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_training_loop_with_a_scaler_learns(adjoint):
    _, optimizer, loss = training(adjoint, torch.float16)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**16), []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.95 * losses[0] and scaler.get_scale() <= 2.0**16
