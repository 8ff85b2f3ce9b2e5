"""torchsde and ours: the same steps, its loop with our methods, our solves with its Brownian paths."""

import pytest
import torch
from helpers import SDE_SOLVERS, refused

import neuralde as nde
from neuralde.interop.torchsde import brownian_interval, sdeint, solver_class

torchsde = pytest.importorskip("torchsde")

FIXED = nde.StepControl(per_sample=False, adaptive=False)
METHODS = nde.solvers.SDE_SOLVERS
CASES = [(s, noise, sense) for s in SDE_SOLVERS for noise in METHODS[s].orders for sense in METHODS[s].sde_types]
THEIRS = {"euler_maruyama": "euler"}  # our names for their methods, where they differ
SHARED = [case for case in CASES if THEIRS.get(case[0], case[0]) in torchsde.settings.METHODS]


class Theirs(torch.nn.Module):
    """An SDE as torchsde has them."""

    def __init__(self, noise_type, sde_type):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.weight = torch.nn.Parameter(torch.tensor([[0.3, -0.5], [0.8, 0.2]], dtype=torch.float64))

    def f(self, t, y):
        return torch.tanh(y @ self.weight) + 0.2 * torch.cos(3 * t)

    def g(self, t, y):
        base = 0.3 + 0.2 * torch.sin(y + t)
        if self.noise_type == "diagonal":
            return base
        if self.noise_type == "additive":
            return (0.5 + 0.2 * torch.sin(2 * t)) * self.weight.expand(len(y), -1, -1)
        matrix = base[..., None] * self.weight
        return matrix[..., :1] if self.noise_type == "scalar" else matrix

    def ours(self):
        return nde.SDE(self.f, self.g, self.noise_type, self.sde_type)


def start():
    return torch.tensor([[0.5, -1.0], [0.2, 0.9], [1.5, 0.1]], dtype=torch.float64)


def interval(sde, dt=0.1):
    channels = {"scalar": 1}.get(sde.noise_type, 2)
    return brownian_interval(0.0, 1.0, (3, channels), dt, seed=4, dtype=torch.float64)


@pytest.mark.parametrize("solver, noise, sense", SHARED)
def test_their_methods_are_theirs(solver, noise, sense):
    sde = Theirs(noise, sense)
    name = THEIRS.get(solver, solver)
    # (0.125: the sum of ten 0.1 is not 1, and torchsde adds an eleventh step.)
    theirs = torchsde.sdeint(sde, start(), torch.tensor([0.0, 1.0]).double(), bm=interval(sde), method=name, dt=0.125)
    ours = nde.solve(sde.ours(), start(), (0.0, 1.0), solver=solver, control=FIXED, dt0=0.125, brownian=interval(sde))
    assert int(ours.stats.accepted[0]) == 8
    torch.testing.assert_close(ours.final, theirs[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver, noise, sense", CASES)
def test_torchsde_runs_ours(solver, noise, sense):
    sde = Theirs(noise, sense)
    kind = solver_class(solver, sense, noise)
    from torchsde._core.base_solver import BaseSDESolver

    assert issubclass(kind, BaseSDESolver) and kind.strong_order == METHODS[solver].orders[noise]
    ours = nde.solve(sde.ours(), start(), (0.0, 1.0), solver=solver, control=FIXED, dt0=0.125, brownian=interval(sde))
    if solver in torchsde.settings.METHODS:  # a method of theirs as one of ours: through the class
        forward = torchsde._core.base_sde.ForwardSDE(sde)
        made = kind(sde=forward, bm=interval(sde), dt=0.125, adaptive=False, rtol=1, atol=1, dt_min=1e-5, options={})
        ts = torch.tensor([0.0, 1.0]).double()
        ys, _ = made.integrate(start(), ts, made.init_extra_solver_state(ts[0], start()))
    else:
        ys = sdeint(sde, start(), [0.0, 1.0], bm=interval(sde), method=solver, dt=0.125)
    torch.testing.assert_close(ys[-1], ours.final, rtol=0, atol=1e-12)
    ys[-1].sum().backward()
    assert float(sde.weight.grad.abs().max()) > 0


def test_torchsde_s_own_adaptive_loop_runs_ours():
    sde = Theirs("diagonal", "ito")
    bm = interval(sde, dt=0.01)
    ys = sdeint(
        sde, start(), torch.linspace(0, 1, 3).double(), bm=bm, method="sosri2", dt=0.1, adaptive=True, rtol=1e-4
    )
    ours = nde.solve(
        sde.ours(), start(), (0.0, 1.0), solver="sosri", control="joint", rtol=0.02, atol=0.02, brownian=bm
    )
    torch.testing.assert_close(ys[-1], ours.final, rtol=0, atol=2e-3)


def test_without_a_brownian_object():
    ys = sdeint(Theirs("diagonal", "ito"), start(), [0.0, 1.0], method="sosri", dt=0.1)
    assert ys.shape == (2, 3, 2) and bool(ys.isfinite().all())
    assert sdeint(Theirs("general", "ito"), start(), [0.0, 1.0], method="euler", dt=0.1).shape == (2, 3, 2)


def test_gradients_with_a_brownian_object():
    """The replay asks it for the same noise again."""
    sde, found = Theirs("diagonal", "ito"), []
    for adjoint in ("checkpointed", "direct"):
        sde.zero_grad()
        solution = nde.solve(
            sde.ours(), start(), (0.0, 1.0), control="joint", adjoint=adjoint, rtol=0.2, atol=0.2,
            brownian=interval(sde),
        )  # fmt: skip
        (solution.final.sum() + solution.error.sum()).backward()
        found.append(sde.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_bad_brownian_objects():
    sde = Theirs("diagonal", "ito")
    with refused(ValueError, "control='joint'", "BrownianTree"):
        nde.solve(sde.ours(), start(), (0.0, 1.0), brownian=interval(sde))
    with refused(ValueError, "brownian", "(3, 2)", "(3, 1)"):
        other = brownian_interval(0.0, 1.0, (3, 1), 0.1, dtype=torch.float64)
        nde.solve(sde.ours(), start(), (0.0, 1.0), control="joint", brownian=other)
    with refused(ValueError, "sosri2", "space-time"):
        plain = torchsde.BrownianInterval(0.0, 1.0, (3, 2), dtype=torch.float64, dt=0.1)
        nde.solve(sde.ours(), start(), (0.0, 1.0), control="joint", brownian=plain)
    with refused(ValueError, "sosri2", "general", "euler_maruyama"):
        sdeint(Theirs("general", "ito"), start(), [0.0, 1.0], method="sosri2", dt=0.1)
