"""neuralde.interop.torchdiffeq beside torchdiffeq: grids, prescribed times, norms, callbacks, events."""

from __future__ import annotations

import pytest
import torch
from helpers import close, refused
from test_interop_torchdiffeq import ADAPTIVE, ODEINTS, D, Driven, both, start, times
from torch import nn

import neuralde as nde
from neuralde.interop import torchdiffeq as ours

theirs = pytest.importorskip("torchdiffeq")

FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]


def middle(t):
    """A grid between the ends of t that has not all of its points."""
    return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * torch.tensor([0.1, 0.25, 0.6, 0.7], dtype=D), t[-1:]])


GRIDS = {
    "t": {},
    "even": {"step_size": 0.3},
    "divides": {"step_size": 0.1},
    "own": {"grid_constructor": lambda f, y, t: middle(t)},
}


# -- fixed grids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_grids(method, odeint, grid, backward, interp):
    """The same formulas on the same grid."""
    f, y0 = Driven(), start()
    options = {**GRIDS[grid], "interp": interp}
    (y, own), (expected, other) = both(
        f, y0, times(backward), odeint, list(f.parameters()), method=method, options=options
    )
    close(y, expected, 1e-10)
    for a, b in zip(own, other, strict=True):
        close(a, b, 1e-10)


def test_fixed_grid_of_tuples_and_scalars():
    def f(t, y):
        return -y[1].sum() * t, y[0].expand(2, 1)

    y0 = torch.tensor(1.0, dtype=D, requires_grad=True), torch.ones(2, 1, dtype=D, requires_grad=True)
    (y, own), (expected, other) = both(f, y0, times(), method="rk4", options={"step_size": 0.07})
    for a, b in zip((*y, *own), (*expected, *other), strict=True):
        close(a, b, 1e-10)


def test_grid_constructor_is_given_func_y0_and_t():
    f, y0, t, given = Driven(), start(), times(backward=True), []
    ours.odeint(f, y0, t, method="euler", options={"grid_constructor": lambda *x: given.extend(x) or middle(x[2])})
    assert given[0] is f and torch.equal(given[1], y0) and torch.equal(given[2], t)


@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("perturb", [False, True])
def test_perturb(method, odeint, perturb):
    seen = []
    y0 = start(torch.float32)
    options = {"step_size": 0.5, "perturb": perturb}
    y = odeint(lambda t, y: seen.append(t.item()) or -y, y0, torch.tensor([0.0, 1.0]), method=method, options=options)
    y.sum().backward()
    assert (0.5 in seen) is not perturb and (0.0 in seen) is not perturb
    assert any(abs(t - 0.5) < 1e-6 for t in seen)


# -- prescribed times -----------------------------------------------------------------------------------------------


class Jumping:
    def __init__(self):
        self.calls, self.times = 0, []

    def __call__(self, t, y):
        self.calls += 1
        self.times.append(float(t))
        return -0.5 * y if t < 0.5 else y**2


@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("name", ["jump_t", "grid_points"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_jumps(method, name, odeint):
    y0, t = torch.tensor([0.5, 0.7], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    plain, told, how = Jumping(), Jumping(), {"method": method, "rtol": 1e-6, "atol": 1e-6}
    odeint(plain, y0, t, **how)
    y = odeint(told, y0, t, options={name: torch.tensor([0.5])}, **how)[-1]
    assert told.calls < plain.calls
    at = y0 * torch.exp(torch.tensor(-0.25, dtype=D))
    close(y, at / (1 - 0.5 * at), 1e-3)
    assert any(x < 0.5 and 0.5 - x < 1e-6 for x in told.times) and any(x >= 0.5 and x - 0.5 < 1e-6 for x in told.times)


@pytest.mark.parametrize("backward", [False, True])
def test_step_t_is_stepped_to(backward):
    f, seen, t = Driven(), [], times(backward)[[0, -1]]
    f.callback_accept_step = lambda t, y, dt: seen.append(float(t))
    stops = torch.tensor([1.3, 0.123, 7.0], dtype=D)
    ours.odeint(f, start(), t, rtol=1e-3, atol=1e-3, options={"step_t": stops})
    assert 1.3 in seen and 0.123 in seen


def test_min_and_max_step():
    def sizes(**options):
        f, found = Driven(), []
        f.callback_accept_step = lambda t, y, dt: found.append(float(dt))
        ours.odeint(f, start(), times()[[0, -1]], rtol=1e-7, atol=1e-7, options=options)
        return found

    plain = sizes()
    assert max(sizes(max_step=0.01)) <= 0.01 * (1 + 1e-9) < max(plain)
    least = 1.01 * min(plain)
    assert min(sizes(min_step=least)[:-2]) >= least * (1 - 1e-9)
    # Where torchdiffeq accepts a step that failed its error test, and says nothing.
    with refused(nde.StepSizeUnderflow, "dt_min"):
        sizes(min_step=0.5)


# -- norms and tolerances -------------------------------------------------------------------------------------------


def pair(t, y):
    return torch.sin(t) * y[1].sum(), -y[0] * torch.ones_like(y[1])


PAIR = torch.tensor(1.0, dtype=D), torch.tensor([[2.0, 3.0, 0.5]], dtype=D)


@pytest.mark.parametrize("odeint", ODEINTS)
def test_tuples(odeint):
    y0 = tuple(x.clone().requires_grad_() for x in PAIR)
    (y, own), (expected, other) = both(pair, y0, times(), odeint, rtol=1e-9, atol=1e-9)
    assert isinstance(y, tuple) and y[0].shape == (5,) and y[1].shape == (5, 1, 3)
    for a, b in zip((*y, *own), (*expected, *other), strict=True):
        close(a, b, 1e-6)


def test_tuples_of_mixed_dtypes():
    y = ours.odeint(lambda t, y: (-y[0], -y[1]), (torch.ones(2), torch.ones(3, dtype=D)), times())
    assert y[0].dtype == y[1].dtype == D


def count(solve, f, y0, **options):
    calls = []
    solve(lambda t, y: calls.append(1) or f(t, y), y0, torch.tensor([0.0, 20.0], dtype=D), **options)
    return len(calls)


@pytest.mark.parametrize("norm", [None, lambda y: max(x.abs().max() for x in y), lambda y: y[0].abs()])
def test_norms_make_the_steps_they_make_in_torchdiffeq(norm):
    options = {} if norm is None else {"norm": norm}
    mine, its = (count(x.odeint, pair, PAIR, rtol=1e-6, atol=1e-6, options=options) for x in (ours, theirs))
    assert abs(mine - its) <= 0.1 * its
    rms = count(ours.odeint, pair, PAIR, rtol=1e-6, atol=1e-6, options={"norm": lambda y: torch.zeros(())})
    assert rms < mine / 2


def test_norm_of_one_tensor():
    shapes = []

    def norm(y):
        shapes.append(y.shape)
        return y.abs().max()

    ours.odeint(lambda t, y: -y, torch.tensor(1.0), torch.tensor([0.0, 1.0]), options={"norm": norm})
    assert set(shapes) == {torch.Size([])}


@pytest.mark.parametrize(
    "tolerances",
    [
        {"rtol": (1e-4, 1e-9), "atol": (1e-4, 1e-9)},
        {"rtol": torch.tensor([1e-9, 1e-4]), "atol": 1e-9},
        {"rtol": 1e-6, "atol": (1e-9, torch.tensor([1e-9, 1e-2, 1e-2]))},
    ],
)
def test_tolerances_of_every_tensor(tolerances):
    mine, its = (count(x.odeint, pair, PAIR, **tolerances) for x in (ours, theirs))
    assert abs(mine - its) <= 0.1 * its


def test_tolerances_of_every_number():
    y0 = torch.ones(2, dtype=D)
    f = lambda t, y: y * torch.stack([torch.sin(9 * t), torch.cos(t)])  # noqa: E731
    tight = count(ours.odeint, f, y0, rtol=1e-9, atol=1e-9)
    loose = {"rtol": torch.tensor([1e-3, 1e-9]), "atol": torch.tensor([1e-3, 1e-9])}
    mine, its = (count(x.odeint, f, y0, **loose) for x in (ours, theirs))
    assert abs(mine - its) <= 0.1 * its and mine < tight


# -- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_callbacks_of_adaptive_methods(backward):
    runs = []
    for solve in (ours.odeint, theirs.odeint):
        f, seen = Driven(), []
        for name in ("step", "accept_step", "reject_step"):
            setattr(
                f, f"callback_{name}", lambda t, y, dt, name=name: seen.append((name, float(t), y.shape, float(dt)))
            )
        solve(f, start(), times(backward)[[0, -1]], rtol=1e-6, atol=1e-6, options={"first_step": 0.9})
        runs.append(seen)
    for seen in runs:
        names = [x[0] for x in seen]
        assert names[::2] == ["step"] * (len(names) // 2) and set(names[1::2]) == {"accept_step", "reject_step"}
        assert all(shape == (4, 2) and dt > 0 for _, _, shape, dt in seen)
    for mine, its in zip(*(seen[:6] for seen in runs), strict=True):
        assert mine[0] == its[0] and mine[1] == pytest.approx(its[1]) and mine[3] == pytest.approx(its[3])


@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("method", FIXED)
def test_callback_of_fixed_methods(method, odeint):
    f, seen = Driven(), []
    f.callback_step = lambda t, y, dt: seen.append((float(t), float(dt)))
    odeint(f, start(), times(), method=method)
    assert seen == [pytest.approx(x) for x in ((0.0, 0.3), (0.3, 0.5), (0.8, 0.9), (1.7, 0.3))]
    f.callback_reject_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_reject_step"):
        odeint(f, start(), times(), method=method)


def test_callbacks_see_tuples():
    seen = []

    class F:
        def __call__(self, t, y):
            return pair(t, y)

        def callback_step(self, t, y, dt):
            seen.append(y)

    ours.odeint(F(), PAIR, times())
    assert isinstance(seen[0], tuple) and seen[0][0].shape == () and seen[0][1].shape == (1, 3)


# -- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odeint", ODEINTS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "midpoint"])
def test_event_of_a_sine(method, backward, odeint):
    y0 = torch.tensor([0.0, 1.0], dtype=D)
    t = torch.tensor([0.0, -1.0 if backward else 1.0], dtype=D)
    options = {"step_size": 0.01} if method in FIXED else {}
    at, y = odeint(
        lambda t, y: torch.stack([y[1], -y[0]]),
        y0,
        t,
        method=method,
        options=options,
        event_fn=lambda t, y: y[0] - 0.5,
        rtol=1e-9,
        atol=1e-9,
    )
    sign, third = (-1, 7) if backward else (1, 1)
    assert float(at) == pytest.approx(sign * third * torch.pi / 6, abs=1e-4)
    assert y.shape == (2, 2) and torch.equal(y[0], y0) and float(y[1, 0]) == pytest.approx(0.5, abs=1e-4)


def test_event_functions_of_several_values():
    """The first one to change its sign."""
    f = lambda t, y: torch.ones_like(y)  # noqa: E731
    at, _ = ours.odeint(
        f, torch.zeros(1, dtype=D), times()[:2], event_fn=lambda t, y: torch.stack([y[0] - 3.0, 2.0 - t, y[0] - 7.0])
    )
    assert float(at) == pytest.approx(2.0, abs=1e-6)


def test_event_at_the_start():
    y0 = torch.ones(2, dtype=D)
    at, y = ours.odeint(lambda t, y: y, y0, times()[:2], event_fn=lambda t, y: y[0] - 1.0)
    assert float(at) == 0.0 and torch.equal(y, torch.stack([y0, y0]))


class Ball(nn.Module):
    """A bouncing ball whose radius is a part of the state."""

    def __init__(self):
        super().__init__()
        for name, value in {"gravity": [9.8], "radius": [-1.0], "t0": [0.3], "height": [10.0], "speed": [0.0]}.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=D)))

    def forward(self, t, y):
        return y[1], -self.gravity * (1 + 0.1 * t), torch.zeros_like(y[2])

    def ground(self, t, y):
        return y[0] - torch.exp(y[2])

    def bounces(self, module, odeint, reverse):
        y, t, total = (self.height, self.speed, self.radius), self.t0, 0
        for _ in range(2):
            t, path = module.odeint_event(
                self, y, t, event_fn=self.ground, reverse_time=reverse, odeint_interface=odeint, atol=1e-9, rtol=1e-9
            )
            y = path[0][-1] + 1e-7, -0.8 * path[1][-1], path[2][-1]
            total = total + t + path[1][-1].sum()
        return total.sum()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_bouncing_ball(name, reverse):
    """The gradients of every parameter through two events, their times, and the start time."""
    results = []
    for module in (ours, theirs):
        ball = Ball()
        value = ball.bounces(module, getattr(module, name), reverse)
        value.backward()
        results.append((value, [p.grad for p in ball.parameters()]))
    (value, own), (expected, other) = results
    close(value, expected, 1e-7)
    for a, b in zip(own, other, strict=True):
        close(a, b, 1e-5)


def test_event_arguments():
    f, y0 = Driven(), start()
    with refused(ValueError, "two times"):
        ours.odeint(f, y0, times(), event_fn=lambda t, y: t - 1)
    with refused(ValueError, "step_size"):
        ours.odeint(f, y0, times()[:2], method="rk4", event_fn=lambda t, y: t - 1)
    with refused(ValueError, "perturb"):
        options = {"step_size": 0.1, "perturb": True}
        ours.odeint(f, y0, times()[:2], method="rk4", options=options, event_fn=lambda t, y: t - 1)
    with refused(TypeError, "t0", "float"):
        ours.odeint_event(f, y0, 0.0, event_fn=lambda t, y: t - 1)
    with refused(nde.MaxStepsReached, "max_steps"):
        ours.odeint(f, y0, times()[:2], event_fn=lambda t, y: t + 1, options={"max_num_steps": 20})
