"""torchdiffeq's functions from `regularizers.torchdiffeq`: its results to the bit, and what a penalty takes of them."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import random

import pytest
import torch
import torchdiffeq
from adapters import (
    ADAMS,
    ADAPTIVE,
    FIXED,
    FUNCTIONS,
    LOOSE,
    METHODS,
    TIMES,
    Net,
    check_gradient,
    gradients,
    raises_the_same,
    solved,
    start,
)
from helpers import close, refused
from scipy import stats
from torch import nn

import neuralde as nde
import regularizers as reg
from neuralde.interop import torchdiffeq as interop
from regularizers import torchdiffeq as adapter
from regularizers.recorded import Passing

FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)
SAMPLING = pytest.mark.parametrize("sampling", ["unbiased", "biased"])

pytestmark = pytest.mark.filterwarnings("ignore:Functional iteration did not converge")


@pytest.fixture(autouse=True)
def _times():
    """The same sampled times in every run, whatever ran before."""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


# -- nothing changes ---------------------------------------------------------------------------------------------------


@FUNCTION
@pytest.mark.parametrize("direction", TIMES)
@pytest.mark.parametrize("method", METHODS)
def test_bit_for_bit(function, method, direction):
    f, t = Net(), TIMES[direction]
    theirs, calls = solved(torchdiffeq, function, f, t, method=method)
    ours, calls_here = solved(adapter, function, f, t, method=method)
    assert torch.equal(ours, theirs) and calls_here == calls
    place = getattr(adapter, function).solution.place("unbiased")
    grid = {"grid_constructor": lambda f, y, _: t} if method in (*FIXED, *ADAMS) else None
    with torch.no_grad():
        times = torch.stack([t[0], place.t, t[-1]])
        expected = torchdiffeq.odeint(f, start(), times, method=method, options=grid, **LOOSE)[1]
    # A step made once more starts with f's slope, where these two have that of a stage before; SciPy's goes on from an
    # output. Both within the tolerance.
    loose = method in ("fehlberg2", "adaptive_heun", "scipy_solver")
    close(place.state(False), expected, 1e-3 if loose else 1e-12)
    assert place.dt is None if method == "scipy_solver" else float(place.dt) * float(t[-1] - t[0]) > 0
    if theirs.requires_grad:
        for a, b in zip(gradients(ours, f), gradients(theirs, f), strict=True):
            assert torch.equal(a, b)


@FUNCTION
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {"first_step": 0.02, "jump_t": torch.tensor([0.5]), "norm": lambda y: y.abs().max()}),
        ("rk4", {"step_size": 0.07}),
        ("rk4", {"step_size": 0.07, "interp": "cubic"}),
        ("midpoint", {"grid_constructor": lambda f, y, t: torch.linspace(0, 1, len(t) + 4, dtype=t.dtype)}),
        ("heun3", {"perturb": True}),
    ],
    ids=["adaptive", "step_size", "cubic", "grid", "perturb"],
)
def test_options(function, method, options):
    # The adjoint's norm is a function of more than the state.
    more = {"adjoint_options": {}} if function == "odeint_adjoint" else {}
    f, how = Net(), {"method": method, "options": options, **more}
    theirs, calls = solved(torchdiffeq, function, f, **how)
    ours, calls_here = solved(adapter, function, f, **how)
    assert torch.equal(ours, theirs) and calls_here == calls
    for a, b in zip(gradients(ours, f), gradients(theirs, f), strict=True):
        assert torch.equal(a, b)
    solution = getattr(adapter, function).solution
    at = solution.place("unbiased").t
    # The grid must not depend on the output times that the check asks for.
    t = TIMES["forwards"]
    grid = options.get("grid_constructor")
    if not interop.SOLVERS[method].adaptive and "step_size" not in options:
        options = options | {"grid_constructor": lambda f, y, _: t if grid is None else grid(f, y, t)}
    times = torch.cat([t, at[None]]).unique()
    expected = torchdiffeq.odeint(f, start(), times, method=method, options=options, **LOOSE)[times == at][0]
    close(solution.place("unbiased").state(False), expected, 1e-12)
    assert bool(reg.LocalError()(solution) > 0)


@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_times_and_start(method, function):
    f, found = Net(), []
    for module in (torchdiffeq, adapter):
        t, y0 = TIMES["forwards"].clone().requires_grad_(), start().requires_grad_()
        y = getattr(module, function)(f, y0, t, method=method, **LOOSE)
        found.append(torch.autograd.grad(y.square().sum(), [t, y0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_on_a_gpu(method, function):
    f, t, y0 = Net().cuda(), TIMES["forwards"].cuda(), start().cuda()
    theirs, _ = solved(torchdiffeq, function, f, t, y0, method=method)
    ours, _ = solved(adapter, function, f, t, y0, method=method)
    value = reg.LocalError()(getattr(adapter, function).solution)
    assert torch.equal(ours, theirs) and value.is_cuda and bool(value > 0)


def test_signatures_copies_and_random_numbers():
    for name in (*FUNCTIONS, "odeint_event"):
        ours, theirs = (inspect.signature(getattr(module, name)) for module in (adapter, torchdiffeq))
        assert list(ours.parameters) == list(theirs.parameters)
    assert pickle.loads(pickle.dumps(adapter.odeint)) is adapter.odeint is copy.deepcopy(adapter.odeint)
    torch.manual_seed(3)
    random.seed(3)
    f, states = Net(), (torch.get_rng_state(), random.getstate())
    torch.set_rng_state(states[0])
    for function in FUNCTIONS:
        solved(adapter, function, f)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert pickle.loads(pickle.dumps(adapter.odeint.solution)) is None
    assert copy.deepcopy(adapter.odeint.solution) is None


@FUNCTION
def test_torchdiffeq_speaks_where_something_is_wrong(function):
    ours, theirs = getattr(adapter, function), getattr(torchdiffeq, function)
    f, y0, t = Net(), start(), TIMES["forwards"]
    for args, how in (
        ((f, y0, t), {"method": "nonsense"}),
        ((f, [y0], t), {}),
        ((f, y0, [0.0, 1.0]), {}),
        ((f, y0, torch.tensor([0, 1])), {}),
        ((f, y0, torch.tensor([0.0, 0.0], dtype=torch.float64)), {}),
        ((f, y0, t.flip(0)[[1, 0, 2]]), {}),
        ((lambda t, y: f(t, y), y0, t), {} if function == "odeint_adjoint" else {"method": 3}),
    ):
        raises_the_same(ours, theirs, *args, **how)
        with refused(TypeError, "no solve was recorded: is regularizers' odeint"):
            reg.LocalError()(ours.solution)


def test_their_callbacks_are_called():
    def observed(f):
        seen = []
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            setattr(f, name, lambda t, y, dt, name=name: seen.append((name, float(t), float(dt))))
        return seen

    one, other = Net(), Net()
    theirs, ours = observed(one), observed(other)
    solved(torchdiffeq, "odeint", one)
    solved(adapter, "odeint", other)
    before = len(ours)
    reg.LocalError("biased")(adapter.odeint.solution).backward()
    assert ours == theirs and len(ours) == before > 0


# -- what a penalty takes ----------------------------------------------------------------------------------------------


@FUNCTION
@pytest.mark.parametrize("method", ADAPTIVE)
def test_biased_is_a_step_of_theirs(function, method):
    f = Net()
    accepted = []
    f.callback_accept_step = lambda t, y, dt: accepted.append((float(t), float(dt)))
    solved(adapter, function, f, method=method)
    place = getattr(adapter, function).solution.place("biased")
    assert (float(place.t), float(place.dt)) in [(t, min(dt, 1.0 - t)) for t, dt in accepted]
    # What their controller compared with 1.
    penalty = reg.LocalError("biased")
    ratio = float(penalty.look(getattr(adapter, function).solution).error)
    assert 0 < ratio <= 1 + 1e-9


@SAMPLING
@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "midpoint", "rk4", "implicit_adams"])
def test_gradients_against_finite_differences(method, function, sampling):
    f = Net()
    solved(adapter, function, f, method=method)
    # A first step, and what is left of the horizon at its end, may be so short that their errors are rounding.
    while not 0.0 < float(getattr(adapter, function).solution.place(sampling).t) < 0.9:
        solved(adapter, function, f, method=method)
    solution = getattr(adapter, function).solution
    for penalty in (reg.LocalError(sampling, scaled=False), reg.LocalStiffness(sampling)):
        check_gradient(penalty, solution, list(f.parameters()))


def test_gradients_through_the_state():
    f, y0 = Net(), start().requires_grad_()
    adapter.odeint(f, y0, TIMES["forwards"], **LOOSE)
    solution = adapter.odeint.solution
    for sampling in ("unbiased", "biased"):
        at, there = solution.place(sampling).t, solution.place(sampling).state(True)
        (g,) = torch.autograd.grad(there.sum(), y0, retain_graph=True, allow_unused=at == 0)
        assert g is not None and bool(g.abs().sum() > 0)
        cut = reg.LocalError(sampling)
        assert torch.autograd.grad(cut(solution), y0, allow_unused=True)[0] is None
        whole = reg.LocalError(sampling, through_state=True)
        assert bool(torch.autograd.grad(whole(solution), y0, retain_graph=True)[0].abs().sum() > 0)
        assert float(whole(solution)) == float(cut(solution))
    adapter.odeint_adjoint(f, y0, TIMES["forwards"], **LOOSE)
    with refused(ValueError, "through_state=True", "odeint_adjoint", "odeint"):
        reg.LocalError(through_state=True)(adapter.odeint_adjoint.solution)


def test_a_sampled_state_keeps_no_other_output():
    y0, t = start(), torch.linspace(0.0, 1.0, 50, dtype=torch.float64)
    adapter.odeint(Net(), y0, t, **LOOSE)
    for sampling in ("unbiased", "biased"):
        for through in (True, False):
            state = adapter.odeint.solution.place(sampling).state(through)
            assert state.untyped_storage().nbytes() == y0.untyped_storage().nbytes()


def test_unbiased_times_are_uniform_and_biased_ones_uniform_over_steps():
    weight = torch.tensor(3.0, requires_grad=True)
    with reg.record() as solutions:
        for _ in range(300):
            adapter.odeint(lambda t, y: weight * y, torch.ones(1), torch.tensor([0.0, 0.5, 1.0]), method="euler")
    uniform = [float(s.place("unbiased").t) for s in solutions]
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    counts = [sum(float(s.place("biased").t) == one for s in solutions) for one in (0.0, 0.5)]
    assert sum(counts) == 300 and stats.chisquare(counts).pvalue > 1e-3


def test_a_step_drawn_uniformly():
    drawn, counts = random.Random(0), [0] * 7
    for _ in range(3000):
        passing = Passing(drawn, 1, 2.5)
        for j in range(7):
            passing.add(float(j), j, 1.0)
        counts[passing.uniform[1]] += 1
        assert passing.around[1] == 2
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_step_drawn_by_its_length():
    ends, drawn = [0.0, 0.5, 0.6, 1.4], random.Random(0)
    found = []
    for _ in range(2000):
        passing = Passing(drawn, -1, None)
        for a, b in itertools.pairwise(ends):
            passing.add(-a, None, b - a)
        found.append(-passing.ended(-1.0))  # the last step goes beyond the end
        assert passing.around[0] <= 0
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_recordings_draw_alike_from_alike_generators():
    times = []
    for _ in range(2):
        with reg.record(torch.Generator().manual_seed(7)) as solutions:
            for _ in range(3):
                solved(adapter, "odeint", Net())
        times.append([float(s.place("unbiased").t) for s in solutions])
    assert times[0] == times[1] and len(set(times[0])) == 3


def test_what_a_black_box_cannot_give():
    f = Net()
    solved(adapter, "odeint", f)
    for penalty in (reg.GlobalError(), reg.GlobalStiffness()):
        with refused(TypeError, type(penalty).__name__, "LocalError", "LocalStiffness", "neuralde.solve") as caught:
            penalty(adapter.odeint.solution)
        assert "attach" not in str(caught.value), "which is for torchdyn"
    with refused(ValueError, "record(generator=...)"):
        reg.LocalError(generator=torch.Generator())(adapter.odeint.solution)
    solved(adapter, "odeint", f, method="scipy_solver")
    with refused(ValueError, "biased", "SciPy"):
        reg.LocalError("biased")(adapter.odeint.solution)


@FUNCTION
@pytest.mark.parametrize("tupled", [False, True])
@pytest.mark.parametrize("fails", ["at once", "later"])
def test_samples_that_are_not_finite_have_no_part(function, tupled, fails):
    """The value and its gradient are those of the others alone; of none they are 0."""
    f, solve = Net(), getattr(adapter, function)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def one(self, t, y):
            return self.f(t, y) / torch.where(t < 0.3, 1.0, (y[:, :1].abs() < 1e3).double())

        def forward(self, t, y):
            return tuple(self.one(t, x) for x in y) if tupled else self.one(t, y)

    def made(y0):
        with reg.record(torch.Generator().manual_seed(3)):  # away from the end, where the step is short
            solve(Field(), (y0, 2 * y0) if tupled else y0, TIMES["forwards"], method="rk4", **LOOSE)
        found = []
        for penalty in (reg.LocalError(), reg.LocalError("biased", scaled=False), reg.LocalStiffness()):
            value = penalty(solve.solution)
            found.append((value, gradients([value.sqrt()], f) if value.requires_grad else None))
        return found

    y0, bad = start(), float("nan") if fails == "at once" else 1e6
    some = y0.clone()
    some[[1, 3]] = bad
    for (ours, g), (alone, g_alone) in zip(made(some), made(y0[[0, 2, 4]]), strict=True):
        close(ours, alone, 1e-12)
        assert float(ours.detach()) > 0
        for a, b in zip(g, g_alone, strict=True):
            close(a, b, 1e-10)
    assert all(float(value) == 0.0 for value, _ in made(torch.full_like(y0, bad)))
    with refused(nde.NonFiniteState, function, "no sample"):
        solve.solution.probe("unbiased")


def test_ones_own():
    class Doubled(reg.Regularizer):
        def figure(self, solution):
            return 2 * reg.LocalStiffness().look(solution).stiffness

    solved(adapter, "odeint", Net())
    with refused(TypeError, "Doubled needs a solve of neuralde's", "torchdiffeq.odeint", "local = True"):
        Doubled()(adapter.odeint.solution)
    Doubled.local = True
    close(Doubled()(adapter.odeint.solution), 2 * reg.LocalStiffness()(adapter.odeint.solution), 1e-14)


def test_sums_of_penalties():
    f = Net()
    solved(adapter, "odeint", f)
    solution, one, other = adapter.odeint.solution, reg.LocalError("biased"), reg.LocalStiffness()
    close((one + 0.5 * other)(solution), one(solution) + 0.5 * other(solution), 1e-14)
    assert torch.equal(one.sample(solution), solution.place("biased").t[None])
    both, t = reg.Steer() + other, TIMES["forwards"]
    adapter.odeint(f, start(), both.parts[0].sample(t), **LOOSE)
    close(both(adapter.odeint.solution), other(adapter.odeint.solution), 1e-14)


def test_another_solver_for_the_step():
    f = Net()
    solved(adapter, "odeint", f, method="rk4", options={"step_size": 0.05})
    solution = adapter.odeint.solution
    assert solution.probe("biased").solver.name == "rk4_38"
    # It has no error estimate, so that tsit5 steps in.
    assert reg.LocalError("biased").look(solution).solver.name == "tsit5"
    assert reg.LocalError("biased", solver="bs3").look(solution).solver.name == "bs3"
