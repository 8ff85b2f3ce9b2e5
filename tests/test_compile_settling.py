"""Compiled solves of ODEs to their steady states: the same as others; what gets lost is left to the loop in Python."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import CONTROLS, ODES, close
from test_compile_equilibria import COMPILER, Map, inputs, silent
from torch import nn

import neuralde as nde

__all__ = ["silent"]

SOLVERS = [name for name, x in ODES.items() if isinstance(x, nde.solvers.RungeKutta) and x.fsal and x.adaptive]
QUICK = "bs3", "per_sample", "norm"  # its programs are made in every run of the tests


def solved(z0, compile, f, args=None, **how):
    return nde.solve(nde.SteadyState(f), z0, args=args, compile=compile, **how)


def in_both_ways(z0, f, **how):
    return [solved(z0, compile, f, **how) for compile in (True, False)]


@COMPILER
@pytest.mark.parametrize(
    ("solver", "control", "mode", "more"),
    [
        pytest.param(*QUICK, False, id="quick"),
        *(
            pytest.param(solver, control, mode, True, marks=pytest.mark.slow, id=f"{solver}-{control}-{mode}")
            for solver in SOLVERS
            for control in CONTROLS
            for mode in ("norm", "relative", "absolute")
        ),
    ],
)
def test_a_compiled_steady_state_is_the_same(silent, solver, control, mode, more):
    """more: with other tolerances of the steps, another batch and other parameters, too."""
    f, x = Map(), inputs()
    how = {"args": x, "solver": solver, "control": control, "rtol": 1e-9, "atol": 1e-9, "termination": mode}
    z0 = torch.zeros_like(x).detach()
    mine, theirs = in_both_ways(z0, f, **how)
    close(mine.final, theirs.final, 1e-8)
    assert mine.converged.all() and mine.residual.max() <= 1e-9
    close(mine.residual.log(), theirs.residual.log(), 1e-2)
    for name in ("nfe", "accepted", "rejected"):
        # Rounding may cost or save a step at the end.
        assert int((getattr(mine.stats, name) - getattr(theirs.stats, name)).abs().max()) <= 7 * (name == "nfe") + 1
    gradients = [torch.autograd.grad(z.final.square().sum(), [*f.parameters(), x]) for z in (mine, theirs)]
    for one, other in zip(*gradients, strict=True):
        close(one, other, 1e-6)
    # The error of the first step is little more than rounding, by which the third one's size differs.
    for name, steps, tolerance in (("dt", 2, 1e-6), ("residual", 2, 1e-6), ("z", 2, 1e-8), ("error", 5, 1e-2)):
        one, other = (getattr(solution.steps, name)[:steps].detach() for solution in (mine, theirs))
        close(one, other, tolerance)
    if not more:
        return
    f.state.weight.data *= 0.5
    mine, theirs = in_both_ways(torch.cat([z0, z0]), f, **how | {"args": torch.cat([x, x]), "rtol": 1e-8})
    assert mine.converged.all()
    close(mine.final, theirs.final, 1e-7)


@COMPILER
@pytest.mark.slow
def test_who_is_at_rest_from_the_start_stays_there(silent):
    f, how = nn.Linear(2, 2, bias=False).double(), {"solver": "bs3", "control": "per_sample"}
    nn.init.eye_(f.weight)
    f.weight.data *= 0.5
    z0 = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3.0, 0.5]], dtype=torch.float64)
    mine, theirs = in_both_ways(z0, f, **how)
    assert mine.depth[1] == 0 and torch.equal(mine.depth, theirs.depth) and mine.converged.all()
    close(mine.final, theirs.final, 1e-12)
    close(mine.residual, theirs.residual, 1e-9)
    mine, theirs = in_both_ways(torch.zeros_like(z0), f, **how)
    assert torch.equal(mine.final, theirs.final) and int(mine.depth.max()) == 0 and mine.converged.all()
    assert mine.stats.function_calls <= theirs.stats.function_calls + 1


def expanding(z):
    """A map whose third sample runs away."""
    return torch.where(z > 2.5, 3.0 * z, 0.5 * z)


def without_rest(z):
    """A rotation, shrinking for the first sample and not for the others."""
    turned = torch.stack([-z[:, 1], z[:, 0]], dim=1)
    return z + 0.5 * turned - torch.where(z[:, :1] * 0.0 + z.norm(dim=1, keepdim=True) < 0.6, 0.5 * z, 0.0 * z)


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("f", [expanding, without_rest])
def test_who_gets_lost_is_reported_as_ever(silent, f):
    z0 = torch.tensor([[0.5, 0.1], [1.0, 0.1], [3.0, 3.0]], dtype=torch.float64)
    found = []
    for compile in (True, False):
        with pytest.warns(nde.errors.SolveWarning):
            found.append(solved(z0, compile, f, solver="bs3", control="per_sample"))
    mine, theirs = found
    assert torch.equal(mine.status, theirs.status) and not mine.converged.all()
    assert torch.equal(mine.final, theirs.final)


@COMPILER
@pytest.mark.slow
def test_a_residual_at_a_standstill_is_one_as_ever(silent):
    """It converges so slowly that a patience of 8 steps without a fall of 90 % ends it, within 3 tolerances."""
    f = nn.Linear(1, 1, bias=False).double()
    f.weight.data[:] = 0.5
    termination = nde.Termination("absolute", atol=1e-3, patience=8, fall=0.9)
    z0, how = torch.full((2, 1), 4e-3, dtype=torch.float64), {"solver": "bs3", "dt_max": 0.02, "dt0": 0.02}
    found = []
    for compile in (True, False):
        with pytest.warns(nde.errors.SolveWarning):
            found.append(solved(z0, compile, f, termination=termination, **how))
    assert torch.equal(found[0].status, found[1].status) and not found[0].converged.any()
    assert torch.equal(found[0].depth, found[1].depth)


@COMPILER
@pytest.mark.slow
def test_an_equation_that_knows_the_time(silent):
    """dz/dt of an ODE, with its state in a tuple; its steps kept."""
    gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = gain

        def forward(self, t, z):
            a, b = z
            return -self.gain * a * (2.0 - torch.exp(-t)).reshape(-1, 1), b.cos() - b

    equation = nde.SteadyState.of(nde.ODE(Field()))
    z0 = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    mine, theirs = (
        nde.solve(equation, z0, solver="tsit5", compile=compile, dense=True, rtol=1e-8, atol=1e-8)
        for compile in (True, False)
    )
    for one, other in zip(mine.final, theirs.final, strict=True):
        assert float((one - other).abs().max()) <= 1e-12
    close(mine.final[1], torch.full((3, 1), 0.7390851332151607, dtype=torch.float64), 1e-7)
    for one, other in zip(mine(torch.tensor(0.4)), theirs(torch.tensor(0.4)), strict=True):
        close(one, other, 1e-9)
    assert math.isclose(float(mine.ts[-1].max()), float(theirs.ts[-1].max()), rel_tol=1e-6)


@COMPILER
@pytest.mark.slow
def test_the_linear_system_may_be_compiled_too(silent):
    f, x = Map(), inputs()
    adjoint = nde.adjoints.Implicit("anderson", rtol=1e-12)
    how = {"args": x, "solver": "tsit5", "rtol": 1e-10, "atol": 1e-10, "adjoint": adjoint}
    mine, theirs = in_both_ways(torch.zeros_like(x).detach(), f, **how)
    for one, other in zip(
        *(torch.autograd.grad(z.final.square().sum(), [*f.parameters(), x]) for z in (mine, theirs)), strict=True
    ):
        close(one, other, 1e-7)


@COMPILER
@pytest.mark.slow
def test_more_attempts_than_a_log_holds(silent):
    f = nn.Linear(2, 2, bias=False).double()
    nn.init.eye_(f.weight)
    f.weight.data *= 0.5
    how = {"solver": "bs3", "control": "joint", "rtol": 1e-6, "atol": 1e-6}
    mine, theirs = in_both_ways(torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64), f, **how)
    assert int(theirs.depth.max()) > 64
    assert torch.equal(mine.depth, theirs.depth)
    close(mine.final, theirs.final, 1e-11)
    close(mine.steps.residual, theirs.steps.residual, 1e-6)
