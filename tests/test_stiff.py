"""Stiff equations: the published references, what the work was, and the derivatives that implicit methods take."""

import math

import pytest
import torch
from helpers import CONTROLS, EXACT, Counted, refused
from problems import van_der_pol

import neuralde as nde
from neuralde.field import Field
from neuralde.solvers import RosenbrockTableau, tableaus
from neuralde.solvers.linearize import linearize
from neuralde.state import Layout

IMPLICIT = [name for name, solver in nde.solvers.SOLVERS.items() if solver.parts[0].linearizes]
ROSENBROCK = ["rosenbrock23", "rodas5p"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


LOW_ORDER = pytest.mark.xfail(
    strict=True, reason="the global error falls as tolerance^(2/3) (rosenbrock23: 29 and 14 tolerances) or ^(1/2)"
)


# -- published problems ----------------------------------------------------------------------------------------------


def robertson(t, z):
    a, b, c = z.unbind(dim=1)
    first, second, third = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return torch.stack([second - first, first - second - third, third], dim=1)


def accurate(z, reference, rtol, atol):
    """Each component within 10 times the tolerance."""
    return bool(((z - reference).abs() <= 10 * (atol + rtol * reference.abs())).all())


@pytest.mark.parametrize(
    ("solver", "rtol", "atol"),
    [
        ("rosenbrock23", 1e-4, 1e-18),
        ("rodas5p", 1e-4, 1e-18),
        ("rodas5p", 1e-6, 1e-20),
        ("rodas5p", 1e-8, 1e-22),
        ("auto", 1e-4, 1e-18),
        ("auto", 1e-6, 1e-18),
        ("auto", 1e-8, 1e-20),
        pytest.param("rosenbrock23", 1e-6, 1e-20, marks=LOW_ORDER),
        pytest.param("implicit_euler", 1e-4, 1e-18, marks=LOW_ORDER),
    ],
)
def test_robertson_to_ten_to_the_eleven(solver, rtol, atol):
    """Reference: Mazzia & Magherini, Test Set for Initial Value Problem Solvers, problem ROBER."""
    reference = double(0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050)
    z0 = double([1.0, 0.0, 0.0])
    solution = nde.solve(nde.ODE(robertson), z0, (0.0, 1e11), solver=solver, rtol=rtol, atol=atol)
    assert accurate(solution.final[0], reference, rtol, atol)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        pytest.param("rosenbrock23", 1e-6, marks=LOW_ORDER),
        ("rosenbrock23", 1e-4),
        ("rodas5p", 1e-4),
        ("rodas5p", 1e-6),
        ("auto", 1e-4),
        ("auto", 1e-6),
    ],
)
def test_van_der_pol(solver, tolerance):
    """Reference: the same test set, problem VDPOL, in its own scaling and in that of μ = 1000 on [0, 2000]."""
    reference = double(0.1706167732170483e1, -0.8928097010247975)
    z0, options = double([2.0, 0.0]), {"solver": solver, "rtol": tolerance, "max_steps": 10000}

    def scaled(t, z):
        x, v = z.unbind(dim=1)
        return torch.stack([v, ((1 - x**2) * v - x) * 1e6], dim=1)

    solution = nde.solve(nde.ODE(scaled), z0, (0.0, 2.0), atol=tolerance, **options)
    assert accurate(solution.final[0], reference, tolerance, tolerance)
    # v is 1000 times smaller in this scaling.
    solution = nde.solve(nde.ODE(van_der_pol(1e3)), z0, (0.0, 2000.0), atol=1e-3 * tolerance, **options)
    assert accurate(solution.final[0] * double(1.0, 1e3), reference, tolerance, tolerance)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    ("f", "start", "end"), [(robertson, [1.0, 0.0, 0.0], 1e11), (van_der_pol(1e3), [2.0, 0.0], 2e3)]
)
def test_the_explicit_run_fails_and_names_stiffness_and_the_solver(f, start, end, control):
    with refused(nde.MaxStepsReached, "stiff for solver 'tsit5'", "stable up to 3.51", "'auto'", "'rodas5p'") as caught:
        nde.solve(nde.ODE(f), double(start), (0.0, end), rtol=1e-4, atol=1e-6, control=control, max_steps=1000)
    assert caught.value.stiffness[0] * caught.value.dt[0] == pytest.approx(3.5, rel=0.5)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", IMPLICIT)
def test_a_stiff_linear_problem_takes_few_steps(solver, control):
    def f(t, z):
        return -1e6 * (z - torch.cos(t))

    options = {"solver": solver, "control": control, "rtol": 1e-4, "atol": 1e-4}
    solution = nde.solve(nde.ODE(f), double([1.0], [2.0], [-3.0]), (0.0, 3.0), **options)
    assert float((solution.final - math.cos(3.0)).abs().max()) < 1e-3
    assert int(solution.stats.accepted.max()) < 400
    found = solution.steps.stiffness[solution.steps.mask]
    torch.testing.assert_close(found, torch.full_like(found, 1e6))


# -- work ------------------------------------------------------------------------------------------------------------


def test_statistics_of_a_rosenbrock_method():
    stages = {"rosenbrock23": 3, "rodas5p": 8}
    for solver in ROSENBROCK:
        f = Counted(van_der_pol(30.0))
        solution = nde.solve(nde.ODE(f), double([2.0, 0.0], [0.5, 1.0]), (0.0, 8.0), solver=solver, rtol=1e-6)
        stats = solution.stats
        attempts = stats.accepted + stats.rejected
        assert torch.equal(stats.jacobians, attempts) and torch.equal(stats.factorizations, attempts)
        assert torch.equal(stats.linear_solves, attempts * stages[solver])
        # The slope at the start and the automatic first step come on top.
        assert torch.equal(stats.nfe, attempts * stages[solver] + 2)
        assert stats.function_calls >= f.calls - 1 and "jacobians" in repr(stats)


def test_statistics_of_implicit_euler():
    solution = nde.solve(nde.ODE(van_der_pol(30.0)), double([2.0, 0.0]), (0.0, 1.0), solver="implicit_euler")
    stats = solution.stats
    attempts = stats.accepted + stats.rejected
    rounds = stats.jacobians - attempts
    assert attempts <= rounds and rounds <= 5 * attempts
    assert torch.equal(stats.factorizations, stats.jacobians)
    assert torch.equal(stats.linear_solves, stats.jacobians + 2 * attempts)
    assert torch.equal(stats.nfe, stats.jacobians + 2 * attempts + 2)


def test_statistics_of_an_explicit_method():
    stats = nde.solve(nde.ODE(lambda t, z: -z), torch.ones(2, 1), (0.0, 1.0)).stats
    for counts in (stats.jacobians, stats.factorizations, stats.linear_solves):
        assert torch.equal(counts, torch.zeros(2, dtype=torch.int64))
    assert "jacobians" not in repr(stats)


# -- derivatives of f ------------------------------------------------------------------------------------------------


class Unbatched(torch.autograd.Function):
    """sin, whose backward pass vmap can't follow, and which can't be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        assert float(g.detach().abs().max()) >= 0.0  # a number: not to be had of a batched tensor
        return g * x.cos()


def field(f, z, control):
    return Field(nde.ODE(f), Layout.of(z), None, control == "joint", True)


def times(control, batch):
    return double(0.7) if control == "joint" else torch.linspace(0.1, 0.9, batch, dtype=torch.float64)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("sine", [torch.sin, Unbatched.apply])
@pytest.mark.parametrize("grad", [True, False])
def test_derivatives_are_the_analytic_ones(control, sine, grad):
    weight = torch.randn(3, 3, dtype=torch.float64)
    z, t = torch.randn(5, 3, dtype=torch.float64), times(control, 5)
    if grad and sine is not torch.sin:
        pytest.skip("this f can't be differentiated twice")

    with torch.set_grad_enabled(grad):
        found = linearize(field(lambda t, z: sine(z @ weight * t) * t, z, control), t, z)
    s = t[:, None].expand(5, 1)
    phase = z @ weight * s
    torch.testing.assert_close(found.value.detach(), phase.sin() * s)
    torch.testing.assert_close(found.jacobian.detach(), (phase.cos() * s**2)[:, :, None] * weight.T)
    torch.testing.assert_close(found.rate.detach(), phase.sin() + s * phase.cos() * (z @ weight))
    assert not (grad is False and any(x.requires_grad for x in found[:3]))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    ("f", "jacobian", "rate"),
    [
        (lambda t, z: torch.ones_like(z), 0.0, 0.0),
        (lambda t, z: 3 * t + torch.zeros_like(z), 0.0, 3.0),
        (lambda t, z: 2 * z, 2.0, 0.0),
        (lambda z: 2 * z, 2.0, 0.0),
        (lambda t, z: z, 1.0, 0.0),
        (lambda t, z, p=torch.nn.Parameter(torch.ones(2).double()): p.expand_as(z), 0.0, 0.0),
    ],
)
def test_derivatives_of_an_f_that_depends_on_less(f, jacobian, rate, control):
    z = torch.randn(4, 2, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = linearize(field(f, z, control), times(control, 4), z)
        torch.testing.assert_close(found.jacobian.detach(), jacobian * torch.eye(2).double().expand(4, 2, 2))
        torch.testing.assert_close(found.rate.detach(), torch.full_like(z, rate))


@pytest.mark.parametrize("control", CONTROLS)
def test_derivatives_are_differentiable(control):
    z, t = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), times(control, 3)
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def derivatives(z, weight):
        found = linearize(field(lambda t, z: torch.tanh(z @ weight * t), z, control), t, z)
        return found.jacobian, found.rate

    assert torch.autograd.gradcheck(derivatives, (z, weight))


@pytest.mark.parametrize("solver", IMPLICIT)
def test_a_solve_in_inference_mode_is_the_ordinary_one(solver):
    with torch.inference_mode():
        net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        code = torch.randn(3, 2, dtype=torch.float64)
        z0 = torch.randn(3, 2, dtype=torch.float64)
        inside = nde.solve(nde.ODE(lambda t, z, a: net(z * t) - code * a), z0, (0.0, 1.0), args=code**2, solver=solver)
    net, code, z0 = (x.clone() if isinstance(x, torch.Tensor) else x for x in (net, code, z0))
    for p in net.parameters():
        p.data = p.data.clone()
    net.requires_grad_(False)
    with torch.no_grad():
        weights = [p.clone() for p in net.parameters()]

    def f(t, z, a):
        return torch.tanh(z * t @ weights[0].T + weights[1]) @ weights[2].T + weights[3] - code * a

    outside = nde.solve(nde.ODE(f), z0, (0.0, 1.0), args=code**2, solver=solver)
    torch.testing.assert_close(inside.final.clone(), outside.final, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("solver", IMPLICIT)
def test_nothing_is_on_a_tape_that_nobody_asked_for(solver, adjoint):
    solution = nde.solve(nde.ODE(lambda t, z: -z * t), torch.ones(2, 2), (0.0, 1.0), solver=solver, adjoint=adjoint)
    for x in (solution.final, solution.error, solution.stiffness, solution(0.5)):
        assert not x.requires_grad


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("solver", IMPLICIT)
def test_first_and_second_derivatives(solver, adjoint):
    rate = double([1.0, 30.0], [2.0, 0.5])

    def final(z0, rate):
        solution = nde.solve(
            nde.ODE(lambda t, z, rate: -rate * (z**2 - torch.cos(t)) + 0.3 * z.flip(1)),
            z0,
            (0.0, 0.5),
            args=rate,
            solver=solver,
            adjoint=adjoint,
            dt0=0.125,
            control=nde.StepControl(adaptive=False),
        )
        return (solution.final**2).sum()

    inputs = double([1.0, 2.0], [0.5, 1.0]).requires_grad_(), rate.requires_grad_()
    assert torch.autograd.gradcheck(final, inputs)
    assert torch.autograd.gradgradcheck(final, inputs, atol=1e-6)


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", IMPLICIT)
def test_every_sample_gets_its_own_solve(solver):
    mu = double(1.0, 100.0, 1000.0, 10.0)
    z0 = double([2.0, 0.0]).expand(4, 2)
    tolerance = 1e-2 if solver == "implicit_euler" else 1e-4
    options = {"solver": solver, "rtol": tolerance, "atol": 0.1 * tolerance}
    together = nde.solve(nde.ODE(van_der_pol(None)), z0, (0.0, 20.0), args=mu, **options)
    for i in range(4):
        alone = nde.solve(nde.ODE(van_der_pol(None)), z0[i : i + 1], (0.0, 20.0), args=mu[i : i + 1], **options)
        torch.testing.assert_close(together.final[i], alone.final[0], rtol=1e-9, atol=1e-11)
        for name in ("nfe", "accepted", "rejected", "jacobians", "factorizations", "linear_solves"):
            assert int(getattr(together.stats, name)[i]) == int(getattr(alone.stats, name)[0]), name


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", IMPLICIT)
def test_an_f_that_mixes_samples_is_refused(solver, control):
    norm = torch.nn.BatchNorm1d(2).double()
    for f in (lambda t, z: z - z.mean(dim=0), lambda t, z: norm(z)):
        with refused(ValueError, "treats every sample alone", "Jacobian", "tsit5", "joint"):
            nde.solve(nde.ODE(f), torch.randn(4, 2).double(), (0.0, 1.0), solver=solver, control=control)
    with refused(ValueError, "BatchNorm1d", "Jacobian"):
        nde.NeuralODE(norm, solver=solver, control=control)


@pytest.mark.parametrize("solver", IMPLICIT)
def test_a_probe_with_another_solver_refuses_an_f_that_mixes_samples(solver):
    z0 = torch.randn(4, 2).double()
    solution = nde.solve(nde.ODE(lambda t, z: z - z.mean(dim=0)), z0, (0.0, 1.0), control="joint")
    with refused(ValueError, "Jacobian"):
        nde.introspection.probe_solution(solution, torch.full((4,), 0.3), solver=solver)


# -- attempts that go wrong ------------------------------------------------------------------------------------------


def singular(solver):
    """λ and a dt with 1 - γ·dt·λ = 0 to the last bit: the matrix of a step."""
    gamma = nde.solvers.get(solver).tableau.gamma if solver in ROSENBROCK else 1.0
    sizes = (1.0 - 0.01 * k for k in range(30))
    return next((1 / (gamma * dt), dt) for dt in sizes if (gamma * dt) * (1 / (gamma * dt)) == 1.0)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", IMPLICIT)
def test_a_singular_matrix_is_a_rejected_attempt(solver, control, adjoint):
    rate, dt = singular(solver)
    rate = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    z0 = double([1.0, 0.5], [2.0, -1.0])
    assert not bool(torch.isfinite(nde.probe(lambda t, z: rate * z, 0.0, z0, dt=dt, solver=solver).z).any())
    options = {"solver": solver, "control": control, "adjoint": adjoint, "rtol": 1e-4, "atol": 1e-4}
    solution = nde.solve(nde.ODE(lambda t, z: rate * z), z0, (0.0, 2.0), dt0=dt, max_steps=20000, **options)
    assert (solution.stats.rejected > 0).all()
    expected = z0 * torch.exp(2 * rate.detach())
    torch.testing.assert_close(
        solution.final.detach(), expected, rtol=0.1 if solver == "implicit_euler" else 1e-2, atol=0
    )
    (gradient,) = torch.autograd.grad(solution.final.sum(), rate)
    assert float(gradient) == pytest.approx(2 * float(expected.sum()), rel=0.2)


def test_an_iteration_that_does_not_converge_is_a_rejected_attempt():
    def f(t, z):
        return -torch.sign(z) * z.abs().sqrt() * 100  # no derivative at 0, where Newton's iteration runs into

    solution = nde.solve(nde.ODE(f), double([1.0]), (0.0, 0.015), solver="implicit_euler", dt0=0.01, rtol=1e-5)
    assert int(solution.stats.rejected) > 0
    assert float(solution.final) == pytest.approx((1 - 0.75) ** 2, abs=2e-2)


@pytest.mark.parametrize("solver", IMPLICIT)
def test_a_step_of_zero_is_zero(solver):
    """What a sample that stands still in the batch gets, however stiff it is."""
    z, t, dt = double([2.0, 0.0], [2.0, 0.0]), double(0.0, 0.0), double(0.0, 0.1)
    method, f = nde.solvers.get(solver), field(van_der_pol(1e9), z, "per_sample")
    step = method.attempt(f, t, dt, z, None, method.memory(z, False))
    assert torch.equal(step.z[0], z[0]) and torch.equal(step.error[0], torch.zeros(2).double())
    assert not torch.equal(step.z[1], z[1])


@pytest.mark.parametrize("solver", IMPLICIT)
def test_half_precision_converges(solver):
    """f's rounding is coarser than the engine's arithmetic: an iteration must not wait for what f can't give."""
    z0 = torch.ones(2, 3, dtype=torch.bfloat16)
    f = nde.ODE(lambda t, z: -200 * (z - torch.cos(t)))
    solution = nde.solve(f, z0, (0.0, 1.0), solver=solver, rtol=1e-2, atol=1e-2)
    assert solution.final.dtype == torch.bfloat16 and int(solution.stats.rejected.max()) == 0
    assert float((solution.final - math.cos(1.0)).abs().max()) < 0.03


def test_fixed_steps_of_implicit_euler():
    rate = 1e4
    solution = nde.solve(
        nde.ODE(lambda t, z: -rate * (z - torch.cos(t))),
        torch.zeros(1, 1).double(),
        (0.0, 2.0),
        solver="implicit_euler",
        dt0=0.1,
        control=nde.StepControl(adaptive=False),
    )
    assert int(solution.stats.accepted) == 20
    assert float(solution.final) == pytest.approx(math.cos(2.0), abs=1e-3)


# -- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ROSENBROCK)
@pytest.mark.parametrize("name", ["a", "couplings", "b", "c", "d", "error", "interpolant", "gamma"])
def test_a_tableau_checks_itself(solver, name):
    import dataclasses

    tableau = getattr(tableaus, solver.upper())
    value = getattr(tableau, name)

    def spoil(x):
        return x + 1e-6 if isinstance(x, float) else (spoil(x[0]), *x[1:])

    with refused(ValueError, "inconsistent tableau"):
        dataclasses.replace(tableau, **{name: spoil(value)})
    with refused(ValueError, "inconsistent tableau"):
        dataclasses.replace(tableau, **{name: value[:-1]} if name != "gamma" else {"b": (*tableau.b, 0.0)})
    assert isinstance(tableau, RosenbrockTableau)


@pytest.mark.parametrize("solver", IMPLICIT)
def test_an_f_that_hides_its_dependence_on_z_is_refused(solver):
    hidden = nde.ODE(lambda t, z: -(z.detach() ** 2))
    with refused(TypeError, "Jacobian", "detach", "tsit5"):
        nde.solve(hidden, torch.ones(2, 2).double(), (0.0, 1.0), solver=solver)
    weight = torch.nn.Parameter(torch.ones(2).double())
    with refused(TypeError, "Jacobian"):
        nde.solve(nde.ODE(lambda t, z: -weight * z.detach()), torch.ones(2, 2).double(), (0.0, 1.0), solver=solver)
    # A constant one is not.
    steady = nde.solve(nde.ODE(lambda t, z: weight.expand(2, 2)), torch.zeros(2, 2).double(), (0.0, 1.0), solver=solver)
    torch.testing.assert_close(steady.final, torch.ones(2, 2).double())


@pytest.mark.parametrize("control", CONTROLS)
def test_a_probe_steps_with_the_method_that_the_sample_used(control):
    rate = double([1.0], [5000.0], [3000.0], [2.0])
    equation = nde.ODE(lambda t, z: -rate * (z - torch.cos(t)))
    solution = nde.solve(equation, double([1.0]).expand(4, 1), (0.0, 2.0), solver="auto", control=control, rtol=1e-5)
    probe = nde.introspection.probe_solution(solution, torch.full((4,), 1.5).double())
    assert float(probe.error.max()) < 0.1  # tsit5's step would be unstable, and its error hundreds of tolerances
    expected = rate[:, 0] if control == "per_sample" else rate.max().expand(4)
    torch.testing.assert_close(probe.stiffness, expected, rtol=1e-6, atol=0.0)
