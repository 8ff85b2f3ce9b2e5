"""Gradients of every quantity of a solution, under every adjoint, against finite differences on the frozen grid."""

import pytest
import torch
from helpers import CONTROLS, EXACT, SOLVERS, refused
from torch import nn

import neuralde as nde
import regularizers as reg

BATCH, SIZE = 4, 3
TIMES = (0.0, 0.33, 0.71, 1.6)
QUERY = (0.2, 1.1)


# Keeps the stages of a step apart. Where two of them nearly coincide, the stiffness bends so sharply that finite
# differences are the less accurate side.
SPIN = torch.tensor([[-1.0, 3.0, 0.0], [-3.0, -1.0, 0.5], [0.0, -0.5, -2.0]], dtype=torch.float64)


class Setup:
    """A vector field with parameters, args (per sample), and a closed-over, computed tensor."""

    def __init__(self):
        generator = torch.Generator().manual_seed(11)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.inner = nn.Linear(SIZE, 5).double()
        self.outer = nn.Linear(5, SIZE).double()
        for p in (*self.inner.parameters(), *self.outer.parameters()):
            p.data = draw(*p.shape)
        self.leaf = draw(SIZE).requires_grad_()
        self.z0 = draw(BATCH, SIZE).requires_grad_()
        self.args = {"scale": (1.5 + draw(BATCH, 1).tanh()).requires_grad_()}
        self.compute()

    def compute(self):
        self.computed = torch.tanh(self.leaf * 0.5)

    def f(self, t, z, args):
        learned = self.outer(torch.tanh(self.inner(z) * (1 + t))) * args["scale"] - self.computed * torch.sin(z)
        return 0.3 * learned + z @ SPIN

    @property
    def inputs(self):
        return {
            "z0": self.z0,
            "args": self.args["scale"],
            "closed over": self.leaf,
            **{f"inner.{n}": p for n, p in self.inner.named_parameters()},
            **{f"outer.{n}": p for n, p in self.outer.named_parameters()},
        }

    def solve(self, solver, control, adjoint, **more):
        self.compute()
        if not nde.solvers.get(solver).adaptive:
            more["dt0"] = 0.12
        return nde.solve(
            nde.ODE(self.f),
            self.z0,
            torch.tensor(TIMES, dtype=torch.float64),
            solver=solver,
            control=control,
            adjoint=adjoint,
            args=self.args,
            rtol=1e-3 if nde.solvers.get(solver).order > 1 else 1e-1,
            atol=1e-2,
            **more,
        )


QUANTITIES = {
    "final": lambda s: (s.final**2).sum(),
    "zs": lambda s: (s.zs**3).sum(),
    "solution(t)": lambda s: (s(torch.tensor(QUERY, dtype=torch.float64)) ** 2).sum(),
    "steps.z": lambda s: (s.steps.z**2).sum(),
    "error": lambda s: s.error.sum(),
    "stiffness": lambda s: s.stiffness.sum(),
}


def reported(solver):
    solver = nde.solvers.get(solver)
    missing = {"error": solver.error_order is None, "stiffness": not solver.reports_stiffness}
    return [name for name in QUANTITIES if not missing.get(name, False)]


def gradients(setup, solution, quantity):
    inputs = list(setup.inputs.values())
    found = torch.autograd.grad(QUANTITIES[quantity](solution), inputs, retain_graph=True)
    return dict(zip(setup.inputs, found, strict=True))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_against_finite_differences(solver, control):
    setup = Setup()
    solutions = {adjoint: setup.solve(solver, control, adjoint) for adjoint in EXACT}
    frozen = solutions["direct"]
    generator = torch.Generator().manual_seed(1)
    directions = {n: torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in setup.inputs.items()}
    exact = {(a, q): gradients(setup, s, q) for a, s in solutions.items() for q in reported(solver)}
    step = 5e-5
    for name, x in setup.inputs.items():
        # Fourth-order central differences, so that the step can be large enough for the rounding in small estimates.
        values = {}
        for k in (-2, -1, 1, 2):
            with torch.no_grad():
                x += k * step * directions[name]
                setup.compute()
                moved = nde.introspection.replay(frozen, z0=setup.z0, args=setup.args)
                values[k] = {q: float(QUANTITIES[q](moved)) for q in reported(solver)}
                x -= k * step * directions[name]
        for quantity in reported(solver):
            near, far = (values[k][quantity] - values[-k][quantity] for k in (1, 2))
            difference = (8 * near - far) / (12 * step)
            for adjoint in EXACT:
                slope = float((exact[adjoint, quantity][name] * directions[name]).sum())
                # Relative, but for derivatives so small that rounding in the quantity decides.
                assert slope == pytest.approx(difference, rel=1e-6, abs=1e-8), (quantity, name, adjoint)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", [a for a in EXACT if a != "direct"])
def test_against_direct(solver, control, adjoint):
    setup = Setup()
    one, other = (setup.solve(solver, control, a) for a in ("direct", adjoint))
    for quantity in reported(solver):
        for name, g in gradients(setup, one, quantity).items():
            h = gradients(setup, other, quantity)[name]
            # An estimate is a small difference of stages: a few digits of it are their rounding.
            off = 1e-9 if quantity in ("error", "stiffness") else 1e-10
            torch.testing.assert_close(h, g, rtol=off, atol=off * float(g.abs().max()))


@pytest.mark.parametrize("adjoint", EXACT)
def test_step_sizes_are_constants(adjoint):
    """The gradient is that of the frozen grid, not that of the solve with its step sizes free to move."""
    setup = Setup()
    solution = setup.solve("tsit5", "per_sample", adjoint)
    assert not solution.steps.dt.requires_grad
    (g,) = torch.autograd.grad(solution.error.sum(), setup.z0)
    step, direction = 1e-5, torch.ones_like(setup.z0)
    frozen, free = [], []
    for sign in (1, -1):
        with torch.no_grad():
            setup.z0 += sign * step * direction
            frozen.append(float(nde.introspection.replay(solution, z0=setup.z0).error.sum()))
            free.append(float(setup.solve("tsit5", "per_sample", "direct").error.sum()))
            setup.z0 -= sign * step * direction
    frozen, free = ((v[0] - v[1]) / (2 * step) for v in (frozen, free))
    assert float(g.sum()) == pytest.approx(frozen, rel=1e-6)
    assert abs(free - frozen) > 0.05 * abs(frozen)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("control", CONTROLS)
def test_times_get_the_gradient_of_the_continuous_solution(adjoint, control):
    def f(t, z):
        return -z * torch.cos(3 * t)

    z0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    t = torch.tensor([0.2, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    solution = nde.solve(nde.ODE(f), z0, t, control=control, adjoint=adjoint, rtol=1e-10, atol=1e-10)
    weights = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    (g,) = torch.autograd.grad((solution.zs.sum(dim=(1, 2)) * weights).sum(), t)
    z = 3.0 * torch.exp(-(torch.sin(3 * t.detach()) - torch.sin(3 * t.detach()[0])) / 3)
    slope = -z * torch.cos(3 * t.detach())
    expected = slope * weights
    expected[0] = float((z[1:] * weights[1:]).sum() * torch.cos(3 * t.detach()[0]))
    torch.testing.assert_close(g, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("which", ["end", "start", "output"])
def test_second_derivatives_by_times_are_refused(adjoint, which):
    """Also the mixed ones, whichever comes first; those by other things go through a solve with such times."""
    times = [torch.tensor(x, dtype=torch.float64) for x in (0.0, 0.4, 1.0)]
    t = times[{"start": 0, "output": 1, "end": 2}[which]].requires_grad_()
    z0 = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    solution = nde.solve(nde.ODE(lambda t, z: -(z**2)), z0, torch.stack(times), adjoint=adjoint, rtol=1e-8, atol=1e-8)
    for loss in (solution.zs.square().sum(), solution.zs.sum()):
        by_z, by_t = torch.autograd.grad(loss, [z0, t], create_graph=True)
        for first, second in ((by_t, t), (by_t, z0), (by_z, t)):
            with refused(nde.NeuralDEError, "the gradient of t has first derivatives only"):
                torch.autograd.grad(first.sum(), second, retain_graph=True)
    (second,) = torch.autograd.grad(by_z.sum(), z0)
    at = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)  # z = z0 / (1 + z0·t), of the sum over t
    exact = (-2 * at / (1 + 2 * at) ** 3).sum()
    torch.testing.assert_close(second.sum(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("adjoint", EXACT)
def test_query_times_are_differentiable(adjoint):
    z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    solution = nde.solve(nde.ODE(lambda t, z: -2 * z), z0, (0.0, 1.0), adjoint=adjoint, rtol=1e-9, atol=1e-9)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(solution(t).sum(), t)
    torch.testing.assert_close(g, -4 * torch.exp(-2 * t.detach()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("adjoint", EXACT)
def test_double_backward(adjoint):
    setup = Setup()
    leaf = setup.computed = setup.leaf  # closed over as it is

    def value(z0):
        solution = nde.solve(
            nde.ODE(lambda t, z, a: torch.tanh(setup.inner(z)) @ setup.outer.weight.T * a["scale"] - leaf * z),
            z0,
            (0.0, 1.0),
            adjoint=adjoint,
            args=setup.args,
            solver="bs3",
            dt0=0.25,
            control=nde.StepControl(adaptive=False),
        )
        return (solution.final**2).sum()

    assert torch.autograd.gradgradcheck(value, setup.z0.detach().requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("penalty", [reg.GlobalError(), reg.GlobalStiffness()], ids=["error", "stiffness"])
def test_double_backward_of_figures_where_samples_make_different_numbers_of_steps(penalty):
    found = []
    for adjoint in EXACT:
        z0 = torch.tensor([[0.01], [1.0], [2.0], [20.0]], dtype=torch.float64).repeat(1, SIZE).requires_grad_()
        f = nde.ODE(lambda t, z: torch.sin(z) @ SPIN)
        solution = nde.solve(f, z0, (0.0, 1.0), rtol=1e-6, atol=1e-6, adjoint=adjoint)
        assert len(solution.stats.accepted.unique()) > 1
        (first,) = torch.autograd.grad(penalty(solution), z0, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), z0)
    for second in found:
        assert float(second.abs().min()) > 0.0
        torch.testing.assert_close(second, found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))


def test_double_backward_refuses_what_it_cannot_tell_apart():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    z0 = torch.randn(2, 3, dtype=torch.float64) @ weight
    solution = nde.solve(nde.ODE(lambda t, z: torch.tanh(z @ weight)), z0, (0.0, 1.0))
    with pytest.raises(nde.NeuralDEError, match="adjoint='direct'"):
        torch.autograd.grad(solution.final.sum(), weight, create_graph=True)
    (first,) = torch.autograd.grad(solution.final.sum(), weight, retain_graph=True)
    direct = nde.solve(nde.ODE(lambda t, z: torch.tanh(z @ weight)), z0, (0.0, 1.0), adjoint="direct")
    torch.testing.assert_close(first, torch.autograd.grad(direct.final.sum(), weight)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_tensor_that_f_uses_only_later_gets_its_gradient(adjoint):
    """One look at f's first evaluation would miss it: it is found by inspecting what f can reach."""
    late = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(t, z):
        return -z * late if bool((t > 0.5).any()) else -z

    solution = nde.solve(nde.ODE(f), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0), adjoint=adjoint)
    (g,) = torch.autograd.grad(solution.final.sum(), late)
    assert float(g) < -0.1


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_shared_encoder_is_not_counted_twice(adjoint):
    """f uses a tensor that was computed from a parameter, and the parameter itself."""
    weight = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    def final(weight):
        code = torch.tanh(x @ weight)
        solution = nde.solve(
            nde.ODE(lambda t, z: torch.tanh(z @ weight) + code),
            code,
            (0.0, 1.0),
            adjoint=adjoint,
            dt0=0.2,
            control=nde.StepControl(adaptive=False),
        )
        return solution.final

    assert torch.autograd.gradcheck(final, weight)


@pytest.mark.parametrize("adjoint", EXACT)
def test_rejected_steps_leave_no_trace(adjoint):
    """A first step far too large: rejected attempts must change neither values nor gradients on the frozen grid."""
    setup = Setup()
    solution = setup.solve("tsit5", "per_sample", adjoint, dt0=1.5)
    assert int(solution.stats.rejected.sum()) > 0
    (g,) = torch.autograd.grad((solution.final**2).sum(), setup.z0, retain_graph=True)
    again = nde.introspection.replay(solution)
    (h,) = torch.autograd.grad((again.final**2).sum(), setup.z0)
    torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", EXACT)
def test_an_attempt_that_overflows_does_not_poison_the_gradient(adjoint):
    """exp overflows in a rejected attempt of one sample; zero times infinity must not reach the gradients."""
    rate = torch.tensor(1.0, dtype=torch.float32, requires_grad=True)
    z0 = torch.tensor([[3.0], [0.1]], requires_grad=True)
    solution = nde.solve(nde.ODE(lambda t, z: -rate * torch.exp(z * z) * z), z0, (0.0, 0.5), adjoint=adjoint, dt0=0.4)
    assert int(solution.stats.rejected[0]) > 0 and bool(solution.converged.all())
    for g in torch.autograd.grad(solution.final.sum(), [z0, rate]):
        assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize("adjoint", EXACT)
def test_output_times_of_every_sample_under_joint_control(adjoint):
    t = torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.8, 1.0]], dtype=torch.float64, requires_grad=True)
    z0 = torch.ones(2, 1, dtype=torch.float64)
    f = nde.ODE(lambda t, z: -z * torch.cos(3 * t))
    solution = nde.solve(f, z0, t, control="joint", adjoint=adjoint, rtol=1e-9, atol=1e-9)
    (g,) = torch.autograd.grad(solution.zs[1].sum(), t)
    expected = -torch.exp(-torch.sin(3 * t.detach()) / 3) * torch.cos(3 * t.detach())
    torch.testing.assert_close(g[:, 1], expected[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_failed_sample_does_not_reach_the_gradient_of_the_times(adjoint):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[0.1], [3.0]], dtype=torch.float64)
    solution = nde.solve(nde.ODE(lambda t, z: z**2), z0, t, adjoint=adjoint, on_failure="ignore", rtol=1e-8, atol=1e-10)
    assert solution.converged.tolist() == [True, False]
    (g,) = torch.autograd.grad(solution.final[solution.converged].sum(), t)
    slope = (0.1 / 0.9) ** 2
    torch.testing.assert_close(g, torch.tensor([-slope, slope], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("leaf", [True, False])
def test_hooks_see_the_whole_gradient(adjoint, leaf):
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    held = w if leaf else w * 1.0
    calls = []
    held.register_hook(lambda g: calls.append(g) or 0.5 * g)
    z0 = torch.ones(1, 1, dtype=torch.float64)
    solution = nde.solve(nde.ODE(lambda t, z: -held * z), z0, (0.0, 1.0), adjoint=adjoint, rtol=1e-9, atol=1e-9)
    solution.final.sum().backward()
    assert float(w.grad) == pytest.approx(-0.5 * float(torch.exp(torch.tensor(-1.0))), rel=1e-5)
    assert len(calls) == 1 or adjoint == "direct"


def test_a_tensor_that_the_replay_cannot_follow_is_refused():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, w):
            ctx.save_for_backward(z, w)
            return z * w

        @staticmethod
        def backward(ctx, g):
            z, w = ctx.saved_tensors
            return g * w, (g * z).sum()

    leaf = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    computed = leaf * 2
    z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)

    def run(adjoint):
        final = nde.solve(nde.ODE(lambda t, z: Scale.apply(z, computed)), z0, (0.0, 1.0), adjoint=adjoint).final
        return torch.autograd.grad(final.sum(), leaf, retain_graph=True, allow_unused=True)[0]

    assert float(run("direct")) == pytest.approx(4 * 0.3679, rel=1e-3)
    try:
        found = run("checkpointed")
    except nde.NeuralDEError as error:
        assert "adjoint='direct'" in str(error)
    else:
        assert found is not None and float(found) == pytest.approx(float(run("direct")), rel=1e-6)


def test_save_on_cpu_changes_nothing():
    leaf = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    z0 = torch.ones(2, 1, dtype=torch.float64)
    found = []
    for pack in (torch.autograd.graph.save_on_cpu(), torch.enable_grad()):
        with pack:
            computed = leaf * 2
            final = nde.solve(nde.ODE(lambda t, z, c=computed: c * z), z0, (0.0, 1.0)).final
        found.append(torch.autograd.grad(final.sum(), leaf)[0])
    assert torch.equal(*found)


def test_a_solve_in_inference_mode_leaves_nothing_behind():
    solver = nde.solvers.RungeKutta("fresh", nde.solvers.tableaus.DOPRI5, adaptive=True)
    f = nde.ODE(lambda t, z: -z)
    z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    from neuralde.solvers import runge_kutta

    runge_kutta._coefficients.cache_clear()
    with torch.inference_mode():
        nde.solve(f, z0.detach(), (0.0, 1.0), solver=solver)
    solution = nde.solve(f, z0, (0.0, 1.0), solver=solver)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert float(torch.autograd.grad(solution(t).sum(), t)[0]) == pytest.approx(-2 * 0.67032, rel=1e-3)
