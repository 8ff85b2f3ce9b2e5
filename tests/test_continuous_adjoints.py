"""The adjoints that solve an equation backwards: how accurate they are, what they take in, and what they refuse."""

import inspect
import math
import re

import pytest
import torch
from helpers import ADJOINTS, CONTINUOUS, CONTROLS, SOLVERS, close, refused
from torch import nn

import neuralde as nde
import regularizers as reg

BATCH, SIZE = 5, 3
ADJOINT = pytest.mark.parametrize("adjoint", CONTINUOUS)
CONTROL = pytest.mark.parametrize("control", CONTROLS)


class Setup:
    """A vector field with parameters, args (per sample) and a closed-over, computed tensor; and several outputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.net = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Linear(6, SIZE)).double()
        for p in self.net.parameters():
            p.data = draw(*p.shape)
        self.leaf, self.z0 = draw(SIZE).requires_grad_(), draw(BATCH, SIZE).requires_grad_()
        self.args = (1 + 0.3 * draw(BATCH, 1)).requires_grad_()
        self.t = torch.tensor([0.1, 0.6, 1.1, 2.0], dtype=torch.float64, requires_grad=True)

    @property
    def inputs(self):
        return [self.z0, self.args, self.leaf, self.t, *self.net.parameters()]

    def solve(self, adjoint, control="per_sample", tolerance=1e-8, **more):
        computed = torch.tanh(self.leaf)

        def f(t, z, args):
            return self.net(z) * args * torch.cos(t) - 0.5 * z + 0.1 * computed

        more = {"rtol": tolerance, "atol": tolerance} | more
        return nde.solve(nde.ODE(f), self.z0, self.t, adjoint=adjoint, args=self.args, control=control, **more)

    def gradients(self, *arguments, **more):
        solution = self.solve(*arguments, **more)
        loss = (solution.zs[1:] ** 2).sum() + solution.final.prod(dim=1).sum()
        return torch.autograd.grad(loss, self.inputs)


def off(gradients, reference):
    """The relative error of several gradients, in norm."""
    flat, other = (torch.cat([g.flatten() for g in x]) for x in (gradients, reference))
    return float((flat - other).norm() / other.norm())


@pytest.fixture(scope="module")
def accurate():
    return Setup().gradients("direct", solver="dopri8", tolerance=1e-13)


def test_the_reference_gradient_is_that_of_finite_differences(accurate):
    setup, step = Setup(), 1e-4

    def loss():
        solution = setup.solve("direct", solver="dopri8", tolerance=1e-13)
        return float((solution.zs[1:] ** 2).sum() + solution.final.prod(dim=1).sum())

    generator = torch.Generator().manual_seed(1)
    for x, g in zip(setup.inputs, accurate, strict=True):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = {}
            for k in (-2, -1, 1, 2):
                x += k * step * direction
                values[k] = loss()
                x -= k * step * direction
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
        assert float((g * direction).sum()) == pytest.approx(slope, rel=1e-8, abs=1e-9)


@ADJOINT
@CONTROL
def test_the_error_falls_with_the_tolerance(adjoint, control, accurate):
    """The error of a solution, and a gradient is one here, is in proportion to the tolerance."""
    tolerances = [10.0**-k for k in (4, 6, 8)]
    errors = [off(Setup().gradients(adjoint, control, tolerance=x), accurate) for x in tolerances]
    x, y = torch.tensor(tolerances, dtype=torch.float64).log10(), torch.tensor(errors, dtype=torch.float64).log10()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert 0.75 < slope < 1.4, errors
    assert all(error < 30 * tolerance for error, tolerance in zip(errors, tolerances, strict=True)), errors


# "quadrature" solves backwards as "interpolating" does: one method of every family shows that. Those whose steps take
# longest have "backsolve" alone in the ordinary run.
LONG = ("vcab3", "auto", "implicit_euler", "dopri8")


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [
        pytest.param(a, s, marks=[pytest.mark.slow] if a != "backsolve" and s in LONG else [])
        for a in CONTINUOUS
        for s in (SOLVERS if a != "quadrature" else ["heun", "tsit5", "vcab3", "rodas5p", "auto"])
    ],
)
def test_every_solver_solves_backwards(adjoint, solver, accurate):
    """Its order shows: with steps half as large, the errors fall by 2^order."""
    method, errors = nde.solvers.get(solver), []
    # A multistep method starts anew, with two steps of another one, where the loss looks: its order shows later.
    for dt0 in (0.025, 0.0125) if method.history else (0.1, 0.05) if method.order > 2 else (0.04, 0.02):
        setup = Setup()
        fixed = nde.StepControl(adaptive=False)
        # The forward solve is far more accurate: the error is that of the backward one, whose steps end with its steps.
        ahead = dt0 / 2 if method.order > 6 or method.history else dt0
        chosen = type(nde.adjoints.get(adjoint))(solver=solver, dt0=dt0)
        errors.append(off(setup.gradients(chosen, control=fixed, solver="dopri8", dt0=ahead), accurate))
    assert errors[1] < 0.05
    # The parameters' integral is taken on the interpolant.
    order = min(method.order, method.interpolant_order + 1)
    assert math.log2(errors[0] / errors[1]) > order - 0.25


@ADJOINT
@CONTROL
def test_gradients_do_not_depend_on_the_unit_of_the_loss(adjoint, control):
    """The costate is scaled before it meets atol: a mean over a large batch has a gradient as accurate as a sum."""
    setup = Setup()

    def gradients(scale):
        solution = setup.solve(adjoint, control, tolerance=1e-5)
        return torch.autograd.grad((solution.zs**2).sum() * scale, setup.inputs[:3])

    for g, h in zip(gradients(1.0), gradients(2.0**-40), strict=True):
        assert torch.equal(g, h * 2.0**40)


@ADJOINT
def test_a_sample_s_gradient_does_not_depend_on_the_others(adjoint):
    setup = Setup()
    (whole,) = torch.autograd.grad((setup.solve(adjoint, tolerance=1e-5).zs ** 2).sum(), setup.z0)
    for i in range(BATCH):
        alone = Setup()
        alone.z0, alone.args = (x.detach()[i : i + 1].requires_grad_() for x in (alone.z0, alone.args))
        (g,) = torch.autograd.grad((alone.solve(adjoint, tolerance=1e-5).zs ** 2).sum(), alone.z0)
        close(g[0], whole[i], 1e-12)


@ADJOINT
def test_samples_of_very_different_lengths(adjoint):
    """Lanes are compacted and regrouped in the backward solve too, and impulses must find their samples."""
    rate = torch.tensor([[0.1], [1.0], [30.0], [3.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.5, 2.0], [1.0, 0.7, 0.0], [0.0, 2.9, 3.0]], dtype=torch.float64)
    z0 = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    solution = nde.solve(
        nde.ODE(lambda t, z, a: a * torch.cos(a * t) * z), z0, t, adjoint=adjoint, args=rate, rtol=1e-8, atol=1e-8
    )
    weights = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)[:, None, None]
    found = torch.autograd.grad((solution.zs * weights).sum(), [z0, rate])
    times = t.T[..., None]
    exact = torch.exp(torch.sin(rate * times) - torch.sin(rate * times[0])) * z0
    wanted = torch.autograd.grad((exact * weights).sum(), [z0, rate])
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)


@ADJOINT
@CONTROL
@pytest.mark.parametrize("structure", ["tuple", "dict"])
def test_structures(adjoint, control, structure):
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([[1.0, 2.0]], [[0.5, -1.0]]))

    def rates(x, v):
        return v, -weight * torch.sin(x)

    def solve(adjoint):
        if structure == "tuple":
            z0, f = (x, v), lambda t, z: rates(*z)
        else:
            z0, f = {"x": x, "v": v}, lambda t, z: dict(zip("xv", rates(z["x"], z["v"]), strict=True))
        solution = nde.solve(nde.ODE(f), z0, (0.0, 2.0), adjoint=adjoint, control=control, rtol=1e-9, atol=1e-9)
        one, two = solution.final if structure == "tuple" else solution.final.values()
        return torch.autograd.grad((one * two).sum(), [x, v, weight])

    for g, h in zip(solve(adjoint), solve("direct"), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-7)


@ADJOINT
@CONTROL
@pytest.mark.parametrize("terminal", [True, False])
def test_events(adjoint, control, terminal):
    """A falling ball: the event's time and state, outputs before and after it, and one sample that never gets there."""
    height = torch.tensor([[2.0], [1.0], [50.0]], dtype=torch.float64, requires_grad=True)
    gravity = torch.tensor(9.81, dtype=torch.float64, requires_grad=True)
    floor = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def solve(adjoint):
        event = nde.Event(lambda t, z: z[:, 0] - floor, terminal=terminal)
        z0 = torch.cat([height, torch.zeros_like(height)], dim=1)
        t = torch.tensor([0.0, 0.2, 0.55, 1.0], dtype=torch.float64)
        f = nde.ODE(lambda t, z: torch.stack([z[:, 1] * torch.ones_like(z[:, 0]), -gravity - 0.1 * z[:, 1]], dim=1))
        solution = nde.solve(f, z0, t, events=event, adjoint=adjoint, control=control, rtol=1e-10, atol=1e-10)
        there = solution.events[0].mask
        loss = solution.events[0].t[there].sum() + (solution.events[0].z[there] ** 2).sum() + (solution.zs**2).sum()
        return torch.autograd.grad(loss, [height, gravity, floor])

    for g, h in zip(solve(adjoint), solve("direct"), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-7)


@ADJOINT
@CONTROL
def test_jumps_of_f(adjoint, control):
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[1.0], [0.3]], dtype=torch.float64, requires_grad=True)

    def solve(adjoint):
        f = nde.ODE(lambda t, z: torch.where(t < 0.5, weight[0], weight[1]) * z)
        solution = nde.solve(
            f, z0, (0.0, 1.0), jump_times=[0.5], adjoint=adjoint, control=control, rtol=1e-9, atol=1e-9
        )
        return torch.autograd.grad(solution.final.sum(), [z0, weight])

    found = solve(adjoint)
    end = z0.detach() * math.exp(0.5 * 0.5 - 2.0 * 0.5)
    torch.testing.assert_close(found[0], end / z0.detach(), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(found[1], 0.5 * end.sum().expand(2), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("adjoint", [a for a in CONTINUOUS if nde.adjoints.get(a).keep is None])
@CONTROL
def test_dense_output_and_steps(adjoint, control):
    """Where the states are kept, what is read between the outputs has its gradient too."""
    setup = Setup()
    query = torch.tensor([0.3, 0.9, 1.7], dtype=torch.float64)

    def gradients(adjoint):
        solution = setup.solve(adjoint, control, tolerance=1e-9)
        return torch.autograd.grad((solution(query) ** 2).sum(), [setup.z0, setup.args, *setup.net.parameters()])

    assert off(gradients(adjoint), gradients("direct")) < 1e-7
    solution = setup.solve(adjoint, control, tolerance=1e-9)
    (g,) = torch.autograd.grad((solution.steps.z[-1] ** 2).sum(), setup.z0)
    solution = setup.solve("direct", control, tolerance=1e-9)
    (h,) = torch.autograd.grad((solution.steps.z[-1] ** 2).sum(), setup.z0)
    torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-7)


@ADJOINT
@pytest.mark.parametrize("figure", ["error", "stiffness"])
def test_the_solver_s_figures_have_no_gradient_and_say_so(adjoint, figure):
    setup = Setup()
    solution = setup.solve(adjoint)
    value = getattr(solution, figure).sum()
    direct = setup.solve("direct")
    torch.testing.assert_close(value, getattr(direct, figure).sum(), rtol=1e-6, atol=0.0)
    # A loss may use both, and only one of them raises.
    both = ("solution.error", "LocalError", "solution.stiffness", "LocalStiffness")
    with refused(nde.NeuralDEError, repr(adjoint), "'checkpointed'", "'direct'", *both):
        value.backward()


@pytest.mark.parametrize("make", [nde.adjoints.Backsolve, nde.adjoints.Interpolating])
def test_the_states_between_checkpoints_have_no_gradient_and_say_so(make):
    solution = Setup().solve(make(checkpoints=2))
    with refused(nde.NeuralDEError, repr(make(checkpoints=2)), "'interpolating'", "without checkpoints"):
        solution(0.5).sum().backward()


@ADJOINT
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@pytest.mark.parametrize("through_state", [False, True])
def test_local_penalties(adjoint, sampling, through_state):
    """One step from a sampled time: whatever made the solution, the penalty is the same."""
    setup = Setup()

    def penalized(adjoint):
        penalty = reg.LocalError(
            sampling=sampling, through_state=through_state, generator=torch.Generator().manual_seed(3)
        )
        value = penalty(setup.solve(adjoint, tolerance=1e-7))
        return value, lambda: torch.autograd.grad(value, list(setup.net.parameters()))

    (value, gradients), (other, exact) = penalized(adjoint), penalized("direct")
    torch.testing.assert_close(value, other, rtol=1e-6, atol=0.0)
    if through_state and nde.adjoints.get(adjoint).keep is not None:
        with refused(nde.NeuralDEError, "'checkpointed'", "'direct'"):
            gradients()
    else:
        assert off(gradients(), exact()) < 1e-4


@ADJOINT
def test_second_derivatives_are_refused(adjoint):
    setup = Setup()
    with refused(nde.NeuralDEError, repr(adjoint), "'direct'", "'checkpointed'"):
        torch.autograd.grad(setup.solve(adjoint).final.sum(), setup.z0, create_graph=True)


@ADJOINT
@CONTROL
@pytest.mark.parametrize("look", ["final", "zs"])
def test_a_gradient_of_zero_is_not_missing(adjoint, control, look):
    setup = Setup()
    inputs = [setup.z0, setup.args, setup.leaf, *setup.net.parameters()]
    loss = (getattr(setup.solve(adjoint, control), look) * 0.0).sum()
    assert all(
        g.shape == x.shape and not g.any() for x, g in zip(inputs, torch.autograd.grad(loss, inputs), strict=True)
    )
    # zs[0] is z0 itself.
    found = torch.autograd.grad(setup.solve(adjoint, control).zs[0].sum(), inputs)
    assert bool((found[0] == 1).all()) and not any(g.any() for g in found[1:])


@ADJOINT
@CONTROL
def test_no_sample_arrives(adjoint, control):
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    f = nde.ODE(lambda t, z: rate * z**2)
    solution = nde.solve(f, z0, (0.0, 2.0), adjoint=adjoint, control=control, on_failure="ignore")
    assert not bool(solution.converged.any())
    found = torch.autograd.grad(solution.final[solution.converged].sum() + 0.0 * solution.final.sum(), [z0, rate])
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("checkpoints", [None, 2])
def test_several_gradients_at_once(adjoint, checkpoints):
    make = type(nde.adjoints.get(adjoint))
    if checkpoints is not None and "checkpoints" not in inspect.signature(make).parameters:
        pytest.skip("has no checkpoints")
    chosen = make() if checkpoints is None else make(checkpoints=checkpoints)
    setup = Setup()
    inputs = [setup.z0, setup.args, *setup.net.parameters()]
    final = setup.solve(chosen, tolerance=1e-5).final
    directions = torch.randn(4, *final.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def at_once():
        return torch.autograd.grad(final, inputs, directions, is_grads_batched=True, retain_graph=True)

    def jacobian():
        return torch.autograd.functional.jacobian(
            lambda x: nde.solve(nde.ODE(lambda t, z: setup.net(z)), x, (0.0, 1.0), adjoint=chosen).final,
            setup.z0.detach(),
            vectorize=True,
        )

    if adjoint in CONTINUOUS:
        for run in (at_once, jacobian):
            with refused(nde.NeuralDEError, "at once", repr(adjoint), "'checkpointed'", "'direct'"):
                run()
        with refused(nde.NeuralDEError, "torch.func.vmap", repr(adjoint), "'direct'"):
            torch.func.vmap(lambda x: torch.autograd.grad(final, setup.z0, x))(directions)
        return
    singly = [torch.autograd.grad(final, inputs, x, retain_graph=True) for x in directions]
    for several, *single in zip(at_once(), *singly, strict=True):
        close(several, torch.stack(single), 1e-12)
    assert jacobian().shape == (BATCH, SIZE) * 2


@ADJOINT
def test_what_the_loss_does_not_look_at_is_not_solved(adjoint):
    setup = Setup()
    solution = setup.solve(adjoint)
    (solution.final[1] ** 2).sum().backward()
    assert setup.z0.grad[[0, 2, 3, 4]].abs().max() == 0.0 < setup.z0.grad[1].abs().max()
    nfe = solution.backward_stats.nfe
    assert nfe[[0, 2, 3, 4]].max() == 0 < nfe[1]


@ADJOINT
@CONTROL
def test_a_loss_that_overflowed(adjoint, control):
    """A GradScaler looks for it; a solve of infinities would fail, and could say nothing more."""
    setup = Setup()
    inputs = [setup.z0, setup.args, *setup.net.parameters()]
    found = torch.autograd.grad((setup.solve(adjoint, control).final * float("inf")).sum(), inputs)
    assert all(bool(g.isnan().all()) for g in found)
    solution = setup.solve(adjoint, control)
    (g,) = torch.autograd.grad((solution.final[0] * float("nan")).sum() + solution.final[1].sum(), setup.z0)
    assert bool(g[0].isnan().all()) and bool(g[1:].isfinite().all())


@ADJOINT
def test_options_are_used(adjoint):
    make = type(nde.adjoints.get(adjoint))

    def nfe(chosen, **more):
        setup = Setup()
        solution = setup.solve(chosen, **more)
        solution.final.sum().backward()
        return int(solution.backward_stats.nfe.max())

    usual = nfe(make(), tolerance=1e-6)
    assert nfe(make(rtol=1e-10, atol=1e-10), tolerance=1e-6) > 1.5 * usual
    assert nfe(make(rtol=1e-6, atol=1e-6), tolerance=1e-6) == usual
    assert nfe(make(solver="dopri8"), tolerance=1e-6) != usual
    assert nfe(make(solver="rk4", dt0=0.01), tolerance=1e-6) >= 4 * 190
    setup = Setup()
    words = f"backward solve of adjoint={adjoint!r}", f"{make.__name__}(max_steps=...)", "max_steps=3", "'checkpointed'"
    for few, change in ((make(solver="rk4", dt0=1e-4, max_steps=3), "dt0"), (make(max_steps=3, rtol=1e-12), "rtol")):
        with refused(nde.MaxStepsReached, *words, f"({change}=...") as caught:
            setup.solve(few).final.sum().backward()
        assert "contracts" not in str(caught.value) and "horizon" not in str(caught.value)
    assert repr(make(rtol=1e-4, solver="bs3")) == f"{make.__name__}(rtol=0.0001, solver='bs3')"
    assert repr(make()) == f"{make.__name__}()"


@ADJOINT
def test_bad_options(adjoint):
    make = type(nde.adjoints.get(adjoint))
    with refused(ValueError, "rtol", "positive"):
        make(rtol=-1.0)
    with refused(ValueError, "atol"):
        make(atol=float("nan"))
    with refused(ValueError, "solver", "did you mean 'tsit5'"):
        make(solver="tsit")
    with refused(ValueError, "dt0"):
        make(dt0=0.0)
    with refused(ValueError, "max_steps"):
        make(max_steps=0)
    with refused(TypeError, make.__name__, "positional"):
        make(10)
    with refused(ValueError, "dt0", "'rk4'"):
        Setup().solve(make(solver="rk4"))
    with refused(ValueError, f"{make.__name__}(dt0=...)", "'rk4'"):
        nde.NeuralODE(nn.Linear(2, 2), adjoint=make(solver="rk4"))
    # The step size of the solve will do, where it has one.
    nde.NeuralODE(nn.Linear(2, 2), solver="heun", dt0=0.5, adjoint=make(solver="rk4"))(
        torch.ones(1, 2)
    ).sum().backward()


@ADJOINT
@pytest.mark.parametrize("name", ["rtol", "atol", "dt0", "max_steps"])
def test_options_are_numbers(adjoint, name):
    make = type(nde.adjoints.get(adjoint))
    for value in ("1e-3", torch.tensor([1e-3, 1e-4]), [1.0], True):
        with refused(TypeError, name):
            make(**{name: value})
    assert getattr(make(**{name: torch.tensor(2)}), name) == 2


def test_options_that_an_adjoint_does_not_have():
    for make in (nde.adjoints.Quadrature, nde.adjoints.Direct):
        with refused(TypeError, make.__name__):
            make(checkpoints=3)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_help_describes_every_option(name):
    make = type(nde.adjoints.get(name))
    for option in inspect.signature(make).parameters:
        assert re.search(rf"^\s+(\w+, )*{option}(, \w+)*: ", make.__doc__, flags=re.MULTILINE), option


def test_bad_options_of_backsolve():
    make = nde.adjoints.Backsolve
    with refused(ValueError, "dt_min", "dt_max", "1", "0.1"):
        make(dt_min=1, dt_max=0.1)
    with refused(TypeError, "dt_max"):
        make(dt_max="0.1")
    with refused(ValueError, "dt_min", "bounds adaptive steps"):
        make(solver="rk4", dt0=0.1, dt_min=0.1)
    with refused(ValueError, "dt_max", "bounds adaptive steps"):
        nde.NeuralODE(nn.Linear(2, 2), solver="rk4", dt0=0.1, adjoint=make(dt_max=0.1))
    with refused(ValueError, "seminorm", "rodas5p"):
        make(solver="rodas5p", seminorm=False)
    with refused(ValueError, "control", "per_sample=True"):
        nde.NeuralODE(nn.Linear(2, 2), adjoint=make(control=nde.StepControl(per_sample=False)))


def test_the_parameters_in_the_error_test():
    """seminorm=False: more steps, the same gradient, and joint control only."""
    found = {}
    for seminorm in (True, False):
        setup = Setup()
        chosen = nde.adjoints.Backsolve(seminorm=seminorm)
        solution = setup.solve(chosen, "joint", tolerance=1e-6)
        loss = 1e3 * solution.final.sum()
        found[seminorm] = torch.autograd.grad(loss, setup.inputs), int(solution.backward_stats.nfe.max())
    assert off(found[True][0], found[False][0]) < 1e-5
    assert found[True][1] != found[False][1]
    with refused(ValueError, "seminorm", 'control="joint"'):
        Setup().solve(nde.adjoints.Backsolve(seminorm=False))
    with refused(ValueError, "seminorm", 'control="joint"'):
        nde.NeuralODE(nn.Linear(2, 2), adjoint=nde.adjoints.Backsolve(seminorm=False))
    nde.NeuralODE(nn.Linear(2, 2), adjoint=nde.adjoints.Backsolve(seminorm=False), control="joint")
    with refused(ValueError, "seminorm", "rodas5p"):
        Setup().solve(nde.adjoints.Backsolve(seminorm=False), "joint", solver="rodas5p")
    with refused(ValueError, "seminorm", "rtol"):
        Setup().solve(nde.adjoints.Backsolve(seminorm=False), "joint", rtol=torch.full((SIZE,), 1e-6))
    with refused(TypeError, "seminorm"):
        nde.adjoints.Backsolve(seminorm="yes")


def test_backsolve_says_when_it_can_not_go_back():
    """f contracts by exp(-60): what is lost forwards, nobody finds again backwards. The others need not look for it."""
    rate = torch.tensor(60.0, requires_grad=True)
    z0 = torch.tensor([[1.0, 2.0]], requires_grad=True)

    def gradient(adjoint):
        f = nde.ODE(lambda t, z: -rate * (z - torch.cos(t)) ** 3 - rate * (z - torch.cos(t)))
        solution = nde.solve(f, z0, (0.0, 1.0), adjoint=adjoint, rtol=1e-5, atol=1e-6)
        return torch.autograd.grad(solution.final.sum(), rate)[0]

    with refused(nde.StepSizeUnderflow, "backward solve of adjoint='backsolve'", "contracts", "'interpolating'"):
        gradient("backsolve")
    exact = gradient("direct")
    for adjoint in ("interpolating", "quadrature"):
        torch.testing.assert_close(gradient(adjoint), exact, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("adjoint", ["interpolating", "quadrature"])
def test_a_backward_solve_that_is_not_finite_says_why(adjoint):
    z0 = torch.ones(2, 1, requires_grad=True)
    solution = nde.solve(nde.ODE(lambda t, z: 0.0 * torch.sqrt((z - 1.0).abs())), z0, (0.0, 1.0), adjoint=adjoint)
    with refused(nde.NonFiniteState, f"backward solve of adjoint={adjoint!r}", "f's derivative", "square root"):
        solution.final.sum().backward()


@ADJOINT
@CONTROL
def test_failed_samples(adjoint, control):
    """They have gradients up to where they got, and spoil nobody else's."""
    z0 = torch.tensor([[1.0], [0.1]], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)

    def gradient(adjoint):
        solution = nde.solve(
            nde.ODE(lambda t, z: rate * z**2),  # 1 / (1/z0 - t) ends at t = 1/z0
            z0,
            t,
            adjoint=adjoint,
            control=control,
            rtol=1e-8,
            atol=1e-8,
            on_failure="ignore",
        )
        assert not bool(solution.converged[0])
        loss = solution.zs[1].sum() + solution.final[solution.converged].sum()
        return torch.autograd.grad(loss, [z0, rate])

    for g, h in zip(gradient(adjoint), gradient("direct"), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-6)


@ADJOINT
def test_what_is_changed_in_between_is_found(adjoint):
    setup = Setup()
    solution = setup.solve(adjoint)
    with torch.no_grad():
        solution.zs.mul_(1.0)  # the outputs may be changed: they are copies
        next(setup.net.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.final.sum().backward()


@ADJOINT
def test_no_gradient_of_every_sample_s_parameters_is_made(adjoint):
    """The largest tensor of a backward pass is far smaller than [batch, parameters]."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x._base is None:
                    self.numel = max(self.numel, x.numel())
            return out

    batch = 64
    net = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 8))
    parameters = sum(p.numel() for p in net.parameters())
    layer = nde.NeuralODE(net, adjoint=adjoint)
    out = layer(torch.randn(batch, 8)).sum()
    with Largest() as seen:
        out.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert seen.numel < batch * parameters / 8


VARIANTS = {
    f"{make.__name__}({', '.join(f'{k}={v}' for k, v in options.items())})": make(**options)
    for make, options in (
        *((nde.adjoints.Backsolve, {"checkpoints": k}) for k in (1, 3, 1000)),
        *((nde.adjoints.Interpolating, {"checkpoints": k}) for k in (1, 3, 1000)),
        (nde.adjoints.Backsolve, {"seminorm": False}),
        (nde.adjoints.Backsolve, {"seminorm": False, "checkpoints": 3}),
    )
}


@pytest.mark.parametrize("variant", VARIANTS)
@CONTROL
def test_variants(variant, control, accurate):
    """Options change the memory and the steps, not what the gradient is."""
    chosen = VARIANTS[variant]
    if control == "per_sample" and not getattr(chosen, "seminorm", True):
        pytest.skip("joint control only")
    assert off(Setup().gradients(chosen, control, tolerance=1e-7), accurate) < 3e-6


@pytest.mark.parametrize("variant", [*CONTINUOUS, *VARIANTS])
def test_a_sample_that_ended_while_the_others_went_on(variant):
    """Under joint control it stands still beyond its event: no state that it has there is one to go back from."""
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[1.0], [2.0], [0.4]], dtype=torch.float64)

    def gradient(adjoint):
        solution = nde.solve(
            nde.ODE(lambda t, z: weight * z * torch.cos(z) ** 2 + weight * z / 2),
            z0,
            (0.0, 2.0),
            adjoint=adjoint,
            control="joint",
            events=nde.Event(lambda t, z: z[:, 0] - 3.0),
            rtol=1e-7,
            atol=1e-7,
        )
        times = solution.events[0].t[solution.events[0].mask]
        return torch.autograd.grad(solution.final.sum() + times.sum(), weight)[0]

    torch.testing.assert_close(gradient(VARIANTS.get(variant, variant)), gradient("direct"), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("variant", [*CONTINUOUS, *VARIANTS])
@pytest.mark.parametrize("how", [{"dt_max": 0.01}, {"step_times": [0.48, 0.49, 0.5, 0.51, 0.52]}], ids=str)
def test_steps_are_bounded_backwards_as_forwards(variant, how):
    """A pulse that the error test alone would step over, in either direction."""
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def gradient(adjoint):
        def f(t, z):
            return weight * torch.exp(-(((t - 0.5) / 0.01) ** 2)) * torch.cos(z)

        how_else = {"adjoint": adjoint, "control": "joint", "rtol": 1e-6, "atol": 1e-6, **how}
        solution = nde.solve(nde.ODE(f), torch.ones(2, 1, dtype=torch.float64), (0.0, 1.0), **how_else)
        return torch.autograd.grad(solution.final.sum(), weight)[0]

    exact = gradient("direct")
    torch.testing.assert_close(gradient(VARIANTS.get(variant, variant)), exact, rtol=2e-3, atol=0.0)


@ADJOINT
def test_what_is_another_f_only_later_is_found(adjoint):
    net, factor = nn.Linear(2, 2).double(), [1.0]
    f = nde.ODE(lambda t, z: net(z) * (1.0 + (factor[0] - 1.0) * t))
    solution = nde.solve(f, torch.ones(1, 2, dtype=torch.float64), (0.0, 1.0), adjoint=adjoint)
    factor[0] = 3.0
    with refused(nde.NeuralDEError, "another result", repr(adjoint)):
        solution.final.sum().backward()


@pytest.mark.parametrize("make", [nde.adjoints.Backsolve, nde.adjoints.Interpolating])
def test_dense_output_is_not_to_be_had_with_checkpoints(make):
    with refused(ValueError, "dense=True", "checkpoints=2"):
        Setup().solve(make(checkpoints=2), dense=True)
    Setup().solve(make(), dense=True).final.sum().backward()
