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


# -- the backward solve ---------------------------------------------------------------------------------------------


def backward(module, f, y0=None, t=None, **options):
    """y, the gradients of y0 and of f's parameters, and what the backward pass called f."""
    y0, t = start() if y0 is None else y0, times() if t is None else t
    leaves = torch.utils._pytree.tree_leaves(y0)
    options = {"rtol": 1e-7, "atol": 1e-7} | options
    y = module.odeint_adjoint(f, y0, t, **options)
    forward = f.calls
    loss = sum((x**2).sum() for x in torch.utils._pytree.tree_leaves(y))
    gradients = torch.autograd.grad(loss, [*leaves, *f.parameters()], allow_unused=True)
    return y, gradients, f.calls - forward


BACKWARD = {
    "tolerances": {"adjoint_rtol": 1e-6, "adjoint_atol": 1e-6},
    "tensors": {"adjoint_rtol": torch.tensor(1e-7), "adjoint_atol": torch.tensor(1e-7)},
    "full norm": {"adjoint_options": {}},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "adaptive": {"adjoint_method": "bosh3"},
    "fixed": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.03}},
    "fixed, norm": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.03, "norm": "seminorm"}},
    "first step": {"adjoint_options": {"first_step": 1e-3, "norm": "seminorm"}},
    "step sizes": {"adjoint_options": {"max_step": 0.1, "min_step": 1e-9, "step_t": torch.tensor([0.5, 1.2])}},
    "controller": {"adjoint_options": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5}},
    "inherited": {"options": {"max_step": 0.1}, "adjoint_rtol": 1e-7},
}


@pytest.mark.parametrize("options", BACKWARD.values(), ids=BACKWARD)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_solve(options, reverse):
    """Gradients within the tolerance of the exact ones, and about as many evaluations of f as torchdiffeq has."""
    mine, its = (backward(module, Driven(), t=times(reverse), **options) for module in (ours, theirs))
    _, exact, _ = backward(theirs, Driven(), t=times(reverse), rtol=1e-11, atol=1e-11)
    close(mine[0], its[0], 1e-5)
    for g, other, true in zip(mine[1], its[1], exact, strict=True):
        close(g, true, 1e-4)
        close(g, other, 2e-4)
    assert its[2] / 3 < mine[2] < 1.5 * its[2]


def seven(f, y, t):
    return torch.linspace(t[0], t[-1], 7, dtype=D)


@pytest.mark.parametrize("method", ["rk4", "euler"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("grid", ["step_size", "t", "other", "constructor"])
def test_fixed_grids_backwards(method, reverse, grid):
    """The same formulas on the same grid: the same numbers."""
    options = {
        "step_size": {"options": {"step_size": 0.05}, "adjoint_rtol": 1e-3},
        "t": {"adjoint_atol": 1e-3},
        "other": {"options": {"step_size": 0.1}, "adjoint_options": {"step_size": 0.07}},
        "constructor": {
            "adjoint_options": {"grid_constructor": lambda f, y, t: torch.linspace(t[0], t[-1], 7, dtype=D)}
        },
    }[grid]
    mine, its = (backward(module, Driven(), t=times(reverse), method=method, **options) for module in (ours, theirs))
    close(mine[0], its[0], 1e-12)
    for g, other in zip(mine[1], its[1], strict=True):
        close(g, other, 1e-10)


def test_every_option_of_the_backward_solve_has_an_effect():
    def count(**options):
        return backward(ours, Driven(), t=times()[[0, -1]], **options)[2]

    tight = count(adjoint_options={})
    assert count(adjoint_rtol=1e-3, adjoint_atol=1e-3) < tight < count(adjoint_rtol=1e-10, adjoint_atol=1e-10)
    assert count(adjoint_rtol=1e-3) != tight != count(adjoint_atol=1e-3)
    assert count(adjoint_method="bosh3") > tight
    for options in (
        {"first_step": 1e-4},
        {"max_step": 0.05},
        {"safety": 0.5},
        {"first_step": 1e-3, "ifactor": 1.2},
        {"first_step": 2.0, "dfactor": 0.9},
        {"step_t": torch.linspace(0.1, 1.9, 19)},
    ):
        without = tight if len(options) == 1 else count(adjoint_options={"first_step": options["first_step"]})
        assert count(adjoint_options=options) != without, options
    with refused(nde.StepSizeUnderflow, "backsolve"):
        count(adjoint_options={"min_step": 1.9, "first_step": 1.9})
    with refused(nde.MaxStepsReached, "backsolve"):
        count(adjoint_options={"max_num_steps": 2})
    assert count(adjoint_method="rk4", adjoint_options={"step_size": 0.1}) < count(
        adjoint_method="rk4", adjoint_options={"step_size": 0.05}
    )


class Wide(nn.Module):
    """Many parameters whose gradients are large and uneven in time, of a y that is easy to follow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(2, 64).to(D), nn.Linear(64, 2, bias=False).to(D)
        self.outer.weight.data /= 100
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.outer(100 * torch.tanh(self.inner(y)) * torch.sin(6 * t))


def test_the_seminorm_saves_evaluations():
    t, counts = torch.tensor([0.0, 4.0], dtype=D), {}
    for module in (ours, theirs):
        for options in ({}, {"norm": "seminorm"}):
            _, gradients, count = backward(module, Wide(), t=t, rtol=1e-5, atol=1e-6, adjoint_options=options)
            counts.setdefault(module.__name__, []).append(count)
            _, exact, _ = backward(ours, Wide(), t=t, rtol=1e-9, atol=1e-9)
            for g, true in zip(gradients, exact, strict=True):
                close(g, true, 1e-3)
    for full, semi in counts.values():
        assert semi < 0.85 * full, counts


def test_without_options_the_gradient_is_exact():
    """That of the steps which were made, at tolerances where torchdiffeq's is off."""
    loose = {"rtol": 1e-2, "atol": 1e-2}
    _, own, _ = backward(ours, Driven(), **loose)
    f, y0 = Driven(), start()
    exact = torch.autograd.grad(ours.odeint(f, y0, times(), **loose).square().sum(), [y0, *f.parameters()])
    for g, true in zip(own, exact, strict=True):
        close(g, true, 1e-12)
    _, solved, _ = backward(ours, Driven(), **loose, adjoint_options={})
    assert (solved[0] - exact[0]).abs().max() > 1e-6


@pytest.mark.parametrize("options", [{}, {"adjoint_options": {}}, {"adjoint_options": {"norm": "seminorm"}}])
def test_gradients_of_times_backwards(options):
    found = []
    for module in (ours, theirs):
        t = times().requires_grad_()
        y = module.odeint_adjoint(Driven(), start(), t, rtol=1e-9, atol=1e-9, **options)
        found.append(torch.autograd.grad(y.square().sum(), t)[0])
    close(*found, 1e-5)


class Pair(nn.Module):
    """Of a tuple, the second of it hard to follow."""

    def __init__(self):
        super().__init__()
        self.rate, self.calls = nn.Parameter(torch.tensor(0.7, dtype=D)), 0

    def forward(self, t, y):
        self.calls += 1
        return -self.rate * y[0] + 0.1 * y[1].mean(), torch.cos(20 * t) * 20 * self.rate * y[1]


@pytest.mark.parametrize("adjoint", [{}, {"norm": "seminorm"}])
@pytest.mark.parametrize("norm", [None, lambda y: y[0].abs().max()])
def test_tuples_and_norms_backwards(adjoint, norm):
    options = {} if norm is None else {"norm": norm}
    found = []
    for module in (ours, theirs):
        y0 = torch.ones(2, dtype=D, requires_grad=True), torch.ones(2, 3, dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 0.5, 1.0], dtype=D)
        found.append(backward(module, Pair(), y0, t, options=options, adjoint_options=adjoint))
    for g, other in zip(found[0][1], found[1][1], strict=True):
        close(g, other, 1e-2 if norm else 1e-4)
    assert found[1][2] / 3 < found[0][2] < 1.5 * found[1][2]


@pytest.mark.parametrize("options", [{}, {"adjoint_options": {}}, {"adjoint_options": {"norm": "seminorm"}}])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_events_backwards(options, method, reverse):
    grid = {"options": {"step_size": 0.01}} if method == "rk4" else {}
    if options and grid:
        options = {"adjoint_options": {**options["adjoint_options"], **grid["options"]}}
    found = []
    for module in (ours, theirs):
        f, y0 = Driven(), start()
        t0 = torch.tensor(0.2, dtype=D, requires_grad=True)
        at, y = module.odeint_event(
            f,
            y0,
            t0,
            event_fn=lambda t, y: t - (-0.4 if reverse else 0.9) - 0.1 * y[0, 0],
            reverse_time=reverse,
            odeint_interface=module.odeint_adjoint,
            **{"rtol": 1e-8, "atol": 1e-8, "method": method, **grid, **options},
        )
        gradients = torch.autograd.grad(at.sum() + (y[-1] ** 2).sum(), [y0, t0, *f.parameters()])
        found.append((at.reshape(()), y, *gradients))
    for mine, its in zip(*found, strict=True):
        close(mine, its, 1e-4)


OWN = [{}, {"adjoint_options": {}}, {"adjoint_options": {"norm": "seminorm"}}]


@pytest.mark.parametrize("options", OWN)
def test_adjoint_params(options):
    """Only those named get gradients through f, and those are what they are without the restriction."""
    _, (_, *everything), _ = backward(theirs, Driven())
    for names in ((), (0,), (1, 2)):
        f, y0, t = Driven(), start(), times().requires_grad_()
        parameters = list(f.parameters())
        chosen = tuple(parameters[i] for i in names)
        y = ours.odeint_adjoint(f, y0, t, rtol=1e-7, atol=1e-7, adjoint_params=iter(chosen), **options)
        y.square().sum().backward()
        assert y0.grad is not None and t.grad is not None
        for i, p in enumerate(parameters):
            if i in names:
                close(p.grad, everything[i], 1e-5)
            else:
                assert p.grad is None


@pytest.mark.parametrize("options", OWN)
def test_adjoint_params_without_any_gradient(options):
    y = ours.odeint_adjoint(Driven(), start().detach(), times(), adjoint_params=(), **options)
    assert not y.requires_grad


@pytest.mark.parametrize("options", OWN)
def test_adjoint_params_and_computed_tensors(options):
    """A computed tensor that is not named is cut; one that is gets the gradient of all behind it."""
    w = torch.tensor(0.5, dtype=D, requires_grad=True)
    for named in (True, False):
        a, b = torch.exp(w), torch.sin(w)
        wanted = (a, b) if named else (a,)
        y = ours.odeint_adjoint(lambda t, y, a=a, b=b: -a * y + b, start(), times(), adjoint_params=wanted, **options)
        (gradient,) = torch.autograd.grad(y.sum(), w)
        a, b = torch.exp(w), torch.sin(w if named else w.detach())
        y = theirs.odeint(lambda t, y, a=a, b=b: -a * y + b, start(), times())
        close(gradient, torch.autograd.grad(y.sum(), w)[0], 1e-5)


def test_adjoint_params_restrict_what_the_full_norm_sees():
    """The parameters that get no gradient are no part of the backward solve."""
    t = torch.tensor([0.0, 4.0], dtype=D)
    how = {"t": t, "rtol": 1e-5, "atol": 1e-6, "adjoint_options": {}}
    assert backward(ours, Wide(), adjoint_params=(), **how)[2] < 0.7 * backward(ours, Wide(), **how)[2]


def test_wrong_adjoint_options():
    f, y0, t = Driven(), start(), times()
    for error, words, options in (
        (ValueError, ("method", "newton"), {"adjoint_method": "newton"}),
        (ValueError, ("adjoint_method", "implicit_adams"), {"adjoint_method": "implicit_adams"}),
        (ValueError, ("adjoint_method", "scipy_solver"), {"adjoint_method": "scipy_solver"}),
        (
            ValueError,
            ("adjoint_options",),
            {"method": "rk4", "options": {"step_size": 0.1}, "adjoint_method": "dopri5"},
        ),
        (TypeError, ("options", "list"), {"adjoint_options": []}),
        (ValueError, ("norm", "seminorm", "vjp_t"), {"adjoint_options": {"norm": lambda y: y[0]}}),
        (ValueError, ("norm", "seminorm"), {"adjoint_options": {"norm": "max"}}),
        (TypeError, ("adjoint_rtol",), {"adjoint_rtol": (1e-3, 1e-3, 1e-3)}),
        (ValueError, ("rtol",), {"adjoint_rtol": -1.0}),
        (ValueError, ("adjoint_rtol", "seminorm"), {"rtol": torch.full((4, 2), 1e-4), "adjoint_options": {}}),
        (ValueError, ("jump_t",), {"adjoint_options": {"jump_t": torch.tensor([0.5])}}),
        (ValueError, ("safety",), {"adjoint_options": {"safety": 2.0}}),
        (ValueError, ("step_size",), {"adjoint_method": "rk4", "adjoint_options": {"step_size": -1.0}}),
        (ValueError, ("perturb",), {"adjoint_method": "rk4", "adjoint_options": {"perturb": True}}),
        (ValueError, ("interp",), {"adjoint_method": "rk4", "adjoint_options": {"interp": "quintic"}}),
        (TypeError, ("adjoint_params",), {"adjoint_params": [1.0]}),
    ):
        with refused(error, *words):
            ours.odeint_adjoint(f, y0, t, **options)
    with refused(ValueError, "complex", "seminorm"):
        ours.odeint_adjoint(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), t, adjoint_options={})
    # A tolerance of each number carries over to its adjoint where the parameters are left out.
    rtol = torch.full((4, 2), 1e-7)
    y = ours.odeint_adjoint(f, y0, t, rtol=rtol, adjoint_options={"norm": "seminorm"})
    close(torch.autograd.grad(y.square().sum(), y0)[0], backward(theirs, Driven())[1][0], 1e-5)


@pytest.mark.parametrize("method, options", [("dopri5", {"step_size": 0.1}), ("rk4", {"eps": 1, "step_size": 0.1})])
def test_unknown_options_of_the_backward_solve_are_warned_of(method, options):
    with pytest.warns(UserWarning, match="adjoint_method .*Unexpected arguments"):
        ours.odeint_adjoint(Driven(), start(), times(), adjoint_method=method, adjoint_options=options)


def test_what_has_no_backward_solve_says_so():
    pytest.importorskip("scipy")
    f, y0 = Driven(), start()
    how = {"rtol": 1e-3, "atol": 1e-3, "adjoint_rtol": 1e-3}
    with pytest.warns(UserWarning, match="adjoint_rtol.*no effect.*tape"):
        y = ours.odeint_adjoint(f, y0, times(), method="explicit_adams", options={"step_size": 0.1}, **how)
    assert y.requires_grad
    with pytest.warns(UserWarning, match="adjoint_rtol.*no effect.*no gradients"):
        ours.odeint_adjoint(f, y0.detach(), times(), method="scipy_solver", **how)
    f.callback_step_adjoint = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_step_adjoint"):
        ours.odeint_adjoint(f, y0, times())
    del f.callback_step_adjoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.odeint_adjoint(f, y0, times(), adjoint_rtol=1e-3, adjoint_options={"norm": "seminorm"})


def test_jumps_backwards():
    """Times at which f jumps are those of the solve: the backward one steps there too."""

    class Jumping(Driven):
        def forward(self, t, y):
            return super().forward(t, y) + (2.0 if t > 0.5 else 0.0)

    jump = {"jump_t": torch.tensor([0.5])}
    mine = backward(ours, Jumping(), options=jump, adjoint_rtol=1e-7)
    its = backward(theirs, Jumping(), options=jump, adjoint_rtol=1e-7)
    for g, other in zip(mine[1], its[1], strict=True):
        close(g, other, 1e-4)
    with_norm = backward(ours, Jumping(), options=jump, adjoint_options={"norm": "seminorm", **jump})
    close(with_norm[1][0], mine[1][0], 1e-5)


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
