"""SDE solves: orders, the law under rejections, gradients on the frozen path, penalties, and what is refused."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import CONTROLS, EXACT, SDE_SOLVERS, Counted, close, refused
from scipy import stats
from sde_problems import MIX, PROBLEMS, Net, geometric

import neuralde as nde
import regularizers as reg

FIXED = nde.StepControl(adaptive=False)
METHODS = nde.solvers.SDE_SOLVERS
CASES = [(s, noise, sense) for s in SDE_SOLVERS for noise in METHODS[s].orders for sense in METHODS[s].sde_types]
FIRST = [next(case for case in CASES if case[0] == s) for s in SDE_SOLVERS]


def adaptive(case):
    solver, noise, sense = case
    make, _ = PROBLEMS[noise]
    return METHODS[solver].of(make(sense), True).adaptive


ADAPTIVE = [case for case in CASES if adaptive(case)]


def some_slow(cases, few):
    return [pytest.param(*c, marks=() if c in few else pytest.mark.slow, id="-".join(c)) for c in cases]


def slope(counts, errors):
    assert min(errors) > 0
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# -- orders ------------------------------------------------------------------------------------------------------------


def at_fixed_steps(solver, noise, sense, n, samples, seed):
    make, _ = PROBLEMS[noise]
    z0 = torch.ones(samples, 2, dtype=torch.float64)
    return nde.solve(make(sense), z0, (0.0, 1.0), solver=solver, control=FIXED, dt0=1 / n, seed=seed)


def any_solution(noise, sense, samples, seed):
    """Of one step, by whatever suits: for its paths."""
    solver = next(s for s, kind, its in CASES if kind == noise and its == sense)
    return at_fixed_steps(solver, noise, sense, 1, samples, seed)


@functools.cache
def exact_ends(noise, sense):
    return PROBLEMS[noise][1](any_solution(noise, sense, 200, 7), sense)


@pytest.mark.parametrize("solver, noise, sense", CASES)
def test_strong_order(solver, noise, sense):
    counts, errors, truth = (8, 16, 32, 64), [], exact_ends(noise, sense)
    for n in counts:
        solution = at_fixed_steps(solver, noise, sense, n, 200, 7)
        assert bool((solution.stats.accepted == n).all())
        errors.append(float((solution.final - truth).square().mean().sqrt()))
    found, order = slope(counts, errors), METHODS[solver].orders[noise]
    # The problem with additive noise is linear, where the methods of order 1.5 are of order 2.
    assert order - 0.15 < found < (2.2 if noise == "additive" and order == 1.5 else order + 0.15)


MANY = {"diagonal": 60000, "scalar": 60000, "additive": 20000, "general": 60000}


@functools.cache
def exact_squares(noise, sense):
    """|z(1)|² of many exact solutions, and polynomials of their W(1) whose means are zero."""
    solution, (_, exact) = any_solution(noise, sense, MANY[noise], 8), PROBLEMS[noise]
    # (The paths between 64 times tell the other two all but 1/1000 of the smallest weak error that is measured.)
    truth = exact(solution, sense) if noise in ("diagonal", "scalar") else exact(solution, sense, 64)
    w = solution.brownian([1.0])[-1].double()
    hermite = [torch.ones_like(w), w]
    for k in range(1, 5):
        hermite.append(w * hermite[k] - k * hermite[k - 1])
    pairs = [w[:, i : i + 1] * w[:, j : j + 1] for i, j in itertools.combinations(range(w.shape[1]), 2)]
    return truth.square().sum(dim=1), torch.cat([*hermite[1:], *pairs], dim=1)


def mean_and_chance(x, controls):
    """The mean of x and its standard error, what x has in common with variables of mean zero taken away."""
    columns = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), controls], dim=1)
    weights = torch.linalg.lstsq(columns, x[:, None]).solution
    rest = x - (columns @ weights)[:, 0]
    return float(weights[0]), float(rest.std()) / len(x) ** 0.5


@pytest.mark.parametrize("solver, noise, sense", some_slow(CASES, [("sosri2", "diagonal", "ito")]))
def test_weak_order(solver, noise, sense):
    """Of E|z(1)|²: the mean of the difference on common paths, and three standard errors of it to the worse."""
    order = METHODS[solver].orders[noise]
    # Where the error is larger than chance. (Of the non-commuting problem it is proportional to h from the first step.)
    counts = (1, 2, 4) if noise == "general" else (2, 4, 8) if noise == "additive" or order == 1.5 else (8, 16, 32)
    truth, controls = exact_squares(noise, sense)
    found = []
    for n in counts:
        z = at_fixed_steps(solver, noise, sense, n, MANY[noise], 8).final
        found.append(mean_and_chance(z.square().sum(dim=1) - truth, controls))
    errors, chances = zip(*((abs(mean), chance) for mean, chance in found), strict=True)
    worse = errors[0] - 3 * chances[0], errors[1], errors[2] + 3 * chances[2]
    assert slope(counts, worse) > (1.3 if order == 1.5 else 0.8)


NONLINEAR = nde.SDE(
    lambda t, z: torch.sin(2 * z).flip(1) - z**3,
    lambda t, z: (1.0 + 0.5 * torch.sin(3.0 * t).reshape(-1, 1, 1)) * torch.tensor(MIX).double().expand(len(z), -1, -1),
    "additive",
)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [s for s in SDE_SOLVERS if METHODS[s].orders.get("additive") == 1.5])
def test_strong_order_where_additive_noise_meets_a_drift_that_is_not_linear(solver):
    def final(method, n):
        z0 = torch.ones(100, 2, dtype=torch.float64)
        return nde.solve(NONLINEAR, z0, (0.0, 1.0), solver=method, control=FIXED, dt0=1 / n, seed=7).final

    counts, fine = (16, 32, 64, 128), final("sosra", 1024)
    found = slope(counts, [float((final(solver, n) - fine).square().mean().sqrt()) for n in counts])
    assert 1.35 < found < 1.75


@pytest.mark.parametrize("solver, noise, sense", some_slow(ADAPTIVE, [("sosri2", "diagonal", "ito")]))
@pytest.mark.parametrize("control", CONTROLS)
def test_the_error_falls_with_the_tolerance(solver, noise, sense, control):
    """Where a step of size h has an estimate of h^q and the method is of order p: as the power p/q of the tolerance."""
    (make, exact), method = PROBLEMS[noise], METHODS[solver]
    embedded, order = method.error_order == 1, method.orders[noise]
    # The embedded estimate is O(h): its tolerances are other numbers.
    tolerances = (0.4, 0.2, 0.1, 0.05) if embedded else (3e-2, 1e-2, 3e-3, 1e-3)
    if noise == "general":
        tolerances = (8e-2, 4e-2, 2e-2, 1e-2)
    errors, truth = [], None
    for tolerance in tolerances:
        z0, options = torch.ones(30, 2, dtype=torch.float64), {"rtol": tolerance, "atol": tolerance}
        solution = nde.solve(make(sense), z0, (0.0, 1.0), solver=solver, control=control, dt0=0.25, seed=3, **options)
        if truth is None:
            truth = exact(solution, sense)
        errors.append(float((solution.final - truth).square().mean().sqrt()))
    power = order if embedded else order / (order + 0.5)
    assert -slope(tolerances, errors) > power - 0.3


# -- the law -----------------------------------------------------------------------------------------------------------

# Grows as far as it can after every success, and so fails as often as it succeeds.
HASTY = {"safety": 1.0, "factor_max": 5.0, "beta1": 0.6, "beta2": 0.0}


@pytest.mark.parametrize("samples", [10000, pytest.param(100000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver, tolerance", [("sosri", 0.1), ("sosri2", 0.1), ("srk", 3e-4), ("heun", 1e-3)])
def test_rejections_leave_the_law_unbiased(solver, tolerance, samples):
    mu, sigma = 0.3, 0.6
    sense = METHODS[solver].sde_types[0]
    equation = nde.SDE(lambda t, z: mu * z, lambda t, z: sigma * z, "diagonal", sense)
    solution = nde.solve(
        equation,
        torch.ones(samples, 1, dtype=torch.float64),
        (0.0, 1.0),
        solver=solver,
        control=nde.StepControl(**HASTY),
        rtol=tolerance,
        atol=tolerance,
        dt0=0.25,
        seed=11,
    )
    drift = mu - (0.5 * sigma**2 if sense == "ito" else 0.0)
    z = solution.final[:, 0]
    x = (z.clamp(min=1e-9).log() - drift) / sigma
    assert float(solution.stats.rejected.double().mean()) > 0.5 * float(solution.stats.accepted.double().mean())
    assert stats.kstest(x.numpy(), "norm").pvalue > 0.01
    for power in (1, 2):
        mean, square = (math.exp(k * drift + 0.5 * (k * sigma) ** 2) for k in (power, 2 * power))
        spread = math.sqrt((square - mean**2) / samples)
        # The methods' own errors at these tolerances are below 5e-3.
        assert abs(float((z**power).mean()) - mean) < 4 * spread + 5e-3


def test_outputs_inside_have_their_own_law():
    """Steps end there: what lies between two ends of steps has another law."""
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    solution = nde.solve(geometric("ito"), torch.ones(20, 2, dtype=torch.float64), times, rtol=0.1, atol=0.1, seed=1)
    w = solution.brownian(times[1:])
    growth = torch.tensor((0.6, -0.4), dtype=torch.float64), torch.tensor((0.7, 0.5), dtype=torch.float64)
    exact = torch.exp((growth[0] - 0.5 * growth[1] ** 2) * times[1:, None, None] + growth[1] * w)
    assert float((solution.zs[1:] - exact).abs().mean()) < 0.01
    again = nde.solve(geometric("ito"), torch.ones(20, 2, dtype=torch.float64), (0.0, 1.0), rtol=0.1, atol=0.1, seed=1)
    torch.testing.assert_close(again.final, solution.final, rtol=0.02, atol=0.02)
    middle = 0.5 * (solution.steps.t[3, 0] + solution.steps.t[4, 0])
    ends = solution.steps.z[3:5, 0].mean(dim=0)
    torch.testing.assert_close(solution(middle)[0], ends)


# -- one path, whoever asks --------------------------------------------------------------------------------------------


def net(noise="diagonal"):
    torch.manual_seed(1)
    return Net(noise).double()


def z_start(batch=4):
    return torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)


def options(case, control):
    solver = case[0]
    if not adaptive(case):
        return {"solver": solver, "dt0": 0.125, "control": nde.StepControl(per_sample=control == "per_sample")}
    tolerance = 0.2 if METHODS[solver].error_order == 1 else 1e-2
    return {"solver": solver, "dt0": 0.2, "rtol": tolerance, "atol": tolerance, "control": control}


def figures(solution):
    """Everything that a loss may be made of."""
    total = (
        solution.zs * torch.linspace(1, 2, solution.zs[0].numel(), dtype=torch.float64).view_as(solution.zs[0])
    ).sum()
    if solution.solver.error_order is not None:
        total = total + 0.3 * solution.error.sum()
    if solution.solver.reports_stiffness:
        total = total + 0.3 * solution.stiffness.sum()
    return total


@pytest.mark.parametrize("solver, noise, sense", CASES)
@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_are_those_of_finite_differences_on_the_frozen_path(solver, noise, sense, adjoint, control):
    model, case = net(noise), (solver, noise, sense)
    z0, args = z_start().requires_grad_(), torch.tensor([0.8, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    solution = nde.solve(
        model.equation(sense), z0, [0.0, 0.3, 0.7], args=args, adjoint=adjoint, seed=5, **options(case, control)
    )
    figures(solution).backward()
    leaves = {"z0": z0, "args": args, **dict(model.named_parameters())}
    torch.manual_seed(2)
    for name, leaf in leaves.items():
        direction, size = torch.randn_like(leaf), 1e-5
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * size * direction
                found.append(float(figures(nde.introspection.replay(solution, z0, args))))
                leaf -= sign * size * direction
        expected = (found[0] - found[1]) / (2 * size)
        assert abs(float((leaf.grad * direction).sum()) - expected) < 1e-6 * max(1.0, abs(expected)), name


@pytest.mark.parametrize("solver, noise, sense", FIRST)
def test_the_replay_is_the_solve(solver, noise, sense):
    model, args = net(noise), torch.ones(3, dtype=torch.float64)
    solution = nde.solve(model.equation(sense), z_start(), (0.0, 1.0), args=args, seed=5,
                         **options((solver, noise, sense), "per_sample"))  # fmt: skip
    again = nde.introspection.replay(solution, args=args)
    torch.testing.assert_close(again.final, solution.final, rtol=0, atol=1e-13)


def test_a_seed_is_a_path():
    z0, args = z_start(), torch.ones(3, dtype=torch.float64)
    equation = net().equation()

    def final(**kwargs):
        return nde.solve(equation, z0, (0.0, 1.0), args=args, rtol=0.2, atol=0.2, **kwargs).final

    assert torch.equal(final(seed=1), final(brownian=nde.BrownianTree(1)))
    assert not torch.equal(final(seed=1), final(seed=2))
    assert not torch.equal(final(), final())
    torch.manual_seed(4)
    first = final()
    torch.manual_seed(4)
    assert torch.equal(final(), first)


def test_a_sample_s_answer_is_its_own():
    """It depends neither on the batch, nor on who has left it: stiffer samples take more steps."""
    model = net()

    def drift(t, z, args):
        return model.f(t, z, torch.ones(3, dtype=torch.float64)) - args * z

    equation = nde.SDE(drift, lambda t, z, args: 0.3 + 0.1 * z)
    z0, args = z_start(8), torch.logspace(0, 1.8, 8, dtype=torch.float64)[:, None]
    together = nde.solve(equation, z0, (0.0, 1.0), args=args, rtol=0.1, atol=0.1, seed=9)
    assert float(together.stats.accepted.max()) > 2.5 * float(together.stats.accepted.min())
    assert together.stats.function_calls * 8 > together.stats.nfe.sum()  # some were left out
    for i in (0, 3, 7):
        tree = nde.BrownianTree(9, paths=[i])
        alone = nde.solve(equation, z0[i : i + 1], (0.0, 1.0), args=args[i : i + 1], rtol=0.1, atol=0.1, brownian=tree)
        assert int(alone.stats.accepted) == int(together.stats.accepted[i])
        torch.testing.assert_close(alone.final[0], together.final[i], rtol=0, atol=1e-12)


def test_antithetic_trajectories_reduce_the_variance():
    equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.5 + 0.0 * z)
    z0 = torch.ones(400, 1, dtype=torch.float64)
    pairs = nde.solve(equation, z0, (0.0, 1.0), rtol=0.1, atol=0.1, brownian=nde.BrownianTree(1, "antithetic")).final
    means = 0.5 * (pairs[:200] + pairs[200:])
    assert float(means.std()) < 0.02 < float(pairs.std())


# -- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, noise, sense", FIRST)
def test_nfe_counts_drift_and_diffusion(solver, noise, sense):
    model = net(noise)
    drift, diffusion = Counted(model.f), Counted(model.g)
    args, how = torch.ones(3, dtype=torch.float64), options((solver, noise, sense), "joint")
    first = {**how, "dt0": None} if adaptive((solver, noise, sense)) else how
    equation = nde.SDE(drift, diffusion, noise, sense)
    for given in (how, first):
        drift.calls = diffusion.calls = 0
        solution = nde.solve(equation, z_start(), (0.0, 1.0), args=args, seed=5, **given)
        # The diffusion's first look, which no step uses; whether z is in it; whether it mixes, known then.
        mixing = noise == "diagonal" and sense == "ito" and given is how and adaptive((solver, noise, sense))
        checks = 1 + (noise == "additive") + mixing
        assert solution.stats.function_calls == drift.calls + diffusion.calls
        assert int(solution.stats.nfe[0]) == drift.calls + diffusion.calls - checks


def test_the_way_to_a_time_is_short(monkeypatch):
    """What 10⁶ steps cost is 10⁶ times what one costs: the work of a step grows with the logarithm of their number."""
    drawn = []
    normals = nde.brownian.normals
    monkeypatch.setattr(nde.brownian, "normals", lambda *a: drawn.append(1) or normals(*a))
    equation, z0 = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z), torch.ones(1, 1, dtype=torch.float64)
    for count in (50, 500):
        drawn.clear()
        nde.solve(equation, z0, (0.0, 1000.0), solver="srk", control=FIXED, dt0=1000.0 / count, seed=1)
        # An interval of every level and the last one; where a step starts, the step before it ended.
        assert len(drawn) <= count * (32 + 2) + 35
    drawn.clear()
    nde.solve(equation, z0, (0.0, 1024.0), solver="srk", control=FIXED, dt0=2.0, seed=1)
    assert len(drawn) < 512 * 3  # times with few digits: every interval of ten levels once


# -- with the rest of the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sosri2", "srk", "milstein"])
def test_transforms(solver):
    equation, z0 = net().equation(), z_start()
    options = {"args": torch.ones(3, dtype=torch.float64), "solver": solver, "rtol": 0.2, "atol": 0.2, "seed": 1}

    def final(z):
        return nde.solve(equation, z, (0.0, 0.5), adjoint="direct", **options).final

    _, tangent = torch.func.jvp(final, (z0,), (torch.ones_like(z0),))
    solution, size = nde.solve(equation, z0, (0.0, 0.5), **options), 1e-6
    up, down = (nde.introspection.replay(solution, z0 + x, options["args"]).final for x in (size, -size))
    torch.testing.assert_close(tangent, (up - down) / (2 * size), rtol=0, atol=1e-8)
    both = torch.func.vmap(final)(torch.stack([z0, 0.5 * z0]))
    assert both.shape == (2, 4, 3) and bool(both.isfinite().all())
    with torch.inference_mode():
        torch.testing.assert_close(final(z0), solution.final, rtol=0, atol=1e-13)


@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_states_of_any_structure(noise):
    z0 = {"a": z_start(), "b": torch.ones(4, 2, 2, dtype=torch.float64)}

    def spread(z):
        return 0.1 * z if noise == "diagonal" else 0.1 * z[..., None] * torch.ones(2).double()

    def drift(t, z):
        return {name: -x for name, x in z.items()}

    def diffusion(t, z):
        wide = {name: 0.1 * x for name, x in z.items()}
        return (
            wide if noise == "diagonal" else {name: x[..., None] * torch.ones(2).double() for name, x in wide.items()}
        )

    sense = "ito" if noise == "diagonal" else "stratonovich"
    found = nde.solve(nde.SDE(drift, diffusion, noise, sense), z0, (0.0, 1.0), rtol=0.1, atol=0.1, seed=1)
    flat = torch.cat([z0["a"], z0["b"].flatten(1)], dim=1)
    matrix = (
        (lambda t, z: 0.1 * z) if noise == "diagonal" else (lambda t, z: 0.1 * z[..., None] * torch.ones(2).double())
    )
    plain = nde.solve(nde.SDE(lambda t, z: -z, matrix, noise, sense), flat, (0.0, 1.0), rtol=0.1, atol=0.1, seed=1)
    torch.testing.assert_close(torch.cat([found.final["a"], found.final["b"].flatten(1)], dim=1), plain.final)


def test_few_checkpoints_and_second_derivatives():
    found, second = [], []
    for adjoint in ("direct", "checkpointed", nde.adjoints.Checkpointed(checkpoints=3)):
        z0, args = z_start().requires_grad_(), torch.ones(3, dtype=torch.float64)
        solution = nde.solve(net().equation(), z0, (0.0, 0.5), args=args, adjoint=adjoint, rtol=0.2, atol=0.2, seed=1)
        value = solution.final.square().sum() + solution.error.sum()
        (first,) = torch.autograd.grad(value, z0, create_graph=len(found) < 2)
        found.append(first.detach())
        if len(found) <= 2:
            second.append(torch.autograd.grad(first.square().sum(), z0)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second[1], second[0], rtol=1e-10, atol=1e-12)


def test_randomness_inside_and_half_precision():
    dropped = nde.SDE(lambda t, z: torch.nn.functional.dropout(-z, 0.5), lambda t, z: 0.1 * z)
    solution = nde.solve(dropped, z_start(), (0.0, 1.0), rtol=0.1, atol=0.1, seed=1)
    assert int(solution.stats.rejected.max()) < 5  # one draw for the whole solve
    z0 = torch.ones(4, 3, dtype=torch.bfloat16)
    half = nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z), z0, (0.0, 1.0), seed=1).final
    full = nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z), z0.float(), (0.0, 1.0), seed=1).final
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)


# -- penalties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", EXACT)
def test_penalties(control, adjoint):
    torch.manual_seed(0)
    layer = nde.NeuralSDE(
        torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), rtol=0.2, atol=0.2, control=control, adjoint=adjoint, seed=2
    ).double()
    generator = torch.Generator().manual_seed(3)
    for penalty in (
        reg.GlobalError(),
        reg.GlobalError(reduce="mean", scaled=False),
        reg.GlobalStiffness(relative=True),
        reg.LocalError(generator=generator),
        reg.LocalError("biased", through_state=True, generator=generator),
        reg.LocalStiffness("biased", relative=True, generator=generator),
    ):
        layer.zero_grad()
        layer(z_start())
        value = penalty(layer)
        value.backward()
        assert float(value.detach()) > 0
        assert float(layer.drift.weight.grad.abs().max()) > 0


def test_stiffness_is_the_size_of_a_linear_drift():
    for solver, noise in (("sosri2", "diagonal"), ("sosra2", "additive")):
        diffusion = {
            "diagonal": lambda t, z: 0.1 * z,
            "additive": lambda t, z: torch.full((len(z), 1, 1), 0.1).double(),
        }
        equation = nde.SDE(lambda t, z: -7.0 * z, diffusion[noise], noise)
        z0 = torch.ones(3, 1, dtype=torch.float64)
        solution = nde.solve(equation, z0, (0.0, 1.0), solver=solver, rtol=0.1, atol=0.1, seed=1)
        found = solution.steps.stiffness[solution.steps.mask]
        close(found, torch.full_like(found, 7.0), 1e-9)
        relative = reg.GlobalStiffness(reduce="mean", times_dt=False, relative=True).figure(solution)
        close(relative, torch.full_like(relative, 7.0 / {"sosri2": 10.6, "sosra2": 5.3}[solver]), 1e-9)


def test_the_error_is_the_reference_s():
    """h·Σ k_i + χ₂ Σ β3_i g_i + χ₃ Σ β4_i g_i over the tolerance: with a constant diffusion, h·Σ k_i."""
    equation, z0 = (
        nde.SDE(lambda t, z: torch.ones_like(z), lambda t, z: torch.full_like(z, 0.5)),
        torch.zeros(1, 1).double(),
    )
    solution = nde.solve(
        equation, z0, (0.0, 0.5), solver="sosri2", control=FIXED, dt0=0.25, rtol=1e-9, atol=1.0, seed=1
    )
    torch.testing.assert_close(solution.steps.error, torch.ones(2, 1, dtype=torch.float64), rtol=1e-6, atol=0)


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_layer():
    torch.manual_seed(0)
    drift = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    layer = nde.NeuralSDE(drift, torch.nn.Linear(3, 3), rtol=0.2, atol=0.2, seed=2)
    x = z_start().float()
    final = layer(x)
    assert final.shape == x.shape and torch.equal(final, layer.solution.final)
    assert layer(x, trajectories=5).shape == (5, 4, 3)
    assert layer.trajectory(x, torch.linspace(0, 1, 6)).shape == (6, 4, 3)
    assert layer.trajectory(x, torch.linspace(0, 1, 6), trajectories=2).shape == (6, 2, 4, 3)
    several = layer(x, trajectories=2)
    # Trajectory k of input b is sample 2b + k of the solve.
    assert torch.equal(several[1, 3], layer.solution.final[7])
    assert not torch.equal(several[0], several[1])
    layer(x).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())
    assert "sosri2" in repr(layer) and "diagonal" in repr(layer)


def test_antithetic_trajectories_are_of_one_input():
    """A linear SDE with additive noise: the mean of two mirrored trajectories is the one without noise."""
    spread = torch.full((3, 1), 0.4, dtype=torch.float64)
    layer = nde.NeuralSDE(
        lambda t, z: -z, lambda t, z: spread.expand(len(z), 3, 1), noise_type="additive",
        brownian=nde.BrownianTree(None, "antithetic"), rtol=0.1, atol=0.1, control="joint",
    )  # fmt: skip
    zs = layer(z_start(3), trajectories=4)
    means = 0.5 * (zs[:2] + zs[2:])
    torch.testing.assert_close(means, math.exp(-1.0) * z_start(3).expand(2, 3, 3), rtol=0, atol=1e-3)
    assert float((zs[0] - zs[1]).abs().min()) > 1e-3
    with refused(ValueError, "antithetic", "trajectories", "3"):
        layer(z_start(2), trajectories=3)


def test_layer_s_bad_options():
    drift, diffusion = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    with refused(TypeError, "NeuralSDE has no option 'tolerance'", "rtol"):
        nde.NeuralSDE(drift, diffusion, tolerance=1)
    with refused(ValueError, "trajectories", "0"):
        nde.NeuralSDE(drift, diffusion, trajectories=0)
    with refused(ValueError, "'tsit5' is for ODEs", "sosri2"):
        nde.NeuralSDE(drift, diffusion, solver="tsit5")
    mixing = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    with refused(ValueError, "diffusion", 'control="joint"'):
        nde.NeuralSDE(drift, mixing)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SDE_SOLVERS)
@pytest.mark.parametrize("noise", list(PROBLEMS))
@pytest.mark.parametrize("sense", ["ito", "stratonovich"])
def test_unsuitable_solvers_name_the_suitable_ones(solver, noise, sense):
    equation = PROBLEMS[noise][0](sense)
    suitable = [name for name, s in METHODS.items() if s.suits(equation)]
    assert suitable
    if solver in suitable:
        found = nde.solvers.for_sde(solver, equation)
        assert found.order == METHODS[solver].orders[noise] and found.name == solver
        return
    with refused(ValueError, solver, noise, "these do: " + ", ".join(suitable)):
        nde.solve(equation, torch.ones(2, 2, dtype=torch.float64), (0.0, 1.0), solver=solver, dt0=0.1)


def diagonal(**kwargs):
    return nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z, **kwargs)


def test_bad_equations():
    with refused(TypeError, "diffusion", "int"):
        nde.SDE(lambda t, z: z, 3)
    with refused(ValueError, "noise_type", "'diagonal'", "'white'"):
        diagonal(noise_type="white")
    with refused(ValueError, "sde_type", "'ito'", "'itô'"):
        diagonal(sde_type="itô")
    z0 = torch.ones(2, 3)
    with refused(ValueError, "the diffusion of general noise must return [2, 3, channels], got (2, 3)"):
        nde.solve(diagonal(noise_type="general"), z0, (0.0, 1.0), solver="euler_maruyama", dt0=0.1)
    with refused(ValueError, "scalar noise", "[2, 3, 1]", "(2, 3, 2)"):
        nde.solve(nde.SDE(lambda t, z: z, lambda t, z: torch.ones(2, 3, 2), "scalar"), z0, (0.0, 1.0))
    with refused(ValueError, "diffusion must return", "(2, 3)"):
        nde.solve(nde.SDE(lambda t, z: z, lambda t, z: torch.ones(2, 1)), z0, (0.0, 1.0))
    with refused(ValueError, "drift must return"):
        nde.solve(nde.SDE(lambda t, z: torch.ones(2, 1), lambda t, z: z), z0, (0.0, 1.0))
    with refused(ValueError, "additive", "changes with z"):
        nde.solve(nde.SDE(lambda t, z: z, lambda t, z: z[..., None], "additive"), z0, (0.0, 1.0))
    with refused(ValueError, "treats every sample alone", 'control="joint"'):
        nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: z - z.mean(dim=0)), z0 + torch.arange(3), (0.0, 1.0))


def test_what_an_sde_solve_can_t_do():
    z0 = torch.ones(2, 3)
    with refused(ValueError, "t must increase"):
        nde.solve(diagonal(), z0, (1.0, 0.0))
    with refused(TypeError, "real"):
        nde.solve(diagonal(), z0.to(torch.complex64), (0.0, 1.0))
    with refused(ValueError, "'backsolve'", "'checkpointed'"):
        nde.solve(diagonal(), z0, (0.0, 1.0), adjoint="backsolve")
    with refused(ValueError, "events"):
        nde.solve(diagonal(), z0, (0.0, 1.0), events=nde.Event(lambda t, z: z[:, 0]))
    with refused(ValueError, "gradient", "no derivative"):
        nde.solve(diagonal(), z0, (0.0, torch.tensor(1.0, requires_grad=True)))
    with refused(ValueError, "dt0 is needed", "euler_maruyama"):
        nde.solve(diagonal(), z0, (0.0, 1.0), solver="euler_maruyama")
    with refused(ValueError, "dt0 must be at least"):
        nde.solve(diagonal(), z0, (0.0, 1.0), dt0=1e-8)
    with refused(ValueError, "seed is for SDEs"):
        nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 1.0), seed=1)
    with refused(ValueError, "'sosri2' is for SDEs"):
        nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 1.0), solver="sosri2")
    with refused(TypeError, "not for SDEs", "sosri2"):
        nde.solve(diagonal(), z0, (0.0, 1.0), solver=nde.solvers.get("tsit5"))
    with refused(ValueError, "unknown solver 'sosri3'", "did you mean 'sosri"):
        nde.solve(diagonal(), z0, (0.0, 1.0), solver="sosri3")
    with refused(ValueError, "seed and brownian"):
        nde.solve(diagonal(), z0, (0.0, 1.0), seed=1, brownian=nde.BrownianTree(1))
    with refused(TypeError, "brownian", "int"):
        nde.solve(diagonal(), z0, (0.0, 1.0), brownian=3)
    solution = nde.solve(diagonal(), z0, (0.0, 1.0), solver="milstein", control=FIXED, dt0=0.25)
    with refused(ValueError, "no error estimate", "sosri2", "milstein"):
        solution.error


def test_a_failing_solve_says_so():
    equation = nde.SDE(lambda t, z: z**3, lambda t, z: 0.1 * z)
    with refused(nde.NeuralDEError, "sample 0", "t ="):
        nde.solve(equation, torch.full((2, 1), 3.0, dtype=torch.float64), (0.0, 5.0), rtol=0.1, atol=0.1, max_steps=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, args = net(), torch.ones(3, dtype=torch.float64)
    here = nde.solve(model.equation(), z_start(), (0.0, 1.0), args=args, rtol=0.2, atol=0.2, seed=1)
    model = model.cuda()
    there = nde.solve(model.equation(), z_start().cuda(), (0.0, 1.0), args=args.cuda(), rtol=0.2, atol=0.2, seed=1)
    torch.testing.assert_close(there.final.cpu(), here.final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sense", ["ito", "stratonovich"])
@pytest.mark.parametrize("taped", [False, True])
def test_milstein_follows_a_column_that_is_no_gradient(sense, taped):
    """dz = A z dW with a nilpotent A: z is (z1 + z2 W, z2). A vector-Jacobian product would be another equation's."""
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=taped)
    z0 = torch.ones(20, 2, dtype=torch.float64)
    equation = nde.SDE(lambda t, z: 0.0 * z, lambda t, z: (z @ weight.T)[..., None], "scalar", sense)
    control = nde.StepControl(adaptive=False)
    solution = nde.solve(equation, z0, (0.0, 1.0), solver="milstein", dt0=1 / 8, control=control, seed=3)
    end = solution.brownian(torch.tensor([1.0]))[0]
    close(solution.final, torch.cat([1.0 + end, torch.ones_like(end)], dim=1), 1e-12)


def test_stratonovich_milstein_refuses_diagonal_noise_that_mixes():
    def solve(diffusion, solver="milstein"):
        equation = nde.SDE(lambda t, z: -z, diffusion, sde_type="stratonovich")
        return nde.solve(equation, torch.ones(2, 3, dtype=torch.float64), (0.0, 0.1), solver=solver, dt0=0.05, seed=1)

    with refused(ValueError, "milstein", "mixes", "heun"):
        solve(lambda t, z: z.roll(1, dims=1))
    solve(lambda t, z: z.roll(1, dims=1), "heun")
    solve(lambda t, z: z.sin())


def test_a_failed_solve_advises_what_there_is_for_sdes():
    equation = nde.SDE(lambda t, z: -z, lambda t, z: z)
    with refused(nde.MaxStepsReached, "loosen rtol/atol", "srk") as caught:
        nde.solve(equation, torch.ones(2, 1), (0.0, 1.0), rtol=1e-3, atol=1e-3, max_steps=10, seed=1)
    assert "rodas5p" not in str(caught.value) and "auto" not in str(caught.value)
