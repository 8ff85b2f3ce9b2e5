"""Orders of convergence by regression: of every solver, its error estimate and its interpolant."""

import numpy as np
import pytest
import torch
from problems import rotating, rotating_exact

import neuralde as nde

FIXED = nde.StepControl(adaptive=False)
SOLVERS = [name for name, solver in nde.solvers.SOLVERS.items() if not solver.discrete]


def slope(sizes, errors):
    assert min(errors) > 0
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def step_counts(order):
    """Where the method converges at its asymptotic rate and has not reached rounding."""
    return {1: (200, 400, 800), 5: (240, 320, 400), 8: (16, 20, 25, 31)}.get(order, (80, 160, 320))


def local_sizes(order):
    return (0.1, 0.07, 0.05, 0.035) if order > 5 else (0.04, 0.02, 0.01, 0.005)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("backward", [False, True])
def test_order_of_convergence(name, backward):
    solver = nde.solvers.get(name)
    horizon = (2.0, 0.0) if backward else (0.0, 2.0)
    counts = step_counts(solver.order)
    errors = []
    for n in counts:
        solution = nde.solve(
            nde.ODE(rotating), rotating_exact(horizon[0])[None], horizon, solver=name, control=FIXED, dt0=2.0 / n
        )
        assert int(solution.stats.accepted) == n
        errors.append(float((solution.final - rotating_exact(horizon[1])).norm()))
    assert abs(-slope(counts, errors) - solver.order) < 0.15


@pytest.mark.parametrize("name", [n for n in SOLVERS if nde.solvers.get(n).error_order is not None])
def test_order_of_error_estimate(name):
    solver = nde.solvers.get(name)
    sizes = local_sizes(solver.order)
    estimates = [
        float(nde.probe(rotating, 0.3, rotating_exact(0.3)[None], dt=dt, solver=name).raw_error) for dt in sizes
    ]
    assert abs(slope(sizes, estimates) - solver.error_order) < 0.15


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_interpolant(name):
    solver = nde.solvers.get(name)
    sizes = local_sizes(solver.order)
    errors = []
    for dt in sizes:
        # One step from an exact value: what is measured is the interpolant's own error.
        solution = nde.solve(
            nde.ODE(rotating), rotating_exact(0.3)[None], (0.3, 0.3 + dt), solver=name, control=FIXED, dt0=dt
        )
        points = 0.3 + dt * torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
        errors.append(float((solution(points)[:, 0] - rotating_exact(points)).norm(dim=1).max()))
    assert abs(slope(sizes, errors) - (solver.interpolant_order + 1)) < 0.15


@pytest.mark.parametrize("name", [n for n in SOLVERS if nde.solvers.get(n).adaptive])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_error_follows_the_tolerance(name, control):
    method = nde.solvers.get(name)
    # Where the method is of lower order than its estimate, which it does not add to the solution, the sum over steps
    # of size tolerance^(1/q) is that of errors of size tolerance^((p + 1)/q).
    power = method.order / method.error_order
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8) if method.order > 1 else (1e-2, 1e-4, 1e-6):
        solution = nde.solve(
            nde.ODE(rotating),
            rotating_exact(0.0).expand(3, 4),
            (0.0, 2.0),
            solver=name,
            control=control,
            rtol=tolerance,
            atol=tolerance,
        )
        errors.append(float((solution.final - rotating_exact(2.0)).abs().max()))
        assert errors[-1] < 100 * tolerance**power
    assert errors[0] / errors[2] > 0.1 * 1e4**power


def test_torchdyn_rk4_is_first_order_on_time_dependent_problems():
    """Why its solvers are not built on: its rk4 evaluates every stage at the step's start."""
    solvers = pytest.importorskip("torchdyn.numerics.solvers.ode")
    theirs, ours = [], []
    for n in (40, 80, 160):
        z, dt = rotating_exact(0.0)[None], torch.tensor(2.0 / n, dtype=torch.float64)
        rk4 = solvers.RungeKutta4(dtype=torch.float64)
        for i in range(n):
            _, z, _ = rk4.step(rotating, z, i * dt, dt)
        theirs.append(float((z - rotating_exact(2.0)).norm()))
        solution = nde.solve(nde.ODE(rotating), rotating_exact(0.0)[None], (0.0, 2.0), solver="rk4", dt0=2.0 / n)
        ours.append(float((solution.final - rotating_exact(2.0)).norm()))
    assert -slope((40, 80, 160), theirs) < 1.2
    assert -slope((40, 80, 160), ours) > 3.85
