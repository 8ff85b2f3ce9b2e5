"""Penalties of adapted solves stay on the horizon, and sample it as they say, whichever library made them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from adapters import ADAMS, ADAPTIVE, FIXED, LOOSE
from scipy import stats
from torch import nn

import regularizers as reg
from regularizers import torchdiffeq as ode_adapter
from regularizers import torchsde as sde_adapter
from regularizers.recorded import sampled, within

PENALTIES = [
    penalty(sampling, **how)
    for sampling in ("unbiased", "biased")
    for penalty, how in ((reg.LocalError, {"scaled": False}), (reg.LocalStiffness, {}))
]


class Field(nn.Module):
    """dz = -(1 + 4t) z, of which the stiffness is 1 + 4t, with the times that it saw."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self):
        super().__init__()
        self.one, self.seen = nn.Parameter(torch.ones((), dtype=torch.float64)), []

    def forward(self, t, z, args=None):
        self.seen.append(float(t.detach()))
        return -(1 + 4 * t) * self.one * z

    def f(self, t, z):
        return self(t, z)

    def g(self, t, z):
        return 0.1 * self.one.expand_as(z)


def torchdiffeq_solve(ends, function="odeint", method="dopri5", **how):
    t, solve = torch.tensor(ends, dtype=torch.float64), getattr(ode_adapter, function)
    f = Field()
    solve(f, torch.ones(2, 1, dtype=torch.float64), t, method=method, **LOOSE | how)
    return f, solve.solution


def torchsde_solve(ends, method="euler", **how):
    f = Field()
    ts, y0 = torch.tensor(ends, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    sde_adapter.sdeint(f, y0, ts, method=method, **{"dt": 0.3, **how})
    return f, sde_adapter.sdeint.solution


def torchdyn_solve(ends, solver="rk4", **how):
    core = pytest.importorskip("torchdyn.core")
    f = Field()
    layer = core.NeuralODE(f, solver=solver, sensitivity="autograd", **LOOSE | how)
    reg.attach(layer)
    layer(torch.ones(2, 1, dtype=torch.float64), torch.tensor(ends, dtype=torch.float64))
    return f, layer.solution


SOLVES = {
    **{
        f"torchdiffeq-{method}": functools.partial(torchdiffeq_solve, method=method)
        for method in (*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver")
    },
    "torchdiffeq-step_size": functools.partial(torchdiffeq_solve, method="rk4", options={"step_size": 0.3}),
    "torchdiffeq-odeint_adjoint": functools.partial(torchdiffeq_solve, function="odeint_adjoint"),
    **{f"torchdyn-{solver}": functools.partial(torchdyn_solve, solver=solver) for solver in ("rk4", "dopri5", "tsit5")},
    "torchsde-euler": torchsde_solve,
    "torchsde-srk": functools.partial(torchsde_solve, method="srk"),
    "torchsde-adaptive": functools.partial(torchsde_solve, adaptive=True, **LOOSE),
}


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 0.3), (1.0, 0.0)], ids=["forwards", "across zero", "backwards"])
@pytest.mark.parametrize("name", SOLVES)
def test_f_is_asked_for_nothing_beyond_the_horizon(name, ends):
    if ends[1] < ends[0] and "torchsde" in name:
        pytest.skip("an SDE is solved forward")
    with reg.record(torch.Generator().manual_seed(0)):
        for _ in range(6):
            f, solution = SOLVES[name](ends)
            # The state of odeint_adjoint is made by torchdiffeq's step once more, which may have gone further.
            limits = [*ends, *f.seen] if "adjoint" in name else ends
            f.seen.clear()
            for penalty in PENALTIES:
                if "scipy" in name and penalty.sampling == "biased":
                    continue
                value = penalty(solution)
                assert bool(value.isfinite()) and f.seen
            assert min(limits) <= min(f.seen) and max(f.seen) <= max(limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_to_the_end_is_not_beyond_it(dtype):
    draws = torch.rand(2, 2000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for sign in (1, -1):
        t, end = sign * (draws[0] - 1), sign * draws[1]
        dt = torch.stack([within(*step) for step in zip(t, sign * torch.full_like(t, 5.0), end, strict=True)])
        assert bool((sign * (t.double() + dt - end) <= 0).all()) and bool(((t + dt - end).abs() < 1e-6).all())
        half = torch.stack([within(*step) for step in zip(t, dt / 2, end, strict=True)])
        assert torch.equal(half, dt / 2)


def test_a_sampled_time_is_before_the_end():
    class Last:
        def random(self):
            return 1 - 2**-53

    start, end = torch.tensor([0.0, 1.0])
    assert bool(sampled(Last(), start, end) < end) and bool(sampled(Last(), end, start) > start)


# -- many solves -------------------------------------------------------------------------------------------------------

# The starts of the steps, of lengths that differ; and where in a step the two stages are that its stiffness is made of:
# Tsit5's and SOSRI's at its end, those of the 3/8 rule or its classical sister inside.
MANY = {
    "torchdiffeq": ([0.0, 0.1, 0.2, 0.3], 1.0),
    "torchdyn": ([0.0, 0.1, 0.2, 0.3], 0.5),
    "torchsde": ([0.0, 0.4, 0.8], 1.0),
}


def repeated(name, starts, count):
    """(unbiased time, its LocalStiffness, biased time) of many solves, [count, 3]."""
    f, ends = Field(), torch.tensor([*starts, 1.0], dtype=torch.float64)
    z, layer, penalty, found = torch.ones(2, 1, dtype=torch.float64), None, reg.LocalStiffness(), []
    if name == "torchdyn":
        core = pytest.importorskip("torchdyn.core")
        layer = reg.attach(core.NeuralODE(f, solver="rk4", sensitivity="autograd"))
    with reg.record(torch.Generator().manual_seed(0)):
        for _ in range(count):
            if name == "torchdiffeq":
                ode_adapter.odeint(f, z, ends, method="rk4")
                solution = ode_adapter.odeint.solution
            elif name == "torchsde":
                sde_adapter.sdeint(f, z, ends[[0, -1]], dt=0.4, method="euler")
                solution = sde_adapter.sdeint.solution
            else:
                layer(z, ends)
                solution = layer.solution
            t, step = (float(solution.place(x).t) for x in ("unbiased", "biased"))
            found.append((t, float(penalty(solution).detach()), step))
    return np.array(found)


def check_many(name, count):
    starts, part = MANY[name]
    times, figures, biased = repeated(name, starts, count).T
    ends = np.array([*starts, 1.0])

    def figure(t):
        step = np.diff(ends)[np.searchsorted(ends, t, side="right") - 1]
        return 1 + 4 * (t + part * np.minimum(step, 1 - t))

    np.testing.assert_allclose(figures, figure(times), rtol=1e-6)
    average = figure((np.arange(10**5) + 0.5) / 10**5).mean()
    assert abs(figures.mean() - average) < 3 * figures.std(ddof=1) / count**0.5
    which = np.abs(biased[:, None] - ends[:-1]).argmin(axis=1)
    np.testing.assert_allclose(biased, ends[which], atol=1e-9)
    assert stats.chisquare(np.bincount(which, minlength=len(starts))).pvalue > 1e-3


@pytest.mark.parametrize("name", MANY)
def test_the_mean_is_the_time_average_and_biased_draws_are_uniform_over_the_steps(name):
    check_many(name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_the_mean_of_thousands(name):
    check_many(name, 4000)
