"""torchdiffeq's functions from `regularizers.torchdiffeq`: its results to the bit, and what a penalty takes of them."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torchdiffeq
from helpers import close, refused
from scipy import stats
from torch import nn

import neuralde as nde
import regularizers as reg
from neuralde.interop import torchdiffeq as interop
from regularizers import torchdiffeq as adapter
from regularizers.recorded import Passing

FUNCTIONS = ["odeint", "odeint_adjoint"]
ADAPTIVE = [name for name, solver in interop.SOLVERS.items() if solver.adaptive and name != "tsit5"]
FIXED = [name for name, solver in interop.SOLVERS.items() if not solver.adaptive]
ADAMS = ["explicit_adams", "implicit_adams"]
METHODS = [*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver"]
TIMES = {
    "forwards": torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64),
    "backwards": torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64),
}
FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)
SAMPLING = pytest.mark.parametrize("sampling", ["unbiased", "biased"])
LOOSE = {"rtol": 1e-3, "atol": 1e-4}

pytestmark = pytest.mark.filterwarnings("ignore:Functional iteration did not converge")


@pytest.fixture(autouse=True)
def _times():
    """The same sampled times in every run, whatever ran before."""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


class Net(nn.Module):
    """A vector field with something to regularize, and a count of its evaluations."""

    def __init__(self, d=3, gain=1.5):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(d, 12), nn.Tanh(), nn.Linear(12, d)).double()
        with torch.no_grad():
            for p in self.net.parameters():
                p *= gain
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return 4 * self.net(y) * torch.cos(3 * t)


def start(d=3):
    return torch.randn(5, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(y, f):
    return torch.autograd.grad(y[-1].square().sum(), list(f.parameters()))


def solved(module, function, f, t=TIMES["forwards"], y0=None, **how):
    """(the result, the calls of f) by a function of torchdiffeq or of the adapter."""
    f.calls = 0
    y = getattr(module, function)(f, start() if y0 is None else y0, t, **LOOSE | how)
    return y, f.calls


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
        with pytest.raises(Exception) as expected:
            theirs(*args, **how)
        with pytest.raises(type(expected.value)) as found:
            ours(*args, **how)
        assert str(found.value) == str(expected.value)
        assert ours.solution is None


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
    assert (float(place.t), float(place.dt)) in accepted
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
    while float(getattr(adapter, function).solution.place("biased").t) == 0.0:  # whose error may be rounding
        solved(adapter, function, f, method=method)
    solution = getattr(adapter, function).solution
    direction = [torch.randn_like(p) for p in f.parameters()]
    for penalty in (reg.LocalError(sampling, scaled=False), reg.LocalStiffness(sampling)):
        slopes = torch.autograd.grad(penalty(solution), list(f.parameters()), allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True) if g is not None)

        def moved(by, penalty=penalty):
            with torch.no_grad():
                for p, d in zip(f.parameters(), direction, strict=True):
                    p += by * d
            value = penalty(solution).detach()
            with torch.no_grad():
                for p, d in zip(f.parameters(), direction, strict=True):
                    p -= by * d
            return value

        step = 1e-4
        expected = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
        assert float(slope.abs()) > 0
        close(slope, expected, 1e-6)


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


# -- in programs -------------------------------------------------------------------------------------------------------


@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tuples(function, method):
    f = Net()

    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def forward(self, t, y):
            return self.f(t, y[0]), y[1] * t + y[0].square().sum(dim=1, keepdim=True)

    y0, t = (start(), torch.zeros(5, 1, dtype=torch.float64)), TIMES["forwards"]
    theirs = getattr(torchdiffeq, function)(Augmented(), y0, t, method=method, **LOOSE)
    ours = getattr(adapter, function)(Augmented(), y0, t, method=method, **LOOSE)
    assert isinstance(ours, tuple) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(gradients(ours[1], f), gradients(theirs[1], f), strict=True):
        assert torch.equal(a, b)
    for sampling in ("unbiased", "biased"):
        value = reg.LocalError(sampling)(getattr(adapter, function).solution)
        assert float(value) > 0
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, list(f.parameters())))


class Block(nn.Module):
    """As programs have it: a Module that calls odeint."""

    def __init__(self, f, function):
        super().__init__()
        self.f, self.function = f, function

    def forward(self, y):
        return self.function(self.f, y, torch.tensor([0.0, 1.0], dtype=y.dtype), **LOOSE)[-1]


@FUNCTION
def test_several_solves_shared_fields_and_sequential(function):
    f, g = Net(), Net(gain=1.0)
    model = nn.Sequential(*(Block(x, getattr(adapter, function)) for x in (f, g, f)))
    plain = nn.Sequential(*(Block(x, getattr(torchdiffeq, function)) for x in (f, g, f)))
    penalty = reg.LocalError()
    with reg.record() as outer, reg.record() as solutions:
        ours = model(start())
    model(start())
    assert torch.equal(ours, plain(start()))
    assert len(solutions) == 3 and outer == solutions
    value = penalty(solutions)
    assert torch.equal(value, sum(penalty(s) for s in solutions))
    value.backward()
    assert all(bool(p.grad.abs().sum() > 0) for x in (f, g) for p in x.net[0].parameters())
    with reg.record() as nothing:
        pass
    with refused(ValueError, "record"):
        penalty(nothing)


@FUNCTION
def test_no_penalty_no_cost_without_gradients_and_in_eval_mode(function):
    f, ours = Net(), getattr(adapter, function)
    accepted = []
    f.callback_accept_step = lambda t, y, dt: accepted.append(t)
    with reg.record() as solutions:
        with torch.no_grad():
            _, without = solved(adapter, function, f)
        assert float(reg.LocalError()(ours.solution)) == 0.0
        f.eval()
        solved(adapter, function, f)
    calls = f.calls
    assert float(reg.LocalStiffness(weight=3.0)(solutions)) == 0.0
    assert f.calls == calls == without and len(solutions) == 2


def test_autocast():
    f = Net(d=8).float()
    y0, t = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 0.4])
    how = {"rtol": 1e-1, "atol": 1e-1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torchdiffeq.odeint(f, y0, t, **how)
        ours = adapter.odeint(f, y0, t, **how)
        inside = reg.LocalError()(adapter.odeint.solution)
    seen = []
    f.net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    outside = reg.LocalError()(adapter.odeint.solution)
    assert torch.equal(ours, theirs) and torch.equal(inside, outside) and set(seen) == {torch.bfloat16}
    outside.backward()
    adapter.odeint(f, y0, t, **how)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reg.LocalError()(adapter.odeint.solution)
    assert set(seen) == {torch.float32}


def test_distributed(tmp_path):
    def gradients_of(wrap):
        model = nn.Sequential(nn.Linear(3, 3).double(), Block(Net(), adapter.odeint_adjoint))
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        wrapped = wrap(model)
        with reg.record(torch.Generator().manual_seed(0)) as solutions:
            loss = wrapped(start()).square().mean()
        (loss + reg.LocalError()(solutions)).backward()
        return [p.grad for p in model.parameters()]

    alone = gradients_of(lambda model: model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        together = gradients_of(nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_replicas_of_data_parallel_keep_their_gradients():
    f = Net()
    f._is_replica = True
    f.net._is_replica = True
    weights = [p.detach().clone().requires_grad_() for p in f.net[0].parameters()]
    for name, p in zip(("weight", "bias"), weights, strict=True):
        del f.net[0]._parameters[name]
        f.net[0].__dict__[name] = p
    ours = adapter.odeint_adjoint(f, start(), TIMES["forwards"], **LOOSE)
    theirs = torchdiffeq.odeint_adjoint(f, start(), TIMES["forwards"], **LOOSE)
    for a, b in zip(*(torch.autograd.grad(y[-1].sum(), weights) for y in (ours, theirs)), strict=True):
        assert torch.equal(a, b) and bool(a.abs().sum() > 0)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@FUNCTION
@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.05})])
def test_events(method, options, function, reverse):
    class Fall(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.tensor(9.81, dtype=torch.float64))

        def forward(self, t, y):
            return y[1], (-self.g + 0.1 * torch.sin(9 * t)).expand_as(y[1])

    f, sign = Fall(), -1.0 if reverse else 1.0
    y0 = tuple(torch.tensor([x], dtype=torch.float64) for x in (10.0, 0.0))
    how = {"event_fn": lambda t, y: y[0], "reverse_time": reverse, "method": method, "options": options, **LOOSE}
    t0 = torch.tensor([0.0], dtype=torch.float64)
    results = []
    for module in (torchdiffeq, adapter):
        t, y = module.odeint_event(f, y0, t0, odeint_interface=getattr(module, function), **how)
        results.append((t, *y, *torch.autograd.grad(t + y[1][-1].sum(), [f.g])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    solution, end = getattr(adapter, function).solution, float(results[0][0])
    for sampling in ("unbiased", "biased"):
        place = solution.place(sampling)
        assert 0 <= sign * float(place.t) <= abs(end) and sign * float(place.dt) > 0
        # Free fall, nearly.
        expected = 10 - 0.5 * 9.81 * float(place.t) ** 2
        assert abs(float(place.state(False)[0]) - expected) < 0.1
        assert float(reg.LocalError(sampling)(solution)) > 0


def test_what_a_black_box_cannot_give():
    f = Net()
    solved(adapter, "odeint", f)
    for penalty in (reg.GlobalError(), reg.GlobalStiffness()):
        with refused(TypeError, type(penalty).__name__, "LocalError", "LocalStiffness", 'engine="neuralde"'):
            penalty(adapter.odeint.solution)
    with refused(ValueError, "record(generator=...)"):
        reg.LocalError(generator=torch.Generator())(adapter.odeint.solution)
    solved(adapter, "odeint", f, method="scipy_solver")
    with refused(ValueError, "biased", "SciPy"):
        reg.LocalError("biased")(adapter.odeint.solution)
    steep = nn.Linear(3, 3).double()
    adapter.odeint(lambda t, y: steep(y) * float("inf"), start(), TIMES["forwards"], method="euler")
    with refused(nde.NonFiniteState, "odeint", "t = "):
        for _ in range(20):  # until a time is drawn after the first step
            adapter.odeint(lambda t, y: steep(y) * float("inf"), start(), TIMES["forwards"], method="euler")
            reg.LocalError()(adapter.odeint.solution)


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


def test_imports_stay_light():
    script = (
        "import sys, regularizers; "
        "found = {'torchdiffeq', 'torchdyn', 'torchsde'} & set(sys.modules); assert not found, found; "
        "import regularizers.torchdiffeq; assert 'torchdyn' not in sys.modules and 'torchsde' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- programs from the documentation, small ----------------------------------------------------------------------------


def test_ode_demo():
    """A cubic spiral, learned from pieces of it."""
    true, t = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]), torch.linspace(0.0, 25.0, 200)
    with torch.no_grad():
        path = torchdiffeq.odeint(lambda t, y: y**3 @ true, torch.tensor([[2.0, 0.0]]), t)

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2))

        def forward(self, t, y):
            return self.net(y**3)

    def trained(odeint, penalty=None):
        f, losses = Cubic(), []
        rate = torch.optim.RMSprop(f.parameters(), lr=1e-3)
        torch.manual_seed(1)
        for _ in range(3):
            first = torch.randint(0, 190, (8,))
            loss = (odeint(f, path[first], t[:10]) - torch.stack([path[first + i] for i in range(10)])).abs().mean()
            losses.append(loss.detach())
            extra = 0.0 if penalty is None else penalty(odeint.solution)
            rate.zero_grad()
            (loss + extra).backward()
            rate.step()
        return losses, f, extra

    theirs, ours = trained(torchdiffeq.odeint), trained(adapter.odeint)
    assert theirs[0] == ours[0]
    assert all(torch.equal(a, b) for a, b in zip(theirs[1].parameters(), ours[1].parameters(), strict=True))
    # In float32, an error ratio at a tolerance of 1e-9 is rounding noise; stiffness is not.
    regularized = trained(adapter.odeint, reg.LocalStiffness(weight=0.1))
    assert float(regularized[2]) > 0 and regularized[0][-1] != theirs[0][-1]


def test_digits_example():
    """A convolutional classifier with an ODE block, as in the MNIST example."""
    from neuralde.experiments.data import digits

    data = digits()
    x, y = data.train_x[:32].reshape(-1, 1, 8, 8), data.train_y[:32]

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.GroupNorm(4, 8) for _ in range(3))
            self.convs = nn.ModuleList(nn.Conv2d(9, 8, 3, padding=1) for _ in range(2))

        def forward(self, t, z):
            for norm, conv in zip(self.norms, self.convs, strict=False):
                z = torch.relu(norm(z))
                z = conv(torch.cat([z, torch.ones_like(z[:, :1]) * t], dim=1))
            return self.norms[2](z)

    class ODEBlock(nn.Module):
        def __init__(self, odeint):
            super().__init__()
            self.f, self.odeint = Convolutions(), odeint

        def forward(self, z):
            return self.odeint(self.f, z, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[1]

    def trained(odeint, penalty=None):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), ODEBlock(odeint), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )
        descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x), y)
            extra = None if penalty is None else penalty(odeint.solution)
            descent.zero_grad()
            (loss if extra is None else loss + extra).backward()
            descent.step()
        return loss, model, extra

    for name in FUNCTIONS:
        theirs, ours = trained(getattr(torchdiffeq, name)), trained(getattr(adapter, name))
        assert torch.equal(theirs[0], ours[0])
        assert all(torch.equal(a, b) for a, b in zip(theirs[1].parameters(), ours[1].parameters(), strict=True))
        loss, _, extra = trained(getattr(adapter, name), reg.LocalError(weight=1.0))
        assert float(extra) > 0 and not torch.equal(loss, theirs[0])


def test_no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("dopri5", "euler"):
            for function in FUNCTIONS:
                solved(adapter, function, Net(), method=method)
                reg.LocalError()(getattr(adapter, function).solution).backward()
