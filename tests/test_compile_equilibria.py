"""Compiled iterations for steady states: the same as others; and what can't be compiled is solved all the same."""

import shutil
import warnings

import pytest
import torch
from helpers import CONTROLS, EQUILIBRIUM, close
from torch import nn

import neuralde as nde

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
COMPILED = [name for name in EQUILIBRIUM if nde.solvers.get(name).calls_per_step == 1]
BATCH, SIZE = 6, 4
QUICK = "fixed_point", "per_sample"  # its programs are made in every run of the tests


class Map(nn.Module):
    """z -> tanh(W z + U x) with ‖W‖ = 0.9."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.state, self.input = nn.Linear(SIZE, SIZE).double(), nn.Linear(SIZE, SIZE, bias=False).double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.state.weight.data *= 0.9 / torch.linalg.matrix_norm(self.state.weight.data, 2)

    def forward(self, z, x):
        return torch.tanh(self.state(z) + self.input(x))


def inputs(batch=BATCH):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(batch, SIZE, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def silent():
    """Falling back would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True has no effect")
        yield


def layers(solver, control):
    f = Map()
    how = {
        "solver": solver,
        "control": control,
        "rtol": 1e-12,
        "atol": 1e-12,
        "adjoint": nde.adjoints.Implicit(solver, rtol=1e-12),
    }
    return [nde.DeepEquilibrium(f, compile=compile, **how) for compile in (True, False)]


@COMPILER
@pytest.mark.parametrize(
    ("solver", "control", "batches"),
    [
        pytest.param(*QUICK, (BATCH,), id="quick"),
        *(
            pytest.param(solver, control, (BATCH, 2 * BATCH), marks=pytest.mark.slow, id=f"{solver}-{control}")
            for solver in COMPILED
            for control in CONTROLS
        ),
    ],
)
def test_a_compiled_equilibrium_is_the_same(silent, solver, control, batches):
    """State, gradients, counts; and a sample that is lost beside the others.

    Acceleration makes much of rounding: there the states are the same to the tolerance, and a step more may be needed.
    """
    compiled, eager = layers(solver, control)
    steps = int(solver != "fixed_point")
    for batch in batches:
        x = inputs(batch)
        found = [layer(x) for layer in (compiled, eager)]
        close(*found, 1e-11)
        assert int((compiled.solution.stats.nfe - eager.solution.stats.nfe).abs().max()) <= steps
        assert compiled.solution.converged.all() and compiled.solution.residual.max() <= 1e-12
        wanted = [*compiled.f.parameters(), x]
        gradients = [torch.autograd.grad(z.square().sum(), wanted) for z in found]
        for mine, theirs in zip(*gradients, strict=True):
            close(mine, theirs, 1e-10)
        counts = [layer.solution.backward_stats.nfe for layer in (compiled, eager)]
        assert int((counts[0] - counts[1]).abs().max()) <= steps
    compiled.f.state.weight.data *= 0.5
    close(compiled(x), eager(x), 1e-11)
    if control == "per_sample":
        x = inputs().detach()
        x[2] = float("nan")
        with pytest.warns(nde.errors.SolveWarning):
            found = [layer(x) for layer in (compiled, eager)]
        assert torch.equal(compiled.solution.status, eager.solution.status)
        close(*(z[[0, 1, 3, 4, 5]] for z in found), 1e-11)


@COMPILER
def test_how_a_compiled_solve_may_begin(silent):
    """At rest, lost, or cut short: all of them in one program."""
    equation = nde.SteadyState(Map())
    how = {"solver": "fixed_point", "rtol": 1e-12, "atol": 1e-12, "on_failure": "ignore", "adjoint": "jfb"}

    def solved(x, z0, compile, **more):
        return nde.solve(equation, z0, args=x, compile=compile, **how, **more)

    x = inputs().detach()
    rest = solved(x, torch.zeros_like(x), False).final.detach()
    lost = x.clone()
    lost[1] = float("nan")
    some = torch.where(torch.arange(BATCH)[:, None] < 3, rest, 0.0)
    cases = [(x, rest, {}), (x, some, {}), (lost, some, {}), (lost * float("nan"), some, {})]
    cases += [(x, torch.zeros_like(x), {"max_steps": n}) for n in (1, 2, 33, 40)]
    for given, start, more in cases:
        mine, theirs = (solved(given, start, compile, **more) for compile in (True, False))
        for name in ("status", "depth", "residual", "final", "ts", "zs"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(theirs, name), rtol=1e-9, atol=1e-12, equal_nan=True, msg=f"{name}, {more}"
            )
        assert torch.equal(mine.stats.nfe, theirs.stats.nfe)
        assert mine.stats.function_calls == theirs.stats.function_calls
        torch.testing.assert_close(mine._problem.rest.before, theirs._problem.rest.before, equal_nan=True)


@COMPILER
@pytest.mark.slow
def test_a_number_that_changes_is_compiled_anew(silent):
    class Scaled(Map):
        scale = 0.9

        def forward(self, z, x):
            return self.scale * super().forward(z, x)

    f = Scaled()
    compiled, eager = (nde.DeepEquilibrium(f, solver="fixed_point", compile=compile) for compile in (True, False))
    for scale in (0.9, 0.8, 0.7, 0.8):
        f.scale = scale
        close(compiled(inputs()), eager(inputs()), 1e-12)


@COMPILER
@pytest.mark.slow
def test_loops_that_may_overwrite_nothing_do_the_same(silent, monkeypatch):
    """Those of torch's older versions: what an iteration remembers goes through them."""
    monkeypatch.setattr("neuralde.compiled.programs.may_overwrite", lambda: False)
    compiled, eager = layers("anderson", "per_sample")
    x = inputs()
    found = [layer(x) for layer in (compiled, eager)]
    close(*found, 1e-11)
    wanted = [*compiled.f.parameters(), x]
    for mine, theirs in zip(*(torch.autograd.grad(z.square().sum(), wanted) for z in found), strict=True):
        close(mine, theirs, 1e-10)


@COMPILER
@pytest.mark.slow
def test_compiled_steps_are_kept_as_others(silent):
    f, x = Map(), inputs()
    how = {"args": x, "solver": "anderson", "dense": True, "rtol": 1e-12, "atol": 1e-12}
    mine, theirs = (
        nde.solve(nde.SteadyState(f), torch.zeros_like(x), compile=compile, **how) for compile in (True, False)
    )
    assert int(mine.depth.max()) > 1 and mine.stats.function_calls == theirs.stats.function_calls
    # With more differences than components, rounding decides between combinations.
    close(mine.steps.z[:SIZE], theirs.steps.z[:SIZE], 1e-10)
    close(mine.final, theirs.final, 1e-11)
    close(mine.steps.residual[:3], theirs.steps.residual[:3], 1e-8)


def test_compile_reaches_the_layer():
    model = nn.Sequential(nn.Linear(2, 2), nde.DeepEquilibrium(nn.Identity(), solver="anderson"))
    assert nde.compile(model)[1].solve_options["compile"] is True


@pytest.mark.parametrize(
    ("cause", "how"),
    [
        ("solver 'rodas5p' is no explicit Runge-Kutta method", {"solver": "rodas5p"}),
        ("solver 'euler' is no explicit Runge-Kutta method", {"solver": "euler", "dt0": 0.5}),
        ("it has a horizon", {"solver": "tsit5", "t": 500.0, "f": lambda z: 0.4 * z.cos()}),
        ("it has dt_min", {"solver": "tsit5", "dt_min": 1e-9}),
        ("more than once per step", {"solver": "newton"}),
        ("more than once per step", {"solver": nde.solvers.Broyden(line_search=True)}),
        ("it has a horizon", {"solver": "anderson", "t": 500.0}),
        ("observer", {"solver": "anderson", "observer": object()}),
        ("adjoint='direct'", {"solver": "fixed_point", "adjoint": "direct"}),
        ("random numbers", {"solver": "anderson", "f": lambda z: 0.5 * z + 0.0 * torch.rand(())}),
    ],
)
def test_what_is_not_compiled_says_why_and_is_solved(cause, how):
    how = dict(how)
    f, z0 = how.pop("f", lambda z: 0.5 * z.cos()), torch.zeros(3, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="compile=True has no effect.*" + cause):
        mine = nde.solve(nde.SteadyState(f), z0, compile=True, **how)
    theirs = nde.solve(nde.SteadyState(f), z0, **how)
    assert torch.equal(mine.final, theirs.final)


def test_a_map_that_is_no_module_or_function_is_named():
    with pytest.warns(UserWarning, match="f is a builtin_function_or_method"):
        nde.solve(nde.SteadyState(torch.cos), torch.zeros(3, 2), solver="anderson", compile=True)
