"""Where steps end, how large they may be, and who is told of them."""

import math

import pytest
import torch
from helpers import ADAPTIVE, ADJOINTS, CONTROLS, DENSE, EXACT, FIXED, SOLVERS, close, options, refused

import neuralde as nde

INF = float("inf")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def circle(t, z):
    return torch.stack([z[:, 1], -z[:, 0]], dim=1)


def staircase(t, z, jumps):
    """dz/dt is 1, then -3, then 2; the jumps are [batch, 2], inf where there is none."""
    t = t.expand(len(z), 1)
    slope = torch.where(t < jumps[:, :1], 1.0, torch.where(t < jumps[:, 1:], -3.0, 2.0))
    return slope.to(z).expand_as(z)


def climbed(t, jumps):
    """The staircase's solution from 0 at t = 0, [points, batch]; t [points, 1]."""
    first, second = jumps.T
    return t.minimum(first) - 3 * (t.minimum(second) - first).clamp(min=0) + 2 * (t - second).clamp(min=0)


# -- jumps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_jumps_are_met_exactly(solver, control, backward):
    """Every method is exact for a constant slope: whatever is off comes from a step across a jump."""
    jumps = double([0.7, 1.9], [0.3, INF], [1.1, 1.3])
    if control == "joint":
        jumps = double([0.7, 1.9]).expand(3, 2)
    given = jumps[0] if control == "joint" else jumps
    t = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    exact = climbed(t[:, None], jumps)
    z0, t = (exact[-1], t.flip(0)) if backward else (exact[0], t)
    solution = nde.solve(
        nde.ODE(staircase),
        z0[:, None],
        t,
        args=jumps,
        jump_times=given,
        control=control,
        **options(solver, dt0=0.13),
    )
    close(solution.zs[:, :, 0], exact.flip(0) if backward else exact, 1e-11)
    assert not solution.stats.rejected.any()
    for sample, times in enumerate(jumps):
        starts = solution.steps.t[solution.steps.mask[:, sample], sample]
        for x in times[times < 3.0]:
            assert bool((starts == x).any())
    # A step without jump_times goes over one, if it is not by chance: the control of this test.
    if solver in FIXED and not backward and control == "per_sample":
        over = nde.solve(nde.ODE(staircase), z0[:, None], t, args=jumps, **options(solver, dt0=0.13))
        assert float((over.zs[:, :, 0] - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_solution_next_to_jumps(solver, control, dense):
    jumps = double([0.7, 1.9]).expand(2, 2)
    with torch.no_grad():
        solution = nde.solve(
            nde.ODE(staircase),
            torch.zeros(2, 1, dtype=torch.float64),
            (0.0, 3.0),
            args=jumps,
            jump_times=[0.7, 1.9, 7.0, -1.0],
            control=control,
            solver=solver,
            dense=dense,
        )
        t = double(0.69, 0.7 - 1e-9, 0.7, 0.7 + 1e-9, 0.71, 1.89, 1.9, 1.91)
        close(solution(t)[:, :, 0], climbed(t[:, None], jumps), 1e-11)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_jumps_at_the_ends(solver, control):
    """Only the values from within the horizon count; they are the ones between 1 and 2."""

    def f(t, z):
        return torch.where((t > 1.0) & (t < 2.0), 1.0, 1000.0).to(z).expand_as(z)

    for t in ((1.0, 2.0), (2.0, 1.0)):
        solution = nde.solve(
            nde.ODE(f),
            torch.zeros(2, 1, dtype=torch.float64),
            t,
            jump_times=[1.0, 2.0],
            control=control,
            **options(solver),
        )
        close(solution.final, torch.full((2, 1), t[1] - t[0], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["dopri5", "vcab3", "auto", "rodas5p", "rk4"])
def test_gradients_across_jumps(solver, control, adjoint):
    """dz/dt = a·z until the jump, b·z after it."""
    c = double(0.6, 0.6) if control == "joint" else double(0.6, 1.1)
    a, b = double(-0.5).requires_grad_(), double(0.8).requires_grad_()
    z0 = double([1.0], [2.0]).requires_grad_()
    accuracy = {"rtol": 1e-7, "atol": 1e-9} if solver in ADAPTIVE else {}

    def f(t, z, args):
        a, b = args
        return torch.where((t if t.dim() else t.expand(2, 1)) < c[:, None], a, b) * z

    solution = nde.solve(
        nde.ODE(f),
        z0,
        (0.0, 2.0),
        args=(a, b),
        jump_times=c[:1] if control == "joint" else c[:, None],
        control=control,
        adjoint=adjoint,
        **accuracy,
        **options(solver, dt0=0.02),
    )
    exact = z0[:, 0] * torch.exp(a * c + b * (2.0 - c))
    close(solution.final[:, 0], exact, 1e-6)
    inputs = [a, b, z0]
    found = torch.autograd.grad((solution.final**2).sum(), inputs, retain_graph=True)
    for g, h in zip(found, torch.autograd.grad((exact**2).sum(), inputs), strict=True):
        close(g, h, 1e-5)
    # Outputs between the steps have theirs too, on either side.
    for t in (0.5, 0.65) if adjoint in DENSE else ():
        (g,) = torch.autograd.grad(solution(t)[0, 0], b, retain_graph=True, allow_unused=True, materialize_grads=True)
        late = max(t - 0.6, 0.0)
        assert float(g) == pytest.approx(late * math.exp(-0.3 + 0.8 * late) if late else 0.0, rel=1e-4, abs=1e-9)


def test_float32_jumps():
    jumps = torch.tensor([[0.7, 1.9]]).expand(3, 2)
    solution = nde.solve(nde.ODE(staircase), torch.zeros(3, 1), (0.0, 3.0), args=jumps, jump_times=jumps)
    close(solution.final[:, 0], climbed(torch.tensor([[3.0]]), jumps)[0], 1e-5)
    assert not solution.stats.rejected.any()


# -- step times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_end_at_step_times(solver, control):
    own = double([0.31, 0.9], [0.5, INF], [1.77, 0.2])  # in any order
    given = own[0] if control == "joint" else own
    solution = nde.solve(
        nde.ODE(circle),
        double([1.0, 0.0]).expand(3, 2),
        (0.0, 2.0),
        step_times=given,
        control=control,
        rtol=1e-3,
        atol=1e-3,
        **options(solver, dt0=0.1),
    )
    steps = solution.steps
    for sample in range(3):
        starts = steps.t[steps.mask[:, sample], sample]
        ends = starts + steps.dt[steps.mask[:, sample], sample]
        for x in (own[0] if control == "joint" else own[sample]).tolist():
            assert bool((starts == x).any()) == (x < 2.0)
        close(ends[:-1], starts[1:], 1e-14)
        assert float(ends[-1]) == pytest.approx(2.0, abs=1e-14)
    # Where steps end, f is smooth: nothing else changes.
    near = 0.2 if nde.solvers.get(solver).order == 1 else 0.02
    close(solution.final, double([math.cos(2.0), -math.sin(2.0)]).expand(3, 2), near)


def test_step_times_and_jump_times_together():
    seen = []

    def f(t, z):
        seen.extend(t.flatten().tolist())
        return torch.where(t < 1.0, 1.0, 5.0) * torch.ones_like(z)

    z0 = torch.zeros(2, 1, dtype=torch.float64)
    solution = nde.solve(nde.ODE(f), z0, (0.0, 2.0), jump_times=[1.0], step_times=double([0.5], [1.5]), dt0=0.1)
    close(solution.final, double([6.0], [6.0]), 1e-12)
    assert 0.5 in seen and 1.5 in seen and 1.0 not in seen
    assert math.nextafter(1.0, 0.0) in seen and math.nextafter(1.0, 2.0) in seen


@pytest.mark.parametrize("name", ["jump_times", "step_times"])
def test_wrong_stops(name):
    def solve(value, **more):
        return nde.solve(nde.ODE(circle), torch.ones(3, 2), (0.0, 1.0), **{name: value}, **more)

    with refused(ValueError, name, "[batch, times] = [3, ...]", "(2, 2)"):
        solve(torch.zeros(2, 2))
    with refused(ValueError, name, "()"):
        solve(0.5)
    with refused(ValueError, name, "NaN"):
        solve([0.5, float("nan")])
    with refused(TypeError, name):
        solve("0.5")
    with refused(ValueError, name, 'control="joint"'):
        solve(torch.tensor([[0.1], [0.2], [0.3]]), control="joint")
    assert bool(solve(torch.zeros(3, 0)).converged.all())
    assert bool(solve(torch.full((3, 1), 0.5), control="joint").converged.all())


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_least_step_is_kept_or_complained_about(solver, control):
    z0 = double([1.0, 0.0], [0.0, 1.0])
    given = {"solver": solver, "control": control, "rtol": 1e-10, "atol": 1e-10, "dt_min": 0.8}
    with refused(nde.StepSizeUnderflow, "dt_min") as caught:
        nde.solve(nde.ODE(circle), z0, (0.0, 5.0), **given)
    # It is the bound that ended it, at a step of that size that failed.
    assert all(dt == pytest.approx(0.8) for dt in caught.value.dt) and min(caught.value.error) > 1.0
    solution = nde.solve(nde.ODE(circle), z0, (0.0, 5.0), on_failure="ignore", **given)
    assert not solution.converged.any() and solution.final.isnan().all()
    assert float(solution.steps.error.detach().max() if len(solution.steps) else 0.0) <= 1.0


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_bounds_of_every_step(solver, control):
    z0 = double([1.0, 0.0], [0.0, 1.0])
    given = {"solver": solver, "control": control, "rtol": 1e-1, "atol": 1e-1}
    for t in ((0.0, 3.0), (3.0, 0.0)):
        for dt0 in (None, 2.0):
            steps = nde.solve(nde.ODE(circle), z0, t, dt_max=0.07, dt0=dt0, **given).steps
            assert float(steps.dt.abs().max()) <= 0.07 * (1 + 1e-12) and len(steps) >= 42
    if nde.solvers.get(solver).order > 1:
        steps = nde.solve(nde.ODE(circle), z0, (0.0, 3.0), dt_min=0.05, dt0=1e-4, **given).steps
        assert float(steps.dt[0].min()) >= 0.05


def test_a_failure_at_the_least_step_ends_that_sample_alone():
    rate = double([1.0], [50.0])
    z0 = torch.ones(2, 1, dtype=torch.float64)
    given = {"args": rate, "rtol": 1e-6, "atol": 1e-9, "dt_min": 0.05, "dt0": 0.06, "on_failure": "ignore"}
    solution = nde.solve(nde.ODE(lambda t, z, rate: -rate * z), z0, (0.0, 1.0), **given)
    assert solution.converged.tolist() == [True, False]
    assert int(solution.status[1]) == nde.Status.STEP_SIZE_UNDERFLOW
    assert float(solution.final[0]) == pytest.approx(math.exp(-1.0), rel=1e-5)


@pytest.mark.parametrize("name", ["dt_min", "dt_max"])
def test_wrong_bounds(name):
    def solve(**more):
        return nde.solve(nde.ODE(circle), torch.ones(3, 2), (0.0, 1.0), **more)

    for wrong in (0.0, -0.1, INF, float("nan")):
        with refused(ValueError, name, "positive"):
            solve(**{name: wrong})
    for wrong in ("0.1", True, torch.tensor([0.1, 0.2, 0.3])):
        with refused(TypeError, name):
            solve(**{name: wrong})
    for more in ({"solver": "rk4"}, {"control": nde.StepControl(adaptive=False)}):
        with refused(ValueError, name, "dt0"):
            solve(**{name: 0.1}, dt0=0.1, **more)
    with refused(ValueError, "dt_min", "dt_max", "0.2", "0.1"):
        solve(dt_min=0.2, dt_max=0.1)


# -- observers ---------------------------------------------------------------------------------------------------------


class Observer:
    def __init__(self):
        self.told = {"attempt": [], "accept": [], "reject": []}

    def attempt(self, t, z, dt):
        self.told["attempt"].append((t.clone(), z, dt.clone()))

    def accept(self, t, z, dt):
        self.told["accept"].append((t.clone(), z, dt.clone()))

    def reject(self, t, z, dt):
        self.told["reject"].append((t.clone(), z, dt.clone()))

    def all(self, kind, what):
        found = [x[what]["x"] if isinstance(x[what], dict) else x[what] for x in self.told[kind]]
        return torch.cat(found) if found else torch.zeros(0)


def sharp(t, z):
    """A fast passage in the middle: steps that have grown are rejected there."""
    t = t if t.dim() else t.expand(len(z["x"]), 1)
    return {"x": -z["x"] * (1 + 50 * torch.exp(-200 * (t - 1.0) ** 2))}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_observer_is_told_of_every_attempt(solver, control, adjoint):
    observer = Observer()
    x = double([1.0], [3.0], [-2.0], [0.5], [7.0]).requires_grad_()
    z0 = {"x": x}
    t = (0.0, 2.0) if control == "joint" else torch.stack([torch.zeros(5), double(0.2, 2.0, 2.0, 1.5, 0.1)], dim=1)
    solution = nde.solve(
        nde.ODE(sharp), z0, t, solver=solver, control=control, adjoint=adjoint, observer=observer, rtol=1e-2
    )
    stats, steps = solution.stats, solution.steps
    size = 1 if control == "joint" else 5
    wanted = {"accept": stats.accepted[:size].sum(), "reject": stats.rejected[:size].sum()}
    wanted["attempt"] = wanted["accept"] + wanted["reject"]
    for kind, count in wanted.items():
        assert len(observer.all(kind, 0)) == len(observer.all(kind, 2)) == int(count)
        assert len(observer.all(kind, 1)) == int(count) * 5 // size
        assert all(not z["x"].requires_grad and set(z) == {"x"} for _, z, _ in observer.told[kind])
    assert int(wanted["reject"]) > 0
    # What was accepted is the grid, with its states.
    mask = steps.mask[:, :size]
    found = torch.stack([observer.all("accept", i).double() for i in (0, 2)], dim=1)
    grid = torch.stack([steps.t[:, :size][mask], steps.dt[:, :size][mask]], dim=1)

    def ordered(x):
        return x[sorted(range(len(x)), key=lambda i: x[i].tolist())]

    torch.testing.assert_close(ordered(found), ordered(grid), rtol=0, atol=0)
    states = steps.z["x"].detach()[steps.mask].flatten().sort().values
    again = 0 if adjoint in DENSE else 1e-12  # made again, beside other samples: up to rounding
    torch.testing.assert_close(observer.all("accept", 1)[:, 0].sort().values, states, rtol=again, atol=again)
    before = sum(map(len, observer.told.values()))
    loss = (solution.final["x"] ** 2).sum()
    torch.autograd.grad(loss + solution.error.sum() if adjoint in EXACT else loss, x)
    nde.introspection.replay(solution)
    assert sum(map(len, observer.told.values())) == before  # a replay is no attempt


def test_an_observer_with_some_of_the_methods():
    class Accepted:
        count = 0

        def accept(self, t, z, dt):
            self.count += len(t)

    observer = Accepted()
    z0 = torch.ones(3, 2)
    solution = nde.solve(nde.ODE(circle), z0, (0.0, 5.0), observer=observer, dt0=2.0)
    assert observer.count == int(solution.stats.accepted.sum()) and int(solution.stats.rejected.sum()) > 0
    assert bool(nde.solve(nde.ODE(circle), z0, (0.0, 1.0), observer=object()).converged.all())


@pytest.mark.parametrize("solver", [name for name, s in nde.solvers.SOLVERS.items() if s.linearizes])
def test_jump_times_cost_a_method_with_a_jacobian_nothing(solver):
    """The derivative of f by t is the same whether or not a stage could be moved off a jump."""
    equation, z0 = nde.ODE(lambda t, z: torch.cos(t) * z), torch.ones(1, 1, dtype=torch.float64)
    how = {"solver": solver, "rtol": 1e-5 if nde.solvers.get(solver).order > 1 else 1e-2, "atol": 1e-8}
    plain = nde.solve(equation, z0, (0.0, 3.5), **how)
    beyond = nde.solve(equation, z0, (0.0, 3.5), jump_times=[100.0], **how)
    assert torch.equal(plain.final, beyond.final) and torch.equal(plain.stats.nfe, beyond.stats.nfe)
    inside = nde.solve(equation, z0, (0.0, 3.5), jump_times=[1.3], **how)
    assert int(inside.stats.accepted) < 1.3 * int(plain.stats.accepted) + 10


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_times_at_a_jump_have_the_derivative_of_their_own_side(adjoint):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for jump in (0.0, 1.0):
        after = nde.ODE(lambda t, z, jump=jump: torch.where(t > jump if jump == 0.0 else t < jump, 2.0, 5.0) + 0.0 * z)
        final = nde.solve(after, torch.zeros(1, 1).double(), t, jump_times=[jump], adjoint=adjoint).final
        torch.testing.assert_close(torch.autograd.grad(final.sum(), t)[0], torch.tensor([-2.0, 2.0]).double())
