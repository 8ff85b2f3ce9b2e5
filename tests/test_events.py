"""Events: where and when they are, what they do to a sample, and their gradients."""

import math

import pytest
import torch
from helpers import ADAPTIVE, ADJOINTS, CONTROLS, EXACT, close, refused
from torch import nn

import neuralde as nde
import regularizers as reg

ACCURATE = [name for name in ADAPTIVE if nde.solvers.get(name).order >= 3]
NAN = float("nan")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def fall(t, z):
    """A ball under gravity 9.81, z = (height, velocity)."""
    return torch.stack([z[:, 1], torch.full_like(z[:, 1], -9.81)], dim=1)


def circle(t, z):
    """From (1, 0): (cos t, -sin t)."""
    return torch.stack([z[:, 1], -z[:, 0]], dim=1)


def height(t, z):
    return z[:, 0]


def tolerance(solver):
    """A method of order 3 is asked for less, so that it needs hundreds of steps and not thousands."""
    return (1e-6, 1e-4) if nde.solvers.get(solver).order < 5 else (1e-9, 1e-7)


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ACCURATE)
def test_a_ball_hits_the_ground(solver, control):
    z0 = torch.stack([double(1.0, 5.0, 20.0), double(0.0, 3.0, -2.0)], dim=1)
    ground = nde.Event(height)
    solution = nde.solve(nde.ODE(fall), z0, (0.0, 4.0), solver=solver, control=control, events=ground)
    expected = (z0[:, 1] + (z0[:, 1] ** 2 + 2 * 9.81 * z0[:, 0]).sqrt()) / 9.81
    (hit,) = solution.events
    assert len(hit) == 1 and hit.count.tolist() == [1, 1, 1] and hit.mask.all()
    close(hit.t[0], expected, 1e-10)
    close(hit.z[0, :, 1], z0[:, 1] - 9.81 * expected, 1e-10)
    assert float(hit.z[0, :, 0].abs().max()) < 1e-10
    assert torch.equal(solution.final, hit.z[0])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ACCURATE)
def test_zeros_of_a_rotation(solver, control):
    """Every zero of cos t, those where it grows, and those where it falls."""
    rtol, allowed = tolerance(solver)
    events = [nde.Event(height, terminal=False, direction=d) for d in (0, 1, -1)]
    z0 = double([1.0, 0.0], [0.0, -1.0])  # the second one begins on a zero, which does not count
    solution = nde.solve(
        nde.ODE(circle), z0, (0.0, 9.0), solver=solver, control=control, events=events, rtol=rtol, atol=rtol
    )
    everything, rising, falling = solution.events
    half = math.pi / 2
    expected = double([half, 2 * half], [3 * half, 4 * half], [5 * half, NAN])
    close(everything.t[:2], expected[:2], allowed)
    assert everything.count.tolist() == [3, 2] and everything.t[2].isnan().tolist() == [False, True]
    assert float(everything.t[2, 0]) == pytest.approx(5 * half, abs=10 * allowed)
    assert everything.z[2].isnan().all(dim=-1).tolist() == [False, True]
    assert rising.count.tolist() == [1, 1] and falling.count.tolist() == [2, 1]
    assert torch.equal(rising.t[0], torch.stack([everything.t[1, 0], everything.t[0, 1]]))
    assert torch.equal(falling.t[0], torch.stack([everything.t[0, 0], everything.t[1, 1]]))
    close(everything.z[0], double([0.0, -1.0], [0.0, 1.0]), 10 * allowed)


def test_directions_are_along_the_solve():
    """Backward in time, cos t falls where it grows forward."""
    events = [nde.Event(height, terminal=False, direction=d) for d in (1, -1)]
    t = double([0.0, 6.0], [0.0, -6.0])
    solution = nde.solve(nde.ODE(circle), double([1.0, 0.0], [1.0, 0.0]), t, events=events, rtol=1e-9, atol=1e-9)
    rising, falling = (e.t[0] for e in solution.events)
    close(falling, double(math.pi / 2, -math.pi / 2), 1e-7)
    close(rising, double(3 * math.pi / 2, -3 * math.pi / 2), 1e-7)


# -- gradients ---------------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """A condition with parameters, args, the time, and a computed tensor that it closes over."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(double(1.0, 0.3))
        self.leaf = double(0.4).requires_grad_()  # not a Parameter: 1-element, no gradient of its own

    def forward(self, t, z, args):
        return z @ self.weight - torch.tanh(self.leaf) * args["level"][:, 0] + 0.1 * t[:, 0]


class Setup:
    def __init__(self):
        self.inner = nn.Linear(2, 2).double()
        with torch.no_grad():
            self.inner.weight.copy_(double([0.1, -0.4], [0.3, 0.2]))
            self.inner.bias.copy_(double(0.2, -0.1))
        self.condition = Level()
        self.z0 = double([1.0, 0.2], [1.3, -0.2], [0.8, 0.5]).requires_grad_()
        self.args = {"level": double([0.5], [0.3], [0.9]).requires_grad_()}
        self.t = double(0.1, 2.0, 4.0).requires_grad_()

    @property
    def inputs(self):
        return {
            "z0": self.z0,
            "args": self.args["level"],
            "weight": self.inner.weight,
            "bias": self.inner.bias,
            "condition": self.condition.weight,
            "closed over": self.condition.leaf,
            "t": self.t,
        }

    def f(self, t, z, args):
        return circle(t, z) + 0.3 * torch.tanh(self.inner(z)) + 0.1 * args["level"] * torch.cos(t)

    def values(self, **options):
        """Time, state, and what a terminal event leaves: the state that is held."""
        events = [nde.Event(self.condition, terminal=False), nde.Event(lambda t, z: z[:, 0] - z[:, 1] + 1.0)]
        solution = nde.solve(nde.ODE(self.f), self.z0, self.t, args=self.args, events=events, **options)
        first, last = solution.events
        assert first.count.tolist() == [1, 1, 1] and last.count.tolist() == [1, 1, 1]
        weights = double([1.0, -2.0], [0.5, 1.0], [2.0, 0.3])
        return {
            "time": (first.t[0] * double(1.0, 2.0, -0.7)).sum(),
            "state": (first.z[0] * weights).sum(),
            "end": (last.t[0] * double(1.0, 2.0, -0.7)).sum(),
            "held": (solution.final**2 * weights).sum() + (solution.zs[1] * weights).sum(),
        }


@pytest.fixture(scope="module")
def derivatives():
    """Along one direction for every input, by finite differences of whole solves: their grids are free to move."""
    setup = Setup()
    generator = torch.Generator().manual_seed(5)
    found, step = {}, 1e-3
    # (The error test does not see the interpolant, in which events are found and outputs read: so short steps.)
    tight = {"solver": "dopri8", "rtol": 1e-12, "atol": 1e-12, "dt_max": 0.1}
    for name, x in setup.inputs.items():
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        values = {}
        for k in (-2, -1, 1, 2):
            with torch.no_grad():
                x += k * step * direction
                values[k] = {q: float(v) for q, v in setup.values(**tight).items()}
                x -= k * step * direction
        found[name] = (
            direction,
            {q: (8 * (values[1][q] - values[-1][q]) - (values[2][q] - values[-2][q])) / (12 * step) for q in values[1]},
        )
    return found


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver, control", [("dopri8", "joint"), *((s, "per_sample") for s in ("tsit5", "rodas5p"))])
def test_gradients_against_finite_differences(derivatives, solver, control, adjoint):
    setup = Setup()
    values = setup.values(solver=solver, control=control, adjoint=adjoint, rtol=1e-10, atol=1e-10)
    inputs = list(setup.inputs.values())
    for quantity, value in values.items():
        exact = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for (name, (direction, differences)), g in zip(derivatives.items(), exact, strict=True):
            slope = float((g * direction).sum())
            assert slope == pytest.approx(differences[quantity], rel=1e-6, abs=1e-7), (quantity, name)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["vcab3", "auto"])
def test_gradients_of_switching_methods(solver, adjoint):
    """A rotation of speed w from (cos p, -sin p) meets cos = 0 at (π/2 - p)/w."""
    w, p = double(1.3, 0.7).requires_grad_(), double(0.2, -0.4).requires_grad_()
    z0 = torch.stack([torch.cos(p), -torch.sin(p)], dim=1)
    options = {"rtol": 1e-7, "atol": 1e-9, "solver": solver, "adjoint": adjoint}
    solution = nde.solve(
        nde.ODE(lambda t, z, w: w[:, None] * circle(t, z)), z0, (0.0, 5.0), args=w, events=nde.Event(height), **options
    )
    t = solution.events[0].t[0]
    exact = (math.pi / 2 - p) / w
    close(t, exact, 1e-5)
    for found, expected in zip(
        torch.autograd.grad(t.sum(), [w, p], retain_graph=True), torch.autograd.grad(exact.sum(), [w, p]), strict=True
    ):
        close(found, expected, 1e-4)
    for found in torch.autograd.grad(solution.final.sum(), [w, p]):  # it ends at (0, -1), whatever w and p
        assert float(found.abs().max()) < 1e-4


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_ball_bounces_three_times(adjoint):
    """Solve to the ground, turn the velocity, solve again: the start on the ground is no event."""
    drop, gravity, kept = (double(x).requires_grad_() for x in (2.0, 9.81, 0.8))
    z, total = torch.stack([drop, torch.zeros_like(drop)], dim=1), 0.0

    def f(t, z, g):
        return torch.stack([z[:, 1], -g.expand_as(z[:, 1])], dim=1)

    for _ in range(3):
        solution = nde.solve(
            nde.ODE(f), z, (0.0, 5.0), args=gravity, adjoint=adjoint, events=nde.Event(height, direction=-1)
        )
        (hit,) = solution.events
        assert hit.count.tolist() == [1] and bool(hit.t[0, 0] > 0.1)
        total = total + hit.t[0, 0]
        z = hit.z[0] * torch.stack([torch.ones_like(kept), -kept], dim=1)
    exact = (2 * drop / gravity).sqrt()[0] * (1 + 2 * kept + 2 * kept**2)[0]
    close(total, exact, 1e-10)
    inputs = [drop, gravity, kept]
    for found, expected in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(exact, inputs), strict=True):
        close(found, expected, 1e-8)


@pytest.mark.parametrize("control", CONTROLS)
def test_outputs_after_the_end_are_held(control):
    t = double(0.0, 0.2, 0.6, 0.9, 1.3).requires_grad_()
    z0 = double([1.0, 0.0], [30.0, 0.0])  # only the first one gets to the ground
    solution = nde.solve(nde.ODE(fall), z0, t, control=control, events=nde.Event(height))
    hit = solution.events[0]
    assert hit.count.tolist() == [1, 0] and hit.t[0].isnan().tolist() == [False, True]
    end = math.sqrt(2 / 9.81)
    for i in (2, 3, 4):
        assert torch.equal(solution.zs[i, 0], hit.z[0, 0])
    close(solution.zs[:2, 0, 0], 1 - 9.81 / 2 * t[:2].detach() ** 2, 1e-10)
    close(solution.zs[:, 1, 0], 30 - 9.81 / 2 * t.detach() ** 2, 1e-10)
    (g,) = torch.autograd.grad(solution.zs[:, 0, 0].sum(), t, retain_graph=True)
    close(g[1], -9.81 * t[1].detach(), 1e-9)
    assert g[2:].tolist() == [0.0, 0.0, 0.0]
    (g,) = torch.autograd.grad(solution.zs[3, 1, 0], t)
    assert float(g[3]) == pytest.approx(-9.81 * 0.9)
    held = solution(double(0.5, 1.0, 1.3))
    for z in held[:, 0]:
        torch.testing.assert_close(z, double(0.0, -9.81 * end), rtol=0, atol=1e-9)
    close(held[:, 1, 0], 30 - 9.81 / 2 * double(0.5, 1.0, 1.3) ** 2, 1e-10)
    before = double([0.1, 0.3, end - 1e-6], [0.1, 0.3, 1.2])
    close(solution(before)[:, :, 0].T, double([1.0], [30.0]) - 9.81 / 2 * before**2, 1e-8)


# -- many samples ------------------------------------------------------------------------------------------------------

MANY = 100


def crowd(solver):
    """A hundred samples that share nothing: starts, levels, rates, and times in either direction."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    z0 = torch.cat([1.0 + draw(MANY, 1), draw(MANY, 1) - 0.5, draw(MANY, 1)], dim=1)
    most = 1000.0 if solver == "auto" else 30.0
    rate = most ** draw(MANY, 1)
    level = 0.1 + 0.9 * draw(MANY)
    direction = torch.where(torch.arange(MANY) % 3 == 0, -1.0, 1.0)[:, None]
    t = draw(MANY, 1) + direction * torch.cat([draw(MANY, 1) * 0, 0.1 + 0.3 * draw(MANY, 4)], dim=1).cumsum(1)
    return z0, rate, level, t, direction


def crowded(z0, rate, level, t, direction, solver, adjoint, wanted=True):
    z0, rate, level = (x.clone().requires_grad_() for x in (z0, rate, level))

    def f(t, z, args):
        rate, direction = args
        x, v, w = z.split(1, dim=1)
        # The fast component relaxes along the solve, whatever its direction.
        return torch.cat([v, -2 * x - 0.1 * v + 0.1 * w, -rate * direction * (w - torch.cos(x + t))], dim=1)

    events = [
        nde.Event(
            lambda t, z: z[:, 0] - level - torch.sin(12 * t[:, 0]), terminal=False
        ),  # a tensor of the whole batch
        nde.Event(lambda t, z: z[:, 0] - level + 0.6),
        nde.Event(lambda t, z: z[:, 1] - z[:, 2] * 0.5, terminal=False, direction=1),
    ]
    solution = nde.solve(
        nde.ODE(f), z0, t, args=(rate, direction), solver=solver, adjoint=adjoint, events=events, rtol=1e-4, atol=1e-6
    )
    loss = (solution.zs**2).sum() + sum(
        (e.t.nan_to_num() + (e.z.nan_to_num() ** 2).sum(dim=-1)).sum() for e in solution.events
    )
    loss = loss + solution.error.sum()
    if not wanted:
        return solution, ()
    return solution, torch.autograd.grad(loss, [z0, rate, level], materialize_grads=True)


@pytest.mark.parametrize("solver", ["tsit5", pytest.param("vcab3", marks=pytest.mark.slow), "auto"])
def test_a_hundred_samples_are_a_hundred_solves(solver):
    everyone = crowd(solver)
    together, gradients = crowded(*everyone, solver, "checkpointed")
    counts = torch.stack([e.count for e in together.events])
    assert (
        bool((counts.amin(dim=1) < counts.amax(dim=1)).all())
        and int(counts.max()) > 1
        and MANY // 10 < int(counts[1].sum()) < MANY
    )
    assert len(together.events[0].t[0].nan_to_num().unique()) > MANY // 2
    if solver == "auto":
        assert bool((together.stats.jacobians > 0).any()) and bool((together.stats.jacobians == 0).any())
    near = {"rtol": 1e-8, "atol": 1e-10}
    for i in range(MANY):
        taped = i % 10 == 0  # gradients take most of the time
        with torch.set_grad_enabled(taped):
            alone, own = crowded(*(x[i : i + 1] for x in everyone), solver, "direct", wanted=taped)
        assert together.stats.nfe[i] == alone.stats.nfe[0]
        torch.testing.assert_close(together.zs[:, i], alone.zs[:, 0], **near)
        torch.testing.assert_close(together.final[i], alone.final[0], **near)
        for a, b in zip(together.events, alone.events, strict=True):
            n = int(b.count[0])
            assert int(a.count[i]) == n == len(b)
            assert bool(a.mask[:n, i].all()) and not bool(a.mask[n:, i].any())
            torch.testing.assert_close(a.t[:n, i], b.t[:, 0], **near)
            torch.testing.assert_close(a.z[:n, i], b.z[:, 0], **near)
            assert bool(a.t[n:, i].isnan().all()) and bool(a.z[n:, i].isnan().all())
        for g, mine in zip(gradients, own, strict=False):
            torch.testing.assert_close(g[i], mine[0], rtol=1e-5, atol=1e-7)


def test_f_that_needs_the_whole_batch():
    """f and a condition close over tensors of the whole batch, and samples leave at very different times."""
    batch = 40
    speed = torch.linspace(0.5, 60.0, batch, dtype=torch.float64)[:, None]

    def solve(speed):
        return nde.solve(
            nde.ODE(lambda t, z: -speed * z),
            torch.ones(len(speed), 1, dtype=torch.float64),
            (0.0, 3.0),
            events=nde.Event(lambda t, z: z - 0.3 - 0.001 * speed),
            rtol=1e-8,
            atol=1e-10,
        )

    together = solve(speed)
    close(together.events[0].t[0], -torch.log(0.3 + 0.001 * speed[:, 0]) / speed[:, 0], 1e-6)
    for i in (0, 7, batch - 1):
        alone = solve(speed[i : i + 1])
        assert together.stats.nfe[i] == alone.stats.nfe[0]
        torch.testing.assert_close(together.events[0].t[:, i], alone.events[0].t[:, 0], rtol=1e-10, atol=0)


# -- several events ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_the_first_terminal_event_ends_a_sample(control):
    """Terminal at t = 2, 4 and never; a non-terminal one counts until then, though a step sees more of them."""
    stop = double(2.0, 4.0, 50.0)
    events = [
        nde.Event(height, terminal=False),
        nde.Event(lambda t, z: t[:, 0] - stop),
        nde.Event(lambda t, z: t - stop[:, None] - 0.1),  # [batch, 1]; always too late
        nde.Event(lambda t, z: z[:, 0] - 3.0),  # never
    ]
    z0 = double([1.0, 0.0]).expand(3, 2)
    # A step may hold all three kinds: exact to its interpolant all the same.
    solution = nde.solve(
        nde.ODE(circle), z0, (0.0, 6.0), control=control, events=events, rtol=1e-8, atol=1e-8, solver="dopri5"
    )
    zeros, first, late, never = solution.events
    assert zeros.count.tolist() == [1, 1, 2]
    assert first.count.tolist() == [1, 1, 0] and late.count.tolist() == [0, 0, 0]
    assert never.t.shape == (0, 3) and never.z.shape == (0, 3, 2) and len(never) == 0
    assert zeros.t.isnan().tolist() == [[False] * 3, [True, True, False]]
    close(first.t[0, :2], stop[:2], 1e-12)
    ends = stop.clamp(max=6.0)
    close(solution.final, torch.stack([torch.cos(ends), -torch.sin(ends)], dim=1), 1e-6)
    assert repr(zeros) == "Occurrences(4 in 3 of 3 samples)"


def test_order_inside_of_one_step():
    """One step over everything: what comes before the terminal event in it counts, what comes after it doesn't."""
    after, before, end = (nde.Event(lambda t, z, x=x: t[:, 0] - x, terminal=x == 0.5) for x in (0.7, 0.3, 0.5))
    f = nde.ODE(lambda t, z: torch.ones_like(z))
    options = {"dt0": 1.0, "control": nde.StepControl(adaptive=False)}
    z0 = torch.zeros(2, 1, dtype=torch.float64)
    solution = nde.solve(f, z0, double(0.0, 0.4, 0.6, 1.0), events=[after, before, end], **options)
    assert [e.count.tolist() for e in solution.events] == [[0, 0], [1, 1], [1, 1]]
    assert len(solution.steps) == 1
    close(solution.zs[:, 0, 0], double(0.0, 0.4, 0.5, 0.5), 1e-12)
    twice = nde.solve(f, z0, (0.0, 1.0), events=[nde.Event(end.condition), end], **options)
    assert [e.count.tolist() for e in twice.events] == [[1, 1], [1, 1]]  # together


@pytest.mark.parametrize("control", CONTROLS)
def test_nothing_happens(control):
    z0 = double([1.0, 0.0], [0.5, 0.2]).requires_grad_()
    never = nde.Event(lambda t, z: z[:, 0] + 100.0)
    t = torch.linspace(0.0, 3.0, 4, dtype=torch.float64)
    with_event = nde.solve(nde.ODE(circle), z0, t, control=control, events=[never])
    without = nde.solve(nde.ODE(circle), z0, t, control=control)
    assert torch.equal(with_event.zs, without.zs) and torch.equal(with_event.stats.nfe, without.stats.nfe)
    (occurrences,) = with_event.events
    assert occurrences.t.shape == (0, 2) and occurrences.count.tolist() == [0, 0]
    assert without.events == []
    for s in (with_event, without):
        s.gradient = torch.autograd.grad((s.zs**2).sum(), z0)[0]
    assert torch.equal(with_event.gradient, without.gradient)


def test_a_solve_without_gradients():
    with torch.no_grad():
        solution = nde.solve(nde.ODE(fall), double([1.0, 0.0]), (0.0, 2.0), events=nde.Event(height), dense=True)
    assert not solution.events[0].t.requires_grad
    close(solution.events[0].t[0], double(math.sqrt(2 / 9.81)), 1e-9)
    close(solution(0.3)[0, :1], double(1 - 9.81 / 2 * 0.09), 1e-9)


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_structured_states(adjoint, control):
    def f(t, z):
        return {"v": -9.81 + 0 * z["v"], "x": z["v"].flatten(1)[:, :1]}

    start = double([2.0], [3.0]).requires_grad_()
    z0 = {"v": torch.zeros(2, 1, 3, dtype=torch.float64), "x": start}
    solution = nde.solve(
        nde.ODE(f), z0, (0.0, 2.0), control=control, adjoint=adjoint, events=nde.Event(lambda t, z: z["x"])
    )
    hit = solution.events[0]
    exact = (2 * start[:, 0] / 9.81).sqrt()
    close(hit.t[0], exact, 1e-9)
    assert hit.z["v"].shape == (1, 2, 1, 3) and hit.z["x"].shape == (1, 2, 1)
    close(hit.z["v"][0, :, 0, 1], -9.81 * exact, 1e-9)
    close(solution.final["v"][:, 0, 2], -9.81 * exact, 1e-9)
    g, h = (torch.autograd.grad(x.sum(), start)[0] for x in (hit.t, exact))
    close(g, h, 1e-8)


def test_a_tuple_and_the_shape_of_t():
    shapes = []

    def condition(t, z):
        shapes.append((tuple(t.shape), tuple(z[0].shape)))
        return z[0].sum(dim=(1, 2)) - 1.0

    for control in CONTROLS:
        z0 = (torch.full((2, 2, 2), 1.0), torch.zeros(2, 1))
        f = nde.ODE(lambda t, z: (-z[0], torch.ones_like(z[1])))
        solution = nde.solve(f, z0, (0.0, 3.0), control=control, events=nde.Event(condition), rtol=1e-5)
        assert isinstance(solution.events[0].z, tuple)
        close(solution.events[0].z[1][0, :, 0], torch.full((2,), math.log(4.0)), 1e-4)
    assert set(shapes) == {((2, 1, 1), (2, 2, 2))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    z0 = torch.tensor([[1.0, 0.0], [5.0, 0.0]], dtype=dtype, requires_grad=True)
    seen = []

    def condition(t, z):
        seen.append(z.dtype)
        return z[:, 0]

    solution = nde.solve(nde.ODE(fall), z0, (0.0, 3.0), events=nde.Event(condition), rtol=1e-3)
    hit = solution.events[0]
    assert set(seen) == {dtype} and hit.t.dtype == torch.float32 and hit.z.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 4e-2
    exact = (2 * z0[:, 0].detach().float() / 9.81).sqrt()
    close(hit.t[0], exact, near)
    (g,) = torch.autograd.grad(hit.t.sum(), z0)
    close(g[:, 0].float(), exact / (2 * z0[:, 0].detach().float()), near)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_complex_states(adjoint):
    """exp(iwt)·z0 crosses the imaginary axis."""
    w = double(2.0).requires_grad_()
    z0 = torch.tensor([[1.0 + 0j], [0.0 - 2j]], dtype=torch.complex128)
    solution = nde.solve(
        nde.ODE(lambda t, z, w: 1j * w * z),
        z0,
        (0.0, 1.5),
        args=w,
        adjoint=adjoint,
        events=nde.Event(lambda t, z: z.real, direction=-1),
        rtol=1e-10,
        atol=1e-10,
    )
    hit = solution.events[0]
    assert hit.count.tolist() == [1, 0]
    close(hit.t[0, :1], double(math.pi / 4), 1e-8)
    close(hit.z[0, :1, 0], torch.tensor([1j], dtype=torch.complex128), 1e-8)
    (g,) = torch.autograd.grad(hit.t[0, 0], w)
    close(g, double(-math.pi / 8), 1e-7)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_failed_samples_beside_events(adjoint):
    """Sample 1 explodes at t = 1 after one event; sample 2 would, but ends before."""
    z0 = double([-1.0], [1.0], [1.0]).requires_grad_()
    end = double(9.0, 9.0, 2.0)
    events = [nde.Event(lambda t, z: z - 1.5, terminal=False), nde.Event(lambda t, z: z[:, 0] - end)]
    options = {"events": events, "adjoint": adjoint, "rtol": 1e-8, "atol": 1e-10, "max_steps": 200}
    t = double(0.0, 0.25, 0.75, 1.25, 2.0)
    f = nde.ODE(lambda t, z: z**2)
    end[1] = 1e300
    solution = nde.solve(f, z0, t, on_failure="ignore", **options)
    assert solution.converged.tolist() == [True, False, True]
    passing, ending = solution.events
    assert passing.count.tolist() == [0, 1, 1] and ending.count.tolist() == [0, 0, 1]
    close(passing.t[0, 1:], double(1 / 3, 1 / 3), 1e-7)
    close(ending.t[0, 2], double(0.5)[0], 1e-7)
    assert solution.final[1].isnan().all() and solution.zs[3, 1].isnan().all()
    close(solution.zs[2:, 2, 0], double(2.0, 2.0, 2.0), 1e-7)
    close(solution.zs[2, 1], double(4.0), 1e-6)
    loss = passing.t[0, 1] + ending.t[0, 2] + solution.final[[0, 2]].sum()
    (g,) = torch.autograd.grad(loss, z0)
    # t = 1/z0 - 1/1.5, 1/z0 - 1/2, and z0 / (1 - 2 z0)
    close(g[:, 0], double(1 / 9, -1.0, -1.0), 1e-5)
    with pytest.raises(nde.NeuralDEError) as caught:
        nde.solve(f, z0, t, **options)
    assert caught.value.samples == [1]


@pytest.mark.parametrize(
    "condition, error, words",
    [
        (lambda t, z: 1.0, TypeError, ("event 0", "tensor", "float")),
        (lambda t, z: z, ValueError, ("event 0", "one number per sample", "(3, 2)")),
        (lambda t, z: z.sum(), ValueError, ("event 0", "()")),
        (lambda t, z: z[:1, 0], ValueError, ("event 0", "(1,)")),
        (lambda t, z: z[:, 0] + 1j, TypeError, ("event 0", "real", "complex")),
        (lambda t, z: z[:, 0] > 0.5, TypeError, ("event 0", "floating-point", "bool")),
    ],
)
def test_wrong_conditions(condition, error, words):
    with refused(error, *words):
        nde.solve(nde.ODE(circle), torch.ones(3, 2), (0.0, 1.0), events=nde.Event(condition))


def test_wrong_events():
    with refused(TypeError, "condition", "str"):
        nde.Event("z")
    with refused(TypeError, "terminal"):
        nde.Event(height, terminal=1)
    with refused(ValueError, "direction", "2"):
        nde.Event(height, direction=2)
    for wrong in (height, [height], {"a": nde.Event(height)}):
        with refused(TypeError, "events", "nde.Event"):
            nde.solve(nde.ODE(circle), torch.ones(3, 2), (0.0, 1.0), events=wrong)


# -- with the rest of the package --------------------------------------------------------------------------------------


def test_a_layer_has_the_parameters_of_its_conditions():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.5))

        def forward(self, t, z):
            return z[:, 0] - self.level

    condition = Linear()
    layer = nde.NeuralODE(nn.Linear(2, 2), (0.0, 5.0), events=[nde.Event(condition), nde.Event(height)], rtol=1e-4)
    assert any(p is condition.level for p in layer.parameters())
    layer.f.weight.data = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    layer.f.bias.data.zero_()
    layer(torch.ones(3, 2)).sum().backward()
    # Both components are the level at the end.
    assert float(condition.level.grad) == pytest.approx(6.0, rel=1e-3)
    layer.double()(torch.ones(3, 2, dtype=torch.float64))
    assert layer.solution.events[0].t.dtype == torch.float64


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3", "auto", "rosenbrock23"])
def test_replay_has_the_same_events(solver, control):
    z0 = double([1.0, 0.0], [0.4, 0.8], [0.0, -0.3]).requires_grad_()
    k = double(1.0).requires_grad_()
    events = [nde.Event(height, terminal=False), nde.Event(lambda t, z: z[:, 1] - 0.9 * k)]
    t = double(0.0, 2.0, 3.5, 7.0)
    solution = nde.solve(
        nde.ODE(lambda t, z, k: k * circle(t, z)), z0, t, args=k, solver=solver, control=control, events=events
    )
    again = nde.introspection.replay(solution)
    torch.testing.assert_close(again.zs, solution.zs, rtol=1e-11, atol=1e-12)
    points = double(0.5, 5.0, 6.5)
    torch.testing.assert_close(again(points), solution(points), rtol=1e-11, atol=1e-12)
    for a, b in zip(again.events, solution.events, strict=True):
        assert int(b.count.sum()) > 0 and torch.equal(a.mask, b.mask)
        torch.testing.assert_close(a.t, b.t, rtol=1e-11, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(a.z, b.z, rtol=1e-11, atol=1e-12, equal_nan=True)
        for x, y in ((a.t, b.t), (a.z, b.z)):
            both = [torch.autograd.grad(v[~v.isnan()].sum(), [z0, k], retain_graph=True) for v in (x, y)]
            for g, h in zip(*both, strict=True):
                torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("solver", ACCURATE)
def test_dense_output_around_an_event(solver, dense):
    """The interpolant that found the event goes through it."""
    with torch.no_grad():
        solution = nde.solve(
            nde.ODE(circle),
            double([1.0, 0.0], [0.3, 0.7]),
            (0.0, 4.0),
            solver=solver,
            dense=dense,
            events=nde.Event(height),
        )
    hit = solution.events[0]
    torch.testing.assert_close(solution(hit.t.T)[0], hit.z[0], rtol=1e-9, atol=1e-10)
    assert float(solution(hit.t.T)[0, :, 0].abs().max()) < 1e-9


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3"])
def test_an_ended_sample_is_left_where_it_is(solver, adjoint):
    """f must not be asked far beyond a sample's end, though others go on over jumps and stops."""
    seen = []
    end = double(0.3, 9.0, 9.0, 9.0)  # too many go on for the batch to be compacted

    def f(t, z):
        seen.append(float(z.detach()[0]))
        return z

    solution = nde.solve(
        nde.ODE(f),
        torch.ones(4, 1, dtype=torch.float64),
        (0.0, 4.0),
        solver=solver,
        adjoint=adjoint,
        rtol=1e-5,
        dt0=0.1,
        events=nde.Event(lambda t, z: t[:, 0] - end),
        jump_times=[1.0, 2.0],
        step_times=[3.0],
    )
    assert len(set(seen)) > 10 and len(set(seen[-40:])) == 1
    close(solution.final[:, 0], torch.exp(end.clamp(max=4.0)), 1e-4)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_jump_of_f_does_not_move_a_sample_that_ended(solver):
    """It stands still beside the others, in every step of theirs."""
    level = double(0.5, 9.0)
    solution = nde.solve(
        nde.ODE(lambda t, z: torch.where(t > 1.0, -2.0, 1.0) + torch.sin(9 * t) + 0.0 * z),
        torch.zeros(2, 1, dtype=torch.float64),
        (0.0, 2.0),
        solver=solver,
        control="joint",
        events=nde.Event(lambda t, z: z[:, 0] - level),
        jump_times=[1.0],
    )
    where, began = solution.steps.z[:, 0, 0], solution.steps.t[:, 0]
    assert bool((began > 1.0).any())
    stands = where[began >= 1.0]
    assert bool((stands == stands[0]).all())
    close(solution.final[0], level[:1], 1e-9)


# -- what must not pass in silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [lambda x: x.detach(), torch.sign], ids=["detach", "sign"])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_condition_without_a_derivative_has_a_time_but_no_gradient(hidden, adjoint):
    z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    event = nde.Event(lambda t, z: hidden(z[:, 0] - 0.5))
    solution = nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 3.0), events=event, adjoint=adjoint, rtol=1e-8, atol=1e-8)
    (found,) = solution.events
    torch.testing.assert_close(found.t.detach(), torch.full_like(found.t, math.log(2.0)), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(solution.final.detach(), torch.full_like(z0, 0.5), rtol=1e-6, atol=0.0)
    with refused(nde.NeuralDEError, "event 0", "no gradient"):
        found.t.sum().backward()


@pytest.mark.parametrize("adjoint", EXACT)
def test_second_derivatives_of_events_are_refused(adjoint):
    z0 = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    event = nde.Event(lambda t, z: z[:, 0] - 0.5)
    f, how = nde.ODE(lambda t, z: -(z**2)), {"adjoint": adjoint, "rtol": 1e-6}
    solution = nde.solve(f, z0, (0.0, 3.0), events=event, **how)
    (slope,) = torch.autograd.grad(solution.events[0].t.sum(), z0, create_graph=True)
    assert float(slope.detach()) == pytest.approx(0.25, rel=1e-3)
    with refused(nde.NeuralDEError, "first derivatives only"):
        torch.autograd.grad(slope.sum(), z0)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_condition_that_is_not_a_number_is_an_error(control):
    event = nde.Event(lambda t, z: torch.where(z[:, 0] < 0.7, float("nan"), 1.0))
    with refused(ValueError, "event 0", "NaN", "t ="):
        nde.solve(nde.ODE(lambda t, z: -z), torch.ones(2, 1), (0.0, 3.0), events=event, control=control)


@pytest.mark.parametrize("solver", ["tsit5", "vcab3", "rodas5p"])
def test_under_joint_control_an_ended_sample_stands_still(solver):
    """z' = a z² is infinite at t = 1 for the sample that ended at t = 0.5."""
    rate = torch.tensor([[1.0], [0.1]], dtype=torch.float64)
    gradients = {}
    for adjoint in ADJOINTS:
        z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
        solution = nde.solve(
            nde.ODE(lambda t, z: rate * z**2),
            z0,
            torch.tensor([0.0, 0.3, 2.0, 30.0], dtype=torch.float64),
            control="joint",
            solver=solver,
            adjoint=adjoint,
            rtol=1e-7,
            atol=1e-9,
            events=nde.Event(lambda t, z: z[:, 0] - 2.0),
        )
        times = solution.events[0].t
        torch.testing.assert_close(times.detach(), torch.tensor([[0.5, 5.0]]).double(), rtol=1e-6, atol=0.0)
        for held in (solution.zs[2, 0], solution(1.0)[0]):
            assert float(held.detach()) == pytest.approx(2.0)
        again = nde.introspection.replay(solution)
        torch.testing.assert_close(again.error, solution.error, rtol=1e-9, atol=0.0)
        gradients[adjoint] = torch.autograd.grad(times.sum() + solution.zs.sum(), z0, retain_graph=True)[0]
        if adjoint in EXACT:
            # Of the same steps: two solves' differ by the rounding of their first estimates, which are tiny.
            again = nde.introspection.replay(solution, z0=z0)
            found, expected = (torch.autograd.grad(s.error.sum(), z0)[0] for s in (solution, again))
            close(found, expected, 1e-9)
    for adjoint in ADJOINTS:
        close(gradients[adjoint], gradients["direct"], 1e-9 if adjoint in EXACT else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", [0, -1])
def test_going_on_from_an_event_does_not_find_it_again(dtype, direction):
    """A bouncing ball, restarted where it was found, whichever side of the ground rounding left it on."""
    fall = nde.ODE(lambda t, z: torch.stack([z[:, 1], torch.full_like(z[:, 1], -9.81)], dim=1))
    z, t = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=dtype), torch.zeros(2, dtype=dtype)
    first = (2.0 * z[:, 0] / 9.81).sqrt()
    event = nde.Event(lambda t, z: z[:, 0], direction=direction)
    for bounce in range(6):
        solution = nde.solve(fall, z, (t, 100.0), events=event)
        t, z = solution.events[0].t[0], solution.final * torch.tensor([1.0, -0.7], dtype=dtype)
        expected = first * (1.0 + 2.0 * sum(0.7**k for k in range(1, bounce + 1)))
        torch.testing.assert_close(t, expected, rtol=1e-4 if dtype is torch.float32 else 1e-10, atol=0.0)


def test_no_events_are_none():
    assert nde.solve(nde.ODE(lambda t, z: -z), torch.ones(1, 1), (0.0, 1.0), events=[]).events == []


@pytest.mark.parametrize("control", CONTROLS)
def test_the_end_of_every_sample(control):
    z0 = torch.tensor([[1.0], [0.2]], dtype=torch.float64)
    event = nde.Event(lambda t, z: z[:, 0] - 0.5)
    solution = nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 3.0), events=event, control=control, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.t_end, double(math.log(2.0), 3.0), rtol=1e-6, atol=0.0)


def test_a_local_penalty_looks_at_no_time_after_the_end():
    z0 = torch.tensor([[1.0], [0.2]], dtype=torch.float64)
    event = nde.Event(lambda t, z: z[:, 0] - 0.5)
    solution = nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 3.0), events=event)
    drawn = torch.stack([reg.LocalError().sample(solution) for _ in range(50)])
    assert drawn[:, 0].max() <= math.log(2.0) + 1e-3 < 2.0 < drawn[:, 1].max()
