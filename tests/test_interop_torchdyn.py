"""Our solvers in torchdyn's NeuralODE, torchdyn's solver objects in our solve."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import ADAPTIVE, CONTINUOUS, CONTROLS, EXACT, FIXED, close, refused
from problems import rotating, rotating_exact
from torch import nn

import neuralde as nde
from neuralde.interop.torchdyn import as_torchdyn, from_torchdyn

core = pytest.importorskip("torchdyn.core")
ode = pytest.importorskip("torchdyn.numerics.solvers.ode")
hyper = pytest.importorskip("torchdyn.numerics.solvers.hyper")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchdyn")

D = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Driven(nn.Module):
    """A vector field that depends on t, with the arguments that torchdyn looks for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t, x, args=None):
        return self.net(x) * torch.cos(3 * t)


class Correction(nn.Module):
    """A hypernetwork."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 3).double()

    def forward(self, t, x):
        return torch.tanh(self.net(x)) * (1 + t)


def start(dtype=D):
    torch.manual_seed(2)
    return torch.randn(5, 3, dtype=dtype)


def own(f, z0, t=(0.0, 1.0), **options):
    return nde.solve(nde.ODE(lambda t, z: f(t, z)), z0, t, **options)


# -- ours in theirs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tsit5", "bs3", "dopri5", "dopri8"])
def test_neural_ode_reproduces_solve(name):
    f, z0 = Driven(), start()
    layer = core.NeuralODE(f, solver=nde.solvers.get(name), **TIGHT)
    t, zs = layer(z0, torch.linspace(0, 1, 4, dtype=D))
    expected = own(f, z0, torch.linspace(0, 1, 4, dtype=D), solver=name, **TIGHT)
    assert t.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(zs, expected.zs, rtol=0, atol=1e-8)


ONE_STEP = [nde.solvers.get(name) for name in ADAPTIVE if nde.solvers.get(name).one_step]


@pytest.mark.parametrize("name", [solver.name for solver in ONE_STEP if solver.linearizes and solver.order > 1])
def test_a_solver_with_a_jacobian(name):
    f, z0 = Driven(), start().requires_grad_()
    layer = core.NeuralODE(f, solver=nde.solvers.get(name), atol=1e-5, rtol=1e-5, return_t_eval=False)
    final, expected = layer(z0, torch.linspace(0, 1, 2))[-1], own(f, z0, rtol=1e-9, atol=1e-9).final
    close(final, expected, 1e-2)
    (a,), (b,) = (torch.autograd.grad(x.square().sum(), z0) for x in (final, expected))
    close(a, b, 1e-2)


@pytest.mark.parametrize("name", [solver.name for solver in ONE_STEP if not solver.linearizes])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_gradients_of_every_sensitivity(name, sensitivity):
    f = Driven()
    tolerance = 1e-9
    # The interpolated adjoint differentiates along a cubic spline through the steps.
    bound = 1e-3 if sensitivity == "interpolated_adjoint" else 1e-6
    layer = core.NeuralODE(
        f,
        solver=nde.solvers.get(name),
        sensitivity=sensitivity,
        atol=tolerance,
        rtol=tolerance,
        atol_adjoint=tolerance,
        rtol_adjoint=tolerance,
        return_t_eval=False,
    )
    z0, again = start().requires_grad_(), start().requires_grad_()
    final = layer(z0, torch.linspace(0, 1, 2))[-1]
    mine = torch.autograd.grad(final.square().sum(), [z0, *f.net.parameters()])
    expected = own(f, again, rtol=1e-11, atol=1e-11).final
    close(final, expected, bound)
    for a, b in zip(mine, torch.autograd.grad(expected.square().sum(), [again, *f.net.parameters()]), strict=True):
        close(a, b, bound)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_steps_are_the_same_steps(name):
    f, z0 = Driven(), start().requires_grad_()
    layer = core.NeuralODE(f, solver=as_torchdyn(name), return_t_eval=False)
    final = layer(z0, torch.linspace(0, 1, 21, dtype=D))[-1]
    expected = own(f, z0, solver=name, dt0=0.05).final
    close(final, expected, 1e-12)
    (a,), (b,) = (torch.autograd.grad(x.square().sum(), z0) for x in (final, expected))
    close(a, b, 1e-12)


def test_rk4_is_of_fourth_order_there():
    """torchdyn's own is of first order where f depends on t."""
    errors = []
    for n in (20, 40):
        layer = core.NeuralODE(
            lambda t, x, args=None: rotating(t, x), solver=nde.solvers.get("rk4"), return_t_eval=False
        )
        final = layer(rotating_exact(0.0)[None], torch.linspace(0, 1, n + 1, dtype=D))[-1]
        errors.append(float((final - rotating_exact(1.0)).norm().detach()))
    assert errors[0] / errors[1] > 12


def test_backwards_in_time_and_save_at():
    f, z0 = Driven(), start()
    layer = core.NeuralODE(f, solver=nde.solvers.get("tsit5"), return_t_eval=False, **TIGHT)
    close(layer(z0, torch.tensor([1.0, 0.0], dtype=D))[-1], own(f, z0, (1.0, 0.0), **TIGHT).final, 1e-8)
    fixed = core.NeuralODE(f, solver=nde.solvers.get("rk4"))
    t, zs = fixed(z0, torch.linspace(0, 1, 11), save_at=torch.tensor([0.0, 1.0]))
    assert zs.shape == (2, 5, 3) and len(t) == 2


def test_float32_and_float64_states_with_torchdyns_default_times():
    """Its default t_span is float32; a float64 state must not lose its digits to that."""
    f = Driven()
    layer = core.NeuralODE(f, solver=nde.solvers.get("tsit5"), return_t_eval=False, **TIGHT)
    torch.testing.assert_close(layer(start())[-1], own(f, start(), **TIGHT).final, rtol=0, atol=1e-8)
    single = core.NeuralODE(copy.deepcopy(f).float(), solver=nde.solvers.get("tsit5"), return_t_eval=False)
    assert single(start(torch.float32), torch.linspace(0, 1, 3)).dtype == torch.float32


def test_fourth_order_interpolation():
    f, z0, span = Driven(), start(), torch.linspace(0, 1, 9, dtype=D)
    layer = core.NeuralODE(f, solver=nde.solvers.get("dopri5"), interpolator="4th", return_t_eval=False, **TIGHT)
    close(layer(z0, span)[4], own(f, z0, (0.0, 0.5), **TIGHT).final, 1e-7)
    other = core.NeuralODE(f, solver=nde.solvers.get("bs3"), interpolator="4th", **TIGHT)
    with refused(ValueError, "interpolator", "dopri5", "bs3"):
        other(z0, span)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if not nde.solvers.get(name).one_step])
def test_a_solver_with_memory_is_refused(name):
    solver = nde.solvers.get(name)
    with refused(TypeError, name, "remembers"):
        core.NeuralODE(Driven(), solver=solver)(start())
    with refused(TypeError, "remembers"):
        as_torchdyn(solver)
    with refused(ValueError, "did you mean", "tsit5"):
        as_torchdyn("tsit6")


def test_no_tensor_no_state():
    with refused(TypeError, "dict"):
        nde.solvers.get("rk4").sync_device_dtype({"x": start()}, torch.linspace(0, 1, 2))


# -- theirs in ours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "theirs, name",
    [("DormandPrince45", "dopri5"), ("Tsitouras45", "tsit5"), ("Euler", "euler"), ("Midpoint", "midpoint")],
)
def test_the_same_method_has_the_same_result(theirs, name, control):
    f, z0, ts = Driven(), start(), torch.linspace(0, 1, 4)
    solver = getattr(ode, theirs)(dtype=D)
    adaptive = nde.solvers.get(name).adaptive
    options = {**TIGHT, "control": control} if adaptive else {"dt0": 0.02, "control": control}
    solution = own(f, z0, ts, solver=solver, **options)
    expected = own(f, z0, ts, solver=name, **options)
    close(solution.final, expected.final, 1e-8 if adaptive else 1e-13)
    close(solution.zs, expected.zs, 1e-6)  # their interpolants differ
    assert solution.solver.name == theirs and solution.converged.all()
    if not adaptive:
        assert torch.equal(solution.stats.nfe, expected.stats.nfe)


@pytest.mark.parametrize("adaptive", [True, False])
def test_work_is_counted(adaptive):
    calls = []
    solver = ode.Tsitouras45(dtype=D) if adaptive else hyper.HyperEuler(Correction(), dtype=D)
    solution = nde.solve(
        nde.ODE(lambda t, z: calls.append(1) or -z),
        start(),
        (0.0, 1.0),
        solver=solver,
        control="joint",
        **(TIGHT if adaptive else {"dt0": 0.1}),
    )
    assert int(solution.stats.nfe[0]) == solution.stats.function_calls == len(calls)


@pytest.mark.parametrize("kind", ["HyperEuler", "HyperMidpoint", "HyperRungeKutta4"])
@pytest.mark.parametrize("control", CONTROLS)
def test_hypersolvers_step_and_learn_as_in_torchdyn(kind, control):
    f, correction = Driven(), Correction()
    watched = [*f.net.parameters(), *correction.parameters()]
    z0 = start().requires_grad_()
    layer = core.NeuralODE(f, solver=getattr(hyper, kind)(correction, dtype=D), return_t_eval=False)
    expected = layer(z0, torch.linspace(0, 1, 11, dtype=D))[-1]
    theirs = torch.autograd.grad(expected.square().sum(), [z0, *watched])
    for adjoint in EXACT:
        solver = getattr(hyper, kind)(correction, dtype=D)
        final = own(f, z0, solver=solver, dt0=0.1, control=control, adjoint=adjoint).final
        close(final, expected, 1e-12)
        for a, b in zip(torch.autograd.grad(final.square().sum(), [z0, *watched]), theirs, strict=True):
            assert (b != 0).any()
            close(a, b, 1e-11)


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_hypernetwork_may_be_a_function(adjoint):
    correction, z0 = Correction(), start()
    solver = hyper.HyperEuler(lambda t, x: correction(t, x), dtype=D)
    own(Driven(), z0, solver=solver, dt0=0.1, adjoint=adjoint).final.sum().backward()
    assert all((p.grad != 0).any() for p in correction.parameters())


@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_a_hypersolver_does_not_learn_under_a_continuous_adjoint_and_says_so(adjoint):
    """The adjoint equation knows the solution, not what made it: a solver's own parameters have no part in it."""
    correction, z0 = Correction(), start().requires_grad_()
    solver = hyper.HyperEuler(correction, dtype=D)
    with refused(ValueError, "HyperEuler", repr(adjoint), "requires_grad_(False)", "'checkpointed'", "'direct'"):
        own(Driven(), z0, solver=solver, dt0=0.1, adjoint=adjoint)
    correction.requires_grad_(False)
    f = Driven()
    found, exact = (
        torch.autograd.grad(
            own(f, z0, solver=solver, dt0=0.0025, adjoint=a, **TIGHT).final.square().sum(), [z0, *f.net.parameters()]
        )
        for a in (adjoint, "direct")
    )
    for a, b in zip(found, exact, strict=True):
        close(a, b, 0.1)  # the exact one is of the forward solve, whose steps are of order one


def test_a_layer_with_a_hypersolver_has_its_parameters():
    correction = Correction()
    layer = nde.NeuralODE(Driven(), solver=hyper.HyperEuler(correction, dtype=D), dt0=0.1)
    assert {id(p) for p in correction.parameters()} <= {id(p) for p in layer.parameters()}
    layer(start()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert "HyperEuler" in repr(layer)


def test_images_keep_their_shape():
    def correction(t, x):
        assert x.shape == (2, 3, 4, 4)
        return torch.zeros_like(x)

    z0 = torch.randn(2, 3, 4, 4, dtype=D)
    solution = own(lambda t, z: -z, z0, solver=hyper.HyperEuler(correction, dtype=D), dt0=0.1)
    close(solution.final, z0 * 0.9**10, 1e-12)


@pytest.mark.parametrize("control", CONTROLS)
def test_rk4_is_of_first_order_where_f_depends_on_t(control):
    """torchdyn's defect, shown and not built on: it evaluates every stage at the step's start."""
    errors = []
    for n in (40, 80):
        solution = nde.solve(
            nde.ODE(rotating),
            rotating_exact(0.0)[None],
            (0.0, 1.0),
            solver=ode.RungeKutta4(dtype=D),
            dt0=1 / n,
            control=control,
        )
        errors.append(float((solution.final - rotating_exact(1.0)).norm()))
    assert errors[0] / errors[1] < 2.5


def test_finished_samples_leave_the_batch():
    rates = torch.tensor([0.1] * 6 + [300.0, 1.0], dtype=D)[:, None]
    solver = ode.DormandPrince45(dtype=D)
    solution = nde.solve(
        nde.ODE(lambda t, z, a: -a * z * (1 + t)), torch.ones(8, 1, dtype=D), (0.0, 1.0), solver=solver, args=rates
    )
    close(solution.final, torch.exp(-1.5 * rates), 1e-2)
    assert solution.stats.accepted[6] > 10 * solution.stats.accepted[0]


def test_implicit_euler_solves_and_refuses_gradients():
    f, z0 = Driven(), start().requires_grad_()
    with torch.no_grad():
        solution = own(f, z0, solver=ode.ImplicitEuler(dtype=D), dt0=0.01)
    close(solution.final, own(f, z0, **TIGHT).final, 2e-2)
    with refused(TypeError, "ImplicitEuler", "no_grad"):
        own(f, z0, solver=ode.ImplicitEuler(dtype=D), dt0=0.1).final.sum().backward()


def test_what_is_no_solver_for_us():
    with refused(TypeError, "AsynchronousLeapfrog", "(x, v)"):
        own(Driven(), start(), solver=ode.AsynchronousLeapfrog(), dt0=0.1)
    with refused(TypeError, "solver", "MSZero"):
        own(Driven(), start(), solver=ode.MSZero(), dt0=0.1)
    with refused(TypeError, "solver", "stepping_class"):
        from_torchdyn(ode.Euler)
    with refused(TypeError, "RungeKutta"):
        from_torchdyn(nde.solvers.get("tsit5"))
    with refused(ValueError, "dt0"):
        own(Driven(), start(), solver=ode.Euler())
    with refused(TypeError, "tuple"):
        nde.solve(nde.ODE(lambda t, z: z), (start(), start()), (0.0, 1.0), solver=from_torchdyn(ode.Euler()), dt0=0.1)


def test_importing_neuralde_imports_none_of_them():
    code = (
        "import sys, neuralde, neuralde.interop.torchdyn\n"
        "assert not {'torchdyn', 'torchdiffeq', 'pytorch_lightning', 'lightning', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
