"""What comes back: steps, figures, dense output, statistics, pictures; and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import (
    ADAPTIVE,
    ADJOINTS,
    CONTROLS,
    DENSE,
    EXACT,
    FIXED,
    SOLVERS,
    WITH_ERROR,
    WITH_STIFFNESS,
    Counted,
    close,
    options,
    refused,
)

import neuralde as nde

SOLVER = pytest.mark.parametrize("solver", SOLVERS)
CONTROL = pytest.mark.parametrize("control", CONTROLS)
ADJOINT = pytest.mark.parametrize("adjoint", ADJOINTS)
BATCH = 5


def uneven(t, z):
    """Samples of different difficulty: their rates are a part of their state."""
    x, rate = z[:, :2], z[:, 2:]
    spun = torch.cat([x[:, 1:], -x[:, :1]], 1)
    return torch.cat([rate * (spun - 0.1 * x) * torch.cos(3 * t), torch.zeros_like(rate)], 1)


def start():
    generator = torch.Generator().manual_seed(1)
    rate = torch.tensor([[1.0], [12.0], [3.0], [0.2], [25.0]], dtype=torch.float64)
    return torch.cat([torch.randn(BATCH, 2, generator=generator, dtype=torch.float64), rate], 1)


def solve(t=(0.0, 2.0), **how):
    if "solver" in how:
        how = {**options(how["solver"], 0.03), **how}
        if nde.solvers.get(how["solver"]).order == 1:  # thousands of steps otherwise
            how = {"rtol": 0.03, "atol": 0.003, **how}
    return nde.solve(nde.ODE(uneven), how.pop("z0", start()), t, **how)


# -- steps ---------------------------------------------------------------------------------------------------------


@SOLVER
@CONTROL
@ADJOINT
@pytest.mark.parametrize("t", [(0.0, 2.0), (1.5, -0.5), (0.0, 0.7, 2.0)])
def test_steps(solver, control, adjoint, t):
    solution = solve(t, solver=solver, control=control, adjoint=adjoint)
    steps, stats = solution.steps, solution.stats
    n = len(steps)
    assert n == int(stats.accepted.max())
    assert steps.t.shape == steps.dt.shape == steps.mask.shape == (n, BATCH)
    assert steps.z.shape == (n, BATCH, 3)
    assert steps.mask.dtype == torch.bool

    # Packed to the left: sample b's steps are the first accepted[b].
    assert torch.equal(steps.mask, torch.arange(n)[:, None] < stats.accepted)
    if control == "per_sample" and solver in ADAPTIVE:
        assert not steps.mask.all(), "the samples must differ for this test to say anything"
    for figure in (steps.t, steps.dt, steps.error, steps.stiffness):
        if figure is not None:
            assert figure.shape == (n, BATCH) and (figure[~steps.mask] == 0).all()
    assert (steps.z[~steps.mask] == 0).all()

    # They are a chain from t0 to t1, in one direction.
    assert (steps.t[0] == t[0]).all()
    direction = 1.0 if t[-1] > t[0] else -1.0
    assert (steps.dt[steps.mask] * direction > 0).all()
    ends = steps.t + steps.dt
    both = steps.mask[1:]
    torch.testing.assert_close(ends[:-1][both], steps.t[1:][both], rtol=1e-13, atol=1e-13)
    last = stats.accepted - 1
    torch.testing.assert_close(
        ends[last, torch.arange(BATCH)], torch.full((BATCH,), t[-1]).double(), rtol=0, atol=1e-13
    )

    # Their states lie on the solution.
    assert torch.equal(steps.z[0], solution.zs[0])
    for b in range(BATCH):
        mine = steps.mask[:, b]
        on_curve = solution(steps.t[mine, b])[:, b]
        torch.testing.assert_close(on_curve, steps.z[mine, b], rtol=1e-10, atol=1e-10)


@SOLVER
@CONTROL
@ADJOINT
def test_figures(solver, control, adjoint):
    """Accepted means a ratio of at most 1; where a solver has no estimate there is None, and an error that says so."""
    solution = solve(solver=solver, control=control, adjoint=adjoint)
    steps = solution.steps
    for name, able in (("error", WITH_ERROR), ("stiffness", WITH_STIFFNESS)):
        figure = getattr(steps, name)
        if solver not in able:
            assert figure is None
            with refused(ValueError, f"{solver!r} has no {name} estimate", *able):
                getattr(solution, name)
            continue
        assert (figure[steps.mask] >= 0).all() and figure[steps.mask].isfinite().all()
        torch.testing.assert_close(getattr(solution, name), (figure * steps.dt.abs()).sum(0), rtol=1e-12, atol=0)
        assert getattr(solution, name).shape == (BATCH,)
        if control == "joint":
            assert (figure == figure[:, :1]).all()
    if solver in ADAPTIVE:
        assert (steps.error <= 1.0).all()
        # The controller aims below 1, and would be idle far below: most steps are made as large as they may be.
        assert steps.error[steps.mask].median() > 1e-3
    else:
        dt = steps.dt[steps.mask]
        assert ((dt - 0.03).abs() < 1e-12).sum() >= len(dt) - 2 * BATCH  # the last may be shorter


@pytest.mark.parametrize("solver", WITH_ERROR)
@CONTROL
def test_error_is_the_estimate_over_the_tolerance(solver, control):
    """By the definition, from the probe's raw estimate of the same step."""
    rtol, atol = 1e-4, 1e-5
    solution = solve(solver=solver, control=control, rtol=rtol, atol=atol)
    steps = solution.steps
    j = 2 if solution.solver.one_step else 0  # what a step starts from is known of the first one
    rows = steps.mask[j]
    assert rows.sum() >= 1
    z, z_next = steps.z[j, rows], solution.steps.z[j + 1, rows]
    step = solution.solver.attempt(
        solution._problem.field,
        steps.t[j, rows] if control == "per_sample" else steps.t[j, :1],
        steps.dt[j, rows] if control == "per_sample" else steps.dt[j, :1],
        z,
        None,
        solution.solver.memory(z, True),
    )
    ratio = step.error / (atol + rtol * torch.maximum(z.abs(), z_next.abs()))
    expected = ratio.pow(2).mean().sqrt() if control == "joint" else ratio.pow(2).mean(1).sqrt()
    torch.testing.assert_close(steps.error[j, rows], expected.expand(int(rows.sum())), rtol=1e-7, atol=0)


@pytest.mark.parametrize("adjoint", EXACT)
@CONTROL
def test_figures_are_differentiable_and_steps_are_constants(adjoint, control):
    z0 = start().requires_grad_()
    solution = solve(z0=z0, adjoint=adjoint, control=control)
    assert not solution.steps.t.requires_grad and not solution.steps.dt.requires_grad
    for tensor in (solution.error, solution.stiffness, solution.steps.error, solution.steps.stiffness):
        assert (torch.autograd.grad(tensor.sum(), z0, retain_graph=True)[0] != 0).any()
    gradient = torch.autograd.grad(solution.steps.z[0].sum(), z0, retain_graph=True)[0]
    assert torch.equal(gradient, torch.ones_like(z0)), "the first step starts from z0"
    with torch.no_grad():
        plain = solve(z0=z0, adjoint=adjoint, control=control)
    assert not plain.error.requires_grad and not plain.zs.requires_grad
    torch.testing.assert_close(plain.error, solution.error.detach(), rtol=1e-9, atol=0)


@CONTROL
def test_the_adjoints_report_the_same(control):
    t = torch.linspace(0.0, 2.0, 4, dtype=torch.float64)
    found = [solve(t, z0=start().requires_grad_(), adjoint=adjoint, control=control) for adjoint in ADJOINTS]
    for other in found[1:]:
        torch.testing.assert_close(other.zs, found[0].zs, rtol=1e-12, atol=1e-12)
        assert torch.equal(other.stats.nfe, found[0].stats.nfe)
        for name in ("t", "dt", "z", "error", "stiffness"):
            # Error estimates are differences of nearly equal numbers: they keep fewer digits.
            torch.testing.assert_close(getattr(other.steps, name), getattr(found[0].steps, name), rtol=1e-6, atol=1e-10)


# -- statistics ----------------------------------------------------------------------------------------------------


@SOLVER
@CONTROL
def test_statistics(solver, control):
    stats = solve(solver=solver, control=control).stats
    for counts in (stats.nfe, stats.accepted, stats.rejected):
        assert counts.shape == (BATCH,) and counts.dtype == torch.int64
    assert isinstance(stats.function_calls, int)
    assert (stats.accepted > 0).all() and (stats.rejected >= 0).all()
    assert stats.function_calls >= int(stats.nfe.max())
    if control == "joint" or solver in FIXED:
        assert (stats.nfe == stats.nfe[0]).all()
    else:
        assert stats.nfe[4] > stats.nfe[3], "the harder sample costs more"
    if solver in FIXED:
        assert (stats.rejected == 0).all() and (stats.accepted == 67).all()
    if not nde.solvers.get(solver).one_step:
        return
    # An attempt costs the method's stages, and what comes on top is at the start.
    attempts, calls = stats.accepted + stats.rejected, nde.solvers.get(solver).calls_per_step
    # An iteration has rounds, each with a Jacobian; two evaluations without one complete it.
    cost = stats.jacobians + 2 * attempts if calls is None else attempts * calls
    assert ((stats.nfe - cost >= 0) & (stats.nfe - cost <= 2)).all()


def test_an_easy_problem_at_a_loose_tolerance_takes_few_steps():
    """A figure to notice if step-size control gets worse: twice this would be a defect."""
    final = nde.solve(nde.ODE(lambda t, z: -z), torch.ones(3, 2), (0.0, 1.0), rtol=1e-3, atol=1e-6)
    assert (final.stats.accepted <= 6).all() and (final.stats.rejected == 0).all()


def test_repr():
    solution = solve()
    text = repr(solution)
    assert text.startswith("Solution(tsit5, 2 times, all samples succeeded; nfe ") and "\n" not in text
    nfe = solution.stats.nfe
    assert f"({int(nfe.min())} to {int(nfe.max())})" in text
    assert f"function calls {solution.stats.function_calls}" in repr(solution.stats)
    assert repr(solution.steps) == f"Steps({len(solution.steps)} steps, {BATCH} samples)"
    z0 = torch.tensor([[1.0], [-1.0], [2.0]])
    failed = nde.solve(nde.ODE(lambda t, z: torch.sqrt(z)), z0, (0.0, 1.0), on_failure="ignore")
    assert "1 of 3 samples failed" in repr(failed)


def test_what_it_was_solved_with():
    solution = solve(solver="bs3", rtol=1e-4, atol=1e-7, control="joint")
    assert solution.solver is nde.solvers.get("bs3") and not solution.control.per_sample
    assert (solution.rtol, solution.atol) == (1e-4, 1e-7)
    assert solution.residual is None
    assert solution.status.shape == solution.converged.shape == (BATCH,)
    assert solution.status.tolist() == [0] * BATCH and solution.converged.all()


# -- between the steps -----------------------------------------------------------------------------------------------


@SOLVER
@CONTROL
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("horizon", [(0.0, 2.0), (2.0, 0.0)])
def test_queries(solver, control, dense, horizon):
    """One time, times for all, times for each sample; in any order, and twice."""
    solution = solve(horizon, solver=solver, control=control, dense=dense)
    times = torch.tensor([1.3, 0.0, 0.5, 2.0, 1.3], dtype=torch.float64)
    zs = solution(times)
    assert zs.shape == (5, BATCH, 3)
    for t, z in zip(times, zs, strict=True):
        for one in (t, float(t)):
            at = solution(one)
            assert at.shape == (BATCH, 3)
            torch.testing.assert_close(at, z, rtol=1e-12, atol=1e-13)
    each = torch.stack([times.roll(b) for b in range(BATCH)])
    every = solution(each)
    assert every.shape == (5, BATCH, 3)
    for b in range(BATCH):
        torch.testing.assert_close(every[:, b], zs.roll(b, 0)[:, b], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(solution(horizon[0]), solution.zs[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(solution(horizon[1]), solution.final, rtol=1e-11, atol=1e-11)
    assert solution([0.5]).shape == (1, BATCH, 3) and solution(1).shape == (BATCH, 3)


@SOLVER
@CONTROL
@ADJOINT
@pytest.mark.parametrize("each", [False, True])
def test_output_times_are_points_of_the_solution(solver, control, adjoint, each):
    t = torch.tensor([0.0, 0.1, 0.11, 0.9, 1.7, 2.0], dtype=torch.float64)
    if each:
        inner = torch.rand(BATCH, 4, dtype=torch.float64).sort(dim=1).values * 2
        t = torch.cat([torch.zeros(BATCH, 1), inner, torch.full((BATCH, 1), 2.0)], 1).double()
    solution = solve(t, solver=solver, control=control, adjoint=adjoint)
    torch.testing.assert_close(solution(t), solution.zs, rtol=1e-10, atol=1e-11)


@SOLVER
@CONTROL
def test_dense_is_the_same_and_costs_nothing(solver, control):
    times = torch.linspace(0.0, 2.0, 11, dtype=torch.float64)
    f = Counted(uneven)
    how = {"control": control, **options(solver, 0.03)}
    with torch.no_grad():
        dense = nde.solve(nde.ODE(f), start(), (0.0, 2.0), dense=True, **how)
        before = f.calls
        values = dense(times)
        assert f.calls == before, "the stages were kept"
        again = nde.solve(nde.ODE(f), start(), (0.0, 2.0), **how)
        before = f.calls
        replayed = again(times)
        assert f.calls > before, "this one kept nothing"
    torch.testing.assert_close(values, replayed, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dense.final, again.final, rtol=1e-12, atol=1e-13)
    # Interpolation closes the last step of a method that is not FSAL: one evaluation more.
    assert ((dense.stats.nfe - again.stats.nfe) <= 1).all()
    assert (dense.stats.accepted == again.stats.accepted).all()


@CONTROL
def test_dense_costs_nothing_where_no_gradient_is_wanted_though_grad_mode_is_on(control):
    f = Counted(uneven)
    solution = nde.solve(nde.ODE(f), start(), (0.0, 2.0), dense=True, control=control)
    before = f.calls
    solution(torch.linspace(0.0, 2.0, 5))
    assert f.calls == before


@pytest.mark.parametrize("solver", ["tsit5", "bs3", "rk4"])
def test_dense_with_samples_that_leave_the_batch(solver):
    """Kept stages are of whoever was in the batch then."""
    z0 = torch.rand(64, 1, dtype=torch.float64) + 0.5
    rate = torch.ones(64, 1, dtype=torch.float64)
    rate[[7, 60]] = 200.0
    equation = nde.ODE(lambda t, z, rate: -rate * z * torch.cos(t))
    t = (torch.zeros(64), torch.where(rate[:, 0] > 1, 1.0, 0.3))
    how = {"args": rate, **options(solver, 0.005)}
    times = t[1][:, None] * torch.linspace(0.0, 1.0, 5)
    with torch.no_grad():
        dense, plain = nde.solve(equation, z0, t, dense=True, **how), nde.solve(equation, z0, t, **how)
        assert dense.stats.accepted.max() > 3 * dense.stats.accepted.min()
        torch.testing.assert_close(dense(times), plain(times), rtol=1e-11, atol=1e-12)
    exact = z0 * torch.exp(-rate * torch.sin(times.double()))
    assert (dense(times)[..., 0].T - exact).abs().max() < 0.01


@pytest.mark.parametrize("adjoint", DENSE)
@CONTROL
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_between_the_steps(adjoint, control, dense):
    """With respect to the state: by replay on the same grid. With respect to time: the slope of the interpolant."""
    z0 = start().requires_grad_()
    solution = solve(z0=z0, adjoint=adjoint, control=control, dense=dense, rtol=1e-5)
    weights = torch.randn(BATCH, 3, dtype=torch.float64)
    mine = torch.autograd.grad((solution(0.77) * weights).sum(), z0)[0]
    direction = torch.randn_like(z0)

    def at(shift):
        with torch.no_grad():
            return (nde.introspection.replay(solution, z0=z0 + shift * direction)(0.77) * weights).sum()

    h = 1e-4
    difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    # A continuous adjoint solves backwards with the same rtol.
    torch.testing.assert_close((mine * direction).sum(), difference, rtol=1e-7 if adjoint in EXACT else 1e-5, atol=1e-8)
    t = torch.tensor(0.77, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad((solution(t) * weights).sum(), t)[0]
    expected = (solution(0.77 + 1e-5) - solution(0.77 - 1e-5)).mul(weights).sum() / 2e-5
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-6, atol=1e-7)


@CONTROL
@pytest.mark.parametrize("dense", [False, True])
def test_a_solution_is_its_own(control, dense):
    """What the caller does to z0 and t afterwards does not reach it."""
    z0, t = start(), torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    solution = solve(t, z0=z0, control=control, dense=dense)
    before = solution(0.01), solution.steps.z.clone(), solution.zs.clone(), solution.ts.clone()
    again = solve(t, z0=z0, control=control, dense=dense)  # of which nothing was asked yet
    z0.mul_(3.0)
    t.mul_(3.0)
    for source in (solution, again):
        for mine, expected in zip((source(0.01), source.steps.z, source.zs, source.ts), before, strict=True):
            assert torch.equal(mine, expected)


# -- replay ----------------------------------------------------------------------------------------------------------


@SOLVER
@CONTROL
def test_replay_is_the_same_solution(solver, control):
    solution = solve((0.0, 0.4, 2.0), solver=solver, control=control)
    again = nde.introspection.replay(solution)
    torch.testing.assert_close(again.zs, solution.zs, rtol=1e-12, atol=1e-12)
    assert torch.equal(again.steps.t, solution.steps.t) and torch.equal(again.steps.dt, solution.steps.dt)
    torch.testing.assert_close(again.steps.z, solution.steps.z, rtol=1e-12, atol=1e-12)
    if solver in WITH_ERROR:
        torch.testing.assert_close(again.error, solution.error, rtol=1e-6, atol=0)
    torch.testing.assert_close(again(1.1), solution(1.1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", [*EXACT, nde.adjoints.Checkpointed(checkpoints=2)])
def test_replay_keeps_the_grid_for_another_start_and_other_args(adjoint):
    f = nde.ODE(lambda t, z, rate: -rate * z * torch.cos(t))
    z0, rate = torch.ones(3, 1, dtype=torch.float64), torch.full((3, 1), 2.0, dtype=torch.float64)
    solution = nde.solve(f, z0, (0.0, 2.0), args=rate, rtol=1e-6, adjoint=adjoint)
    moved = nde.introspection.replay(solution, z0=3 * z0, args=2 * rate)
    assert torch.equal(moved.steps.dt, solution.steps.dt)

    def exact(t):
        return 3 * z0 * torch.exp(-2 * rate * torch.sin(torch.tensor(t, dtype=torch.float64)))

    torch.testing.assert_close(moved.final, exact(2.0), rtol=1e-3, atol=0)
    # So it is between the steps, also where nothing wants a gradient.
    torch.testing.assert_close(moved(0.7), exact(0.7), rtol=1e-3, atol=0)
    assert not moved(0.7).requires_grad
    # It is the function whose gradient the solve's is.
    start = (3 * z0).requires_grad_()
    again = nde.introspection.replay(solution, z0=start, args=2 * rate)
    close(torch.autograd.grad(again.final.sum(), start)[0], moved.final / (3 * z0), 1e-10)


# -- pictures --------------------------------------------------------------------------------------------------------


@SOLVER
@CONTROL
def test_plot(solver, control):
    import matplotlib.pyplot as plt

    solution = solve(solver=solver, control=control, z0=start().requires_grad_())
    axes = solution.plot(sample=1)
    try:
        assert len(axes) == 3
        accepted = int(solution.stats.accepted[1])
        curves = [
            [line for line in axis.get_lines() if len(line.get_xdata()) == accepted and accepted > 2] for axis in axes
        ]
        shown = [True, solver in WITH_ERROR, solver in WITH_STIFFNESS]
        assert [len(found) for found in curves] == [int(x) for x in shown]
        mine = solution.steps.mask[:, 1]
        torch.testing.assert_close(torch.tensor(curves[0][0].get_ydata()), solution.steps.dt[mine, 1], rtol=0, atol=0)
        for axis, there in zip(axes, shown, strict=True):
            assert axis.get_ylabel()
            assert any("no such estimate" in text.get_text() for text in axis.texts) is not there
        assert f"{accepted} steps" in axes[0].get_title() and solver in axes[0].get_title()
        axes[0].figure.canvas.draw()
    finally:
        plt.close(axes[0].figure)


def test_plot_on_given_axes():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1)
    try:
        assert solve().plot(sample=4, axes=axes) is axes
        assert all(axis.get_lines() for axis in axes)
    finally:
        plt.close(figure)


def test_plot_of_a_failed_sample():
    import matplotlib.pyplot as plt

    z0 = torch.tensor([[1.0], [-1.0]])
    solution = nde.solve(nde.ODE(lambda t, z: torch.sqrt(z)), z0, (0.0, 1.0), on_failure="ignore")
    axes = solution.plot(sample=1)
    assert "0 steps" in axes[0].get_title()
    axes[0].figure.canvas.draw()
    plt.close(axes[0].figure)


# -- imports ---------------------------------------------------------------------------------------------------------

HEAVY = ["torchdyn", "pytorch_lightning", "matplotlib", "sklearn", "torchsde", "torchdiffeq"]


@pytest.mark.parametrize("package", ["neuralde", "regularizers"])
def test_importing_is_light(package):
    code = (
        f"import {package}, sys, torch\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "import neuralde as nde\n"
        "nde.solve(nde.ODE(lambda t, z: -z), torch.ones(2, 2), (0.0, 1.0))\n"
        f"print(found + [name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_core_does_not_know_the_regularizers():
    code = "import neuralde, sys; print([m for m in sys.modules if m.split('.')[0] == 'regularizers'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    assert len(set(nde.__all__)) == len(nde.__all__)
    for name in nde.__all__:
        assert getattr(nde, name) is not None
