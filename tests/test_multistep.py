"""Methods whose samples change parts: vcab3, which starts with bs3, and auto, which goes between tsit5 and rodas5p."""

import itertools

import numpy as np
import pytest
import torch
from helpers import CONTROLS, EXACT, Counted, close
from problems import rotating, rotating_exact, van_der_pol

import neuralde as nde
import regularizers as reg
from neuralde.solvers.base import Past

FIXED = nde.StepControl(adaptive=False)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def circle(t, z):
    return torch.stack([z[:, 1], -z[:, 0]], dim=1)


def wavy(t, z, k):
    """Coupled, non-linear, non-autonomous; k is [batch, 1] or a number."""
    return k * circle(t, z) + 0.3 * torch.cos(2 * z) + 0.2 * torch.sin(3 * t)


def starts():
    return double([1.0, 0.0], [0.2, -1.3], [2.0, 0.7], [-0.4, 0.6])


# -- vcab3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_exact_for_polynomials_on_any_grid(control):
    """F of degree 2 in t: the divided differences see all of it, whatever the steps are."""
    generator = torch.Generator().manual_seed(4)
    stops = torch.rand(4, 12, generator=generator, dtype=torch.float64) * 3
    stops = stops[0] if control == "joint" else stops

    def f(t, z):
        return (1 - 2 * t + 3 * t**2).expand(4, 1) * torch.ones_like(z)

    solution = nde.solve(
        nde.ODE(f), starts()[:, :1], (0.0, 3.0), solver="vcab3", step_times=stops, control=control, dt0=0.2
    )
    steps = solution.steps
    for b in range(4):
        dt = steps.dt[steps.mask[:, b], b]
        assert len(dt) > 12 and float(dt.max() / dt.min()) > 5
        z, t = steps.z[steps.mask[:, b], b, 0], steps.t[steps.mask[:, b], b]
        close(z, starts()[b, 0] + t - t**2 + t**3, 1e-13)
    close(solution.final, starts()[:, :1] + 3 - 9 + 27, 1e-13)


def test_not_exact_beyond():
    """The control of the test above: t³ is one degree too many."""
    solution = nde.solve(
        nde.ODE(lambda t, z: 4 * t**3 * torch.ones_like(z)),
        torch.zeros(1, 1, dtype=torch.float64),
        (0.0, 3.0),
        solver="vcab3",
        control=FIXED,
        dt0=0.1,
    )
    assert abs(float(solution.final) - 81.0) > 1e-3


def test_order_of_the_adams_part():
    """With exact slopes before it, on steps of three sizes: local order 4, its error estimate's is 3."""
    adams = nde.solvers.get("vcab3").parts[1]
    sizes, errors, estimates = (0.08, 0.04, 0.02, 0.01), [], []
    for h in sizes:
        t = double(1.0)
        before = [t - 0.7 * h, t - 2.0 * h]
        slopes = [rotating(x[:, None], rotating_exact(x)) for x in before]
        past = Past(torch.stack(slopes), torch.stack([double(0.7 * h), double(1.3 * h)]))

        class Plain:
            @staticmethod
            def times(t, c=None, dt=None):
                return (t[:, None],)

            def __call__(self, t, z):
                return rotating(t, z)

        step = adams.attempt(Plain(), t, double(h), rotating_exact(t), None, None, past=past)
        errors.append(float((step.z - rotating_exact(t + h)).norm()))
        estimates.append(float(step.error.norm()))
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] - 4) < 0.1
    assert abs(np.polyfit(np.log(sizes), np.log(estimates), 1)[0] - 3) < 0.1


@pytest.mark.parametrize("dt0", [None, 0.7])
@pytest.mark.parametrize("control", CONTROLS)
def test_evaluations(control, dt0):
    """After the start, one for an accepted step and none for a rejected one; bs3 takes three, accepted or not."""
    f = Counted(lambda t, z: -3 * z * (1 + 30 * torch.exp(-3000 * (t - 1.5) ** 2)))
    rejected_at = {"bs3": 0, "adams": 0}
    accepted = 0

    class Observer:
        def accept(self, t, z, dt):
            nonlocal accepted
            accepted += 1

        def reject(self, t, z, dt):
            rejected_at["bs3" if accepted < 2 else "adams"] += 1

    with torch.no_grad():
        solution = nde.solve(
            nde.ODE(f),
            torch.ones(1, 1, dtype=torch.float64),
            (0.0, 2.0),
            solver="vcab3",
            control=control,
            dt0=dt0,
            observer=Observer(),
            rtol=1e-4,
        )
    stats = solution.stats
    assert rejected_at["adams"] > 0 and (dt0 is None) == (rejected_at["bs3"] == 0)
    expected = 1 + (dt0 is None) + 3 * (2 + rejected_at["bs3"]) + (accepted - 2)
    assert int(stats.nfe[0]) == f.calls == stats.function_calls == expected
    assert int(stats.accepted) == accepted and int(stats.rejected) == sum(rejected_at.values())


@pytest.mark.parametrize("control", CONTROLS)
def test_a_jump_starts_again(control):
    """Two steps of bs3 after each jump, and slopes from before it are of no use."""

    def f(t, z):
        return torch.where(t < 1.0, -z, 3 - z)

    given = {"solver": "vcab3", "control": control, "rtol": 1e-6, "atol": 1e-8, "dt0": 0.01}
    z0 = double([1.0], [1.0])
    solution = nde.solve(nde.ODE(f), z0, (0.0, 2.0), jump_times=[1.0], **given)
    (jump,) = (solution.steps.t[:, 0] == 1.0).nonzero().flatten().tolist()
    parts = [pieces[0][0] for pieces in solution._outcome.trajectory.grid.parts]
    assert parts == [int(j not in (0, 1, jump, jump + 1)) for j in range(len(parts))]
    n = len(parts)
    # Slope at the start and after the jump, three for each step of bs3.
    expected = 2 + 4 * 3 + (n - 4)
    assert solution.stats.rejected.any() or solution.stats.nfe.tolist() == [expected, expected]
    exact = 3 - (3 - torch.exp(double(-1.0))) * torch.exp(double(-1.0))
    close(solution.final, exact.expand(2, 1), 1e-5)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_error_by_hand(control):
    """The estimate is what the method of order 3 adds to that of order 2, from the grid's states and sizes."""
    rtol, atol = 1e-3, 1e-4
    k = 1.5
    solution = nde.solve(
        nde.ODE(lambda t, z: wavy(t, z, k)), starts(), (0.0, 2.0), solver="vcab3", control=control, rtol=rtol, atol=atol
    )
    steps, size = solution.steps, 4 if control == "joint" else 1
    checked = 0
    for first in range(0, 4, size):
        rows = slice(first, first + size)
        n = int(steps.mask[:, first].sum())
        z = torch.cat([steps.z[:n, rows], solution.final[None, rows]])
        t, dt = steps.t[:n, first], steps.dt[:n, first]
        slopes = [wavy(t[j], z[j], k) for j in range(n)]
        for j in range(2, n):
            h, h1, h2 = (float(dt[j - i]) for i in range(3))
            newer, older = (slopes[j] - slopes[j - 1]) / h1, (slopes[j - 1] - slopes[j - 2]) / h2
            # The integrals of (s) and s(s + h1) over the step: Newton's form of the interpolation of f.
            second = z[j] + h * slopes[j] + h**2 / 2 * newer
            third = second + (h**3 / 3 + h**2 / 2 * h1) * (newer - older) / (h1 + h2)
            close(z[j + 1], third, 1e-11)
            scaled = (third - second) / (atol + rtol * torch.maximum(z[j].abs(), z[j + 1].abs()))
            assert float(steps.error[j, first]) == pytest.approx(float((scaled**2).mean().sqrt()), rel=1e-6)
            checked += 1
    assert checked > 10 * (4 // size)


def test_rejected_starts_leave_the_history_alone():
    """A first step far too large for one sample: the others' parts do not wait, its own has two accepted steps."""
    k = double([1.0], [40.0], [1.0], [5.0])
    given = {"solver": "vcab3", "rtol": 1e-4, "atol": 1e-6, "dt0": 0.3}
    together = nde.solve(nde.ODE(wavy), starts(), (0.0, 2.0), args=k, **given)
    assert together.stats.rejected[1] > 2
    for i in range(4):
        alone = nde.solve(nde.ODE(wavy), starts()[i : i + 1], (0.0, 2.0), args=k[i : i + 1], **given)
        assert together.stats.nfe[i] == alone.stats.nfe[0]
        parts = [pieces[0][0] for pieces in alone._outcome.trajectory.grid.parts]
        assert parts[:3] == [0, 0, 1] and set(parts[2:]) == {1}
        torch.testing.assert_close(together.final[i], alone.final[0], rtol=1e-10, atol=1e-12)


# -- gradients ---------------------------------------------------------------------------------------------------------


def stiff_between(t, z, args):
    """Stiff for t in [1, 2] only; rate is how much so, [batch, 1]."""
    rate, k = args
    fast = 2.0 + rate * torch.sigmoid(30 * (t - 1.0)) * torch.sigmoid(30 * (2.0 - t))
    x, y = z.split(1, dim=1)
    return torch.cat([-fast * (x - torch.cos(k * t)) + 0.1 * y, -k * y + torch.sin(x)], dim=1)


PROBLEMS = {
    "vcab3": (lambda t, z, args: wavy(t, z, args[0] * args[1]), double([1.0], [1.7], [9.0], [0.3]), 2.0, 1e-3),
    "auto": (stiff_between, double([0.0], [700.0], [2000.0], [1000.0]), 3.0, 1e-4),
}


def solved(solver, control, adjoint):
    f, rate, end, rtol = PROBLEMS[solver]
    given = {"solver": solver, "control": control, "adjoint": adjoint, "rtol": rtol, "atol": 1e-2 * rtol}
    k, z0 = double(1.2).requires_grad_(), starts().requires_grad_()
    t = torch.linspace(0.0, end, 5, dtype=torch.float64)
    dt0 = 0.4 if solver == "vcab3" else None  # rejected at first where f is fast
    return nde.solve(nde.ODE(f), z0, t, args=(rate, k), dt0=dt0, **given), [z0, k]


def quantities(solution):
    found = {
        "final": lambda s: (s.final**2).sum(),
        "zs": lambda s: (s.zs**3).sum(),
        "GlobalError": reg.GlobalError(),
        "solution(t)": lambda s: (s(torch.tensor([0.3, 1.1, 1.6], dtype=torch.float64)) ** 2).sum(),
    }
    if solution.solver.reports_stiffness:
        found["GlobalStiffness"] = reg.GlobalStiffness()
    else:
        found["unscaled"] = reg.GlobalError(scaled=False)  # steps made again, with their history
    return found


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", PROBLEMS)
def test_gradients(solver, control):
    """Against finite differences on the frozen grid, and each adjoint against the tape of its own steps."""
    solutions = {adjoint: solved(solver, control, adjoint) for adjoint in EXACT}
    frozen, (z0, k) = solutions["direct"]
    pieces = frozen._outcome.trajectory.grid.parts
    assert {part for piece in pieces for part, _ in piece} == {0, 1}
    if control == "per_sample":
        assert any(len(piece) == 2 for piece in pieces) or solver == "vcab3"
    rate = PROBLEMS[solver][1]
    exact = {
        (a, q): torch.autograd.grad(figure(s), inputs, retain_graph=True)
        for a, (s, inputs) in solutions.items()
        for q, figure in quantities(s).items()
    }
    for a, (s, (start, factor)) in solutions.items():
        # (Two solves' steps differ by rounding in error estimates, which is much where the problem is stiff.)
        tape = nde.introspection.replay(s, z0=start, args=(rate, factor))
        for q, figure in quantities(tape).items():
            expected = torch.autograd.grad(figure(tape), (start, factor), retain_graph=True)
            for mine, other in zip(exact[a, q], expected, strict=True):
                close(mine, other, 1e-10 if solver == "vcab3" else 1e-8)
    # Error ratios have kinks, where an estimate passes zero: among many steps there is one nearby.
    direction, step, moved = torch.randn_like(z0), 1e-6 if solver == "vcab3" else 2e-5, {}
    for n in (-2, -1, 1, 2):
        with torch.no_grad():
            again = (
                nde.introspection.replay(frozen, z0=z0 + n * step * direction),
                nde.introspection.replay(frozen, args=(rate, k + n * step)),
            )
            moved[n] = {q: [float(figure(s)) for s in again] for q, figure in quantities(frozen).items()}
    for q in quantities(frozen):
        for i, along in enumerate((direction, torch.ones_like(k))):
            near, far = (moved[n][q][i] - moved[-n][q][i] for n in (1, 2))
            difference = (8 * near - far) / (12 * step)
            for a in EXACT:
                assert float((exact[a, q][i] * along).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-7), (q, i, a)


# -- auto --------------------------------------------------------------------------------------------------------------


def parts_of(solution, sample):
    grid = solution._outcome.trajectory.grid
    n = int(grid.counts[sample])
    return grid.part_of(torch.arange(n), torch.full((n,), sample)).tolist()


def switches(parts):
    return [b for a, b in itertools.pairwise(parts) if a != b]


@pytest.mark.parametrize("control", CONTROLS)
def test_stiff_for_a_while(control):
    rate = double([0.0], [3000.0], [50.0], [2000.0])
    z0 = starts()
    given = {"solver": "auto", "args": (rate, torch.tensor(1.2)), "rtol": 1e-4, "atol": 1e-6}
    solution = nde.solve(nde.ODE(stiff_between), z0, (0.0, 6.0), control=control, **given)
    steps = solution.steps
    for b in range(4):
        parts = parts_of(solution, b)
        if control == "per_sample" and float(rate[b]) < 100:
            assert set(parts) == {0} and int(solution.stats.jacobians[b]) == 0
            continue
        assert switches(parts) == [1, 0]
        first = parts.index(1)
        assert 0.7 < float(steps.t[first, b]) < 2.0
        assert float(steps.t[first + parts[first:].index(0), b]) > 1.8
        # Jacobians for the stiff part's attempts, and for nothing else.
        assert sum(parts) <= int(solution.stats.jacobians[b]) <= sum(parts) + int(solution.stats.rejected[b])
    exact = nde.solve(
        nde.ODE(stiff_between), z0, (0.0, 6.0), solver="rodas5p", args=given["args"], rtol=1e-8, atol=1e-10
    )
    close(solution.final, exact.final, 1e-3)
    # The first and the last sample of the batch go their own ways, in values as in work.
    if control == "per_sample":
        for b in range(4):
            own = {**given, "args": (rate[b : b + 1], torch.tensor(1.2))}
            alone = nde.solve(nde.ODE(stiff_between), z0[b : b + 1], (0.0, 6.0), **own)
            assert parts_of(alone, 0) == parts_of(solution, b)
            for name in ("nfe", "accepted", "rejected", "jacobians", "factorizations", "linear_solves"):
                assert getattr(alone.stats, name)[0] == getattr(solution.stats, name)[b]
            torch.testing.assert_close(solution.final[b], alone.final[0], rtol=1e-8, atol=1e-10)


def test_van_der_pol_over_a_period():
    """Stiff on the slow branches, not so on the jumps between them, for every sample at times of its own."""
    mu = double(1.0, 100.0, 200.0)
    z0 = double([2.0, 0.0]).expand(3, 2)
    t = torch.stack([torch.zeros(3, dtype=torch.float64), double(10.0, 180.0, 350.0)], dim=1)
    given = {"solver": "auto", "rtol": 1e-5, "atol": 1e-7}
    solution = nde.solve(nde.ODE(van_der_pol(None)), z0, t, args=mu, **given)
    stiff = [sum(parts_of(solution, b)) for b in range(3)]
    assert stiff[0] == 0 and min(stiff[1:]) > 50
    assert int(solution.stats.jacobians[0]) == 0
    for b in (1, 2):
        assert len(switches(parts_of(solution, b))) >= 3
    explicit = int(nde.solve(nde.ODE(van_der_pol(None)), z0[1:2], t[1], args=mu[1:2], max_steps=10**5).stats.nfe)
    assert int(solution.stats.nfe[1]) < explicit / 2
    tight = nde.solve(nde.ODE(van_der_pol(None)), z0, t, solver="rodas5p", args=mu, rtol=1e-7, atol=1e-9)
    close(solution.final[:, 0], tight.final[:, 0], 1e-2)


@pytest.mark.parametrize("adjoint", EXACT)
def test_samples_may_leave_both_parts_at_once(adjoint):
    """Many samples that are stiff at times of their own: at some attempts they pass each other."""
    batch = 60
    start = torch.linspace(0.2, 2.0, batch, dtype=torch.float64)[:, None]

    def f(t, z, start):
        fast = 2.0 + 2000.0 * torch.sigmoid(40 * (t - start)) * torch.sigmoid(40 * (start + 0.4 - t))
        return -fast * (z - torch.cos(3 * t))

    z0 = torch.ones(batch, 1, dtype=torch.float64)
    given = {"solver": "auto", "rtol": 1e-3, "atol": 1e-5, "adjoint": adjoint}
    together = nde.solve(nde.ODE(f), z0, (0.0, 4.0), args=start, **given)
    for b in range(0, batch, 12):
        alone = nde.solve(nde.ODE(f), z0[b : b + 1], (0.0, 4.0), args=start[b : b + 1], **given)
        assert switches(parts_of(alone, 0))[:2] == [1, 0] and parts_of(alone, 0) == parts_of(together, b)
        assert together.stats.nfe[b] == alone.stats.nfe[0]
        torch.testing.assert_close(together.final[b], alone.final[0], rtol=1e-8, atol=1e-10)
