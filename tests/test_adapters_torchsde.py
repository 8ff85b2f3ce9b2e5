"""torchsde's functions from `regularizers.torchsde`: its results to the bit, and what a penalty takes of them."""

# ruff: noqa: NPY002  (torchsde draws its seeds from numpy's global generator)

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
import torchsde
from adapters import check_gradient, raises_the_same
from helpers import close, refused
from torch import nn

import regularizers as reg
from regularizers import torchsde as adapter

FUNCTIONS = ["sdeint", "sdeint_adjoint"]
FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)
SAMPLING = pytest.mark.parametrize("sampling", ["unbiased", "biased"])
# (sde_type, noise_type, method); None is torchsde's choice.
CASES = [
    ("ito", "diagonal", None),
    ("ito", "diagonal", "euler"),
    ("ito", "diagonal", "milstein"),
    ("ito", "additive", "srk"),
    ("ito", "scalar", "milstein"),
    ("ito", "general", "euler"),
    ("stratonovich", "diagonal", "midpoint"),
    ("stratonovich", "diagonal", "euler_heun"),
    ("stratonovich", "scalar", "heun"),
    ("stratonovich", "general", "log_ode"),
]
CASE = pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
TS = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _times():
    """The same sampled times in every run, whatever ran before."""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


class SDE(nn.Module):
    """Drift and diffusion of any noise type, and a count of their evaluations."""

    def __init__(self, sde_type="ito", noise_type="diagonal", d=3, m=2):
        super().__init__()
        torch.manual_seed(0)
        self.sde_type, self.noise_type, self.d = sde_type, noise_type, d
        self.m = {"diagonal": 1, "scalar": 1}.get(noise_type, m)
        self.drift, self.noise = nn.Linear(d, d).double(), nn.Linear(d, d * self.m).double()
        self.calls = 0

    def f(self, t, y):
        self.calls += 1
        return torch.tanh(self.drift(y)) * torch.cos(t)

    def g(self, t, y):
        self.calls += 1
        y = torch.zeros_like(y) if self.noise_type == "additive" else y
        g = 0.3 * torch.sigmoid(self.noise(y)) * (1 + t)
        return g if self.noise_type == "diagonal" else g.reshape(len(y), self.d, self.m)

    def h(self, t, y):
        return -y

    def drifting(self, t, y):
        return 0.5 * self.f(t, y)


def start():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solved(module, function, sde, ts=TS, **how):
    """(outputs, gradients, the next random numbers of torch and numpy) by a function of torchsde or of the adapter."""
    np.random.seed(1)
    torch.manual_seed(2)
    sde.calls = 0
    out = getattr(module, function)(sde, start(), ts, **{"dt": 0.1, **how})
    out = out if isinstance(out, tuple) else (out,)
    loss = sum(x[-1].square().sum() for x in out if isinstance(x, torch.Tensor))
    gradients = torch.autograd.grad(loss, list(sde.parameters()))
    return [*out, *gradients, torch.rand(2), torch.tensor(np.random.rand(2))]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor)
    )


@FUNCTION
@CASE
def test_bit_for_bit(case, function):
    kind, noise, method = case
    sde = SDE(kind, noise)
    theirs, calls = solved(torchsde, function, sde, method=method), sde.calls
    ours = solved(adapter, function, sde, method=method)
    assert same(ours, theirs)
    # How many components the noise has is asked of g, once, where its type does not tell.
    assert sde.calls == calls + (noise in ("general", "additive"))
    solution = getattr(adapter, function).solution
    place = solution.place("unbiased")
    times = torch.cat([TS, place.t[None]]).unique()
    with torch.no_grad():  # the same path, asked for the same steps
        np.random.seed(1)
        torch.manual_seed(2)
        expected = torchsde.sdeint(sde, start(), times, dt=0.1, method=method)[times == place.t][0]
    close(place.state(False), expected, 1e-12)
    for sampling in ("unbiased", "biased"):
        assert 0 < float(solution.place(sampling).dt) <= 0.1 + 1e-12
        gradient = torch.autograd.grad(reg.LocalError(sampling)(solution), list(sde.drift.parameters()))
        assert all(bool(g.isfinite().all()) for g in gradient) and bool(gradient[0].abs().sum() > 0)


@FUNCTION
@pytest.mark.parametrize(
    "how",
    [
        {"adaptive": True, "rtol": 1e-2, "atol": 1e-2},
        {"logqp": True, "method": "euler"},
        {"extra": True, "method": "euler"},
        {"bm": "given", "method": "milstein", "options": {"grad_free": True}},
        {"names": {"drift": "drifting"}, "method": "euler"},
    ],
    ids=["adaptive", "logqp", "extra", "bm", "names"],
)
def test_arguments(how, function):
    sde = SDE()

    def arguments():
        if how.get("bm") is None:
            return how
        return how | {"bm": torchsde.BrownianInterval(0.0, 1.0, size=(5, 3), dtype=torch.float64, entropy=4)}

    theirs, calls = solved(torchsde, function, sde, **arguments()), sde.calls
    assert same(solved(adapter, function, sde, **arguments()), theirs) and sde.calls == calls
    solution = getattr(adapter, function).solution
    for sampling in ("unbiased", "biased"):
        assert 0 <= float(solution.place(sampling).t) <= 1 and bool(reg.LocalError(sampling)(solution) > 0)


@pytest.mark.filterwarnings("ignore:Numerical solution is not guaranteed")
def test_adaptive_steps_are_theirs():
    """The accepted steps follow each other, and their error by the path that was taken is at most 1."""
    sde, how = SDE(), {"adaptive": True, "rtol": 1e-3, "atol": 1e-3, "dt": 0.5, "method": "euler"}
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(5, 3), dtype=torch.float64, entropy=4)
    with reg.record() as solutions:
        for _ in range(12):
            adapter.sdeint(sde, start(), TS, bm=bm, **how)
    steps = sorted({(float(p.t), float(p.dt)) for p in (s.place("biased") for s in solutions)})
    around = {(float(s.place("unbiased").t), float(s.place("unbiased").dt)) for s in solutions}
    assert len(steps) > 4 and any(dt < 0.5 for _, dt in steps)
    # No two accepted steps overlap.
    assert all(t + dt <= later + 1e-9 for (t, dt), (later, _) in itertools.pairwise(steps))
    assert {round(dt, 9) for _, dt in around} & {round(dt, 9) for _, dt in steps}


@SAMPLING
@FUNCTION
@pytest.mark.parametrize("method", ["euler", "srk"])
def test_gradients_against_finite_differences(method, function, sampling):
    sde = SDE()
    solved(adapter, function, sde, method=method)
    solution, penalty = getattr(adapter, function).solution, reg.LocalError(sampling)
    check_gradient(penalty, solution, list(sde.parameters()))


def test_gradients_through_the_state():
    sde, y0 = SDE(), start().requires_grad_()
    adapter.sdeint(sde, y0, TS, dt=0.1, method="euler")
    solution = adapter.sdeint.solution
    whole = reg.LocalError(through_state=True)(solution)
    assert bool(torch.autograd.grad(whole, y0)[0].abs().sum() > 0)
    assert torch.autograd.grad(reg.LocalError()(solution), y0, allow_unused=True)[0] is None
    adapter.sdeint_adjoint(sde, y0, TS, dt=0.1, method="euler")
    with refused(ValueError, "through_state=True", "sdeint_adjoint"):
        reg.LocalError(through_state=True)(adapter.sdeint_adjoint.solution)


@FUNCTION
def test_samples_that_are_not_finite_have_no_part(function):
    """The values are those where a finite sample stands in place of the one that failed, without its part."""
    sde, solve = SDE(), getattr(adapter, function)
    penalties = [reg.LocalError(), reg.LocalError("biased"), reg.LocalStiffness()]
    y0 = start()
    y0[2] = torch.nan
    with reg.record(torch.Generator().manual_seed(2)):
        solve(sde, y0, TS, method="euler", dt=0.1)
    for penalty in penalties:
        value = penalty(solve.solution)
        g = torch.autograd.grad(value, list(sde.drift.parameters()))
        assert float(value.detach()) > 0 and all(bool(x.isfinite().all()) for x in g) and bool(g[0].any())
    solve(sde, torch.full_like(y0, torch.nan), TS, method="euler", dt=0.1)
    assert [float(penalty(solve.solution)) for penalty in penalties] == [0.0] * 3


def test_what_a_black_box_cannot_give():
    sde = SDE("stratonovich")
    solved(adapter, "sdeint", sde, method="heun")
    with refused(ValueError, "stiffness", "midpoint", "LocalError"):
        reg.LocalStiffness()(adapter.sdeint.solution)
    with refused(TypeError, "GlobalError", "LocalError"):
        reg.GlobalError()(adapter.sdeint.solution)
    with refused(ValueError, "tsit5", "Stratonovich", "midpoint"):
        reg.LocalError(solver="tsit5")(adapter.sdeint.solution)
    solved(adapter, "sdeint", sde, method="reversible_heun")
    with refused(ValueError, "reversible_heun", "midpoint"):
        reg.LocalError()(adapter.sdeint.solution)


@pytest.mark.parametrize("noise", ["diagonal", "additive"])
def test_a_step_by_a_solver_of_ours(noise):
    sde = SDE(noise_type=noise)
    solved(adapter, "sdeint", sde, method="euler")
    solution = adapter.sdeint.solution
    for penalty in (reg.LocalStiffness(), reg.LocalError(solver="sosra2" if noise == "additive" else "sosri")):
        assert penalty.look(solution).solver.name.startswith("sos")
        gradient = torch.autograd.grad(penalty(solution), list(sde.drift.parameters()))
        assert all(bool(g.isfinite().all()) for g in gradient) and bool(gradient[0].any())
        assert torch.equal(penalty(solution), penalty(solution))


@FUNCTION
def test_in_programs(function):
    ours, sde = getattr(adapter, function), SDE()
    assert inspect.signature(ours) == inspect.signature(getattr(torchsde, function))
    assert pickle.loads(pickle.dumps(ours)) is ours is copy.deepcopy(ours)
    with torch.no_grad():
        ours(sde, start(), TS, dt=0.1, method="euler")
    assert float(reg.LocalError()(ours.solution)) == 0.0
    sde.eval()
    with reg.record() as solutions:
        ours(sde, start(), [0.0, 1.0], dt=0.1, method="euler")
        ours(sde.train(), start(), [0.0, 1.0], dt=0.1, method="euler")
    assert float(reg.LocalError()(solutions[0])) == 0.0 and bool(reg.LocalError()(solutions[1]) > 0)


@FUNCTION
def test_torchsde_speaks_where_something_is_wrong(function):
    ours, theirs, sde, y0 = getattr(adapter, function), getattr(torchsde, function), SDE(), start()

    class Plain:
        sde_type, noise_type, f, g = sde.sde_type, sde.noise_type, staticmethod(sde.f), staticmethod(sde.g)

    class Bare(nn.Module):
        sde_type, noise_type = "ito", "diagonal"

    unknown = SDE()
    unknown.noise_type = "nonsense"
    for args, how in (
        ((Plain(), y0, TS), {} if function == "sdeint_adjoint" else {"method": "heun"}),
        ((Bare(), y0, TS), {}),
        ((nn.Linear(3, 3), y0, TS), {}),
        ((unknown, y0, TS), {}),
        ((sde, y0[0], TS), {}),
        ((sde, [y0], TS), {}),
        ((sde, y0, TS.flip(0)), {}),
        ((sde, y0, "now"), {}),
        ((sde, y0, TS), {"method": "nonsense"}),
        ((sde, y0, TS), {"dt": torch.tensor(0.1, requires_grad=True)}),
        ((sde, y0, TS), {"names": {"drift": "nonsense"}}),
        ((sde, y0, TS), {"bm": torchsde.BrownianInterval(0.0, 1.0, size=(5, 2), dtype=torch.float64)}),
    ):
        raises_the_same(ours, theirs, *args, **how)
    # What they allow.
    how = {"adjoint_params": ()} if function == "sdeint_adjoint" else {}
    ours(Plain(), y0, TS, **how)
    assert bool(reg.LocalError()(ours.solution) > 0)
