"""neuralde.interop.torchdiffeq beside torchdiffeq itself: results, gradients, shapes, errors, a whole program."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import close, refused
from torch import nn

import neuralde as nde
from neuralde.interop import _adams
from neuralde.interop import torchdiffeq as ours

theirs = pytest.importorskip("torchdiffeq")

D = torch.float64
ADAPTIVE = ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"]
ADAMS = ["explicit_adams", "implicit_adams", "fixed_adams"]
ODEINTS = [ours.odeint, ours.odeint_adjoint]

quiet = pytest.mark.filterwarnings("ignore:.*did not converge", "ignore:Functional iteration")


class Driven(nn.Module):
    """dy/dt of y [4, 2], depending on t."""

    def __init__(self, dtype=D):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.calls = 0

    def forward(self, t, y):
        assert t.dim() == 0
        self.calls += 1
        return self.net(y) * torch.sin(3 * t)


def start(dtype=D):
    torch.manual_seed(1)
    return torch.randn(4, 2, dtype=dtype, requires_grad=True)


def times(backward=False, dtype=D):
    t = torch.tensor([0.0, 0.3, 0.8, 1.7, 2.0], dtype=dtype)
    return t.flip(0) if backward else t


def both(f, y0, t, odeint=ours.odeint, watched=(), **options):
    """(value, gradients) of ours and of theirs."""
    results = []
    for solve in (odeint, theirs.odeint):
        y = solve(f, y0, t, **options)
        leaves = torch.utils._pytree.tree_leaves(y)
        loss = sum((x.abs() ** 2 * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum() for x in leaves)
        results.append((y, torch.autograd.grad(loss, [*torch.utils._pytree.tree_leaves(y0), *watched])))
    return results


# -- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods(method, backward, odeint):
    tight = 1e-10 if method in ("dopri8", "dopri5") else 1e-7
    f, y0, t = Driven(), start(), times(backward)[[0, -1]]
    watched, exact = list(f.parameters()), {"rtol": 1e-11, "atol": 1e-11}
    (y, own), (expected, other) = both(f, y0, t, odeint, watched, method=method, rtol=tight, atol=tight)
    _, (truth, right) = both(f, y0, t, theirs.odeint, watched, **exact)
    assert y.shape == (2, 4, 2) and torch.equal(y[0], y0)
    for mine, its, true in zip((y, *own), (expected, *other), (truth, *right), strict=True):
        # torchdiffeq steps past the end and interpolates back, with an error of its own in all but dopri5.
        scale = true.detach().abs().max()
        assert (mine - true).abs().max() < 3 * (its - true).abs().max() + 1e-6 * scale


def test_interior_outputs():
    f, y0 = Driven(), start()
    for method in ("dopri5", "adaptive_heun"):
        y, expected = (x.odeint(f, y0, times(), method=method, rtol=1e-8, atol=1e-8) for x in (ours, theirs))
        close(y, expected, 1e-6)


@quiet
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods(method, odeint, backward, interp):
    f, y0 = Driven(), start()
    options = {"step_size": 0.07, "interp": interp}
    (y, own), (expected, other) = both(
        f, y0, times(backward), odeint, list(f.parameters()), method=method, options=options, rtol=1e-6, atol=1e-8
    )
    close(y, expected, 1e-11)
    for a, b in zip(own, other, strict=True):
        close(a, b, 1e-10)


def test_adams_weights():
    """Against the tables of the installed torchdiffeq."""
    tables = pytest.importorskip("torchdiffeq._impl.fixed_adams")
    for k in range(3, 13):
        assert _adams.weights(k, 0) == pytest.approx(tables._BASHFORTH_DIVISOR[k].tolist(), rel=1e-14)
        assert _adams.weights(k, 1) == pytest.approx(tables._MOULTON_DIVISOR[k].tolist(), rel=1e-14)


@quiet
@pytest.mark.parametrize("options", [{"max_order": 5}, {"max_iters": 1}, {"implicit": False}, {"perturb": True}])
def test_adams_options(options):
    f, y0 = Driven(), start()
    how = {"method": "implicit_adams", "rtol": 1e-12, "atol": 1e-12}
    plain = ours.odeint(f, y0, times(), options={"step_size": 0.07}, **how)
    y, expected = (x.odeint(f, y0, times(), options={"step_size": 0.07, **options}, **how) for x in (ours, theirs))
    close(y, expected, 1e-11)
    assert not torch.equal(y, plain)


def test_adams_says_when_it_does_not_converge():
    f, y0 = Driven(), start()
    with pytest.warns(UserWarning, match="did not converge"):
        ours.odeint(
            f, y0, times(), method="implicit_adams", rtol=1e-15, atol=1e-15, options={"step_size": 0.1, "max_iters": 1}
        )


@pytest.mark.parametrize("solver", ["LSODA", "RK45", "DOP853"])
def test_scipy(solver):
    pytest.importorskip("scipy")
    f, y0 = Driven(), start().detach()
    how = {"method": "scipy_solver", "options": {"solver": solver}, "rtol": 1e-8, "atol": 1e-8}
    y = ours.odeint(f, y0, times(), **how)
    close(y, theirs.odeint(f, y0, times(), **how), 1e-12)
    assert y.dtype == D and not y.requires_grad
    back = ours.odeint(f, y0, times(backward=True), **how)
    close(back, ours.odeint(f, y0, times(backward=True), rtol=1e-10, atol=1e-10), 1e-6)


# -- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.complex128])
def test_states_of_any_shape(shape, dtype):
    y0 = torch.ones(shape, dtype=dtype)
    t = torch.tensor([0.0, 0.5, 1.0])
    y = ours.odeint(lambda t, y: -t * y, y0, t, rtol=1e-6, atol=1e-6)
    assert y.shape == (3, *shape) and y.dtype == dtype
    close(y, torch.exp(-(t**2) / 2).to(dtype).reshape(-1, *(1,) * len(shape)).expand(3, *shape), 1e-5)


def test_one_time_is_no_integration():
    y0 = (torch.ones(2), torch.zeros(()))
    y = ours.odeint(lambda t, y: y, y0, torch.tensor([3.0]))
    assert torch.equal(y[0], torch.ones(1, 2)) and y[1].shape == (1,)


def test_nfe_is_torchdiffeqs():
    """The same controller, error estimate, norm and first step; the last step ends on t1 instead of past it."""
    for method in ("dopri5", "bosh3", "dopri8"):
        counts = []
        for solve in (ours.odeint, theirs.odeint):
            f = Driven()
            with torch.no_grad():
                solve(f, start(), torch.tensor([0.0, 20.0], dtype=D), method=method, rtol=1e-6, atol=1e-6)
            counts.append(f.calls)
        assert abs(counts[0] - counts[1]) < 0.1 * counts[1], counts


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odeint", ODEINTS)
def test_gradients_of_times(odeint):
    f, y0 = Driven(), start()
    found = []
    for solve in (odeint, theirs.odeint):
        t = times().requires_grad_()
        found.append(torch.autograd.grad(solve(f, y0, t, rtol=1e-10, atol=1e-10).square().sum(), t)[0])
    close(*found, 1e-5)


def test_adjoint_params_restrict():
    f, y0 = Driven(), start()
    first, *rest = f.parameters()
    ours.odeint_adjoint(f, y0, times(), adjoint_params=(first,)).square().sum().backward()
    assert y0.grad is not None and all(p.grad is None for p in rest)
    restricted = first.grad.clone()
    f.zero_grad()
    ours.odeint_adjoint(f, y0, times()).square().sum().backward()
    close(first.grad, restricted, 1e-12)
    assert all(p.grad is not None for p in rest)
    f.zero_grad()
    y = ours.odeint_adjoint(f, y0, times(), adjoint_params=())
    y.square().sum().backward()
    assert all(p.grad is None for p in f.parameters())


def test_adjoint_needs_no_module():
    a, y0 = torch.tensor(0.5, dtype=D, requires_grad=True), start()
    expected = theirs.odeint(lambda t, y: a * y, y0, times())
    found = [
        torch.autograd.grad(y.sum(), a)[0]
        for y in (
            expected,
            *(ours.odeint_adjoint(lambda t, y: a * y, y0, times(), **k) for k in ({}, {"adjoint_params": (a,)})),
        )
    ]
    close(found[1], found[0], 1e-6)
    close(found[2], found[0], 1e-6)


def test_adjoint_options_are_checked_and_have_no_effect():
    f, y0 = Driven(), start()
    plain = ours.odeint_adjoint(f, y0, times())
    for given in (
        {"adjoint_rtol": 1e-3},
        {"adjoint_atol": 1e-3},
        {"adjoint_method": "rk4"},
        {"adjoint_options": {"norm": "seminorm"}},
    ):
        with pytest.warns(UserWarning, match=f"{next(iter(given))}.*no effect"):
            y = ours.odeint_adjoint(f, y0, times(), **given)
        assert torch.equal(y, plain)
    f.callback_step_adjoint = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_step_adjoint"):
        ours.odeint_adjoint(f, y0, times())
    del f.callback_step_adjoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.odeint_adjoint(f, y0, times())
    with refused(ValueError, "method", "newton"):
        ours.odeint_adjoint(f, y0, times(), adjoint_method="newton")
    with refused(ValueError, "adjoint_options"):
        ours.odeint_adjoint(f, y0, times(), method="rk4", options={"step_size": 0.1}, adjoint_method="dopri5")
    with refused(TypeError, "options", "list"):
        ours.odeint_adjoint(f, y0, times(), adjoint_options=[])
    with refused(TypeError, "adjoint_params"):
        ours.odeint_adjoint(f, y0, times(), adjoint_params=[1.0])


# -- options --------------------------------------------------------------------------------------------------------


def calls(method="dopri5", t=None, **options):
    f = Driven()
    with torch.no_grad():
        y = ours.odeint(f, start(), times() if t is None else t, method=method, rtol=1e-6, atol=1e-6, options=options)
    return f.calls, y


def test_options_of_the_controller():
    plain, y = calls()
    for options in ({"first_step": 1e-4}, {"safety": 0.5}, {"ifactor": 1.2}, {"first_step": 2.0, "dfactor": 0.9}):
        count, again = calls(**options)
        assert count != plain, options
        close(again, y, 1e-4)


def test_max_num_steps():
    with refused(nde.MaxStepsReached, "max_steps"):
        calls(max_num_steps=2, t=torch.tensor([0.0, 50.0], dtype=D))
    # Of each interval between outputs, as in torchdiffeq.
    calls(max_num_steps=20)


def test_dtype():
    calls(dtype=D)
    with pytest.warns(UserWarning, match="dtype"):
        calls(dtype=torch.float32)


def test_unknown_options_are_warned_of():
    for method, options in (
        ("dopri5", {"step_size": 0.1}),
        ("implicit_adams", {"norm": max}),
        ("dopri5", {"eps": 1e-3}),
    ):
        with pytest.warns(UserWarning, match="Unexpected arguments"):
            calls(method, **options)


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("dopri5", {"safety": 2.0}, ("safety", "2.0")),
        ("dopri5", {"dfactor": 2.0}, ("dfactor", "ifactor")),
        ("dopri5", {"first_step": -1.0}, ("first_step", "-1")),
        ("dopri5", {"max_num_steps": 0}, ("max_num_steps",)),
        ("dopri5", {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.5])}, ("step_t", "jump_t", "repeated")),
        ("rk4", {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}, ("mutually exclusive",)),
        ("rk4", {"step_size": 0.0}, ("step_size",)),
        ("rk4", {"interp": "quintic"}, ("interp", "quintic")),
        ("rk4", {"grid_constructor": lambda f, y, t: t[1:]}, ("grid_constructor",)),
        ("implicit_adams", {"max_order": 13}, ("max_order", "13")),
        ("implicit_adams", {"max_iters": 0}, ("max_iters",)),
        ("rk45", {}, ("rk45", "dopri5")),
        ("scipy_solver", {"solver": "RK45", "min_step": 0.1}, ("min_step", "LSODA")),
    ],
)
def test_wrong_options(method, options, words):
    with refused(ValueError, *words):
        calls(method, **options)


def test_wrong_types():
    f, y0, t = Driven(), start(), times()
    for error, word, arguments, options in (
        (TypeError, "func", (1.0, y0, t), {}),
        (TypeError, "y0", (f, 1.0, t), {}),
        (TypeError, "y0", (f, (), t), {}),
        (TypeError, "t ", (f, y0, [0.0, 1.0]), {}),
        (TypeError, "floating", (f, y0, torch.tensor([0, 1])), {}),
        (ValueError, "t ", (f, y0, t[None]), {}),
        (ValueError, "increasing", (f, y0, torch.tensor([0.0, 1.0, 0.5])), {}),
        (TypeError, "options", (f, y0, t), {"options": 3}),
        (TypeError, "norm", (f, y0, t), {"options": {"norm": 3}}),
        (TypeError, "perturb", (f, y0, t), {"options": {"perturb": 3}, "method": "rk4"}),
        (ValueError, "gradients", (f, y0, t), {"rtol": torch.tensor(1e-3, requires_grad=True)}),
        (ValueError, "rtol", (lambda t, y: y, (y0, y0), t), {"rtol": (1e-3,)}),
        (ValueError, "event_fn", (f, y0, t[:2]), {"method": "scipy_solver", "event_fn": lambda t, y: t - 1}),
    ):
        with refused(error, word):
            ours.odeint(*arguments, **options)


def test_failures_are_ours():
    """torchdiffeq raises an AssertionError; here it says which kind of failure, where and what to try."""
    with refused(nde.NeuralDEError, "t ="):
        ours.odeint(lambda t, y: y**3, torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D))
    assert issubclass(nde.NeuralDEError, RuntimeError)


@pytest.mark.parametrize("method", ["implicit_adams", "scipy_solver"])
def test_callbacks_that_a_method_does_not_have(method):
    f = Driven()
    f.callback_accept_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_accept_step"):
        ours.odeint(f, start().detach(), times(), method=method, rtol=1e-3, atol=1e-3)


@quiet
def test_callback_of_adams():
    seen = []
    for solve in (ours.odeint, theirs.odeint):
        f, here = Driven(), []
        f.callback_step = lambda t, y, dt, here=here: here.append((float(t), float(dt), tuple(y.shape)))
        solve(f, start(), times(backward=True), method="explicit_adams", options={"step_size": 0.25})
        seen.append(here)
    assert len(seen[0]) == 8 and seen[0] == [pytest.approx(x) if isinstance(x, float) else x for x in seen[1]]


# -- dense output ---------------------------------------------------------------------------------------------------


def test_dense():
    f, y0 = Driven(), start()
    t0, t1 = torch.tensor(0.0, dtype=D), torch.tensor(2.0, dtype=D)
    mine, other = (x.odeint_dense(f, y0, t0, t1, rtol=1e-9, atol=1e-9) for x in (ours, theirs))
    for t in (0.1, 0.77, 1.9):
        t = torch.tensor(t, dtype=D)
        a, b = mine(t), other(t)
        assert a.shape == (4, 2)
        close(a, b, 1e-7)
        close(*(torch.autograd.grad(x.square().sum(), y0, retain_graph=True)[0] for x in (a, b)), 1e-5)
    assert mine(torch.linspace(0, 2, 5)).shape == (5, 4, 2)
    back = ours.odeint_dense(f, y0, 2.0, 0.0, method="bosh3", rtol=1e-8, atol=1e-8)
    close(back(1.0), ours.odeint(f, y0, torch.tensor([2.0, 1.0], dtype=D), rtol=1e-9, atol=1e-9)[1], 1e-5)
    with refused(ValueError, "adaptive", "rk4"):
        ours.odeint_dense(f, y0, 0.0, 1.0, method="rk4")


# -- a program -------------------------------------------------------------------------------------------------------

SPIRAL = """
import torch
from torch import nn
from torchdiffeq import odeint{adjoint} as odeint

torch.manual_seed(0)
matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
start, t = torch.tensor([[2.0, 0.0]]), torch.linspace(0.0, 25.0, 1000)


class Truth(nn.Module):
    def forward(self, t, y):
        return y**3 @ matrix


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, t, y):
        return self.net(y**3)


with torch.no_grad():
    truth = odeint(Truth(), start, t, method="dopri5")

f, losses = Learned(), []
optimizer = torch.optim.RMSprop(f.parameters(), lr=1e-3)
for _ in range(30):
    first = torch.randint(0, len(t) - 10, (20,))
    optimizer.zero_grad()
    predicted = odeint(f, truth[first, :], t[:10])
    loss = (predicted - torch.stack([truth[first + i] for i in range(10)])).abs().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

with torch.no_grad():
    total = (odeint(f, start, t) - truth).abs().mean().item()
"""


@pytest.mark.parametrize("adjoint", ["", "_adjoint"])
def test_the_spiral_program_runs_by_changing_one_import(adjoint):
    program, results = SPIRAL.format(adjoint=adjoint), []
    for module in ("torchdiffeq", "neuralde.interop.torchdiffeq"):
        scope = {}
        exec(program.replace("from torchdiffeq import", f"from {module} import"), scope)
        results.append((scope["losses"], scope["total"]))
    (mine, total), (expected, total_expected) = results
    assert mine == pytest.approx(expected, rel=1e-3) and total == pytest.approx(total_expected, rel=1e-3)
    assert mine[-1] < mine[0]


def test_torchdiffeq_is_not_imported():
    code = (
        "import sys, neuralde.interop.torchdiffeq\n"
        "assert not {'torchdyn', 'torchdiffeq', 'pytorch_lightning', 'lightning', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["dopri5", "explicit_adams", "scipy_solver"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_scalars_of_every_loop(method, dtype):
    """Also with times of another dtype than the state's."""
    t = torch.linspace(1, 8, 30, dtype=D)
    y = ours.odeint(lambda t, y: 1 / t, torch.tensor(0.0, dtype=dtype), t, method=method, rtol=1e-6, atol=1e-6)
    assert y.shape == (30,) and y.dtype == dtype
    close(y, t.log().to(dtype), 1e-2)


@quiet
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAMS)
def test_events_of_adams(method, reverse):
    """The time and the state, with their gradients, as by dopri5. (Of order 12, explicit steps must be tiny.)"""

    def f(t, y):
        return torch.stack([y[1], -a * y[0] * (1 + 0.1 * t)])

    found = []
    a = torch.tensor(1.3, dtype=D, requires_grad=True)
    y0 = torch.tensor([0.1, 1.0], dtype=D, requires_grad=True)
    t0 = torch.tensor(0.2, dtype=D, requires_grad=True)
    for solve, how in (
        (
            ours.odeint,
            {"method": method, "options": {"step_size": 0.005, "max_order": 6}, "rtol": 1e-11, "atol": 1e-11},
        ),
        (theirs.odeint, {"rtol": 1e-11, "atol": 1e-11}),
    ):
        module = ours if solve is ours.odeint else theirs
        at, path = module.odeint_event(
            f, y0, t0, event_fn=lambda t, y: y[0] - 0.5 - 0.1 * t, reverse_time=reverse, odeint_interface=solve, **how
        )
        assert path.shape == (2, 2)
        found.append((at.reshape(()), path[1], *torch.autograd.grad(at.sum() + 2 * path[1, 1], [a, y0, t0])))
    for mine, its in zip(*found, strict=True):
        close(mine, its, 1e-6)
