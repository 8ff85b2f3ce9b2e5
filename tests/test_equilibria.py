"""Steady states: what is found, what its gradients are, and that samples are alone."""

import itertools

import pytest
import torch
from helpers import EQUILIBRIUM, SOLVERS, STEADY, Counted, close, options, refused
from torch import nn

import neuralde as nde
from neuralde.experiments.linear import ALPHAS, steps_to_rest

BATCH, D, INPUTS = 4, 5, 3
IMPLICIT = ["implicit", "implicit-anderson", "implicit-broyden"]
# Whose error estimate falls so slowly that following the way to the steady state closely takes thousands of steps.
SLOW = ("implicit_euler",)
LOW_ORDER = ("bs3", "rosenbrock23", "vcab3")  # enough steps at 1e-8 to be slow


class Map(nn.Module):
    """A contraction: tanh(W z + U x + b) with ‖W‖ = 0.8."""

    def __init__(self, scale=0.8, d=D, inputs=INPUTS):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        w, u, b = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, d), (d, inputs), (d,))
        )
        self.w, self.u, self.b = (
            nn.Parameter(scale * w / torch.linalg.matrix_norm(w, 2)),
            nn.Parameter(u),
            nn.Parameter(b),
        )

    def forward(self, z, x):
        return torch.tanh(z @ self.w.T + x @ self.u.T + self.b)


def inputs(batch=BATCH):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, INPUTS, generator=generator, dtype=torch.float64)


def zeros(batch=BATCH, d=D):
    return torch.zeros(batch, d, dtype=torch.float64)


def reference(f, x, batch=BATCH):
    """The fixed point and the gradients of Σ z² by dense linear algebra: (z*, [by each tensor])."""
    z = zeros(batch)
    with torch.no_grad():
        for _ in range(300):
            z = f(z, x)
    jacobian = (1 - z**2)[:, :, None] * f.w.detach()
    costate = torch.linalg.solve((torch.eye(D, dtype=z.dtype) - jacobian).mT, 2 * z)
    return z, list(torch.autograd.grad(f(z, x), [*f.parameters(), x], costate))


def how(solver):
    """Tight enough for gradients to 1e-6; the termination's own where the way need not be followed closely."""
    if solver in EQUILIBRIUM:
        return {"solver": solver, "rtol": 1e-10, "atol": 1e-12}
    given = options(solver, dt0=0.8)
    if solver in LOW_ORDER:
        return given | {"rtol": 5e-8, "atol": 5e-10, "max_steps": 20000}
    given |= {"rtol": 1e-8, "atol": 1e-8, "termination": nde.Termination(rtol=1e-7)}
    if solver in SLOW:  # of order 1, it follows the way in too many steps; but long ones lead to the end too
        return given | {"control": nde.StepControl(adaptive=False), "dt0": 5.0}
    return given


# -- every solver, every backward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS + EQUILIBRIUM)
def test_the_steady_state_and_its_gradients(solver):
    f, x = Map(), inputs().requires_grad_()
    expected, gradients = reference(f, x)
    solution = nde.solve(nde.SteadyState(f), zeros(), args=x, **how(solver))
    assert bool(solution.converged.all())
    tolerance = solution.termination.tolerance
    assert bool((solution.residual <= tolerance).all())
    # ‖z - z*‖ ≤ ‖f(z) - z‖ / (1 - 0.8) for this map.
    error = (solution.final - expected).norm(dim=1)
    assert bool((error <= 5 * tolerance * solution.final.norm(dim=1) * 1.01).all())
    found = torch.autograd.grad(solution.final.square().sum(), [*f.parameters(), x])
    for g, e in zip(found, gradients, strict=True):
        close(g, e, 1e-6)


@pytest.mark.parametrize("solver", [*EQUILIBRIUM, "tsit5"])
@pytest.mark.parametrize("adjoint", IMPLICIT)
def test_implicit_gradients_to_1e_6(solver, adjoint):
    """Of parameters, of args and of a tensor that f closes over, each with its part of the loss."""
    f, x = Map(), inputs().requires_grad_()
    expected, gradients = reference(f, x)
    solution = nde.solve(nde.SteadyState(lambda z: f(z, x)), zeros(), adjoint=adjoint, **how(solver))
    close(solution.final, expected, 1e-6)
    found = torch.autograd.grad(solution.final.square().sum(), [*f.parameters(), x])
    for g, e in zip(found, gradients, strict=True):
        close(g, e, 1e-6)


def gradient_error(adjoint, solver="anderson"):
    f, x = Map(), inputs().requires_grad_()
    _, gradients = reference(f, x)
    solution = nde.solve(nde.SteadyState(f), zeros(), args=x, adjoint=adjoint, **how(solver))
    found = torch.autograd.grad(solution.final.square().sum(), [*f.parameters(), x])
    return max(float((g - e).norm() / e.norm()) for g, e in zip(found, gradients, strict=True))


APPROXIMATE = {
    "jfb": ("jfb", 0, 1.0),
    "neumann": (nde.adjoints.Neumann(3), 3, 1.0),
    "phantom": (nde.adjoints.Phantom(4, damping=0.7), 3, 0.7),
}


def series(f, x, z, terms, damping):
    """Gradients of Σ z² by λ = τ Σ_{i ≤ terms} (I - τ (I - Jᵀ))ⁱ v, densely: of so many terms, or of damped steps."""
    z = z.detach()
    jacobian = (1 - f(z, x).detach() ** 2)[:, :, None] * f.w.detach()
    step = (1 - damping) * torch.eye(D, dtype=z.dtype) + damping * jacobian.mT
    costate = term = damping * 2 * z
    for _ in range(terms):
        term = (step @ term[..., None])[..., 0]
        costate = costate + term
    return torch.autograd.grad(f(z, x), [*f.parameters(), x], costate)


@pytest.mark.parametrize("solver", SOLVERS + EQUILIBRIUM)
def test_every_backward_of_every_solver(solver):
    """From near the steady state: λ is the dense one, to its tolerance or to as many terms as it has."""
    f, x = Map(), inputs().requires_grad_()
    end, expected = reference(f, x)
    given = how(solver) | {"max_steps": 20000}
    for adjoint in (*IMPLICIT, *APPROXIMATE):
        kind, *truncated = APPROXIMATE.get(adjoint, (adjoint,))
        solution = nde.solve(nde.SteadyState(f), (1 - 1e-6) * end, args=x, adjoint=kind, **given)
        assert bool(solution.converged.all())
        found = torch.autograd.grad(solution.final.square().sum(), [*f.parameters(), x])
        wanted = series(f, x, solution.final, *truncated) if truncated else expected
        for g, e in zip(found, wanted, strict=True):
            close(g, e, 1e-6)


def test_approximate_gradients_have_errors_that_fall():
    neumann = [gradient_error(nde.adjoints.Neumann(k)) for k in (1, 2, 4, 8)]
    phantom = [gradient_error(nde.adjoints.Phantom(k, damping=0.7)) for k in (1, 2, 4, 8)]
    for errors in ([gradient_error("jfb"), *neumann], phantom):
        assert all(b < 0.8 * a for a, b in itertools.pairwise(errors)), errors
    assert neumann[-1] < 1e-2 * neumann[0]


def test_the_same_approximations_by_other_names():
    assert gradient_error("jfb") == pytest.approx(gradient_error(nde.adjoints.Phantom(1, damping=1.0)))
    assert gradient_error(nde.adjoints.Neumann(3)) == pytest.approx(
        gradient_error(nde.adjoints.Phantom(4, damping=1.0))
    )


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_short_names_of_adjoints(name):
    """Where the equation is a steady state; elsewhere the message has the whole one."""
    z, equation = torch.ones(1, 1), nde.SteadyState(lambda z, x: 0.5 * z + x)
    x = torch.ones(1, 1, requires_grad=True)
    solution = nde.solve(equation, z, solver="fixed_point", args=x, adjoint=name)
    solution.final.sum().backward()
    close(x.grad, torch.full((1, 1), 2.0), 1e-3)
    assert solution.backward_stats.linear_solves.tolist() != [0]
    nde.DeepEquilibrium(lambda z, x: 0.5 * z + x, adjoint=name)
    with refused(ValueError, f"implicit-{name}"):
        nde.solve(nde.ODE(lambda t, z: -z), z, (0.0, 1.0), adjoint=name)


@pytest.mark.parametrize("solver", ["fixed_point", "tsit5", "rosenbrock23"])
def test_direct_differentiates_the_steps(solver):
    """Its gradients tend to the implicit ones, and z0 has one that dies out."""
    f, x = Map(), inputs().requires_grad_()
    _, gradients = reference(f, x)
    z0 = zeros().requires_grad_()
    solution = nde.solve(nde.SteadyState(f), z0, args=x, adjoint="direct", **how(solver))
    loss = solution.final.square().sum()
    *found, by_start = torch.autograd.grad(loss, [*f.parameters(), x, z0])
    for g, e in zip(found, gradients, strict=True):
        close(g, e, 5e-3 if solver == "rosenbrock23" else 1e-5)
    assert 0 < float(by_start.abs().max()) < 1e-2


@pytest.mark.parametrize("adjoint", [a for a in STEADY if a != "direct"])
def test_the_start_has_no_gradient_but_its_own(adjoint):
    f, x, z0 = Map(), inputs(), zeros().requires_grad_()
    solution = nde.solve(nde.SteadyState(f), z0, args=x, adjoint=adjoint, solver="anderson")
    (by_end,) = torch.autograd.grad(solution.final.sum(), z0, allow_unused=True, retain_graph=True)
    assert by_end is None or not bool(by_end.any())
    (by_start,) = torch.autograd.grad(solution.zs[0].sum(), z0)
    assert bool((by_start == 1).all())


def test_of_an_ode():
    """dz/dt = A (z - c) comes to rest at c."""
    c = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    ode = nde.ODE(
        lambda t, z, c: torch.stack([c[:, 0] - z[:, 0], 3 * (z[:, 0] - c[:, 0]) - 2 * (z[:, 1] - c[:, 1])], 1)
    )
    for solver in ("tsit5", "newton", "broyden"):
        solution = nde.solve(nde.SteadyState.of(ode), zeros(1, 2), solver=solver, args=c, rtol=1e-8, atol=1e-10)
        close(solution.final, c.detach(), 1e-7)
        (gradient,) = torch.autograd.grad(solution.final.sum(), c)
        close(gradient, torch.ones_like(gradient), 1e-7)


# -- one engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_discrete_is_euler(damping, control):
    """Step by step, figure by figure, to the last bit; the observer keeps the iteration in the loop of the ODEs."""
    f, x = Map(), inputs()
    given = {"args": x, "control": control, "rtol": 1e-6, "dense": True, "observer": object()}
    one = nde.solve(nde.SteadyState(f), zeros(), solver=nde.solvers.FixedPoint(damping), **given)
    other = nde.solve(nde.SteadyState(f), zeros(), solver="euler", dt0=damping, **given)
    assert torch.equal(one.steps.mask, other.steps.mask)
    for name in ("t", "dt", "residual"):
        assert torch.equal(getattr(one.steps, name), getattr(other.steps, name))
    torch.testing.assert_close(one.steps.z, other.steps.z, rtol=1e-15, atol=1e-15)
    assert torch.equal(one.stats.nfe, other.stats.nfe)
    z = zeros()
    for j in range(len(one.steps)):
        rows = one.steps.mask[j]
        torch.testing.assert_close(one.steps.z[j][rows], z[rows], rtol=1e-14, atol=1e-14)
        z = z + damping * (f(z, x) - z)


class Awkward(torch.nn.Module):
    """Samples that come to rest fast, slowly and not at all; one runs away, one meets NaN, one starts with it."""

    RATES = (0.5, -0.9, 0.97, 0.2, 2.0, 0.99, 0.3)

    def forward(self, z, x):
        rate = x[:, :1]
        value = rate * z + x
        value = torch.where((rate == 0.99) & (z.abs() > 1.2), float("nan"), value)
        return torch.where(rate == 0.3, float("nan"), value) if z.isfinite().all() else value


@pytest.mark.parametrize("solver", EQUILIBRIUM)
@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("rates", [Awkward.RATES, (0.5, -0.9, 0.97, 0.2, 0.0)])
def test_the_iterations_own_loop_does_what_the_general_one_does(solver, control, best, rates):
    x = torch.tensor(rates, dtype=torch.float64)[:, None] * torch.ones(1, 3, dtype=torch.float64)
    x = x.repeat(3, 1)  # all of a kind end at the same step, and the batch is compacted twice
    termination = nde.Termination(best=best, rtol=1e-6, divergence=1e3, patience=12)
    given = {"args": x, "control": control, "max_steps": 150, "termination": termination, "on_failure": "ignore"}
    z0 = torch.full_like(x, 0.1)
    own, general = (
        nde.solve(nde.SteadyState(Awkward()), z0, solver=solver, observer=observer, dense=True, **given)
        for observer in (None, object())
    )
    assert torch.equal(own.status, general.status)
    for name in ("nfe", "accepted", "rejected", "linear_solves"):
        assert torch.equal(getattr(own.stats, name), getattr(general.stats, name)), name
    fine = own.usable | torch.tensor(best)  # of a lost sample the general loop has lost the last state too
    for name in ("final", "residual"):
        found, wanted = (getattr(x, name)[fine] for x in (own, general))
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12, equal_nan=True)
    assert torch.equal(own.steps.mask, general.steps.mask)
    for name in ("t", "dt", "residual", "z"):
        found, wanted = (getattr(x.steps, name)[x.steps.mask] for x in (own, general))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("adjoint", STEADY)
def test_a_gradient_that_reaches_nothing_is_none(adjoint):
    """Without parameters or inputs that want one; f's derivative by z alone is none of the steady state."""
    given = {"solver": "fixed_point", "adjoint": adjoint}
    x = torch.ones(2, 1, requires_grad=True)
    for f in (lambda z, x: 0.5 * z + 1.0, lambda z, x: 0.5 * z + x.detach()):
        assert not nde.solve(nde.SteadyState(f), zeros(2, 1), args=x, **given).final.requires_grad
    wanted = nde.solve(nde.SteadyState(lambda z, x: 0.5 * z + x), zeros(2, 1), args=x * 1.0, **given).final
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    assert bool((gradient >= 1.0).all())


def test_an_horizon_of_the_same_equation():
    """n steps of Euler with dt = 1 on [0, n] are n iterates."""
    f, x = Map(), inputs()
    equation = nde.SteadyState(f)
    unrolled = nde.solve(equation.ode, zeros(), (0.0, 4.0), solver="euler", dt0=1.0, args=x)
    iterated = nde.solve(equation, zeros(), 4.0, rtol=1e-9, solver="fixed_point", args=x, atol=0.0, on_failure="ignore")
    torch.testing.assert_close(unrolled.final, iterated.final, rtol=1e-14, atol=1e-14)
    assert bool((iterated.status == nde.Status.NOT_CONVERGED).all()) and bool((iterated.t_end == 4.0).all())


# -- samples are alone ---------------------------------------------------------------------------------------------


def rotation(z, rate):
    """A linear map per sample, whose contraction is the sample's own rate; the fixed point is that of `shifted`."""
    turned = torch.stack([z[:, 0] - 0.3 * z[:, 1], z[:, 1] + 0.3 * z[:, 0]], dim=1) / 1.09**0.5
    return rate[:, None] * turned + torch.tanh(rate)[:, None]


@pytest.mark.parametrize("solver", [*EQUILIBRIUM, "tsit5", "vcab3", "auto"])
def test_a_slow_sample_costs_the_others_nothing(solver):
    """What each gets and pays is what it gets and pays alone; f is evaluated for more, by no more than a factor."""
    rate = torch.linspace(0.1, 0.5, 24, dtype=torch.float64)
    rate[7] = 0.97
    counted = Counted(lambda t, z, rate: rotation(z, rate))
    given = {"solver": solver, "rtol": 1e-5, "atol": 1e-7}
    f = lambda z, rate: counted(None, z, rate)  # noqa: E731
    together = nde.solve(nde.SteadyState(f), zeros(24, 2), args=rate, **given)
    evaluated, needed = counted.rows, int(together.stats.nfe.sum())
    assert bool(together.converged.all())
    for i in (0, 7, 23):
        alone = nde.solve(nde.SteadyState(rotation), zeros(1, 2), args=rate[i : i + 1], **given)
        assert together.stats.nfe[i] == alone.stats.nfe[0]
        assert together.depth[i] == alone.depth[0]
        torch.testing.assert_close(together.final[i], alone.final[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together.residual[i], alone.residual[0], rtol=1e-3, atol=1e-12)
    # Rows that have ended are evaluated until it is worth leaving them out: steps of an iteration are cheap, and wait.
    assert evaluated < (2.5 if solver in EQUILIBRIUM else 1.1) * needed
    if solver in ("fixed_point", "tsit5", "vcab3"):  # the others are done before it is worth leaving samples out
        assert int(together.stats.nfe[7]) > 2 * int(together.stats.nfe.double().median())


def test_joint_control_ends_the_batch_as_one():
    rate = torch.tensor([0.1, 0.9], dtype=torch.float64)
    solution = nde.solve(
        nde.SteadyState(rotation), zeros(2, 2), solver="fixed_point", args=rate, control="joint", rtol=1e-6
    )
    assert solution.stats.nfe[0] == solution.stats.nfe[1]
    assert solution.residual[0] == solution.residual[1] <= 1e-6


# -- the solvers ---------------------------------------------------------------------------------------------------


def test_the_table_of_the_papers_linear_examples():
    table = steps_to_rest()
    steps = {(alpha, solver): n for alpha, row in table.items() for solver, n in row.items()}
    assert set(steps) == {(a, s) for a in ALPHAS for s in ("fixed_point", "anderson", "broyden", "tsit5", "vcab3")}
    # z_k = b (1 - αᵏ) / (1 - α): the residual is |α|ᵏ of the first one.
    assert steps[0.99, "fixed_point"] > 5 * steps[0.9, "fixed_point"] > 25 * steps[0.5, "fixed_point"] > 0
    # A scalar linear equation is a secant's to solve: one step to see the slope, one to go there.
    assert all(steps[alpha, solver] <= 3 for alpha in ALPHAS for solver in ("anderson", "broyden"))
    # Where the map turns, the equation does not: dz/dt = -1.9 z.
    assert steps[-0.9, "fixed_point"] > 2 * steps[-0.9, "tsit5"]
    assert steps[0.99, "tsit5"] < 0.5 * steps[0.99, "fixed_point"]


def test_newton_finds_the_fixed_points_of_an_expanding_map():
    shift = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)[:, None].requires_grad_()
    solution = nde.solve(
        nde.SteadyState(lambda z, s: 3 * z + s), torch.ones(5, 1).double(), solver="newton", args=shift
    )
    close(solution.final, -shift / 2, 1e-6)
    (gradient,) = torch.autograd.grad(solution.final.sum(), shift)
    close(gradient, torch.full_like(gradient, -0.5), 1e-6)
    assert bool((solution.depth <= 3).all()) and bool((solution.stats.linear_solves > 0).all())
    assert bool((solution.stats.nfe >= 1 + solution.stats.linear_solves + 2 * solution.depth).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_singular_history_does_no_harm(solver, dtype):
    """One sample's iterates lie in one direction, one has none at all; the third needs all of the history."""
    matrix = torch.zeros(3, 6, 6, dtype=dtype)
    matrix[0] = 0.5 * torch.eye(6, dtype=dtype)
    matrix[2] = torch.diag(torch.linspace(-0.9, 0.9, 6, dtype=dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    solution = nde.solve(
        nde.SteadyState(lambda z, a: (a @ z[..., None])[..., 0] + 1.0),
        torch.zeros(3, 6, dtype=dtype),
        solver=nde.solvers.SOLVERS[solver],
        args=matrix,
        termination=nde.Termination("relative", rtol=tolerance),
    )
    expected = torch.linalg.solve(torch.eye(6, dtype=dtype) - matrix, torch.ones(3, 6, dtype=dtype))
    assert bool(solution.converged.all())
    close(solution.final, expected, 20 * tolerance)
    assert int(solution.depth[2]) < 40


@pytest.mark.parametrize("memory", [2, 4, 30])
@pytest.mark.parametrize("kind", [nde.solvers.Anderson, nde.solvers.Broyden])
def test_limited_memory(kind, memory):
    """Less memory than steps still converges; more of it takes fewer steps than plain iteration does."""
    f, x = Map(scale=0.98), inputs()
    given = {"args": x, "rtol": 1e-9, "atol": 1e-10}
    plain = nde.solve(nde.SteadyState(f), zeros(), solver="fixed_point", **given)
    solution = nde.solve(nde.SteadyState(f), zeros(), solver=kind(memory=memory), **given)
    assert bool(solution.converged.all())
    close(solution.final, plain.final, 1e-7)
    if memory > 2:
        assert bool((solution.depth <= plain.depth).all()) and int(solution.depth.sum()) < int(plain.depth.sum())


@pytest.mark.parametrize("memory", [4, 30])
def test_a_full_memory_does_not_lose_the_way(memory):
    """Where f contracts, more steps than Broyden's memory has room for lead to the steady state all the same."""
    generator = torch.Generator().manual_seed(0)
    matrix, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    x = torch.randn(16, 40, generator=generator, dtype=torch.float64)
    equation = nde.SteadyState(lambda z, x: torch.tanh(0.98 * z @ matrix + 0.3 * x))
    given = {"args": x, "rtol": 1e-8, "atol": 1e-9}
    solution = nde.solve(equation, torch.zeros_like(x), solver=nde.solvers.Broyden(memory=memory), **given)
    assert bool(solution.converged.all()) and int(solution.depth.max()) > memory + 1
    close(solution.final, nde.solve(equation, torch.zeros_like(x), solver="fixed_point", **given).final, 1e-6)


@pytest.mark.parametrize("kind", [nde.solvers.Broyden, nde.solvers.Newton])
def test_a_line_search_goes_where_full_steps_overshoot(kind):
    """From far away, for g(z) = -arctan(z), whose Newton steps from beyond 1.39 lead ever farther away."""
    equation = nde.SteadyState(lambda z: z - torch.atan(z))
    z0 = torch.tensor([[3.0], [-5.0], [0.5]], dtype=torch.float64)
    given = {"rtol": 1e-8, "atol": 1e-10, "max_steps": 60, "termination": nde.Termination("absolute", atol=1e-8)}
    solution = nde.solve(equation, z0, solver=kind(line_search=True), **given)
    assert bool(solution.converged.all())
    close(solution.final + 1.0, torch.ones(3, 1, dtype=torch.float64), 1e-8)
    if kind is nde.solvers.Newton:
        plain = nde.solve(equation, z0, solver=kind(line_search=False), on_failure="ignore", **given)
        assert plain.converged.tolist() == [False, False, True]
        # Its direction is one of descent; Broyden's need not be, and then the last try is taken, where ‖g‖ may grow.
        residuals = torch.cat([torch.atan(z0).abs().T, solution.steps.residual])
        pairs = residuals[1:][solution.steps.mask], residuals[:-1][solution.steps.mask]
        assert bool((pairs[0] < pairs[1]).all())
        assert bool((solution.stats.nfe[:2] > 3 * solution.depth[:2]).all())  # the shorter steps are counted


@pytest.mark.parametrize("solver", [*EQUILIBRIUM, "tsit5"])
def test_structures_and_complex_states(solver):
    def f(z, x):
        return {"a": 0.5 * torch.tanh(z["b"][:, :2, 0]) + x, "b": 0.3 * z["b"].flip(1) + z["a"][:, :1, None]}

    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    z0 = {"a": zeros(2, 2), "b": torch.zeros(2, 3, 1, dtype=torch.float64)}
    solution = nde.solve(nde.SteadyState(f), z0, solver=solver, args=x, rtol=1e-7, atol=1e-9)
    again = f(solution.final, x)
    for name in ("a", "b"):
        close(solution.final[name], again[name], 1e-6)
    assert bool(torch.autograd.grad(solution.final["a"].sum(), x)[0].abs().min() > 0)

    turn = 0.5j * torch.exp(torch.tensor(1j, dtype=torch.complex128))
    c = torch.tensor([[1.0 + 1j], [2.0 - 1j]], dtype=torch.complex128, requires_grad=True)
    start = torch.zeros(2, 1, dtype=torch.complex128)
    solution = nde.solve(
        nde.SteadyState(lambda z, c: turn * z + c), start, solver=solver, args=c, rtol=1e-8, atol=1e-10
    )
    close(solution.final, c / (1 - turn), 1e-7)
    (gradient,) = torch.autograd.grad(solution.final.abs().square().sum(), c)
    close(gradient, 2 * c.detach() / (1 - turn).abs() ** 2, 1e-6)


# -- termination ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
@pytest.mark.parametrize("mode", ["absolute", "relative", "norm"])
@pytest.mark.parametrize("solver", ["fixed_point", "tsit5"])
def test_modes(solver, mode, norm):
    """The residual is what the mode says, at the first step at which it is within the tolerance."""
    f, x = Map(), inputs()
    termination = nde.Termination(mode, rtol=1e-4, atol=1e-3, norm=norm)
    solution = nde.solve(nde.SteadyState(f), zeros(), solver=solver, args=x, rtol=1e-5, termination=termination)
    size = {
        "rms": lambda v: v.norm(dim=1) / D**0.5, "l2": lambda v: v.norm(dim=1), "max": lambda v: v.abs().amax(dim=1)
    }[norm]  # fmt: skip
    image = f(solution.final, x)
    excess, whole = size(image - solution.final), size(image)
    floor = {"absolute": torch.ones_like(whole), "relative": whole, "norm": whole.clamp(min=10.0)}[mode]
    torch.testing.assert_close(solution.residual, (excess / floor).detach(), rtol=1e-9, atol=1e-15)
    tolerance = 1e-3 if mode == "absolute" else 1e-4
    assert solution.termination.tolerance == tolerance
    last = solution.depth - 1
    residuals, everyone = solution.steps.residual, torch.arange(BATCH)
    assert bool((residuals[last, everyone] == solution.residual).all())
    assert bool((residuals[last - 1, everyone] > tolerance).all())


def test_error_and_stiffness_of_an_iteration_are_residual_and_contraction():
    rate = torch.tensor([0.3, 0.6], dtype=torch.float64)
    equation = nde.SteadyState(rotation)
    given = {"args": rate, "termination": nde.Termination("absolute", atol=1e-9), "dense": True}
    solution = nde.solve(equation, zeros(2, 2), solver="fixed_point", **given)
    steps = solution.steps
    assert torch.equal(steps.error, steps.residual)
    ends = torch.cat([steps.z[1:], solution.final[None]])
    excess = rotation(ends[0], rate) - ends[0]
    torch.testing.assert_close(steps.error[0], excess.norm(dim=1) / 2**0.5)
    # A scaled rotation contracts by its rate in every direction.
    torch.testing.assert_close(steps.stiffness[steps.mask], rate.expand(len(steps), 2)[steps.mask], rtol=1e-6, atol=0)
    torch.testing.assert_close(nde.introspection.contraction(solution), rate, rtol=1e-6, atol=0)
    torch.testing.assert_close(nde.introspection.spectral_radius(solution), rate, rtol=1e-9, atol=0)


def test_at_rest_from_the_start():
    rate = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    equation = nde.SteadyState(rotation)
    end = nde.solve(equation, zeros(2, 2), solver="newton", args=rate, rtol=1e-10).final.detach()
    for solver in ("fixed_point", "anderson", "tsit5"):
        solution = nde.solve(equation, end, solver=solver, args=rate)
        assert bool(solution.converged.all()) and solution.depth.tolist() == [0, 0]
        assert len(solution.steps) == 0 and solution.steps.residual.shape == (0, 2)
        assert bool(torch.autograd.grad(solution.final.sum(), rate)[0].all())
        assert "residual" in repr(solution)


def test_the_way_of_a_continuous_solve_can_be_looked_up():
    f, x = Map(), inputs()
    solution = nde.solve(nde.SteadyState(f), zeros(), args=x, rtol=1e-6, atol=1e-8)
    full = nde.solve(nde.SteadyState(f).ode, zeros(), (0.0, 2.0), args=x, rtol=1e-9, atol=1e-11)
    close(solution(1.0), full(1.0), 1e-4)
    assert solution.ts.shape == (2, BATCH) and bool((solution.ts[1] > 5.0).all())
    assert solution.steps.z.shape == (len(solution.steps), BATCH, D)
    iterated = nde.solve(nde.SteadyState(f), zeros(), args=x, solver="broyden")
    with refused(ValueError, "broyden", "steps.z"):
        iterated(1.0)
    with refused(ValueError, "broyden", "dense=True"):
        _ = iterated.steps.z
    with refused(ValueError, "broyden", "fixed_point"):
        nde.introspection.replay(iterated)
    kept = nde.solve(nde.SteadyState(f), zeros(), args=x, solver="broyden", dense=True)
    torch.testing.assert_close(kept.steps.z[1], f(zeros(), x))
