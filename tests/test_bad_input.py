"""Bad input gets a ValueError or TypeError that names the argument, before anything is solved."""

import math

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, EQUILIBRIUM, FIXED, SOLVERS, options, refused
from torch import nn

import neuralde as nde

NAN, INF = math.nan, math.inf


def decay(t, z):
    return -z


def solve(**changes):
    """A solve that works, but for the changes."""
    call = {"equation": nde.ODE(decay), "z0": torch.ones(3, 2), "t": (0.0, 1.0), **changes}
    return nde.solve(**call)


def test_without_changes_the_solve_works():
    assert solve().converged.all()


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("rtol", 0.0, ValueError),
        ("rtol", -1e-3, ValueError),
        ("rtol", NAN, ValueError),
        ("rtol", INF, ValueError),
        ("rtol", "1e-3", TypeError),
        ("rtol", 1e-3j, TypeError),
        ("atol", -1e-6, ValueError),
        ("atol", NAN, ValueError),
        ("atol", INF, ValueError),
        ("atol", "1e-6", TypeError),
        ("max_steps", 0, ValueError),
        ("max_steps", -5, ValueError),
        ("max_steps", 10.0, TypeError),
        ("max_steps", "10", TypeError),
        ("on_failure", "stop", ValueError),
        ("on_failure", 3, ValueError),
    ],
)
def test_numbers(name, value, error):
    with refused(error, name):
        solve(**{name: value})


def test_none_is_the_default():
    usual = nde.ODE.usual._asdict()
    asked, given = solve(**dict.fromkeys(usual)), solve(**usual)
    assert torch.equal(asked.zs, given.zs) and asked.solver is given.solver
    assert usual == {
        "solver": "tsit5", "rtol": 1e-3, "atol": 1e-6, "adjoint": "checkpointed", "max_steps": 4096,
        "on_failure": "raise",
    }  # fmt: skip


@pytest.mark.parametrize("solver", ["tsit5", *FIXED])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0.0, ValueError), (-0.1, ValueError), (NAN, ValueError), (INF, ValueError), ("0.1", TypeError), ([], TypeError)],
)
def test_dt0(solver, value, error):
    with refused(error, "dt0"):
        solve(solver=solver, dt0=value)


@pytest.mark.parametrize("solver", FIXED)
def test_a_fixed_step_solver_needs_dt0(solver):
    with refused(ValueError, "dt0", solver):
        solve(solver=solver)
    with refused(ValueError, "dt0", solver):
        nde.NeuralODE(decay, solver=solver)


def test_fixed_steps_of_an_adaptive_solver_need_dt0():
    with refused(ValueError, "dt0"):
        solve(solver="tsit5", control=nde.StepControl(adaptive=False))
    with refused(ValueError, "dt0"):
        nde.NeuralODE(decay, control=nde.StepControl(adaptive=False))


@pytest.mark.parametrize(
    ("name", "value"),
    [("safety", 0.0), ("safety", 1.5), ("safety", NAN), ("factor_min", 0.0), ("factor_min", 1.5), ("factor_max", 0.5)],
)
def test_step_control(name, value):
    with refused(ValueError, name):
        nde.StepControl(**{name: value})


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("misspell", [lambda name: name + "_", str.upper])
def test_a_misspelt_solver_is_recognized(solver, misspell):
    with refused(ValueError, "solver", f"did you mean {solver!r}"):
        solve(solver=misspell(solver))


def test_an_unknown_solver_gets_the_nearest_name_and_the_whole_list():
    with refused(ValueError, "solver", "did you mean 'tsit5'", *SOLVERS):
        solve(solver="tsit")
    with refused(ValueError, "solver", *SOLVERS):
        solve(solver="?")


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_misspelt_adjoint_is_recognized(adjoint):
    with refused(ValueError, "adjoint", f"did you mean {adjoint!r}", *ADJOINTS):
        solve(adjoint=adjoint[:-1])


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("adjoint", "backsolve"),
        ("odeint_adjoint", "backsolve"),
        ("autograd", "direct"),
        ("interpolated_adjoint", "interpolating"),
        ("BacksolveAdjoint", "backsolve"),
        ("RecursiveCheckpointAdjoint", "checkpointed"),
    ],
)
def test_what_other_libraries_call_an_adjoint(word, name):
    with refused(ValueError, "adjoint", f"did you mean {name!r}"):
        solve(adjoint=word)


@pytest.mark.parametrize("name", ADJOINTS)
def test_a_class_is_not_an_adjoint(name):
    make = type(nde.adjoints.get(name))
    with refused(TypeError, "adjoint", f"{make.__name__}()"):
        solve(adjoint=make)
    with refused(TypeError, "adjoint", f"{make.__name__}()"):
        nde.NeuralODE(decay, adjoint=make)


def test_an_unknown_control_gets_the_known_ones():
    with refused(ValueError, "control", "per_sample", "joint"):
        solve(control="persample")


@pytest.mark.parametrize("name", ["solver", "adjoint", "control"])
@pytest.mark.parametrize("value", [("tsit5",), 5, nn.Linear(1, 1)])
def test_neither_a_name_nor_an_object_of_the_kind(name, value):
    with refused(TypeError, name, type(value).__name__):
        solve(**{name: value})


def test_names_are_taken_once():
    for registry in (nde.solvers, nde.adjoints):
        known = dict(registry.SOLVERS if registry is nde.solvers else registry.ADJOINTS)
        for name, value in known.items():
            with refused(ValueError, name, "registered already"):
                registry.register(value)
    assert list(nde.solvers.SOLVERS) == SOLVERS + EQUILIBRIUM


def test_a_method_without_an_error_estimate_cant_be_adaptive():
    with refused(ValueError, "adaptive", "mine"):
        nde.solvers.RungeKutta("mine", nde.solvers.tableaus.EULER, adaptive=True)


# -- times ---------------------------------------------------------------------------------------------------------

ONES = torch.ones(3, 1)


@pytest.mark.parametrize(
    ("t", "error", "words"),
    [
        ((0.0, 1.0, 0.5), ValueError, ["unsorted"]),
        ([0.0, 1.0, 0.5], ValueError, ["unsorted"]),
        (torch.tensor([1.0, 0.0, 0.5]), ValueError, ["unsorted"]),
        ((0.0, 0.0), ValueError, ["repeated"]),
        (torch.tensor([0.0, 0.5, 0.5, 1.0]), ValueError, ["repeated"]),
        ((1e8, 1e8 + 1), ValueError, ["repeated", "float32"]),  # equal in the time's precision
        (torch.stack([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])]), ValueError, []),
        (torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]), ValueError, ["unsorted", "sample 2"]),
        ((0.0, NAN), ValueError, ["finite"]),
        (torch.tensor([0.0, INF]), ValueError, ["finite"]),
        (torch.tensor([[0.0, 1.0], [0.0, NAN], [0.0, 1.0]]), ValueError, ["finite"]),
        ((0.0,), ValueError, ["two"]),
        ((), ValueError, ["two"]),
        (torch.tensor([1.0]), ValueError, ["two"]),
        (torch.zeros(3, 1), ValueError, ["two"]),
        (torch.tensor(1.0), ValueError, ["batch"]),
        (torch.zeros(4, 2), ValueError, ["batch", "3"]),
        (torch.zeros(3, 2, 2), ValueError, ["batch"]),
        ((0.0, torch.ones(4)), ValueError, ["batch"]),
        ((0.0, torch.ones(3, 1)), ValueError, ["batch"]),
        ((torch.zeros(2), torch.ones(3)), ValueError, []),
        ((0.0, None), TypeError, ["NoneType"]),
        (("0", "1"), TypeError, ["str"]),
        ((0.0, 1j), TypeError, ["complex"]),
        ("01", TypeError, ["str"]),
        (1.0, TypeError, ["float"]),
        (None, TypeError, ["NoneType"]),
        (torch.tensor([0j, 1j]), TypeError, ["complex"]),
        (torch.tensor([False, True]), TypeError, ["bool"]),
    ],
)
def test_times(t, error, words):
    with refused(error, *words) as caught:
        solve(t=t)
    assert str(caught.value).startswith("t ")


@pytest.mark.parametrize(
    "t", [(0.0, torch.tensor([1.0, 2.0, 1.0])), torch.tensor([[0.0, 1.0], [0.5, 1.0], [0.0, 1.0]])]
)
def test_joint_control_with_different_horizons(t):
    assert solve(t=t).converged.all()
    with refused(ValueError, "t ", "horizon", "per_sample"):
        solve(t=t, control="joint")


# -- the initial state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z0", "error", "words"),
    [
        (torch.tensor([[1.0], [NAN], [2.0], [INF]]), ValueError, ["finite", "1, 3"]),
        ((torch.ones(3, 1), torch.tensor([0.0, 0.0, -INF])), ValueError, ["finite", "2"]),
        (torch.full((9, 1), NAN), ValueError, ["0, 1, 2, 3, 4 and 4 more"]),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, ["int64", "float"]),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, ["bool"]),
        (torch.tensor(1.0), ValueError, ["batch"]),
        ({"x": torch.ones(3), "s": torch.tensor(1.0)}, ValueError, ["batch"]),
        (torch.ones(0, 2), ValueError, ["batch"]),
        ((torch.ones(0, 2), torch.ones(0)), ValueError, ["batch"]),
        ((), ValueError, ["empty"]),
        ({}, ValueError, ["empty"]),
        ((torch.ones(3), torch.ones(3, dtype=torch.float64)), TypeError, ["dtype", "float32", "float64"]),
        ((torch.ones(3), torch.ones(4)), ValueError, ["batch size", "3, 4"]),
        ((torch.ones(3), torch.ones(3, device="meta")), ValueError, ["device", "cpu", "meta"]),
        ((torch.ones(3), 1.0), TypeError, ["float"]),
        ((torch.ones(3), None), TypeError, ["NoneType"]),
        ([[1.0, 2.0]], TypeError, ["float"]),
        (1.0, TypeError, ["float"]),
        (None, TypeError, ["NoneType"]),
    ],
)
@pytest.mark.parametrize("control", CONTROLS)
def test_initial_state(z0, error, words, control):
    with refused(error, "z0", *words):
        solve(z0=z0, control=control)


# -- the vector field ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (lambda t, z: z[:, :1], ValueError, ["shape", "(3, 2)", "(3, 1)"]),
        (lambda t, z: z[:1], ValueError, ["shape", "(1, 2)"]),
        (lambda t, z: z.sum(), ValueError, ["shape", "()"]),
        (lambda t, z: z.double(), TypeError, ["dtype", "float32", "float64"]),
        (lambda t, z: z.to(torch.complex64), TypeError, ["dtype", "complex64"]),
        (lambda t, z: z.long(), TypeError, ["dtype", "int64"]),
        (lambda t, z: z.to("meta"), ValueError, ["device", "cpu", "meta"]),
        (lambda t, z: (z,), TypeError, ["tensor", "tuple"]),
        (lambda t, z: {"z": z}, TypeError, ["tensor", "dict"]),
        (lambda t, z: None, TypeError, ["tensor", "NoneType"]),
        (lambda t, z: 1.0, TypeError, ["tensor", "float"]),
        (lambda t, z: z.numpy(), TypeError, ["tensor", "ndarray"]),
    ],
)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_what_f_returns(f, error, words, control, adjoint):
    with refused(error, "f must return", *words):
        solve(equation=nde.ODE(f), control=control, adjoint=adjoint)


@pytest.mark.parametrize(
    ("f", "error"),
    [
        (lambda t, z: z[0], TypeError),
        (lambda t, z: list(z), TypeError),
        (lambda t, z: {"a": z[0], "b": z[1]}, TypeError),
        (lambda t, z: (z[0],), TypeError),
        (lambda t, z: (z[0], None), TypeError),
        (lambda t, z: (z[0], 0.0), TypeError),
        (lambda t, z: (z[0], z[0]), ValueError),
        (lambda t, z: (z[0], z[1].double()), TypeError),
        (lambda t, z: (z[1], z[0]), ValueError),
    ],
)
def test_what_f_returns_for_a_structure(f, error):
    with refused(error, "f must return"):
        solve(equation=nde.ODE(f), z0=(torch.ones(3, 2), torch.zeros(3)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_f_returns_is_checked_for_every_solver(solver):
    with refused(ValueError, "f must return", "shape"):
        solve(equation=nde.ODE(lambda t, z: z[:, :1]), **options(solver))


@pytest.mark.parametrize("equation", [decay, nn.Linear(2, 2)])
def test_an_equation_is_not_a_function(equation):
    with refused(TypeError, "equation", "nde.ODE("):
        solve(equation=equation)


@pytest.mark.parametrize("equation", [None, 3, "decay"])
def test_an_equation_is_an_ode(equation):
    with refused(TypeError, "equation", type(equation).__name__):
        solve(equation=equation)
    with refused(TypeError, "f must be a callable", type(equation).__name__):
        nde.ODE(equation)


@pytest.mark.parametrize("f", [nn.Sequential(nn.Linear(2, 2)), lambda z: -z])
def test_args_for_an_autonomous_f(f):
    with refused(TypeError, "args", "f(t, z, args)"):
        solve(equation=nde.ODE(f), args=torch.ones(3, 1))


@pytest.mark.parametrize(
    ("equation", "args", "called"),
    [
        (nde.ODE(lambda t, z, x: -z), None, "f(t, z)"),
        (nde.ODE(lambda t, z: -z), torch.ones(3, 1), "f(t, z, args)"),
        (nde.SteadyState(lambda z, x: 0.5 * z), None, "f(z)"),
        (nde.SteadyState(lambda t, z, x: 0.5 * z), torch.ones(3, 1), "f(z, args)"),
        (nde.SteadyState(torch.nn.Linear(1, 1)), torch.ones(3, 1), "f(z, args)"),
    ],
)
def test_an_f_that_takes_other_arguments(equation, args, called):
    with refused(TypeError, f"f is called as {called}", "its signature is", "args"):
        nde.solve(equation, torch.ones(3, 1), None if isinstance(equation, nde.SteadyState) else (0.0, 1.0), args=args)


def test_a_drift_that_takes_other_arguments():
    sde = nde.SDE(lambda t, z, args: -z, lambda t, z: torch.ones_like(z))
    with refused(TypeError, "drift is called as drift(t, z)", "its signature is"):
        nde.solve(sde, torch.ones(3, 1), (0.0, 1.0))


def test_an_error_of_fs_own_is_its_own():
    def f(t, z):
        return z + "a"

    with pytest.raises(TypeError, match="unsupported operand"):
        solve(equation=nde.ODE(f))


# -- what comes after the solve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("t", [-0.1, 1.1, NAN, INF, torch.tensor([0.5, 1.01])])
def test_a_solution_outside_of_its_horizon(horizon, control, dense, t):
    solution = solve(t=horizon, control=control, dense=dense)
    solution(0.5)
    with refused(ValueError, "t must", "horizon", "from 0 to 1"):
        solution(t)


@pytest.mark.parametrize("t", [torch.zeros(4, 2), torch.zeros(3, 2, 2)])
def test_a_solution_at_times_of_another_shape(t):
    with refused(ValueError, "t must", "batch"):
        solve()(t)


def test_each_sample_has_its_own_horizon():
    solution = solve(t=(0.0, torch.tensor([1.0, 2.0, 1.0])))
    assert solution(torch.tensor([[0.9], [1.9], [0.9]])).shape == (1, 3, 2)
    with refused(ValueError, "t must", "horizon"):
        solution(1.5)


@pytest.mark.parametrize("sample", [-1, 3, 1.5, "first", None])
def test_plot_of_a_sample_that_isnt_there(sample):
    with pytest.raises((ValueError, TypeError), match="sample must"):
        solve().plot(sample=sample)


def test_plot_on_too_few_axes():
    with refused(ValueError, "axes"):
        solve().plot(axes=[None, None])


@pytest.mark.parametrize("z0", [torch.ones(3, 1), torch.ones(2, 2), torch.ones(3, 2).double(), (torch.ones(3, 2),) * 2])
def test_replay_from_another_kind_of_state(z0):
    with refused(ValueError, "z0"):
        nde.introspection.replay(solve(), z0=z0)


# -- probe ---------------------------------------------------------------------------------------------------------


def probe(**changes):
    return nde.probe(**{"f": decay, "t": 0.0, "z": torch.ones(3, 2), **changes})


def test_without_changes_the_probe_works():
    assert probe().error.shape == (3,)


@pytest.mark.parametrize(
    ("name", "value", "error", "word"),
    [
        ("f", 3, TypeError, "f must be a callable"),
        ("f", lambda t, z: z[:, :1], ValueError, "f must return"),
        ("f", lambda t, z: z - z.mean(0), ValueError, "needs an f"),
        ("t", torch.zeros(4), ValueError, "t must"),
        ("t", torch.zeros(3, 1), ValueError, "t must"),
        ("t", NAN, ValueError, "t must"),
        ("z", torch.ones(3, 2, dtype=torch.int64), TypeError, "z0 must"),
        ("z", torch.tensor(1.0), ValueError, "z0 needs"),
        ("z", torch.tensor([[1.0], [NAN]]), ValueError, "finite"),
        ("dt", torch.ones(4), ValueError, "dt must"),
        ("dt", torch.ones(3, 1), ValueError, "dt must"),
        ("dt", 0.0, ValueError, "dt must"),
        ("dt", NAN, ValueError, "dt must"),
        ("dt", "0.1", TypeError, "dt must"),
        ("t1", torch.ones(4), ValueError, "t1 must"),
        ("t1", 0.0, ValueError, "t1"),  # no way to go
        ("solver", "tsit", ValueError, "unknown solver"),
        ("control", "persample", ValueError, "unknown control"),
        ("rtol", 0.0, ValueError, "rtol must"),
        ("rtol", "1e-3", TypeError, "rtol must"),
        ("atol", -1.0, ValueError, "atol must"),
    ],
)
def test_probe(name, value, error, word):
    with refused(error, word):
        probe(**{name: value})


def test_joint_probe_of_different_times():
    with refused(ValueError, "t must be a number"):
        probe(t=torch.zeros(3), control="joint")


# -- the layer -----------------------------------------------------------------------------------------------------


def test_a_layer_takes_the_options_of_solve_only():
    with refused(TypeError, "tolerance", "rtol", "on_failure"):
        nde.NeuralODE(decay, tolerance=1e-3)


@pytest.mark.parametrize("name", ["solver", "adjoint", "control"])
def test_a_layer_finds_unknown_names_when_it_is_made(name):
    with refused(ValueError, name):
        nde.NeuralODE(decay, **{name: "nothing"})
    with refused(TypeError, name):
        nde.NeuralODE(decay, **{name: 5})


def test_a_layer_needs_a_vector_field():
    with refused(TypeError, "f must be a callable"):
        nde.NeuralODE(None)


# -- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("t", [torch.tensor([0.0, 0.5, 1.0]), (0.0, torch.tensor(1.0)), torch.tensor([[0.0, 1.0]] * 3)])
def test_cuda_times_on_the_cpu_are_moved(t):
    solution = solve(z0=torch.ones(3, 2, device="cuda"), t=t)
    assert solution.final.is_cuda and solution.ts.is_cuda
    torch.testing.assert_close(solution.final.cpu(), solve(t=t).final, rtol=1e-5, atol=1e-6)
    assert solution(0.5).is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_f_on_another_device():
    with refused(ValueError, "f must return", "device", "cuda"):
        solve(z0=torch.ones(3, 2, device="cuda"), equation=nde.ODE(lambda t, z: -z.cpu()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_state_on_two_devices():
    with refused(ValueError, "z0", "device", "cuda"):
        solve(z0=(torch.ones(3), torch.ones(3, device="cuda")))


# -- what f does beside returning dz/dt --------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("taped", [True, False])
def test_f_that_changes_z_in_place_is_refused(adjoint, taped):
    z0 = torch.tensor([[-1.0, 1.0]], requires_grad=taped)
    for f, start in ((lambda t, z: -z.clamp_(min=0.0), z0), (lambda t, z: (z[0].neg_(), z[1]), (z0, z0))):
        with refused(ValueError, "changes its argument z in place"):
            nde.solve(nde.ODE(f), start, (0.0, 1.0), adjoint=adjoint)


def remembered(case):
    """f that remembers what it was called with first, or something made from it."""
    kept = []

    def f(t, z):
        if not kept:
            kept.append(z if case == "z" else torch.tanh(z))
        return -z * kept[0][: len(z)]

    return nde.ODE(f)


@pytest.mark.parametrize("adjoint", [x for x in ADJOINTS if x != "direct"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("case", ["z", "computed"])
def test_f_that_remembers_its_first_state_is_refused(adjoint, control, case):
    z0 = torch.ones(3, 1, requires_grad=True)
    solution = nde.solve(remembered(case), z0, (0.0, 1.0), adjoint=adjoint, control=control)
    with refused(nde.NeuralDEError, "what it remembers of z", "through args", "adjoint='direct'"):
        solution.final.sum().backward()
    # Nobody wants that part of the gradient where z0 has none.
    w = torch.ones(1, requires_grad=True)
    kept, more = remembered(case).f, {"adjoint": adjoint, "control": control}
    nde.solve(nde.ODE(lambda t, z: w * kept(t, z)), torch.ones(3, 1), (0.0, 1.0), **more).final.sum().backward()
    assert float(w.grad) < -0.1


def test_a_cache_of_z_has_its_gradient_under_direct():
    z0 = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    solution = nde.solve(remembered("z"), z0, (0.0, 1.0), adjoint="direct", rtol=1e-8, atol=1e-8)
    solution.final.sum().backward()
    # z(1) = z0·exp(-z0)
    assert float(z0.grad.abs().max()) < 1e-7


@pytest.mark.parametrize("adjoint", ["checkpointed", "backsolve", "interpolating"])
def test_f_that_keeps_a_computed_tensor_between_evaluations_is_refused(adjoint):
    """(At the end of the horizon "quadrature" evaluates f once: nothing is gone through twice.)"""
    w, kept = torch.ones(1, requires_grad=True), []

    def f(t, z):
        if not kept:
            kept.append(torch.exp(w))
        return -z * kept[0]

    solution = nde.solve(nde.ODE(f), torch.ones(2, 1), (0.0, 1.0), adjoint=adjoint, rtol=1e-6)
    with refused(nde.NeuralDEError, "kept", "through args"):
        solution.final.sum().backward()
