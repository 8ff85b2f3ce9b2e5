"""Compiled solves of SDEs: along the same paths as others, made by few programs; or a warning and a solve as ever."""

import shutil
import warnings

import pytest
import torch
from helpers import CONTROLS, SDE_SOLVERS, close
from torch import nn

import neuralde as nde
import regularizers as reg

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
BATCH, SIZE = 4, 2
FIXED = {per: nde.StepControl(per_sample=per == "per_sample", adaptive=False) for per in CONTROLS}
NOISES = {"diagonal": (SIZE,), "scalar": (SIZE, 1), "additive": (SIZE, 3), "general": (SIZE, 3)}
SUITABLE = [
    (solver, noise, sense)
    for solver in SDE_SOLVERS
    for noise in NOISES
    for sense in ("ito", "stratonovich")
    if nde.solvers.SDE_SOLVERS[solver].suits(nde.SDE(torch.sin, torch.sin, noise, sense))
]


class Net(nn.Module):
    """Drift and diffusion with parameters, time and args."""

    def __init__(self, noise="diagonal"):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.noise, shape = noise, NOISES[noise]
        self.a = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64))

    def f(self, t, z, args):
        return torch.tanh(z @ self.a) * torch.cos(t) - args * z

    def g(self, t, z, args):
        b = self.b * (1.0 + 0.5 * torch.sin(t.reshape(-1, *(1,) * self.b.dim())))
        if self.noise == "diagonal":
            return b * torch.sin(z)
        return b.expand(len(z), -1, -1) if self.noise == "additive" else b * torch.sin(z)[..., None]


NET = Net()  # one for all tests of the programs: they are made once


class Case:
    """A solve, compiled or not, with its loss."""

    def __init__(self, net=NET, sense="ito", batch=BATCH, **how):
        generator = torch.Generator().manual_seed(9)
        self.net, self.sense = net, sense
        self.z0 = torch.randn(batch, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        self.args = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.how = {"solver": "sosri2", "control": "joint", "rtol": 0.1, "atol": 0.1, "t": (0.0, 1.0), "seed": 3} | how
        self.inputs = [self.z0, self.args, *net.parameters()]

    def solve(self, compile, **more):
        equation = nde.SDE(self.net.f, self.net.g, self.net.noise, self.sense)
        return nde.solve(equation, self.z0, args=self.args, compile=compile, **(self.how | more))


def figures(solution):
    found = reg.GlobalError()(solution)
    return found + 1e-2 * reg.GlobalStiffness()(solution) if solution.solver.reports_stiffness else found


PENALTIES = {
    "final": lambda s: 0.0,
    "figures": figures,
    "outputs": lambda s: s.zs.square().sum() + s.steps.z.square().sum(),
}


@pytest.fixture
def compiled_only(silent, monkeypatch):
    """A compiled solve that fails is made as ever, which here would hide what is wrong."""
    made = []
    engine = nde.compiled.SDEEngine
    discover = engine.discover
    monkeypatch.setattr(engine, "discover", lambda *given: made.append(discover(*given)) or made[-1])
    yield
    assert made and None not in made


def agree(case, penalty="final", differentiated=True):
    found = []
    for compile in (True, False):
        with torch.set_grad_enabled(differentiated):
            solution, gradients = case.solve(compile), ()
        if differentiated:
            loss = solution.final.square().sum() + PENALTIES[penalty](solution)
            gradients = torch.autograd.grad(loss, case.inputs)
        found.append((solution, gradients))
    (mine, gradients), (theirs, expected) = found
    close(mine.final, theirs.final, 1e-11)
    for name in ("accepted", "rejected", "nfe"):
        assert torch.equal(getattr(mine.stats, name), getattr(theirs.stats, name))
    for name in ("t", "dt", "z"):
        close(getattr(mine.steps, name).nan_to_num(), getattr(theirs.steps, name).nan_to_num(), 1e-9)
    for x, y in zip(gradients, expected, strict=True):
        close(x, y, 1e-9 * max(1.0, float(y.abs().max())))
    return mine


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_compiled_solve_is_the_same(compiled_only, differentiated):
    """Also with other noise, tolerances, horizons, parameters and numbers of steps, by the same programs."""
    from torch._dynamo.utils import counters

    first = agree(Case(), differentiated=differentiated)
    before, made = first.stats.accepted.clone(), counters["stats"]["unique_graphs"]
    with torch.no_grad():
        NET.a.mul_(1.25)
    second = agree(Case(seed=2**61, rtol=3e-2, atol=5e-2, t=(0.3, 1.7)), differentiated=differentiated)
    with torch.no_grad():
        NET.a.div_(1.25)
    assert not torch.equal(before, second.stats.accepted)
    assert counters["stats"]["unique_graphs"] == made


@COMPILER
@pytest.mark.slow
def test_rejected_and_many_attempts(compiled_only):
    control = nde.StepControl(per_sample=False, safety=1.0, factor_max=10.0, beta1=1.0, beta2=0.0)
    assert int(agree(Case(seed=3, rtol=3e-2, atol=3e-2, control=control)).stats.rejected.max()) > 0
    mine = agree(Case(rtol=1e-3, atol=1e-3, dt_max=0.03, dt_min=1e-4))
    assert int(mine.stats.accepted.max()) > 128  # more than twice what a log holds
    agree(Case(batch=7))


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_controls_and_penalties(compiled_only, control, penalty):
    t = torch.tensor([0.0, 0.3, 0.55, 1.0], dtype=torch.float64) if penalty == "outputs" else (0.0, 1.0)
    mine = agree(Case(control=control, t=t), penalty)
    if control == "per_sample":
        assert len(mine.stats.accepted.unique()) > 1
    agree(Case(control=control, t=t, brownian=nde.BrownianTree(5, "antithetic"), seed=None), penalty)


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(("solver", "noise", "sense"), SUITABLE, ids="-".join)
def test_every_method_and_noise(compiled_only, solver, noise, sense):
    case = Case(Net(noise), sense, solver=solver)
    solved = nde.solvers.for_sde(solver, nde.SDE(case.net.f, case.net.g, noise, sense))
    if solved.adaptive:
        agree(case, "figures")
    agree(Case(case.net, sense, solver=solver, control=FIXED["joint"], dt0=0.07))


@COMPILER
@pytest.mark.slow
def test_single_precision(compiled_only):
    """Times have fewer digits there, and so has the tree."""
    net, z0 = nn.Linear(2, 2), torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    how = {"t": (0.0, 1.0), "solver": "sosri", "rtol": 0.1, "atol": 0.1, "seed": 4, "control": "joint"}
    with torch.no_grad():
        mine, theirs = (nde.solve(nde.SDE(net, lambda z: 0.3 * z), z0, compile=x, **how).final for x in (True, False))
    close(mine, theirs, 1e-4)


@COMPILER
@pytest.mark.slow
def test_many_steps(compiled_only):
    """The mean of the squares along an Ornstein-Uhlenbeck path, of Euler's steps: 0.09 / (2 - dt), at any length."""
    equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.0 * z + 0.3)
    steps, dt = 100_000, 0.0625
    how = {"solver": "euler_maruyama", "control": FIXED["joint"], "dt0": dt, "max_steps": steps, "seed": 1}
    with torch.no_grad():
        solution = nde.solve(equation, torch.zeros(8, 1, dtype=torch.float64), (0.0, steps * dt), compile=True, **how)
    assert int(solution.stats.accepted[0]) == steps
    # Averages over 8 paths of 6250 time units: half a percent of the mean off.
    found = float(solution.steps.z.square().mean())
    assert found == pytest.approx(0.09 / (2 - dt), rel=0.03)


# -- what is not compiled ----------------------------------------------------------------------------------------------


class Callable:
    """Neither a function nor a Module."""

    def __call__(self, t, z):
        return -z


@pytest.mark.parametrize(
    ("cause", "how"),
    [
        ("it has jump_times", {"jump_times": [0.5]}),
        ("only nn.Modules and functions", {"drift": Callable()}),
        ("not a BrownianTree", {"brownian": True}),
        ("checkpoints=k", {"adjoint": nde.adjoints.Checkpointed(3)}),
        ("is not compiled", {"adjoint": "direct"}),
        ("observer", {"observer": object()}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_what_is_not_compiled_says_why_once_and_is_solved(cause, how):
    from neuralde.interop.torchsde import brownian_interval

    drift, z0 = how.get("drift", nn.Linear(2, 2)), torch.ones(3, 2)
    how = {"t": (0.0, 1.0), "control": "joint", "seed": 1} | {k: x for k, x in how.items() if k != "drift"}

    def solve(compile):
        more = {}
        if "brownian" in how:
            more = {"seed": None, "brownian": brownian_interval(0.0, 1.0, size=(3, 2), dt=0.1, seed=1)}
        return nde.solve(nde.SDE(drift, lambda t, z: 0.1 * z), z0, compile=compile, **{**how, **more}).final

    with pytest.warns(UserWarning, match="compile=True has no effect.*" + cause):
        mine = solve(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = solve(True)
    theirs = solve(False)
    assert torch.equal(mine, theirs) and torch.equal(again, theirs)
